"""Features of `train/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "train/past.py": ("tests/cli/test_runs.py",),
    "train/loader.py": (
        "tests/train/test_loop.py::test_rows_of_a_length_are_read_together",
        "tests/train/test_ranks.py::test_rows_of_a_forward_that_nobody_has_said",
    ),
    "train/saving.py": ("tests/train/test_ranks.py",),
    "train/building.py": ("tests/train/test_healing.py",),
    "train/around.py": ("tests/train/test_healing.py",),
    "train/evaluating.py": ("tests/train/test_healing.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "train/building.py": [
        (
            "adapter: a run knows its model again",
            "digest.update(weight.detach()",
            "(lambda data: None)(weight.detach()",
        ),
        (
            "adapter: frozen matrices have no gradients",
            "2 * account(architecture, 1, length).flops_prefill // length",
            "account(architecture, 1, length).flops_train_per_token",
        ),
        ("flops: what is frozen", "length, trained=names)", "length)"),
        ("flops: a teacher's forward", "total += account(task", "total += 0 * account(task"),
        (
            "building: special tokens of a size",
            '"vocabulary": data.vocabulary, **_special(data)}',
            '"vocabulary": data.vocabulary}',
        ),
        ("building: the vocabulary of a size", '"vocabulary": data.vocabulary, ', ""),
        (
            "healing: what has been trained cannot be undone",
            '"why": "trained"}], "undo": None}',
            '"why": "trained"}]} | history[-1]',
        ),
        ("healing: changed weights alone", "if spec.model.unfreeze is None else _changed(model)", ""),
        ("building: what a decoder begins with", "Fields(_begun(config), where=", "Fields(config, where="),
        ("building: a decoder's own beginning", '"decoder_start_token_id" in config', "False"),
        (
            "building: prompts of an encoder",
            "if spec.evaluation.prompts and (model.decoder is None",
            "if False and (model.decoder is None",
        ),
    ],
    "train/checkpoint.py": [
        ("checkpoint: old ones go only once the new one is there", "            _forget(directory, keep)\n", ""),
        ("checkpoint: keep-last-k", "_complete(directory)[keep:]", "_complete(directory)[keep + 1 :]"),
        ("checkpoint: a name first, then its files", "os.rename(path, aside)", "aside = path"),
        (
            "checkpoint: what a dead saver left",
            "                remove(path)\n        yield",
            "                pass\n        yield",
        ),
        ("checkpoint: savers take turns", "fcntl.flock(handle, fcntl.LOCK_EX)", "pass"),
        ("checkpoint: room is asked before", "if free < ROOM * needed:", "if False:"),
        ("checkpoint: a failed save leaves nothing", "                remove(temporary)\n", "                pass\n"),
        ("checkpoint: latest", 'write_file(directory / LATEST, f"{target.name}\\n".encode())', "pass"),
        ("checkpoint: newest by saving", "key=lambda pair: pair[1].serial", "key=lambda pair: pair[1].step"),
        ("checkpoint: verify on the way back", "            read(path, verify)\n", "            read(path)\n"),
        ("checkpoint: older damage is of no interest", "if step_of(other) > step_of(path)", ""),
        ("checkpoint: written aside", 'f".tmp-step-{step}-{secrets.token_hex(8)}"', 'f"step-{step}"'),
    ],
    "train/curves.py": [
        ("curves: the logarithmic axis", "math.log(max(each, 1)) if logarithmic else each", "each"),
        (
            "curves: no spike is lost",
            "min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])",
            "part[0], part[-1]",
        ),
        (
            "curves: what is not finite is marked",
            '    shapes += [\n        f\'<path class="lost"',
            '    [\n        f\'<path class="lost"',
        ),
        (
            "curves: what a user wrote is text",
            '    title = f"<title>{escape(line.name)}',
            '    title = f"<title>{line.name}',
        ),
        ("curves: the legend is text", "/></svg>{escape(line.name)}</li>", "/></svg>{line.name}</li>"),
        (
            "curves: room for long labels",
            "left = max(LEFT, 16 + LETTER * max(map(len, labels.values())))",
            "left = LEFT",
        ),
    ],
    "train/around.py": [
        ("healing: another goal goes on", "bool(until) and progress.reached == until", "bool(progress.reached)"),
    ],
    "train/evaluating.py": [
        ("healing: no higher than the goal", "[name] <= goal for", "[name] >= goal for"),
        ("training: a pair answers its prompt", 'yield f"{prompt} -> {text}" if pair else text', "yield text"),
    ],
    "train/finite.py": [
        ("finite: the loss", "math.isfinite(loss) and math.isfinite(norm)", "math.isfinite(norm)"),
        ("finite: the norm", "math.isfinite(loss) and math.isfinite(norm)", "math.isfinite(loss)"),
        ("finite: bounded", "if self.skipped > self.most:", "if False:"),
        (
            "finite: the first part, not the last",
            "if bad is not None and not found:",
            "if bad is not None:\n                found.clear()",
        ),
        ("finite: hooks go", "            handle.remove()\n", "            pass\n"),
        ("finite: gradients", "if gradient is not None and not", "if gradient is not None and False and not"),
    ],
    "train/fitting.py": [
        ("fitting: the same batch", "self.times * part", "self.times * 2"),
        ("fitting: only what was asked for", "if tried != fit and not auto:", "if False:"),
        ("fitting: other errors pass", "if not out_of_memory(error):", "if False:"),
    ],
    "train/generators.py": [
        (
            "generators: python",
            '    random.setstate((python["version"], tuple(python["state"]), python["gauss"]))\n',
            "",
        ),
        ("generators: python's second normal number", 'python["gauss"]))', "None))"),
        ("generators: numpy's second normal number", 'numpy["has_gauss"], numpy["cached"]', "0, 0.0"),
        ("generators: torch", '    torch.set_rng_state(_tensor(saved["torch"]))\n', ""),
    ],
    "train/guards.py": [
        ("signals: a second one stops at once", "elif self.signal is None:", "elif True:"),
        ("signals: the status", "128 + self.signal", "self.signal"),
        (
            "signals: stopping is not undone by saving",
            'if self.asked == "save":\n            self.asked',
            "if True:\n            self.asked",
        ),
        ("signals: as they were afterwards", "            signal.signal(number, handler)\n", "            pass\n"),
        ("spikes: noise is none", "max(self.factor * spread, 0.1 * abs(middle))", "0.1 * abs(middle)"),
        ("spikes: constant losses", "max(self.factor * spread, 0.1 * abs(middle))", "self.factor * spread"),
        ("watchdog: a step resets it", "said = max(said, self._beat)", "pass"),
        ("watchdog: stacks", "                faulthandler.dump_traceback(file, all_threads=True)\n", ""),
    ],
    "train/loader.py": [
        (
            "loader: rows of a length together",
            "        rows.sort(key=lambda row: sum(one.size for one in row.values()))",
            "       ",
        ),
        ("a pipeline: a micro-batch for each stage", "most = 1 if together else spec.mesh.pipeline", "most = 1"),
        (
            "a pipeline: equal micro-batches",
            "for count in range(1, most + 1) if share % count == 0",
            "for count in [most]",
        ),
        ("a pipeline: rows that are told apart", "isinstance(spec.objective, Contrastive) or", "False or"),
        (
            "a pipeline: rows that are balanced",
            "isinstance(part, RouterLossSpec | CapacitySpec | ExpertChoiceSpec) for",
            "False for",
        ),
    ],
    "train/loop.py": [
        ("adapter: checkpoints hold it alone", "        if self.adapts:\n", "        if False:\n"),
        ("adapter: the balance of experts stays", "self.balances = not self.adapts and any(", "self.balances = any("),
        ("loop: rows read twice", "if one.grad is not None and one.grad.is_sparse:", "if False:"),
        ("loop: sparse rows only alone in float32", "self.ranks.world == 1 and self.masters is None", "True"),
    ],
    "train/manifest.py": [
        ("manifest: sizes", "if found != size:", "if False:"),
        ("manifest: hashes", "if verify and (hashed", "if False and (hashed"),
        (
            "manifest: its own hash",
            "if version != VERSION or found != ",
            "if version != VERSION or found is None and found != ",
        ),
        ("manifest: a newer format", "version > VERSION", "False"),
        ("manifest: names stay below", 'part in ("", ".", "..")', "False"),
        ("manifest: the folder's step", "if manifest.step != ", "if False and manifest.step != "),
    ],
    "train/metrics.py": [
        ("metrics: never waits", "self._queue.put_nowait(dict(record))", "self._queue.put(dict(record))"),
        ("metrics: a failing adapter", "except (Exception, SystemExit) as error:", "except KeyError as error:"),
        (
            "metrics: said once",
            "        if self.failed is None:\n            self.failed = line",
            "        if True:\n            self.failed = line",
        ),
        ("metrics: the end waits no longer", "self._thread.join(patience)", "self._thread.join()"),
        ("metrics: the own file first", "        self._own(record)\n", ""),
        ("metrics: steps are no figures", ' and key != "step"', ""),
    ],
    "train/optimiser.py": [
        ("optimiser: values without decay", "and sparse and not decay else", "and sparse else"),
        ("optimiser: values by rows", ".sparse = which == ROWS", ".sparse = False and which == ROWS"),
        ("optimiser: adafactor's values", "sparse = sparse and not isinstance(spec, Adafactor)", "pass"),
        ("optimiser: steps of SparseAdam", "[what] = int(value)", "[what] = int(value) + 1"),
    ],
    "train/past.py": [
        ("past: a best that is finite", "if math.isfinite(point[1]))", "if True)"),
        ("past: what differs", "if any(value != each[0] for value in each)", ""),
        ("past: references without end", "isinstance(event, yaml.AliasEvent)", "False"),
        ("past: dates", "default=str", "default=repr"),
    ],
    "train/ranks.py": [
        (
            "ranks: losses of a pipeline",
            "return figures if self.whole else json.loads",
            "return figures if True else json.loads",
        ),
        ("ranks: names of all stages", "tensors = tensors if self.whole else self.mesh.listed(tensors)", "pass"),
    ],
    "train/records.py": [
        ("records: cut back after the step", 'record["step"] > step)', 'record["step"] >= step)'),
        ("records: a line that is cut off", 'if removed or not line.endswith(b"\\n") or', "if removed or"),
        (
            "records: what is not finite is text",
            "repr(value) if isinstance(value, float) and not math.isfinite(value) else value",
            "value",
        ),
        (
            "records: a step is a whole number",
            "isinstance(step, int) and not isinstance(step, bool)",
            "step is not None",
        ),
        ("records: means of what is finite", "if math.isfinite(value):", "if True:"),
    ],
    "train/precision.py": [
        ("frozen weights are written as they were", "self.frozen.get(name, weight.float())", "weight.float()"),
        (
            "frozen weights are written in float32",
            "self.frozen.get(name, weight.float())",
            "self.frozen.get(name, weight)",
        ),
    ],
    "train/report.py": [
        ("report: samples are text", '{escape(sample["sample"])}', '{sample["sample"]}'),
        ("report: the configuration is text", "{escape(run.config)}", "{run.config}"),
        ("report: warnings are text", "<li>{escape(line)}</li>", "<li>{line}</li>"),
        ("report: tables are text", '<th scope="row">{escape(row[0])}</th>', '<th scope="row">{row[0]}</th>'),
        ("report: compute", "cost.flops_train_per_token * summary", "cost.flops_per_token * summary"),
        (
            "train/report: an encoder writes no text",
            "spec is None or (spec.decoder is not None",
            "True or (spec.decoder is not None",
        ),
    ],
    "train/run.py": [
        ("run: one owner", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ("run: not into an old one", "if there and not resume:", "if False:"),
        ("run: a directory that has gone", "if here is None or (", "if False and ("),
        ("run: another in its place", "self.close()\n            self._open()", "self.directory.mkdir(exist_ok=True)"),
        ("run: every record at once", '"ab", buffering=0)  # noqa: SIM115  closed', '"ab")  # noqa: SIM115  closed'),
        (
            "run: a voice that is lost",
            "except (OSError, ValueError) as error:  # a broken",
            "except KeyError as error:  # a broken",
        ),
        ("run: git's changes", "bool(changed)}", "False}"),
        (
            "run: each sample has its file",
            'name = f"step-{step}-{number + 1}.txt" if number else',
            'name = f"step-{step}.txt" if number else',
        ),
    ],
    "train/saving.py": [
        (
            "parts: which place a tensor is for",
            "names[id(like)]: place for place, like in pairs",
            "names[id(pairs[0][1])]: place for place, like in pairs",
        ),
        ("adapter: is folded into what ranks write", "whole if model.adapter is None else", "whole if True else"),
    ],
    "train/sums.py": [
        (
            "each kind of label by its own count",
            "one.total * one.weight / max(asked[kind], 1.0)",
            "one.total * one.weight / max(sum(asked.values()), 1.0)",
        ),
        ("figures by their own count", "value / max(asked[name[0]], 1.0)", "value / max(sum(asked.values()), 1.0)"),
    ],
    "train/trees.py": [
        ("trees: tuples", 'return items if isinstance(value, list) else {"$tuple": items}', "return items"),
        ("trees: two paths that read the same", "while name in tensors:", "while False:"),
        ("trees: keys that are no text", "isinstance(key, str) and ", "True and "),
        ("trees: keys that look like ours", ' and not key.startswith("$")', ""),
        ("trees: copies, not views", 'torch.clone(read(rest["$tensor"]))', 'read(rest["$tensor"])'),
        ("trees: what is not finite", "and not math.isfinite(value)", "and False"),
    ],
}
