"""The k-th largest logit of a row, from the maxima of small groups of tokens that the race leaves, without a sort."""

from __future__ import annotations

from kernels.registry import jit, tl


@jit
def _keys(x):
    """Integers in the order of the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _kth_key(keys, k):
    """The k-th largest of the keys [N], bit by bit; the smallest integer where there are fewer."""
    kth = tl.full([], -2147483648, tl.int32)
    for i in range(32):
        candidate = kth ^ ((k * 0 + 1) << (31 - i))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= k, candidate, kth)
    return kth


@jit
def _load_groups(
    row, chosen, start, count, inverse,
    V: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr,
):  # fmt: skip
    """Keys of the tokens of groups chosen[start: start + TILE_GROUPS], flat; the smallest integer past `count`."""
    RUN: tl.constexpr = BLOCK // GROUPS
    place = start + tl.arange(0, TILE_GROUPS)
    group = tl.load(chosen + place, mask=place < count, other=0)
    t = tl.arange(0, PART // GROUPS)
    first = group // GROUPS * PART + group % GROUPS * RUN
    token = first[:, None] + (t // RUN * BLOCK + t % RUN)[None, :]
    exists = (place < count)[:, None] & (token < V)
    keys = _keys(tl.load(row + token, mask=exists, other=0.0).to(tl.float32) * inverse)
    return tl.reshape(tl.where(exists, keys, -2147483648), [TILE_GROUPS * (PART // GROUPS)])


@jit
def select_kernel(
    logits, temperatures, top_ks, maxima, chosen, floors, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """floors[b] = the k-th largest logit over the temperature; -inf where top_k is off."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    temperature = tl.load(temperatures + b)
    k = tl.load(top_ks + b)
    floor = -float("inf")
    if (temperature > 0) & (k > 0) & (k < V):
        row = logits + b.to(tl.int64) * stride_l
        inverse = tl.div_rn(1.0, temperature)
        num_groups = num_parts * GROUPS
        group = tl.arange(0, PARTS * GROUPS)
        exists = group < num_groups
        keys = _keys(tl.load(maxima + b.to(tl.int64) * num_groups + group, mask=exists, other=-float("inf")))
        # The k-th largest maximum bounds the k-th largest value from below: smaller groups hold none of the k largest.
        is_chosen = exists & (keys >= _kth_key(keys, k))
        count = tl.sum(is_chosen.to(tl.int32), 0)
        mine = chosen + b.to(tl.int64) * num_groups
        tl.store(mine + tl.cumsum(is_chosen.to(tl.int32), 0) - 1, group, mask=is_chosen)
        tl.debug_barrier()
        kth = tl.full([], -2147483648, tl.int32)
        if count <= TILE_GROUPS:
            kth = _kth_key(_load_groups(row, mine, 0, count, inverse, V, PART, BLOCK, GROUPS, TILE_GROUPS), k)
        else:
            for i in range(32):
                candidate = kth ^ ((k * 0 + 1) << (31 - i))
                larger = k * 0
                for start in range(0, count, TILE_GROUPS):
                    tile = _load_groups(row, mine, start, count, inverse, V, PART, BLOCK, GROUPS, TILE_GROUPS)
                    larger += tl.sum((tile >= candidate).to(tl.int32), 0)
                kth = tl.where(larger >= k, candidate, kth)
        floor = _value(kth)
    tl.store(floors + b, floor)
