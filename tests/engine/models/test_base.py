"""What every family keeps of Model: the wanted rows of a step are those rows of the whole, and the others cost less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.layers.attention import Runs, StepInput
from engine.layers.rotary import cos_sin_table
from engine.models import registry
from tests.checkpoints import FAMILIES, SHAPE, make_checkpoint
from tests.ranks import Ranks

BLOCK_SIZE = 8
LENGTHS = [21, 3, 9]
"""Of the prompts of one step, the last two behind a decode of the first."""
NUM_TOKENS = 1 + LENGTHS[1] + LENGTHS[2]


def forward(ranks: Ranks, rank: int, wanted: list[int] | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A prompt, then a step of a decode of it and two chunks; that step's hidden states, and the cache behind it."""
    model, shape = ranks.workers[rank]._model, ranks.model_config
    assert model is not None
    heads = shape.num_key_value_heads // ranks.size
    caches = [
        (torch.zeros(8, BLOCK_SIZE, heads, shape.head_dim), torch.zeros(8, BLOCK_SIZE, heads, shape.head_dim))
        for _ in range(shape.num_layers)
    ]
    tables = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]], dtype=torch.int32)
    cos_sin = cos_sin_table(shape.rope, shape.head_dim, 64, torch.device("cpu"))

    def run(starts: list[int], counts: list[int], num_decodes: int, rows: Tensor | None) -> Tensor:
        positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        lens = torch.tensor(starts, dtype=torch.int32) + torch.tensor(counts, dtype=torch.int32)
        ends = torch.tensor([0, *counts[num_decodes:]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return model.forward(
            StepInput(
                token_ids=(positions * 17 + of * 5) % shape.vocab_size,
                positions=positions,
                slots=tables[of, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
                num_decodes=num_decodes,
                decodes=Runs(tables[:num_decodes], lens[:num_decodes]) if num_decodes else None,
                prefills=Runs(tables[num_decodes : len(counts)], lens[num_decodes:], ends, max(counts)),
                caches=caches,
                cos_sin=cos_sin,
                wanted=rows,
            )
        )

    with torch.inference_mode():
        run([0], LENGTHS[:1], 0, None if wanted is None else torch.tensor([0]))
        rows = None if wanted is None else torch.tensor(wanted)
        return run([LENGTHS[0], 0, 0], [1, *LENGTHS[1:]], 1, rows), caches


def test_every_architecture_has_a_family_here() -> None:
    assert {model_class.__name__ for model_class, _, _ in FAMILIES.values()} == set(registry._MODELS)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_wanted_rows_are_those_of_the_whole(family: str, size: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    with Ranks(tmp_path, tensor_parallel_size=size) as ranks:
        whole = ranks._each(lambda rank: forward(ranks, rank, None))
        assert whole[0][0].shape == (NUM_TOKENS, SHAPE["hidden_size"])
        assert len(torch.unique(whole[0][0][:, 0])) == NUM_TOKENS
        for wanted in ([0, 3, NUM_TOKENS - 1], [12, 0, 0, 7], [5], list(range(NUM_TOKENS))):
            some = ranks._each(lambda rank, wanted=wanted: forward(ranks, rank, wanted))
            for (states, caches), (all_states, all_caches) in zip(some, whole, strict=True):
                torch.testing.assert_close(states, all_states[wanted], rtol=2e-5, atol=2e-5)
                for found, expected in zip(caches, all_caches, strict=True):
                    # Nothing in front of a key or value depends on what is wanted.
                    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
                    assert found[0][1:7].abs().sum(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_spares_what_is_not_wanted(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    with Ranks(tmp_path) as ranks:
        shape = ranks.model_config
        counts = []
        for wanted in (None, [4, 12]):
            with FlopCounterMode(display=False) as counter:
                forward(ranks, 0, wanted)
            counts.append(counter.get_total_flops())
        wide = shape.num_attention_heads * shape.head_dim + 3 * shape.intermediate_size
        spared_rows = LENGTHS[0] - 1 + NUM_TOKENS - 2
        assert counts[0] - counts[1] == 2 * shape.hidden_size * wide * spared_rows
