"""Features of `surgery/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "surgery/build.py": [
        ("build: what the state lacks is said", "new = [name for name in wanted if name not in held]", "new = []"),
        ("build: shapes", "if tensor.shape != wanted[name].shape:", "if False:"),
    ],
    "surgery/heads.py": [
        ("key heads: the mean of those beside each other", "heads.mean(dim=1)", "heads[:, -1]"),
        ("key heads: copies beside each other", "repeat_interleave(times, dim=0)", "repeat(times, 1, 1)"),
        (
            "key heads: those that are alike",
            "first = left[int(inner.max(dim=1).values.argmax())]",
            "first = left[0] if size else left[0]",
        ),
        ("heads: columns of o too", 'made[place.weight("o.weight")] = ', "_ = "),
        ("heads: a bias that belongs to heads", "if stack.part.score_bias is not None:", "if False:"),
    ],
    "surgery/patterns.py": [
        ("window: sinks", "local = local | Sinks(count=self.sinks)", "pass"),
        (
            "window: the old pattern stays",
            "return Causal() & local if isinstance(old, Causal) else local",
            "return local",
        ),
    ],
    "surgery/plan.py": [
        ("plan: the way back is the other way round", "(*now.undo, *undo)", "(*undo, *now.undo)"),
        (
            "plan: one step that cannot be undone",
            "undo = None if undo is None or now.undo is None else",
            "undo = undo if now.undo is None else",
        ),
    ],
    "surgery/upcycle.py": [
        ("upcycle: noise by the deviation of each weight", "noise * x.float().std() * drawn", "noise * drawn"),
        ("upcycle: noise of each weight", "manual_seed(digest ^ seed)", "manual_seed(seed)"),
    ],
    "surgery/verdict.py": [
        ("verdict: real next tokens only", "real = wanted >= 0", "real = wanted > -2"),
        (
            "verdict: divergence from the old model",
            "said[0].exp() * (said[0] - said[1])",
            "said[1].exp() * (said[1] - said[0])",
        ),
        (
            "verdict: drift by the old states",
            "own + float(left.double().square().sum())",
            "own + float(other[name].double().square().sum())",
        ),
    ],
    "surgery/weights.py": [
        (
            "weights: asking for a name makes nothing",
            "        return name in self.names\n",
            "        return self.get(name) is not None\n",
        ),
    ],
    "surgery/retrofit.py": [
        ("retrofit: gated from zero", "dropout=before.dropout, gate=True)", "dropout=before.dropout)"),
        (
            "retrofit: key heads",
            "key_heads=own.key_heads,\n            head_dim=own.head_dim,\n            memory_width=made.width",
            "key_heads=own.heads,\n            head_dim=own.head_dim,\n            memory_width=made.width",
        ),
        ("retrofit: the encoder's first table", "if table is None or made", "if True or made"),
        ("retrofit: the table is a copy", "table.clone()", "table"),
        ("retrofit: where by default", "range(5, len(stack.layers), 3)", "range(6, len(stack.layers), 3)"),
        ("copied: rotary phases", "relative=own.rotary,", "relative=None,"),
        ("copied: like heads", "or op.replace(pattern=own.pattern) != own", ""),
        ("copied: what has no place", "        if value:\n", "        if False:\n"),
        ("copied: copies", "tensor.clone()\n", "tensor\n"),
        (
            "copied: its own depth",
            "wide[:, i * width : (i + 1) * width] = copies[name]",
            "wide[:, :width] = copies[name]",
        ),
        ("copied: a norm for each depth", "if place == places[-1] else", "if place == places[0] else"),
        ("copied: positions of the encoder", '("position", "input_norm")', '("input_norm",)'),
    ],
}
