"""The layers: each file holds a spec (data), the module it builds, and what the module declares."""

from __future__ import annotations

from lamina.layers.attention import Attention, AttentionSpec
from lamina.layers.batch_norm import BatchNorm, BatchNormSpec
from lamina.layers.bias import AlibiSpec, BucketBiasSpec
from lamina.layers.bigbird import BigBird, BigBirdSpec
from lamina.layers.block import BranchSpec, Layer, LayerSpec, StepSpec, SumSpec
from lamina.layers.call import Call, Neighbours, Record
from lamina.layers.capacity import CapacitySpec
from lamina.layers.compressive import CompressiveSpec
from lamina.layers.convolution import ConvolutionStem, ConvolutionStemSpec
from lamina.layers.cross import CrossAttention, CrossAttentionSpec
from lamina.layers.differential import Differential, DifferentialSpec
from lamina.layers.embedding import Embedding, EmbeddingSpec, Segment, SegmentSpec
from lamina.layers.expert_choice import ExpertChoiceSpec
from lamina.layers.experts import Experts, ExpertsSpec, rebalance
from lamina.layers.feedforward import FeedForward, FeedForwardSpec
from lamina.layers.head import (
    LabelHead,
    LabelHeadSpec,
    LabelStepSpec,
    LanguageHead,
    LanguageHeadSpec,
    Pooler,
    PoolerSpec,
    TransformSpec,
    mean_of,
)
from lamina.layers.infini import InfiniSpec
from lamina.layers.initial import Draw, FanInInitialSpec, InitialSpec, NormalInitialSpec
from lamina.layers.latent import LatentAttention, LatentAttentionSpec
from lamina.layers.longformer import Longformer, LongformerSpec
from lamina.layers.memorizing import MemorizingSpec
from lamina.layers.memory_attention import MemoryAttention, MemoryAttentionSpec
from lamina.layers.norm import LayerNorm, LayerNormSpec, NormSpec, RMSNorm, RMSNormSpec
from lamina.layers.positions import LearnedPositionSpec, SinusoidalPositionSpec
from lamina.layers.product_keys import ProductKeys, ProductKeySpec
from lamina.layers.recurrence import RecurrenceSpec
from lamina.layers.recurrent import RecurrentMemory, RecurrentMemorySpec
from lamina.layers.relative import ShawSpec, TransformerXLSpec
from lamina.layers.retrieval import (
    ChunkedCrossAttention,
    ChunkedCrossAttentionSpec,
    NeighbourEncoder,
    NeighbourEncoderSpec,
    neighbour_encoder,
    retrieving,
)
from lamina.layers.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RotarySpec,
    YarnScaling,
)
from lamina.layers.router import GroupLimitSpec, TopKSpec
from lamina.layers.router_loss import RouterLossSpec
from lamina.layers.stack import Stack, StackSpec

__all__ = [
    "AlibiSpec",
    "Attention",
    "AttentionSpec",
    "BatchNorm",
    "BatchNormSpec",
    "BigBird",
    "BigBirdSpec",
    "BranchSpec",
    "BucketBiasSpec",
    "Call",
    "CapacitySpec",
    "ChunkedCrossAttention",
    "ChunkedCrossAttentionSpec",
    "CompressiveSpec",
    "ConvolutionStem",
    "ConvolutionStemSpec",
    "CrossAttention",
    "CrossAttentionSpec",
    "Differential",
    "DifferentialSpec",
    "Draw",
    "DynamicNTKScaling",
    "Embedding",
    "EmbeddingSpec",
    "ExpertChoiceSpec",
    "Experts",
    "ExpertsSpec",
    "FanInInitialSpec",
    "FeedForward",
    "FeedForwardSpec",
    "GroupLimitSpec",
    "InfiniSpec",
    "InitialSpec",
    "LabelHead",
    "LabelHeadSpec",
    "LabelStepSpec",
    "LanguageHead",
    "LanguageHeadSpec",
    "LatentAttention",
    "LatentAttentionSpec",
    "Layer",
    "LayerNorm",
    "LayerNormSpec",
    "LayerSpec",
    "LearnedPositionSpec",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Longformer",
    "LongformerSpec",
    "MemorizingSpec",
    "MemoryAttention",
    "MemoryAttentionSpec",
    "NTKScaling",
    "NeighbourEncoder",
    "NeighbourEncoderSpec",
    "Neighbours",
    "NormSpec",
    "NormalInitialSpec",
    "Pooler",
    "PoolerSpec",
    "ProductKeySpec",
    "ProductKeys",
    "RMSNorm",
    "RMSNormSpec",
    "Record",
    "RecurrenceSpec",
    "RecurrentMemory",
    "RecurrentMemorySpec",
    "RotarySpec",
    "RouterLossSpec",
    "Segment",
    "SegmentSpec",
    "ShawSpec",
    "SinusoidalPositionSpec",
    "Stack",
    "StackSpec",
    "StepSpec",
    "SumSpec",
    "TopKSpec",
    "TransformSpec",
    "TransformerXLSpec",
    "YarnScaling",
    "mean_of",
    "neighbour_encoder",
    "rebalance",
    "retrieving",
]
