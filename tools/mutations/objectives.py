"""Features of `objectives/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "objectives/distillation.py": ("tests/parallel/test_state.py",),
    "objectives/loss.py": ("tests/train/test_loss.py",),
    "objectives/objective.py": ("tests/objectives/test_parity.py", "tests/objectives/test_masked.py"),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "objectives/boundaries.py": [
        ("word starts: special tokens", "begin | (tokenizer.control & names.keys())", "begin"),
        ("what stands around a text", "np.array(whole[:at], np.int64)", "np.array(whole[:0], np.int64)"),
    ],
    "objectives/causal.py": [
        (
            "packed: rows that are not full",
            "(documents[:, :-1] >= 0).to(torch.int64)",
            "(documents[:, :-1] >= -1).to(torch.int64)",
        ),
        ("packed: nothing asked of padding", "labels.masked_fill(documents[:, 1:] < 0, IGNORE)", "labels"),
        ("packed: rows of whole documents", "if self.packed:", "if False:"),
    ],
    "objectives/contrastive.py": [
        ("contrastive: temperature", "cosine / self.temperature, labels", "cosine, labels"),
        (
            "contrastive: length 1",
            "F.normalize(mean_of(hidden, mask).float(), dim=-1)",
            "mean_of(hidden, mask).float()",
        ),
        ("contrastive: both ways", "if self.symmetric:", "if False:"),
    ],
    "objectives/denoising.py": [
        ("denoising: the last span is trimmed", "drawn[-1] -= total[count - 1] - words", "pass"),
        (
            "denoising: spans end with their words",
            "np.minimum(chosen + some, len(first))",
            "np.minimum(chosen + some + 1, len(first))",
        ),
        ("denoising: spans of no word are put in", "min(len(lengths) - len(some), len(tokens) - len(read))", "0"),
        ("denoising: what ends nowhere stays", "for number in order), sentences[-1]])", "for number in order)])"),
        ("denoising: a share of the sentences", "[: math.ceil(len(ends) * share)]", ""),
        (
            "denoising: Poisson",
            "random.poisson(mean, size=max(words, 1))",
            "random.integers(int(2 * mean) + 1, size=max(words, 1))",
        ),
    ],
    "objectives/distillation.py": [
        ("distillation: T squared", "alpha=temperature**2", "alpha=temperature"),
        ("distillation: its gradient", "(found.exp() - target.exp()) * temperature", "(found.exp() - target.exp())"),
        ("distillation: mix", "weight=(1 - mix) * one.weight", "weight=one.weight"),
        (
            "distillation: the teacher is in evaluation",
            "teacher.eval().requires_grad_(False)",
            "teacher.train().requires_grad_(False)",
        ),
        ("distillation: one vocabulary", "if theirs != own:", "if False:"),
        ("distillation: the teacher's softcap and bias", "head.finish(part.to(scores.dtype))", "part.to(scores.dtype)"),
        ("distillation: parts of a vocabulary are gathered", "if type(own.data) is not Tensor:", "if False:"),
        ("distillation: T squared, gathered", "return temperature**2 * F.kl_div(", "return F.kl_div("),
    ],
    "objectives/masked.py": [
        ("masks: 80 %", "draw < 0.8, mask", "draw < 0.85, mask"),
        ("masks: 10 % stay", "draw < 0.9, tokens", "draw < 0.95, tokens"),
        (
            "masks: special tokens are never chosen",
            "candidates = np.flatnonzero(free[tokens])",
            "candidates = np.arange(len(tokens))",
        ),
        ("masks: special tokens count", "round(self.rate * len(tokens))", "round(self.rate * (len(tokens) - 2))"),
        ("masks: at most", "min(count, self.most)", "count"),
        ("masks: whole words", "if begins is None:", "if True:"),
        ("masks: a word that is too long is passed over", "if sizes[one] <= count:", "if True:"),
        ("masks: a special token ends a word", "begins[candidates] | apart", "begins[candidates]"),
        ("pairs of segments: the second one's number", ">= len(first) + 2", ">= len(first) + 1"),
        ("rows of sentences: one separator", "body[:-1] if len(body) > 1 and body[-1] == sep else body", "body"),
    ],
    "objectives/next_sentence.py": [
        ("next sentence: half of the pairs", "bool(random.random() < 0.5)", "bool(random.random() < 0.7)"),
        ("next sentence: a chunk of one sentence has none", "other = split == stop or bool", "other = bool"),
        ("next sentence: another document", "document += 1 + int(", "document += 0 * int("),
        ("next sentence: what is unused is put back", "first = np.where(other, split, stop)", "first = stop"),
        ("next sentence: shorter pairs", "if random.random() < self.short else self.room", "if False else self.room"),
        ("next sentence: the longer one loses", "(uneven if difference > 0 else 0)", "0"),
        ("next sentence: the second one loses first", "+ left // 2", "+ (left + 1) // 2"),
        ("next sentence: front and end", "random.binomial(lost, 0.5)", "random.binomial(lost, 0.9)"),
    ],
    "objectives/objective.py": [
        ("pairs: the decoder reads one place later", "np.concatenate([[START], row[:-1]])", "row.copy()"),
        ("pairs: each target has its start", "read[1:][of[1:] != of[:-1]] = START", "pass"),
        ("pairs: documents of packed rows", "if any(one[-1] for one in of_sources):", "if False:"),
        ("batches: padding of the source", 'inputs[f"{side}attention_mask"] = mask', "pass"),
        ("labels that the head lacks", "if labels.numel() and int(labels.max()) >= logits.shape[-1]:", "if False:"),
    ],
    "objectives/prefix.py": [
        ("prefix: what is asked", "column < prefix - 1, IGNORE", "column < prefix, IGNORE"),
        ("prefix: what is marked", '"marked": column < prefix', '"marked": column < prefix - 1'),
        ("prefix: any length", "random.integers(1, size)", "random.integers(2, size)"),
    ],
    "objectives/retrieval.py": [
        ("neighbours: of the chunks that are read", "np.minimum(np.cumsum(sizes), length) -", "np.cumsum(sizes) -"),
        (
            "neighbours: of a piece within its document",
            "(pieces[which] - begins[document]) // chunk + serial",
            "serial",
        ),
        ("neighbours: not of the document after it", "np.where(number < starts[document + 1], number, -1)", "number"),
        ("neighbours: chunks of one length", "if spec.retrieval.chunk != self.chunk:", "if False:"),
        ("neighbours: of another text", "if len(starts) != len(begins):", "if False:"),
    ],
    "objectives/rows.py": [
        ("rows: an end is said once", "prepared.end if self.ended else None", "None"),
        ("rows: what is too long is refused", 'if longer == "refuse" and long.any():', "if False:"),
        ("rows: what is too long is skipped", 'if longer == "skip" else', "if False else"),
        ("rows: what is too long is cut", "self.bodies.document(index)[: self.room]", "self.bodies.document(index)"),
    ],
    "objectives/spans.py": [
        (
            "spans: a row ends with one",
            "lengths[1::2] = composition(noise, spans, random)",
            "lengths[1::2] = composition(noise, spans, random)[::-1] * 0 + 1",
        ),
        (
            "spans: compositions are uniform",
            "random.permutation(total - 1)[: parts - 1]",
            "np.arange(total - 1)[: parts - 1]",
        ),
        ("spans: an end token", "+ spans + 1 > length", "+ spans > length"),
        ("spans: sentinels in order", "sentinels[np.maximum(number, 0)]", "sentinels[np.maximum(number, 0) * 0]"),
        ("spans: at least one token", "max(round(tokens * self.rate), 1)", "round(tokens * self.rate)"),
    ],
    "objectives/stream.py": [
        ("streams: the ends of documents are left out", "if self.ended and last > first:", "if False:"),
        ("streams: where documents end", "stop + last * self.ended", "stop + first * self.ended"),
        ("sentences: a document begins anew", "previous[self.begins[low:high] - start] = False", "pass"),
        ("sentences: across blocks", "before = bool(found[-1])", "before = False"),
        ("sentences: one end for several full stops", "found & ~previous", "found"),
        ("sentences: the last one of a row", "np.concatenate([stops[:-1], [True]])", "stops"),
        ("rows: each measure", "firsts.append(min(fits))", "firsts.append(max(fits))"),
        ("rows: long pieces are cut", "if not len(sizes) or int(sizes.max()) <= room:", "if True:"),
    ],
}
