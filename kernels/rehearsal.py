"""Compiling kernels ahead of their first launch: on every core, without a GPU, into Triton's cache on disk.

A rehearsal runs the code that will launch kernels over tensors on the device "meta": they have shapes, strides and
addresses, but no memory. Nothing is launched. Every variant that would be compiled is compiled once, in a forked
process of its own, and the C stub that launches it too; a later launch in any process finds both in the cache.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernels.launch import Chip, rehearse_on
from kernels.registry import triton


class Rehearsal:
    """What a rehearsal compiles. `with` it in a process that has no use for a GPU, and that has one thread."""

    def __init__(self, chip: Chip, workers: int) -> None:
        """At most `workers` processes compile at a time; 0: what would be compiled is met, and not compiled."""
        self.chip, self._workers = chip, workers
        self.variants: dict[str, int] = {}
        """How many of each kernel were met."""
        self.failed: list[str] = []
        self._seen: set[tuple[str, str]] = set()
        self._running: dict[int, str] = {}
        self._is_child = False

    @contextmanager
    def __call__(self) -> Iterator[Rehearsal]:
        """Rehearse while the context is open; at its end everything is compiled."""
        from triton.runtime.jit import JITFunction

        rehearse_on(self.chip, self._met_other)
        triton.runtime.driver.set_active(_NoGpu(self.chip))
        launch, hook = JITFunction.run, triton.knobs.runtime.jit_cache_hook

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            try:
                compiled = launch(kernel, *args, **{**kwargs, "warmup": True})
                if self._is_child:
                    _make_launcher(compiled)
                    os._exit(0)
            finally:
                if self._is_child:
                    traceback.print_exc()
                    os._exit(1)

        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = self._met
        try:
            self.ahead("launch", _make_driver)
            yield self
        finally:
            JITFunction.run, triton.knobs.runtime.jit_cache_hook = launch, hook
            self.wait()

    @property
    def summary(self) -> str:
        """What was compiled, and what could not be."""
        kernels = ", ".join(f"{name.rpartition('.')[2]} {count}" for name, count in sorted(self.variants.items()))
        failed = f"; failed: {', '.join(self.failed)}" if self.failed else ""
        return f"{sum(self.variants.values())} kernel variants ({kernels}){failed}"

    def ahead(self, name: str, job: Callable[[], object]) -> None:
        """Run a job in a process of its own: for what else can be compiled without a GPU."""
        if self._fork(name):
            return
        try:
            job()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)

    def wait(self) -> None:
        """Return once all that was met is compiled."""
        while self._running:
            self._reap()

    def _met(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Triton's hook before it compiles: True where there is nothing to do here."""
        if self._is_child:
            return False
        name = f"{fn.module}.{fn.name.rpartition('.')[2]}"
        self.variants[name] = self.variants.get(name, 0) + 1
        if not self._fork(name):
            return False
        # Triton believes that it has the kernel, and does not ask again.
        fn.jit_function.device_caches[0][0][key] = _MET
        return True

    def _met_other(self, name: str, variant: str, job: Callable[[], object]) -> None:
        """A kernel that is not Triton's: compile it, once."""
        if (name, variant) not in self._seen:
            self._seen.add((name, variant))
            self.variants[name] = self.variants.get(name, 0) + 1
            self.ahead(name, job)

    def _fork(self, name: str) -> bool:
        """Go on as two processes: True in this one."""
        if not self._workers:
            return True
        if len(self._running) >= self._workers:
            self._reap()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self._running[pid] = name
            return True
        self._is_child = True
        return False

    def _reap(self) -> None:
        pid, status = os.wait()
        name = self._running.pop(pid, None)
        if name is not None and status:
            self.failed.append(name)


_MET = object()
"""Stands in Triton's own table for a kernel that is compiled elsewhere."""


class _NoGpu:
    """Triton's driver of a GPU that is not there: compiling asks for no more than this."""

    def __init__(self, chip: Chip) -> None:
        from triton.backends.compiler import GPUTarget

        major, minor = chip.capability
        self._target = GPUTarget("cuda", major * 10 + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_device_interface(self) -> Any:
        return torch.cuda


def _make_driver() -> None:
    """Build Triton's own C module, if it is not cached: the first thing that a launch needs."""
    from triton.backends.nvidia import driver

    driver.CudaUtils()


def _make_launcher(compiled: Any) -> None:
    """Build the C stub that launches a kernel of this signature, if it is not cached."""
    from triton.backends.nvidia import driver

    driver.CudaLauncher(compiled.src, compiled.metadata)
