"""A training run, as data: what `lamina train CONFIG.yaml` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lamina.adapters import LoRASpec
from lamina.errors import LaminaError
from lamina.objectives import Asking, CausalLM
from lamina.parallel import MeshSpec
from lamina.specs import Spec
from lamina.train.optimiser import AdamW, Optimising
from lamina.train.schedule import Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Spec):
    """Which model is trained: a checkpoint that is trained further, or an architecture from its initial values."""

    source: str | None = None  # any SOURCE with weights
    size: str | None = None  # a published architecture: gpt2/small; its vocabulary becomes that of the data
    spec: str | None = None  # a spec.json
    family: str | None = None  # a model_type, with `config`
    config: dict = field(default_factory=dict)  # fields of the family's config.json, over those of `size`
    freeze: tuple[str, ...] = ()  # paths of what is not trained
    train: tuple[str, ...] | None = None  # paths of what alone is trained
    unfreeze: Literal["changed"] | None = None  # what operations changed of `source` alone is trained

    def check(self) -> None:
        said = [name for name in ("source", "size", "spec", "family") if getattr(self, name) is not None]
        if len(said) != 1:
            found = " and ".join(said) or "none of them"
            raise LaminaError(f"one of source, size, spec, family says which model it is; here it is {found}")
        if self.config and said[0] in ("source", "spec"):
            raise LaminaError(f"config is for size and family; {said[0]} has its own")
        if self.unfreeze is not None and (self.source is None or self.train is not None):
            raise LaminaError("unfreeze is for a source that was operated on, and takes the place of train")


@dataclass(frozen=True, kw_only=True)
class DataChoice(Spec):
    """What is read."""

    train: str  # a directory that `lamina data prepare` made
    length: int  # tokens of a row
    validation: str | None = None  # another such directory
    workers: int = 1  # threads that make batches ahead; 0: none

    def check(self) -> None:
        if self.length < 1 or self.workers < 0:
            raise LaminaError(f"length={self.length} must be at least 1 and workers={self.workers} at least 0")


@dataclass(frozen=True, kw_only=True)
class LoopSpec(Spec):
    """How much is read at a time, how often, and in which numbers."""

    steps: int
    batch: int  # rows of a step, in the whole world
    micro: int | None = None  # rows of one forward on one rank; None: all of the rank's, on a pipeline a part a stage
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    clip: float | None = 1.0  # of the norm of the gradient
    average: float | None = None  # decay of the moving average of the weights, which is then what is evaluated and kept
    recompute: bool = False  # layers run again in the backward: less memory for a third more arithmetic
    max_skips: int = 3  # steps in a row whose gradient may be not finite

    def check(self) -> None:
        if self.steps < 1 or self.batch < 1 or (self.micro is not None and self.micro < 1):
            raise LaminaError(f"steps={self.steps}, batch={self.batch} and micro={self.micro} must be at least 1")
        if self.clip is not None and self.clip <= 0:
            raise LaminaError(f"clip is {self.clip}; it must be above 0, or null for none")
        if self.average is not None and not 0 < self.average < 1:
            raise LaminaError(f"average is {self.average}; it must lie between 0 and 1, or be null for none")


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec(Spec):
    """What is measured on the way."""

    every: int = 250  # steps; 0: only at the end
    rows: int | None = 256  # of the validation data, from all over it and always the same; null: all
    prompts: tuple[str, ...] = ()  # which the model continues each time, or, of two stacks, answers
    tokens: int = 100  # new ones for each prompt
    until: dict = field(default_factory=dict)  # {teacher: 0.05}: the run ends when held-out losses are no higher

    def check(self) -> None:
        wrong = next((name for name, goal in self.until.items() if not isinstance(goal, int | float)), None)
        if wrong is not None:
            raise LaminaError(f"until.{wrong} is {self.until[wrong]!r}; it must be a number, the loss to reach")


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec(Spec):
    """What is kept on disk."""

    every: int = 500  # steps; 0: only at the end
    keep: int = 2  # the newest ones
    layout: Literal["whole", "parts"] = "whole"  # parts: each rank writes its own, and the folder is no SOURCE

    def check(self) -> None:
        if self.keep < 2:
            raise LaminaError(f"keep is {self.keep}; at least 2 checkpoints are kept, so that one is always whole")


@dataclass(frozen=True, kw_only=True)
class LogSpec(Spec):
    """Where figures go beside metrics.jsonl."""

    every: int = 10  # steps
    adapters: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Spec):
    """A whole run."""

    model: ModelChoice
    data: DataChoice
    loop: LoopSpec
    objective: Asking = field(default_factory=CausalLM)
    optimiser: Optimising = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    adapter: LoRASpec | None = None  # then the model stays as it is, and this alone is trained
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    checkpoints: CheckpointSpec = field(default_factory=CheckpointSpec)
    log: LogSpec = field(default_factory=LogSpec)
    mesh: MeshSpec = field(default_factory=MeshSpec)
    seed: int = 0
