"""Texts and chats to token ids and back: /tokenize in vLLM's shape and in TGI's, /detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.http.answers import JsonResponse
from deployments.http.context import answer_headers, body_of, check_model, service_of
from deployments.http.tgi_types import SimpleToken
from deployments.service import ModelService, beside_the_loop
from engine.errors import RequestError
from engine.sampling_params import SamplingParams


class TokenizeRequest(BaseModel):
    """A text (`prompt`, or TGI's `inputs`) or the messages of a chat."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    inputs: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    tokens: list[int]


async def tokenize(request: Request) -> Response:
    """The token ids of a text or a chat."""
    service = service_of(request)
    body = await body_of(request, TokenizeRequest)
    check_model(service, body.model)
    given = [name for name in ("prompt", "inputs", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError(f"got {' and '.join(given) or 'none'}: one of prompt, messages or inputs is needed")
    if body.inputs is not None:
        inputs = body.inputs
        return _answer(request, body, await beside_the_loop(len(inputs), lambda: _simple_tokens(service, inputs)))
    if body.messages is not None:
        ids = await service.encode_chat(
            body.messages,
            SamplingParams(),
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            chat_template=body.chat_template,
            tools=body.tools,
            variables=body.chat_template_kwargs,
        )
    else:
        prompt = body.prompt or ""
        special = body.add_special_tokens is not False
        ids = await beside_the_loop(len(prompt), lambda: service.tokenizer.encode(prompt, add_special_tokens=special))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.config.model_len, "tokens": ids}
    answer["token_strs"] = None
    if body.return_token_strs:
        answer["token_strs"] = await beside_the_loop(len(ids), lambda: [service.tokenizer.token_text(i) for i in ids])
    return _answer(request, body, answer)


async def detokenize(request: Request) -> Response:
    """The text of token ids, specials included."""
    service = service_of(request)
    body = await body_of(request, DetokenizeRequest)
    check_model(service, body.model)
    for place, token in enumerate(body.tokens):
        if not 0 <= token < service.vocab_size:
            raise RequestError(
                f"tokens[{place}]: got {token}, allowed: 0 to {service.vocab_size - 1}", param=f"tokens[{place}]"
            )
    text = await beside_the_loop(len(body.tokens), lambda: service.tokenizer.decode_raw(body.tokens))
    return _answer(request, body, {"prompt": text})


def _simple_tokens(service: ModelService, text: str) -> list[SimpleToken]:
    """TGI's shape: each token with where it stands in the text, in characters; specials stand nowhere."""
    encoding = service.tokenizer.hf(text, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    return [
        SimpleToken(i, text[a:b] if b > a else service.tokenizer.token_text(i), a, b)
        for i, (a, b) in zip(encoding["input_ids"], offsets, strict=True)
    ]


def _answer(request: Request, body: BaseModel, payload: Any) -> Response:
    return JsonResponse(payload, headers=answer_headers(request, body))


ROUTES = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
