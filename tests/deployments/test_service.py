"""ModelService: requests outlive their engine, ids are unique, what is given up is aborted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.driver import Driver
from cluster.driver_client import DriverClient
from deployments.config import AppConfig
from deployments.service import ModelService
from engine.errors import EngineUnavailable, PromptTooLong, RequestError, ResourcesMissing
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

PARAMS = SamplingParams(n=2, temperature=1.5, seed=11, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def other_driver(config: AppConfig) -> Iterator[Driver]:
    model_config = ModelConfig.load(config)
    driver = Driver(
        "other",
        config.engine,
        LocalExecutor(config.engine, model_config),
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    driver.start()
    yield driver
    driver.stop()


@pytest.fixture
def service(config: AppConfig) -> ModelService:
    tokenizer = Tokenizer.load(config)
    return ModelService(config, tokenizer, vocab_size=ModelConfig.load(config).vocab_size, sampling_defaults={})


async def connect(service: ModelService, driver: Driver) -> DriverClient:
    client = await DriverClient.connect(driver.ticket, on_outputs=service.deliver)
    service.attach(client)
    return client


def test_requests_go_on_with_another_engine(server: Any, other_driver: Driver, service: ModelService) -> None:
    """In the middle of its tokens a request loses its engine and ends on another with the tokens it would have had."""

    async def run(lose_after: int | None) -> tuple[list[str], list[list[int]]]:
        """Loses it after so many steps, each of which draws a token for both samples."""
        if lose_after is not None:
            metered.enter_context(server.steps(lose_after))
        client = await connect(service, server.driver)
        prompt = await service.encode_prompt("Tell me a story", PARAMS)
        pieces = ["", ""]
        seen = 0
        async with service.generate(prompt, PARAMS) as generation:
            async for deltas in generation:
                for delta in deltas:
                    pieces[delta.index] += delta.text
                    seen += len(delta.token_ids)
                if lose_after is not None and seen == 2 * lose_after:
                    lose_after = None
                    await client.close()
                    service.detach()
                    with pytest.raises(EngineUnavailable):
                        service.generate(prompt, PARAMS)
                    client = await connect(service, other_driver)
                    assert service.resume() == 1
        await client.close()
        assert generation.result is not None
        assert [output.text for output in generation.result.outputs] == pieces
        return pieces, [output.token_ids for output in generation.result.outputs]

    undisturbed = asyncio.run(run(None))
    assert [len(ids) for ids in undisturbed[1]] == [60, 60]
    for lose_after in (1, 17, 51):
        with ExitStack() as metered:
            assert asyncio.run(run(lose_after)) == undisturbed


def test_a_beam_search_begins_anew_on_another_engine(server: Any, other_driver: Driver, service: ModelService) -> None:
    """Nothing of it was told when its engine went."""
    params = SamplingParams(n=2, best_of=6, use_beam_search=True, max_tokens=60, ignore_eos=True)

    async def run(*, lose: bool) -> list[list[int]]:
        client = await connect(service, server.driver)
        before = (await client.stats())["generated_tokens"]
        async with service.generate([5, 6, 7], params) as generation:
            if lose:
                while (await client.stats())["generated_tokens"] < before + 30:
                    pass
                await client.close()
                service.detach()
                client = await connect(service, other_driver)
                assert service.resume() == 1
            result = await generation.finish()
        await client.close()
        return [output.token_ids for output in result.outputs]

    undisturbed = asyncio.run(run(lose=False))
    assert [len(ids) for ids in undisturbed] == [60, 60]
    with server.steps(12):
        assert asyncio.run(run(lose=True)) == undisturbed
    server.wait_idle()


@pytest.mark.parametrize("prompts", [["a " * 9000], ["a b c "] * 3000, [[5] * 9000], [[5, 6]] * 5000], ids=len)
def test_streams_go_on_while_much_is_tokenized(service: ModelService, prompts: list[Any]) -> None:
    """A long text, or many short ones in a call, leave the event loop to others."""

    async def main() -> list[list[int]]:
        encoding = asyncio.ensure_future(service.encode_prompts(prompts, PARAMS))
        await asyncio.sleep(0)  # it has begun; on this thread it would have ended, too
        assert not encoding.done()
        return await encoding

    alone = [asyncio.run(service.encode_prompt(prompt[:100], PARAMS)) for prompt in prompts[:3]]
    ids = asyncio.run(main())
    assert len(ids) == len(prompts)
    assert [one[:40] for one in ids[:3]] == [one[:40] for one in alone]


def test_an_engine_that_is_gone_for_good(server: Any, service: ModelService) -> None:
    async def main() -> None:
        client = await connect(service, server.driver)
        generation = service.generate([5, 6, 7], PARAMS)
        service.fail("no GPU is left")
        with pytest.raises(EngineUnavailable, match="no GPU is left"):
            await generation.finish()
        with pytest.raises(EngineUnavailable, match="no GPU is left"):
            service.generate([5, 6, 7], PARAMS)
        health = await service.health()
        assert (health.state, health.live) == ("failed", False)
        generation.release()
        assert service.num_unfinished == 0
        await client.close()

    asyncio.run(main())


def test_what_the_cluster_lacks_is_told(server: Any, other_driver: Driver, service: ModelService) -> None:
    """Red, and refused, while resources are missing; what has tokens already waits for them."""

    async def main() -> None:
        client = await connect(service, server.driver)
        running = service.generate([5, 6, 7], PARAMS)
        await anext(running)
        waiting = service.generate([5, 6, 7], PARAMS)
        await client.close()
        service.detach()
        service.lacks("waiting for resources: needs 1 GPU")
        health = await service.health()
        assert (health.state, health.live, health.healthy) == ("recovering", True, False)
        assert "needs 1 GPU" in health.waiting_for
        for refused in (waiting.finish, lambda: asyncio.to_thread(service.generate, [5, 6, 7], PARAMS)):
            with pytest.raises(ResourcesMissing, match="needs 1 GPU") as caught:
                await refused()
            assert caught.value.retry_after_s > 1
        waiting.release()
        service.lacks("")
        assert (await service.health()).healthy
        client = await connect(service, other_driver)
        assert service.resume() == 1
        assert len((await running.finish()).outputs[0].token_ids) == 60
        running.release()
        await client.close()

    with server.steps(3):
        asyncio.run(main())


def test_ids_in_use_get_a_suffix(server: Any, service: ModelService) -> None:
    async def main() -> None:
        client = await connect(service, server.driver)
        a = service.generate([5, 6, 7], PARAMS, request_id="same")
        b = service.generate([5, 6, 7], PARAMS, request_id="same")
        assert a.request_id == "same"
        assert b.request_id.startswith("same-")
        first, second = await asyncio.gather(a.finish(), b.finish())
        assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
        a.release()
        b.release()
        assert service.num_unfinished == 0
        await client.close()

    asyncio.run(main())


def test_no_prompt_runs_when_one_is_at_fault(server: Any, service: ModelService) -> None:
    async def main() -> None:
        client = await connect(service, server.driver)
        with pytest.raises(PromptTooLong):
            service.start_batch([[5, 6], [7] * 300], PARAMS, request_id="x")
        assert service.num_unfinished == 0
        await client.close()

    asyncio.run(main())
    server.wait_idle()


def test_sampling_defaults(service: ModelService) -> None:
    """The request's own, then the model's, then the route's."""
    service.sampling_defaults = {"temperature": 0.5, "top_p": 0.9}
    params = service.sampling_params({"top_p": 0.7}, max_tokens=5)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.7, 5)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        service.sampling_params({"stop_token_ids": [99999]})
