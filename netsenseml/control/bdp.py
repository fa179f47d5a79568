class BdpPolicy:
    def __init__(self, ranks, ratio, share, floor, fall, rise):
        self.__dict__.update(locals())
    def decide(self, bw, window, dense):
        budget = self.share*bw/8*window
        sparse_unit = (self.ranks-1)*8*dense/(2*(self.ranks-1)/self.ranks*4)
        want = budget/sparse_unit
        if dense <= budget: self.ratio=1.; return self.ratio
        self.ratio=max(self.floor,min(want, self.ratio*self.rise, 1/self.ranks)); return self.ratio
