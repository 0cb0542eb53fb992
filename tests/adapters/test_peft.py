"""peft's files: what it writes we read and write back in its bytes, what we write it opens, with the same logits.

The tests that need peft are skipped where it is not installed; files written by hand from its documented format are
read everywhere.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.adapters import LoRASpec, adapted, attach, merge
from lamina.adapting import read_adapter, table_of, write_adapter
from lamina.errors import CheckpointError, LaminaError
from tests import families
from tests.families import Case, row

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(row(name), folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def answer(out: Any) -> torch.Tensor:
    found = getattr(out, "logits", None)
    return (out.last_hidden_state if found is None else found).detach()


def ours_of(model: lamina.Model, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return (out.hidden if out.logits is None else out.logits).detach()


def theirs_with(peft: Any, case: Case, adapter: Path) -> torch.Tensor:
    """The logits of peft over transformers' own model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = type(case.theirs).from_pretrained(case.source, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
        return answer(model(case.ids))


def written_by(peft: Any, case: Case, folder: Path, **config: Any) -> Path:
    """An adapter as peft writes it, its B factors not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = type(case.theirs).from_pretrained(case.source, attn_implementation="eager")
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.2, generator=generator)
        model.save_pretrained(folder)
    return folder


def by_hand(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors as peft documents them ("checkpoint format")."""
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    save_file({f"base_model.model.{name}.weight": one for name, one in tensors.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    return folder


def small(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize(
    "name, config",
    [
        ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
        ("llama-bare", {"r": 3, "target_modules": "all-linear", "use_rslora": True}),
        ("llama-tied", {"r": 2, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5},
                        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 20, "up_proj": 4, "q_proj": 3}}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}),
        ("gpt2", {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("bert-mlm", {"r": 2, "lora_dropout": 0.1, "target_modules": ["query", "value"]}),
        ("bert", {"r": 2, "target_modules": ["key", "output.dense"]}),
        ("gpt_neox", {"r": 3, "target_modules": ["query_key_value", "dense"]}),
        ("falcon-40b", {"r": 3, "target_modules": ["query_key_value"]}),
    ],
)  # fmt: skip
def test_what_peft_writes(peft: Any, case: Callable[[str], Case], name: str, config: dict[str, Any], tmp_path: Path):
    made = case(name)
    adapter = written_by(peft, made, tmp_path / "peft", **config)
    wanted, plain = theirs_with(peft, made, adapter), answer(made.theirs(made.ids))
    assert (wanted - plain).abs().max() > 1e-2
    model = lamina.load(made.source)
    read_adapter(model, adapter)
    assert families.close(ours_of(model, made.ids), wanted, TOLERANCE)
    write_adapter(model, tmp_path / "again")
    assert families.same_files(tmp_path / "again", without_readme(adapter)) == []
    merge(model)
    assert families.close(ours_of(model, made.ids), wanted, TOLERANCE)
    loaded = lamina.load(made.source, adapter=adapter)
    for (one, weight), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(weight, other), one


def without_readme(adapter: Path) -> Path:
    (adapter / "README.md").unlink(missing_ok=True)
    return adapter


@pytest.mark.parametrize(
    "name, spec",
    [
        ("llama", LoRASpec(rank=3, alpha=7, targets=("q_proj", "v"))),
        ("llama", LoRASpec(rank=2, targets=("model.layers.1",), rslora=True)),
        ("llama-bare", LoRASpec(rank=2)),
        ("gpt2", LoRASpec(rank=4)),
        ("gpt2", LoRASpec(rank=4, alpha=3, targets=("q", "attention.op.v", "c_fc"), rslora=True)),
        ("gpt2", LoRASpec(rank=4, targets=("decoder.layers.0.attention.op.k", "decoder.layers.1.attention"))),
        ("gpt_neox", LoRASpec(rank=3)),
        ("falcon-40b", LoRASpec(rank=3)),
        ("bert-mlm", LoRASpec(rank=2, targets=("query", "key", "intermediate.dense"))),
        ("t5", LoRASpec(rank=2)),
    ],
)
def test_what_we_write(peft: Any, case: Callable[[str], Case], name: str, spec: LoRASpec, tmp_path: Path):
    made = case(name)
    model = trained(lamina.load(made.source), spec)
    write_adapter(model, tmp_path / "ours")
    if name == "t5":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = type(made.theirs).from_pretrained(made.source, attn_implementation="eager")
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
            wanted = answer(theirs(input_ids=made.sources[:2], decoder_input_ids=made.ids))
        found = model(made.sources[:2], decoder_input_ids=made.ids).logits
        assert found is not None and families.close(found.detach(), wanted, TOLERANCE)
    else:
        assert families.close(ours_of(model, made.ids), theirs_with(peft, made, tmp_path / "ours"), TOLERANCE)
    again = lamina.load(made.source)
    read_adapter(again, tmp_path / "ours")
    write_adapter(again, tmp_path / "twice")
    assert families.same_files(tmp_path / "ours", tmp_path / "twice") == []
    merge(again)
    merge(model)
    for (one, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6, msg=one)


def trained(model: lamina.Model, spec: LoRASpec) -> lamina.Model:
    attach(model, spec, table=table_of(model))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_a.normal_(std=0.1, generator=generator)
            layer.lora_b.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize(
    "config, scale",
    [
        ({}, 6 / 2),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 20}}, 4 / 2),  # the first that fits counts
        ({"alpha_pattern": {"^self_attn.q_proj": 4, "^model.layers.1.self_attn.q_proj$": 20}}, 20 / 2),
        ({"alpha_pattern": {"attn.q_proj": 4}, "r": 5, "rank_pattern": {"q_proj": 2}}, 6 / 2),
    ],
)
def test_a_file_by_hand(case: Callable[[str], Case], tmp_path: Path, config: dict[str, Any], scale: float):
    """One module of a LLaMA: W + alpha / r B A, and nothing else changes."""
    made = case("llama")
    name = "model.layers.1.self_attn.q_proj"
    a, b = small(2, 36), small(60, 2, seed=1)
    adapter = by_hand(tmp_path / "adapter", {f"{name}.lora_A": a, f"{name}.lora_B": b}, **config)
    model, plain = lamina.load(made.source, adapter=adapter), made.ours
    for (one, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        changed = one == "decoder.layers.1.attention.op.q.weight"
        assert torch.equal(weight, other + scale * (b @ a) if changed else other), one


def test_a_packed_matrix_by_hand(case: Callable[[str], Case], tmp_path: Path):
    """c_attn of GPT-2 is [in, 3 out]: q, k and v share A, and B is cut in three."""
    made = case("gpt2")
    name = "transformer.h.2.attn.c_attn"
    a, b = small(2, 36), small(108, 2, seed=1)
    said = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = by_hand(tmp_path / "adapter", {f"{name}.lora_A": a, f"{name}.lora_B": b}, **said)
    model = lamina.load(made.source)
    read_adapter(model, adapter)
    layers = adapted(model)
    assert list(layers) == [f"decoder.layers.2.attention.op.{part}" for part in "qkv"]
    for place, layer in enumerate(layers.values()):
        assert torch.equal(layer.lora_a, a) and torch.equal(layer.lora_b, b[36 * place : 36 * (place + 1)])
    write_adapter(model, tmp_path / "again")
    assert families.same_files(adapter, tmp_path / "again") == []
    other = {f"{name}.lora_b": 2 * layer.lora_b for name, layer in layers.items()}
    write_adapter(model, tmp_path / "average", values=other)
    kept = load_file(tmp_path / "average/adapter_model.safetensors")
    assert torch.equal(kept[f"base_model.model.{name}.lora_B.weight"], 2 * b)
    with torch.no_grad():
        layers["decoder.layers.2.attention.op.k"].lora_a.add_(1)  # and now they are three
    write_adapter(model, tmp_path / "apart")
    said = json.loads((tmp_path / "apart/adapter_config.json").read_text())
    assert said["rank_pattern"] == {name: 6} and said["alpha_pattern"] == {name: 18} and said["fan_in_fan_out"]
    tensors = load_file(tmp_path / "apart/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    whole = torch.cat([layer.lora_b @ layer.lora_a for layer in layers.values()])
    torch.testing.assert_close(b @ a, whole, rtol=1e-6, atol=1e-6)


def test_other_layouts_have_the_same_names(case: Callable[[str], Case], tmp_path: Path):
    """An adapter fits the native layout of its model too, and files whose names lack or have the prefix of the base."""
    made = case("llama")
    lamina.save(made.ours, tmp_path / "native", "native")
    tensors = {name: small(*shape) for name, shape in GOOD.items()}
    whole = by_hand(tmp_path / "whole", tensors)
    bare = by_hand(tmp_path / "bare", {name.removeprefix("model."): one for name, one in tensors.items()})
    model = lamina.load(made.source)
    read_adapter(model, bare)
    write_adapter(model, tmp_path / "again")
    assert families.same_files(bare, tmp_path / "again") == []
    wanted = lamina.load(made.source, adapter=whole)
    for source, adapter in ((tmp_path / "native", whole), (made.source, bare)):
        found = lamina.load(source, adapter=adapter)
        for (name, one), other in zip(wanted.named_parameters(), found.parameters(), strict=True):
            assert torch.equal(one, other), name


def test_decoding_in_8_bits_is_of_the_merged_weights(case: Callable[[str], Case], tmp_path: Path):
    made = case("llama")
    adapter = by_hand(tmp_path / "adapter", {name: 5 * small(*shape) for name, shape in GOOD.items()})
    exact, plain = (lamina.load(made.source, adapter=one) for one in (adapter, None))
    rounded = lamina.load(made.source, adapter=adapter, quantize="int8")
    near, far = ((ours_of(one, made.ids) - ours_of(rounded, made.ids)).abs().mean() for one in (exact, plain))
    assert near < 0.2 * far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype(case: Callable[[str], Case], tmp_path: Path, dtype: torch.dtype):
    made = case("llama")
    name = "model.layers.0.mlp.down_proj"
    tensors = {f"{name}.lora_A": small(2, 50).to(dtype), f"{name}.lora_B": small(36, 2).to(dtype)}
    adapter = by_hand(tmp_path / "adapter", tensors)
    model = lamina.load(made.source)
    read_adapter(model, adapter)
    assert ours_of(model, made.ids).dtype == torch.float32
    write_adapter(model, tmp_path / "again")
    assert families.same_files(adapter, tmp_path / "again") == []


Q = "model.layers.1.self_attn.q_proj"
GOOD = {f"{Q}.lora_A": (2, 36), f"{Q}.lora_B": (60, 2)}


@pytest.mark.parametrize(
    "shapes, config, message",
    [
        (GOOD, {"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; only 'LORA' is read"),
        (GOOD, {"use_dora": True}, "use_dora is True; only plain LoRA is read"),
        (GOOD, {"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        (GOOD, {"bias": "all"}, "bias is 'all'; only 'none' is read"),
        (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        (GOOD, {"r": None}, "r is None; a number was expected"),
        (GOOD, {"r": 0}, "rank is 0; it must be 1 or more"),
        (GOOD, {"r": True}, "r is True; a number was expected"),
        (GOOD, {"lora_alpha": "x"}, "lora_alpha is 'x'; a number was expected"),
        (GOOD, {"use_rslora": 1}, "use_rslora is 1; true or false was expected"),
        (GOOD, {"alpha_pattern": {"(a|b)+": 3}}, r"alpha_pattern has '\(a\|b\)\+', an expression"),
        (GOOD, {"rank_pattern": {"q_proj": "x"}}, "rank_pattern has 'x' for model.layers.1.self_attn.q_proj"),
        (GOOD, {"r": 3}, r"lora_A.weight has shape \[2, 36\]; .*q_proj with rank 3 needs \[3, 36\]"),
        (GOOD | {f"{Q}.lora_B": (36, 2)}, {}, r"lora_B.weight has shape \[36, 2\]; .* needs \[60, 2\]"),
        ({f"{Q}.lora_A": (2, 36)}, {}, "q_proj has lora_A alone; both factors are needed"),
        ({}, {}, "holds no tensors"),
        (GOOD | {"model.embed_tokens.lora_embedding_A": (2, 97)}, {}, "is no part of a LoRA of linear layers"),
        ({"model.layers.9.self_attn.q_proj.lora_A": (2, 36), "model.layers.9.self_attn.q_proj.lora_B": (60, 2)}, {},
         "this model has no layer for it: unknown linear layer 'model.layers.9.self_attn.q_proj'; did you mean"),
        ({"lm_head.lora_A": (2, 36), "lm_head.lora_B": (97, 2)}, {}, "unknown linear layer 'lm_head'"),
        ({f"{Q}.lora_A": (2, 36), f"{Q}.lora_B": (60, 2)} | {f"{Q.removeprefix('model.')}.lora_{x}": s
         for x, s in (("A", (2, 36)), ("B", (60, 2)))}, {}, "are the same layer"),
    ],
)  # fmt: skip
def test_files_that_are_refused(
    case: Callable[[str], Case], tmp_path: Path, shapes: dict[str, Any], config: dict[str, Any], message: str
):
    adapter = by_hand(tmp_path / "adapter", {name: small(*shape) for name, shape in shapes.items()}, **config)
    model = lamina.load(case("llama").source)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(model, adapter)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)
    assert not adapted(model) and model.adapter is None and all(one.requires_grad for one in model.parameters())


def test_other_things_that_are_refused(case: Callable[[str], Case], tmp_path: Path):
    source = case("llama").source
    with pytest.raises(LaminaError, match="no source"):
        lamina.load(source, adapter=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json, so it is no adapter of peft"):
        lamina.load(source, adapter=source)
    tensors = {name: small(*shape) for name, shape in GOOD.items()}
    adapter = by_hand(tmp_path / "bad", tensors | {f"{Q}.lora_A": torch.full((2, 36), float("nan"))})
    with pytest.raises(CheckpointError, match=r"lora_A.weight holds values that are not finite"):
        lamina.load(source, adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: a pickle can run code"):
        lamina.load(source, adapter=adapter)
    with pytest.raises(LaminaError, match="no adapter is attached"):
        write_adapter(lamina.load(source), tmp_path / "none")


def test_an_adapter_of_another_model(case: Callable[[str], Case], tmp_path: Path):
    source = case("llama").source
    tensors = {name: small(*shape) for name, shape in GOOD.items()}
    adapter = by_hand(tmp_path / "adapter", tensors, base_model_name_or_path="someone/else")
    with pytest.warns(UserWarning, match=r"this adapter was made for 'someone/else', and the model is "):
        lamina.load(source, adapter=adapter)
    for number, same in enumerate((str(source), f"someone/{source.name}", "")):
        lamina.load(source, adapter=by_hand(tmp_path / f"{number}", tensors, base_model_name_or_path=same))


def test_the_commands(case: Callable[[str], Case], tmp_path: Path):
    from click.testing import CliRunner

    from lamina.cli.program import program

    source = case("llama").source
    adapter = by_hand(tmp_path / "adapter", {name: small(*shape) for name, shape in GOOD.items()})
    done = CliRunner().invoke(program, ["convert", str(source), str(tmp_path / "out"), "--adapter", str(adapter)])
    assert done.exit_code == 0, done.output
    merged = lamina.load(source, adapter=adapter)
    for one, other in zip(merged.parameters(), lamina.load(tmp_path / "out").parameters(), strict=True):
        assert torch.equal(one, other)
    shutil.rmtree(adapter)
    bad = CliRunner().invoke(program, ["generate", str(source), "x", "--adapter", str(adapter)])
    assert bad.exit_code != 0
