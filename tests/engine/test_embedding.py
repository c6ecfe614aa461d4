"""Embedding through the engine: the scheduler, preemption, recovery, the prefix cache, and the offline call."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.embedding import embedding_params
from engine.errors import ExecutorDied, PromptTooLong, RequestError
from engine.llm_engine import LLMEngine
from engine.request import Request, SequenceOutput
from engine.step import Pooling
from tests.fakes import HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, attend, expected_tokens, fake_vector, random_prompt


def make_engine(executor: HashExecutor) -> LLMEngine:
    engine = LLMEngine(executor.config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    return engine


def embedding(name: str, prompt: list[int], pooling: Pooling) -> Request:
    return Request.create(name, prompt, embedding_params(), pooling=pooling)


def expected_vector(request: Request) -> bytes:
    values: list[int] = []
    for token in request.prompt_token_ids:
        values.append(attend(values, token))
    return fake_vector(values if request.pooling == "mean" else values[-1:])


def run(engine: LLMEngine) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    while engine.has_unfinished:
        try:
            outputs += engine.step()
        except ExecutorDied:
            engine.recover()
    return outputs


@pytest.mark.parametrize("seed", range(30))
def test_vectors_and_tokens_survive_tight_caches_faults_and_company(seed: int) -> None:
    rng = random.Random(seed)
    config = engine_config(max_num_batched_tokens=rng.choice([8, 24, 64]), steps_ahead=rng.choice([1, 2, 3]))
    executor = HashExecutor(config, num_blocks=rng.choice([9, 14, 60]), fail_at=frozenset(rng.sample(range(10), 2)))
    engine = make_engine(executor)
    shared = random_prompt(rng, 24)
    requests = []
    for number in range(16):
        prompt = shared[: rng.randrange(25)] + random_prompt(rng, rng.randrange(1, 39))
        if number % 3:
            requests.append(embedding(str(number), prompt, rng.choice(["mean", "last"])))
        else:
            params = SamplingParams(temperature=1, seed=number, max_tokens=rng.randrange(1, 30))
            requests.append(Request.create(str(number), prompt[:50], params))
        engine.add_request(requests[-1])
    outputs = run(engine)
    for request in requests:
        its = [output for output in outputs if output.request_id == request.request_id]
        if request.pooling is None:
            tokens = [token for output in its for token in output.token_ids]
            assert (tokens, its[-1].finish_reason) == expected_tokens(request, config.model_len)[0]
            assert all(output.embedding is None for output in its)
        else:
            assert [(o.token_ids, o.embedding, o.finish_reason) for o in its] == [
                ([], expected_vector(request), "stop")
            ]
    assert executor.num_restarts
    assert engine.stats().used_blocks == 0


def test_a_mean_passes_the_prefix_cache_by_and_the_last_state_uses_it() -> None:
    engine = make_engine(HashExecutor(engine_config()))
    prompt = random_prompt(random.Random(1), 40)
    cached = {}
    for name, pooling in (("first", "last"), ("mean", "mean"), ("last", "last")):
        engine.add_request(embedding(name, prompt, pooling))  # type: ignore[arg-type]
        (output,) = run(engine)
        cached[name] = output.num_cached_tokens
    assert cached == {"first": 0, "mean": 0, "last": 32}


def test_a_prompt_may_fill_the_context_and_no_more() -> None:
    engine = make_engine(HashExecutor(engine_config()))
    engine.add_request(embedding("whole", random_prompt(random.Random(2), 64), "mean"))
    assert [output.finish_reason for output in run(engine)] == ["stop"]
    with pytest.raises(PromptTooLong, match="leaves room for 64"):
        engine.add_request(embedding("longer", random_prompt(random.Random(2), 65), "mean"))


def test_no_token_is_counted() -> None:
    engine = make_engine(HashExecutor(engine_config()))
    engine.add_request(embedding("one", [5, 6, 7], "last"))
    run(engine)
    assert engine.stats().generated_tokens == 0


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(model="configs/tiny", dtype="float32", max_model_len=256, num_blocks=64, max_num_batched_tokens=32)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_offline_call_gives_transformers_vectors(llm: LLM, pooling: Pooling) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(Path("configs/tiny")), dtype=torch.float32).eval()
    texts = ["Hello there", "What is 17 + 25?", "The capital of France is Paris. " * 6]
    outputs = llm.embed(texts, pooling=pooling, use_tqdm=False)
    for text, output in zip(texts, outputs, strict=True):
        ids = llm.get_tokenizer()(text)["input_ids"]
        assert output.prompt_token_ids == ids and output.finished
        with torch.inference_mode():
            states = model.model(torch.tensor([ids])).last_hidden_state[0].float().numpy()
        vector = states[-1] if pooling == "last" else states.mean(axis=0)
        vector = vector / np.linalg.norm(vector)
        assert output.outputs.hidden_size == len(vector)
        np.testing.assert_allclose(output.outputs.embedding, vector, rtol=2e-4, atol=1e-5)


def test_fewer_dimensions_are_the_first_ones_at_length_one(llm: LLM) -> None:
    whole, cut = (np.array(llm.embed("Hello", dimensions=d, use_tqdm=False)[0].outputs.embedding) for d in (None, 8))
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "options, says", [({"dimensions": 0}, "dimensions: got 0"), ({"pooling": "max"}, "pooling: got 'max'")]
)
def test_what_cannot_be_embedded_is_refused(llm: LLM, options: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.embed("Hello", use_tqdm=False, **options)  # type: ignore[arg-type]
