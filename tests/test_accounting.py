"""What a model costs, against the papers' closed forms, torch's own counter, and the caches that models allocate."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lamina
from lamina.families import Fields, family, sizes
from lamina.layers import AttentionSpec

# Parameters, from the shapes of the official checkpoints.
PARAMETERS = {
    "gpt2/small": 124_439_808,
    "gpt2/medium": 354_823_168,
    "gpt2/large": 774_030_080,
    "gpt2/xl": 1_557_611_200,
    "llama/7b": 6_738_415_616,
    "llama/13b": 13_015_864_320,
    "llama/33b": 32_528_943_616,
    "llama/65b": 65_285_660_672,
    "llama2/7b": 6_738_415_616,
    "llama2/70b": 68_976_648_192,
    "llama3/8b": 8_030_261_248,
    "llama3.1/70b": 70_553_706_496,
    "llama3.1/405b": 405_853_388_800,
    "llama3.2/1b": 1_235_814_400,
    "llama3.2/3b": 3_212_749_824,
    "mistral/7b": 7_241_732_096,
    "mistral/7b-v0.3": 7_248_023_552,
    "qwen2.5/0.5b": 494_032_768,
    "qwen2.5/1.5b": 1_543_714_304,
    "qwen2.5/3b": 3_085_938_688,
    "qwen2.5/7b": 7_615_616_512,
    "qwen2.5/14b": 14_770_033_664,
    "qwen2.5/32b": 32_763_876_352,
    "qwen2.5/72b": 72_706_203_648,
    "qwen3/0.6b": 596_049_920,
    "qwen3/1.7b": 1_720_574_976,
    "qwen3/4b": 4_022_468_096,
    "qwen3/8b": 8_190_735_360,
    "qwen3/14b": 14_768_307_200,
    "qwen3/32b": 32_762_123_264,
}

# (bytes a token, bytes at the context, context) in 16 bits: 2 layers key_heads head_dim 2.
CACHE = {
    "gpt2/small": (36_864, 36 * 2**20, 1024),
    "llama2/7b": (524_288, 2 * 2**30, 4096),
    "llama2/70b": (327_680, 5 * 2**28, 4096),
    "llama3/8b": (131_072, 2**30, 8192),
    "llama3.1/405b": (516_096, 63 * 2**30, 131_072),
}

TINY = {
    "gpt2": {"vocab_size": 97, "n_positions": 40, "n_embd": 36, "n_layer": 3, "n_head": 3},
    "llama": {
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 10},
}


def tiny(model_type: str) -> lamina.ModelSpec:
    config = TINY[model_type] if model_type in ("gpt2", "llama") else TINY["llama"] | TINY[model_type]
    return family(model_type).spec(Fields(config))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_checkpoints(name: str):
    found = lamina.account(name, context=8)
    assert found.parameters == found.active_parameters == PARAMETERS[name]
    assert found.weight_bytes == 2 * PARAMETERS[name]


@pytest.mark.parametrize("name", CACHE)
def test_cache_bytes_are_those_of_the_closed_form(name: str):
    per_token, whole, context = CACHE[name]
    assert lamina.account(name, context=1).cache_bytes == per_token
    found = lamina.account(name)
    assert (found.cache_bytes, found.context, found.dtype) == (whole, context, "bfloat16")
    assert lamina.account(name, batch=3, dtype="float32").cache_bytes == 6 * whole


def test_a_window_keeps_no_more_than_itself():
    per_token = 2 * 32 * 8 * 128 * 2
    assert lamina.account("mistral/7b", context=4095).cache_bytes == 4095 * per_token
    assert lamina.account("mistral/7b", context=4096).cache_bytes == 4096 * per_token
    assert lamina.account("mistral/7b", context=32_768).cache_bytes == 4096 * per_token


@pytest.mark.parametrize("name", sizes())
def test_every_published_size_is_counted_as_if_no_layer_were_left_out(name: str):
    spec = lamina.spec(name)
    found = lamina.account(spec, context=16)
    whole = spec.build(device="meta")
    assert found.parameters == sum(parameter.numel() for parameter in whole.parameters())
    assert found.parameters == sum(row.parameters for row in found.rows)
    assert found.flops_prefill == sum(row.flops for row in found.rows)
    assert found.flops_per_token == sum(row.flops_per_token for row in found.rows)
    assert found.cache_bytes == sum(row.cache_bytes for row in found.rows)
    stacks = [stack for stack in (spec.encoder, spec.decoder) if stack is not None]
    repeats = [row.repeat for row in found.rows if ".layers." in row.name]
    assert sum(repeats) == sum(len(stack.layers) for stack in stacks)
    for row in found.rows:
        if row.parts:
            assert row.parameters == sum(part.parameters for part in row.parts)
            assert row.flops == sum(part.flops for part in row.parts)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.filterwarnings("ignore:.*mods argument is not needed")
def test_flops_are_what_torch_counts_on_the_real_model(model_type: str):
    model, batch, context = tiny(model_type).build(seed=0).eval(), 2, 12
    ids = torch.randint(0, 97, (batch, context))
    found = lamina.account(model, batch=batch, context=context)
    # The formula with its matrix products: the fused kernel of the CPU is one operation that torch counts no FLOPs of.
    with FlopCounterMode(display=False) as counter:
        out = model(ids, backend="dense")
        forward = counter.get_total_flops()
        assert out.logits is not None
        out.logits.sum().backward()
    assert found.flops_prefill == forward
    assert found.flops_train_per_token == round(counter.get_total_flops() / (batch * context))
    cache = model.new_cache("auto", batch)
    with torch.no_grad():
        model(ids[:, :-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], cache=cache, backend="dense")
    assert found.flops_per_token == counter.get_total_flops() / batch


FROZEN = {
    "one layer of many": ("llama", ("decoder.layers.1.",)),
    "the last layer": ("llama", ("decoder.layers.2.",)),
    "the norms": ("gpt2", ("decoder.layers.1.attention.pre.", "decoder.layers.2.attention.pre.")),
    "the head": ("llama", ("head.",)),
    "the table, far below": ("bert", ("embedding.",)),
    "the encoder": ("t5", ("encoder.layers.1.",)),
    "the first of the decoder": ("t5", ("decoder.layers.0.cross.",)),
    "what reads neighbours": ("retro", ("decoder.layers.1.retrieval.", "decoder.layers.2.retrieval.")),
    "their encoder": ("retro", ("decoder.layers.1.retrieval.op.encoder.",)),
    "nothing": ("llama", ()),
}


@pytest.mark.parametrize("case", FROZEN)
@pytest.mark.filterwarnings("ignore:.*mods argument is not needed")
def test_a_training_of_some_weights_costs_what_torch_counts(case: str):
    """Equal layers cost differently, by what of them is trained and by what lies below them."""
    name, trained = FROZEN[case]
    spec = frozen_model(name)
    model, context = spec.build(seed=0).eval(), 12
    names = [one for one, _ in model.named_parameters() if one.startswith(trained)] if trained else []
    for one, parameter in model.named_parameters():
        parameter.requires_grad_(one in names)
    assert bool(names) == bool(trained)
    found = lamina.account(spec, context=context, trained=names)
    ids = torch.randint(0, 50, (1, context))
    given = {"neighbours": torch.randint(0, 50, (1, 3, 2, 8))} if spec.retrieval is not None else {}
    given |= {"decoder_input_ids": ids} if spec.two_stacks else {}
    with FlopCounterMode(display=False) as counter:
        out = model(ids, backend="dense", **given)
        results = [one.sum() for one in (out.logits, out.pooled) if one is not None]
        if names:
            sum(results[1:], results[0]).backward()
    assert found.flops_train_per_token == round(counter.get_total_flops() / context)
    assert found.flops_train_per_token < lamina.account(spec, context=context).flops_train_per_token


def frozen_model(name: str) -> lamina.ModelSpec:
    if name in TINY:
        return tiny(name)
    fields = {
        "bert": {"vocab_size": 50, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
                 "intermediate_size": 40, "max_position_embeddings": 40},
        "t5": {"vocab_size": 50, "d_model": 36, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_heads": 3},
        "retro": {"layers": 4, "width": 32, "heads": 4, "head_dim": 8, "vocabulary": 50, "context": 64, "chunk": 4,
                  "first": 2, "every": 1, "encoder_width": 16, "encoder_heads": 2, "encoder_head_dim": 8,
                  "encoder_hidden": 32},
    }[name]  # fmt: skip
    return family(name).spec(Fields(fields))


def test_flops_of_a_llama_are_the_closed_form():
    spec, length = lamina.spec("smollm2/135m"), 1000
    found = lamina.account(spec, context=length)
    assert spec.decoder is not None
    attention = spec.decoder.layers[0].steps[0].op
    assert isinstance(attention, AttentionSpec)
    norms = (2 * len(spec.decoder.layers) + 1) * spec.width
    weights = found.parameters - norms  # the tied table counts once, as the head: looking a vector up is no product
    scores = 2 * 2 * attention.heads * attention.head_dim * len(spec.decoder.layers)
    assert found.flops_prefill == length * (2 * weights + scores * length)
    assert found.flops_per_token == 2 * weights + scores * length
    assert found.flops_train_per_token == 3 * found.flops_prefill // length


@pytest.mark.parametrize("model_type", TINY)
def test_cache_bytes_are_what_the_model_allocates(model_type: str):
    model, batch, context = tiny(model_type).build(seed=0).eval(), 2, 12
    found = lamina.account(model, batch=batch, context=context).cache_bytes
    cache = model.new_cache("auto", batch)
    with torch.no_grad():
        model(torch.randint(0, 97, (batch, context)), cache=cache)
    kept = 0
    for slot in cache.slots.values():
        assert slot.key is not None
        ring = slot.key.shape[2] == 6
        kept += slot.bytes() // slot.key.shape[2] * (5 if ring else context)
    assert found == kept
    if model_type in ("gpt2", "llama", "qwen3"):
        fixed = model.new_cache("fixed", batch, capacity=context)
        with torch.no_grad():
            model(torch.randint(0, 97, (batch, context)), cache=fixed)
        assert found == fixed.bytes()


def test_a_model_is_counted_in_its_own_dtype_and_left_alone():
    model = tiny("llama").build(dtype=torch.float32, seed=0)
    hooks = len(model.embedding._forward_hooks)
    assert lamina.account(model).dtype == "float32"
    assert model.training and len(model.embedding._forward_hooks) == hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 1.5}, "context is 1.5"),
        ({"batch": -1}, "batch is -1"),
        ({"context": 10**12}, "beyond what tensors can count"),
        ({"dtype": "bfloat61"}, "did you mean 'bfloat16'"),
    ],
)
def test_what_cannot_be_counted_is_refused(changes: dict, message: str):
    with pytest.raises(lamina.LaminaError, match=message):
        lamina.account("llama/7b", **changes)


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(lamina.LaminaError, match="1024 positions"):
        lamina.account("gpt2/small", context=1025)


def test_a_spec_without_a_context_asks_for_one():
    spec = lamina.spec("llama/7b").replace(context=None)
    with pytest.raises(lamina.LaminaError, match="give context="):
        lamina.account(spec)
    assert lamina.account(spec, context=8).context == 8


def test_the_largest_model_is_counted_at_once():
    program = (
        "import json, time, torch\nstart = time.process_time()\nimport lamina\n"
        "a = lamina.account('llama3.1/405b')\n"
        "import sys; print(json.dumps([time.process_time() - start, 'torch._dynamo' in sys.modules, a.parameters]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    seconds, compiler, parameters = json.loads(done.stdout)
    assert not compiler, "torch's compiler was imported, which takes a second by itself"
    assert seconds < 2, f"{seconds:.2f} s"  # 0.6 s on a quiet machine
    assert parameters == PARAMETERS["llama3.1/405b"]
