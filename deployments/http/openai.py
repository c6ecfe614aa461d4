"""OpenAI's routes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.http.answers import JsonResponse
from deployments.http.context import check_model, service_of
from deployments.http.openai_chat import create_chat_completion
from deployments.http.openai_completions import create_completion
from deployments.http.openai_embeddings import create_embeddings
from deployments.http.openai_replies import ModelCard, ModelList
from deployments.service import ModelService


async def list_models(request: Request) -> Response:
    """Every name the model is served under."""
    service = service_of(request)
    return JsonResponse(ModelList([_card(service, name) for name in service.names]))


async def get_model(request: Request) -> Response:
    """One model; names may hold slashes."""
    service = service_of(request)
    name = request.path_params["name"]
    check_model(service, name)
    return JsonResponse(_card(service, name))


def _card(service: ModelService, name: str) -> ModelCard:
    config = service.config
    return ModelCard(name, int(service.started_s), root=service.name, max_model_len=config.model_len)


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", get_model, methods=["GET"]),
    Route("/v1/completions", create_completion, methods=["POST"]),
    Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
    Route("/v1/embeddings", create_embeddings, methods=["POST"]),
]
