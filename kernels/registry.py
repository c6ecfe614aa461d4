"""Which implementation of an operation runs.

`@kernel` turns a torch function into an operation: the function is its definition, the reference and the CPU path.
`@op.triton(supports=...)` adds the fast implementation. Per call, on the device of the first tensor argument:

- a CPU tensor takes the definition;
- a GPU tensor takes Triton, unless `supports` gives a reason why not (logged once, counted in `op.why_not`);
- `force("torch" | "triton")` and the environment variable MANTA_KERNELS (`torch`, `triton`, or a list such as
  `paged_attention.decode=torch,rms_norm.rms_norm=triton`) overrule, and raise KernelUnavailable when they cannot be
  obeyed. Forced Triton runs on CPU tensors when TRITON_INTERPRET=1 was set before triton was first imported.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the definitions work without it
    triton = None
    tl = None

    def jit(fn: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        """Stand in for triton.jit where triton is not installed: keeps the function, which cannot be launched."""
        return fn if fn is not None else jit


logger = logging.getLogger(__name__)

Choice = Literal["torch", "triton"]
Supports = Callable[..., str | None]

_KERNELS: dict[str, Kernel] = {}


class KernelUnavailable(RuntimeError):
    """The implementation asked for with force() or MANTA_KERNELS cannot run this call."""


def parse_choices(text: str) -> tuple[Choice | None, dict[str, Choice]]:
    """Read MANTA_KERNELS: the choice for every operation (or None), and the choices for single operations."""
    default: Choice | None = None
    single: dict[str, Choice] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, choice = item.rpartition("=")
        if choice not in ("torch", "triton"):
            raise ValueError(f"MANTA_KERNELS: {item!r} is not torch, triton or OPERATION=torch|triton")
        if name:
            single[name] = choice  # type: ignore[assignment]
        else:
            default = choice  # type: ignore[assignment]
    return default, single


class _Overrule:
    """The process-wide choice: force() first, then MANTA_KERNELS as it was at import."""

    def __init__(self) -> None:
        self.forced: Choice | None = None
        self.default, self.single = parse_choices(os.environ.get("MANTA_KERNELS", ""))
        self.active = bool(self.default or self.single)

    def choice(self, name: str) -> Choice | None:
        return self.forced or self.single.get(name) or self.default


_overrule = _Overrule()


@contextmanager
def force(choice: Choice) -> Iterator[None]:
    """Run every operation of this process with one implementation while the context is open."""
    if choice not in ("torch", "triton"):
        raise ValueError(f"force: {choice!r} is not 'torch' or 'triton'")
    before = _overrule.forced, _overrule.active
    _overrule.forced, _overrule.active = choice, True
    try:
        yield
    finally:
        _overrule.forced, _overrule.active = before


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether it lies on a GPU, or on the device "meta", which stands for one (kernels.rehearsal)."""
    return tensor.is_cuda or tensor.is_meta


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors, in this process."""
    return triton is not None and triton.knobs.runtime.interpret


class Kernel:
    """One operation: its torch definition and, where there is one, its Triton implementation."""

    def __init__(self, definition: Callable[..., Any]) -> None:
        self.definition = definition
        self.name = f"{definition.__module__.removeprefix('kernels.')}.{definition.__name__}"
        self.fast: Callable[..., Any] | None = None
        self.supports: Supports | None = None
        self.why_not: Counter[str] = Counter()
        self.__doc__ = definition.__doc__
        self.__name__ = definition.__name__
        self.__wrapped__ = definition
        _KERNELS[self.name] = self

    def triton(self, supports: Supports | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declare the Triton implementation. supports(*args): why not, from shapes, strides and dtypes, or None."""

        def declare(fast: Callable[..., Any]) -> Callable[..., Any]:
            self.fast, self.supports = fast, supports
            return fast

        return declare

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensor = args[0]
        if not isinstance(tensor, torch.Tensor):
            tensor = tensor[0]
        if not _overrule.active:
            if not on_gpu(tensor) or self._reason(args, kwargs) is not None:
                return self.definition(*args, **kwargs)
            return self.fast(*args, **kwargs)  # type: ignore[misc]
        return self._overruled(tensor, args, kwargs)

    def _reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why Triton cannot run this call; None when it can. Logged once a reason, counted always."""
        reason: str | None
        if triton is None:
            reason = "triton is not installed"
        elif self.fast is None:
            reason = "no Triton implementation"
        else:
            reason = self.supports(*args, **kwargs) if self.supports else None
        if reason is not None:
            if reason not in self.why_not:
                logger.info("%s runs its torch definition: %s", self.name, reason)
            self.why_not[reason] += 1
        return reason

    def _overruled(self, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = _overrule.choice(self.name)
        if choice is None:
            choice = "triton" if on_gpu(tensor) and self._reason(args, kwargs) is None else "torch"
        elif choice == "triton":
            reason = self._reason(args, kwargs)
            if reason is None and not on_gpu(tensor) and not interpreting():
                reason = "CPU tensors need TRITON_INTERPRET=1, set before triton is imported"
            if reason is not None:
                raise KernelUnavailable(f"{self.name}: triton was asked for, but {reason}")
        if choice == "torch":
            return self.definition(*args, **kwargs)
        return self.fast(*args, **kwargs)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<Kernel {self.name}{' +triton' if self.fast else ''}>"


def kernel(definition: Callable[..., Any]) -> Kernel:
    """Declare an operation by its torch definition. Its first argument is a tensor, or a sequence of tensors."""
    return Kernel(definition)


def fits(operation: Kernel, *args: Any, **kwargs: Any) -> bool:
    """Whether there is a GPU's kernel for this call. For operations whose parts' kernels beat its torch definition."""
    tensor: torch.Tensor = args[0]
    return on_gpu(tensor) and operation.supports is not None and operation.supports(*args, **kwargs) is None


def all_kernels() -> dict[str, Kernel]:
    """Every operation declared so far, by name (`module.function`)."""
    return dict(_KERNELS)


def why_not_report() -> dict[str, dict[str, int]]:
    """How often each operation ran its definition although a GPU or force() asked for Triton, by reason."""
    return {name: dict(op.why_not) for name, op in _KERNELS.items() if op.why_not}
