"""Features of `surgery/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "surgery/plan.py": ("tests/surgery/test_tokens.py", "tests/surgery/test_merging.py"),
    "surgery/multi_head.py": ("tests/surgery/test_latent.py",),
}
"""Tests of a file beside those that its name tells."""

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
        ("depth: post-norm layers", "step.replace(after=None, **gated)", "step.replace(**gated)"),
        ("depth: what passes is multiplied", "if step.residual != 1.0:", "if False:"),
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
        (
            "heads: columns of o too",
            'made[place.weight("o.weight")] = Made((place.weight("o.weight"),), moved',
            '_ = Made((place.weight("o.weight"),), moved',
        ),
        ("heads: a bias that belongs to heads", "if stack.part.score_bias is not None:", "if False:"),
    ],
    "surgery/calibration.py": [
        ("calibration: biases are weights of a 1", "rows.new_ones(len(rows), 1)", "rows.new_zeros(len(rows), 1)"),
        ("calibration: texts add up", "self.found[name] + found if name in self.found else found", "found"),
        ("calibration: what an encoder says", 'seen[f"{path}.memory"] = call.memory', "pass"),
        ("calibration: an earlier layer", "            self.done = []\n", "            pass\n"),
        ("calibration: the bias of a stack", "call.bias = stack.score_bias", "pass"),
    ],
    "surgery/fitting.py": [
        (
            "fitting: normed keys by their lengths",
            "same[:, None] / length[:, None] / heads",
            "same[:, None] / 1 / heads",
        ),
        ("fitting: a LayerNorm takes the mean out", "/ size if centred else 0.0", "/ size if False else 0.0"),
        (
            "fitting: the largest come last",
            "values[..., -rank:].clamp(min=0), vectors[..., -rank:]",
            "values[..., :rank].clamp(min=0), vectors[..., :rank]",
        ),
        ("fitting: as large as before", "return down * scale, up / scale", "return down, up"),
        (
            "fitting: what reads them counts",
            "root = torch.block_diag(*root_of(read[:, rest][..., rest]))",
            "root = torch.eye(len(inner), dtype=inner.dtype)",
        ),
        (
            "fitting: what reads a pair counts",
            "root = torch.diag_embed((own[:, a] + own[:, b]).clamp(min=0).sqrt().T)",
            "root = torch.diag_embed(torch.ones_like(own[:, a]).T)",
        ),
        ("fitting: keys turn by complex numbers", "(b, a, thin.imag, wide.imag),", "(b, a, -thin.imag, wide.imag),"),
        ("fitting: pairs beside each other", "if rotary is not None and rotary.interleaved:", "if False:"),
    ],
    "surgery/least_squares.py": [
        ("least squares: keys turn", "seen.query[span], rotary)", "seen.query[span], None)"),
        ("least squares: what is lost is said", "sum(one for one, _ in found)", "0 * sum(one for one, _ in found)"),
    ],
    "surgery/moments.py": [
        (
            "moments: biases",
            "if bias in weights else weight.new_zeros(len(weight), 1)",
            "* 0 if bias in weights else weight.new_zeros(len(weight), 1)",
        ),
        ("moments: all queries of a key head", "(query @ own @ query.mT).sum(dim=1)", "(query @ own @ query.mT)[:, 0]"),
    ],
    "surgery/latent.py": [
        ("latent: the mean of phases that are seen", "share[1:] *= 2", "pass"),
        ("latent: the key from the query", "distance = -torch.arange(length", "distance = torch.arange(length"),
        ("latent: unseen directions", "UNSEEN = 1e-8", "UNSEEN = 0.0"),
        (
            "latent: the scale stays",
            "scale=part.head_dim**-0.5 if part.scale is None else part.scale",
            "scale=part.scale",
        ),
        ("latent: the way back is the old spec", "if edited(back, grouped) != old:", "if False:"),
        ("latent: the way back to fewer key heads", "fewer = () if back == old else", "fewer = () if True else"),
        ("latent: what turns is taken out", "key = key - up.flatten(0, 1) @ shared", "key = key + 0"),
        (
            "latent: a bias of queries",
            'made[place.weight("q_down.bias")] = Made((bias,), "the queries", lambda x: x)',
            'made[place.weight("q_down.bias")] = Made((bias,), "the queries", lambda x: 0 * x)',
        ),
    ],
    "surgery/multi_head.py": [
        (
            "multi_head: what turns comes first",
            "[heads[:, nope:], heads[:, :nope]]",
            "[heads[:, :nope], heads[:, nope:]]",
        ),
        ("multi_head: the scale stays", "scale=None if scale == size**-0.5 else scale", "scale=None"),
        ("multi_head: some of it turns", "turned = rotary.width or part.rope_dim", "turned = part.rope_dim"),
        ("multi_head: biases of keys", "Made((k, bias), how, _wide(keys))", "Made((k,), how, nothing)"),
        ("multi_head: biases of queries", "Made((q, own), how, _wide(queries)) if through else", ""),
        (
            "multi_head: wide values",
            "max(part.nope_dim + part.rope_dim, part.value_dim)",
            "part.nope_dim + part.rope_dim",
        ),
        ("multi_head: a norm between", "if place.part.norm is not None:", "if False:"),
    ],
    "surgery/longformer.py": [
        ("longformer: rows before position 0", "% old.size + old.offset", "% old.size"),
        ("longformer: tiled", "torch.arange(size) % old.size", "torch.arange(size).clamp(max=old.size - 1)"),
        ("longformer: which tokens are global", 'if task == "sequence":', "if False:"),
        (
            "longformer: the encoder alone",
            "self.context is not None and not spec.two_stacks",
            "self.context is not None",
        ),
    ],
    "surgery/width.py": [
        ("widen: copies share what goes out", "x[:, index] / index.bincount()[index]", "x[:, index]"),
        ("widen: like the old ones", "deviation = x.std() if x.dim() > 1 else 0.0", "deviation = 0.0"),
        (
            "widen: noise on copies alone",
            "copies[old:] += self.noise * x.std() * torch.randn(copies[old:].shape, generator=random)",
            "copies += self.noise * x.std() * torch.randn(copies.shape, generator=random)",
        ),
        (
            "prune: what goes in counts",
            'for part in ("gate", "up"):\n                names',
            "for part in ():\n                names",
        ),
        (
            "prune: what goes out counts",
            'calibration(place.weight("down")).sqrt() * out',
            'calibration(place.weight("down")).sqrt()',
        ),
        ("prune: in their order", ".indices.sort().values", ".indices"),
        ("gated: weighs 1", "x.new_ones(len(x))", "x.new_zeros(len(x))"),
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
        ("plan: texts after a swap", "        if now.texts is not None:\n", "        if False:\n"),
        ("plan: other models", "now.weights, around)", "now.weights, ALONE)"),
        (
            "plan: a part whose spec changed",
            "        or any(owner(new, weight.name) != owner(old, source) for source in weight.sources)\n",
            "",
        ),
        ("plan: the way back is the other way round", "(*now.undo, *undo)", "(*undo, *now.undo)"),
        (
            "plan: one step that cannot be undone",
            "undo = None if undo is None or now.undo is None else",
            "undo = undo if now.undo is None else",
        ),
    ],
    "surgery/upcycle.py": [
        ("upcycle: noise by the deviation of each weight", "noise * x.float().std() * drawn", "noise * drawn"),
        ("upcycle: slices add up", "scale=float(each)", "scale=1.0"),
        (
            "upcycle: equal rows in a copy",
            "rows.repeat_interleave(self.slices - self.shared, dim=0)",
            "rows.repeat(self.slices - self.shared, 1)",
        ),
        (
            "upcycle: a bias counts once",
            "torch.cat([x[None], x.new_zeros(slices - 1, len(x))])",
            "x.expand(slices, -1)",
        ),
        (
            "upcycle: the same units of gate, up and down",
            "generator=own_generator(path, self.seed)",
            "generator=own_generator(path + name, self.seed)",
        ),
        ("upcycle: the mean of what goes", "mean + deviation * drawn, wide)", "deviation * drawn, wide)"),
        (
            "upcycle: places in evaluation",
            "if self.capacity is not None and self.capacity.evaluation is not None:",
            "if False:",
        ),
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
        (
            "retrofit: key heads",
            "key_heads=own.key_heads,\n            head_dim=own.head_dim,\n            memory_width=made.width",
            "key_heads=own.heads,\n            head_dim=own.head_dim,\n            memory_width=made.width",
        ),
        ("retrofit: the encoder's first table", 'if "embedding.weight" not in state or made', "if True or made"),
        (
            "retrofit: the table is a copy",
            '"a copy of the table of tokens", Tensor.clone)',
            '"a copy of the table of tokens", lambda x: x)',
        ),
        ("retrofit: where by default", "range(5, len(stack.layers), 3)", "range(6, len(stack.layers), 3)"),
        ("copied: rotary phases", "relative=own.rotary,", "relative=None,"),
        ("copied: like heads", "or op.replace(pattern=own.pattern) != own", ""),
        ("copied: what has no place", "        if value:\n", "        if False:\n"),
        ("copied: copies", 'Made((name,), "a copy", Tensor.clone)', 'Made((name,), "a copy", Tensor.detach)'),
        ("copied: its own depth", "(before * width, (parts - 1 - before) * width)", "(0, (parts - 1) * width)"),
        ("copied: a norm for each depth", "if place == places[-1] else", "if place == places[0] else"),
        ("copied: positions of the encoder", '("position", "input_norm")', '("input_norm",)'),
    ],
    "surgery/grafts.py": [
        ("grafts: gated from zero", "dropout=before.dropout, gate=True)", "dropout=before.dropout)"),
        ("grafts: the step that is named", "names.index(after) + 1", "names.index(after)"),
        ("grafts: the norm of the step before", "pre=_norm_before(before)", "pre=None"),
        ("grafts: the model's own layers", 'if place.path.count(".") == 2]', "]"),
        (
            "grafts: a segment bounds what stays",
            "if isinstance(self.memory, RecurrenceSpec | CompressiveSpec):",
            "if False:",
        ),
        ("grafts: a gate that is half open", 'if self.memory.gate == "zero":', "if True:"),
        (
            "grafts: one memory alone",
            "if place.path in chosen:\n                    raise",
            "if False:\n                    raise",
        ),
    ],
    "surgery/encoders.py": [
        (
            "encoders: behind the attention",
            'return with_step(place, "cross", op, step.name)',
            'return with_step(place, "cross", op, None)',
        ),
        ("encoders: key heads", '"key_heads": own.key_heads', '"key_heads": own.heads'),
        (
            "encoders: the table of the other",
            "f\"stem.{name.removeprefix('embedding.')}\" if spec.stem is None else None",
            "None",
        ),
        ("encoders: the type of this model", 'Made((was,), "", typed, dtype)', 'Made((was,), "", Tensor.clone)'),
        ("encoders: a fresh one in both directions", 'return read(stack, "bidirectional")', "return stack"),
        ("encoders: a width that differs", "if other.spec.width != spec.width:", "if False:"),
        ("encoders: tokens that differ", "if same_size and other.same_tokens is False:", "if False:"),
    ],
    "surgery/reading.py": [
        ("reading: as far ahead as back", "pattern.replace(ahead=back - 1)", "pattern.replace(ahead=back)"),
        (
            "reading: blocks ahead",
            "pattern.replace(ahead=back)\n        case Everything",
            "pattern\n        case Everything",
        ),
        ("reading: a window has no limit ahead", "Causal() & pattern.replace(ahead=None)", "Causal() & pattern"),
        ("reading: the head goes", 'drop = self.head == "drop"', "drop = False"),
        ("reading: whether it leads back", "returns = not drop and", "returns ="),
        ("reading: places of keys alone", "and stack.score_bias.rounded:", "and False:"),
    ],
    "surgery/merging.py": [
        ("merge: equal models to the bit", "one - x[0] for one in x[1:]", "one for one in x[1:]"),
        ("merge: shares sum to 1", "[one / sum(w) for one in w[1:]]", "w[1:]"),
        (
            "merge: the angle of directions",
            "one, other = a / size[0].clamp(min=1e-30), b / size[1].clamp(min=1e-30)",
            "one, other = a, b",
        ),
        (
            "merge: a straight line where there is no arc",
            "curved = (sine > 1e-6) & (size[0] > 0) & (size[1] > 0)",
            "curved = sine >= 0",
        ),
        ("merge: the part of the arc", "w[1] / sum(w))", "w[0] / sum(w))"),
        ("merge: an expert by itself", "rows = own.shape[0] if apart else 1", "rows = 1"),
        ("merge: the scale of changes", "base + self.scale * self._change", "base + self._change"),
        ("ties: the largest", "change.abs().topk(", "change.topk("),
        ("ties: the elected sign", "(one.sign() == sign) & (sign != 0)", "(one.sign() != 0)"),
        ("ties: the mean of those that agree", "torch.where(share > 0, total / share.clamp(min=1e-30), 0.0)", "total"),
        ("dare: what is dropped is made up for", "kept.to(changes[i].device) / density", "kept.to(changes[i].device)"),
        ("dare: each model by itself", 'f"{model.source}:{name}"', "name"),
        ("merge: another spec", "    if differing:\n", "    if False:\n"),
        ("merge: other tokens", "    if other.same_tokens is False:\n", "    if False:\n"),
        (
            "merge: what no weight depends on",
            'FREE = ("initial", "special", "context", "embedding.padding")',
            'FREE = ("initial",)',
        ),
    ],
    "surgery/mixture.py": [
        (
            "mixture: the model's own network first",
            "torch.stack([first, *(other.to(first.dtype) for other in others)])",
            "torch.stack([*(other.to(first.dtype) for other in others), first])",
        ),
        ("mixture: how many a token uses", "chosen=self.chosen), expert=part)", "chosen=2), expert=part)"),
        ("mixture: the same spec", "check_same(source, other, spec)", "pass"),
    ],
    "surgery/adapter.py": [
        ("adapter: its scale", "lora_b, float(scale))", "lora_b, 1.0)"),
        ("adapter: layers that are not there", "if shapes.get(name) != change:", "if False:"),
    ],
}
