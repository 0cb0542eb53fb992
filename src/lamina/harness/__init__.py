"""lm-evaluation-harness (arXiv:2405.14782) over lamina: the tasks of `lm_eval`, put to any SOURCE.

`register` makes "lamina" a name of a model there; `python -m lamina.harness` is the harness' own command with that name
known; `run` is what `lamina evaluate --tasks` does.
"""

from __future__ import annotations

from lamina.errors import UnsupportedError

NAME = "lamina"
EXTRA = "it is in an extra: pip install 'lamina[eval]'"


def register() -> None:
    """Make `lamina` a model of the harness, in this process. It has no way of learning of models from packages.

    Raises UnsupportedError where it is not installed, naming the package that is missing.
    """
    try:
        import lm_eval.models  # pyright: ignore[reportMissingImports]  # first: it replaces no name that is there
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing(error) from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="lamina.harness.model:HarnessModel")  # imported when it is asked for


def missing(error: ModuleNotFoundError) -> UnsupportedError:
    """What is said of a package that the harness needs and this installation lacks."""
    name = (error.name or str(error)).split(".")[0]
    return UnsupportedError(f"the tasks of lm-evaluation-harness need the package {name.replace('_', '-')}; {EXTRA}")
