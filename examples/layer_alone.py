"""One attention layer by itself: no model, no configuration. python examples/layer_alone.py"""

import torch

from lamina.cache import Cache
from lamina.layers import AttentionSpec, Call, Record, RotarySpec
from lamina.patterns import Causal, Sinks, Window
from lamina.tokens import plain

LENGTH = 10


def main() -> None:
    torch.manual_seed(0)
    pattern = Causal() & (Window(back=4) | Sinks(count=1))
    spec = AttentionSpec(heads=4, key_heads=2, head_dim=16, rotary=RotarySpec(), pattern=pattern)
    layer = spec.build(width=64).double().eval()
    layer.path = "attention"  # in a model this is its place there; caches and records go by it
    x = torch.randn(1, LENGTH, 64, dtype=torch.float64)

    record = Record("attention.weights")
    with torch.inference_mode():
        whole = layer(x, Call(tokens=plain(1, LENGTH), record=record))
    print("How much each token looks at each, in tenths (head 0; a window of 4, and the first token):\n")
    for row in record.values["attention.weights"][0, 0]:
        print("   ", " ".join(f"{10 * float(share):.0f}" if share else "." for share in row))

    cache = Cache("auto", batch=1)
    cache.add(layer.path, layer.retained())
    with torch.inference_mode():
        steps = [
            layer(x[:, t : t + 1], Call(tokens=plain(1, 1, start=t), cache=cache))  # one token, from the cache
            for t in range(LENGTH)
        ]
    apart = float((torch.cat(steps, dim=1) - whole).abs().max())
    assert apart < 1e-12
    print(f"\nOne token at a time from a cache it is the same, to {apart:.0e}.")


if __name__ == "__main__":
    main()
