"""The registry: every line leads to a class; unknown names are refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine.errors import ConfigError
from engine.models.registry import find_model


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_architecture_has_its_class(architecture: str) -> None:
    model_class = find_model(architecture).load_class()
    assert callable(model_class.forward) and callable(model_class.logits) and callable(model_class.weights)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM") as caught:
        find_model("GPT2LMHeadModel")
    assert caught.value.key == "model"


def test_looking_a_model_up_imports_no_torch() -> None:
    code = "import sys, engine.models.registry as r; r.find_model('LlamaForCausalLM'); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, timeout=250, capture_output=True).stdout
    assert said.split() == [b"False"]
