"""Models that people ask for and whose architecture is not public: what is known, and what to use instead."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Undisclosed:
    """What its makers said of a model, and what they did not."""

    name: str
    called: str
    public: tuple[str, ...]
    not_public: tuple[str, ...]
    source: str
    like: tuple[str, ...]  # published sizes of the same style, the first that is known here is the template
    own: str  # Python that makes a spec of one's own from the template

    @property
    def template(self) -> str:
        """The published size to start from."""
        from lamina.families import sizes

        return next(name for name in self.like if name in sizes())

    @property
    def refusal(self) -> str:
        """Why there is no spec of it, and what there is, in one line."""
        return (
            f"the architecture of {self.called} is not public ({self.source}), so it has no spec, no weights and no"
            f" costs here; see: lamina show {self.name}; a published decoder of its style: {self.template}"
        )


GPT4 = Undisclosed(
    name="gpt4",
    called="GPT-4",
    public=(
        "It is a Transformer-style model, trained first to predict the next token of a text.",
        "It was then fine-tuned by reinforcement learning from human feedback.",
        "It takes text and images, and gives text.",
        "The data of its pre-training were in part publicly available, in part licensed from others.",
        "Its final loss was predicted from the losses of much smaller models.",
    ),
    not_public=(
        "the number of its layers, its width, its heads, its parameters",
        "which kinds of layers it has: positions, norms, activations, attention, whether it is a mixture of experts",
        "how it reads images",
        "hardware, compute, the making of the data set, and the method of training",
        "its weights",
    ),
    source="arXiv:2303.08774, sections 2 and 3",
    like=("gpt3/175b", "gpt2/xl"),
    own="""\
import lamina

spec = lamina.spec("{template}")
layers = spec.decoder.layers[:12]
mine = spec.replace(decoder=spec.decoder.replace(layers=layers))
print(f"{{lamina.account(mine).parameters:,}} parameters")
""",
)


def undisclosed(name: str) -> Undisclosed | None:
    """GPT-4, where a name means it, however it is spelled: gpt4, GPT-4, openai/gpt-4, gpt4/anything; else None."""
    return GPT4 if re.fullmatch(r"(openai/)?gpt[-_ ]?4(/.*)?", name.strip().lower()) else None
