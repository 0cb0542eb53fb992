"""Features of `adapters/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "adapters/attach.py": [
        ("adapter: the base is frozen", "    model.requires_grad_(False)\n", ""),
        ("adapter: B begins at 0", "torch.zeros(layer.out_features", "torch.ones(layer.out_features"),
        ("adapter: A within 1 / sqrt(in)", "bound = 1 / math.sqrt(layer.in_features)", "bound = 1 / layer.in_features"),
        ("adapter: the seed", ".manual_seed(seed)", ".manual_seed(0)"),
        ("adapter: not two at once", "if model.adapter is not None:", "if False:"),
        ("adapter: what was trained is trained again", "weight.requires_grad_(name in model.adapter.thawed)", "pass"),
        ("adapter: an average stands for its parameter", "values.get(name, tensor)", "tensor"),
    ],
    "adapters/peft.py": [
        ("peft: only LoRA", 'if kind != "LORA":', "if False:"),
        ("peft: what is not plain is refused", "if name not in READ + SILENT and value", "if False and value"),
        ("peft: biases are refused", 'if config.get("bias", "none") != "none":', "if False:"),
        ("peft: a way of initialising that changes the base", "if way not in KEEPS_BASE:", "if False:"),
        ("peft: the alpha of a module", "value = one\n", "pass\n"),
        ("peft: the first pattern that fits counts", "in reversed(patterns.items())", "in patterns.items()"),
        ("peft: both factors", 'if found != {"A", "B"}:', "if False:"),
        ("peft: other tensors are refused", "        if match is None:\n", "        if match is None and False:\n"),
        ("peft: finite", "if not bool(torch.isfinite(factors[letter]).all()):", "if False:"),
        ("peft: shapes", "if tuple(found.shape) != shape:", "if False:"),
        ("peft: one layer under two names", "        if name in modules:\n", "        if False:\n"),
        ("peft: one A only where all are equal", "all(torch.equal(firsts[0], one) for one in firsts)", "True"),
        ("peft: one A only where all parts have one", "len(firsts) == len(parts) and all", "all"),
        ("peft: parts do not meet", "start += second.shape[1]", "start += 0"),
        (
            "peft: packed as the matrix is",
            "return torch.cat(firsts), place.outputs.save(whole)[0]",
            "return torch.cat(firsts), torch.cat(whole)",
        ),
        ("peft: the alpha of a larger rank", "(math.sqrt(rank) if spec.rslora else rank))", "rank)"),
        ("peft: short names only where all are meant", "if alike == {rank} else name", "if True else name"),
        ("peft: another base is said", "if isinstance(said, str) and said and source", "if False and said and source"),
        ("peft: the file's own words come back", "if file is not None and plan == dict(file.entries):", "if False:"),
        (
            "peft: the file's own names come back",
            "called(place.theirs) if file is None else",
            "called(place.theirs) if True else",
        ),
    ],
    "adapters/places.py": [
        (
            "adapter: not beside what is read whole",
            "isinstance(layer, nn.Linear) and child not in whole",
            "isinstance(layer, nn.Linear)",
        ),
        ("adapter: by default only in attention", "if name.startswith(tuple(inside))", "if True"),
        ("adapter: the file's names are targets", " | {place.theirs: place.ours for place in table}", ""),
        ("adapter: targets are whole parts", 'f".{name}.".endswith(f".{target}.")', "name.endswith(target)"),
    ],
    "adapters/spec.py": [
        ("adapter: rslora", "(math.sqrt(rank) if rslora else rank)", "rank"),
        ("adapter: dropout below 1", "if not 0 <= self.dropout < 1:", "if not 0 <= self.dropout <= 1:"),
    ],
}
