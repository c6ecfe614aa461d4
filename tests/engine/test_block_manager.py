"""BlockManager: references, copy-on-write, and finding contents again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_manager import BlockManager
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Sequence, SequenceTable

TABLE = SequenceTable()


def sequence(tokens: list[int], *, salt: str = "", prompt_logprobs: int | None = None) -> Sequence:
    request = Request.create("r", tokens, SamplingParams(seed=0, prompt_logprobs=prompt_logprobs), cache_salt=salt)
    return Sequence(Group(request, 0.0), 0, 1, (0, 0.0, 0.0, 0, 0), 1000, TABLE)


def filled(blocks: BlockManager, tokens: list[int], **kwargs: str) -> Sequence:
    """A sequence whose tokens are all computed."""
    made = sequence(tokens, **kwargs)  # type: ignore[arg-type]
    blocks.adopt(made, blocks.match(made))
    blocks.allocate(made, blocks.blocks_for(len(tokens)) - len(made.block_table))
    blocks.register(made, len(tokens))
    return made


def test_what_was_just_allocated_can_be_taken_back() -> None:
    blocks = BlockManager(4, 8)
    one, two = sequence([1]), sequence([2])
    kept = blocks.allocate(one, 1)
    undone = blocks.allocate(one, 3)
    blocks.take_back(one, 2)
    assert one.block_table == kept + undone[:1] and blocks.num_free == 2
    blocks.check([one])
    assert sorted(blocks.allocate(two, 2)) == sorted(undone[1:])


def test_allocates_each_block_once_and_takes_it_back() -> None:
    blocks = BlockManager(4, 2)
    one, two = sequence([1, 2, 3]), sequence([4])
    assert sorted(blocks.allocate(one, 2) + blocks.allocate(two, 2)) == [0, 1, 2, 3]
    assert blocks.num_free == 0
    blocks.free(one)
    assert blocks.num_free == 2 and not one.block_table
    blocks.check([two])


def test_a_prefix_is_found_again_but_never_the_whole_prompt() -> None:
    blocks = BlockManager(8, 2)
    first = filled(blocks, [1, 2, 3, 4, 5])
    assert blocks.match(sequence([1, 2, 3, 4, 5])) == first.block_table[:2]
    assert blocks.match(sequence([1, 2, 3, 4])) == first.block_table[:1], "the last token's logits are wanted"
    assert blocks.match(sequence([1, 2, 9, 4, 5])) == first.block_table[:1]
    assert blocks.match(sequence([9, 2, 3, 4, 5])) == []
    assert blocks.match(sequence([3, 4, 5])) == [], "the same tokens at another place"


def test_a_prefix_survives_its_owner() -> None:
    blocks = BlockManager(8, 2)
    first = filled(blocks, [1, 2, 3, 4, 5])
    table = list(first.block_table)
    blocks.free(first)
    assert blocks.stats().cached == 2 and blocks.num_free == 8
    second = sequence([1, 2, 3, 4, 6])
    hits = blocks.match(second)
    assert hits == table[:2] and blocks.num_idle(hits) == 2
    blocks.adopt(second, hits)
    assert blocks.stats().cached == 0 and blocks.num_free == 6
    blocks.check([second])


def test_evicts_blank_blocks_first_then_the_tail_of_what_was_used_longest_ago() -> None:
    blocks = BlockManager(5, 2)
    old, new = filled(blocks, [1, 2, 3, 4]), filled(blocks, [5, 6, 7, 8])
    old_table, new_table = list(old.block_table), list(new.block_table)
    blocks.free(old)
    blocks.free(new)
    taker = sequence([9])
    assert blocks.allocate(taker, 1)[0] not in old_table + new_table
    assert blocks.allocate(taker, 3) == [old_table[1], old_table[0], new_table[1]]
    assert blocks.match(sequence([1, 2, 3])) == []
    assert blocks.match(sequence([5, 6, 7, 8, 9])) == new_table[:1]


def test_salts_and_listeners_keep_to_themselves() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, [1, 2, 3], salt="mine")
    assert blocks.match(sequence([1, 2, 3])) == []
    assert blocks.match(sequence([1, 2, 3], salt="other")) == []
    assert len(blocks.match(sequence([1, 2, 3], salt="mine"))) == 1
    assert blocks.match(sequence([1, 2, 3], salt="mine", prompt_logprobs=1)) == [], "its prompt is computed whole"


def test_no_caching_finds_nothing() -> None:
    blocks = BlockManager(8, 2, caching=False)
    first = filled(blocks, [1, 2, 3])
    blocks.free(first)
    assert blocks.match(sequence([1, 2, 3])) == [] and blocks.stats().cached == 0


def test_contents_computed_twice_are_remembered_once() -> None:
    blocks = BlockManager(8, 2)
    one, two = sequence([1, 2, 3]), sequence([1, 2, 3])
    for each in (one, two):
        blocks.allocate(each, 2)
    for each in (one, two):
        blocks.register(each, 3)
    assert blocks.match(sequence([1, 2, 3])) == one.block_table[:1]
    blocks.free(one)
    blocks.free(two)
    assert blocks.stats().cached == 1
    blocks.check([])


def test_only_the_writer_copies() -> None:
    blocks = BlockManager(8, 2)
    parent, child = filled(blocks, [1, 2, 3]), sequence([1, 2, 3])
    blocks.fork(parent, child)
    assert child.block_table == parent.block_table and child.block_table is not parent.block_table
    assert blocks.stats().shared == 2 and blocks.stats().saved == 2
    source = child.block_table[1]
    copy = blocks.copy_on_write(child, 1)
    assert copy == (source, child.block_table[1]) and copy[1] != source
    assert parent.block_table[1] == source
    assert blocks.copy_on_write(parent, 1) is None, "nobody else holds it any more"
    assert blocks.stats().shared == 1
    blocks.check([parent, child])


def test_running_out_is_the_callers_mistake() -> None:
    blocks = BlockManager(1, 2)
    with pytest.raises(KeyError):
        blocks.allocate(sequence([1]), 2)


class Books(RuleBasedStateMachine):
    """Any order of operations leaves books that balance, and only true contents are found."""

    @initialize(num_blocks=st.integers(4, 12), caching=st.booleans())
    def begin(self, num_blocks: int, caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, 2, caching=caching)
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple[int, ...]] = {}
        """Of registered blocks: all tokens up to their end."""

    def _remember(self, made: Sequence, first: int = 0) -> None:
        for index in range(first, len(made.block_table)):
            self.contents[made.block_table[index]] = tuple(made.tokens[: 2 * index + 2])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def start(self, tokens: list[int]) -> None:
        made = sequence(tokens)
        hits = self.blocks.match(made)
        for index, block in enumerate(hits):
            assert self.contents[block] == tuple(tokens[: 2 * index + 2])
        need = self.blocks.blocks_for(len(tokens)) - len(hits)
        if need + self.blocks.num_idle(hits) <= self.blocks.num_free:
            self.blocks.adopt(made, hits)
            self.blocks.allocate(made, need)
            self._remember(made, len(hits))
            self.blocks.register(made, len(tokens))
            self.live.append(made)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.live))
        child = sequence(list(parent.tokens))
        self.blocks.fork(parent, child)
        self.live.append(child)

    @precondition(lambda self: self.live and self.blocks.num_free)
    @rule(data=st.data(), token=st.integers(0, 1))
    def write(self, data: st.DataObject, token: int) -> None:
        made = data.draw(st.sampled_from(self.live))
        position = len(made.tokens)
        made.tokens.append(token)
        if position == 2 * len(made.block_table):
            self.blocks.allocate(made)
        else:
            self.blocks.copy_on_write(made, position // 2)
        assert self.blocks.num_owners(made.block_table[position // 2]) == 1
        self._remember(made, position // 2)
        self.blocks.register(made, len(made.tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        made = data.draw(st.sampled_from(self.live))
        self.blocks.free(made)
        self.live.remove(made)

    @invariant()
    def balance(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.check(self.live)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
