"""Find the head that copies (arXiv:2209.11895) in a real model, and draw it. python examples/look_inside.py [SOURCE]

In a text that repeats itself, an induction head looks from each token of the second time to the token that came next
the first time, and so predicts it. Of all heads, the one that puts the most weight there is found and shown as text.
"""

import sys

import torch

import lamina

PHRASE = " The red fox met a wise old owl."


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    model, tokenizer = lamina.load(source), lamina.tokenizer(source)
    once = tokenizer.encode(PHRASE, special=False)
    ids = torch.tensor([once + once])
    length = len(once)

    record = lamina.Record("*.attention.op.weights")
    with torch.inference_mode():
        logits = model(ids, record=record).logits[0]

    second = torch.arange(length, 2 * length - 1)  # from these tokens ...
    following = second - length + 1  # ... to those that came next the first time
    scores = {name: weights[0][:, second, following].mean(dim=1) for name, weights in record.values.items()}
    name = max(scores, key=lambda one: float(scores[one].max()))
    head = int(scores[name].argmax())
    print(f"{name}, head {head}: {100 * float(scores[name][head]):.0f} % of its weight is on the token to be copied\n")

    weights = record.values[name][0, head]
    words = [tokenizer.decode([token]).strip() or "_" for token in ids[0].tolist()]
    print(" " * 9 + " ".join(word[:4].rjust(4) for word in words[: length + 1]))
    for row in second.tolist():
        shares = [100 * share for share in weights[row][: length + 1].tolist()]
        cells = " ".join(f"{share:4.0f}" if share >= 0.5 else "   ." for share in shares)
        print(f"{words[row][:8]:>8} {cells}")

    right = (logits[:-1].argmax(dim=-1) == ids[0, 1:]).tolist()
    first, again = sum(right[: length - 1]), sum(right[length:])
    print(f"\npredicted: {first} of {length - 1} tokens the first time, {again} of {length - 1} the second")


if __name__ == "__main__":
    main()
