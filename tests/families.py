"""The table of tiny reference models: one row a family and head, in which every feature bites.

Widths are odd or share no factor, key heads differ from heads, heads are wider than width / heads, windows are shorter
than the text and differ from layer to layer, soft-caps bend the scores, and weights are large enough that a mistake
shows: with transformers' own initial values (0.02) most mistakes would not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.nllb_moe import modeling_nllb_moe

import lamina

VOCABULARY = 97
LENGTH = 13
TOLERANCE = 1e-5
"""Of float32 against float32, for numbers of size one; larger ones in proportion."""

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "pad_token_id": None,  # with one, transformers gives its row no gradient
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
EARLY = {name: value for name, value in DECODER.items() if name != "head_dim"}
GEMMA = DECODER | {"pad_token_id": 0, "rms_norm_eps": 1e-3}
GPTJ = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "rotary_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
NEOX = ENCODER | {
    "rotary_pct": 0.5,
    "rotary_emb_base": 300.0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "ffn_dim": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "attention_dropout": 0.2,
    "bos_token_id": 2,
    "eos_token_id": 96,
    "pad_token_id": None,
}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
LABELS = {"id2label": {0: "north", 1: "east", 2: "south"}, "label2id": {"north": 0, "east": 1, "south": 2}}
ROBERTA = ENCODER | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
BIGBIRD = ENCODER | {"block_size": 1, "num_random_blocks": 1, "sep_token_id": 2}
LONGFORMER = ROBERTA | {"attention_window": 4, "max_position_embeddings": 80, "sep_token_id": 2}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 30, "n_layer": 3, "n_head": 6, "bos_token_id": 1, "eos_token_id": 96}
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "ffn_hidden_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
MPT = {"vocab_size": VOCABULARY, "d_model": 30, "n_layers": 3, "n_heads": 6, "max_seq_len": 64}
MPT |= {"bos_token_id": 1, "eos_token_id": 96}
ALBERT = ENCODER | {
    "embedding_size": 14,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "d_kv": 10,
    "d_ff": 50,
    "num_layers": 3,
    "num_decoder_layers": 2,  # with more than num_layers, transformers' own cache is too short
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "layer_norm_epsilon": 1e-3,
    "eos_token_id": 96,
    "decoder_start_token_id": 3,
}
SWITCH = T5 | {"num_experts": 5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "encoder_layers": 3,
    "decoder_layers": 2,  # with more than encoder_layers, transformers' own cache is too short
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 50,
    "decoder_ffn_dim": 42,
    "max_position_embeddings": 40,
    "eos_token_id": 96,
    "decoder_start_token_id": 3,
}
LED = {name: value for name, value in BART.items() if name != "max_position_embeddings"} | {
    "max_encoder_position_embeddings": 64,  # what transformers pads to has positions too
    "max_decoder_position_embeddings": 40,
    "attention_window": [4, 8, 4],
}
PEGASUS = BART | {"block_size": 1, "num_random_blocks": 1}
M2M100 = BART | {"pad_token_id": 1, "decoder_start_token_id": 3}
NLLB_MOE = M2M100 | {"num_experts": 5, "encoder_sparse_step": 2, "decoder_sparse_step": 1, "encoder_layerdrop": 0.0,
                     "decoder_layerdrop": 0.0}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 7,
    "d_model": 36,
    "encoder_layers": 3,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 50,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 30,
    "max_source_positions": 11,  # transformers reads twice as many frames, and no other number
    "max_target_positions": 40,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0, **more}}


LATENT = EARLY | {
    "num_key_value_heads": 6,  # keys are written out for every head
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,  # with the rope part even, or transformers' V2 fails
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "first_k_dense_replace": 3,  # of 3 layers: none has experts
}
FINE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 22, "first_k_dense_replace": 1}
FINE |= {"n_shared_experts": 1}
YARN = {"max_position_embeddings": 800} | rope(
    "yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=200, mscale=1.3, mscale_all_dim=0.7
)


BROKEN_EXPERTS = modeling_nllb_moe.NllbMoeExperts.forward


def mended_experts(self: Any, hidden_states: torch.Tensor, first: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_e weights_e F_e(x), times what masking left of it in training: the layer of the paper, for every expert.

    That of transformers 5 takes the mask of first choices, 0 or 1 for each expert, for numbers of experts: all first
    choices go to expert 1 and all others to expert 0, whatever the router says (tests/test_families_nllb.py).
    """
    total = sum(weights[:, e, None] * self[f"expert_{e}"](hidden_states) for e in range(self.num_experts))
    return total if self.training else (1 - self.moe_token_dropout) * total


