"""OutputProcessor: texts, stops, best_of and what is told to the engine, whatever the batches look like."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.output import OutputDelta, OutputProcessor, ProcessedOutputs, RequestOutput
from engine.request import Request, SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.step import unpack
from engine.tokenizer import Tokenizer
from tests.made_tokenizers import byte_level

TOKENIZER = Tokenizer(byte_level())
PROMPT = TOKENIZER.encode("The ray")
EOS = 1


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def letters(text: str) -> list[int]:
    """One token a byte, so that anything lies across a border."""
    single = {TOKENIZER.token_bytes(i): i for i in reversed(range(TOKENIZER.vocab_size))}
    return [single[bytes([b])] for b in text.encode()]


def run(
    params: SamplingParams,
    batches: list[list[int]],
    finish_reason: str | None = "length",
    stop_reason: int | None = None,
) -> tuple[ProcessedOutputs, RequestOutput | None]:
    """One sample, its tokens in batches, the last of which carries the finish reason."""
    processor, all_of_it = OutputProcessor(TOKENIZER), ProcessedOutputs()
    processor.add(Request.create("r", PROMPT, params), "The ray")
    for i, token_ids in enumerate(batches):
        last = i == len(batches) - 1
        output = SequenceOutput(
            "r", 0, token_ids, finish_reason if last else None, stop_reason if last else None, num_cached_tokens=2
        )
        processed = processor.process([output])
        all_of_it.deltas += processed.deltas
        all_of_it.aborts += processed.aborts
        all_of_it.finished += processed.finished
    return all_of_it, all_of_it.finished[0] if all_of_it.finished else None


def test_deltas_add_up_to_the_result() -> None:
    ids = ids_of(" glides over the 🙂 sea, naïve")
    processed, result = run(SamplingParams(max_tokens=100), [[i] for i in ids])
    assert result is not None
    assert "".join(delta.text for delta in processed.deltas) == result.outputs[0].text == TOKENIZER.decode(ids)
    assert [i for delta in processed.deltas for i in delta.token_ids] == result.outputs[0].token_ids == ids
    assert result.prompt == "The ray" and result.prompt_token_ids == PROMPT and result.finished
    assert (result.num_cached_tokens, result.num_completion_tokens) == (2, len(ids))
    assert [delta.finish_reason for delta in processed.deltas] == [None] * (len(ids) - 1) + ["length"]
    assert processed.aborts == []


def test_the_stop_token_gives_no_text() -> None:
    sea = ids_of(" sea")
    _, result = run(SamplingParams(), [ids_of(" the"), [*sea, EOS]], "stop")
    assert result is not None
    assert result.outputs[0].text == " the sea"
    assert result.outputs[0].token_ids[-1] == EOS
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", None)
    for include, text in ((False, " the"), (True, " the sea")):
        params = SamplingParams(stop_token_ids=sea, include_stop_str_in_output=include)
        _, result = run(params, [ids_of(" the"), sea], "stop", sea[-1])
        assert result is not None
        assert (result.outputs[0].text, result.outputs[0].stop_reason) == (text, sea[-1])


def test_special_tokens_are_shown_when_asked() -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    _, result = run(params, [[2], [*ids_of("x"), EOS]], "stop")
    assert result is not None and result.outputs[0].text == "<|user|>x</s>"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("text, stop", [("xyENDz", "END"), ("a🙂b", "🙂"), ("aab", "ab"), ("ENENDD", "END")])
def test_stop_strings_across_token_borders(text: str, stop: str, include: bool) -> None:
    ids = letters(text)
    params = SamplingParams(stop=["never", stop], include_stop_str_in_output=include, max_tokens=50)
    processed, result = run(params, [[i] for i in ids], None)
    assert result is not None
    end = text.index(stop) + len(stop)
    expected = text[: end if include else text.index(stop)]
    assert "".join(delta.text for delta in processed.deltas) == result.outputs[0].text == expected
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", stop)
    assert processed.aborts == [("r", 0)]
    assert result.outputs[0].token_ids == letters(text[:end]), "tokens after the stop string are discarded"


def test_a_stop_string_inside_one_batch_discards_the_tokens_after_it() -> None:
    processed, result = run(SamplingParams(stop="b"), [letters("abcd")], "length")
    assert result is not None
    assert (result.outputs[0].text, result.outputs[0].token_ids) == ("a", letters("ab"))
    assert result.outputs[0].finish_reason == "stop"
    assert processed.aborts == [], "the engine had finished it already"


def test_only_the_possible_beginning_of_a_stop_string_is_held_back() -> None:
    processed, result = run(SamplingParams(stop="END"), [[i] for i in letters("aEbENc")])
    assert [delta.text for delta in processed.deltas] == ["a", "", "Eb", "", "", "ENc"]
    assert result is not None and result.outputs[0].text == "aEbENc"
    processed, result = run(SamplingParams(stop="END"), [[i] for i in letters("aEN")])
    assert result is not None and result.outputs[0].text == "aEN", "held text is let go at the end"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    _, result = run(SamplingParams(stop="b", min_tokens=3), [[i] for i in letters("abbab")], None)
    assert result is not None and result.outputs[0].text == "abba"


@given(
    text=st.text("abE🙂", max_size=20),
    stops=st.lists(st.text("abE🙂", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
@settings(max_examples=500, deadline=None)
def test_batches_make_no_difference(text: str, stops: list[str], sizes: list[int]) -> None:
    """Tokens one by one or several at once: the same text, tokens and reason; no stop string ever slips out."""
    ids = letters(text) or letters("a")
    params = SamplingParams(stop=stops, max_tokens=200)
    _, single = run(params, [[i] for i in ids])
    batches, start = [], 0
    while start < len(ids):
        size = sizes[len(batches) % len(sizes)]
        batches.append(ids[start : start + size])
        start += size
    processed, batched = run(params, batches)
    assert single is not None and batched is not None
    assert single.outputs == batched.outputs
    streamed = "".join(delta.text for delta in processed.deltas)
    assert streamed == batched.outputs[0].text
    assert not any(stop in streamed for stop in stops)
    assert text.startswith(streamed) or streamed == "a"


def entry(logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(logprob, 2, [i for i, _ in top], [value for _, value in top])


def test_logprobs_have_texts_and_the_token_itself_first() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams(logprobs=2, prompt_logprobs=1)))
    a, b, c = letters("abc")
    prompt_entries = [None, *[entry(-3.0, (a, -0.1)) for _ in PROMPT[1:]]]
    tops = ((b, -0.5), (c, -2.0))
    first = SequenceOutput("r", 0, [a], logprobs=[entry(-4.0, *tops)], prompt_logprobs=prompt_entries)
    last = SequenceOutput("r", 0, [b], "length", logprobs=[entry(-0.5, *tops)])
    deltas = [*processor.process([first]).deltas]
    processed = processor.process([last])
    deltas += processed.deltas
    sample = processed.finished[0].outputs[0]
    assert sample.logprobs is not None and deltas[0].logprobs is not None
    assert [*deltas[0].logprobs, *(deltas[1].logprobs or [])] == sample.logprobs
    assert [(i, p.logprob, p.rank, p.decoded_token) for i, p in sample.logprobs[0].items()] == [
        (a, -4.0, 2, "a"),
        (b, -0.5, 1, "b"),
        (c, -2.0, 2, "c"),
    ]
    assert list(sample.logprobs[1]) == [b, c]
    assert sample.cumulative_logprob == pytest.approx(-4.5)
    prompt_logprobs = processed.finished[0].prompt_logprobs
    assert prompt_logprobs is not None and len(prompt_logprobs) == len(PROMPT) and prompt_logprobs[0] is None
    assert prompt_logprobs[1] is not None and list(prompt_logprobs[1]) == [PROMPT[1], a]


def test_logprobs_end_with_the_tokens_at_a_stop_string() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams(logprobs=0, stop="b")))
    output = SequenceOutput("r", 0, letters("abc"), logprobs=[entry(-1.0), entry(-2.0), entry(-4.0)])
    sample = processor.process([output]).finished[0].outputs[0]
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids) == 2
    assert sample.cumulative_logprob == pytest.approx(-3.0)


def test_samples_finish_one_by_one() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams(n=2, stop="b")))
    processed = processor.process([SequenceOutput("r", 1, letters("ab")), SequenceOutput("r", 0, letters("x"))])
    assert processed.aborts == [("r", 1)] and processed.finished == []
    assert [(delta.index, delta.finish_reason) for delta in processed.deltas] == [(1, "stop"), (0, None)]
    late = [SequenceOutput("r", 1, letters("c")), SequenceOutput("r", 1, [], "abort")]
    assert processor.process(late).deltas == [], "what was drawn past the stop is thrown away"
    finished = processor.process([SequenceOutput("r", 0, letters("y"), "length")]).finished
    assert [(o.index, o.text, o.finish_reason) for o in finished[0].outputs] == [(0, "xy", "length"), (1, "a", "stop")]
    assert "r" not in processor and len(processor) == 0


def test_best_of_returns_the_best_mean() -> None:
    """A long sample is not worse for being long; a failed one comes last."""
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams(n=2, best_of=4, max_tokens=9)))
    samples = {0: (-1.0, "a", "length"), 1: (-0.2, "bbbbbbbb", "stop"), 2: (-0.1, "c", "error"), 3: (-0.5, "d", "stop")}
    deltas: list[OutputDelta] = []
    processed = ProcessedOutputs()
    for index, (logprob, text, reason) in samples.items():
        ids = [*letters(text), *([EOS] if reason == "stop" else [])]
        output = SequenceOutput("r", index, ids, reason, logprobs=[entry(logprob)] * len(ids), error="broke")
        processed = processor.process([output])
        deltas += processed.deltas
    (result,) = processed.finished
    assert [(o.index, o.text, o.logprobs) for o in result.outputs] == [(0, "bbbbbbbb", None), (1, "d", None)]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in deltas] == [
        (0, "bbbbbbbb", "stop"),
        (1, "d", "stop"),
    ]
    assert result.num_completion_tokens == 1 + 9 + 1 + 2


def test_errors_are_told() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams()))
    processed = processor.process([SequenceOutput("r", 0, [], "error", error="rank 1 died")])
    assert (processed.deltas[0].error, processed.finished[0].error) == ("rank 1 died", "rank 1 died")
    assert processed.finished[0].outputs[0].finish_reason == "error"


def test_unknown_and_discarded_requests_are_ignored() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams()))
    processor.discard("r")
    processor.discard("never seen")
    processed = processor.process([SequenceOutput("r", 0, letters("a")), SequenceOutput("x", 0, letters("a"))])
    assert processed == ProcessedOutputs()


def test_a_request_goes_on_elsewhere_with_its_tokens() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(Request.create("r", PROMPT, SamplingParams(n=2, seed=3, stop="z")))
    processor.process([SequenceOutput("r", 0, letters("ab")), SequenceOutput("r", 1, letters("cz"))])
    request = processor.resumed("r")
    assert request is not None and request.seed == 3
    assert [unpack(tokens).tolist() for tokens in request.resume] == [letters("ab"), letters("cz")]
    assert processor.resumed("x") is None
    # The new engine knows nothing of stop strings: it is told again that sample 1 is over.
    processed = processor.process(
        [SequenceOutput("r", 1, letters("q")), SequenceOutput("r", 0, letters("c"), "length")]
    )
    assert processed.aborts == [("r", 1)]
    assert [o.text for o in processed.finished[0].outputs] == ["abc", "c"]


def test_without_detokenizing_texts_are_empty() -> None:
    for tokenizer, params in ((None, SamplingParams()), (TOKENIZER, SamplingParams(detokenize=False))):
        processor = OutputProcessor(tokenizer)
        processor.add(Request.create("r", PROMPT, params))
        (result,) = processor.process([SequenceOutput("r", 0, letters("abc"), "length")]).finished
        assert (result.outputs[0].text, result.outputs[0].token_ids) == ("", letters("abc"))


def test_an_embedded_prompt_is_resumed_as_one_and_ends_with_its_vector() -> None:
    processor = OutputProcessor(TOKENIZER)
    request = Request.create("r", PROMPT, SamplingParams(temperature=0, max_tokens=1, detokenize=False), pooling="mean")
    processor.add(request)
    resumed = processor.resumed("r")
    assert resumed is not None
    assert (resumed.pooling, resumed.prompt, resumed.resume) == ("mean", request.prompt, (b"",))
    (result,) = processor.process([SequenceOutput("r", 0, [], "stop", embedding=b"1234")]).finished
    assert (result.embedding, result.outputs[0].token_ids, result.num_completion_tokens) == (b"1234", [], 0)
