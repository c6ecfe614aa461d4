"""Filling a model's weights: from safetensors files, each rank reading only its slices, or from a seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.errors import ModelLoadError
from engine.layers.place import WeightSlice

_SHOWN = 8
_DUMMY_RANGE = 0.02
_DERIVED = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the configuration."""


def load_weights(weights: Iterable[tuple[str, WeightSlice]], folder: str, *, tied: bool, progress: bool) -> None:
    """Fill every weight from the folder's safetensors file or files.

    `tied`: the checkpoint may repeat the embedding as lm_head.weight; it is not read. `progress` shows a bar.
    Raises ModelLoadError naming the tensors that are missing, left over or of another shape, before any is read.
    """
    wanted = dict(weights)
    files = _files_of(Path(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Path] = {}
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
                where[name] = file
    _check(wanted, shapes, folder, tied)
    with tqdm(total=len(wanted), desc="Loading weights", unit="tensor", disable=not progress) as bar:
        for file in files:
            with _open(file) as tensors:
                for name, weight in wanted.items():
                    if where[name] == file:
                        _fill(weight, tensors.get_slice(name))
                        bar.update()


def fill_dummy(weights: Iterable[tuple[str, WeightSlice]], seed: int) -> None:
    """Fill every weight with seeded random numbers, on its device; norms' scales become ones, biases zeros."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, weight in weights:
        target = weight.target
        if target.dim() == 1:
            target.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        if target.device not in generators:
            generators[target.device] = torch.Generator(target.device).manual_seed(seed)
        target.uniform_(-_DUMMY_RANGE, _DUMMY_RANGE, generator=generators[target.device])


def _files_of(folder: Path) -> list[Path]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        try:
            names = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{index_file}: not a weight index: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelLoadError(f"{folder}: {index_file.name} names files that are not there: {_list(missing)}")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    others = sorted(folder.glob("*.safetensors"))
    if others:
        return others
    has_pickle = any(folder.glob("*.bin"))
    hint = "; pickled *.bin weights are not read, convert them to safetensors" if has_pickle else ""
    raise ModelLoadError(f"{folder}: no safetensors files{hint}")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file}: not a readable safetensors file: {error}") from error


def _check(wanted: dict[str, WeightSlice], shapes: dict[str, tuple[int, ...]], folder: str, tied: bool) -> None:
    faults = []
    missing = [name for name in wanted if name not in shapes]
    if missing:
        faults.append(f"missing: {_list(missing)}")
    allowed = {"lm_head.weight"} if tied else set()
    left_over = [name for name in shapes if name not in wanted and name not in allowed and not name.endswith(_DERIVED)]
    if left_over:
        faults.append(f"left over: {_list(left_over)}")
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(weight.shape)}"
        for name, weight in wanted.items()
        if name in shapes and shapes[name] != weight.shape
    ]
    if wrong:
        faults.append(f"of another shape: {_list(wrong)}")
    if faults:
        raise ModelLoadError(f"{folder}: its weights do not fit its config.json; " + "; ".join(faults))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fill(weight: WeightSlice, source: Any) -> None:
    """Copy this rank's slice of `source` into the target; only that slice is read."""
    dim, start, count = weight.dim, weight.start, weight.count
    index = (slice(None),) * dim + (slice(start, start + count),)
    target = weight.target.narrow(dim, 0, count)
    if count:
        part: Tensor = source[index]
        target.copy_(part)
    if count < weight.target.shape[dim]:
        weight.target.narrow(dim, count, weight.target.shape[dim] - count).zero_()
