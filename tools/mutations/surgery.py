"""Features of `surgery/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "surgery/build.py": [
        ("build: what the state lacks is said", "new = [name for name in wanted if name not in held]", "new = []"),
        ("build: shapes", "if tensor.shape != wanted[name].shape:", "if False:"),
    ],
    "surgery/depth.py": [
        (
            "depth: a copy has weights of its own",
            '"copy of layer {row.number}", torch.clone',
            '"copy of layer {row.number}", moved(old).make',
        ),
        ("depth: the way back", "tuple(map(order.index, range(count)))", "tuple(range(count))"),
        (
            "depth: the encoder goes with the first that reads",
            "made |= {now + name.removeprefix(before): moved(name) for name in inside}",
            "pass",
        ),
        ("depth: one encoder", "                encoder = None\n", "                pass\n"),
        (
            "depth: a table that no layer shares is gone",
            'if name.startswith((f"{path}.layers.", f"{path}.tables."))',
            'if name.startswith(f"{path}.layers.")',
        ),
        ("depth: outputs begin at zero", "if rest in row.zeros:", "if False:"),
        ("depth: post-norm layers", "if step.after is not None or step.residual != 1.0:", "if False:"),
    ],
    "surgery/stream.py": [
        ("stream: each branch of a sum", "if not all(names for _, names in found):", "if False:"),
        ("stream: a shared network beside experts", "[] if op.shared is None else", "[] if True else"),
    ],
    "surgery/rope.py": [
        (
            "rope: NTK is another base",
            "self.scaling.factor ** (width / (width - 2))",
            "self.scaling.factor ** (width / (width - 1))",
        ),
        ("rope: the context grows from what was trained on", "round(self.scaling.factor * trained)", "trained"),
        ("rope: dynamic keeps the context", " or isinstance(self.scaling, DynamicNTKScaling):", ":"),
        (
            "rope: LongRoPE is bounded where the short list is 1",
            "set(scaling.short) == {1.0} and scaling.attention == 1.0",
            "False",
        ),
        ("rope: an original that was not", "plain and original > spec.context", "False"),
        (
            "rotary: attention that knows positions already",
            "part.rotary is not None or part.relative is not None",
            "False",
        ),
    ],
    "surgery/positions.py": [
        (
            "positions: rows before position 0",
            "torch.cat([table[:offset], table[offset:][rows]])",
            "table[torch.arange(size + offset) % len(table)]",
        ),
        ("positions: the ends stay the ends", "(len(rows) - 1) / max(size - 1, 1)", "len(rows) / size"),
        (
            "positions: one stack of two",
            'if spec.context is not None and ("decoder" in found or not spec.two_stacks):',
            "if spec.context is not None:",
        ),
        ("positions: stacks of two lengths have no way back", "len(sizes) == 1 and (", "("),
    ],
    "surgery/vocabulary.py": [
        (
            "vocabulary: every table of these tokens",
            'names = [place.weight("weight") for place in places(spec, EmbeddingSpec) if place.part.vocabulary == old]',
            'names = ["embedding.weight"]',
        ),
        ("vocabulary: each feature has its deviation", "x.to(wide).std(dim=0, correction=0)", "x.to(wide).std()"),
        ("vocabulary: ids that are named stay", "if number >= size]", "if False]"),
        (
            "head: a copy of its own",
            'made = {own: Made((table,), "copy of the table of tokens", torch.clone)}',
            'made = {own: Made((table,), "copy", lambda x: x)}',
        ),
    ],
    "surgery/norms.py": [
        (
            "norms: a tied head keeps the old table",
            'made["head.weight"] = Made(("embedding.weight",)',
            '_ = Made(("embedding.weight",)',
        ),
        ("norms: positions are centred", 'rows = [f"{path}.position.weight", f"{path}.segment.weight"]', "rows = []"),
        (
            "norms: biases of output projections are centred",
            'dims = dict.fromkeys(rows, -1) | {f"{name}.bias": -1 for name in matrices}',
            "dims = dict.fromkeys(rows, -1)",
        ),
        ("norms: the bias of a matrix stays", "return shift if own is None else own + shift", "return shift"),
        ("norms: 1 + weight", "1 + norm if plus_one else norm", "norm"),
        ("norms: what reads the last norm beside the head", "elif head is not None and", "elif"),
    ],
    "surgery/tokens.py": [
        ("tokens: the same text, the same row", "if same in old.tokens:", "if False:"),
        ("tokens: bytes that are no characters", "elif isinstance(text, bytes):", "elif False:"),
        ("tokens: of no text the mean of all", "rows[sizes == 0] = whole", "pass"),
        ("tokens: a token that ends texts", "if special.end and not new.special.end:", "if False:"),
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
        ("weights: each has numbers of its own", "manual_seed(digest ^ seed)", "manual_seed(seed)"),
        (
            "weights: asking for a name makes nothing",
            "        return name in self.names\n",
            "        return self.get(name) is not None\n",
        ),
    ],
    "surgery/retrofit.py": [
        ("retrofit: gated from zero", "dropout=before.dropout, gate=True)", "dropout=before.dropout)"),
        ("retrofit: key heads", "key_heads=own.key_heads", "key_heads=own.heads"),
        ("retrofit: the encoder's first table", "if table is None or made", "if True or made"),
        ("retrofit: the table is a copy", "table.clone()", "table"),
        ("retrofit: where by default", "range(5, len(stack.layers), 3)", "range(6, len(stack.layers), 3)"),
    ],
}
