"""Features of `weights/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "weights/gguf_writing.py": [
        ("GGUF written: tensors begin at multiples", "offset += _whole(stored.size)", "offset += stored.size"),
        ("GGUF written: innermost first", "stored.shape[::-1]", "stored.shape"),
    ],
    "weights/ctranslate2.py": [
        ("aliases are copies", "return tensor.clone() if name in self.aliases else tensor", "return tensor"),
        ("loops of aliases", "if name not in entries and name not in found:", "if name not in entries and False:"),
        ("bytes of a shape", "if 0 in shape or prod(shape) * dtype.itemsize != size:", "if 0 in shape:"),
        ("the end", "if header.left:", "if False:"),
        ("counts", "if count * least > self.left:", "if False:"),
        ("old versions", "VERSIONS = range(4, 7)", "VERSIONS = range(3, 7)"),
    ],
    "weights/mapped.py": [
        ("the end of the file", "if length > self.left:", "if False:"),
        ("numbers at odd bytes", "if offset % dtype.itemsize else raw)", "if False else raw)"),
    ],
    "weights/rules.py": [
        ("biases that are not ours", "if not ours and bool(part.any()):", "if False:"),
        ("zeros are written", "torch.zeros_like(ours[0]) for held", "ours[0] for held"),
    ],
}
