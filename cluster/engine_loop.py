"""EngineLoop: one thread that takes requests, keeps steps in flight and hands out what they bring."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cluster.held_request import HeldRequest
from cluster.inbox import Client, ClientGone, Inbox, Message
from cluster.messages import Abort, DriverHealth, State, Submit, error_outputs
from cluster.pacer import Pacer
from cluster.recovery import RETRY_AFTER_S, Quarantine, RecoveryBudget, RecoveryPolicy
from engine.errors import (
    EngineUnavailable,
    ExecutorDied,
    MantaError,
    RequestError,
    RequestFailed,
    ResourcesMissing,
)
from engine.executor import Executor
from engine.llm_engine import LLMEngine
from engine.request import SequenceOutput
from engine.step import StepResult

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 0.25
"""How often the executor is asked whether a step that takes long is stuck."""
IDLE_CHECK_S = 1.0
HEARTBEAT_LIMIT_S = 30.0


class EngineLoop:
    """Drives an LLMEngine from its own thread.

    Messages are taken as they come, between two calls of the engine. `emit(client, outputs)` is called at most once a
    step for each client, on this thread, and must not block. A rank's failure is answered by `engine.recover()`, within
    the policy's limits; past them every request fails, and new ones are refused, with EngineUnavailable.
    """

    def __init__(
        self,
        engine: LLMEngine,
        executor: Executor,
        emit: Callable[[Any, list[SequenceOutput]], None],
        *,
        policy: RecoveryPolicy | None = None,
        pacer: Pacer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pacer` says when steps are planned, by `clock`; None: the one of the engine's config."""
        self._engine, self._executor, self._emit = engine, executor, emit
        policy = policy or RecoveryPolicy()
        self._budget = RecoveryBudget(policy)
        self._quarantine = Quarantine(policy.max_recoveries)
        self._pacer, self._clock = pacer or Pacer.of(engine.config), clock
        self._inbox = Inbox()
        self._live: dict[str, HeldRequest] = {}
        self._state: State = "ready"
        self._reason = ""
        self._since_s = time.time()
        self._waiting_for = ""
        self._waits_since_s: float | None = None
        self._idle = True
        self._beat_s = time.monotonic()
        self._suspicious = False
        self._checked_s = 0.0
        self._awaited: Future[StepResult] | None = None
        self._ended_s: float | None = None
        """When the awaited step's result came."""
        self._thread = threading.Thread(target=self._run, name="manta-loop", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        """Run on a thread of its own, until `stop`. The engine is started."""
        self._thread.start()

    def post(self, client: Client, message: Message) -> None:
        """Queue a message of `client` for the loop."""
        self._inbox.post(client, message)

    def wake(self) -> None:
        """Let an idle loop look around: a rank may have died."""
        self._inbox.wake()

    def look(self) -> None:
        """Have the executor checked now, though nothing runs."""
        self._suspicious = True
        self.wake()

    def health(self) -> DriverHealth:
        """The truth as far as it is known without asking the loop."""
        age_s = time.monotonic() - self._beat_s
        state, reason = self._state, self._reason
        if state == "ready" and age_s > HEARTBEAT_LIMIT_S:
            state, reason = "failed", f"the engine's loop has not moved for {age_s:.0f} s"
        return DriverHealth(
            state=state,
            reason=reason,
            idle=self._idle,
            progress_age_s=age_s,
            recoveries=self._budget.total,
            since_s=self._since_s,
            waiting_for=self._waiting_for,
        )

    def waits(self, missing: str) -> None:
        """A restart waits for resources; empty: no longer. Requests are refused, aborted and failed meanwhile.

        Raises EngineUnavailable when the loop is to end instead. Does nothing on another thread than the loop's.
        """
        if threading.current_thread() is not self._thread:
            return
        self._waiting_for = missing
        if not missing:
            self._waits_since_s = None
            return
        if self._inbox.closed:
            raise EngineUnavailable("the engine is stopping")
        now_s = self._beat_s = time.monotonic()
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        self._take_messages()
        if now_s - self._waits_since_s >= self._budget.policy.patience_s:
            self._fail({name: live for name, live in self._live.items() if not any(live.tokens)}, self._missing())

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the step it waits for; every unfinished request fails with EngineUnavailable."""
        self._inbox.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # The loop's own thread.

    def _run(self) -> None:
        try:
            while not self._inbox.closed:
                try:
                    self._turn()
                except ExecutorDied as error:
                    self._recover(error)
            self._fail_all(EngineUnavailable("the engine is stopping"))
            self._enter("stopped")
        except Exception as error:
            logger.exception("the engine's loop failed")
            self._give_up(f"the engine's loop failed: {type(error).__name__}: {error}")
            self._refuse_until_stopped()

    def _turn(self) -> None:
        """Take messages, submit what can be, and hand out the oldest step's outputs if it is done."""
        self._beat_s = time.monotonic()
        self._take_messages()
        if self._state == "failed":
            self._inbox.wait(IDLE_CHECK_S)
            return
        self._release_parked()
        put_off_s = self._begin_steps()
        future = self._engine.next_future()
        self._idle = future is None and not put_off_s
        if future is None:
            self._inbox.wait(put_off_s or IDLE_CHECK_S)
            self._check()
        elif future.done():
            self._hand_out(self._finish_step(future))
        else:
            if future is not self._awaited:
                self._awaited, self._ended_s = future, None
                future.add_done_callback(self._step_done)
            self._inbox.wait(min(put_off_s or CHECK_EVERY_S, CHECK_EVERY_S))
            if not future.done():
                self._check()

    def _begin_steps(self) -> float:
        """Plan and submit what can be, unless it is better put off: for how long, and 0 when it is not."""
        engine, pacer = self._engine, self._pacer
        while True:
            future = engine.next_future()
            if future is None or not future.done():
                running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
                put_off_s = pacer.wait_s(
                    self._clock(),
                    step=engine.next_step,
                    in_flight=engine.num_in_flight,
                    running=running,
                    waiting=waiting,
                )
                if put_off_s:
                    return put_off_s
            if not engine.begin_step():
                return 0.0
            pacer.began(self._clock(), in_flight=engine.num_in_flight)

    def _finish_step(self, future: Future[StepResult]) -> list[SequenceOutput]:
        """Read the oldest step, which is done."""
        step, ended_s = self._engine.next_step, self._ended_s if future is self._awaited else None
        outputs = self._engine.finish_step(0)
        self._pacer.ended(step, future.result(), ended_s, self._clock())
        return outputs

    def _check(self) -> None:
        """Ask the executor whether its ranks are well; at once when it hinted at trouble, else every so often."""
        if self._suspicious or self._beat_s - self._checked_s >= CHECK_EVERY_S:
            self._suspicious, self._checked_s = False, self._beat_s
            self._executor.check()

    def _step_done(self, future: Future[StepResult]) -> None:
        if future is self._awaited:
            self._ended_s = self._clock()
        self.wake()

    def _take_messages(self) -> None:
        for client, message in self._inbox.take():
            if isinstance(message, Submit):
                self._submit(client, message)
            elif isinstance(message, Abort):
                live = self._live.get(message.request_id)
                if live is not None and live.client is client:
                    self._abort(message.request_id, message.index, live)
            elif isinstance(message, ClientGone):
                for request_id, live in list(self._live.items()):
                    if live.client is client:
                        self._abort(request_id, None, live)
            else:
                self._call(message.function)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            logger.exception("a call on the loop's thread failed")  # what asked gets no answer; the engine goes on

    def _submit(self, client: Client, message: Submit) -> None:
        request = message.request
        num_samples = request.params.num_sequences
        try:
            if self._state == "failed":
                raise EngineUnavailable(self._reason)
            if self._waiting_for:
                raise self._missing()
            if request.request_id in self._live:
                raise RequestError(f"request id {request.request_id!r} is already running", param="request_id")
            self._engine.add_request(request)
        except MantaError as error:
            logger.info("request %s refused: %s", request.request_id, error)
            self._emit(client, error_outputs(request.request_id, num_samples, error))
            return
        logger.info(
            "request %s accepted: %d prompt tokens, %d samples",
            request.request_id,
            request.num_prompt_tokens,
            num_samples,
        )
        self._live[request.request_id] = HeldRequest.of(client, request)
        self._pacer.arrived(self._clock(), num_tokens=request.num_prompt_tokens, num_sequences=num_samples)

    def _abort(self, request_id: str, index: int | None, live: HeldRequest) -> None:
        if index is not None and index not in live.unfinished:
            return
        self._engine.abort(request_id, index)
        live.unfinished.discard(index if index is not None else -1)
        if index is None or not live.unfinished:
            self._engine.abort(request_id)  # a beam search knows of no single outputs
            self._forget(request_id)
            logger.info("request %s aborted", request_id)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self._quarantine.progressed(request_id)

    def _hand_out(self, outputs: list[SequenceOutput]) -> None:
        by_client: dict[Any, list[SequenceOutput]] = {}
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None or output.index not in live.unfinished:
                continue
            by_client.setdefault(live.client, []).append(output)
            live.tokens[output.index] += output.token_ids
            self._quarantine.progressed(output.request_id)
            if output.finish_reason is not None:
                live.unfinished.discard(output.index)
                if not live.unfinished:
                    self._forget(output.request_id)
                    logger.info("request %s finished: %s", output.request_id, output.finish_reason)
        for client, mine in by_client.items():
            self._emit(client, mine)

    def _enter(self, state: State, reason: str = "") -> None:
        self._state, self._reason, self._since_s = state, reason, time.time()

    def _missing(self) -> ResourcesMissing:
        since = time.strftime("%H:%M:%S", time.gmtime(self._since_s))
        return ResourcesMissing(
            f"the engine is recovering since {since} UTC, {self._waiting_for}", retry_after_s=RETRY_AFTER_S
        )

    def _recover(self, error: ExecutorDied) -> None:
        policy, suspects = self._budget.policy, self._engine.in_flight_requests()
        self._enter("recovering", str(error))
        logger.error("the executor failed: %s; %d requests will be resumed", error, len(self._live))
        if not self._budget.spend():
            self._give_up(f"{self._budget.total} failures in {policy.window_s:g} s; the last: {error}")
            return
        began_s = time.monotonic()
        last: Exception = error
        for attempt in range(policy.max_attempts):
            if attempt and self._inbox.pause(policy.backoff_s * 2 ** (attempt - 1)):
                return
            try:
                self._engine.recover()
            except EngineUnavailable as failure:
                last = failure
                break  # it has waited long enough
            except Exception as failure:
                last = failure
                logger.error("recovery attempt %d of %d failed: %s", attempt + 1, policy.max_attempts, failure)
                continue
            self._pacer.forget()
            self._enter("ready")
            logger.warning("recovered in %.2f s", time.monotonic() - began_s)
            self._judge(suspects & self._live.keys(), error)
            return
        self._waiting_for = ""
        if self._inbox.closed:
            return
        self._give_up(f"the engine could not be brought back: {last}")

    def _judge(self, suspects: set[str], error: ExecutorDied) -> None:
        """Fail a request that kills the ranks each time; hold back others while that is being found out."""
        for request_id in suspects:
            live, searched = self._live[request_id], self._engine.searched(request_id)
            if searched > live.searched:
                live.searched = searched
                self._quarantine.progressed(request_id)
        culprit, parked = self._quarantine.blame(suspects)
        if culprit is not None:
            times = self._budget.policy.max_recoveries
            said = f"the engine failed {times} times while it ran this request; the last time: {error}"
            logger.error("request %s is given up: %s", culprit, said)
            self._fail({culprit: self._live[culprit]}, RequestFailed(said))
        for request_id in parked:
            self._engine.abort(request_id)

    def _release_parked(self) -> None:
        while (request_id := self._quarantine.release()) is not None:
            live = self._live.get(request_id)
            if live is not None:
                live.searched = 0  # a search begins anew
                self._engine.add_request(live.resumed())
                for index in set(range(len(live.tokens))) - live.unfinished:
                    self._engine.abort(request_id, index)

    def _give_up(self, reason: str) -> None:
        self._enter("failed", reason)
        logger.error("giving up: %s", reason)
        self._fail_all(EngineUnavailable(reason))

    def _fail_all(self, error: MantaError) -> None:
        self._fail(dict(self._live), error)

    def _fail(self, requests: dict[str, HeldRequest], error: MantaError) -> None:
        by_client: dict[Any, list[SequenceOutput]] = {}
        for request_id, live in requests.items():
            outputs = error_outputs(request_id, len(live.tokens), error)
            by_client.setdefault(live.client, []).extend(o for o in outputs if o.index in live.unfinished)
            self._forget(request_id)
            try:
                self._engine.abort(request_id)
            except Exception:
                logger.exception("request %s could not be aborted", request_id)
        for client, outputs in by_client.items():
            self._emit(client, outputs)

    def _refuse_until_stopped(self) -> None:
        while not self._inbox.closed:
            self._take_messages()
            self._inbox.wait(IDLE_CHECK_S)
