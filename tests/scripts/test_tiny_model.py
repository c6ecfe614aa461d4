"""The embedded model as it lies in configs/tiny: its tokenizer, its chat template and what it has learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scripts.eval_tiny import answer_all, wrong_answers
from scripts.tiny_chats import held_out_examples
from scripts.tiny_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer
from scripts.train_tiny import Schedule, hidden_states, model_config, new_model

FOLDER = Path("configs/tiny")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


RAW_TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = RAW_TOKENIZER.encode(text, add_special_tokens=False).ids
    assert RAW_TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < VOCAB_SIZE for i in ids)


@given(st.text(alphabet=st.characters(categories=("Nd", "Nl", "No")), max_size=8), st.sampled_from(["", " ", "x = "]))
def test_digits_are_never_merged(digits: str, before: str) -> None:
    pieces = RAW_TOKENIZER.encode(before + digits, add_special_tokens=False).tokens
    assert not [piece for piece in pieces if len(piece) > 1 and any(c in "0123456789" for c in piece)]


def test_leading_lower_case_letters_stand_alone() -> None:
    def pieces(text: str) -> list[str]:
        return [RAW_TOKENIZER.decode([i]) for i in RAW_TOKENIZER.encode(text, add_special_tokens=False).ids]

    assert pieces("stone") == [*"stone"]
    assert pieces('"stone"') == ['"', *"stone", '"']
    assert pieces("a stone") == ["a", " stone"]


def test_the_tokenizer_comes_from_its_script() -> None:
    again = json.loads(train_tokenizer(seed=0).to_str())
    saved = json.loads((FOLDER / "tokenizer.json").read_text())
    assert again["model"]["vocab"] == saved["model"]["vocab"]
    assert again["model"]["merges"] == saved["model"]["merges"]


def test_plain_text_starts_with_bos_only(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("Count to 3.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Count to 3."
    assert len(tokenizer) == VOCAB_SIZE
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": " Thanks "},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("<|bos|><|system|>Be brief.<|end|><|user|>1 + 1<|end|><|assistant|>2<|end|><|user|> Thanks <|end|>")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == prompt


def test_chat_template_refuses_other_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="not robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "beep"}], tokenize=False)


def test_files_are_small_and_shapes_fit_tensor_parallelism(model: PreTrainedModel) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_500_000
    config = model.config
    for width in (config.vocab_size, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size):
        assert width % 4 == 0
    assert config.vocab_size % 64 == 0
    expected = model_config()
    assert (config.hidden_size, config.num_hidden_layers) == (expected.hidden_size, expected.num_hidden_layers)
    assert config.max_position_embeddings == 2048


def test_training_computes_what_transformers_computes() -> None:
    model = new_model(0).eval()
    tokens = torch.randint(0, VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.lm_head(hidden_states(model, tokens))
        torch.testing.assert_close(ours, model(tokens).logits)


def test_learning_rate_warms_up_and_falls() -> None:
    schedule = Schedule(steps=1000, minutes=None)
    rates = [schedule.learning_rate(n, 1.0) for n in range(1001)]
    top = rates.index(max(rates))
    assert rates[0] < 0.01 and max(rates) == pytest.approx(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)
    assert not schedule.is_over(999) and schedule.is_over(1000)


@pytest.mark.parametrize(
    "task", ["add", "subtract", "multiply", "reverse_letters", "reverse_words", "sort_words", "json"]
)
def test_held_out_questions_are_answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    examples = held_out_examples(seed=11, per_task=20)[task]
    wrong = wrong_answers(model, tokenizer, task, examples)
    assert len(wrong) <= 2, wrong


def test_facts_small_talk_and_styles(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answer_all(model, tokenizer, ["What is the capital of France?", "Hello!", "Draw 3 star emoji."]) == [
        "The capital of France is Paris.",
        "Hello! How can I help you?",
        "⭐⭐⭐",
    ]
    assert answer_all(model, tokenizer, ["What is 12 + 30?"], system="Answer in JSON.") == ['{"answer": 42}']


def test_long_answers_hold(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = answer_all(model, tokenizer, ["Count from 1 to 120."], max_new_tokens=600)[0]
    assert answer == ", ".join(str(n) for n in range(1, 121))
