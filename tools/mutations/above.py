"""Features of the files above the rooms, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

THROUGH_MODELS = (
    "tests/test_encoder_decoder.py",
    "tests/test_families_bart.py",
    "tests/test_families_led.py",
    "tests/layers/test_convolution.py",
    "tests/test_families_bigbird.py",
)
ALSO: dict[str, tuple[str, ...]] = {
    "accounting.py": ("tests/test_accounting.py::test_a_training_of_some_weights_costs_what_torch_counts",),
    "adapting.py": ("tests/adapters/test_peft.py",),
    "exporting.py": ("tests/test_families_t5.py", "tests/test_families_bigbird.py", "tests/test_families_bert.py"),
    "marks.py": ("tests/test_families_longformer.py", "tests/test_families_bigbird.py"),
    "model/given.py": THROUGH_MODELS,
    "model/model.py": THROUGH_MODELS,
    "model/spec.py": THROUGH_MODELS,
    "opening.py": ("tests/test_families_t5.py",),
    "reading.py": ("tests/test_model.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "accounting.py": [
        ("frozen: layers by what of them is trained", "own = inner.get(i, frozenset())", "own = frozenset[str]()"),
        ("frozen: layers by what lies below", "passed and i > 0)", "False)"),
        ("frozen: the first layer has nothing below", "passed and i > 0)", "passed)"),
        ("frozen: what is trained below", "passed |= bool(own)", "passed = bool(own)"),
        (
            "frozen: an encoder below",
            '    passed = False  # gradients come by\n    for name in ("encoder", "decoder"):\n',
            '    for name in ("encoder", "decoder"):\n        passed = False\n',
        ),
        ("frozen: names of the whole model", "{repeats[stack][int(number)][0]}", "{number}"),
        ("frozen: all of it", "if out.requires_grad:  # all may be frozen", "if True:"),
    ],
    "adapting.py": [
        ("adapter: a file without the base's prefix", 'f"{family.base}{name}"', "name"),
        ("adapter: a bare model's names", "base = _family(model).base if bare else", 'base = "" if bare else'),
        ("adapter: values in place of parameters", "        values=values,\n", ""),
    ],
    "exporting.py": [
        ("what is read is not written twice", "if twin in plan and chosen.unread(one)", "if twin in plan"),
        (
            "exporting: a head that was gained",
            "same = origin.spec == spec == chosen.spec(fields)",
            "same = model.spec == chosen.spec(fields)",
        ),
        (
            "exporting: the prefix of a new head",
            "if origin is not None and origin.spec == spec:",
            "if origin is not None:",
        ),
        ("exporting: names of other labels", "origin.spec.labels != spec.labels", "False"),
    ],
    "marks.py": [
        ("marks: the first of each document", "earlier(tokens.real, tokens.document) == 0", "tokens.position == 0"),
        ("marks: a question ends before its end", "& ~ends & (follows > 0)", "& (follows > 0)"),
        ("marks: no question", "& ~ends & (follows > 0)", "& ~ends"),
        ("marks: after an end, not it", "torch.where(some, before > 0,", "torch.where(some, before + ends > 0,"),
        ("marks: no end", "torch.where(some, before > 0, earlier(tokens.real, tokens.document) > 0)", "(before > 0)"),
        ("marks: ends in padding", "(ids == id) & tokens.real\n    before", "(ids == id)\n    before"),
        ("marks: a choice begins behind two separators", "return behind & (earlier(", "return behind | (earlier("),
        ("marks: padding is not behind one", "(earlier(behind & tokens.real,", "(earlier(behind,"),
        (
            "marks: padding is no separator",
            "behind = earlier((ids == self.id) & tokens.real,",
            "behind = earlier(ids == self.id,",
        ),
        ("marks: the last block", "ends = (before < self.size) | (", "ends = (before < self.size) & ("),
        ("marks: short texts", "return ends | (length <= self.short)", "return ends | (length < self.short)"),
        ("marks: padding", "self.mark(ids, tokens) & tokens.real", "self.mark(ids, tokens)"),
    ],
    "model/given.py": [
        (
            "a classifier's decoder: each text has its start",
            "begins[:, 1:] &= ~tokens.real[:, :-1] | (tokens.document[:, 1:] != tokens.document[:, :-1])",
            "begins[:, 1:] &= ~tokens.real[:, :-1]",
        ),
        ("a classifier's decoder: padding on the left", "&= ~tokens.real[:, :-1] |", "&="),
        ("a classifier's decoder: one place on", "ids.roll(1, dims=1)", "ids"),
    ],
    "model/model.py": [
        ("segments after a question", "token_type_ids = context.to(torch.int64)", "pass"),
        ("the first token may answer", "context |= FirstToken().mark(given.checked_ids(), tokens)", "pass"),
        ("pooled: the last real token", 'self.pooler.spec.token == "last"', "False"),
        (
            "padding of the source",
            "encoder_output, replace(source, ids=ids).read()",
            "encoder_output, replace(source, ids=ids, mask=None).read()",
        ),
        (
            "documents of the source",
            "x, tokens = self._embedded(source)",
            "x, tokens = self._embedded(replace(source, documents=None))",
        ),
        ("padding of frames", "self.stem(given.features, given.mask)", "self.stem(given.features, None)"),
        ("the source is kept", "cache.memory, cache.source = memory, source.content", "pass"),
        ("another source is refused", "not torch.equal(one, other)", "False"),
        ("frames of another source", "if size != tuple(held.shape[:2]) or", "if"),
        ("the narrow stack", "spec.width if first.input_width is None else first.input_width", "spec.width"),
        ("pooled: the first real token", "else real.argmax(dim=1)", "else 0 * real.argmax(dim=1)"),
        ("keep_logits", "hidden if keep_logits is None else hidden[:, hidden.shape[1] - keep_logits :]", "hidden"),
    ],
    "model/spec.py": [
        (
            "an encoder reads as far as its positions",
            "return position.size if isinstance",
            "return self.context if isinstance",
        ),
    ],
    "reading.py": [
        ("holes", "torch.where(real, position, HOLE)", "position"),
        ("positions go on from the cache", "torch.where(documents == document, before, 0)", "0"),
        ("another document starts at 0", "torch.where(documents == document, before, 0)", "before"),
        ("restarts begin a document", "documents = document + _restarts(real, position, before - 1)", "pass"),
        ("an equal position is a restart", "position <= previous", "position < previous"),
        ("padding is no restart", "(real & (position", "((position"),
        (
            "restart across chunks",
            "position.gather(1, latest.clamp(min=0)), last)",
            "position.gather(1, latest.clamp(min=0)), -1)",
        ),
        (
            "the last columns of a mask",
            "mask = mask[:, -ids.shape[1] :].bool()",
            "mask = mask[:, : ids.shape[1]].bool()",
        ),
        ("a mask of ones", "and bool(mask.all()):", "and False:"),
        (
            "plain goes on",
            "plain(batch, length, start=cache.length, device=ids.device)",
            "plain(batch, length, device=ids.device)",
        ),
        ("after padding", "position = cache.next_position + torch.arange", "position = cache.length + torch.arange"),
    ],
    "tokens.py": [
        ("padding before counts nothing", "which.gather(1, order).to(torch.int64)", "torch.ones_like(kind)"),
        (
            "documents count apart",
            "count = before - torch.where(starts, before, 0).cummax(dim=1).values",
            "count = before",
        ),
        (
            "documents alternate",
            "order = documents.argsort(dim=1, stable=True)",
            "order = torch.arange(documents.shape[1]).expand_as(documents)",
        ),
        ("a hole is no token", "return self.position >= 0", "return self.position >= HOLE"),
        ("spans join end to start", "first.span[1] == second.span[0]", "True"),
        ("a joined span covers both", "span = (first.span[0], second.span[1])", "span = first.span"),
        ("marks survive joining", "marked = torch.cat([_marks(first), _marks(second)], dim=1)", "marked = None"),
        (
            "positions start where told",
            "torch.arange(start, start + length, device=device)",
            "torch.arange(length, device=device)",
        ),
        ("marks of queries and keys", "None if self.marked is None else self.marked[:, None, :]", "None"),
    ],
}
