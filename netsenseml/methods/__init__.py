"""Methods of exchanging gradients, by name.

A method of your own is a class with the interface of ``Method``, named as ``package.module:Class``
or registered as an entry point of the group ``netsenseml.methods``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from netsenseml.catalog import check_method, is_import_path, load, registered_methods
from netsenseml.methods.base import Method
from netsenseml.methods.compressed import Dgc, Qsgd, Quantized, Random, SignSgd, TopK, WideTopK
from netsenseml.methods.demo import DeMo
from netsenseml.methods.diloco import DiLoCo
from netsenseml.methods.localsgd import LocalSgd
from netsenseml.methods.netsense import NetSense
from netsenseml.methods.plain import AllReduce, BFloat16, Float16
from netsenseml.methods.powersgd import PowerSgd
from netsenseml.methods.sparseloco import SparseLoCo

__all__ = ["METHODS", "Method", "load", "make_method"]

METHODS: Mapping[str, Callable[..., Method]] = {
    "allreduce": AllReduce,
    "bf16": BFloat16,
    "demo": DeMo,
    "dgc": Dgc,
    "diloco": DiLoCo,
    "fp16": Float16,
    "localsgd": LocalSgd,
    "netsense": NetSense,
    "powersgd": PowerSgd,
    "qsgd": Qsgd,
    "quantized": Quantized,
    "randomk": Random,
    "signsgd": SignSgd,
    "sparseloco": SparseLoCo,
    "topk": TopK,
    "topk12": WideTopK,
}


def make_method(
    name: str, module: nn.Module, group: dist.ProcessGroup, options: Mapping[str, Any]
) -> Method:
    """The method called ``name``; raises ValueError, one line, for a name or an option that does
    not exist, and for a model whose gradients it cannot exchange."""
    resolved = check_method(name, options)
    made = METHODS.get(name) or (
        load(name) if is_import_path(name) else registered_methods()[name].load()
    )
    _check_gradients(name, made, module)
    method: Method = made(module, group, **resolved)
    return method


def _check_gradients(name: str, method: Any, module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if getattr(layer, "sparse", False) is True:
            raise ValueError(
                f"{path or 'the model'} has sparse gradients, which no communication hook gets"
                " right; set sparse=False"
            )
    takes_complex = getattr(method, "takes_complex", True)
    for path, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex() and not takes_complex:
            raise ValueError(
                f"'{name}' cannot exchange complex gradients ({path}); choose allreduce"
            )
