"""What Ray Serve knows of the call being served and does not tell: the one module that looks inside Serve."""

from __future__ import annotations

import sys
from types import FrameType

from ray.serve.context import _get_serve_request_context


def request_id() -> str | None:
    """Serve's id of the call that runs now; None outside of one."""
    return _get_serve_request_context().request_id or None


def is_streaming_call() -> bool:
    """Whether the handle call that runs now was made with `options(stream=True)`.

    Serve awaits a deployment's `__call__` for both kinds of calls and then wants an async generator from one and a
    value from the other, without telling which. The functions of Serve that led here hold the call's RequestMetadata
    (seen in 2.60, over Ray and over gRPC). Without any such function the answer is False.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        streaming = getattr(frame.f_locals.get("request_metadata"), "is_streaming", None)
        if streaming is not None:
            return bool(streaming)
        frame = frame.f_back
    return False