modeling_nllb_moe.NllbMoeExperts.forward = mended_experts


@dataclass(frozen=True)
class Row:
    """One tiny reference model."""

    name: str
    model: str  # class of transformers
    config: str  # class of its configuration
    fields: dict[str, Any] = field(hash=False)
    more: dict[str, Any] = field(default_factory=dict, hash=False)  # arguments of the model class
    kernel: str = "eager"  # of transformers' attention; its "sdpa" shows no weights

    def __str__(self) -> str:
        return self.name

    def shows(self, stack: str) -> bool:
        """Whether transformers shows what attention of a stack sees: in encoders, Longformer's weights and LED's are a
        band, and BigBird's lack keys."""
        hidden = stack == "encoder" and self.model.startswith(("Longformer", "LED", "BigBird"))
        return self.kernel == "eager" and not hidden


def _rows(model: str, config: str, rows: dict[str, dict[str, Any]], **more: Any) -> list[Row]:
    return [Row(name, model, config, fields, more) for name, fields in rows.items()]


LOOP = {"experts_implementation": "eager"}
"""Transformers' grouped product, its default, takes no widths that are not multiples of 16 bytes."""


ROWS = [
    *_rows("GPT2LMHeadModel", "GPT2Config", {
        "gpt2": {"vocab_size": VOCABULARY, "n_positions": 40, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_inner": 50,
                 "bos_token_id": 1, "eos_token_id": 96},
        "gpt2-unscaled": {"vocab_size": VOCABULARY, "n_positions": 40, "n_embd": 15, "n_layer": 2, "n_head": 3,
                          "scale_attn_weights": False, "activation_function": "relu", "bos_token_id": 1,
                          "eos_token_id": 96},
    }),
    *_rows("GPTJForCausalLM", "GPTJConfig", {
        "gptj": GPTJ | {"n_inner": 50, "layer_norm_epsilon": 1e-3},
        "gptj-tied": GPTJ | {"tie_word_embeddings": True, "rotary_dim": 12, "activation_function": "relu"},
    }),
    *_rows("GPTJModel", "GPTJConfig", {"gptj-bare": GPTJ}),
    *_rows("GPTNeoXForCausalLM", "GPTNeoXConfig", {
        "gpt_neox": NEOX | {"layer_norm_eps": 1e-3},
        "gpt_neox-sequential": NEOX | {"use_parallel_residual": False, "attention_bias": False,
                                       "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        "gpt_neox-linear": NEOX | {"hidden_dropout": 0.1,  # Falcon can say it without
                                   "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0,
                                                       "partial_rotary_factor": 1.0}},
    }),
    *_rows("GPTNeoXModel", "GPTNeoXConfig", {"gpt_neox-bare": NEOX}),
    *_rows("OPTForCausalLM", "OPTConfig", {
        "opt": OPT,
        "opt-padding": OPT | {"pad_token_id": 1, "tie_word_embeddings": False, "activation_function": "gelu",
                              "layerdrop": 0.2},
        "opt-narrow": OPT | {"word_embed_proj_dim": 20, "do_layer_norm_before": False},
        "opt-wide-untied": OPT | {"word_embed_proj_dim": 44, "tie_word_embeddings": False},
        "opt-plain": OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False},
        "opt-no-last-norm": OPT | {"_remove_final_layer_norm": True},
    }),
    *_rows("OPTModel", "OPTConfig", {"opt-bare": OPT}),
    *_rows("LlamaForCausalLM", "LlamaConfig", {
        "llama": DECODER | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
        "llama-tied": DECODER | {"tie_word_embeddings": True, "num_key_value_heads": 6, "head_dim": 6},
        "llama-mqa": DECODER | {"num_key_value_heads": 1, "head_dim": 12},
        "llama-linear": DECODER | rope("linear", factor=4.0),
        "llama-dynamic": DECODER | {"max_position_embeddings": 9} | rope("dynamic", factor=4.0),
        "llama-yarn": DECODER | {"max_position_embeddings": 800} | rope("yarn", factor=4.0, beta_fast=4.0,
                                                                         original_max_position_embeddings=200),
        "llama-yarn-mscale": DECODER | {"max_position_embeddings": 800} | rope("yarn", factor=4.0, beta_fast=4.0,
                                            original_max_position_embeddings=200, mscale=1.3,
                                            mscale_all_dim=0.7, truncate=False),
        "llama-llama3": DECODER | rope("llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0,
                                       high_freq_factor=4.0),
        "llama-longrope": DECODER | rope("longrope", original_max_position_embeddings=9, factor=7.0,
                                         short_factor=[1.0, 1.5, 2.0, 2.5, 3.0], long_factor=[2.0, 4.0, 5.0, 6.0, 7.0]),
    }),
    *_rows("LlamaModel", "LlamaConfig", {"llama-bare": DECODER}),
    *_rows("MistralForCausalLM", "MistralConfig", {
        "mistral": DECODER | {"sliding_window": 5},
        "mistral-full": DECODER | {"sliding_window": None},
    }),
    *_rows("Qwen2ForCausalLM", "Qwen2Config", {
        "qwen2": EARLY | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                          "tie_word_embeddings": True},
    }),
    *_rows("Qwen3ForCausalLM", "Qwen3Config", {
        "qwen3": DECODER | {"attention_bias": True},
        "qwen3-windows": DECODER | {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    }),
    *_rows("SmolLM3ForCausalLM", "SmolLM3Config", {
        "smollm3": EARLY | {"num_hidden_layers": 4, "attention_bias": True},
        "smollm3-windows": EARLY | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 5,
                                    "mlp_bias": True, "tie_word_embeddings": False},
    }),
    *_rows("DiffLlamaForCausalLM", "DiffLlamaConfig", {
        "diffllama": DECODER | {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True,
                                "rms_norm_eps": 1e-2},
        "diffllama-tied": DECODER | {"tie_word_embeddings": True} | rope("linear", factor=4.0),
    }),
    *_rows("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        "deepseek2": LATENT | {"mlp_bias": True, "attention_bias": True, "rms_norm_eps": 1e-3},
        "deepseek2-lite": LATENT | {"q_lora_rank": None} | YARN,
    }),
    *_rows("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        "deepseek3": LATENT | {"rms_norm_eps": 1e-3} | YARN,
        "deepseek3-halves": LATENT | {"rope_interleave": False, "attention_bias": True, "q_lora_rank": None,
                                      "tie_word_embeddings": True},
    }),
    *_rows("MixtralForCausalLM", "MixtralConfig", {
        "mixtral": DECODER | {"num_local_experts": 5, "sliding_window": 5, "rms_norm_eps": 1e-3},
        "mixtral-tied": DECODER | {"num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True,
                                   "router_aux_loss_coef": 0.0},
    }, **LOOP),
    *_rows("MixtralModel", "MixtralConfig", {"mixtral-bare": DECODER | {"num_local_experts": 3}}, **LOOP),
    *_rows("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        "qwen2-moe": EARLY | QWEN_MOE | {"shared_expert_intermediate_size": 26, "use_sliding_window": True,
                                         "sliding_window": 5, "max_window_layers": 2},
        "qwen2-moe-dense": EARLY | QWEN_MOE | {"shared_expert_intermediate_size": 26, "mlp_only_layers": [1],
                                               "qkv_bias": False, "norm_topk_prob": True},
    }, **LOOP),
    *_rows("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "qwen3-moe": DECODER | QWEN_MOE | {"norm_topk_prob": True, "attention_bias": True},
        "qwen3-moe-windows": DECODER | QWEN_MOE | {"decoder_sparse_step": 2, "use_sliding_window": True,
                                                   "sliding_window": 4, "tie_word_embeddings": True},
    }, **LOOP),
    *_rows("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        "deepseek2-experts": LATENT | FINE | {"mlp_bias": True, "n_shared_experts": 2, "first_k_dense_replace": 2},
        "deepseek2-groups": LATENT | FINE | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1,
                                             "routed_scaling_factor": 1.7, "first_k_dense_replace": 0},
    }, **LOOP),
    *_rows("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        "deepseek3-experts": LATENT | FINE | {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3},
        "deepseek3-experts-free": LATENT | FINE | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False,
                                                   "n_shared_experts": 2, "first_k_dense_replace": 0},
    }, **LOOP),
    *_rows("GemmaForCausalLM", "GemmaConfig", {
        "gemma": GEMMA | {"num_key_value_heads": 1},
        "gemma-bias": GEMMA | {"attention_bias": True, "tie_word_embeddings": False},
    }),
    *_rows("Gemma2ForCausalLM", "Gemma2Config", {
        "gemma2": GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 0.7,
                           "final_logit_softcapping": 1.5},
        "gemma2-uncapped": GEMMA | {"sliding_window": 4, "layer_types": MIXED[::-1], "attn_logit_softcapping": None,
                                    "final_logit_softcapping": None, "query_pre_attn_scalar": 10},
    }),
    *_rows("Gemma3ForCausalLM", "Gemma3TextConfig", {
        "gemma3": GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 7, "num_hidden_layers": 4,
                           "layer_types": [*MIXED, "full_attention"],
                           "rope_parameters": {
                               "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}},
        "gemma3-capped": GEMMA | {"sliding_window": 4, "final_logit_softcapping": 1.5, "attention_bias": True},
    }),
    *_rows("BloomForCausalLM", "BloomConfig", {
        "bloom": BLOOM | {"layer_norm_epsilon": 1e-3},
        "bloom-untied": BLOOM | {"hidden_size": 33, "n_head": 11, "tie_word_embeddings": False},
    }),
    *_rows("BloomModel", "BloomConfig", {"bloom-bare": BLOOM | {"hidden_size": 24, "n_head": 4}}),
    *_rows("FalconForCausalLM", "FalconConfig", {
        "falcon-7b": FALCON,
        "falcon-40b": FALCON_40B | {"layer_norm_epsilon": 1e-3},
        "falcon-11b": FALCON_40B | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "activation": "relu"}
                      | rope("linear", factor=3.0),
        "falcon-heads": FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
    }),
    # Falcon's ALiBi is added twice by the eager attention of transformers; "sdpa", its default, adds it once.
    *(Row(name, "FalconForCausalLM", "FalconConfig", fields, kernel="sdpa") for name, fields in {
        "falcon-rw": FALCON_RW,
        "falcon-40b-alibi": FALCON_40B | {"alibi": True, "hidden_size": 48, "num_attention_heads": 12,
                                             "num_kv_heads": 4},
    }.items()),
    *_rows("FalconModel", "FalconConfig", {"falcon-bare": FALCON}),
    *_rows("MptForCausalLM", "MptConfig", {
        "mpt": MPT | {"layer_norm_epsilon": 1e-3},
        "mpt-scaled": MPT | {"n_heads": 5, "tie_word_embeddings": False, "attn_config": {"softmax_scale": 0.7}},
    }),
    *_rows("MptModel", "MptConfig", {"mpt-bare": MPT}),
    *_rows("BertModel", "BertConfig", {"bert": ENCODER | {"layer_norm_eps": 1e-3}}),
    Row("bert-no-pooler", "BertModel", "BertConfig", ENCODER, {"add_pooling_layer": False}),
    *_rows("BertForMaskedLM", "BertConfig", {
        "bert-mlm": ENCODER | {"hidden_act": "gelu_new", "type_vocab_size": 3},
        "bert-mlm-untied": ENCODER | {"tie_word_embeddings": False},
    }),
    *_rows("BertForPreTraining", "BertConfig", {"bert-pretraining": ENCODER}),
    *_rows("BertForNextSentencePrediction", "BertConfig", {"bert-next": ENCODER}),
    *_rows("BertForSequenceClassification", "BertConfig", {"bert-sequence": ENCODER | LABELS}),
    *_rows("BertForTokenClassification", "BertConfig", {"bert-token": ENCODER | {"num_labels": 5}}),
    *_rows("BertForQuestionAnswering", "BertConfig", {"bert-span": ENCODER}),
    *_rows("BertForMultipleChoice", "BertConfig", {"bert-choice": ENCODER | {"classifier_dropout": 0.25}}),
    *_rows("RobertaModel", "RobertaConfig", {"roberta": ROBERTA | {"layer_norm_eps": 1e-3}}),
    *_rows("RobertaForMaskedLM", "RobertaConfig", {
        "roberta-mlm": ROBERTA | {"hidden_act": "relu", "pad_token_id": 3},
        "roberta-mlm-untied": ROBERTA | {"tie_word_embeddings": False},
    }),
    *_rows("RobertaForSequenceClassification", "RobertaConfig", {"roberta-sequence": ROBERTA | LABELS}),
    *_rows("RobertaForTokenClassification", "RobertaConfig", {"roberta-token": ROBERTA | {"num_labels": 1}}),
    *_rows("RobertaForQuestionAnswering", "RobertaConfig", {"roberta-span": ROBERTA}),
    *_rows("RobertaForMultipleChoice", "RobertaConfig", {"roberta-choice": ROBERTA | {"classifier_dropout": 0.25}}),
    *_rows("LongformerModel", "LongformerConfig", {
        "longformer": LONGFORMER | {"attention_window": [4, 8, 4]},
        "longformer-wide": LONGFORMER | {"attention_window": 64, "pad_token_id": 3},
    }),
    *_rows("LongformerForMaskedLM", "LongformerConfig", {
        "longformer-mlm": LONGFORMER | {"hidden_act": "relu"},
        "longformer-mlm-untied": LONGFORMER | {"tie_word_embeddings": False},
    }),
    *_rows("LongformerForSequenceClassification", "LongformerConfig", {
        "longformer-sequence": LONGFORMER | LABELS,
    }),
    *_rows("LongformerForTokenClassification", "LongformerConfig", {
        "longformer-token": LONGFORMER | {"num_labels": 1},
    }),
    *_rows("LongformerForQuestionAnswering", "LongformerConfig", {
        "longformer-span": LONGFORMER | {"sep_token_id": 95},
    }),
    *_rows("LongformerForMultipleChoice", "LongformerConfig", {
        "longformer-choice": LONGFORMER | {"hidden_dropout_prob": 0.2},
    }),
    *_rows("BigBirdModel", "BigBirdConfig", {
        "bigbird": BIGBIRD,
        "bigbird-twice": BIGBIRD | {"num_random_blocks": 2, "rescale_embeddings": True, "layer_norm_eps": 1e-3},
        "bigbird-full": BIGBIRD | {"attention_type": "original_full", "rescale_embeddings": True},  # or it is BERT
    }),
    *_rows("BigBirdForMaskedLM", "BigBirdConfig", {"bigbird-mlm": BIGBIRD | {"hidden_act": "relu"}}),
    *_rows("BigBirdForPreTraining", "BigBirdConfig", {"bigbird-pretraining": BIGBIRD}),
    *_rows("BigBirdForTokenClassification", "BigBirdConfig", {"bigbird-token": BIGBIRD | {"num_labels": 5}}),
    *_rows("BigBirdForSequenceClassification", "BigBirdConfig", {
        "bigbird-sequence": BIGBIRD | LABELS | {"hidden_act": "relu"},
    }),
    *_rows("BigBirdForMultipleChoice", "BigBirdConfig", {"bigbird-choice": BIGBIRD | {"hidden_dropout_prob": 0.2}}),
    *_rows("BigBirdForQuestionAnswering", "BigBirdConfig", {"bigbird-span": BIGBIRD | {"sep_token_id": 95}}),
    *_rows("BigBirdForCausalLM", "BigBirdConfig", {
        "causal-bigbird": BIGBIRD | {"attention_type": "original_full", "is_decoder": True, "eos_token_id": 96},
    }),
    *_rows("AlbertModel", "AlbertConfig", {
        "albert": ALBERT | {"layer_norm_eps": 1e-3},
        "albert-groups": ALBERT | {"num_hidden_groups": 2, "hidden_act": "relu", "hidden_size": 24,
                                   "type_vocab_size": 3},
        "albert-unshared": ALBERT | {"num_hidden_groups": 3, "num_hidden_layers": 3, "embedding_size": 36},
    }),
    *_rows("AlbertForMaskedLM", "AlbertConfig", {
        "albert-mlm": ALBERT | {"hidden_act": "gelu"},
        "albert-mlm-untied": ALBERT | {"tie_word_embeddings": False, "num_hidden_groups": 2},
    }),
    *_rows("AlbertForPreTraining", "AlbertConfig", {"albert-pretraining": ALBERT | LABELS}),
    *_rows("AlbertForSequenceClassification", "AlbertConfig", {
        "albert-sequence": ALBERT | LABELS | {"classifier_dropout_prob": 0.25},
    }),
    *_rows("AlbertForTokenClassification", "AlbertConfig", {"albert-token": ALBERT | {"num_labels": 5}}),
    *_rows("AlbertForQuestionAnswering", "AlbertConfig", {"albert-span": ALBERT}),
    *_rows("AlbertForMultipleChoice", "AlbertConfig", {"albert-choice": ALBERT | {"classifier_dropout_prob": 0.25}}),
    *_rows("T5ForConditionalGeneration", "T5Config", {
        "t5": T5,
        "t5-v1.1": T5 | GATED,  # as published: the head is its own
        "t5-tied-unscaled": T5 | {"feed_forward_proj": "gated-silu", "scale_decoder_outputs": False,
                                  "num_decoder_layers": None},
    }),
    *_rows("T5Model", "T5Config", {"t5-bare": T5 | {"feed_forward_proj": "gelu_new"}}),
    *_rows("T5EncoderModel", "T5Config", {"t5-encoder": T5}),
    *_rows("BartForConditionalGeneration", "BartConfig", {
        "bart": BART,  # the last token is forced, as in every published file
        "bart-biased": BART | {"scale_embedding": True, "decoder_layerdrop": 0.2, "activation_function": "relu",
                               "forced_eos_token_id": None},
    }),
    *_rows("BartModel", "BartConfig", {"bart-bare": BART}),
    *_rows("BartForQuestionAnswering", "BartConfig", {"bart-span-bare": BART}),
    *_rows("BartForCausalLM", "BartConfig", {"bart-decoder": BART | {"encoder_layers": 2}}),
    *_rows("LEDForConditionalGeneration", "LEDConfig", {
        "led": LED,
        "led-biased": LED | {"attention_window": 4, "activation_function": "relu", "attention_dropout": 0.2},
        "led-wide": LED | {"attention_window": 32, "pad_token_id": 3},
    }),
    *_rows("LEDModel", "LEDConfig", {"led-bare": LED}),
    *_rows("LEDForQuestionAnswering", "LEDConfig", {"led-span-bare": LED}),
    *_rows("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig", {
        "pegasus-bigbird": PEGASUS,
        "pegasus-bigbird-biased": PEGASUS | {"use_bias": True, "scale_embedding": False, "num_random_blocks": 2,
                                             "activation_function": "relu", "activation_dropout": 0.2},
        "pegasus-bigbird-full": PEGASUS | {"attention_type": "original_full"},
    }),
    *_rows("BigBirdPegasusModel", "BigBirdPegasusConfig", {"pegasus-bigbird-bare": PEGASUS}),
    *_rows("BigBirdPegasusForQuestionAnswering", "BigBirdPegasusConfig", {"pegasus-bigbird-span-bare": PEGASUS}),
    *_rows("BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", {
        "pegasus-bigbird-decoder": PEGASUS | {"encoder_layers": 2},
    }),
    *_rows("M2M100ForConditionalGeneration", "M2M100Config", {
        "m2m100": M2M100,
        "m2m100-unscaled": M2M100 | {"scale_embedding": False, "activation_function": "gelu", "d_model": 33,
                                     "decoder_attention_heads": 11, "pad_token_id": 2, "encoder_layerdrop": 0.3},
    }),
    *_rows("M2M100Model", "M2M100Config", {"m2m100-bare": M2M100}),
    *_rows("NllbMoeForConditionalGeneration", "NllbMoeConfig", {
        "nllb-moe": NLLB_MOE | {"router_bias": True},
        "nllb-moe-first": NLLB_MOE | {"batch_prioritized_routing": True, "normalize_router_prob_before_dropping": True,
                                      "moe_token_dropout": 0.0, "encoder_sparse_step": 0, "decoder_sparse_step": 2,
                                      "activation_function": "gelu", "router_aux_loss_coef": 0.0},
    }),
    *_rows("NllbMoeModel", "NllbMoeConfig", {"nllb-moe-bare": NLLB_MOE}),
    *_rows("MT5ForConditionalGeneration", "MT5Config", {"mt5": T5 | GATED}),
    # With 64 places nothing is dropped in transformers: there a capacity holds in evaluation too (R4, test_peers.py).
    *_rows("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
        "switch": SWITCH | {"router_bias": True},
        "switch-untied": SWITCH | {"tie_word_embeddings": False, "num_sparse_encoder_layers": 3,
                                   "num_sparse_decoder_layers": 2, "dense_act_fn": "gelu", "router_z_loss_coef": 0.0},
    }),
    *_rows("SwitchTransformersModel", "SwitchTransformersConfig", {"switch-bare": SWITCH}),
    *_rows("SwitchTransformersEncoderModel", "SwitchTransformersConfig", {"switch-encoder": SWITCH}),
    *_rows("WhisperForConditionalGeneration", "WhisperConfig", {
        "whisper": WHISPER,
        "whisper-dropout": WHISPER | {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3,
                                      "activation_function": "relu", "decoder_layers": 3, "num_mel_bins": 5,
                                      "encoder_layerdrop": 0.2},
    }),
    *_rows("WhisperModel", "WhisperConfig", {"whisper-bare": WHISPER}),
]  # fmt: skip


