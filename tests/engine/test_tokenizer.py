"""Tokenizer: round trips, chat templates, a model folder's defaults, and the check of what is installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, PackageConflict, RequestError
from engine.imports import check_kernels_distribution
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer, default_sampling, prepare_params, prepare_prompt
from tests.made_tokenizers import byte_level, sentencepiece, tokenizers

TEXT = "Hello, my naïve 🙂 世界 file"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return tokenizers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_encode_and_decode_as_transformers_does(made: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = made[kind]
    ids = tokenizer.encode(TEXT)
    assert ids == tokenizer.hf(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == tokenizer.hf.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.decode_raw(ids) == tokenizer.hf.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == ids[1:]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_token_bytes_spell_the_text(made: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = made[kind]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == TEXT
    assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""
    halves = [tokenizer.token_text(i) for i in ids if len(tokenizer.token_bytes(i)) == 1 and i > 2]
    assert "\ufffd" in halves


def test_a_beginning_that_the_text_spells_is_not_added_again(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["byte_level"]
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("<s>Hello") == tokenizer.encode("Hello")
    assert tokenizer.encode("<s><s>Hello")[:3] == [bos, bos, tokenizer.encode("Hello")[1]]
    rendered = tokenizer.render_chat(USER)
    assert tokenizer.encode(rendered) == tokenizer.apply_chat_template(USER)
    without = Tokenizer(byte_level(add_bos=False))
    assert without.encode("Hello") == without.encode("Hello", add_special_tokens=False)


def test_chat_template_equals_transformers(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["byte_level"]
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    for prompt in (True, False):
        expected = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_chat_template_continues_the_final_message(made: dict[str, Tokenizer]) -> None:
    messages = [*USER, {"role": "assistant", "content": "I am"}]
    text = made["byte_level"].render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|assistant|>I am")
    with pytest.raises(RequestError, match="exclude each other"):
        made["byte_level"].render_chat(messages, continue_final_message=True)


def test_content_parts_are_joined(made: dict[str, Tokenizer]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = made["byte_level"].render_chat([{"role": "user", "content": parts}])
    assert text == made["byte_level"].render_chat([{"role": "user", "content": "a\nb"}])


def test_template_variables_and_tool_calls(made: dict[str, Tokenizer]) -> None:
    template = "{{ mood }}:{{ tools | length }}:{{ messages[0].tool_calls[0].function.arguments.city }}"
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    text = made["byte_level"].render_chat(messages, chat_template=template, mood="calm", tools=[{"type": "function"}])
    assert text == "calm:1:Bergen"
    assert isinstance(call["function"]["arguments"], str), "the caller's messages were changed"  # type: ignore[index]


@pytest.mark.parametrize(
    "messages, where",
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], r"messages\[0\]"),
        ([*USER, {"content": "x"}], r"messages\[1\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{"}}]}],
            r"messages\[0\].tool_calls\[0\].function.arguments",
        ),
    ],
)
def test_bad_messages_are_named(made: dict[str, Tokenizer], messages: Any, where: str) -> None:
    with pytest.raises(RequestError, match=where) as caught:
        made["byte_level"].render_chat(messages)
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize(
    "template, line, reason",
    [
        ("a\n{{ raise_exception('roles must alternate') }}", 2, "roles must alternate"),
        ("a\n\n{{ messages.nothing.here }}", 3, "nothing"),
        ("{% for %}", 1, "Expected"),
        ("{{ ''.__class__.__mro__ }}", 1, "unsafe"),
    ],
)
def test_a_failing_template_names_its_line(made: dict[str, Tokenizer], template: str, line: int, reason: str) -> None:
    with pytest.raises(RequestError, match=f"line {line}: .*{reason}") as caught:
        made["byte_level"].render_chat(USER, chat_template=template)
    assert caught.value.http_status == 400


def test_a_model_without_a_template_says_so() -> None:
    tokenizer = Tokenizer(byte_level(chat_template=None))
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.render_chat(USER, chat_template="{{ messages[0].content }}") == "Hello"


def test_reserved_template_arguments_are_refused(made: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="tokenize"):
        made["byte_level"].render_chat(USER, tokenize=True)


def test_load(folder: Path) -> None:
    tokenizer = Tokenizer.load(EngineConfig(model=str(folder)))
    assert tokenizer.render_chat(USER) == "<s><|user|>Hello</s><|assistant|>"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_load_with_another_template(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("[{{ messages[0].content }}]")
    for source in (str(file), "[{{ messages[0].content }}]"):
        tokenizer = Tokenizer.load(EngineConfig(model=str(folder), chat_template=source))
        assert tokenizer.render_chat(USER) == "[Hello]"


@pytest.mark.parametrize(
    "changes, key, reason",
    [
        ({"model": "/no/such/folder"}, "model", "no tokenizer"),
        ({"tokenizer": "/no/such/folder"}, "tokenizer", "no tokenizer"),
        ({"chat_template": "/no/such/file.jinja"}, "chat_template", "neither a readable file"),
        ({"chat_template": "ok\n{% endfor %}"}, "chat_template", "line 2"),
        ({"chat_template": "{{ x | no_such_filter }}"}, "chat_template", "line 1: No filter named"),
    ],
)
def test_load_names_the_key_at_fault(folder: Path, changes: dict[str, str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Tokenizer.load(EngineConfig(**{"model": str(folder), **changes}))
    assert caught.value.key == key


def test_a_template_that_refuses_one_message_still_loads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}ok"
    tokenizer = Tokenizer.load(EngineConfig(model=str(folder), chat_template=template))
    assert tokenizer.render_chat([{"role": "system", "content": ""}]) == "ok"
    assert "system first" in caplog.text


def test_default_sampling(folder: Path) -> None:
    config = EngineConfig(model=str(folder))
    assert default_sampling(config) == {}
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True, "bos_token_id": 0}))
    assert default_sampling(config) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    file.write_text(json.dumps({"temperature": 0.6, "do_sample": False, "max_new_tokens": 5, "min_p": None}))
    assert default_sampling(config) == {"temperature": 0.0, "max_tokens": 5}
    for broken in ("{", "[]", '{"top_p": 7}', '{"temperature": "hot"}'):
        file.write_text(broken)
        with pytest.raises(ConfigError, match="generation_config"):
            default_sampling(config)


def test_threads_share_a_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(EngineConfig(model=str(folder)))
    texts = [TEXT * (1 + i % 50) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(tokenizer.encode, texts))
        assert list(pool.map(tokenizer.decode, ids)) == texts


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bad_words_become_token_ids(make: Any) -> None:
    tokenizer = Tokenizer(make())
    params = prepare_params(SamplingParams(bad_words=("sea", "END of")), tokenizer, tokenizer.vocab_size)
    texts = {tokenizer.decode(ids) for ids in params.bad_words_token_ids}
    assert {text.strip() for text in texts} == {"sea", "END of"}
    assert () not in params.bad_words_token_ids
    spaced = tokenizer.encode(" sea", add_special_tokens=False)
    assert tuple(spaced) in params.bad_words_token_ids
    assert prepare_params(params, tokenizer, tokenizer.vocab_size) == params


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={400: 1.0}),
        SamplingParams(allowed_token_ids=(1, 401)),
        SamplingParams(stop_token_ids=(1000,)),
    ],
)
def test_ids_outside_the_vocabulary_are_named(made: dict[str, Tokenizer], params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="allowed: 0 to 399") as caught:
        prepare_params(params, made["byte_level"], 400)
    assert caught.value.param in ("logit_bias", "allowed_token_ids", "stop_token_ids")
    assert prepare_params(SamplingParams(stop_token_ids=(399,)), made["byte_level"], 400).stop_token_ids == (399,)


def test_prompts(made: dict[str, Tokenizer]) -> None:
    tokenizer, params = made["byte_level"], SamplingParams()
    assert prepare_prompt("Hello", params, tokenizer, 401) == tokenizer.encode("Hello")
    assert prepare_prompt((5, 6), params, None, 401) == [5, 6]
    ids = prepare_prompt(list(range(50)), SamplingParams(truncate_prompt_tokens=3), tokenizer, 401)
    assert ids == [47, 48, 49]
    for prompt, reason in [
        ([], "empty"),
        ([401], "token id 401 is outside the vocabulary, allowed: 0 to 400"),
        ([-1], "token id -1"),
        ([1.5], "integers"),
        ([True], "integers"),
    ]:
        with pytest.raises(RequestError, match=reason) as caught:
            prepare_prompt(prompt, params, tokenizer, 401)  # type: ignore[arg-type]
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="empty"):
        prepare_prompt("", params, Tokenizer(byte_level(add_bos=False)), 401)


def test_without_a_tokenizer_texts_are_refused() -> None:
    for params in (SamplingParams(stop="x"), SamplingParams(bad_words=("x",))):
        with pytest.raises(RequestError, match="no tokenizer"):
            prepare_params(params, None, 100)
    with pytest.raises(RequestError, match="no tokenizer"):
        prepare_prompt("Hello", SamplingParams(), None, 100)


def test_the_other_kernels_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels_distribution()
    metadata = tmp_path / "kernels-0.16.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(PackageConflict, match=r"'kernels' 0\.16\.0 is installed .* `pip uninstall kernels`"):
        Tokenizer.load(EngineConfig(model="anything"))


def test_our_kernels_package_has_no_version() -> None:
    """transformers imports `kernels` when it finds no metadata, and takes it for Hugging Face's if it has a version."""
    import kernels

    assert not hasattr(kernels, "__version__")
    assert Path(str(kernels.__file__)).read_text().strip() == ""


def test_importing_engine_is_light() -> None:
    code = (
        "import sys, engine; heavy = {'torch', 'ray', 'transformers', 'tokenizers', 'pydantic'};"
        "print(heavy & set(sys.modules));"
        "from engine import SamplingParams; print({'torch'} & set(sys.modules));"
        "import engine.tokenizer, engine.output; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, timeout=250, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.stdout.split() == [b"set()"] * 3
