"""Small copies between host and device that wait for nothing: through pinned memory, on the current stream.

torch's pinned allocator gives a buffer out again only after the copy from or into it is over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.float32]


def upload(array: Numbers, device: torch.device) -> Tensor:
    """`array` as a tensor on the device; on a CPU it is the same memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return (pinned(tensor) if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in pinned memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class Download:
    """A tensor on its way to the host; `numpy()` is to be called once the device has come this far."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor = host.copy_(tensor, non_blocking=True)
        self._host = tensor

    def numpy(self) -> npt.NDArray[Any]:
        """The values, in memory that stays this object's."""
        return self._host.numpy()
