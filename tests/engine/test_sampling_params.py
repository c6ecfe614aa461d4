"""SamplingParams: what is accepted, what is refused and how the refusal reads; and that it survives the wire."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest

from engine.errors import RequestError
from engine.grammar import Grammar
from engine.sampling_params import BeamSearchParams, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert not params.greedy and not params.needs_logprobs and params.num_sequences == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0),
        ("n", -1),
        ("n", 1.0),
        ("n", True),
        ("n", 129),
        ("n", "2"),
        ("best_of", 0),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("seed", 2**64),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 7),
        ("bad_words", 7),
        ("bad_words", [""]),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [1]),
        ("stop", ""),
        ("stop", ["a"] * 65),
        ("stop", "x" * 1_000_000),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", [None]),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", "yes"),
        ("skip_special_tokens", None),
        ("spaces_between_special_tokens", 3),
        ("detokenize", 0),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("truncate_prompt_tokens", 0),
        ("priority", 2**40),
        ("use_beam_search", 1),
        ("length_penalty", "1"),
        ("length_penalty", 11),
        ("length_penalty", float("nan")),
        ("early_stopping", "always"),
        ("early_stopping", 1),
        ("early_stopping", None),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field and caught.value.http_status == 400
    assert len(str(caught.value)) < 400, "a million characters of input are not repeated"


@pytest.mark.parametrize(
    "arguments, param",
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": "x", "detokenize": False}, "stop"),
    ],
)
def test_contradictions_are_named(arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**arguments)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "field, value",
    [
        ("logit_bias", {1: 2}),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("watermark", True),
        ("prompt_logprobs", 0),
        ("grammar", Grammar("regex", "a")),
    ],
)
def test_what_a_beam_search_does_not_go_with_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match="use_beam_search: not together with ") as caught:
        SamplingParams(use_beam_search=True, n=2, **{field: value})
    assert caught.value.param == "use_beam_search"
    assert field in str(caught.value) or field == "grammar"
    SamplingParams(use_beam_search=True, n=2, temperature=0, top_k=3, top_p=0.5, seed=1, min_tokens=2, stop="x")
    SamplingParams(use_beam_search=True, presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.1)


@pytest.mark.parametrize(
    "arguments, param",
    [
        ({"beam_width": 0, "max_tokens": 5}, "beam_width"),
        ({"beam_width": 2.0, "max_tokens": 5}, "beam_width"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens"),
        ({"beam_width": 2, "max_tokens": 5, "length_penalty": "1"}, "length_penalty"),
        ({"beam_width": 2, "max_tokens": 5, "early_stopping": "maybe"}, "early_stopping"),
    ],
)
def test_beam_search_params_are_checked_too(arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        BeamSearchParams(**arguments)
    assert caught.value.param == param


def test_shapes_are_made_uniform() -> None:
    params = SamplingParams(
        stop="END", stop_token_ids=[2, 3], logit_bias={"5": 1}, bad_words=["x"], allowed_token_ids={7}
    )
    assert params.stop == ("END",) and params.stop_token_ids == (2, 3) and params.logit_bias == {5: 1.0}
    assert params.bad_words == ("x",) and params.allowed_token_ids == (7,)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(max_tokens=None, min_tokens=99).max_tokens is None


def test_derived_facts() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(n=2, best_of=4).num_sequences == 4 and SamplingParams(n=2, best_of=4).needs_logprobs
    assert SamplingParams(n=2, temperature=0).num_sequences == 2, "equal ones"
    beams = SamplingParams(n=2, best_of=4, use_beam_search=True, stop_token_ids=(7,))
    assert (beams.num_sequences, beams.beam_width, beams.num_logprobs) == (2, 4, 5) and beams.needs_logprobs
    assert beams.replace(logprobs=9).num_logprobs == 9
    assert not SamplingParams(n=4).needs_logprobs and SamplingParams(logprobs=0).needs_logprobs


def test_a_changed_copy_is_checked() -> None:
    params = SamplingParams(stop="x", seed=3)
    assert params.replace(top_k=5) == SamplingParams(stop="x", seed=3, top_k=5)
    with pytest.raises(RequestError, match="top_k"):
        params.replace(top_k=-5)
    with pytest.raises(AttributeError):
        params.top_k = 5  # type: ignore[misc]


def test_it_survives_the_wire() -> None:
    params = SamplingParams(
        n=2, best_of=3, temperature=0.5, seed=-1, stop=["a", "b"], logit_bias={3: -1.5}, bad_words_token_ids=((1, 2),)
    )
    for copy in (
        msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams),
        msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams),
        pickle.loads(pickle.dumps(params)),
    ):
        assert copy == params
    assert len(msgspec.msgpack.encode(SamplingParams())) <= 3, "defaults are not sent"
