"""Routes for those who run the server."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.http.answers import JsonResponse
from deployments.http.context import open_service, service_of


async def health(request: Request) -> Response:
    """200 while the engine works or is being brought back; 503 with why when it cannot, or resources are missing."""
    report = await open_service(request).health()
    return JsonResponse(report, 200 if report.healthy else 503)


async def ready(request: Request) -> Response:
    """200 when requests are taken now, 503 with the reason when not."""
    report = await open_service(request).health()
    return JsonResponse(report, 200 if report.ready else 503)


async def stats(request: Request) -> Response:
    """The engine's counters and gauges, and this replica's unfinished requests."""
    service = service_of(request)
    counters = await service.stats()
    return JsonResponse({**counters, "unfinished": service.num_unfinished})


ROUTES = [
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/stats", stats, methods=["GET"]),
]
