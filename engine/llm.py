"""LLM: offline batch generation."""

from __future__ import annotations

import importlib
import logging
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast

import msgspec

from engine.beam_output import BeamSearchOutput
from engine.chat_template import Messages, read_template
from engine.config import EngineConfig
from engine.embedding import (
    Embedding,
    EmbeddingRequestOutput,
    check_dimensions,
    check_pooling,
    embedding_params,
    unit_vector,
)
from engine.errors import ExecutorDied, RequestError, RequestFailed
from engine.executor import Executor
from engine.llm_engine import LLMEngine
from engine.model_config import ModelConfig, resolve
from engine.output import OutputProcessor, RequestOutput
from engine.prompts import Prompt, prompt_list, split_prompt
from engine.request import Request
from engine.sampling_params import BeamSearchParams, SamplingParams
from engine.step import Pooling
from engine.tokenizer import Tokenizer, default_sampling, prepare_params, prepare_prompt
from engine.vllm_arguments import translate

logger = logging.getLogger(__name__)

MAX_RECOVERIES = 3

# More than one rank goes through Ray. Named, not imported: `engine` never imports it.
_RANKS_EXECUTOR = "cluster.ray_executor:RayExecutor"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A prompt that was checked, with its parameters."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    pooling: Pooling | None = None


