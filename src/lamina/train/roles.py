"""What each weight of a model is for: what rates, decay and freezing go by."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from lamina.errors import LaminaError
from lamina.layers import Embedding, LabelHead, LanguageHead, LayerNorm, Pooler, RMSNorm, Segment
from lamina.layers.batch_norm import BatchNorm
from lamina.layers.experts import Matrices
from lamina.layers.positions import LearnedPosition
from lamina.layers.product_keys import Values
from lamina.layers.router import Router
from lamina.specs import unknown

ROLES = ("matrix", "embedding", "head", "expert", "router", "norm", "bias", "value", "other")
"""`value`: the table of a product-key memory. `other`: gates, sinks, relative biases, lambdas, half keys: things that
belong to no matrix product with hidden states."""

_CLASSES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((Embedding, Segment, LearnedPosition), "embedding"),
    ((LanguageHead, LabelHead, Pooler), "head"),
    ((LayerNorm, RMSNorm, BatchNorm), "norm"),
    ((Matrices,), "expert"),
    ((Router,), "router"),
    ((Values,), "value"),
)


def role(model: nn.Module, name: str) -> str:
    """Of the parameter with this path: by the layer that holds it, the innermost that says something."""
    path = name.split(".")
    if path[-1] == "bias":
        return "bias"
    module, found = model, None
    for part in path[:-1]:
        module = getattr(module, part) if not part.isdigit() else module[int(part)]  # pyright: ignore
        found = next((said for kinds, said in _CLASSES if isinstance(module, kinds)), found)
    if found is not None:
        return found
    return "matrix" if isinstance(module, nn.Linear) else "other"


def matching(names: list[str], patterns: tuple[str, ...], what: str) -> set[str]:
    """The parameters that paths name: whole paths, the beginnings of some, or patterns with * and ?.

    Raises LaminaError for one that names nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)}
        if not hits:
            starts = sorted({".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)})
            raise LaminaError(unknown(what, pattern, starts))
        found |= hits
    return found


def freeze(
    model: nn.Module, frozen: tuple[str, ...], trained: tuple[str, ...] | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Stop the gradients of what `frozen` names, and, where `trained` is given, of all that it does not name.

    Returns the parameters that are trained. Raises LaminaError where nothing is left, and for paths of nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    still = matching(names, frozen, "path to freeze")
    kept = set(names) if trained is None else matching(names, trained, "path to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in kept and name not in still)
    left = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not left:
        raise LaminaError("every weight is frozen: nothing is left to train")
    return left
