"""The DDP communication hook and its state, a session."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from netsenseml.clock import Clock, Mark
from netsenseml.exchange.mesh import abort, agree
from netsenseml.failure import PeerFailed, explain
from netsenseml.listener import Listener, Recorder
from netsenseml.methods import Method, make_method
from netsenseml.records import monotonic_s
from netsenseml.sensing.tcp import TcpMonitor, TcpSample
from netsenseml.statistics import StepStatistics
from netsenseml.streams import record_event, start_to_host

_FIRST_S, _LAST_S = 5.0, 15.0
"""After which the first and the last rank leave a group that has failed, if they would wait for
each other."""
_SAMPLE_S = 0.05
"""The kernel is asked so often at most: a sample of 7 connections took 41 us."""


def comm_hook(session: "Session", bucket: GradBucket) -> Future[torch.Tensor]:
    """The hook of the plain pair:
    ``ddp.register_comm_hook(Session(ddp, "topk", ratio=0.01), comm_hook)``."""
    return session.exchange(bucket)


class Session:
    """State of the hook: one method at work in one DDP model, with the records of its steps.

    Call ``step`` after every ``optimizer.step()``, and after ``scaler.update()`` if there is one. A
    script that never does gets the same records; a step then ends where the next backward hands
    over its first bucket, and loss and samples are null.

    With methods that update locally (localsgd, diloco, sparseloco, netsense with an interval or a
    delay) ``step`` exchanges parameters, and so must be called. In between every rank has its own:
    evaluate and save the model in ``with session.synchronized():``. All are equal after
    ``synchronize``, or ``close``. Optimizer and loss scale stay each rank's own, but that netsense
    makes optimizers equal, too, where it goes back to an exchange of gradients.

    If a rank dies, raises or stays silent, ``backward`` raises one error on all others, which names
    it (``PeerFailed``): soon if its process has ended, or with a method that codes if it has closed
    its session, else after the time-out of the process group, which is 30 minutes unless
    ``init_process_group`` was told otherwise; seconds more go into asking the others. Where
    ``step`` exchanges, that raises it. Session and process group are of no use then: close the
    session and leave, best by ``try: ... finally: session.close()``. So must a rank whose own code
    raises in the middle of a backward; the others then learn why. One that goes on is waited for in
    vain. No rank is left out and nothing is tried again: go on from a checkpoint. With NCCL,
    all-reduce as it is ends by NCCL's watchdog.
    Gradients that are not finite are no failure: they reach all ranks once, as with DDP, and
    nothing of them is kept.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        method: str,
        *,
        record: str | os.PathLike[str] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        """As ``attach``, without registering the hook and without the testbed."""
        self._refuse_compiled_autograd()
        self._open(ddp.module, ddp.module, ddp.process_group, method, record, scaler, options)
        self.method.holds_unused = ddp.find_unused_parameters
        ddp.broadcast_buffers = ddp.broadcast_buffers and self.method.shares_buffers

    def _open(
        self,
        module: nn.Module,
        exchanged: nn.Module,
        group: dist.ProcessGroup,
        method: str,
        record: str | os.PathLike[str] | None,
        scaler: torch.amp.GradScaler | None,
        options: Mapping[str, Any],
    ) -> None:
        """exchanged: has what the method exchanges as its parameters."""
        self.module = module
        self.rank = group.rank()
        """Of this process in the model's process group."""
        self._group = group
        self._peers = agree(self._group, {"netsenseml": _version(), "method": method, **options})
        self.method: Method = make_method(method, exchanged, self._group, options)
        self.last: Mapping[str, Any] | None = None
        """The newest row of the records. With an accelerator, that of a step comes when the next
        backward ends."""
        self.steps = 0
        """Steps that are done."""
        self.blocked_s = 0.0
        """Time that backward has waited in the hook, over all steps."""
        self._listeners: list[Listener] = [Recorder(record)] if record is not None else []
        self._scaler = scaler
        self._scale: float | None = None
        self.method.keeps_copy = scaler is not None
        if scaler is not None and not getattr(self.method, "takes_scaler", True):
            self.method.close()
            raise ValueError(
                "with an interval or a delay gradients do not meet the loss scale that they were"
                " made with: use no GradScaler, or interval=1 and delay=0"
            )
        addresses = {peer.address for peer in self._peers} - {
            self._peers[group.rank()].address,
            None,
        }
        self._tcp = TcpMonitor({address for address in addresses if address})
        self._sample: TcpSample | None = None
        self._sample_due_s = 0.0
        self._lock = threading.Lock()
        self._clock = Clock(
            next((p.device for p in exchanged.parameters() if p.requires_grad), torch.device("cpu"))
        )
        self._unsettled: _Backward | None = None
        self._landed_s = 0.0
        self._unrecorded: list[Callable[[], dict[str, Any]]] = []
        self._paused_s = self._paused_before_s = 0.0
        """Since the newest backward has begun, and from the one before until then."""
        self._in_backward = False
        self._failure: str | None = None
        self._exchanges: list[Future[torch.Tensor]] = []
        self._closed_by_step = self._closed = False
        self._parameters = {id(parameter) for parameter in module.parameters()}
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()
        self.method.optimizers = self._optimizers
        self._lr = 0.0
        self._stepped = True
        self._watching = register_optimizer_step_post_hook(self._after_optimizer)
        self._start(monotonic_s())

    def register(self, ddp: Any) -> None:
        """Take over the exchange of the model that this session was made for; it is not kept, as it
        keeps the session."""
        ddp.register_comm_hook(self, comm_hook)

    def _refuse_compiled_autograd(self) -> None:
        import torch._dynamo.config  # a second of import, which DDP has done when it was made

        if torch._dynamo.config.optimize_ddp in (
            "python_reducer",
            "python_reducer_without_compiled_forward",
        ):
            raise ValueError(
                "torch._dynamo.config.optimize_ddp = 'python_reducer' calls no communication hook;"
                " set it to True"
            )

    def _start(self, t0: float) -> None:
        self._t0 = t0
        self._statistics = StepStatistics(self._group.size(), self._clock)
        self._exchanged_s = self._statistics.began_s
        self._pending, self._all_launched = 0, False

    @property
    def elapsed_s(self) -> float:
        """Since t = 0 of the records."""
        return monotonic_s() - self._t0

    @property
    def failure(self) -> str | None:
        """What has ended the exchange, in one line; None while all is well."""
        return self._failure

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of all that follows. It may wait, and decide when t = 0."""
        self._listeners.append(listener)
        t0 = listener.attached(self)
        self._start(monotonic_s() if t0 is None else t0)

    def exchange(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """Exchange one bucket; DDP calls this through ``comm_hook``."""
        return self._exchange(bucket, first=bucket.index() == 0, last=bucket.is_last())

    def _exchange(self, bucket: GradBucket, *, first: bool, last: bool) -> Future[torch.Tensor]:
        """first, last: of this backward."""
        arrived_s, ready = monotonic_s(), self._clock.mark()
        if self._failure is not None:
            raise PeerFailed(self._failure)
        if self._closed:
            raise RuntimeError(
                "this session is closed; to train on, make the model's DistributedDataParallel anew"
            )
        if bucket.buffer().is_sparse:
            raise ValueError(
                "sparse gradients cannot be exchanged by a communication hook; make their layers"
                " dense: sparse=False"
            )
        beside = not self._clock.immediate and not self.method.waits
        if first:
            if not self._closed_by_step and self._statistics.elements:
                self._close_step(arrived_s, None, None)
            broken = self._in_backward  # the one before
            if self._unsettled is not None and (
                broken or self._unsettled.statistics is self._statistics
            ):
                self._settle()
            with self._lock:
                # whatever an earlier backward that raised has left behind
                self._pending, self._all_launched = 0, False
            self._in_backward = True
            self._paused_before_s, self._paused_s = (
                self._paused_s + (self._paused_before_s if broken else 0.0),
                0.0,
            )
            self._statistics.begin_backward()
            self._exchanges = []
            # The device computes meanwhile, but may run out of work while ``begin`` waits for
            # others.
            idle = self._statistics.waiting() if beside and not last else contextlib.nullcontext()
            with self._noticing(), idle:
                self._follow_learning_rate()  # which may wait, too
                self.method.begin()
        if last:
            self._catch_up()
        statistics = self._statistics
        statistics.arrive(bucket.buffer().numel(), ready)
        with self._lock:
            self._pending += 1
            self._all_launched = last
        with self._noticing(buckets=1):
            done = self.method.exchange(bucket, statistics).then(
                partial(self._exchanged, self._exchanges)
            )
        self._exchanges.append(done)
        # ahead of DDP, whose reducer would make a RuntimeError of it
        if last and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._await)
        now_s = monotonic_s()
        self.blocked_s += now_s - arrived_s
        if not last and not beside:  # what follows the last one is exposed from when it was ready
            # what came before is of the step before
            statistics.exposed_s += now_s - max(arrived_s, statistics.began_s)
        return done

    @contextlib.contextmanager
    def _noticing(self, buckets: int = 0) -> Iterator[None]:
        """What a method raises while it waits is a failure, too; no callback will tell of the
        bucket."""
        try:
            yield
        except Exception as error:
            why = self._failed(error)
            with self._lock:
                self._pending -= buckets
            if isinstance(error, RuntimeError):
                raise PeerFailed(why) from None
            raise

    def _await(self) -> None:
        for done in self._exchanges:
            try:
                done.wait()
            except RuntimeError:
                if self._failure is None:
                    raise
                raise PeerFailed(self._failure) from None

    def _exchanged(
        self, backward: list[Future[torch.Tensor]], done: Future[torch.Tensor]
    ) -> torch.Tensor:
        try:
            result = done.value()
        except Exception as error:
            why = self._failed(error)
            with self._lock:
                self._pending -= 1
            raise PeerFailed(why) from None
        with self._lock:
            if backward is not self._exchanges:  # one that raised, of which this came late
                return result
            self._pending -= 1
            if self._pending or not self._all_launched:
                return result
            self._all_launched = False
        self._end_backward()
        return result

    def _end_backward(self) -> None:
        finish = self.method.end_backward()
        self._unsettled = _Backward(
            self._statistics, self._clock.mark(), self._paused_before_s, finish
        )
        self._in_backward = False
        self._statistics.tcp = self._sensed()
        if self._clock.immediate:
            self._settle()

    def _catch_up(self) -> None:
        """Take the backward before this one into account, and tell of the step that it was part of.

        Not before this backward's work was submitted: a device that is behind has enough to do then
        while the CPU waits for it here, and so never runs out of work.
        """
        self._settle()
        self._record()

    def _settle(self) -> None:
        """Take the last backward into account: at once, or where a device is behind, when the next
        one ends."""
        ended, self._unsettled = self._unsettled, None
        if ended is None:
            return
        statistics = ended.statistics
        # an exchange may outlast its step
        statistics.landed_s = max(statistics.landed_s, self._landed_s)
        statistics.settle()
        before_s, self._exchanged_s = (
            self._exchanged_s + ended.paused_s,
            self._clock.seconds(ended.exchanged),
        )
        ready_s, self._landed_s = statistics.ready_s[-1], statistics.landed_s
        statistics.compute_s += ready_s - before_s
        statistics.exposed_s += self._exchanged_s - ready_s
        ended.finish(statistics)

    def _failed(self, error: BaseException) -> str:
        with self._lock:
            if self._failure is None:
                abort(self._group)  # so that the other ranks notice
                self._failure = explain(error, self._group, self._peers, self._group.rank())
            return self._failure

    def _sensed(self) -> TcpSample | None:
        now_s = monotonic_s()
        if now_s >= self._sample_due_s:
            self._sample, self._sample_due_s = self._tcp.sample(), now_s + _SAMPLE_S
        return self._sample

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Any optimizer has made a step."""
        if self._options_of(optimizer) is None:
            return
        # a fused one that leaves the step out by itself
        if float(getattr(optimizer, "found_inf", 0.0)):
            return
        self._stepped = True
        if not self._optimizers:
            self.method.optimizer(
                adaptive=not isinstance(optimizer, torch.optim.SGD | torch.optim.ASGD)
            )
        if optimizer not in self._optimizers:
            own = _parameters_of(optimizer)
            for other in [
                other for other in self._optimizers if not own.isdisjoint(_parameters_of(other))
            ]:
                # it works inside of this one, which ZeroRedundancyOptimizer may be
                self._optimizers.discard(other)
            self._optimizers.add(optimizer)

    def _options_of(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Any] | None:
        """The first of its groups with a parameter of this model."""
        return next(
            (
                g
                for g in optimizer.param_groups
                if any(id(p) in self._parameters for p in g["params"])
            ),
            None,
        )

    def _follow_learning_rate(self) -> None:
        """What error feedback keeps is worth as much as before after a change of the learning rate.

        That is the rate of the first parameters; nothing is done where several optimizers share the
        model.
        """
        if len(self._optimizers) != 1:
            return
        (optimizer,) = self._optimizers
        lr = float((self._options_of(optimizer) or {}).get("lr", 0.0))
        if lr > 0 and not math.isclose(lr, self._lr, rel_tol=1e-3):
            if self._lr > 0:
                self.method.rescale(self._lr / lr, gradients=False)
            self._lr = lr

    def step(
        self, loss: torch.Tensor | float | None = None, samples: int | torch.Tensor | None = None
    ) -> bool:
        """End a step; returns False when the run should end.

        loss, samples: training loss and size of this rank's batch, for the records.
        With a method that updates locally, the ranks exchange their parameters here. A listener may
        wait here, so that all ranks end after the same step.
        """
        self._closed_by_step = True
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            if not self._stepped and self._optimizers:
                self.method.undo()
            if self._scale is not None and scale != self._scale and scale > 0:
                self.method.rescale(scale / self._scale, gradients=True)
            self._scale = scale
        self._stepped = False
        with self._noticing():
            self.method.after_step(self._statistics)
        self._close_step(monotonic_s(), loss, None if samples is None else int(samples))
        with self.pause():
            return min([listener.step(self.steps) for listener in self._listeners], default=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Between two steps: time spent inside belongs to no step of this rank. Others wait for it
        in their next exchange."""
        began_s = monotonic_s()
        try:
            yield
        finally:
            paused_s = monotonic_s() - began_s
            self._statistics.began_s += paused_s
            self._paused_s += paused_s

    def synchronize(self) -> None:
        """Make the parameters of all ranks equal, where a method that updates locally lets them
        differ: an exchange before its time. Call it on every rank, between two steps. ``close``
        does so, too; call it where something comes before that, such as a last evaluation.
        """
        with self._noticing():
            self.method.synchronize(self._statistics)

    @contextlib.contextmanager
    def synchronized(self) -> Iterator[None]:
        """Evaluate the model or save it in here, between two steps, on any rank: nobody waits, and
        nothing is exchanged.

        With a method that updates locally, the model has the parameters that all ranks had in
        common last, and afterwards its own ones again. With all others nothing changes.
        """
        with self.method.synchronized():
            yield

    def evaluated(self, accuracy: float, loss: float) -> None:
        """Record an evaluation after the steps done so far; accuracy from 0 to 1. Call it on rank
        0."""
        row = {
            "step": self.steps,
            "t_s": self.elapsed_s,
            "accuracy": float(accuracy),
            "loss": float(loss),
        }
        for listener in self._listeners:
            listener.evaluated(row)

    def close(self, accuracy: float | None = None, loss: float | None = None) -> None:
        """End the run after its last step, with the final evaluation if this rank made one. Call it
        on every rank.

        Parameters that differ between ranks are synchronised first, unless this rank leaves by an
        exception.
        """
        self._watching.remove()
        self._closed = True
        if self._in_backward and self._statistics.elements:
            error = sys.exc_info()[1] or RuntimeError(
                "the session was closed in the middle of a backward"
            )
            self._failed(error)
            self.fail(error)  # now, since leaving may take a while
        try:
            if not self._in_backward:
                if self._failure is None and sys.exc_info()[1] is None:
                    self.synchronize()
                self._settle_last()
        finally:
            self._leave(accuracy, loss)

    def _settle_last(self) -> None:
        ended = self._unsettled
        # with NCCL, a peer that is gone
        if ended is not None and not self._clock.reached(ended.exchanged, _LAST_S):
            self._unsettled, self._unrecorded = None, []
        self._settle()
        if self._statistics.elements:
            self._close_step(monotonic_s(), None, None)
        elif self._statistics.payload_bytes:  # after the last step: a row, but no step
            self._statistics.settle()
            ended_s = self._statistics.began_s + self._statistics.exposed_s
            bandwidth_bps = self.method.bandwidth_bps
            self._unrecorded.append(
                partial(
                    self._row,
                    self.steps,
                    self._statistics,
                    ended_s,
                    bandwidth_bps,
                    _number(None),
                    None,
                )
            )
        self._record()

    def _leave(self, accuracy: float | None, loss: float | None) -> None:
        listeners, self._listeners = self._listeners, []
        if self._failure is not None:
            self._outlast_callbacks()
        try:
            self.method.close()
        finally:
            for listener in listeners:
                listener.closed(accuracy, loss)

    def _outlast_callbacks(self) -> None:
        """A callback of DDP's group that comes while the interpreter ends aborts the process.

        They may wait for a rank that waits here, too, as nothing but a time-out ends them: so one
        rank after another leaves.
        """
        given_up_s = monotonic_s() + min(_FIRST_S + 2.0 * self._group.rank(), _LAST_S)
        while self._pending > 0 and monotonic_s() < given_up_s:
            time.sleep(0.01)

    def fail(self, error: BaseException) -> None:
        """Tell who listens that this rank cannot go on, and why."""
        for listener in self._listeners:
            listener.failed(error)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method on this rank: its error feedback, and what it
        has learnt of the network.

        Call it between two steps, on the thread that trains, and on all ranks after the same step.
        """
        self._settle()
        own = {
            "ranks": self._group.size(),
            "step": self.steps,
            "lr": self._lr,
            "scale": self._scale,
        }
        return {**own, **self.method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint made with the same method, by as many ranks. Call it on all ranks;
        it waits for them.

        Raises ValueError, one line, if it does not fit, or if the ranks' checkpoints are not of the
        same step.
        """
        self._settle()
        if state["ranks"] != (ranks := self._group.size()):
            raise ValueError(
                f"the checkpoint is of {state['ranks']} ranks, not {ranks}: what each has kept"
                f" belongs to its rank, and counts for 1/{state['ranks']} of a mean; go on without"
                " the state of the hook"
            )
        agree(self._group, {"step of the checkpoint": state.get("step", state.get("steps"))})
        self.method.load_state_dict(state)
        self.steps = state.get("step", self.steps)
        self._lr, self._scale = state.get("lr", 0.0), state.get("scale")

    def _close_step(
        self, ended_s: float, loss: torch.Tensor | float | None, samples: int | None
    ) -> None:
        row = partial(
            self._row,
            self.steps,
            self._statistics,
            ended_s,
            self.method.bandwidth_bps,
            _number(loss),
            samples,
        )
        self._unrecorded.append(row)
        self.steps += 1
        self.method.end_step()
        self._statistics = StepStatistics(self._group.size(), self._clock)
        if self._clock.immediate:
            self._record()

    def _record(self) -> None:
        """Tell of the steps that are closed."""
        closed, self._unrecorded = self._unrecorded, []
        for row in closed:
            self.last = row()
            for listener in self._listeners:
                listener.record(self.last)

    def _row(
        self,
        step: int,
        done: StepStatistics,
        ended_s: float,
        bandwidth_bps: float | None,
        loss: Callable[[], float | None],
        samples: int | None,
    ) -> dict[str, Any]:
        done.settle()
        tcp = done.tcp
        sensed = tcp if self.method.senses else None
        step_s = ended_s - done.began_s
        return {
            "rank": self.rank,
            "step": step,
            "t_s": ended_s - self._t0,
            "loss": loss(),
            "samples": samples,
            "step_s": step_s,
            # with an accelerator, one is the CPU's time and one the device's
            "compute_s": max(0.0, step_s - done.exposed_s),
            "comm_s": done.exposed_s,
            "encode_s": done.encode_s,
            "payload_bytes": done.payload_bytes,
            "dense_bytes": done.dense_bytes,
            "scheme": done.scheme,
            "ratio": done.ratio,
            "lost_energy": done.lost_energy,
            "residual_ratio": done.residual_ratio,
            "bandwidth_bps": bandwidth_bps,
            "rtt_s": sensed and sensed.rtt_s,
            "min_rtt_s": sensed and sensed.min_rtt_s,
            "retransmits": tcp and tcp.retransmits,
        }


class _Backward(NamedTuple):
    """One that has ended. exchanged: when. paused_s: between the one before and this one. finish:
    learns from its times."""

    statistics: StepStatistics
    exchanged: Mark
    paused_s: float
    finish: Callable[[StepStatistics], None]


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _number(value: torch.Tensor | float | None) -> Callable[[], float | None]:
    """Tells a number; of a device, only once that has come so far."""
    if not isinstance(value, torch.Tensor):
        return lambda: None if value is None else float(value)
    if value.device.type == "cpu":
        number = value.item()  # now, as it may be changed
        return lambda: number
    copy = start_to_host(value.detach().reshape(()))
    copied = record_event(value.device)

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read


def _version() -> str:
    try:
        return version("netsenseml")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
