"""Every family gives Transformers' tokens and, up to rounding, its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.sampling_params import SamplingParams
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.ranks import Ranks

PROMPTS = [[5, 7, 9, 11, 100, 150, 33], [3], [50, 60, 70, 80, 90] * 9, list(range(20, 36))]
NUM_TOKENS = 24


def transformers_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What Transformers' generate gives, never stopping."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    wanted = [transformers_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)
    with Ranks(tmp_path) as ranks:
        assert ranks.generate(PROMPTS, num_tokens=NUM_TOKENS) == wanted
        assert ranks.generate(PROMPTS, num_tokens=NUM_TOKENS, chunk=7) == wanted


@pytest.mark.parametrize("family", ["llama2", "llama3.1", "qwen2", "qwen2.5-yarn", "qwen3"])
def test_log_probabilities_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    prompt = list(range(10, 90))
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1).numpy()
    results: list[Any] = []
    with Ranks(tmp_path) as ranks:
        ranks.generate([prompt], SamplingParams(temperature=0, prompt_logprobs=20), num_tokens=1, results=results)
    (prompt_logprobs,) = results[0].prompt_logprobs
    assert prompt_logprobs.start == 1
    got = np.frombuffer(prompt_logprobs.logprobs, np.float32)
    np.testing.assert_allclose(got, wanted[np.arange(79), prompt[1:]], atol=2e-4)
    top_ids = np.frombuffer(prompt_logprobs.top_ids, np.int32).reshape(79, 20)
    top = np.frombuffer(prompt_logprobs.top_logprobs, np.float32).reshape(79, 20)
    np.testing.assert_allclose(top, np.sort(wanted[:79])[:, :-21:-1], atol=2e-4)
    np.testing.assert_allclose(np.take_along_axis(wanted[:79], top_ids, axis=1), top, atol=2e-4)
    ranks_of = (wanted[:79] > wanted[np.arange(79), prompt[1:]][:, None]).sum(axis=1) + 1
    np.testing.assert_array_equal(np.frombuffer(prompt_logprobs.ranks, np.int32), ranks_of)


def test_sharded_checkpoint_gives_the_same_tokens(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama3", max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with Ranks(tmp_path) as ranks:
        assert ranks.generate(PROMPTS[:1]) == [transformers_greedy(model, PROMPTS[0], 12)]


def test_config_as_older_transformers_wrote_it(tmp_path: Path) -> None:
    """rope_theta and rope_scaling at the top, torch_dtype instead of dtype."""
    import json

    model = make_checkpoint(tmp_path, "llama3.1")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config))
    with Ranks(tmp_path) as ranks:
        assert ranks.generate(PROMPTS[:1]) == [transformers_greedy(model, PROMPTS[0], 12)]


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", initializer_range=0.05)
    prompt = list(range(10, 90))
    found = []
    for dtype in ("float32", "bfloat16"):
        results: list[Any] = []
        with Ranks(tmp_path, dtype=dtype) as ranks:
            ranks.generate([prompt], SamplingParams(temperature=0, prompt_logprobs=0), num_tokens=1, results=results)
        found.append(np.frombuffer(results[0].prompt_logprobs[0].logprobs, np.float32))
    assert not np.array_equal(*found)
    np.testing.assert_allclose(*found, atol=0.1)


@pytest.mark.parametrize("family", ["llama3", "qwen2.5-tied", "qwen3"])
def test_two_ranks_give_one_ranks_tokens(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    wanted = [transformers_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    with Ranks(tmp_path, tensor_parallel_size=2) as ranks:
        assert ranks.generate(PROMPTS, num_tokens=NUM_TOKENS, chunk=20) == wanted


def test_two_ranks_draw_one_ranks_samples(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", initializer_range=0.1)
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, logprobs=2)
    drawn = []
    for size in (1, 2):
        with Ranks(tmp_path, tensor_parallel_size=size) as ranks:
            drawn.append(ranks.generate(PROMPTS, params, num_tokens=NUM_TOKENS))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("size", [1, 2])
def test_the_embedded_model_gives_transformers_tokens(size: int) -> None:
    folder = Path(__file__).parents[3] / "configs" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = ["What is 23 + 58?", "Reverse the words: red green blue", "Hello! Who are you?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True)["input_ids"]
        for chat in chats
    ]
    wanted = [transformers_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    with Ranks(folder, max_model_len=128, tensor_parallel_size=size) as ranks:
        assert ranks.generate(prompts, num_tokens=NUM_TOKENS, chunk=11) == wanted
