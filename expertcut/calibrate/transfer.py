"""Where hidden states wait between layers, and how they get there: the one seam for host memory and devices.

On a CUDA device they wait in pinned host memory and travel asynchronously; elsewhere they stay where they are.
"""

from __future__ import annotations

import os

import torch

from expertcut.errors import UsageError

KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
"""Settings of oneDNN's caches of compiled kernels, read at its first use."""


def bound_kernel_caches() -> None:
    """Let oneDNN keep few compiled kernels, unless the environment says otherwise.

    Routing gives an expert another number of tokens each time: in bfloat16 on a CPU, a kernel is compiled for each and
    kept, up to half a gigabyte, while the next batch hardly ever needs the same.
    """
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def park(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor to where it waits. Copies are queued on the current stream, so that a later `fetch` sees them."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def fetch(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a waiting tensor to the device."""
    return tensor.to(device, non_blocking=True)


def settle(device: torch.device) -> None:
    """Wait until parked tensors may be read on the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: torch knows no such device, or the machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices", "pass --device auto")
    return device
