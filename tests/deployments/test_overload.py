"""Overload over HTTP: refused at once with when to come back, deadlines, tenants, API keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.driver import Driver
from cluster.driver_client import DriverClient
from deployments.caller import KEYS_VARIABLE, ApiKeys, Caller
from deployments.config import AppConfig
from deployments.http.asgi import ROUTES, create_app
from deployments.service import ModelService
from engine.errors import ConfigError, RequestError
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer
from tests.fakes import HashExecutor

TEXT: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
LONG = {**TEXT, "max_tokens": 200}


class Frozen(HashExecutor):
    """Ranks whose steps end when they are told to."""

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config.engine, 128, lazy=True)

    def restart(self) -> CacheCapacity:
        raise AssertionError("nothing fails here")


class Site:
    """The application in this process over frozen ranks, with clients that need no socket."""

    def __init__(self, config: AppConfig) -> None:
        self.executor = Frozen(config)
        model = ModelConfig.load(config)
        self.driver = Driver("overload", config.engine, self.executor, vocab_size=97, eos_token_ids=(1,))
        self.driver.start()
        self.service = ModelService(config, Tokenizer.load(config), vocab_size=model.vocab_size, sampling_defaults={})
        transport = httpx.ASGITransport(create_app(self.service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://site", timeout=200)

    async def __aenter__(self) -> Site:
        self.client = await DriverClient.connect(self.driver.ticket, on_outputs=self.service.deliver)
        self.service.attach(self.client)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.http.aclose()
        await self.client.close()
        await asyncio.to_thread(self.driver.stop)

    def ask(self, path: str = "/v1/completions", headers: Any = None, **body: Any) -> asyncio.Task[httpx.Response]:
        return asyncio.ensure_future(self.http.post(path, json=body, headers=headers))

    async def waiting(self, count: int) -> None:
        async with asyncio.timeout(100):
            while self.service.num_waiting != count:
                await asyncio.sleep(0.001)

    async def idle(self) -> dict[str, Any]:
        async with asyncio.timeout(100):
            while True:
                stats = await self.service.stats()
                if not (stats["used_blocks"] or stats["waiting"] or stats["running"]):
                    return stats

    def thaw(self) -> None:
        self.executor.thaw()


def test_past_the_bound_it_is_429_at_once(config: AppConfig) -> None:
    async def main() -> None:
        async with Site(config.replace(max_waiting_requests=6, max_waiting_tokens=1000)) as site:
            held = [site.ask(**TEXT) for _ in range(6)]
            await site.waiting(6)
            for path, body in [  # each is answered while nothing moves
                ("/v1/completions", TEXT),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
                ("/generate", {"inputs": "Hi"}),
                ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "tiny"}),
            ]:
                answer = await site.ask(path, **body)
                assert answer.status_code == 429, (path, answer.text)
                assert int(answer.headers["retry-after"]) >= 1
                error = answer.json()
                assert "6 requests" in str(error)
                if path == "/generate":
                    assert error["error_type"] == "overloaded"
                elif path == "/v1/messages":
                    assert error["error"]["type"] == "rate_limit_error"
                else:
                    assert error["error"]["type"] == "rate_limit_error"
            assert (await site.http.get("/health")).status_code == 200, "a busy engine is not unhealthy"
            site.thaw()
            assert [(await task).status_code for task in held] == [200] * 6
            assert (await site.ask(**TEXT)).status_code == 200
            await site.idle()

    asyncio.run(main())


def test_the_bound_in_tokens_and_a_tenant_with_less_than_its_share(config: AppConfig) -> None:
    async def main() -> None:
        async with Site(config.replace(max_waiting_requests=100, max_waiting_tokens=60)) as site:
            held = [site.ask(**TEXT, user="flood") for _ in range(20)]
            await site.waiting(20)
            refused = await site.ask(**TEXT, user="flood")
            assert refused.status_code == 429
            assert "at most 60 tokens may" in refused.json()["error"]["message"]
            held.append(site.ask(**TEXT, user="small"))
            held.append(site.ask(**TEXT, headers={"x-manta-tenant": "third"}))
            await site.waiting(22)
            assert {g.request.tenant for g in site.driver.engine.groups()} <= {"flood", "small", "third"}
            site.thaw()
            assert [(await task).status_code for task in held] == [200] * 22
            await site.idle()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["body", "header", "config"])
def test_a_deadline_ends_what_waits_and_what_runs(config: AppConfig, place: str, stream: bool) -> None:
    async def main() -> None:
        changed = config.replace(max_num_seqs=1, request_timeout_s=0.05 if place == "config" else None)
        async with Site(changed) as site:
            body = {**LONG, "stream": stream, **({"timeout": 0.05} if place == "body" else {})}
            headers = {"x-request-timeout": "0.05"} if place == "header" else None
            tasks = [site.ask(headers=headers, **body) for _ in range(3)]  # one runs, two wait
            for task in tasks:
                answer = await task
                assert answer.status_code == 504, answer.text
                assert answer.json()["error"]["type"] == "timeout_error"
                assert "within 0.05 s" in answer.json()["error"]["message"]
            site.thaw()
            await site.idle()
            assert site.service.num_waiting == site.service.num_unfinished == 0

    asyncio.run(main())


def test_a_deadline_frees_the_blocks_of_a_stream_that_nobody_reads(config: AppConfig) -> None:
    async def main() -> None:
        async with Site(config) as site:
            params = site.service.sampling_params({"max_tokens": 240, "ignore_eos": True})
            generation = site.service.generate([5, 6, 7], params, timeout_s=0.05)
            async with asyncio.timeout(100):
                while site.service.num_unfinished:
                    await asyncio.sleep(0.001)
            await site.idle()
            assert generation.result is None

    asyncio.run(main())


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_bad_deadline_is_the_clients_fault(config: AppConfig, value: str) -> None:
    async def main() -> None:
        async with Site(config) as site:
            answer = await site.ask(headers={"x-request-timeout": value}, **TEXT)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "x-request-timeout"

    asyncio.run(main())


def test_ten_thousand_cancels_leak_nothing(config: AppConfig) -> None:
    """Clients that go away at every stage: before the engine knows, while they wait, run, and stream."""

    async def main() -> None:
        async with Site(config.replace(max_waiting_requests=500)) as site:
            site.thaw()
            params = site.service.sampling_params({"max_tokens": 30, "ignore_eos": True, "n": 2, "temperature": 1.0})

            async def one(number: int) -> None:
                service = site.service.seen_by(Caller(f"tenant{number % 7}"))
                async with service.generate([5, 6, 7 + number % 50], params) as generation:
                    async for _ in generation:
                        pass

            for first in range(0, 10_000, 100):
                tasks = [asyncio.ensure_future(one(number)) for number in range(first, first + 100)]
                for turn in range(4):
                    for task in tasks[turn::4]:
                        task.cancel()
                    await site.service.stats()
                await asyncio.wait(tasks)
            stats = await site.idle()
            assert stats["free_blocks"] == stats["num_blocks"]
            assert site.service.num_unfinished == site.service.num_waiting == 0
            assert not site.driver.loop._live
            assert site.driver.engine.scheduler.shares.num_active == 0

    asyncio.run(main())


# API keys.


@pytest.fixture
def locked(config: AppConfig, tmp_path: Path) -> AppConfig:
    path = tmp_path / "keys"
    path.write_text("# who may\nalice = sk-alice-0123\nbob=sk-bob\n\nsk-nameless\n")
    return config.replace(api_keys_file=str(path))


def test_no_key_no_answer_in_every_dialect(locked: AppConfig) -> None:
    async def main() -> None:
        async with Site(locked) as site:
            site.thaw()
            chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "tiny"}
            for path, body in [("/v1/completions", TEXT), ("/v1/messages", chat), ("/generate", {"inputs": "Hi"})]:
                for headers in ({}, {"authorization": "Bearer sk-alice"}, {"authorization": "Basic %%"}):
                    answer = await site.ask(path, headers=headers, **body)
                    assert answer.status_code == 401, answer.text
                    assert "Bearer" in answer.headers["www-authenticate"]
                    assert "an API key that is known here is needed" in answer.text
            answer = await site.ask(**TEXT)
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.json()["error"]["code"] == "invalid_api_key"
            answer = await site.ask("/v1/messages", **chat)
            assert answer.json()["error"]["type"] == "authentication_error"
            answer = await site.ask("/generate", inputs="Hi")
            assert answer.json()["error_type"] == "unauthorized"
            assert answer.json()["error"].startswith("an API key")
            for path in ("/stats", "/metrics", "/engine/state", "/v1/models", "/info"):
                assert (await site.http.get(path)).status_code == 401, path
            for path in ("/health", "/ready"):
                assert (await site.http.get(path)).status_code == 200, path

    asyncio.run(main())


OPEN = {"/health", "/ready", "/version", "/", "/engine", "/docs", "/openapi.json", "/web/{name}"}
"""Routes that tell nothing of the model's requests: what one of them is goes by GET and without a key."""


