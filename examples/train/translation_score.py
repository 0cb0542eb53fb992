"""Score translations of held-out texts: python examples/train/translation_score.py SOURCE DATA [--beams N]

DATA is what `lamina data prepare --columns source,target` made; its validation part is translated by the
encoder-decoder SOURCE, and compared with what people wrote by chrF and BLEU. They are sacrebleu's, with its own
settings: pip install sacrebleu.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sacrebleu
import torch

import lamina
from lamina.data import open_prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=Path)
    parser.add_argument("--beams", type=int, default=1, help="translations kept in view; 1: greedy")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--show", type=int, default=3, help="translations that are printed")
    options = parser.parse_args()

    model = lamina.load(options.source, dtype="float32").eval()
    prepared = open_prepared(options.data / "validation")
    tokenizer = prepared.tokenizer()
    texts, references = (
        [tokenizer.decode(column[i].tolist()) for i in range(len(column))]
        for column in (prepared.column("source"), prepared.column("target"))
    )
    rows = [tokenizer.encode(text) for text in texts]
    context = model.spec.context or max(map(len, rows))
    read = sorted((i for i in range(len(rows)) if len(rows[i]) <= context), key=lambda i: len(rows[i]))
    found: dict[int, str] = {}
    for start in range(0, len(read), 64):
        some = read[start : start + 64]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in some])
        mask = torch.arange(width) < torch.tensor([[len(rows[i])] for i in some])
        out = lamina.generate(
            model, ids, mask.long(), max_new_tokens=options.max_new_tokens, beams=options.beams, temperature=0.0
        )
        found |= {i: tokenizer.decode(row.tolist()) for i, row in zip(some, out)}
        print(f"{start + len(some):,} of {len(read):,} texts", file=sys.stderr)
    for i in sorted(read)[:: max(len(read) // max(options.show, 1), 1)][: options.show]:
        print(f"{texts[i]}\n  model:     {found[i]}\n  reference: {references[i]}")
    written, wanted = [found[i] for i in read], [[references[i] for i in read]]
    for metric in (sacrebleu.corpus_chrf(written, wanted), sacrebleu.corpus_bleu(written, wanted)):
        print(f"{metric.name} {metric.score:.1f}")


if __name__ == "__main__":
    main()
