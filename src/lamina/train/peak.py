"""What this machine does at best: the rate of one large matrix product, against which a run's own is measured."""

from __future__ import annotations

import time

import torch


def peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square product in this dtype, the best of several, which takes some tenths of a second. While others
    use the machine it is too low."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)
