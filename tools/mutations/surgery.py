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
        ("retrofit: key heads", "key_heads=own.key_heads", "key_heads=own.heads"),
        ("retrofit: the encoder's first table", 'if "embedding.weight" not in state or made', "if True or made"),
        (
            "retrofit: the table is a copy",
            'of the table of tokens", Tensor.clone)',
            'of the table of tokens", Tensor.detach)',
        ),
        ("retrofit: where by default", "range(5, len(stack.layers), 3)", "range(6, len(stack.layers), 3)"),
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
