"""Give a pretrained decoder layers that read neighbours: python examples/train/retrofit.py SOURCE DIRECTORY

    python examples/train/retrofit.py smollm2-135m smollm2-retro --layers 15,21 --chunk 64

DIRECTORY becomes a source with the weights of SOURCE and the new ones at their initial values, for `lamina train` to go
on with; until then it writes what SOURCE writes. The encoder of neighbours has the width of the decoder and begins with
its table of tokens; with --copied it is the decoder up to the layers that read, and they begin as copies of their
attention. --open has gates open and last projections that begin at zero in their stead, which changes nothing at first
either: what new layers read is learned at once, and no gate has to open before. --dtype is that of all weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.layers import AttentionSpec, neighbour_encoder
from lamina.surgery import build, retrofit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", default="15,21", help="that read neighbours, counted from 0")
    parser.add_argument("--chunk", type=int, default=64, help="tokens")
    parser.add_argument("--encoder-layers", type=int, default=1, help="of one that begins anew")
    parser.add_argument("--copied", action="store_true")
    parser.add_argument("--open", action="store_true")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    base = lamina.load(options.source, dtype=options.dtype)
    spec = base.spec
    places = tuple(int(layer) for layer in options.layers.split(","))
    attention = spec.decoder.layers[places[0]].steps[0].op if spec.decoder is not None else None
    if not isinstance(attention, AttentionSpec):
        raise SystemExit(f"{options.source}: is no decoder with attention in layer {places[0]}")
    encoder = neighbour_encoder(
        spec.width,
        spec.embedding.vocabulary,
        width=spec.width,
        heads=attention.heads,
        head_dim=attention.head_dim,
        hidden=2 * spec.width,
        layers=options.encoder_layers,
    )
    how: dict[str, Any] = {"begin": "copied"} if options.copied else {"encoder": encoder}
    fitted, state = retrofit(spec, base.state_dict(), layers=places, chunk=options.chunk, **how)
    model, new = build(fitted, state)
    if options.open:
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if path.endswith("retrieval.gate"):
                    weight.fill_(1.0)
                elif path.endswith("retrieval.op.attention.o.weight"):
                    weight.zero_()
    model.origin = base.origin  # its tokenizer and what else lies beside the weights go along
    lamina.save(model, options.directory, "native")
    held = sum(weight.numel() for weight in base.parameters())
    count = sum(weight.numel() for weight in model.parameters()) - held
    print(f"{options.directory}: {count:,} new weights beside {held:,}, {len(new)} of them from nothing")


if __name__ == "__main__":
    main()
