"""LLM on the embedded model: shapes of prompts, results, errors, and programs that were written for vLLM."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import ConfigError, ExecutorDied, PromptTooLong, RequestError
from engine.llm import MAX_RECOVERIES
from engine.output import RequestOutput
from engine.vllm_arguments import translate
from tests.fakes import HashExecutor

TINY = str(Path(__file__).parents[2] / "configs" / "tiny")
GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTION = [{"role": "user", "content": "What is 12 + 34?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(TINY, num_blocks=600, max_num_seqs=64) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    stats = llm.llm_engine.stats()
    return stats.running == stats.waiting == stats.used_blocks == 0


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


FOUR_PROMPTS = """
from vllm import LLM, SamplingParams

# Sample prompts.
prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
# Create a sampling params object.
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

# Create an LLM.
llm = LLM(model="facebook/opt-125m")
# Generate texts from the prompts. The output is a list of RequestOutput objects
# that contain the prompt, generated text, and other information.
outputs = llm.generate(prompts, sampling_params)
# Print the outputs.
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

CHAT_TEMPLATE_AND_STOP_TOKENS = """
from vllm import LLM, SamplingParams

llm = LLM(model="facebook/opt-125m", tensor_parallel_size=1, gpu_memory_utilization=0.9, max_model_len=1024,
          trust_remote_code=True, enforce_eager=True, swap_space=4)
tokenizer = llm.get_tokenizer()
conversations = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is 12 + 34?"}], tokenize=False, add_generation_prompt=True
)
outputs = llm.generate(
    [conversations],
    SamplingParams(
        temperature=0.0,
        max_tokens=64,
        stop_token_ids=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")],
    ),
    use_tqdm=False,
)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

TWO_SAMPLES = """
from vllm import LLM, SamplingParams

llm = LLM("facebook/opt-125m")
outputs = llm.generate("Hello, my name is", SamplingParams(n=2, temperature=0.9, max_tokens=8))
for output in outputs[0].outputs:
    print(output.index, output.text, output.token_ids, output.finish_reason)
"""


BEAMS = """
from vllm import LLM
from vllm.sampling_params import BeamSearchParams

llm = LLM(model="facebook/opt-125m", dtype="float32")
params = BeamSearchParams(beam_width=5, max_tokens=20)
outputs = llm.beam_search([{"prompt": "Hello, my name is"}, {"prompt_token_ids": [1, 40, 41]}], params)
for output in outputs:
    for sequence in output.sequences:
        print(f"Beam: {sequence.text!r} {sequence.cum_logprob:.3f} {len(sequence.tokens)}")
"""


def run_program(program: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a program as its author wrote it, but for the import and the model."""
    names: dict[str, Any] = {"__name__": "__main__"}
    program = program.replace("from vllm", "from engine").replace("facebook/opt-125m", TINY)
    try:
        exec(compile(program, "program.py", "exec"), names)
    finally:
        if "llm" in names:
            names["llm"].close()
    names["printed"] = capsys.readouterr().out
    return names


