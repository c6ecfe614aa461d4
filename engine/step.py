"""StepPlan and StepResult: all that crosses between the scheduler and the ranks. Plain data, a delta, a few KB.

Integer arrays travel as little-endian int32 bytes: `pack` and `unpack` are the only way in and out.

What a rank holds for each live sequence (its mirror): token ids, how many of them have K/V in the cache
(`num_computed`), the block table and the sampling state. A plan changes that mirror in this order:

    1. sequences in `dropped` are forgotten;
    2. sequences in `new` are added, whole;
    3. `copies` of blocks are made (copy-on-write), before anything is written;
    4. `replaced` entries of block tables are set, `block_ids` are appended to the tables;
    5. each scheduled sequence computes tokens [num_computed, num_computed + num_tokens) and num_computed grows by it;
    6. each of `sample_seqs` draws one token from the logits of the last token of its source entry, and appends it.

The token drawn in 6 may be an input of the next plan before any process has read it: that is one step ahead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.sampling_params import SamplingParams

Int32Array = npt.NDArray[np.int32]
Pooling = Literal["mean", "last"]
"""How a prompt's hidden states become one vector."""


def pack(values: Iterable[int] | Int32Array) -> bytes:
    """Little-endian int32 bytes of `values`."""
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype="<i4")
    return array.astype("<i4", copy=False).tobytes()


def unpack(data: bytes) -> Int32Array:
    """A read-only int32 array over `data`; no copy."""
    return np.frombuffer(data, dtype="<i4")


class NewSequence(msgspec.Struct, array_like=True, gc=False):
    """One sequence sent whole: first scheduled, forked, or back after a preemption or a restart."""

    seq_id: int
    request_id: str
    token_ids: bytes
    """int32: the prompt and the output tokens so far."""
    num_prompt_tokens: int
    num_computed: int
    """Tokens [0, num_computed) have K/V in the blocks of block_table."""
    block_table: bytes
    """int32 block ids, before this plan's block_ids are appended."""
    params: SamplingParams
    seed: int
    """This sample's own seed; draws are keyed by (seed, position of the token drawn)."""
    pooling: Pooling | None = None
    """Its prompt's pooled hidden states are wanted; the token it draws is 0 and means nothing."""


class StepPlan(msgspec.Struct, array_like=True, gc=False):
    """One step of every rank. S entries are scheduled, R tokens are drawn."""

    epoch: int
    """Ranks of another epoch refuse the plan; results of another epoch are dropped."""
    step: int
    """Counts from 0 within an epoch, without gaps."""
    dropped: bytes = b""
    """int32 seq ids, forgotten before this step: finished, aborted or preempted."""
    new: list[NewSequence] = []
    copies: bytes = b""
    """int32 pairs (source block, target block)."""
    replaced: bytes = b""
    """int32 triples (seq id, index in its block table, block id): copy-on-write targets."""
    seq_ids: bytes = b""
    """int32 [S]. The first num_decodes entries are decodes, one token each; the others are prefill chunks."""
    num_tokens: bytes = b""
    """int32 [S]: tokens computed of each."""
    num_decodes: int = 0
    block_counts: bytes = b""
    """int32 [S]: blocks appended to each one's table."""
    block_ids: bytes = b""
    """int32: those blocks, concatenated in the order of seq_ids."""
    sample_seqs: bytes = b""
    """int32 [R]: who draws a token."""
    sample_entries: bytes = b""
    """int32 [R]: the entry of [0, S) from whose last logits it draws (its own, or its parent's at a fork)."""
    masked: bytes = b""
    """int32: indices into sample_seqs whose tokens a mask restricts. If not empty, one StepMasks follows the plan,
    before any other plan: the ranks compute meanwhile, and wait for it only to draw."""

    @property
    def empty(self) -> bool:
        """Whether nothing is computed; such a plan only changes the mirrors."""
        return not self.seq_ids


class StepMasks(msgspec.Struct, array_like=True, gc=False):
    """Which tokens the masked samples of one plan may draw."""

    epoch: int
    step: int
    bits: bytes
    """int32 [len(masked), ceil(vocab / 32)]: bit t % 32 of word t // 32 of a row says whether token t may be drawn."""


class SampledLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of one drawn token and of the most likely ones at its position (raw model distribution)."""

    sample: int
    """Index into the plan's sample_seqs."""
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: bytes
    """int32, most likely first."""
    top_logprobs: bytes
    """float32."""


class PromptLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of the prompt tokens [start, start + count) of one sequence; the first token has none."""

    seq_id: int
    start: int
    logprobs: bytes
    """float32 [count]."""
    ranks: bytes
    """int32 [count]."""
    top_ids: bytes
    """int32 [count, k]."""
    top_logprobs: bytes
    """float32 [count, k]."""


class Pooled(msgspec.Struct, array_like=True, gc=False):
    """The pooled hidden states of one prompt, after the model's last norm."""

    sample: int
    """Index into the plan's sample_seqs."""
    vector: bytes
    """float32 [hidden_size]."""


class StepResult(msgspec.Struct, array_like=True, gc=False):
    """What rank 0 answers to a plan."""

    epoch: int
    step: int
    token_ids: bytes = b""
    """int32 [R], in the order of the plan's sample_seqs."""
    logprobs: list[SampledLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []
    device_s: float = 0.0
    """Seconds the ranks spent on the step."""
    pooled: list[Pooled] = []
    late: bool = False
    """The device had ended all steps before when this one was handed to it. Not told on a CPU."""


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_masks_decoder = msgspec.msgpack.Decoder(StepMasks)
_result_decoder = msgspec.msgpack.Decoder(StepResult)


def encode(value: Any) -> bytes:
    """Serialize a plan, masks or a result."""
    return _encoder.encode(value)


def decode_plan(data: bytes | memoryview) -> StepPlan:
    """What `encode` made of a plan. Raises msgspec.DecodeError or ValidationError."""
    return _plan_decoder.decode(data)


def decode_masks(data: bytes | memoryview) -> StepMasks:
    """What `encode` made of masks. Raises msgspec.DecodeError or ValidationError."""
    return _masks_decoder.decode(data)


def decode_result(data: bytes | memoryview) -> StepResult:
    """What `encode` made of a result. Raises msgspec.DecodeError or ValidationError."""
    return _result_decoder.decode(data)
