"""Text to ids and back: tokenizers, chat templates, streams. Importing it loads neither tokenizers nor jinja2."""

from lamina.text.directory import from_directory
from lamina.text.gguf import from_gguf
from lamina.text.pieces import cut_place
from lamina.text.stream import Stream
from lamina.text.template import ChatTemplate
from lamina.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Stream", "Tokenizer", "cut_place", "from_directory", "from_gguf"]
