"""Local SGD."""

import torch.distributed as dist
from torch import nn

from netsenseml.methods.local import LocalUpdates, plan_of


class LocalSgd(LocalUpdates):
    """Local SGD (Stich, ICLR 2019): every ``inner_steps`` steps the ranks' parameters become their
    mean.

    How many steps is best the paper leaves to the problem; the default is ours. ``values`` other
    than fp32 are sent in two phases with error feedback, which the paper does not have.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup, *, inner_steps: int, values: str
    ) -> None:
        super().__init__(module, group, f"localsgd/{values}", inner_steps=inner_steps)
        self.plan = plan_of(values)
