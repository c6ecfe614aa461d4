"""Everything that makes tokens: importable and testable without Ray or a GPU.

`from engine import LLM, SamplingParams` is the offline interface. Names load on first use, so that `import engine`
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.beam_output import BeamSearchOutput as BeamSearchOutput
    from engine.config import EngineConfig as EngineConfig
    from engine.embedding import EmbeddingRequestOutput as EmbeddingRequestOutput
    from engine.llm import LLM as LLM
    from engine.output import CompletionOutput as CompletionOutput
    from engine.output import RequestOutput as RequestOutput
    from engine.sampling_params import BeamSearchParams as BeamSearchParams
    from engine.sampling_params import SamplingParams as SamplingParams

_MODULES = {
    "BeamSearchOutput": "engine.beam_output",
    "BeamSearchParams": "engine.sampling_params",
    "CompletionOutput": "engine.output",
    "EmbeddingRequestOutput": "engine.embedding",
    "EngineConfig": "engine.config",
    "LLM": "engine.llm",
    "RequestOutput": "engine.output",
    "SamplingParams": "engine.sampling_params",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
