"""Prefill attention on Hopper's matrix units for scripts.check_kernels: parity over odd runs, times beside Triton's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, product

import torch
from torch import Tensor

from kernels import paged_attention, paged_decode, paged_prefill, prefill_hopper
from scripts.hopper_checks import hopper_cut
from scripts.kernel_timing import capture, paged_cache, time_us

Case = tuple[str, Callable[[], list[Tensor]], Callable[[], list[Tensor]], torch.dtype]

# Runs of new tokens, as (context, new tokens).
PREFILLS = {
    "2 x 4096": [(4096, 4096)] * 2,
    "8 x 1024": [(1024, 1024)] * 8,
    "32 x 256": [(256, 256)] * 32,
    "512 after 8192": [(8704, 512)],
    "1 x 8192": [(8192, 8192)],
    "16 x 40 after 1000": [(1040, 40)] * 16,
    "chat": [(80 + 97 * i % 560 + 331 * i % 2900, 80 + 97 * i % 560) for i in range(14)],
}


@dataclass
class Prefill:
    """Arguments of prefill attention with random contents; the unused rest of the cache is NaN."""

    runs: list[tuple[int, int]]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 16
    window: int = 0
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        contexts, new = [context for context, _ in self.runs], [count for _, count in self.runs]
        self.k, self.v, tables = paged_cache(contexts, self.block_size, self.kv_heads, self.head_dim, self.dtype)
        index = torch.arange(tables.shape[1] * self.block_size, device="cuda")
        unused = (index >= torch.tensor(contexts, device="cuda")[:, None]).view(*tables.shape, self.block_size)
        for cache in (self.k, self.v):
            cache[tables[unused.all(2)].long()] = float("nan")
            partly = unused & ~unused.all(2, keepdim=True)
            blocks = tables[:, :, None].expand_as(partly)[partly].long()
            cache[blocks, (index % self.block_size).view(partly.shape[1:]).expand_as(partly)[partly]] = float("nan")
        starts = [self.before, *accumulate(new, initial=self.before)][1:]
        ints = [torch.tensor(values, device="cuda", dtype=torch.int32) for values in (contexts, starts)]
        shape = (starts[-1] + self.after, self.heads, self.head_dim)
        self.q = torch.randn(shape, device="cuda").to(self.dtype)
        self.arguments = (self.q, self.k, self.v, tables, *ints, max(new))
        self.options = {"scale": self.head_dim**-0.5, "sliding_window": self.window}

    @property
    def flop(self) -> float:
        pairs = sum(new * (context - new) + new * (new + 1) / 2 for context, new in self.runs)
        return pairs * self.heads * self.head_dim * 4

    def expected(self) -> list[Tensor]:
        # The definition's decodes are not proof against what is behind the contexts.
        floats = (isinstance(x, Tensor) and x.is_floating_point() for x in self.arguments)
        q, *rest = (x.float().nan_to_num() if up else x for x, up in zip(self.arguments, floats, strict=True))
        return [paged_attention.prefill.definition(q, *rest, **self.options)]

    def triton(self) -> list[Tensor]:
        return [paged_prefill.prefill(*self.arguments, **self.options)]

    def hopper(self) -> list[Tensor]:
        return [prefill_hopper.prefill(*self.arguments, **self.options)]


def _why_not(prefill: Prefill) -> str | None:
    return prefill_hopper.why_not(*prefill.arguments[:3], scale=prefill.options["scale"])


def cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Prefill on Hopper's matrix units: its tiles' edges, ragged runs, windows, and lengths changed under a graph."""
    one = [(16, 16)]
    if dtype == torch.float32 or _why_not(Prefill(one, 4, 1, 128, dtype)) is not None:
        return
    runs = {
        "one": one,
        "a tile": [(128, 128)],
        "after a few": [(300, 200)],
        "ragged": [(1, 1), (0, 0), (700, 300), (5, 5), (1037, 129), (64, 64), (513, 1), (255, 127)],
        "many": [(1 + 37 * i % 90, 1 + 7 * i % 30 if i % 5 else 1) for i in range(75)],
    }
    runs["many"] = [(max(context, new), new) for context, new in runs["many"]]
    if not small:
        runs |= {"long": [(3000, 2000), (4111, 4111)], "chat": PREFILLS["chat"]}
    for (name, each), (head_dim, block_size) in product(runs.items(), ((128, 16), (64, 16), (128, 32), (64, 64))):
        for heads, kv_heads, window in ((4, 1, 0), (6, 2, 100), (3, 3, 0)):
            if (small and head_dim != 128) or (block_size != 16 and heads != 4):
                continue
            prefill = Prefill(each, heads, kv_heads, head_dim, dtype, block_size, window, before=3, after=5)
            label = f"prefill hopper {name} {head_dim} {heads}/{kv_heads} w{window} b{block_size}"
            yield label, prefill.hopper, prefill.expected, dtype
    changed = Prefill([(900, 700), (300, 300)], 8, 2, 128, dtype)

    def replay() -> list[Tensor]:
        out: list[Tensor] = []
        graph = capture([lambda: out.extend(changed.hopper())])
        changed.arguments[4].copy_(torch.tensor([500, 290]))
        changed.arguments[5].copy_(torch.tensor([10, 410, 600]))
        graph.replay()
        return out[-1:]

    yield "prefill hopper in a graph", replay, changed.expected, dtype
    if not small:
        for num_decodes in (1, 60, 200):
            yield _beside_decodes(num_decodes, dtype)


