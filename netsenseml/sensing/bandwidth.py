class BandwidthEstimate:
    def __init__(self): self.bps=None
    def update(self, b, s):
        if s>0: self.bps = b*8/s
        return self.bps
