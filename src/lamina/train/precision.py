"""Training in 16 bits: the model computes in them, and the weights that the optimiser changes stay in float32.

The same as what FSDP2's mixed precision does on many ranks (arXiv:1710.03740, section 3.1), for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamina.layers.router import Router

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Masters:
    """Float32 copies of the trained weights of a model that has been put into 16 bits, and their gradients.

    The gradient of each weight is added to its master's in float32 as soon as it is there, and forgotten: micro-batches
    add up without rounding, and gradients in 16 bits never exist all at once. Routers stay in float32, as Switch
    Transformer found necessary (arXiv:2101.03961, section 2.4).
    """

    def __init__(self, model: nn.Module, parameters: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        routers = [module for module in model.modules() if isinstance(module, Router)]
        exact = {id(weight) for router in routers for weight in router.parameters()}
        self.working = {name: weight for name, weight in parameters if id(weight) not in exact}
        copies = {name: nn.Parameter(weight.detach().float().clone()) for name, weight in self.working.items()}
        self.masters = {name: copies.get(name, weight) for name, weight in parameters}
        self.frozen: dict[str, Tensor] = {}  # weights that are not trained, as they were, where 16 bits round them
        trained = {id(weight) for _, weight in parameters}
        for name, parameter in model.named_parameters():
            if id(parameter) in exact:
                continue
            before, parameter.data = parameter.data, parameter.data.to(dtype)
            if id(parameter) not in trained and not parameter.data.to(before.dtype).equal(before):
                self.frozen[name] = before
        for name, weight in self.working.items():
            weight.register_post_accumulate_grad_hook(self._collector(self.masters[name]))

    def _collector(self, master: nn.Parameter) -> Any:
        def collect(weight: Tensor) -> None:
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

        return collect

    def kept(self, name: str, weight: Tensor) -> Tensor:
        """What is written down of a parameter of the model: its master, or, of one that is not trained, what it was."""
        found = self.masters.get(name)
        return self.frozen.get(name, weight.float()) if found is None else found

    @torch.no_grad()
    def publish(self) -> None:
        """The masters' values into the model, after each step."""
        masters = [self.masters[name] for name in self.working]
        torch._foreach_copy_(list(self.working.values()), masters)  # pyright: ignore


class Scale:
    """The factor of the loss that keeps float16 gradients from vanishing: halved where one is not finite, and doubled
    after `patience` steps that were (arXiv:1710.03740, section 3.2)."""

    def __init__(self, value: float = 65536.0, patience: int = 2000) -> None:
        self.value, self.patience, self.good = value, patience, 0

    def update(self, finite: bool) -> None:
        """After each step."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good >= self.patience:
            self.value, self.good = self.value * 2, 0
