"""Sequence: one growing token history. Group: the samples of one request. SequenceTable: the numbers of all of them.

Tokens of a sequence, as half-open ranges:
    [0, num_cached)             found in the prefix cache, not computed by this sequence
    [num_cached, num_computed)  computed by this sequence (or by the one it was forked from), K/V in its blocks
    [num_computed, known)       read, not yet computed; more than one means a prefill chunk
    [known, length)             drawn or being drawn by steps in flight, not yet read
A running sequence is a decode when num_computed + 1 == length.
"""

from __future__ import annotations

import enum
from array import array

import numpy as np

from engine.beam_search import BeamSearch
from engine.request import Request, TokenLogprobs
from engine.sampling_params import MAX_SEQUENCES, SamplingParams
from engine.step import NewSequence, PromptLogprobs, unpack

Key = tuple[int, float, float, int, int]
"""Priority, turn, arrival, number of arrival, sample. The turn is the waiting queue's to set."""


class Status(enum.Enum):
    """Where a sequence is in its life."""

    UNBORN = "unborn"
    """Waits for its leader to compute the prompt, to be forked from it."""
    WAITING = "waiting"
    """Queued: new, or preempted. Holds no blocks."""
    RUNNING = "running"
    """Holds blocks and a seat; the ranks know it."""
    PAUSED = "paused"
    """A beam that has drawn: holds its blocks and a seat until the next beams are forked."""
    DRAINING = "draining"
    """Has drawn its last token: blocks and seat are given back, the token is not read yet or not yet put to use."""
    FINISHED = "finished"


SEATED = (Status.RUNNING, Status.PAUSED)
"""Holds a seat, and blocks."""


