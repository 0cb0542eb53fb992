"""The state of the random generators, as JSON: Python's, NumPy's global one, torch's of the CPU and of each device."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators() -> dict[str, Any]:
    """The states as they are now."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "state": list(numbers), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": base64.b64encode(np.asarray(keys, dtype="<u4").tobytes()).decode(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore(saved: dict[str, Any]) -> None:
    """Makes the generators what they were. States of devices that are not here are left out."""
    python, numpy = saved["python"], saved["numpy"]
    random.setstate((python["version"], tuple(python["state"]), python["gauss"]))
    keys = np.frombuffer(base64.b64decode(numpy["keys"]), dtype="<u4")
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(_tensor(saved["torch"]))
    for device, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
        torch.cuda.set_rng_state(_tensor(state), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
