"""Prepared data: texts as memory-mapped tokens on disk, their writer and readers, and the order they are read in.

It knows of tokenizers and of no model.
"""

from lamina.data.column import Column
from lamina.data.manifest import Manifest, SourceFile
from lamina.data.order import Order
from lamina.data.prepared import Prepared, open_prepared
from lamina.data.windows import Packed, Windows
from lamina.data.writer import Writer

__all__ = ["Column", "Manifest", "Order", "Packed", "Prepared", "SourceFile", "Windows", "Writer", "open_prepared"]
