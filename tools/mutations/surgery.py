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
        ("latent: what turns is taken out", "key = key - up.flatten(0, 1) @ shared", "key = key + 0"),
        (
            "latent: a bias of queries",
            'made[place.weight("q_down.bias")] = Made((bias,), "the queries", lambda x: x)',
            'made[place.weight("q_down.bias")] = Made((bias,), "the queries", lambda x: 0 * x)',
        ),
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
            "generator=generator(path, self.seed)",
            "generator=generator(path + name, self.seed)",
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
