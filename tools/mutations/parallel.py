"""Features of `parallel/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "parallel/checkpoint.py": (
        "tests/train/test_ranks.py::test_parts_are_written_by_each_rank_and_read_by_any_number",
        "tests/parallel/test_state.py",
    ),
    "parallel/collectives.py": ("tests/parallel/test_same.py",),
    "parallel/context.py": ("tests/parallel/test_same.py", "tests/parallel/test_state.py"),
    "parallel/experts.py": ("tests/parallel/test_same.py",),
    "parallel/layout.py": ("tests/parallel/test_same.py", "tests/parallel/test_state.py"),
    "parallel/mesh.py": ("tests/parallel/test_state.py",),
    "parallel/pipeline.py": (
        "tests/parallel/test_same.py",
        "tests/parallel/test_state.py",
        "tests/parallel/test_plan.py",
    ),
    "parallel/state.py": ("tests/parallel/test_state.py", "tests/parallel/test_same.py"),
    "parallel/tensor.py": ("tests/parallel/test_same.py", "tests/parallel/test_state.py"),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "parallel/axes.py": [
        ("mesh: the product is the world", "if mesh.ranks != world:", "if False:"),
        ("mesh: what is left", "mesh.replace(shard=world // rest.ranks)", "mesh.replace(shard=1)"),
        ("mesh: heads", "if isinstance(heads, int) and heads % ranks:", "if False:"),
        ("mesh: key heads are copied", "and key_heads % ranks and ranks % key_heads:", "and key_heads % ranks:"),
        ("mesh: hidden features", "isinstance(part, FeedForwardSpec) and part.hidden % ranks", "False"),
        ("mesh: experts", "if part.router.experts % mesh.expert:", "if False:"),
        ("mesh: whole texts", "LongformerSpec | ExpertChoiceSpec | CapacitySpec", "ExpertChoiceSpec"),
        ("mesh: phases by length", "isinstance(part, RotarySpec) and part.limit", "False"),
        ("pipeline: what may lie beside it", 'for axis in ("context", "tensor", "expert")', 'for axis in ("context",)'),
        ("pipeline: a layer for each", "if len(stack.layers) < mesh.pipeline:", "if False:"),
        ("pipeline: one stack", "if model.two_stacks or model.stem is not None:", "if False:"),
        ("pipeline: pooled losses are of one kind", "if len(pooled) > 1:", "if False:"),
    ],
    "parallel/checkpoint.py": [
        ("parts: the list of names", "if (module, name) in ALLOWED or isinstance(found, torch.dtype):", "if True:"),
        (
            "parts: what lies elsewhere is not written",
            "tensors.items() if not tensor.is_meta}\n    try:\n        with _alone():\n            save",
            "tensors.items()}\n    try:\n        with _alone():\n            save",
        ),
        (
            "parts: names are checked",
            'if stray := [name for name in entries if name.startswith("model.")',
            'if stray := [name for name in [] if name.startswith("model.")',
        ),
        ("parts: bytes", "if not isinstance(entry, TensorStorageMetadata):", "if False:"),
        ("parts: files elsewhere", "if not PART.fullmatch(where)", "if not PART.match(where)"),
    ],
    "parallel/collectives.py": [
        ("collectives: each makes something else of the whole", "if ctx.summed:", "if False:"),
        ("collectives: enter sums gradients", "return _added(gradient, ctx.group), None", "return gradient, None"),
    ],
    "parallel/context.py": [
        ("context: whose the keys are", "return key, value, self.full[id(tokens)][1]", "return key, value, tokens"),
        ("context: filled places are holes", "self.ordered(tokens.position, HOLE)", "self.ordered(tokens.position)"),
        ("context: whose the source is", "cut.tokens(call.memory_tokens)[1])", "cut.tokens(call.memory_tokens)[0])"),
        ("context: values of two heads", "if key.shape[:-1] == value.shape[:-1]:", "if True:"),
        ("context: no cache", "if given.get(name) is not None and", "if False and"),
    ],
    "parallel/layout.py": [
        ("ranks: gradients are added up", "module.set_gradient_divide_factor(1.0)", "pass"),
        ("ranks: layers are not taken for containers", "None, cast_forward_inputs=False)", "None)"),
        ("ranks: micro-batches send once", "module.set_requires_gradient_sync(on, recurse=False)", "pass"),
    ],
    "parallel/mesh.py": [
        ("ranks: the inner cut is joined first", "shape[other.dim] //= home[name].size()", "pass"),
        ("ranks: all know of a failure", "if what == failed:", "if False:"),
        ("ranks: the missing are named", "[rank for rank, key in enumerate(keys) if not store.check([key])]", "[]"),
        ("pipeline: whose a parameter is", "self.spec.pipeline if tensor.is_meta else self.stage", "self.stage"),
        ("pipeline: names of all stages", "found.setdefault(name, tensors.get(name, elsewhere))", "pass"),
    ],
    "parallel/pipeline.py": [
        ("pipeline: a tied table lies on both ends", "and tied else (first,)", "and False else (first,)"),
        ("pipeline: gradients of both are added", "    if learn:\n        _share(model, stage)", "    pass"),
        (
            "pipeline: losses of layers before",
            '.losses[f"{self.path}.before"] = before',
            '.losses[f"{self.path}.z"] = 0',
        ),
        ("pipeline: sums of layers before", "call.memo[self.path, self.router[0]] = sums", "pass"),
        ("pipeline: pooled losses where the last has none", "call.record.losses.setdefault(name, loss)", "pass"),
        ("pipeline: micro-batches of any length", "hidden = max(rows * columns", "hidden = min(rows * columns"),
        ("pipeline: which backward is the last", "last(number == count - 1)", "last(True)"),
        ("pipeline: layers of others are passed", "layer.forward = _passed", "pass"),
        ("pipeline: it runs through `through` alone", "if not model.stage.running:", "if False:"),
    ],
    "parallel/state.py": [
        ("state: what is cut twice", "1 if placement.is_replicate() else", "1 if not placement.is_shard() else"),
        ("state: where a part lies", "min(start, part.shape[dim])", "0"),
        ("state: names are checked", "if more := [name for name in state if name not in wanted]:", "if more := []:"),
        ("state: copies count once", "mesh.spec.ranks // mesh.spec.pipeline * stages // _parts(gradient)", "1"),
        ("state: a tied table counts once", "// mesh.spec.pipeline * stages //", "// mesh.spec.pipeline //"),
    ],
    "parallel/tensor.py": [
        ("tensor: a bias is added once", "* float(axis.rank == 0)", ""),
        ("tensor: gradients of the memory", "replace(one, memory=enter(one.memory, group))", "one"),
        (
            "tensor: gradients of what is whole",
            "return lambda x: enter(x, axis.group)\n\n\ndef _once",
            "return lambda x: x\n\n\ndef _once",
        ),
        ("tensor: which key head", "(self.rank * of // self.size, of)", "(self.rank % of, of)"),
        ("tensor: ids of others", "found.masked_fill(~mine[..., None], 0.0)", "found"),
        ("tensor: ids of nobody", "torch._assert_async(((x >= 0) & (x < total)).all())", "None"),
        ("tensor: padding has another number", "padding=spec.padding - first if here else None", "padding=None"),
        ("tensor: lists of heads", "part[axis.rank * size : (axis.rank + 1) * size]", "part[:size]"),
        ("tensor: an odd vocabulary stays whole", "if vocabulary % axis.size:", "if False:"),
        (
            "tensor: a factor of an adapter",
            '("out" if role in COLUMNS else "in")',
            '("in" if role in COLUMNS else "out")',
        ),
        ("tensor: halves", '2 if "halves" in role else 1', "1"),
    ],
}
