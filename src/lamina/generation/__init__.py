"""Generation, embedding, filling blanks, perplexity: what is done with a model once it is loaded."""

from __future__ import annotations

from lamina.generation.beam import Beaming, Beams
from lamina.generation.blanks import Blank, Candidate, Filled, fill
from lamina.generation.chat import Chat
from lamina.generation.continuations import Continuation, continuations
from lamina.generation.embed import embed
from lamina.generation.limits import Limits, limits_of
from lamina.generation.loop import Step, generate, stream
from lamina.generation.perplexity import Score, log_probabilities, measure, score
from lamina.generation.retrieval import Retrieval, Retriever
from lamina.generation.sample import Sampling
from lamina.generation.text import Found, Writing, find_texts, write

__all__ = [
    "Beaming",
    "Beams",
    "Blank",
    "Candidate",
    "Chat",
    "Filled",
    "Found",
    "Limits",
    "Retrieval",
    "Retriever",
    "Sampling",
    "Score",
    "Step",
    "Writing",
    "continuations",
    "embed",
    "fill",
    "find_texts",
    "generate",
    "limits_of",
    "log_probabilities",
    "measure",
    "score",
    "stream",
    "write",
]
