"""Features of `catalogue/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "catalogue/inputs.py": [
        ("catalogue: NoPE asks the input and the scores", "if stack.position is None and stack.score_bias is None", ""),
        ("catalogue: a narrow input", "s.input_width is not None", "False"),
        ("catalogue: a stem", "lambda spec: not spec.reads_ids", "lambda spec: spec.reads_ids"),
        ("catalogue: a narrow table", "spec.embedding.inner is not None", "False"),
    ],
    "catalogue/kind.py": [
        ("catalogue: what is planned is not built", "return here and not self.planned", "return here"),
        ("catalogue: the example runs now", "self.function()", "print(self.prints, end='')"),
    ],
    "catalogue/page.py": [
        ("catalogue: parts count their copies", "sum(row.repeat for row in rows)", "len(rows)"),
        ("catalogue: only the parts that fit", "if any(fnmatchcase(path, part) for part in what.parts)", ""),
    ],
    "catalogue/wiring.py": [
        ("catalogue: shared layers", "lambda s: s.repeat > 1", "lambda s: s.repeat > 2"),
        ("catalogue: gated steps", "_step(lambda s: s.gate)", "_step(lambda s: not s.gate)"),
    ],
}
