"""Which implementation runs: by device, by force(), by MANTA_KERNELS, and what a refusal says."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import registry
from kernels.registry import KernelUnavailable, force, kernel, parse_choices


@kernel
def doubled(x: Tensor) -> Tensor:
    """Twice x."""
    return x * 2


@doubled.triton(supports=lambda x: None if x.is_contiguous() else "x is not contiguous")
def _doubled_fast(x: Tensor) -> Tensor:
    return x * 2 + 1000  # so that a test sees which one ran


@kernel
def definition_only(x: Tensor) -> Tensor:
    return x


def test_a_cpu_tensor_takes_the_definition() -> None:
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert doubled.name.endswith("test_registry.doubled") and doubled.__doc__ == "Twice x."


def test_force_overrules_and_nests() -> None:
    x = torch.ones(1)
    with force("triton"):
        if registry.interpreting():
            assert doubled(x).item() == 1002
        with force("torch"):
            assert doubled(x).item() == 2
    assert doubled(x).item() == 2


def test_force_raises_when_it_cannot_be_obeyed() -> None:
    with force("triton"):
        with pytest.raises(KernelUnavailable, match=r"doubled: triton was asked for, but x is not contiguous"):
            doubled(torch.ones(4, 4).t())
        with pytest.raises(KernelUnavailable, match="no Triton implementation"):
            definition_only(torch.ones(1))
    with pytest.raises(ValueError, match="'cuda' is not"), force("cuda"):  # type: ignore[arg-type]
        pass


def test_a_reason_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(2, 3).t()
    before = doubled.why_not["x is not contiguous"]
    doubled.why_not.clear()
    with caplog.at_level(logging.INFO, logger="kernels.registry"), force("triton"):
        for _ in range(3):
            with pytest.raises(KernelUnavailable):
                doubled(x)
    assert [record.message for record in caplog.records] == [
        f"{doubled.name} runs its torch definition: x is not contiguous"
    ]
    assert registry.why_not_report()[doubled.name] == {"x is not contiguous": 3}
    doubled.why_not["x is not contiguous"] += before


def test_the_environment_variable_is_read() -> None:
    assert parse_choices("") == (None, {})
    assert parse_choices("torch") == ("torch", {})
    assert parse_choices("triton, rms_norm.rms_norm=torch") == ("triton", {"rms_norm.rms_norm": "torch"})
    with pytest.raises(ValueError, match="'fast' is not torch, triton"):
        parse_choices("fast")


def test_every_operation_has_both_implementations_and_a_docstring() -> None:
    from kernels import (  # noqa: F401
        activation,
        decode_inputs,
        embedding,
        kv_cache,
        linear,
        paged_attention,
        rms_norm,
        rotary,
        sampling,
    )

    for name, op in registry.all_kernels().items():
        if "test_" not in name:
            assert op.fast is not None, name
            assert op.__doc__, name


def test_the_definitions_work_where_triton_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kernels import embedding, kv_cache, linear, paged_attention, sampling\n"
        "from kernels.rms_norm import rms_norm\n"
        "print(rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[1.0, 1.0, 1.0, 1.0]]"
