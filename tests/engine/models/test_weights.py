"""Loading weights: slices, errors that name the tensors, dummy weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelLoadError
from engine.layers.place import WeightSlice
from engine.models.weights import fill_dummy, load_weights
from tests.checkpoints import make_checkpoint
from tests.ranks import Ranks

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the folder's one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def load_error(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Ranks(folder)
    return str(caught.value)


def test_a_rank_reads_its_slice_and_zeroes_the_padding(tmp_path: Path) -> None:
    whole = torch.arange(30.0).view(10, 3)
    save_file({"rows": whole, "columns": whole.clone()}, tmp_path / "model.safetensors")
    rows, columns = torch.full((4, 3), -1.0), torch.full((10, 2), -1.0)
    weights = {"rows": WeightSlice(rows, (10, 3), 0, 8), "columns": WeightSlice(columns, (10, 3), 1, 1)}
    load_weights(weights.items(), str(tmp_path), tied=False, progress=False)
    assert torch.equal(rows[:2], whole[8:]) and not rows[2:].any()
    assert torch.equal(columns, whole[:, 1:])


def test_a_rank_past_the_end_has_zeros(tmp_path: Path) -> None:
    save_file({"rows": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    target = torch.full((4, 2), -1.0)
    load_weights([("rows", WeightSlice(target, (4, 2), 0, 8))], str(tmp_path), tied=False, progress=False)
    assert not target.any()


def test_missing_left_over_and_misshapen_weights_are_named_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(7)

    rewrite(tmp_path, change)
    message = load_error(tmp_path)
    assert "missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "left over: model.layers.9.extra" in message
    assert "model.norm.weight [7] instead of [48]" in message


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    rewrite(tmp_path, dict.clear)
    message = load_error(tmp_path)
    assert "missing: model.embed_tokens.weight" in message and "and 22 more" in message


def test_a_tied_checkpoint_may_repeat_the_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    with Ranks(tmp_path) as ranks:
        wanted = ranks.generate([[5, 6, 7]])
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with Ranks(tmp_path) as ranks:
        assert ranks.generate([[5, 6, 7]]) == wanted


def test_derived_tensors_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    with Ranks(tmp_path) as ranks:
        assert len(ranks.generate([[5]], num_tokens=3)[0]) == 3


def test_no_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = load_error(tmp_path)
    assert "no safetensors files" in message and "*.bin" in message


def test_a_damaged_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "not a readable safetensors file" in load_error(tmp_path)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in load_error(tmp_path)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    assert "not a weight index" in load_error(tmp_path)


def test_progress_is_shown_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file({"rows": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    weights = [("rows", WeightSlice(torch.empty(4, 2), (4, 2)))]
    load_weights(weights, str(tmp_path), tied=False, progress=False)
    assert capfd.readouterr().err == ""
    load_weights(weights, str(tmp_path), tied=False, progress=True)
    assert "Loading weights" in capfd.readouterr().err


def test_dummy_weights_need_no_file_and_follow_the_seed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tokens = []
    for seed in (1, 1, 2):
        with Ranks(tmp_path, load_format="dummy", seed=seed) as ranks:
            tokens.append(ranks.generate([[5, 6, 7]], num_tokens=8))
    assert tokens[0] == tokens[1] != tokens[2]


def test_dummy_norms_are_ones_and_biases_zeros() -> None:
    norm, bias, matrix = torch.empty(8), torch.empty(8), torch.empty(8, 8)
    slices = {"a.norm.weight": norm, "a.q_proj.bias": bias, "a.q_proj.weight": matrix}
    fill_dummy([(name, WeightSlice(target, tuple(target.shape))) for name, target in slices.items()], seed=0)
    assert (norm == 1).all() and (bias == 0).all()
    assert 0 < matrix.abs().max() < 0.1 and matrix.unique().numel() == 64