def test_the_four_prompts_program(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_program(FOUR_PROMPTS, capsys)
    assert [output.prompt for output in names["outputs"]] == names["prompts"]
    assert names["printed"].count("Prompt: ") == 4
    for output in names["outputs"]:
        (sample,) = output.outputs
        assert sample.finish_reason in ("stop", "length") and 1 <= len(sample.token_ids) <= 16
        assert sample.text == names["llm"].get_tokenizer().decode(sample.token_ids, skip_special_tokens=True)


def test_the_chat_template_program(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_program(CHAT_TEMPLATE_AND_STOP_TOKENS, capsys)
    (output,) = names["outputs"]
    assert "46" in output.outputs[0].text and output.outputs[0].finish_reason == "stop"
    tokenizer = names["tokenizer"]
    assert output.prompt_token_ids == tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    ), "the beginning-of-sequence token is there once"
    assert "<|" not in output.outputs[0].text


def test_the_two_samples_program(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_program(TWO_SAMPLES, capsys)
    (request,) = names["outputs"]
    assert [sample.index for sample in request.outputs] == [0, 1]
    assert request.outputs[0].token_ids != request.outputs[1].token_ids


def test_the_beams_program(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's names over Transformers' search."""
    names = run_program(BEAMS, capsys)
    assert names["printed"].count("Beam: ") == 10
    tokenizer = names["llm"].get_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for output, prompt in zip(names["outputs"], (tokenizer("Hello, my name is").input_ids, [1, 40, 41])):
        rows = model.generate(
            torch.tensor([prompt]), num_beams=5, num_return_sequences=5, max_new_tokens=20, do_sample=False
        ).tolist()
        for sequence, row in zip(output.sequences, rows, strict=True):
            assert sequence.tokens == row[: len(sequence.tokens)] and set(row[len(sequence.tokens) :]) <= {2}, "padded"
            assert sequence.text == tokenizer.decode(sequence.tokens)
            assert len(sequence.logprobs) == len(sequence.tokens) - len(prompt)
            drawn = [entry[token].logprob for token, entry in zip(sequence.tokens[len(prompt) :], sequence.logprobs)]
            assert sequence.cum_logprob == pytest.approx(sum(drawn))
            assert sequence.finish_reason == ("stop" if sequence.tokens[-1] == 2 else "length")


def test_every_shape_of_prompt_gives_the_same_tokens(llm: LLM) -> None:
    text = "The capital of France is"
    ids = llm.get_tokenizer().encode(text)
    (expected,) = llm.generate(text, GREEDY, use_tqdm=False)
    assert expected.prompt == text and expected.prompt_token_ids == ids
    shapes: list[Any] = [[text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}], np.array(ids), (text,)]
    for prompts in shapes:
        (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert output.outputs == expected.outputs, prompts
    for given in (ids, [ids]):
        (output,) = llm.generate(None, GREEDY, given, False)
        assert output.outputs == expected.outputs and output.prompt is None
    (output,) = llm.generate([text], GREEDY, [ids], False)
    assert output.outputs == expected.outputs and output.prompt == text
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_results_are_in_order_with_their_own_parameters(llm: LLM) -> None:
    prompts = [f"Count from 1 to {n}" for n in range(2, 40)]
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 7, ignore_eos=True) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params]
    alone = [llm.generate(prompts[i], params[i], use_tqdm=False)[0].outputs for i in (0, 17, 37)]
    assert [outputs[i].outputs for i in (0, 17, 37)] == alone
    assert idle(llm)


def test_a_stop_string_ends_the_sample_in_the_engine_too(llm: LLM) -> None:
    (whole,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    text = whole.outputs[0].text
    assert text == "12 + 34 = 46"
    (output,) = llm.chat(QUESTION, GREEDY.replace(stop=("= 4",), ignore_eos=True, max_tokens=500), use_tqdm=False)
    sample = output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("12 + 34 ", "stop", "= 4")
    assert output.num_completion_tokens == len(sample.token_ids) < len(whole.outputs[0].token_ids)
    assert idle(llm), "what the engine went on drawing was aborted"


def test_chat_one_many_and_continued(llm: LLM) -> None:
    other = [{"role": "user", "content": "What is 50 + 7?"}]
    outputs = llm.chat([QUESTION, other], GREEDY, use_tqdm=False)
    assert texts(outputs) == ["12 + 34 = 46", "50 + 7 = 57"]
    assert outputs[0].prompt is not None and "What is 12 + 34?" in outputs[0].prompt
    begun = [*QUESTION, {"role": "assistant", "content": "12 + 34 ="}]
    (output,) = llm.chat(begun, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert output.outputs[0].text == " 46"
    template = "{{ bos_token }}<|user|>{{ question }}<|end|><|assistant|>"
    (output,) = llm.chat(
        QUESTION, GREEDY, False, chat_template=template, chat_template_kwargs={"question": "What is 50 + 7?"}
    )
    assert output.outputs[0].text == "50 + 7 = 57"


def test_logprobs_of_greedy_tokens_rank_first(llm: LLM) -> None:
    (output,) = llm.chat(QUESTION, GREEDY.replace(logprobs=3, prompt_logprobs=1), use_tqdm=False)
    sample = output.outputs[0]
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
    for token_id, entries in zip(sample.token_ids, sample.logprobs):
        assert next(iter(entries)) == token_id and entries[token_id].rank == 1 and len(entries) == 3
    assert sample.cumulative_logprob == pytest.approx(
        sum(entries[i].logprob for i, entries in zip(sample.token_ids, sample.logprobs))
    )
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None


def test_best_of_returns_the_most_likely(llm: LLM) -> None:
    drawn = SamplingParams(n=6, seed=5, temperature=1.5, max_tokens=6, logprobs=0, ignore_eos=True)
    (everything,) = llm.generate("Hello, my name is", drawn, use_tqdm=False)
    (best,) = llm.generate("Hello, my name is", drawn.replace(n=2, best_of=6), use_tqdm=False)
    ranked = sorted(everything.outputs, key=lambda o: o.cumulative_logprob or 0.0, reverse=True)
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked[:2]]
    assert best.num_completion_tokens == 36


def test_bad_words_and_bias_are_obeyed(llm: LLM) -> None:
    (plain,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert "46" in plain.outputs[0].text
    (output,) = llm.chat(QUESTION, GREEDY.replace(bad_words=("46",)), use_tqdm=False)
    assert "46" not in output.outputs[0].text
    only = llm.get_tokenizer().encode("x", add_special_tokens=False)[:1]
    (output,) = llm.chat(QUESTION, GREEDY.replace(allowed_token_ids=tuple(only), max_tokens=3), use_tqdm=False)
    assert output.outputs[0].token_ids == only * 3


def test_a_bad_prompt_stops_nothing_else(llm: LLM) -> None:
    cases: list[tuple[Any, SamplingParams, type[Exception], str]] = [
        (["fine", [10**6]], GREEDY, RequestError, "outside the vocabulary"),
        (["fine", []], GREEDY, RequestError, "empty"),
        (["fine", {"text": "x"}], GREEDY, RequestError, "prompt_token_ids"),
        (["fine", 3.5], GREEDY, RequestError, "a string"),
        (None, GREEDY, RequestError, "give prompts"),
        (["fine", [5] * 5000], GREEDY, PromptTooLong, "2048|max_model_len"),
        ("fine", GREEDY.replace(stop_token_ids=(10**6,)), RequestError, "stop_token_ids"),
    ]
    for prompts, params, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            llm.generate(prompts, params, use_tqdm=False)
        assert idle(llm)
    with pytest.raises(RequestError, match="sampling_params: 1 given for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(RequestError, match="lora_request"):
        llm.generate("a", GREEDY, lora_request="adapter")  # type: ignore[arg-type]
    assert texts(llm.chat(QUESTION, GREEDY, use_tqdm=False)) == ["12 + 34 = 46"]


def test_a_seed_makes_programs_repeatable() -> None:
    drawn = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    runs = []
    for seed in (7, 7, 8):
        with LLM(TINY, seed=seed, num_blocks=200) as llm:
            runs.append([o.outputs[0].token_ids for o in llm.generate(["Hello"] * 2, drawn, use_tqdm=False)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1], "each prompt has draws of its own"


def test_defaults_come_from_the_model(llm: LLM, tmp_path: Path) -> None:
    assert llm.get_default_sampling_params().max_tokens == SamplingParams().max_tokens
    for file in Path(TINY).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 5, "eos_token_id": 2}')
    with LLM(str(tmp_path), num_blocks=200) as other:
        assert other.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=5)
        outputs = other.generate(["Hello, my name is"] * 2, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert len(outputs[0].outputs[0].token_ids) <= 5


def test_arguments_are_vllms(caplog: pytest.LogCaptureFixture) -> None:
    given = {"model": "m", "dtype": "half", "swap_space": 4, "disable_log_stats": True, "quantization": None}
    with caplog.at_level(logging.WARNING):
        assert translate({**given, "scheduling_policy": "priority", "pipeline_parallel_size": 1}) == {
            "model": "m",
            "dtype": "float16",
            "policy": "priority",
        }
    assert caplog.text.count("disable_log_stats, swap_space") == 1
    import torch

    assert translate({"dtype": torch.bfloat16}) == {"dtype": "bfloat16"}
    for wrong in ({"no_such_thing": 1}, {"pipeline_parallel_size": 2}, {"dtype": "int3"}, {"max_model_len": 0}):
        with pytest.raises(ConfigError) as caught:
            LLM(TINY, **wrong)  # type: ignore[arg-type]
        assert caught.value.key == next(iter(wrong))


def test_a_rank_that_dies_costs_no_token(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    runs = []
    for fail_at in (frozenset(), frozenset({7, 20})):
        executors: list[HashExecutor] = []

        def make(config: EngineConfig, _: object, fail_at: frozenset[int] = fail_at) -> HashExecutor:
            executors.append(HashExecutor(config, fail_at=fail_at))  # noqa: B023
            return executors[-1]  # noqa: B023

        monkeypatch.setattr("engine.llm._make_executor", make)
        with LLM(TINY) as llm:
            runs.append([output.outputs for output in llm.generate(prompts, params, use_tqdm=False)])
            assert idle(llm) and executors[0].num_restarts == len(fail_at)
    assert runs[0] == runs[1]
    assert caplog.text.count("recovering from the loss of a rank") == 2


def test_a_rank_that_always_dies_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    executors = []

    def make(config: EngineConfig, _: object) -> HashExecutor:
        executors.append(HashExecutor(config, fail_at=frozenset(range(1, 100))))
        return executors[-1]

    monkeypatch.setattr("engine.llm._make_executor", make)
    with LLM(TINY) as llm, pytest.raises(ExecutorDied, match="injected"):
        llm.generate([[5, 6]], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)
    assert executors[0].num_restarts == MAX_RECOVERIES


def test_one_rank_never_imports_ray() -> None:
    code = (
        "import sys; from engine import LLM, SamplingParams\n"
        f"llm = LLM({TINY!r}, num_blocks=200)\n"
        "print(llm.generate('Hello', SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].text)\n"
        "llm.close(); llm.close(); assert 'ray' not in sys.modules"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, timeout=250, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert "Processed prompts: 100%" in done.stderr.decode()
