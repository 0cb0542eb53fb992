"""Put a label head on an encoder: python examples/train/label_head.py SOURCE DATA DIRECTORY

DATA is what `lamina data prepare --columns text,label` made: the head has a row for each of its labels. DIRECTORY
becomes a source with the weights of SOURCE and a head at its initial values, for `lamina train` to go on with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lamina
from lamina.data import open_prepared
from lamina.layers import LabelHeadSpec, PoolerSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    part = options.data / "train"
    labels = open_prepared(part if part.is_dir() else options.data).label_names
    encoder = lamina.load(options.source, dtype="float32")
    spec = encoder.spec.replace(
        head=None,
        pooler=encoder.spec.pooler or PoolerSpec(),
        labels=LabelHeadSpec(labels=len(labels), dropout=0.1),
    )
    model = spec.build(seed=0)
    kept = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith(("head.", "labels."))}
    found = model.load_state_dict(kept, strict=False)
    fresh = sorted({name.partition(".")[0] for name in found.missing_keys})
    if not set(fresh) <= {"labels", "pooler"}:
        raise SystemExit(f"{options.source} lacks {', '.join(found.missing_keys)}")
    model.origin = encoder.origin  # its tokenizer and what else lies beside the weights go along
    lamina.save(model, options.directory)
    print(f"{options.directory}: labels {', '.join(labels)}; at initial values: {', '.join(fresh)}")


if __name__ == "__main__":
    main()
