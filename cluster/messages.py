"""What a driver and its clients say to each other: msgpack frames over one socket a client."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

import engine.errors
from engine.errors import MantaError, RequestFailed
from engine.request import Request, SequenceOutput

State = Literal["starting", "ready", "recovering", "failed", "stopped"]


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """Accept this request; a refusal comes back as outputs with finish_reason "error"."""

    request: Request


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Forget a request, or one of its samples; nothing more comes of it but what is on its way."""

    request_id: str
    index: int | None = None


class Ask(msgspec.Struct, tag="ask", array_like=True):
    """Answer with a Reply of the same number."""

    number: int
    topic: Literal["stats", "health", "picture"]


class Welcome(msgspec.Struct, tag="welcome", array_like=True):
    """The driver's first message to a client."""

    facts: DriverFacts


class Outputs(msgspec.Struct, tag="out", array_like=True):
    """Everything one step brought to this client."""

    outputs: list[SequenceOutput]


class Reply(msgspec.Struct, tag="reply", array_like=True):
    """The answer to the Ask of that number."""

    number: int
    body: dict[str, Any]


class DriverFacts(msgspec.Struct, frozen=True):
    """What a driver is, fixed once it is ready."""

    name: str
    pid: int
    node_id: str
    num_blocks: int
    block_size: int
    max_model_len: int


class DriverHealth(msgspec.Struct, frozen=True):
    """Whether a driver can be trusted with requests, told by a thread that the loop cannot hold up."""

    state: State
    reason: str = ""
    """Why, when the state is not ready."""
    idle: bool = True
    progress_age_s: float = 0.0
    """Seconds since the loop last gave a sign of life."""
    recoveries: int = 0
    since_s: float = 0.0
    """When this state began: seconds since 1970, 0 when it is not known."""
    waiting_for: str = ""
    """What the cluster must get before the engine can come back; empty when it has all."""

    @property
    def live(self) -> bool:
        """The engine works, or is being brought back: whoever replaces it would gain nothing."""
        return self.state in ("starting", "ready", "recovering")

    @property
    def healthy(self) -> bool:
        """It is live, and nothing is missing that only somebody else can bring back."""
        return self.live and not self.waiting_for

    @property
    def ready(self) -> bool:
        """Requests are computed now."""
        return self.state == "ready"


ToDriver = Submit | Abort | Ask
ToClient = Welcome | Outputs | Reply

_encoder = msgspec.msgpack.Encoder()
_to_driver: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)
_to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToDriver | ToClient) -> bytes:
    """A message as one frame's payload."""
    return _encoder.encode(message)


def decode_for_driver(payload: bytes) -> ToDriver:
    """A client's message. Raises msgspec.DecodeError or ValidationError."""
    return _to_driver.decode(payload)


def decode_for_client(payload: bytes) -> ToClient:
    """A driver's message. Raises msgspec.DecodeError or ValidationError."""
    return _to_client.decode(payload)


def error_outputs(request_id: str, num_samples: int, error: BaseException) -> list[SequenceOutput]:
    """The last outputs of every sample of a request that failed with `error`."""
    detail: dict[str, str | int | float | None] = {"class": type(error).__name__}
    if isinstance(error, MantaError):
        plain = str | int | float | None
        detail |= {name: value for name, value in vars(error).items() if isinstance(value, plain)}
    else:
        detail["class"] = RequestFailed.__name__
    return [
        SequenceOutput(request_id, index, [], "error", error=str(error), error_detail=detail)
        for index in range(num_samples)
    ]


def error_of(output: SequenceOutput) -> MantaError:
    """The error that an output with finish_reason "error" tells of, as it was raised in the driver."""
    message = output.error or "the request failed"
    fields = dict(output.error_detail or {})
    kind = getattr(engine.errors, str(fields.pop("class", "")), RequestFailed)
    if not (isinstance(kind, type) and issubclass(kind, MantaError)):
        kind = RequestFailed
    error: MantaError = kind.__new__(kind)
    Exception.__init__(error, message)
    for defaulted in ("param", "code"):
        if issubclass(kind, engine.errors.RequestError):
            setattr(error, defaulted, None)
    for name, value in fields.items():
        setattr(error, name, value)
    return error
