"""Features of `generation/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "generation/feeder.py": ("tests/test_encoder_decoder.py", "tests/test_families_led.py"),
    "generation/limits.py": ("tests/generation/test_loop.py", "tests/test_families_whisper.py"),
    "generation/perplexity.py": ("tests/generation/test_continuations.py",),
    "generation/text.py": ("tests/generation/test_continuations.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "generation/beam.py": [
        ("the ends of the best alone are kept", "each[:, :beams] for each in", "each for each in"),
        (
            "length of a score: the end counts",
            "beams, length = self.beaming.beams, count + 1",
            "beams, length = self.beaming.beams, max(count, 1)",
        ),
        (
            "length penalty of what has ended",
            "new = (values / length**self.beaming.length_penalty)",
            "new = (values / length)",
        ),
        (
            "length penalty of what may come",
            "return running / length**self.beaming.length_penalty > worst",
            "return running / length > worst",
        ),
        ("early stopping", "if self.beaming.early_stopping is True:", "if False:"),
        ("never: the length that suits best", "length = most", "pass"),
        ("never: which length suits best", "and self.beaming.length_penalty > 0:", "and True:"),
        ("a text that is done takes no more", "ends & searching[:, None], count", "ends, count"),
        ("done for good", "searching &= ended", "searching = ended"),
        ("what has ended goes on no more", "values.masked_fill(ends, -torch.inf).topk", "values.topk"),
        ("the last step ends all", " | (count + 1 == room)", ""),
        (
            "parents: of the text",
            "rows = parent + torch.arange(texts, device=device)[:, None] * written.shape[1]",
            "rows = parent",
        ),
        (
            "parents: the cache",
            "feeder.reorder(rows.flatten(), alike)",
            "feeder.reorder(rows.flatten().sort().values, alike)",
        ),
        (
            "parents: what was written",
            "written.gather(1, parent[:, :, None]",
            "written.gather(1, parent.sort().values[:, :, None]",
        ),
        (
            "columns that are alike",
            "alike = feeder.begun + _alike(written[:, :, :count])",
            "alike = feeder.begun + count",
        ),
        (
            "columns that are alike, of every text",
            "same = (written == written[:, :1]).flatten(0, 1).all(dim=0)",
            "same = (written == written[:, :1])[0].all(dim=0)",
        ),
        ("columns that are alike, up to the first that is not", "cumprod(dim=0).sum()", "sum()"),
        ("ids that are held back", "if held_back := limits.held_back(count):", "if held_back := []:"),
        ("what is held back takes its probability along", "logits.logsumexp(dim=1)", "logits[:, 5:].logsumexp(dim=1)"),
        ("log-probabilities add up", "before = scores - logits", "before = -logits"),
        ("forced tokens", "if forced is not None:", "if False:"),
        ("candidates are left when all that can have ended", "most = beams * (1 + len(", "most = beams * (0 * len("),
        ("the short last chunk", "if whole < size:", "if False:"),
        (
            "the short last chunk is no longer than it is",
            "inside.masked_fill(beyond, -torch.inf).flatten(1)",
            "inside.flatten(1)",
        ),
        ("stop sequences", "begins.gather(1, parent)", "begins[:, :1]"),
        ("stop sequences: their beginning", "(token == last) & begins.gather(1, parent)", "token == last"),
        ("stop sequences: in what is new", "if len(first) <= count:", "if True:"),
        ("end ids", "ends |= token == end", "pass"),
        ("the best", "self.ids[:, :best, : int", "self.ids[:, -best:, : int"),
        ("no longer than needed", ", : int(lengths.max())]", "]"),
        ("the prompt of each", "begun.repeat_interleave(beaming.best, dim=0)", "begun.repeat(beaming.best, 1)"),
        ("prompt read once", "written = torch.full((texts, 1, room)", "written = torch.full((texts, 2, room)"),
        ("the compiled step keeps one row", ", engine=False", ""),
        ("sampling beside beams", 'raise LaminaError(f"{field.name}=', 'pass; (f"{field.name}='),
        ("the context", "warn_of_context(model, room, limits)", "pass"),
        ("weights that are not finite", "check_finite(logits, count)", "pass"),
    ],
    "generation/continuations.py": [
        ("continuations: the last token is not read", "row = (*before, *after[:-1])", "row = (*before, *after)"),
        ("continuations: alike rows are one", "rows.setdefault(row, [])", "rows.setdefault((*row, -index), [])"),
        ("continuations: before the padding", "hidden[row, lengths[row] - size : lengths[row]]", "hidden[row, -size:]"),
        ("continuations: all of it is greedy", "bool(best.all())", "bool(best.any())"),
        ("continuations: full is not too full", "len(row) > context", "len(row) >= context"),
    ],
    "generation/embed.py": [
        (
            "texts are read at few lengths",
            "rounded(max(map(len, rows)), model.spec.source_context)",
            "max(map(len, rows))",
        ),
        ("a length that the model reads", "max(min(up, most), length)", "up"),
        ("vectors of length 1 in 16 bits", "mean_of(hidden, mask)).float()", "mean_of(hidden, mask))"),
    ],
    "generation/feeder.py": [
        ("relative positions go on", 'cache == "sinks" or model.spec.two_stacks', 'cache == "sinks"'),
        ("learned positions end", "two_stacks) and not isinstance(position, LearnedPositionSpec)", "two_stacks)"),
        ("marks of the source", "model.encode(input_ids, mask, marked=marked)", "model.encode(input_ids, mask)"),
        ("marks of one stack", "elif marked is not None:", "elif False:"),
    ],
    "generation/limits.py": [
        ("the first is forced after the start id alone", "count == 0 and begun == 1 and", "count == 0 and"),
        ("ids that are never written", "*self.never, ", ""),
        ("ids that are not written first", "if count == 0 else ()), *(", "if False else ()), *("),
        ("the last is forced", "return self.last if count + 1 == self.most else None", "return None"),
    ],
    "generation/perplexity.py": [
        ("predicted: every part of the rows", "target[at : at + ROWS]", "target[:ROWS]"),
        ("ids are those of the model", "0 <= min(ids) <= max(ids) <", "0 <= min(ids) <="),
    ],
    "generation/retrieval.py": [
        ("retriever: the chunk that has ended", "- self.count[row] + number * m", "- self.count[row] + number * m - 1"),
        (
            "retriever: padding does not count",
            "mask.to(torch.int64).sum(dim=1)",
            "torch.full_like(ids[:, 0], ids.shape[1])",
        ),
        ("retriever: beams", "self.ids, self.count = self.ids[index], self.count[index]", "pass"),
        ("retriever: beams, without a cache", "None if self.all is None else self.all[index]", "self.all"),
        ("retriever: whose neighbours they are", "out[row, which] = found", "out[row, which] = found.flip(0)"),
        ("retriever: kept for reading anew", "self.all[row, number] = found", "pass"),
        ("retriever: shapes", "tuple(found.shape[:2]) != expected or", "False or"),
    ],
    "generation/text.py": [
        (
            "texts at once: padding is a hole",
            "stream(model, ids, mask, sampling=Sampling()",
            "stream(model, ids, None, sampling=Sampling()",
        ),
        (
            "texts at once: a stop text ends the work",
            "if over[row] or cuts[row].stopped_by is not None:",
            "if over[row]:",
        ),
        ("texts at once: an end ends a row", "if over[row] or cuts", "if cuts"),
        ("texts at once: the tokenizer's end", "stop=() if tokenizer.eos is None else (tokenizer.eos,)", "stop=()"),
        ("texts at once: what was held back", "    for cut in cuts:\n        cut.flush()\n", ""),
        ("the first stop text cuts", "end, self.stopped_by = min(found)", "end, self.stopped_by = max(found)"),
        ("beams: the length of each", "new = row[begun : begun + length]", "new = row[begun:]"),
    ],
}
