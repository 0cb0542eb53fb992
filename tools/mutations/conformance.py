"""Features of `conformance/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "conformance/retrieval.py": ("tests/test_families_retro.py",),
    "conformance/ours.py": ("tests/conformance/test_rows.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "conformance/retrieval.py": [
        ("verify: neighbours too early", "early = max(early, gap(ours[:, :first], before[:, :first]))", "pass"),
        ("verify: gates at zero", "if unmoved and", "if False and"),
    ],
    "conformance/state.py": [
        ("verify: what sticks after a short text", "    subject.read(random_ids(subject, 2, 3, seed=3))\n", ""),
        (
            "verify: what sticks after a long text",
            "subject.read(random_ids(subject, 1, facts.context + 8))",
            "subject.read(random_ids(subject, 1, 8))",
        ),
        ("verify: attention that is not given", "float(max(layers - len(given), 0))", "0.0"),
        ("verify: None for attention", "[weights for weights in shown if weights is not None]", "shown"),
    ],
    "conformance/tokens.py": [
        ("verify: order of rows", "torch.tensor([2, 0, 3, 1])", "torch.tensor([0, 1, 2, 3])"),
        (
            "verify: packed with a mask of ones",
            '(" and a mask of ones", torch.ones_like(ids), "")',
            '(" and a mask of ones", None, "")',
        ),
        ("verify: packed with a cache", "cache = subject.new_cache(kind, 1, length) if kind else None", "cache = None"),
        ("verify: positions ignored", "float(ignored)", "0.0"),
        ("verify: NaN in padding", "math.nan) if here", "0.0) if here"),
        (
            "verify: NaN in padding, not in the source",
            "here = given[0].shape == ids.shape and torch.equal(given[0], ids)",
            "here = given[0].shape == ids.shape",
        ),
    ],
    "conformance/decoding.py": [
        (
            "verify: every cut",
            "*([at, length - at] for at in range(1, length))",
            "*([at, length - at] for at in (1, 2))",
        ),
        (
            "verify: beyond the trained length",
            "ids, worst = random_ids(subject, 1, context + 8), Difference()",
            "ids, worst = random_ids(subject, 1, context), Difference()",
        ),
        (
            "verify: beams without a cache",
            "cached=cached) for cached in (True, False)",
            "cached=True) for cached in (True, False)",
        ),
        ("verify: generation between two", "    subject.generate(random_ids(subject, 3, 3, seed=5), 2, beams=2)\n", ""),
    ],
    "conformance/learning.py": [
        ("verify: a router's loss is absent", "float(found is None)", "0.0"),
        ("verify: padding in a router's loss", "mask[:, -5:] = 0", "mask[:, -5:] = 1"),
        ("verify: training goes on", "gap(p.detach(), again[n].detach())", "0.0 * gap(p.detach(), again[n].detach())"),
    ],
    "conformance/files.py": [
        (
            "verify: a cast rounds weights only",
            "ours = read(copy.deepcopy(subject.model).to(torch.bfloat16).to(dtype))",
            "ours = read(_rounded(copy.deepcopy(subject.model)))",
        ),
        ("verify: a parameter read otherwise", "n not in theirs or not same_bits(p, theirs[n])", "n not in theirs"),
        ("verify: ties", "len(_tied(subject.model) ^ _tied(again))", "0"),
    ],
    "conformance/refusals.py": [
        (
            "verify: what is accepted",
            'yield Row(name, WRONG, None, None, "fails", f"it was accepted{note}")',
            'yield Row(name, WRONG, None, None, "holds", f"it was accepted{note}")',
        ),
        ("verify: a long refusal", "max((longest, said), (len(str(error)), what))", "(longest, said)"),
    ],
    "conformance/ours.py": [
        (
            "verify: an optimizer that is forgotten",
            "optimizer.load_state_dict(torch.load(folder",
            "(lambda state: None)(torch.load(folder",
        ),
    ],
    "conformance/pretrained.py": [
        ("verify: where positions begin", "dict.fromkeys((0, 2, offset))", "dict.fromkeys((0, 2))"),
        ("verify: places after padding's", "plain.context and plain.context - (first or 0)", "plain.context"),
        (
            "verify: the mask of earlier columns",
            "before = ids.new_ones(ids.shape[0], self.length) if self.mask is None else self.mask",
            "before = ids.new_ones(ids.shape[0], self.length)",
        ),
        ("verify: the backend of before", "self.model.set_attn_implementation(before)", "pass"),
    ],
}
