"""Change one thing in a model: what differs, what it costs, what stays the same. python examples/change_a_layer.py"""

import tempfile
from pathlib import Path

import torch

import lamina
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)
from lamina.patterns import Causal, Window
from lamina.specs import edit
from lamina.words import say

CONTEXT = 131_072


def local(spec: lamina.ModelSpec, back: int, every: int) -> lamina.ModelSpec:
    """All layers but every `every`-th see only their last `back` keys: Gemma 3's arrangement, for any decoder."""

    def change(path: str, attention: AttentionSpec) -> AttentionSpec:
        layer = int(path.split(".")[2])  # decoder.layers.7.steps.0.op
        keeps = layer % every == every - 1
        return attention if keeps else attention.replace(pattern=Causal() & Window(back=back))

    return edit(spec, AttentionSpec, change)


def tiny() -> lamina.ModelSpec:
    attention = AttentionSpec(heads=4, key_heads=2, head_dim=16, rotary=RotarySpec())
    layer = LayerSpec(
        steps=(
            StepSpec(name="attention", op=attention, pre=RMSNormSpec()),
            StepSpec(name="feedforward", op=FeedForwardSpec(hidden=96), pre=RMSNormSpec()),
        )
    )
    return lamina.ModelSpec(
        width=64,
        embedding=EmbeddingSpec(vocabulary=200),
        decoder=StackSpec(layers=(layer,) * 6, norm=RMSNormSpec()),
        head=LanguageHeadSpec(),
        context=64,
    )


def main() -> None:
    published = lamina.spec("llama3.1/8b")
    changed = local(published, back=1024, every=6)
    rows = lamina.diff(published, changed)
    print(f"llama3.1/8b, changed in {len(rows)} of {len(published.decoder.layers)} layers; the first:")
    path, before, after = rows[0]
    print(f"    {path}: {say(before)} -> {say(after)}")
    for name, spec in (("as published", published), ("changed", changed)):
        account = lamina.account(spec, context=CONTEXT)
        print(f"    {name}: {account.parameters:,} parameters, a full cache of {account.cache_bytes / 2**30:.1f} GiB")

    # The weights of one fit the other, so a tiny model shows what happens to the numbers.
    spec = tiny()
    model = spec.build(seed=0).eval()
    other = local(spec, back=8, every=6).build(device="meta").eval()
    other.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(200, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        gap = (model(ids).logits - other(ids).logits).abs().amax(dim=(0, 2))
    assert not gap[:8].any()
    print(f"\na tiny model with a window of 8: tokens 0 to 7 differ by {float(gap[:8].max()):g},", end=" ")
    print(f"later ones by up to {float(gap[8:].max()):.2g}")

    with tempfile.TemporaryDirectory() as folder:
        lamina.save(other, Path(folder) / "changed", format="native")
        again = lamina.load(Path(folder) / "changed")
        assert again.spec == other.spec
        with torch.inference_mode():
            assert torch.equal(again(ids).logits, other(ids).logits)
    print("saved and loaded again: the same spec, the same logits to the bit")


if __name__ == "__main__":
    main()
