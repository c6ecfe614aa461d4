"""A rank follows its plans: chunks, prefixes, forks, copies, re-sent sequences, epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError, ExecutorDied
from engine.sampling_params import SamplingParams
from engine.step import StepPlan, pack, unpack
from tests.ranks import GREEDY, Ranks

PROMPT = [5, 7, 9, 11, 100, 150, 33, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]
SAMPLED = SamplingParams(temperature=1.0)


def tokens_of(ranks: Ranks, seq_ids: list[int], steps: int) -> list[list[int]]:
    """Decode the sequences together; the tokens of each."""
    rows = [unpack(ranks.step([(seq_id, 1) for seq_id in seq_ids]).token_ids).tolist() for _ in range(steps)]
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("chunk", [1, 3, 8, 13])
def test_chunks_give_what_a_whole_prompt_gives(folder: Path, block_size: int, chunk: int) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:9] * 5]
    with Ranks(folder, block_size=block_size, num_blocks=40) as ranks:
        assert ranks.generate(prompts, chunk=chunk) == ranks.generate(prompts)


def test_a_cached_prefix_need_not_be_computed(ranks: Ranks) -> None:
    (wanted,) = ranks.generate([PROMPT + [3, 4, 5]])
    ranks.add(100, PROMPT)
    ranks.step([(100, len(PROMPT))])
    ranks.add(101, PROMPT + [3, 4, 5], num_computed=16, table=ranks.tables[100][:2])
    first = unpack(ranks.step([(101, 7)]).token_ids).tolist()
    assert first + tokens_of(ranks, [101], 11)[0] == wanted


def test_a_fork_draws_from_its_parents_logits_and_then_goes_its_own_way(ranks: Ranks) -> None:
    alone = ranks.generate([PROMPT, PROMPT], SAMPLED, seeds=[11, 12])
    assert alone[0] != alone[1]
    ranks.add(100, PROMPT, SAMPLED, seed=11)
    ranks.step([(100, 16)])
    ranks.add(101, PROMPT, SAMPLED, num_computed=len(PROMPT), table=[*ranks.tables[100], ranks._next_block], seed=12)
    first = unpack(ranks.step([(100, 4)], samples={100: 100, 101: 100}).token_ids).tolist()
    # The last block of the prompt is shared: the child writes its own copy.
    shared, own = ranks.tables[100][2], 60
    ranks.tables[101][2] = own
    second = ranks.step([(100, 1), (101, 1)], copies=[(shared, own)], replaced=[(101, 2, own)])
    later = tokens_of(ranks, [100, 101], 10)
    for index in range(2):
        assert [first[index], int(unpack(second.token_ids)[index]), *later[index]] == alone[index]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(temperature=0.7, frequency_penalty=0.5)])
def test_a_sequence_sent_again_goes_on_as_it_would_have(ranks: Ranks, params: SamplingParams) -> None:
    (wanted,) = ranks.generate([PROMPT], params, seeds=[3])
    ranks.add(100, PROMPT, params, seed=3)
    so_far = unpack(ranks.step([(100, len(PROMPT))]).token_ids).tolist() + tokens_of(ranks, [100], 4)[0]
    ranks.drop(100)
    ranks.add(100, PROMPT + so_far, params, num_prompt=len(PROMPT), seed=3)
    again = unpack(ranks.step([(100, len(PROMPT) + 5)]).token_ids).tolist()
    assert so_far + again + tokens_of(ranks, [100], 6)[0] == wanted


def test_a_new_epoch_begins_with_nothing(ranks: Ranks) -> None:
    (wanted,) = ranks.generate([PROMPT], SAMPLED)
    ranks.add(7, PROMPT)
    ranks.step([(7, 3)])
    ranks.restart()
    assert ranks.generate([PROMPT], SAMPLED) == [wanted]


def test_slots_are_reused(ranks: Ranks) -> None:
    wanted = ranks.generate([PROMPT])
    for _ in range(40):
        ranks._next_block = 0
        assert ranks.generate([PROMPT, PROMPT[:5]], num_tokens=2)[0] == wanted[0][:2]


def test_a_plan_that_only_changes_the_mirror(ranks: Ranks) -> None:
    ranks.add(1, PROMPT)
    ranks.step([(1, 5)])
    ranks.drop(1)
    result = ranks.step([])
    assert result.token_ids == b"" and result.step == 1
    with pytest.raises(ExecutorDied, match="sequence 1 is scheduled, but was never sent"):
        ranks.run(StepPlan(0, 2, seq_ids=pack([1]), num_tokens=pack([1]), block_counts=pack([0])))


@pytest.mark.parametrize(
    "plan, says",
    [
        (StepPlan(1, 0), "awaits step 0 of epoch 0, not step 0 of epoch 1"),
        (StepPlan(0, 1), "awaits step 0 of epoch 0, not step 1 of epoch 0"),
        (StepPlan(0, 0, dropped=pack([4])), "sequence 4 is named, but was never sent"),
    ],
)
def test_plans_out_of_place_are_refused(ranks: Ranks, plan: StepPlan, says: str) -> None:
    with pytest.raises(ExecutorDied, match=says):
        ranks.run(plan)


def test_more_sequences_than_slots_are_refused(folder: Path) -> None:
    with Ranks(folder, max_num_seqs=2) as ranks:
        for seq_id in range(3):
            ranks.add(seq_id, [5])
        with pytest.raises(ExecutorDied, match="more than 2 live sequences"):
            ranks.step([(0, 1)])


def test_a_sequence_is_sent_once(ranks: Ranks) -> None:
    ranks.add(1, [5])
    ranks.add(1, [5])
    with pytest.raises(ExecutorDied, match="sequence 1 was sent whole, but is here already"):
        ranks.step([(1, 1)])


def test_draws_do_not_depend_on_the_batch(ranks: Ranks) -> None:
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20),
        SamplingParams(temperature=1.5, min_p=0.05, presence_penalty=1.0, logprobs=3),
        GREEDY,
        SamplingParams(temperature=1.0, logit_bias={3: 5.0}, min_tokens=4, bad_words_token_ids=((9,),)),
    ]
    prompts = [PROMPT[index:] for index in range(len(params))]
    together = ranks.generate(prompts, params)
    alone = [ranks.generate([prompt], [p], seeds=[i])[0] for i, (prompt, p) in enumerate(zip(prompts, params))]
    assert together == alone
    order = [3, 0, 4, 2, 1]
    mixed = ranks.generate([prompts[i] for i in order], [params[i] for i in order], seeds=order, chunk=4)
    assert [mixed[order.index(i)] for i in range(len(params))] == alone


def test_seeds_differ(ranks: Ranks) -> None:
    drawn = ranks.generate([PROMPT] * 8, SamplingParams(temperature=2.0), seeds=list(range(8)))
    assert len({tuple(tokens) for tokens in drawn}) == 8


def test_device_time_is_measured(ranks: Ranks) -> None:
    ranks.add(1, PROMPT)
    assert 0 < ranks.step([(1, len(PROMPT))]).device_s < 30


def test_the_context_can_be_filled_to_its_end(folder: Path) -> None:
    with Ranks(folder, max_model_len=32, block_size=8) as ranks:
        assert len(ranks.generate([PROMPT], num_tokens=12)[0]) == 12


def test_capacity_follows_num_blocks_and_memory(folder: Path) -> None:
    with Ranks(folder, num_blocks=20) as ranks:
        assert ranks.workers[0].measure().num_blocks == 20
    # 3 layers, keys and values, 16 tokens, 2 heads of 12 float32: 9,216 bytes a block.
    with Ranks(folder, num_blocks=None, cpu_kv_cache_gib=9216 * 25.5 / 2**30) as ranks:
        assert ranks.workers[0].measure().num_blocks == 25


@pytest.mark.parametrize(
    "settings, key, says",
    [
        ({"num_blocks": 15}, "num_blocks", "at least 16, for one sequence of max_model_len \\(256\\)"),
        ({"num_blocks": 30, "cpu_kv_cache_gib": 9216 * 20 / 2**30}, "num_blocks", "at most 20"),
        ({"num_blocks": None, "cpu_kv_cache_gib": 9216 * 10 / 2**30}, "max_model_len", "at most 160.*cpu_kv_cache_gib"),
    ],
)
def test_too_little_memory_names_the_key(folder: Path, settings: dict[str, float], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Ranks(folder, **settings)
    assert caught.value.key == key


def test_logprobs_are_of_the_raw_distribution(ranks: Ranks) -> None:
    """Whatever the parameters do to the draw, the log-probabilities are the model's own."""
    shaped = SamplingParams(temperature=0.3, top_k=3, logprobs=5, logit_bias={9: -100.0}, repetition_penalty=1.5)
    ranks.add(1, PROMPT, SamplingParams(temperature=0, logprobs=20))
    ranks.add(2, PROMPT, shaped)
    ranks.add(3, PROMPT)
    plain, other = ranks.step([(seq_id, len(PROMPT)) for seq_id in (1, 2, 3)]).logprobs
    assert (plain.sample, other.sample) == (0, 1) and plain.rank == 1
    assert len(unpack(plain.top_ids)) == 20 and len(unpack(other.top_ids)) == 5
    tops = [np.frombuffer(found.top_logprobs, np.float32) for found in (plain, other)]
    np.testing.assert_array_equal(unpack(plain.top_ids)[:5], unpack(other.top_ids))
    np.testing.assert_allclose(tops[0][:5], tops[1], atol=1e-6)
    assert plain.logprob == pytest.approx(tops[0][0])


def test_prompt_logprobs_in_chunks_are_those_of_the_whole(ranks: Ranks) -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=2)
    found = []
    for chunk in (100, 6):
        results: list[object] = []
        ranks.generate([PROMPT, PROMPT[:1]], params, num_tokens=3, chunk=chunk, results=results)  # type: ignore[arg-type]
        parts = [part for result in results for part in result.prompt_logprobs]  # type: ignore[attr-defined]
        assert len({part.seq_id for part in parts}) == 1, "a prompt of one token has none"
        assert [part.start for part in parts] == list(range(1, 20, chunk))
        found.append(np.concatenate([np.frombuffer(part.logprobs, np.float32) for part in parts]))
    assert len(found[0]) == len(PROMPT) - 1
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
