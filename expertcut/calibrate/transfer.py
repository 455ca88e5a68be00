"""Where hidden states wait between layers, and how they get there: the one seam for host memory and devices.

On a CUDA device they wait in pinned host memory and travel asynchronously; elsewhere they stay where they are.
"""

from __future__ import annotations

import torch

from expertcut.errors import UsageError


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
