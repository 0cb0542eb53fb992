"""Features of `retrieve/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "retrieve/accelerator.py": ("tests/retrieve/test_accelerator.py",),  # needs faiss
    "retrieve/editing.py": ("tests/retrieve/test_editing.py",),
    "retrieve/build.py": ("tests/retrieve/test_editing.py",),
    "retrieve/database.py": ("tests/retrieve/test_editing.py", "tests/retrieve/test_neighbours.py"),
    "retrieve/knn.py": ("tests/retrieve/test_knn.py",),
    "retrieve/lance.py": ("tests/retrieve/test_lance.py",),  # needs lancedb
    "retrieve/neighbours.py": ("tests/retrieve/test_neighbours.py",),
    "retrieve/overlap.py": ("tests/retrieve/test_neighbours.py",),
    "retrieve/recall.py": ("tests/retrieve/test_lance.py",),
    "retrieve/states.py": ("tests/retrieve/test_knn.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "retrieve/accelerator.py": [
        ("faiss: what is left out", "found if exclude is None else without(found, exclude, count)", "found"),
        ("faiss: what the lists lack is made up for", "if bool(short.any()):", "if False:"),
        ("faiss: a damaged index is made anew", 'sha256(folder / FILE) == about["sha256"]', "True"),
        ("faiss: an older generation's index is removed", "        remove(each)", "        pass"),
        ("faiss: rows of a trusted index find themselves", "    if own < OWN:", "    if False:"),
        ("faiss: an index of other rows is refused", "(index.ntotal, index.d) != (store.rows, store.width)", "False"),
    ],
    "retrieve/build.py": [
        ("another wish begins anew", 'if found.get("key") != key:', "if not found:"),
        ("what another process wrote is not lost", "if base is not None and generations", "if False and generations"),
        ("texts cut are counted", "self.cut += self.embed.cut - before", "pass"),
    ],
    "retrieve/chunks.py": [
        ("the last chunk ends with its document", "int(self.sizes[document]) - first)", "10**9)"),
        ("what is twice is kept once", "np.sort(np.unique(keys, return_index=True)[1])", "np.arange(len(keys))"),
    ],
    "retrieve/database.py": [
        ("no continuation beyond the document", "(after == self.starts", "(inside == self.starts"),
        ("the same document by its tokens", "(self.keys[same] != keys)[:, None], 0", "torch.tensor(True), 0"),
        ("the same document by its file", "out[i, place] = self.documents_from(file)", "pass"),
        ("a file read in two ways", ".setdefault(origin.sha256, []).append(file)", "[origin.sha256] = [file]"),
        ("readers: chunks of one size", "if model.retrieval.chunk != self.spec.chunk:", "if False:"),
        (
            "readers: ids of one tokenizer",
            "        self.check_tokenizer(tokenizer)\n\n    def neighbours",
            "\n    def neighbours",
        ),
        ("ids are those of the vocabulary", "if found.numel() and not -1 <=", "if False and not -1 <="),
    ],
    "retrieve/editing.py": [
        ("added rows follow those that stay", "second.starts[1:] + self.given", "second.starts[1:]"),
        ("what is there already is not added", "prepared, kept.keys)", "prepared, kept.keys[:0])"),
        ("files of the same name are replaced", "if origin.name in names]", "if False]"),
        ("rows of documents that stay", "self.begins[documents] + numbers - self.starts[documents]", "numbers"),
        ("files of what is added come after the others", "second.files + len(first.origins)", "second.files"),
        ("a document is named by its file too", "and database.name_of(int(number)) == name", ""),
    ],
    "retrieve/embedding.py": [
        (
            "the embedder is the one of the build",
            "        if one != other:\n            one, other",
            "        if False:\n            one, other",
        ),
        ("what is too long is cut within its frame", "*row[: self.room], *self.after]", "*row[: self.room]]"),
    ],
    "retrieve/exact.py": [
        ("vectors that are not finite are named", "if start not in self._sound:", "if False:"),
        ("lengths that are not finite are named", "if not bool(squares.isfinite().all()):", "if False:"),
    ],
    "retrieve/flat.py": [
        ("it goes on after the rows that are there", "self.file.seek(size)", "pass"),
        ("a file of another shape is not gone on with", "(done and not self._begins(head))", "False"),
    ],
    "retrieve/generations.py": [
        ("a reader holds its generation", "fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)", "pass"),
        ("old generations are removed", "            _remove(path)", "            pass"),
    ],
    "retrieve/knn.py": [
        ("kNN-LM: the mixture", "(1 - self.weight) * log", "log"),
        ("kNN-LM: temperature", "-found.distances / self.temperature", "-found.distances"),
        ("kNN-LM: only what followed", "(shares * (tokens == target[:, None]))", "(shares * (tokens >= 0))"),
        (
            "kNN-LM: what is left out",
            "self.database.search(states, self.count, spans)",
            "self.database.search(states, self.count)",
        ),
    ],
    "retrieve/lance.py": [
        ("lance: what is left out", "            rows, distances = found.rows, found.distances", "            pass"),
        ("lance: what the lists lack is made up for", "for i in (rows < 0).any(1)", "for i in (rows < -1).any(1)"),
        ("lance: rows in the order that was asked for", "return values[order][which]", "return values[order]"),
        ("lance: answers in the order of their queries", "(of.double() * 1e9 + distances", "(distances"),
        ("lance: a table with other rows is refused", "if count != self.rows or", "if"),
        ("lance: as many lists as the recall asks for", "asked.nprobes(self.spec.probes)", "asked.nprobes(1)"),
    ],
    "retrieve/neighbours.py": [
        ("neighbours: not of the document itself", "count, own[of]).rows", "count).rows"),
        ("neighbours: what is stored is not embedded", "known = same < after", "known = same < same"),
        (
            "neighbours: the vectors of the same chunk",
            "numbers - starts[of])[known]",
            "numbers - starts[of] + 1)[known]",
        ),
        ("neighbours: of this text", "_read(directory).text != prepared.hash", "False"),
        ("neighbours: of whole chunks", "whole = (tokens >= 0).all(1)", "whole = (tokens >= 0).any(1)"),
    ],
    "retrieve/overlap.py": [
        (
            "overlap: runs, not counts",
            "torch.where(skewed, -1, places).cummax(2).values",
            "torch.where(skewed, -1, places)",
        ),
        ("losses: windows begin where chunks do", "cut = -begin % chunk", "cut = 0"),
        ("losses: the neighbours of the chunks that are read", "first + (begin + cut) // chunk +", "first +"),
        ("losses: windows of whole chunks", "if window % chunk or stride % chunk or window <= stride:", "if False:"),
        ("overlap: what is no token is in no run", " & (one >= 0)[:, None, :, None]", ""),
    ],
    "retrieve/recall.py": [
        ("recall: equal distances are right", "last * 1.0001 + 1e-6", "last * 0.9999 - 1e-6"),
    ],
    "retrieve/states.py": [
        ("a value is the token after its state", "self._read(i, 1 + low, 1 + high)", "self._read(i, low, high)"),
        ("states are read in windows", "begin = max(last - window, 0)", "begin = 0"),
        ("a batch begins at the window that it is in", "(low - window) // stride * stride", "low - window"),
        ("states are read at few lengths", "rounded(len(ids), window) - len(ids)", "0"),
    ],
    "retrieve/store.py": [
        ("what is left out of a search", "distance.masked_fill_((numbers", "distance.masked_fill((numbers"),
        ("rows are numbered through the blocks", "[rows, at + start]", "[rows, at]"),
        ("distances are squared lengths", "queries.square().sum(1, keepdim=True)", "0"),
    ],
}
