"""The GPU of a rank's process: which one it is, made current, and its context made ahead."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def bind_device(device: str, gpu_ids: Sequence[str]) -> None:
    """Make this rank's GPU the current device of the calling thread; nothing on a CPU.

    Every process sees all GPUs of its node (peer memory needs that); Ray says which one is this rank's.
    """
    if device != "cuda":
        return
    import torch

    torch.cuda.set_device(device_index(gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES")))


def device_index(assigned: Sequence[str], visible: str | None) -> int:
    """The CUDA index of the GPU Ray assigned, among those the process sees."""
    assert len(assigned) == 1, f"one GPU a rank, not {assigned}"
    if visible is None or assigned[0] not in visible.split(","):
        return int(assigned[0])
    return visible.split(",").index(assigned[0])


def open_gpu(gpu_ids: Sequence[str], library: str = "libcuda.so.1") -> bool:
    """Make the GPU's primary context, which torch will find; it stays for as long as the process lives.

    The driver takes half a second or more for it and needs no Python, so that imports go on beside it. False, and a
    line in the log, where that cannot be done: torch will say why.
    """
    try:
        driver = ctypes.CDLL(library)
        index = device_index(gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES"))
        device, context = ctypes.c_int(), ctypes.c_void_p()
        for status in (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), index),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        ):
            if status:
                logger.info("the GPU's context is made later: the driver's error %d", status)
                return False
    except (OSError, AttributeError) as error:
        logger.info("the GPU's context is made later: %s", error)
        return False
    return True