ENCODERS = ("albert", "bert", "bigbird", "longformer", "roberta", "switch-encoder", "t5-encoder")
"""How the names of rows that only read begin."""
PAIRS = ("t5", "mt5", "bart", "led", "pegasus-bigbird", "switch", "m2m100", "nllb-moe")
"""How the names of rows begin that read one text and write another; those that only read aside."""
HEARING = ("whisper",)
"""How the names of rows begin whose encoder reads a spectrogram: each row one text, padded on the right only."""
COUNTING = ("T5", "MT5", "Bart", "LED", "BigBirdPegasus", "Switch", "M2M100", "NllbMoe")
"""How the names of those classes of transformers begin that count positions themselves and take none."""


class Case:
    """A row come true: the reference in memory, its files, and ours read from them. Tests do not change any of it."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row, self.folder = row, folder / row.name

    @cached_property
    def theirs(self) -> Any:
        model = reference(self.row)
        model.save_pretrained(self.folder)
        return model

    @cached_property
    def ours(self) -> lamina.Model:
        return lamina.load(self.source)

    @property
    def source(self) -> Path:
        assert self.theirs is not None  # they write the files
        return self.folder

    @property
    def decoder(self) -> bool:
        return self.ours.decoder is not None

    @property
    def two_stacks(self) -> bool:
        return self.ours.encoder is not None and self.ours.decoder is not None

    @cached_property
    def sources(self) -> torch.Tensor:
        """(4, 11): what row i of a batch reads, where there is an encoder for it; (4, bins, 22) where it has a stem."""
        stem = self.ours.spec.stem
        if stem is not None:
            return torch.randn(4, stem.bins, 22, generator=torch.Generator().manual_seed(21))
        return tokens(4, 11, seed=21)

    @property
    def reads(self) -> str:
        """The argument that `sources` are."""
        return "input_ids" if self.ours.spec.stem is None else "input_features"

    def run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        rows: list[int] | None = None,
        source: dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        model: lamina.Model | None = None,
        **more: Any,
    ) -> lamina.Output:
        """Our model on `ids`. With two stacks they are the decoder's, and row i reads `sources[rows[i]]`, or `source`,
        which holds arguments of the encoder's side."""
        model = self.ours if model is None else model
        told = {"attention_mask": mask, "position_ids": position_ids, "document_ids": document_ids}
        if not self.two_stacks:
            return model(ids, **told, **more)
        told = {f"decoder_{name}": value for name, value in told.items()}
        reads = {self.reads: self.sources[rows or list(range(len(ids)))], **(source or {})}
        return model(**reads, decoder_input_ids=ids, **told, **more)

    def theirs_on(self, ids: torch.Tensor, model: Any = None, **more: Any) -> Any:
        """The model of transformers, or a copy of it, on the same."""
        model = self.theirs if model is None else model
        again(model)
        if self.row.model in ("LongformerForQuestionAnswering", "LongformerForMultipleChoice"):
            more.setdefault("global_attention_mask", torch.zeros_like(ids))  # or they ask for three separators a text
        if self.row.model.endswith("MultipleChoice"):  # a choice of one
            return model(ids[:, None], **{n: v[:, None] if torch.is_tensor(v) else v for n, v in more.items()})
        if not self.two_stacks:
            return model(ids, **more)
        return model(**{self.reads: self.sources[: len(ids)]}, decoder_input_ids=ids, **more)

    @property
    def offset(self) -> int:
        """What transformers' position ids start from: RoBERTa counts from the id of padding."""
        return getattr(self.ours.spec.encoder and self.ours.spec.encoder.position, "offset", 0)

    @cached_property
    def ids(self) -> torch.Tensor:
        """(2, LENGTH) ids that are neither padding nor an end."""
        return tokens(2, LENGTH, seed=1)

    def segments(self, ids: torch.Tensor) -> dict[str, Any]:
        """Random token_type_ids for a model that has them."""
        stack = self.ours.spec.encoder or self.ours.spec.decoder
        if stack is None or stack.segment is None:
            return {}
        generator = torch.Generator().manual_seed(5)
        return {"token_type_ids": torch.randint(0, stack.segment.count, ids.shape, generator=generator)}