class LLM:
    """A model loaded in this process (one rank) or on Ray (more), generating for whole batches of prompts.

    A rank that dies in `generate` is replaced, MAX_RECOVERIES times a call, and no token is lost or changed.
    Keyword arguments are those of EngineConfig; those of vLLM's `LLM` that mean nothing here are accepted with a
    warning. With `seed`, prompts whose parameters have none draw the same tokens each time the program runs. Not for
    several threads at once. Raises ConfigError for what cannot be served and ModelLoadError for broken weights.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = translate(
            {
                "model": model,
                "tokenizer": tokenizer,
                "tensor_parallel_size": tensor_parallel_size,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "gpu_memory_utilization": gpu_memory_utilization,
                "enforce_eager": enforce_eager,
                "trust_remote_code": trust_remote_code,
                **({"seed": seed} if seed is not None else {}),
                **kwargs,
            }
        )
        config = EngineConfig.from_args(**arguments)
        model_config = ModelConfig.load(config)
        self.config = resolve(config, model_config)
        self.model_config = model_config
        self._tokenizer = Tokenizer.load(self.config)
        self._default_sampling = default_sampling(self.config)
        self._seeds = random.Random(seed) if seed is not None else None
        self._num_requests = 0
        self.llm_engine = LLMEngine(
            self.config,
            _make_executor(self.config, model_config),
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
        )
        # At the interpreter's exit too: it would otherwise end while the ranks' threads are still at work.
        weakref.finalize(self, self.llm_engine.shutdown)
        try:
            self.llm_engine.start()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them; the results are in the prompts' order.

        A prompt is a text, a list of token ids, or a dict with "prompt" or "prompt_token_ids"; `prompt_token_ids` is
        another way to give the latter. One SamplingParams serves all, a list has one a prompt, None takes the model's
        own defaults. A sample that fails has finish_reason "error". Raises RequestError, before anything is run, for a
        prompt or parameters that cannot be run.
        """
        _refuse_lora(lora_request)
        given = prompt_list(prompts, prompt_token_ids)
        params = self._params_list(sampling_params, len(given), priority)
        return self._run([self._prepare(prompt, its) for prompt, its in zip(given, params)], use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; the results are in their order.

        A conversation is a list of {"role", "content"}. `chat_template` is a Jinja file or text instead of the model's;
        `chat_template_kwargs` reach the template. `chat_template_content_format` has no effect: parts become text.
        Raises RequestError naming the message or the template's line at fault.
        """
        _refuse_lora(lora_request)
        del chat_template_content_format
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if single else messages)
        template = read_template(chat_template) if chat_template is not None else None
        params = self._params_list(sampling_params, len(conversations), None)
        prepared = []
        for conversation, conversation_params in zip(conversations, params):
            text = self._tokenizer.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=template,
                **(chat_template_kwargs or {}),
            )
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            prepared.append(self._prepare({"prompt": text, "prompt_token_ids": token_ids}, conversation_params))
        return self._run(prepared, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the likeliest outputs after one prompt or each of a list; the results are in the prompts' order.

        The outputs are those of `generate(num_beams=params.beam_width)` in Transformers. `concurrency_limit` has no
        effect: the engine runs as many as fit. Raises RequestError as `generate` does, and RequestFailed for a search
        that cannot be finished.
        """
        _refuse_lora(lora_request)
        del concurrency_limit
        results = self._run([self._prepare(prompt, params.sampling) for prompt in prompt_list(prompts)], use_tqdm)
        for result in results:
            if result.error is not None:
                raise RequestFailed(result.error)
        return [BeamSearchOutput.of(result, self._tokenizer) for result in results]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embed one prompt or a list of them, as vectors of length 1; the results are in the prompts' order.

        Each vector is made of the model's last hidden states, after its last norm: that of the last token, or with
        pooling "mean" the mean of all; None is the configuration's `pooling`. `dimensions` keeps so many numbers of
        each. Raises RequestError as `generate` does, and RequestFailed for a prompt that cannot be finished.
        """
        _refuse_lora(lora_request)
        check_dimensions(dimensions, self.model_config.hidden_size)
        check_pooling(pooling)
        params = embedding_params(truncate_prompt_tokens)
        how = pooling or self.config.pooling
        prepared = [replace(self._prepare(prompt, params), pooling=how) for prompt in prompt_list(prompts)]
        results = self._run(prepared, use_tqdm)
        for result in results:
            if result.error is not None:
                raise RequestFailed(result.error)
        return [
            EmbeddingRequestOutput(
                result.request_id,
                Embedding(unit_vector(result, dimensions).tolist()),
                result.prompt_token_ids,
                result.num_cached_tokens,
            )
            for result in results
        ]

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without sampling_params: defaults, then those of the model's generation_config.json."""
        return SamplingParams(**self._default_sampling)

    def close(self) -> None:
        """End the engine and its ranks. Idempotent; the LLM cannot be used after it."""
        self.llm_engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params_list(
        self,
        given: SamplingParams | Sequence[SamplingParams] | None,
        count: int,
        priority: Sequence[int] | None,
    ) -> list[SamplingParams]:
        """One SamplingParams for each of `count` prompts."""
        if given is None:
            given = self.get_default_sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        for name, values in (("sampling_params", params), ("priority", priority)):
            if values is not None and len(values) != count:
                raise RequestError(f"{name}: {len(values)} given for {count} prompts; one for each", param=name)
        if priority is None:
            return params
        return [its.replace(priority=its_priority) for its, its_priority in zip(params, priority)]

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> _Prepared:
        text, token_ids, cache_salt = split_prompt(prompt)
        vocab_size = self.model_config.vocab_size
        return _Prepared(
            text,
            prepare_prompt(text or "" if token_ids is None else token_ids, params, self._tokenizer, vocab_size),
            prepare_params(params, self._tokenizer, vocab_size),
            cache_salt,
        )

    def _run(self, prepared: list[_Prepared], use_tqdm: bool) -> list[RequestOutput]:
        """Generate for all of `prepared`; nothing of them is left in the engine, whatever happens."""
        processor = OutputProcessor(self._tokenizer)
        requests = [self._make_request(each) for each in prepared]
        results: dict[str, RequestOutput] = {}
        engine = self.llm_engine
        try:
            for request, each in zip(requests, prepared):
                processor.add(request, each.text)
                engine.add_request(request)
            with _Progress(len(requests), use_tqdm) as progress:
                failures = 0
                while len(processor):
                    try:
                        processed = processor.process(engine.step())
                    except ExecutorDied as error:
                        failures += 1
                        if failures > MAX_RECOVERIES:
                            raise
                        logger.warning("recovering from the loss of a rank (%d): %s", failures, error)
                        engine.recover()
                        continue
                    for request_id, index in processed.aborts:
                        engine.abort(request_id, index)
                    for result in processed.finished:
                        results[result.request_id] = result
                        progress.finished(result)
        finally:
            for request in requests:
                if request.request_id in processor:
                    engine.abort(request.request_id)
        return [results[request.request_id] for request in requests]

    def _make_request(self, prepared: _Prepared) -> Request:
        request = Request.create(
            str(self._num_requests),
            prepared.token_ids,
            prepared.params,
            arrival_s=time.time(),
            cache_salt=prepared.cache_salt,
            pooling=prepared.pooling,
        )
        self._num_requests += 1
        if self._seeds is not None and prepared.params.seed is None:
            request = msgspec.structs.replace(request, seed=self._seeds.getrandbits(63))
        return request


class _Progress:
    """A bar of finished requests, with the tokens a second so far."""

    def __init__(self, total: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="Processed prompts", dynamic_ncols=True, disable=not enabled)
        self._input_tokens = self._output_tokens = 0
        self._start_s = time.monotonic()

    def finished(self, result: RequestOutput) -> None:
        self._input_tokens += len(result.prompt_token_ids)
        self._output_tokens += result.num_completion_tokens
        elapsed_s = max(time.monotonic() - self._start_s, 1e-6)
        speeds = f"{self._input_tokens / elapsed_s:.0f} in, {self._output_tokens / elapsed_s:.0f} out tokens/s"
        self._bar.set_postfix_str(speeds, refresh=False)
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _make_executor(config: EngineConfig, model_config: ModelConfig) -> Executor:
    if config.tensor_parallel_size == 1:
        from engine.local_executor import LocalExecutor

        return LocalExecutor(config, model_config, progress=True)
    module, name = _RANKS_EXECUTOR.split(":")
    executor: Executor = getattr(importlib.import_module(module), name)(config, model_config)
    return executor


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise RequestError("lora_request: this engine serves no adapters", param="lora_request")
