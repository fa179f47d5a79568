"""A method of one's own: every rank sends 8 bits a value to all others.

PYTHONPATH=experiments testbed run experiments/own_method.yaml
"""

from functools import partial

import torch

from netsenseml.exchange.collectives import all_gather_bytes, all_gather_hops, all_gather_slots
from netsenseml.methods import Method


class Float8(Method):
    def exchange(self, bucket, ledger):
        ledger.scheme, gradient, ranks = "float8", bucket.buffer(), self.group.size()
        with ledger.coding():
            slot = gradient.to(torch.float8_e4m3fn).view(torch.uint8)
        slots = ledger.launch(
            partial(all_gather_slots, slot, self.group),
            payload_bytes=all_gather_bytes(slot.nbytes, ranks),
            hops=all_gather_hops(slot.nbytes, ranks),
            elements=gradient.numel(),
        )

        def mean(arrived):
            with ledger.coding():
                return gradient.copy_(arrived.value().view(torch.float8_e4m3fn).float().mean(dim=0))

        return slots.then(mean)