def _beside_decodes(num_decodes: int, dtype: torch.dtype) -> Case:
    """Chunks and decodes of one step, whose kernels run at the same time: after many replays with other queries."""
    prefill = Prefill([(300, 70), (65, 65), (900, 130)], 32, 8, 128, dtype, before=num_decodes, after=5)
    k, v, tables = paged_cache([1 + 61 * i % 900 for i in range(num_decodes)], 16, 8, 128, dtype)
    contexts = torch.tensor([1 + 61 * i % 900 for i in range(num_decodes)], device="cuda", dtype=torch.int32)
    decodes, options = (k, v, tables, contexts), {"scale": prefill.options["scale"]}
    plan = paged_attention.DecodePlan([], paged_decode.make_work(k, contexts, 0, hopper_cut(k)))
    queries = torch.randn_like(prefill.q)

    def step() -> Tensor:
        prefill.q.copy_(queries)
        both: Tensor = paged_attention.prefill(*prefill.arguments, beside_decodes=True, **prefill.options)
        rows = prefill.q[:num_decodes], both[:num_decodes]
        early = {"plan": plan, "behind_gate": True, "beside_prefill": True}
        paged_attention.decode(rows[0], *decodes, into=rows[1], **early, **options)
        return both

    def replay() -> list[Tensor]:
        out: list[Tensor] = []
        graph = capture([lambda: out.append(step())] * 4)
        for _ in range(25):
            queries.normal_()
            graph.replay()
        return out[-4:]

    def expected() -> list[Tensor]:
        both = prefill.expected()[0]
        rows = prefill.q[:num_decodes].float()
        both[:num_decodes] = paged_attention.decode.definition(rows, k.float(), v.float(), *decodes[2:], **options)
        return [both] * 4

    return f"prefill hopper beside {num_decodes} decodes", replay, expected, dtype


def timings() -> Iterator[tuple[str, float, float]]:
    """Names, microseconds and operations of prefill attention with Llama-3-8B's heads, by both kernels."""
    for name, runs in PREFILLS.items():
        prefill = Prefill(runs, 32, 8, 128, torch.bfloat16)
        yield f"{name} triton", time_us([prefill.triton]), prefill.flop
        if _why_not(prefill) is None:
            yield f"{name} hopper", time_us([prefill.hopper]), prefill.flop