def test_every_route_wants_a_key_but_those_that_tell_nothing(locked: AppConfig) -> None:
    async def main() -> None:
        async with Site(locked) as site:
            answers = {}
            for route in ROUTES:
                for method in sorted((route.methods or set()) - {"HEAD"}):
                    path = route.path.replace("{id}", "resp_1").replace("{name:path}", "tiny").replace("{name}", "tiny")
                    if method == "GET" and route.path in OPEN:
                        continue
                    answer = await site.http.request(method, path, content=b"{}")
                    answers[method, route.path] = answer.status_code
            assert len(answers) > 10
            assert {key: status for key, status in answers.items() if status != 401} == {}

    asyncio.run(main())


def test_a_key_opens_and_names_the_tenant(locked: AppConfig) -> None:
    async def main() -> None:
        async with Site(locked) as site:
            basic = {"authorization": "Basic YW55OnNrLWJvYg=="}  # any:sk-bob
            tasks = [
                site.ask(headers={"authorization": "Bearer sk-alice-0123"}, user="bob", **TEXT),
                site.ask(headers={"x-api-key": "sk-bob"}, **TEXT),
                site.ask(headers=basic, **TEXT),
                site.ask(headers={"authorization": "Bearer sk-nameless", "x-manta-tenant": "alice"}, **TEXT),
            ]
            await site.waiting(4)
            await site.service.stats()
            tenants = sorted(group.request.tenant for group in site.driver.engine.groups())
            assert tenants[:3] == ["alice", "bob", "bob"] and tenants[3].startswith("key-")
            site.thaw()
            assert [(await task).status_code for task in tasks] == [200] * 4

    asyncio.run(main())


