"""A method of one's own: every rank sends 8 bits a value to all others.

PYTHONPATH=experiments testbed run experiments/own_method.yaml
"""

from functools import partial

import torch

from netsenseml.exchange.collectives import all_gather, all_gather_bytes
from netsenseml.methods import Method


class Float8(Method):
    def exchange(self, bucket, statistics):
        statistics.scheme, gradient, ranks = "float8", bucket.buffer(), self.group.size()
        with statistics.coding():  # a scale of its own, in front of the values
            scale = gradient.abs().max().float().clamp(min=1e-30).view(1) / 448
            sent = (gradient / scale).to(torch.float8_e4m3fn)
            slot = torch.cat([scale.view(torch.uint8), sent.view(torch.uint8)])
            # what is lost of it decides with whom the method is compared
            energy = gradient.float().square().sum().item()
            statistics.lose(
                (gradient - sent.float() * scale).square().sum().item() / max(energy, 1e-30), energy
            )
        slots = statistics.launch(
            partial(all_gather, slot, self.group, ring=True),
            payload_bytes=all_gather_bytes(slot.nbytes, ranks),
            elements=gradient.numel(),
        )

        def mean(arrived):
            with statistics.coding():
                scales, values = arrived.value()[:, :4], arrived.value()[:, 4:]
                values = values.contiguous().view(torch.float8_e4m3fn).float()
                return gradient.copy_(
                    (values * scales.contiguous().view(torch.float32)).mean(dim=0)
                )

        return slots.then(mean)
