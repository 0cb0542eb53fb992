"""Features of `surgery/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "surgery/build.py": [
        ("build: what the state lacks is said", "new = [name for name in wanted if name not in state]", "new = []"),
        ("build: shapes", "if tensor.shape != wanted[name].shape:", "if False:"),
    ],
    "surgery/retrofit.py": [
        ("retrofit: gated from zero", "dropout=before.dropout, gate=True)", "dropout=before.dropout)"),
        ("retrofit: key heads", "key_heads=own.key_heads", "key_heads=own.heads"),
        ("retrofit: the encoder's first table", "if table is None or made", "if True or made"),
        ("retrofit: the table is a copy", "table.clone()", "table"),
        ("retrofit: where by default", "range(5, len(stack.layers), 3)", "range(6, len(stack.layers), 3)"),
    ],
}