def test_every_dialect_names_its_tenant(config: AppConfig) -> None:
    """Where no key does: OpenAI's user and safety_identifier, Anthropic's metadata."""

    async def main() -> None:
        async with Site(config) as site:
            chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "tiny"}
            tasks = [
                site.ask(user="completion", **TEXT),
                site.ask("/v1/chat/completions", user="old", safety_identifier="chat", **chat),
                site.ask("/v1/responses", input="Hi", max_output_tokens=4, user="response"),
                site.ask("/v1/responses", input="Hi", max_output_tokens=4, safety_identifier="safe"),
                site.ask("/v1/messages", metadata={"user_id": "message"}, **chat),
                site.ask("/generate", {"x-manta-tenant": "generate"}, inputs="Hi", parameters={"max_new_tokens": 4}),
            ]
            await site.waiting(6)
            await site.service.stats()
            tenants = {group.request.tenant for group in site.driver.engine.groups()}
            assert tenants == {"completion", "chat", "response", "safe", "message", "generate"}
            site.thaw()
            assert [(await task).status_code for task in tasks] == [200] * 6
            answer = await site.ask("/v1/messages", metadata={"user_id": 5}, **chat)
            assert answer.status_code == 200

    asyncio.run(main())


def test_kept_responses_are_their_key_holders(locked: AppConfig) -> None:
    async def main() -> None:
        async with Site(locked) as site:
            site.thaw()
            alice, bob = {"x-api-key": "sk-alice-0123", "x-request-id": "same"}, {"x-api-key": "sk-bob"}
            made = await site.ask("/v1/responses", alice, input="Hi", max_output_tokens=4, user="bob")
            path = f"/v1/responses/{made.json()['id']}"
            assert (await site.http.get(path, headers=alice)).status_code == 200
            assert (await site.http.get(path, headers=bob)).status_code == 404
            assert (await site.http.delete(path, headers=bob)).status_code == 404
            body = {"input": "And?", "max_output_tokens": 4, "previous_response_id": made.json()["id"]}
            answer = await site.ask("/v1/responses", bob, **body)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "previous_response_not_found"
            assert (await site.ask("/v1/responses", {**bob, "x-request-id": "same"}, input="Hi")).status_code == 200
            assert (await site.http.get(path, headers=alice)).json() == made.json(), "an equal id of another's"
            answer = await site.ask("/v1/responses", alice, **body)
            assert answer.status_code != 404, "found; these ranks know but few tokens"

    asyncio.run(main())


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "carol=one, two ,three==")
    keys = ApiKeys.load(None)
    assert len(keys) == 3
    assert keys.holder("one") == "carol"
    assert keys.holder("two") is not None and keys.holder("three==") is not None
    assert keys.holder("") is None and keys.holder("ﬂ") is None
    monkeypatch.delenv(KEYS_VARIABLE)
    assert not len(ApiKeys.load(None))
    (tmp_path / "empty").write_text("# nobody\n")
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path):
        with pytest.raises(ConfigError) as caught:
            ApiKeys.load(str(path))
        assert caught.value.key == "api_keys_file"


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No early end: the time tells nothing about which key was shown."""
    keys = ApiKeys({name: f"key {name}" for name in "abcdef"})
    compared: list[bytes] = []
    monkeypatch.setattr("deployments.caller.hmac.compare_digest", lambda a, b: bool(compared.append(b)) or a == b)
    for given in ("key a", "key f", "none of them"):
        compared.clear()
        keys.holder(given)
        assert len(compared) == 6


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", None, [1]])
def test_a_caller_waits_a_while_or_is_told(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        Caller().wait(value, "timeout")
    assert caught.value.param == "timeout"
