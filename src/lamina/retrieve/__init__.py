"""Databases of text: chunks, their vectors, what continues them; the nearest of a chunk; kNN-LM."""

from lamina.retrieve.build import Progress, build
from lamina.retrieve.database import Database, open_database
from lamina.retrieve.embedding import Embedder, EmbedderSpec
from lamina.retrieve.engines import Engine
from lamina.retrieve.manifest import IndexSpec
from lamina.retrieve.store import Found

__all__ = ["Database", "Embedder", "EmbedderSpec", "Engine", "Found", "IndexSpec", "Progress", "build", "open_database"]
