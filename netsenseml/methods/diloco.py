"""DiLoCo, and its streaming form."""

import torch.distributed as dist
from torch import nn

from netsenseml.methods.local import LocalUpdates, plan_of


class DiLoCo(LocalUpdates):
    """DiLoCo (Douillard et al., arXiv 2311.08105): the outer optimizer is SGD with Nesterov's
    momentum, by default with the authors' 500 inner steps, lr 0.7 and momentum 0.9. Their inner
    optimizer is AdamW; any other does.

    With ``fragments`` and ``overlap`` it is Streaming DiLoCo (Douillard et al., arXiv 2501.18512):
    fragments of the model are exchanged in turn, and mixed half and half with what the ranks have
    made of them meanwhile. Its authors send floating-point numbers of 4 bits, here values: int4;
    their fragments are every so-manyth layer, ours are successive parameters.

    ``values`` other than fp32 are sent in two phases with error feedback, which neither paper has.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        inner_steps: int,
        outer_lr: float,
        outer_momentum: float,
        values: str,
        fragments: int,
        overlap: int,
        mixing: float,
    ) -> None:
        super().__init__(
            module,
            group,
            f"diloco/{values}",
            inner_steps=inner_steps,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
            fragments=fragments,
            overlap=overlap,
            mixing=mixing if overlap else 0.0,
        )
        self.plan = plan_of(values)
