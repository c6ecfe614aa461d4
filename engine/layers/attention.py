"""Self-attention over the paged KV cache, heads split over the ranks; and what it must know of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.place import NamedWeights, Place, under
from engine.layers.residual import ResidualStream
from engine.model_config import ModelConfig
from kernels import paged_attention
from kernels.kv_cache import rotary_and_write_kv
from kernels.paged_attention import DecodePlan
from kernels.registry import fits


@dataclass
class Runs:
    """B sequences of a step and their places in the cache: all decodes, or all prefill chunks."""

    block_tables: Tensor
    """[B, M] int32."""
    context_lens: Tensor
    """[B] int32, this step's tokens included."""
    cu_seqlens: Tensor | None = None
    """[B + 1] int32, prefill chunks: where each one's tokens start among theirs."""
    max_seqlen: int = 1
    plans: dict[int, DecodePlan] = field(default_factory=dict)
    """Decodes: by sliding window, how their attention is cut up (Attention.prepare)."""


@dataclass
class StepInput:
    """The T tokens of one step, flattened: first the decodes, one token each, then the prefill chunks."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slots: Tensor
    """[T] int64: block * block_size + offset of each token's own key and value."""
    num_decodes: int
    decodes: Runs | None
    prefills: Runs | None
    caches: list[tuple[Tensor, Tensor]]
    """Of each layer: keys, values, [num_blocks, block_size, kv heads of this rank, head_dim]."""
    cos_sin: Tensor
    wanted: Tensor | None = None
    """[R] int64: the tokens whose last hidden states are wanted, in this order; None: all of them. Of the others the
    last layer makes keys and values only."""
    overlaid: bool = False
    """Where the decodes end is known on the device only: the chunks' cu_seqlens count from row 0, rows of one kind are
    nobody's to the other (decodes of no context), whose results lie in one tensor."""


class Attention:
    """stream += attention(norm(stream)); writes the keys and values of the step's tokens into the cache.

    Behind the last layer's the stream goes on with the rows that are wanted alone.
    With `qk_norm` every query and key head is RMS-normalised before it is rotated (Qwen3).
    """

    def __init__(
        self,
        place: Place,
        model: ModelConfig,
        layer: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        self.layer, self.head_dim = layer, model.head_dim
        self.is_last = layer == model.num_layers - 1
        self.num_heads = model.num_attention_heads // place.size
        self.num_kv_heads = model.num_key_value_heads // place.size
        self.scale = model.head_dim**-0.5
        self.sliding_window = model.sliding_windows[layer]
        self.eps = model.rms_norm_eps
        q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = ColumnParallelLinear(place, model.hidden_size, parts, bias=qkv_bias)
        self.out = RowParallelLinear(place, q_size, model.hidden_size, "o_proj", bias=out_bias)
        self.q_norm = RMSNorm(place, model.head_dim, model.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(place, model.head_dim, model.rms_norm_eps) if qk_norm else None

    def prepare(self, step: StepInput) -> None:
        """Cut up the step's decodes. Comes before the first layer: each reads the plan ahead of its turn."""
        runs, window = step.decodes, self.sliding_window
        if runs is not None and window not in runs.plans:
            runs.plans[window] = paged_attention.plan_decode(
                step.caches[self.layer][0], runs.block_tables, runs.context_lens, sliding_window=window
            )

    def __call__(self, stream: ResidualStream, norm: RMSNorm, step: StepInput) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = stream.into(norm, self.qkv).view(-1, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        k_cache, v_cache = step.caches[self.layer]
        attended = self._rotary_decode(q, k, v, k_cache, v_cache, step)
        if attended is None:
            q = rotary_and_write_kv(
                q,
                k,
                v,
                step.cos_sin,
                step.positions,
                k_cache,
                v_cache,
                step.slots,
                q_norm=self.q_norm.weight if self.q_norm else None,
                k_norm=self.k_norm.weight if self.k_norm else None,
                eps=self.eps,
                behind_gate=True,
            )
            attended = self._attend(q, k_cache, v_cache, step)
        attended = attended.view(-1, heads * self.head_dim)
        if self.is_last and step.wanted is not None:
            stream.keep(step.wanted)
            attended = attended.index_select(0, step.wanted)
        stream.add(self.out, attended)

    def _rotary_decode(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepInput
    ) -> Tensor | None:
        """A step of decodes alone, rotated, written and attended in one kernel; None where there is none for it."""
        runs = step.decodes
        if runs is None or step.prefills is not None or self.q_norm is not None:
            return None
        arguments = (q, k, v, step.cos_sin, k_cache, v_cache, runs.block_tables, runs.context_lens)
        plan = runs.plans[self.sliding_window]
        if not fits(paged_attention.rotary_decode, *arguments, plan=plan):
            return None
        options = {"scale": self.scale, "sliding_window": self.sliding_window, "plan": plan, "behind_gate": True}
        return paged_attention.rotary_decode(*arguments, **options)  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepInput) -> Tensor:
        """Decodes by the decode kernel, chunks by the prefill kernel; q [T, Hq, D] -> [T, Hq, D]."""
        prefilled: Tensor | None = None
        beside = False
        if step.prefills is not None:
            runs = step.prefills
            if step.overlaid and step.decodes is not None:
                plan = step.decodes.plans[self.sliding_window]
                beside = paged_attention.can_be_beside(q, k_cache, v_cache, plan, runs.max_seqlen, scale=self.scale)
            prefilled = paged_attention.prefill(
                q if step.overlaid else q[step.num_decodes :],
                k_cache,
                v_cache,
                runs.block_tables,
                runs.context_lens,
                runs.cu_seqlens,
                runs.max_seqlen,
                scale=self.scale,
                sliding_window=self.sliding_window,
                beside_decodes=beside,
            )
        if step.decodes is None:
            assert prefilled is not None
            return prefilled
        runs = step.decodes
        decoded: Tensor = paged_attention.decode(
            q[: step.num_decodes],
            k_cache,
            v_cache,
            runs.block_tables,
            runs.context_lens,
            scale=self.scale,
            sliding_window=self.sliding_window,
            plan=runs.plans[self.sliding_window],
            into=prefilled[: step.num_decodes] if prefilled is not None and step.overlaid else None,
            behind_gate=True,
            beside_prefill=beside,
        )
        if prefilled is None:
            return decoded
        return prefilled if step.overlaid else torch.cat([decoded, prefilled])

    def weights(self) -> NamedWeights:
        yield from self.qkv.weights()
        yield from self.out.weights()
        if self.q_norm and self.k_norm:
            yield from under("q_norm", self.q_norm.weights())
            yield from under("k_norm", self.k_norm.weights())
