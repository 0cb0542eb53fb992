"""The config.json that a GGUF file's metadata stand for (llama.cpp's convert_hf_to_gguf.py, read backwards)."""

from __future__ import annotations

import math
import struct
from typing import Any

from lamina.errors import CheckpointError
from lamina.weights.gguf import GGUFFile
from lamina.weights.mapped import show

MODELS = {  # architecture in GGUF -> model_type and class in config.json
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
KEYS = {  # what an architecture may say of itself
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.sliding_window_pattern",
    "attn_logit_softcapping", "final_logit_softcapping",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
HARMLESS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "use_parallel_residual": True}
ACTIVATION = {"gemma2": "hidden_activation", "gemma3": "hidden_activation"}  # the field's name
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # these alone scale queries by width / heads (llama.cpp, LLM_TYPE_27B)
YARN = {"attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


class Facts:
    """What a GGUF file says of its architecture, checked against its tensors."""

    def __init__(self, file: GGUFFile):
        self.file, self.metadata, self.name = file, file.metadata, file.path.name
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in MODELS:
            found = f"architecture {show(architecture)}" if isinstance(architecture, str) else "no general.architecture"
            raise self.refuse(found, f"lamina reads {', '.join(MODELS)}")
        self.architecture: str = architecture
        self.model_type, self.model_class = MODELS[architecture]
        self.check_keys()
        if "token_embd.weight" not in file.entries or len(file.entries["token_embd.weight"].shape) != 2:
            raise self.refuse("no matrix token_embd.weight", "every model has its embeddings")
        self.vocabulary = file.entries["token_embd.weight"].shape[0]
        self.layers = self.count("block_count", most=len(file.entries))
        self.width = self.count("embedding_length")
        self.hidden = self.count("feed_forward_length")
        self.heads = self.count("attention.head_count")
        self.key_heads = self.count("attention.head_count_kv", self.heads)
        self.head = self.count("attention.key_length", self.count("rope.dimension_count", self.width // self.heads))
        self.output = "output.weight" in file.entries
        self.attention_bias = "blk.0.attn_q.bias" in file.entries or architecture == "qwen2"
        self.mlp_bias = "blk.0.ffn_up.bias" in file.entries
        self.check_numbers()

    def refuse(self, found: str, right: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {found}; {right}")

    def check_keys(self) -> None:
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise self.refuse(f"one of {parts} parts of a model", "join them first: llama-gguf-split --merge")
        prefix = f"{self.architecture}."
        for key, value in self.metadata.items():
            short = key.removeprefix(prefix)
            if short == key or short in KEYS or (short in HARMLESS and value == HARMLESS[short]):
                continue
            raise self.refuse(
                f"{show(key)} is {show(str(value))}", f"lamina knows no such setting of {self.architecture} models"
            )

    def value(self, key: str) -> object:
        return self.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.value(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]  # one number for every layer, and all the same
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refuse(
                f"{self.architecture}.{key} is {show(str(value))}", f"a whole number from 1 to {most:,} is needed"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(f"{self.architecture}.{key} is {show(str(value))}", "a positive number is needed")
        return shortest(value)

    def check_numbers(self) -> None:
        if self.heads % self.key_heads:
            raise self.refuse(f"{self.heads} heads and {self.key_heads} key heads", "key heads divide the heads")
        for key in ("rope.dimension_count", "attention.value_length"):
            if self.count(key, self.head) != self.head:
                raise self.refuse(
                    f"{self.architecture}.{key} is {self.value(key)}", f"with heads of {self.head} it is that"
                )
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        for size in (self.value("vocab_size"), len(tokens) if isinstance(tokens, list) else None):
            if size is not None and size != self.vocabulary:
                raise self.refuse(f"{self.vocabulary:,} embeddings for {size:,} tokens", "there is one for each token")

    def config(self) -> dict[str, object]:
        """What config.json would hold."""
        gemma = self.architecture.startswith("gemma")
        dtype = self.file.entries["blk.0.attn_q.weight"].dtype
        config: dict[str, object] = {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            ACTIVATION.get(self.architecture, "hidden_act"): "gelu_pytorch_tanh" if gemma else "silu",
            "max_position_embeddings": self.count("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.real("rope.freq_base", 1e6 if self.architecture == "gemma3" else 1e4),
            "rope_scaling": self.rope_scaling(),
            "tie_word_embeddings": not self.output,
        }
        for key in ("bos", "eos", "padding"):
            token = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(token, int):
                if not 0 <= token < self.vocabulary:
                    raise self.refuse(f"tokenizer.ggml.{key}_token_id is {token}", f"it is below {self.vocabulary:,}")
                config[f"{key.removesuffix('ding')}_token_id"] = token
        config |= self.own()
        if self.mlp_bias and self.architecture != "llama":
            raise self.refuse("feed-forward layers with a bias", f"{self.architecture} models have none")
        return config

    def own(self) -> dict[str, Any]:
        """The fields that only some architectures have."""
        window = self.value("attention.sliding_window")
        if self.architecture == "llama":
            if window:  # only Mistral has one: same weights, same names
                if self.attention_bias or self.mlp_bias:
                    raise self.refuse("a sliding window and biases", "Mistral has a window, LLaMA may have biases")
                mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
                return mistral | {"sliding_window": self.count("attention.sliding_window")}
            return {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        bias: dict[str, Any] = (
            {} if self.architecture == "qwen2" else {"attention_bias": self.attention_bias}
        )  # qwen2 always has it
        if self.architecture in ("qwen2", "qwen3"):
            return bias | {"use_sliding_window": bool(window)} | ({"sliding_window": window} if window else {})
        if self.architecture == "gemma":
            return bias
        period = 2 if self.architecture == "gemma2" else self.count("attention.sliding_window_pattern", 6)
        whole = self.layers == LAYERS_OF_27B[self.architecture]
        fields: dict[str, Any] = {
            "query_pre_attn_scalar": self.width // self.heads if whole else self.head,
            "sliding_window": self.count("attention.sliding_window", 4096 if self.architecture == "gemma2" else None),
            "layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(self.layers)],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
        if self.architecture == "gemma2":
            fields["attn_logit_softcapping"] = self.real("attn_logit_softcapping", 50.0)
            fields["final_logit_softcapping"] = self.real("final_logit_softcapping", 30.0)
        else:
            fields["rope_local_base_freq"] = self.real("rope.freq_base_swa", 1e4)
            if self.value("final_logit_softcapping"):
                fields["final_logit_softcapping"] = self.real("final_logit_softcapping")
        return bias | fields

    def rope_scaling(self) -> dict[str, Any] | None:
        kind = self.value("rope.scaling.type")
        if kind is None and self.value("rope.scale_linear") is not None:
            kind = "linear"
        if "rope_freqs.weight" in self.file.entries:
            if kind not in (None, "none"):
                raise self.refuse(f"rope_freqs.weight beside rope scaling {show(str(kind))}", "one of the two is right")
            return self.llama3()
        if kind in (None, "none"):
            return None
        if kind == "linear":
            return {
                "rope_type": "linear",
                "factor": self.real("rope.scaling.factor", self.real("rope.scale_linear", 1.0)),
            }
        if kind != "yarn":
            raise self.refuse(f"rope scaling {show(str(kind))}", "lamina reads none, linear and yarn")
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": self.real("rope.scaling.factor")}
        if self.value("rope.scaling.original_context_length") is not None:
            scaling["original_max_position_embeddings"] = self.count("rope.scaling.original_context_length")
        for key, field in YARN.items():
            if self.value(f"rope.scaling.{key}") is not None:
                scaling[field] = self.real(f"rope.scaling.{key}")
        return scaling

    def llama3(self) -> dict[str, Any] | None:
        """Llama 3's rotary scaling, from the divisors of the frequencies that the converter made of it.

        The divisors say how much the slow frequencies shrink, not which context the fast ones were kept for: that is
        found by trying the powers of two. Divisors that follow from none of them are refused, by name.
        """
        entry = self.file.entries["rope_freqs.weight"]
        if entry.shape != (self.head // 2,) or entry.stored != "F32":
            raise self.refuse(
                f"rope_freqs.weight is {entry.stored} of shape {entry.shape}", f"it is F32 of {self.head // 2}"
            )
        divisors = self.file.read("rope_freqs.weight").tolist()
        if all(divisor == 1 for divisor in divisors):
            return None
        theta = self.real("rope.freq_base", 1e4)
        for original in (8192, *(1 << power for power in range(9, 21))):
            scaling: dict[str, Any] = {"factor": shortest(max(divisors)), "original_max_position_embeddings": original}
            scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # those of every model of the family
            if all(
                math.isclose(*pair, rel_tol=1e-5)
                for pair in zip(divisors, llama3_divisors(theta, self.head // 2, **scaling), strict=True)
            ):
                return {"rope_type": "llama3"} | scaling
        raise self.refuse("rope_freqs.weight holds divisors of another kind than Llama 3's", "no other kind is known")


def llama3_divisors(
    theta: float,
    pairs: int,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> list[float]:
    """What each rotary frequency is divided by: 1 for the fast ones, `factor` for the slow ones, a blend between."""
    divisors = []
    for pair in range(pairs):
        turns = original_max_position_embeddings * theta ** (-pair / pairs) / (2 * math.pi)  # in the original context
        blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        blend = min(max(blend, 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return divisors


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: metadata keep 1e-05 as 9.999999747378752e-06."""
    packed = struct.pack("<f", value)
    return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == packed)
