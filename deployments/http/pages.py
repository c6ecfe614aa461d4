"""The pages people look at, and the numbers behind them: /, /engine, /engine/state, /metrics, /version."""

from __future__ import annotations

import mimetypes
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from deployments.http.answers import JsonResponse
from deployments.http.context import service_of

WEB = Path(__file__).resolve().parent.parent / "web"
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@cache
def _file(name: str) -> tuple[bytes, str]:
    path = WEB / name
    if path.parent != WEB or not path.is_file():
        raise HTTPException(404, f"no such file: {name}")
    return path.read_bytes(), mimetypes.guess_type(name)[0] or "application/octet-stream"


def page(name: str) -> Response:
    """A file of deployments/web, with headers that let it ask nobody else. Raises HTTPException 404."""
    content, media_type = _file(name)
    return Response(content, headers={"cache-control": "no-cache", **SECURITY}, media_type=media_type)


async def chat_page(request: Request) -> Response:
    """The chat. Links in it are relative: below a prefix its address must end with a slash."""
    if not request.url.path.endswith("/"):
        return RedirectResponse(request.url.path + "/")
    return page("index.html")


async def engine_page(request: Request) -> Response:  # noqa: ARG001
    """What the engine is doing, as a page."""
    return page("engine.html")


async def web_file(request: Request) -> Response:
    """A file of a page."""
    return page(request.path_params["name"])


async def engine_state(request: Request) -> Response:
    """What every block and request is doing now; see engine.picture."""
    return JsonResponse(await service_of(request).picture())


async def metrics(request: Request) -> Response:
    """The engine's counters, gauges and histograms in Prometheus' text format, under the model's name."""
    service = service_of(request)
    picture = await service.picture()
    lines = [
        *_samples("gauge", {f"manta_{k}": picture[k] for k in ("running", "waiting")}, picture["model"]),
        *_samples("gauge", {f"manta_blocks_{k}": picture["blocks"][k] for k in _BLOCKS}, picture["model"]),
        *_samples("gauge", {"manta_unfinished_requests": service.num_unfinished}, picture["model"]),
        *_samples("counter", {f"manta_{k}_total": v for k, v in picture["counters"].items()}, picture["model"]),
    ]
    for name, key in _HISTOGRAMS.items():
        lines += _histogram(name, picture[key], picture["model"])
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def version_route(request: Request) -> Response:  # noqa: ARG001
    """The server's version."""
    return JsonResponse({"version": product_version()})


@cache
def product_version() -> str:
    """The installed distribution's version; "0+unknown" when run from files alone."""
    try:
        return version("manta-llm")
    except PackageNotFoundError:
        return "0+unknown"


_BLOCKS = ("total", "free", "cached", "used", "shared", "saved")
_HISTOGRAMS = {
    "manta_time_to_first_token_seconds": "ttft",
    "manta_token_gap_seconds": "gap",
    "manta_queue_seconds": "queue",
    "manta_step_seconds": "step",
    "manta_mask_seconds": "mask",
}


def _samples(kind: str, values: dict[str, Any], model: str) -> list[str]:
    lines = []
    for name, value in values.items():
        lines += [f"# TYPE {name} {kind}", f"{name}{{{_label(model)}}} {value}"]
    return lines


def _histogram(name: str, histogram: dict[str, Any], model: str) -> list[str]:
    lines, count = [f"# TYPE {name} histogram"], 0
    for bound, many in zip([*histogram["bounds"], float("inf")], histogram["counts"], strict=True):
        count += many
        edge = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f'{name}_bucket{{{_label(model)},le="{edge}"}} {count}')
    return [*lines, f"{name}_sum{{{_label(model)}}} {histogram['sum']}", f"{name}_count{{{_label(model)}}} {count}"]


def _label(model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'model="{escaped}"'


ROUTES = [
    Route("/", chat_page, methods=["GET"]),
    Route("/engine", engine_page, methods=["GET"]),
    Route("/engine/state", engine_state, methods=["GET"]),
    Route("/web/{name}", web_file, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/version", version_route, methods=["GET"]),
]