class SequenceTable:
    """The numbers that every step touches, one row a sequence, as arrays, so that a step costs a few array operations.

    Arrays are replaced when the table grows: look them up through the table each time.
    """

    def __init__(self, num_rows: int = 64) -> None:
        self.seq_id = np.full(num_rows, -1, np.int32)
        """-1: a free row."""
        self.length = np.zeros(num_rows, np.int32)
        self.known = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.num_slots = np.zeros(num_rows, np.int32)
        """Tokens that its blocks can hold."""
        self.limit = np.zeros(num_rows, np.int32)
        """The length at which it is finished."""
        self.stop_from = np.zeros(num_rows, np.int32)
        """Position of the first token that may be a stop token."""
        self.heeds_eos = np.zeros(num_rows, np.bool_)
        self.has_stop_ids = np.zeros(num_rows, np.bool_)
        self.tenant = np.zeros(num_rows, np.int32)
        """Slot of its tenant in Shares."""
        self.tail_shared = np.zeros(num_rows, np.bool_)
        """Its last block may be shared: look before writing."""
        self.last_token_s = np.zeros(num_rows, np.float64)
        """When its last token was read; NaN before the first."""
        self._free = list(range(num_rows - 1, -1, -1))

    def add(self, seq_id: int) -> int:
        """Take a row, all zero but for its id."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        for array_ in (self.length, self.known, self.num_computed, self.num_slots, self.limit, self.stop_from):
            array_[row] = 0
        self.heeds_eos[row] = self.has_stop_ids[row] = self.tail_shared[row] = False
        self.last_token_s[row] = np.nan
        self.seq_id[row] = seq_id
        return row

    def remove(self, row: int) -> None:
        """Free a row for another sequence."""
        self.seq_id[row] = -1
        self._free.append(row)

    def _grow(self) -> None:
        size = len(self.seq_id)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, np.concatenate([value, np.zeros_like(value)]))
        self.seq_id[size:] = -1
        self._free.extend(range(2 * size - 1, size - 1, -1))


class Sequence:
    """One sample of a request: its tokens, and while it runs its blocks."""

    __slots__ = (
        "__weakref__",
        "block_table",
        "group",
        "hashes",
        "index",
        "key",
        "num_cached",
        "num_prompt_tokens",
        "num_registered",
        "request_id",
        "row",
        "salt",
        "seed",
        "seq_id",
        "status",
        "stop_ids",
        "table",
        "tokens",
    )

    def __init__(self, group: Group, index: int, seq_id: int, key: Key, limit: int, table: SequenceTable) -> None:
        request, params = group.request, group.request.params
        self.group, self.index, self.key, self.table = group, index, key, table
        self.request_id, self.seq_id, self.seed = request.request_id, seq_id, request.sample_seed(index)
        self.status = Status.WAITING
        self.salt, self.stop_ids = request.cache_salt, frozenset(params.stop_token_ids)
        self.tokens = array("i")
        """Known tokens: the prompt and the output read so far."""
        self.tokens.frombytes(request.prompt)
        self.num_prompt_tokens = len(self.tokens)
        if index < len(request.resume):
            self.tokens.frombytes(request.resume[index])
        self.block_table: list[int] = []
        self.hashes: list[bytes] = []
        """Chained hashes of its first full blocks, as far as they were needed."""
        self.num_registered = 0
        """Blocks of block_table that the prefix cache has been told of."""
        self.num_cached = 0
        row = self.row = table.add(seq_id)
        table.known[row] = table.length[row] = len(self.tokens)
        table.limit[row] = limit
        table.stop_from[row] = self.num_prompt_tokens + params.min_tokens
        table.tenant[row] = group.tenant
        table.heeds_eos[row] = not params.ignore_eos
        table.has_stop_ids[row] = bool(params.stop_token_ids)

    def __repr__(self) -> str:
        return f"<{self.request_id}[{self.index}] #{self.seq_id} {self.status.value} {len(self.tokens)} tokens>"

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Known tokens behind the prompt."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in its blocks, or will be by plans already submitted."""
        return int(self.table.num_computed[self.row])

    @property
    def num_in_flight(self) -> int:
        """Tokens drawn but not read."""
        return int(self.table.length[self.row]) - len(self.tokens)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt must be computed whole because somebody waits for the log-probabilities."""
        return self.index == 0 and self.group.prompt_logprobs is not None

    @property
    def computes_all(self) -> bool:
        """Whether every token of its prompt must be computed, found in the prefix cache or not."""
        return self.wants_prompt_logprobs or self.group.request.pooling == "mean"

    def forget_blocks(self) -> None:
        """Nothing is computed any more; its blocks were given back."""
        table, row = self.table, self.row
        table.num_computed[row] = table.num_slots[row] = 0
        table.tail_shared[row] = False
        self.num_registered = 0

    def forget_in_flight(self) -> None:
        """What is in flight will never be read."""
        self.table.length[self.row] = len(self.tokens)

    def continued(self, index: int, seq_id: int, token: int) -> Sequence:
        """A beam that is this one and `token`: holds no blocks yet, and draws once."""
        number = len(self.tokens) * MAX_SEQUENCES + index  # no other beam of its request has it
        beam = Sequence(self.group, index, seq_id, (*self.key[:-1], number), len(self.tokens) + 2, self.table)
        beam.tokens = self.tokens[:]
        beam.tokens.append(token)
        beam.num_cached = self.num_cached
        self.table.known[beam.row] = self.table.length[beam.row] = len(beam.tokens)
        return beam

    def whole(self) -> NewSequence:
        """It as the ranks get it: as it stands now."""
        return NewSequence(
            seq_id=self.seq_id,
            request_id=self.request_id,
            token_ids=self.tokens.tobytes(),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed=self.num_computed,
            block_table=array("i", self.block_table).tobytes(),
            params=self.group.request.params if self.wants_prompt_logprobs else self.group.quiet_params,
            seed=self.seed,
            pooling=self.group.request.pooling,
        )


class Group:
    """The samples of one request, or the live beams of its search, and what they share."""

    __slots__ = (
        "accepted_s",
        "prompt_logprobs",
        "quiet_params",
        "request",
        "search",
        "sequences",
        "started",
        "tenant",
        "unborn",
    )

    def __init__(self, request: Request, accepted_s: float, tenant: int = 0, search: BeamSearch | None = None) -> None:
        self.request, self.accepted_s, self.search = request, accepted_s, search
        self.tenant = tenant
        """Slot of its tenant in Shares."""
        params = request.params
        self.quiet_params: SamplingParams = params if search is None else search.rank_params
        """The parameters of samples whose prompt's log-probabilities nobody waits for."""
        self.started = False
        """Whether it was in a step."""
        self.sequences: dict[int, Sequence] = {}
        """Unfinished samples, or live beams, by index."""
        self.unborn: list[Sequence] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """Gathered chunk by chunk; None when not wanted, or told already."""
        if params.prompt_logprobs is not None:
            self.quiet_params = params.replace(prompt_logprobs=None)
            if not (request.resume and request.resume[0]):
                self.prompt_logprobs = [None] * request.num_prompt_tokens

    def gather(self, part: PromptLogprobs) -> None:
        """Keep one chunk's log-probabilities of prompt tokens."""
        if self.prompt_logprobs is None:
            return
        logprobs = np.frombuffer(part.logprobs, "<f4").tolist()
        count = len(logprobs)
        if not count:
            return
        top_ids = unpack(part.top_ids).reshape(count, -1).tolist()
        top_logprobs = np.frombuffer(part.top_logprobs, "<f4").reshape(count, -1).tolist()
        entries = zip(logprobs, unpack(part.ranks).tolist(), top_ids, top_logprobs)
        self.prompt_logprobs[part.start : part.start + count] = [TokenLogprobs(*entry) for entry in entries]
