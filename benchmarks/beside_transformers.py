"""What lamina and transformers give on the same tiny checkpoints, where batches, packing and dtypes make it hard.

    python benchmarks/beside_transformers.py [--json]

Each row saves a random model with transformers, opens the directory with both, and asks both the same thing. A
difference is the largest of any logit from what the text gives alone, in units of the largest logit. Arguments that are
not named are those that each library takes by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as noise

import lamina
from lamina.errors import LaminaError

SHAPE = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "initializer_range": 0.2}
LLAMA = SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64, "initializer_range": 0.2}
PLAIN = {"use_cache": False}
Row = tuple[str, str, str]


def both(kind: Callable[[Any], Any], config: Any) -> tuple[Any, lamina.Model]:
    """A random model of transformers, and what lamina reads from its files."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        kind(config).save_pretrained(folder)
        return kind.from_pretrained(folder).eval(), lamina.load(folder)


def gap(found: torch.Tensor, alone: torch.Tensor) -> str:
    return f"{float((found - alone).abs().max() / alone.abs().max()):.1e}"


def packed() -> Iterator[Row]:
    theirs, ours = both(LlamaForCausalLM, LlamaConfig(**LLAMA))
    first, second = torch.randint(97, (1, 7)), torch.randint(97, (1, 6))
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(6)])[None]
    for what, more in (("", {}), (", attention_mask of ones", {"attention_mask": torch.ones_like(ids)})):
        found = (model(ids, position_ids=positions, **more).logits[:, 7:] for model in (theirs, ours))
        alone = (model(second).logits for model in (theirs, ours))
        yield f"two documents in a row, position_ids restart{what}", *map(gap, found, alone)
    found = (model(ids, position_ids=positions, **more).logits[:, 7:] for model, more in ((theirs, PLAIN), (ours, {})))
    alone = (model(second).logits for model in (theirs, ours))
    yield "the same, transformers told use_cache=False", *map(gap, found, alone)


def padded() -> Iterator[Row]:
    theirs, ours = both(GPT2LMHeadModel, GPT2Config(**GPT2))
    ids = torch.randint(97, (1, 7))
    row = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    found = (model(row, attention_mask=mask).logits[:, -1] for model in (theirs, ours))
    alone = (model(ids).logits[:, -1] for model in (theirs, ours))
    yield "GPT-2, forward of a row padded on the left, with its attention_mask", *map(gap, found, alone)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, 7:]
    written = (
        theirs.generate(row, attention_mask=mask, **given)[0, 12:],
        lamina.generate(ours, row, mask, max_new_tokens=6)[0, 12:],
    )
    same = ("the same tokens" if torch.equal(one, wanted) else "other tokens" for one in written)
    yield "the same row, generate, beside the text alone", *same


def dynamic() -> Iterator[Row]:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = LlamaConfig(**LLAMA | {"max_position_embeddings": 16}, rope_parameters=rope)
    theirs, ours = both(LlamaForCausalLM, config)
    ids = torch.randint(97, (1, 24))
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        out = theirs(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    what = "dynamic NTK beyond its original length, decoded with a cache"
    yield (
        what,
        gap(torch.cat(logits, dim=1)[:, -1], theirs(ids).logits[:, -1]),
        said(lambda: ours(ids, cache=ours.new_cache())),
    )


def phases() -> Iterator[Row]:
    from lamina.layers.rotary import phases

    theirs, ours = both(LlamaForCausalLM, LlamaConfig(**LLAMA))
    spec = ours.spec.decoder.layers[0].steps[0].op
    position = torch.arange(8192)[None]
    exact = phases(spec.rotary, spec.head_dim, lamina_tokens(8192), torch.float64, {})[0][0]
    cos, _ = theirs.to(torch.bfloat16).model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), position)
    mine = phases(spec.rotary, spec.head_dim, lamina_tokens(8192), torch.bfloat16, {})[0][0]
    yield "cosines of 8,192 rotary positions after .to(bfloat16); the largest error", gap(cos, exact), gap(mine, exact)


def lamina_tokens(length: int) -> Any:
    from lamina.tokens import plain

    return plain(1, length)


def asked() -> Iterator[Row]:
    theirs, ours = both(LlamaForCausalLM, LlamaConfig(**LLAMA))
    ids = torch.randint(97, (1, 7))
    yield (
        "forward(attn_mask=...), a keyword that does not exist",
        *(said(lambda model=model: model(ids, attn_mask=torch.ones_like(ids))) for model in (theirs, ours)),
    )
    given = theirs(ids, output_attentions=True).attentions
    record = lamina.Record("*.weights")
    ours(ids, record=record)
    yield (
        "attention probabilities, asked of the default attention",
        f"{len(given or ())} layers",
        (f"{len(record.values)} layers"),
    )


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (LaminaError, TypeError, ValueError) as error:
        return "refused: " + str(error).split(";")[0]
    return "accepted"


def equal() -> Iterator[Row]:
    """Where both do the same, which is most of the time."""
    theirs, ours = both(LlamaForCausalLM, LlamaConfig(**LLAMA))
    ids, mask = torch.randint(97, (1, 7)), torch.tensor([[0] * 5 + [1] * 7])
    row = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    found = (model(row, attention_mask=mask).logits[:, -1] for model in (theirs, ours))
    alone = (model(ids).logits[:, -1] for model in (theirs, ours))
    yield "LLaMA, forward of a row padded on the left, with its attention_mask", *map(gap, found, alone)
    models = len(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    yield "model types that can be read", f"{models}", f"{len(lamina.families.FAMILIES)}"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", action="store_true")
    as_json = options.parse_args().json
    noise.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        rows = [row for part in (packed, padded, dynamic, phases, asked, equal) for row in part()]
    if as_json:
        json.dump({"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}, sys.stdout)
        return 0
    print(f"| | transformers {transformers.__version__} | lamina {lamina.__version__} |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