def again(model: Any) -> None:
    """Make a BigBird of transformers what its configuration says: a short text turns it dense for good."""
    said = getattr(model.config, "attention_type", "")
    for module in model.modules():
        if isinstance(module, transformers.BigBirdModel) or type(module).__name__ == "BigBirdPegasusEncoder":
            module.set_attention_type(said)


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(row: Row, **changes: Any) -> Any:
    """The model of transformers, with weights that make each feature bite."""
    config = getattr(transformers, row.config)(**{**row.fields, **changes})
    model = getattr(transformers, row.model)._from_config(config, attn_implementation=row.kernel, **row.more).eval()
    generator = torch.Generator().manual_seed(7)
    centre = 0.0 if "Gemma" in row.model else 1.0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            norm = any(word in name.lower() for word in ("norm", "ln_"))
            if norm and name.endswith("weight"):
                parameter.copy_(centre + 0.3 * noise)
            else:
                # T5 does not divide scores by a root: queries as large as the rest would leave nothing of a softmax
                large = 0.05 if "Attention.q." in name else 0.3
                parameter.copy_(noise * (large if parameter.dim() > 1 else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        if "T5" in row.model and config.tie_word_embeddings and row.fields.get("tie_word_embeddings") is False:
            # transformers ties them whatever the field says, and unties them when a file holds both
            model.lm_head.weight = torch.nn.Parameter(
                0.3 * torch.randn(model.lm_head.weight.shape, generator=generator)
            )
        if "Switch" in row.model and not config.tie_word_embeddings:
            # transformers then takes three embeddings, also for files of before that, which hold one under three names
            model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
        if row.name.endswith("-biased"):  # zero in what transformers makes, and in most files
            model.final_logits_bias.normal_(generator=generator)
    return model


def shown(out: Any, stack: str) -> tuple[Any, Any, Any]:
    """Hidden states, attention and cross-attention of a stack in an answer of transformers; None where it has none."""
    if not hasattr(out, "decoder_hidden_states"):
        return out.hidden_states, out.attentions, None
    cross = out.cross_attentions if stack == "decoder" else None
    return getattr(out, f"{stack}_hidden_states"), getattr(out, f"{stack}_attentions"), cross


def row(name: str) -> Row:
    return next(one for one in ROWS if one.name == name)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Within `tolerance` of numbers of size one, or in proportion to larger ones."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max())))


def same_files(one: Path, other: Path) -> list[str]:
    """Names of the files in which two directories differ."""
    names = sorted({path.name for path in [*one.iterdir(), *other.iterdir()]})
    return [
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json in a directory."""
    said = json.loads((folder / "config.json").read_text())
    change(said)
    (folder / "config.json").write_text(json.dumps(said, indent=2))
