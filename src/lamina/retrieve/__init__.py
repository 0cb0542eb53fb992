"""Databases of text: chunks, their vectors, what continues them; the nearest of a chunk; kNN-LM."""

from lamina.retrieve.build import Progress, build, build_states
from lamina.retrieve.copying import copy
from lamina.retrieve.database import Database, open_database
from lamina.retrieve.editing import add, remove
from lamina.retrieve.embedding import Embedder, EmbedderSpec
from lamina.retrieve.engines import Engine
from lamina.retrieve.knn import KnnLM
from lamina.retrieve.manifest import IndexSpec
from lamina.retrieve.neighbours import Neighbours, find_neighbours, open_neighbours
from lamina.retrieve.store import Found

__all__ = [
    "Database",
    "Embedder",
    "EmbedderSpec",
    "Engine",
    "Found",
    "IndexSpec",
    "KnnLM",
    "Neighbours",
    "Progress",
    "add",
    "build",
    "build_states",
    "copy",
    "find_neighbours",
    "open_database",
    "open_neighbours",
    "remove",
]
