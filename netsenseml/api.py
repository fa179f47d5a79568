"""``attach``: the entry point of the package, for models of DDP and of FSDP2."""

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml.fsdp import ShardedSession, is_sharded
from netsenseml.hook import Session
from netsenseml.listener import from_environment


def attach(
    model: nn.Module,
    method: str | None = None,
    *,
    record: str | os.PathLike[str] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Session:
    """Let ``model`` exchange its gradients by ``method``, on every rank with the same arguments.

        session = attach(model, "netsense")
        for x, y in batches:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss, samples=len(x))
        session.close()

    The gradients may be on the CPU or on a GPU.

    When not to use it: between GPUs of one machine, or where a step waits for no gradients anyway
    (``comm_s`` of its records with "allreduce"); DDP's own exchange is as good there.

    model: a DistributedDataParallel, which ``torch.compile`` may have compiled, or one that
        ``fully_shard`` has made on a mesh of replicas and shards (``netsenseml.fsdp``).
    method: a name of ``catalog.METHODS``, one registered as an entry point of the group
        ``netsenseml.methods``, or ``package.module:Class``; ``options`` are its options. A listener
        may name it instead, as the testbed's does.
    record: file that receives one JSON line a step (``records.STEP_COLUMNS``).
    scaler: the GradScaler in use, so that what error feedback keeps follows its scale and survives
    steps that it leaves out.

    Where the environment names a listener (``netsenseml.listener``), that is told, and may wait for
    others.
    Raises TypeError, one line, for any other model; ValueError, one line, if no method is known, a
    name or option does not exist, the method cannot exchange these gradients, or the ranks differ;
    RuntimeError if a rank does not come within the time-out of the process group.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    session_of = _kind_of_session(model)
    listener = from_environment()
    wanted = listener.method() if listener is not None else None
    if wanted is not None:
        if method not in (None, wanted[0]):
            raise ValueError(
                f"the spec names the method '{wanted[0]}', the script '{method}'; leave it to the"
                " spec: attach(model)"
            )
        method, options = wanted[0], {**wanted[1], **options}
    if method is None:
        raise ValueError(
            "no method: call attach(model, method=...), or run in the testbed, whose spec names it"
        )
    session = session_of(model, method, record=record, scaler=scaler, **options)
    try:
        session.register(model)
        if listener is not None:
            session.listen(listener)
    except BaseException:
        session.close()
        raise
    return session


def _kind_of_session(model: nn.Module) -> Any:
    if isinstance(model, DistributedDataParallel):
        return Session
    if is_sharded(model):
        return ShardedSession
    raise TypeError(
        "attach takes a DistributedDataParallel or a model that fully_shard has made, not"
        f" {type(model).__name__}; wrap it first (Accelerate and Lightning do only where they know"
        " of several processes)"
    )
