"""RankLoop: runs the step plans that come over a link on one Worker, and answers them in order."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from cluster.peers import Peers
from cluster.processes import has_children, process_state
from cluster.step_channel import RankFault, RankLink
from engine.errors import ExecutorDied
from engine.step import StepMasks, StepPlan, StepResult, decode_masks, decode_plan, encode, unpack

logger = logging.getLogger(__name__)

Received = TypeVar("Received")

RESULT = b"R"
FAULT = b"F"


class PendingStep(Protocol):
    """A step that was handed to the device."""

    @property
    def done(self) -> bool:
        """Whether wait() returns at once."""
        ...

    def wait(self) -> StepResult | None:
        """Block until the step is done; its result on rank 0, None on the others."""
        ...


class StepWorker(Protocol):
    """What the loop needs of engine.worker.Worker."""

    def submit(self, plan: StepPlan, masks: Callable[[], StepMasks] | None = None) -> PendingStep:
        """Hand a plan to the device, behind those before it; `masks` blocks until those of a masked plan are there."""
        ...

    @property
    def unrecorded(self) -> int:
        """How many CUDA graphs await_plan has yet to record."""
        ...

    def await_plan(self, receive: Callable[[float | None], Received]) -> Received:
        """What `receive` gives, which raises TimeoutError after the seconds it gets; the time until then is used."""
        ...

    def reset(self, epoch: int) -> None:
        """Forget every sequence and every block."""
        ...


class Progress(msgspec.Struct, frozen=True):
    """How far a rank is, and whether its thread that runs plans works or sleeps."""

    submitted: int = 0
    """Steps handed to the device."""
    done: int = 0
    busy_s: float = 0.0
    """How long the oldest step that is not done has been running; 0 when there is none."""
    collectives: int = 0
    """Entered since the loop began; they are only counted on a CPU."""
    meeting: bool = False
    """In a collective now."""
    thread_s: float = 0.0
    """CPU time of the thread."""
    process_s: float = 0.0
    runs: bool = False
    """The thread runs, or waits for a core or a disk."""
    awaits_driver: bool = False
    """The thread waits for the masks of its plan."""
    preparing: bool = False
    """The thread awaits no plan but works, or a child process does for it: kernels are compiled, graphs recorded."""
    unrecorded: int = 0
    """CUDA graphs that will be recorded while no plan comes."""


class RankLoop:
    """One rank's loop. Two threads: one hands plans to the device, one waits for them and answers, in order.

    So the next plan is on the device before this one's result has been read. The first plan of a link opens an epoch:
    the worker forgets everything before it.
    """

    def __init__(
        self,
        worker: StepWorker,
        link: RankLink,
        rank: int,
        *,
        bind: Callable[[], None] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._worker, self._link, self._rank = worker, link, rank
        self._bind = bind or (lambda: None)
        self._peers = peers
        self._thread = 0
        self._clock: int | None = None
        """The CPU clock of the thread that runs plans, while it does."""
        self._receiving = self._awaiting = False
        self._running: queue.SimpleQueue[tuple[int, PendingStep] | None] = queue.SimpleQueue()
        self._submitted = 0
        self._done = 0
        self._since_s = 0.0
        self._faulty = threading.Event()
        self._unheard = False
        self.at: tuple[int, int] | None = None
        """(epoch, step) of the next plan, once the loop is over and every plan before it is done."""

    @property
    def progress(self) -> Progress:
        """From any other thread."""
        clock, peers = self._clock, self._peers
        busy = self._submitted > self._done
        state = process_state(os.getpid(), self._thread) if clock is not None else ""
        works = state in ("R", "D")
        return Progress(
            submitted=self._submitted,
            done=self._done,
            busy_s=time.monotonic() - self._since_s if busy else 0.0,
            collectives=peers.entered if peers is not None else 0,
            meeting=peers is not None and peers.meeting,
            thread_s=time.clock_gettime(clock) if clock is not None and state else 0.0,
            process_s=time.process_time(),
            runs=works,
            awaits_driver=self._awaiting,
            preparing=clock is not None and not self._receiving and (works or has_children(os.getpid())),
            unrecorded=self._worker.unrecorded,
        )

    def run(self) -> str:
        """Run until the link ends or a step fails; says why it ended. Bind the device to this thread first."""
        if self._peers is not None:
            self._peers.restart_count()
        self._thread, self._clock = threading.get_native_id(), time.pthread_getcpuclockid(threading.get_ident())
        try:
            return self._run()
        finally:
            self._clock = None

    def _run(self) -> str:
        answerer = threading.Thread(target=self._answer, name="manta-answers", daemon=True)
        answerer.start()
        reason = "the link was closed"
        epoch, step = None, 0
        try:
            while not self._faulty.is_set() and (payload := self._worker.await_plan(self._receive)) is not None:
                plan = decode_plan(payload)
                if epoch is None:
                    self._worker.reset(plan.epoch)
                    epoch, step = plan.epoch, plan.step
                assert (plan.epoch, plan.step) == (epoch, step), f"plan {plan.epoch}:{plan.step} at {epoch}:{step}"
                step += 1
                if self._submitted == self._done:
                    self._since_s = time.monotonic()
                self._submitted += 1
                self._log(plan)
                pending = self._worker.submit(plan, self._await_masks)
                if pending.done and self._submitted == self._done + 1:
                    self._finish(pending)  # no device to wait for: spare the other thread
                else:
                    self._running.put((plan.step, pending))
        except _LinkClosed as error:
            reason = str(error)
        except Exception as error:
            reason = self._fail(step - 1, error)
        self._running.put(None)
        if not self._faulty.is_set():
            answerer.join()
        if not self._faulty.is_set() and self._submitted == self._done:
            self.at = (epoch or 0, step)
        return reason

    def _receive(self, timeout_s: float | None = None) -> bytes | None:
        self._receiving = True
        try:
            return self._link.receive(timeout_s)
        except TimeoutError:  # an OSError, too, and none of the link's
            raise
        except OSError as error:
            logger.warning("rank %d: the driver is gone: %s", self._rank, error)
            return None
        finally:
            self._receiving = False

    def _await_masks(self) -> StepMasks:
        """The masks of the plan just received: they come behind it, before any other plan."""
        self._awaiting = True
        payload = self._receive()
        self._awaiting = False
        if payload is None:
            raise _LinkClosed("the link was closed before the step's masks came")
        return decode_masks(payload)

    def _answer(self) -> None:
        self._bind()
        while (item := self._running.get()) is not None:
            step, pending = item
            try:
                self._finish(pending)
            except Exception as error:
                self._fail(step, error)
                return

    def _finish(self, pending: PendingStep) -> None:
        result = pending.wait()
        self._done += 1
        self._since_s = time.monotonic()
        if result is None or self._unheard:
            return
        try:
            self._link.send(RESULT + encode(result))
        except OSError as error:
            # The other ranks run what the driver sent before it went, and wait for this one in their collectives.
            logger.warning("rank %d: nobody hears its answers: %s", self._rank, error)
            self._unheard = True

    def _fail(self, step: int, error: Exception) -> str:
        self._faulty.set()
        text = f"{type(error).__name__}: {error}"
        logger.exception("rank %d: step %d failed: %s", self._rank, step, text)
        trace = "".join(traceback.format_exception(error))
        try:
            self._link.send(
                FAULT + msgspec.msgpack.encode(RankFault(step, text, trace, isinstance(error, ExecutorDied)))
            )
        except OSError:
            logger.warning("rank %d: nobody to tell of it", self._rank)
        return text

    def _log(self, plan: StepPlan) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return
        for sequence in plan.new:
            logger.debug("rank %d: request %s is sequence %d", self._rank, sequence.request_id, sequence.seq_id)
        for seq_id in unpack(plan.dropped).tolist():
            logger.debug("rank %d: sequence %d dropped", self._rank, seq_id)


class _LinkClosed(Exception):
    """The driver left in the middle of a step."""


def decode_fault(payload: bytes) -> RankFault:
    """What follows FAULT in a rank's last answer."""
    fault: RankFault = msgspec.msgpack.decode(payload, type=RankFault)
    return fault
