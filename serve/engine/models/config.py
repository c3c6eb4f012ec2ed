"""What the decoder must know of a model, read from a Hugging Face `config.json`, checked before any weight is read.

One decoder covers the six families; what differs is written as data: the norm, the positions, the MLP, the biases,
and the names of the modules in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.kernels.attention import cache_dtype_of, row_bytes


class UnservedError(ValueError):
    """The decoder does not know this model; transformers may."""


@dataclass(frozen=True)
class ModuleNames:
    """Where a family keeps its modules; `{i}` is the layer's number."""

    embed: str
    final_norm: str
    layer: str
    q: tuple[str, ...]
    o: str
    up: tuple[str, ...]
    down: str
    attention_norm: str
    mlp_norm: str
    positions: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    lm_head: str = "lm_head"


LLAMA_NAMES = ModuleNames(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{i}",
    q=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
GPT2_NAMES = ModuleNames(
    embed="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.{i}",
    q=("attn.c_attn",),
    o="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
)
OPT_NAMES = ModuleNames(
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{i}",
    q=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
)


@dataclass(frozen=True)
class Rope:
    theta: float
    kind: str = "default"
    parameters: Mapping[str, Any] | None = None

    @property
    def stretched_to(self) -> int:
        """The positions that YaRN's frequencies are made for, which config.json need not say again; 0: another kind."""
        if self.kind != "yarn" or self.parameters is None:
            return 0
        return int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    names: ModuleNames
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    rms_norm: bool
    gated_mlp: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    rope: Rope | None
    position_offset: int = 0
    conv1d: bool = False
    dtype: str = "bfloat16"
    sliding_window: int | None = None

    def token_bytes(self, cache_dtype: str) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * row_bytes(self.head_dim, cache_dtype_of(cache_dtype))

    @property
    def sequence_bytes(self) -> int:
        """Bytes that a sequence keeps besides: none."""
        return 0

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    architectures = config.get("architectures") or []
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    if architecture not in ARCHITECTURES:
        raise UnservedError(
            f"unsupported architecture {architecture}; the torch runtime serves {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        return ARCHITECTURES[architecture](architecture, config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error} which {architecture} needs") from error


def _llama(architecture: str, config: Mapping[str, Any]) -> ModelConfig:
    """Llama, Mistral, Qwen2, Qwen3: RMS norm, rotary positions, gated MLP; they differ in biases and qk-norm."""
    heads, rope = config["num_attention_heads"], _rope(config)
    qwen2, qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
    window = config.get("sliding_window")
    if qwen2 or qwen3:
        window = window if config.get("use_sliding_window") else None
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        names=LLAMA_NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_positions=max(config.get("max_position_embeddings", 2048), rope.stretched_to),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config.get("hidden_act", "silu"), ("silu",)),
        rms_norm=True,
        gated_mlp=True,
        qkv_bias=True if qwen2 else bias,
        o_bias=False if qwen2 else bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=qwen3,
        tied=bool(config.get("tie_word_embeddings", False)),
        rope=rope,
        dtype=_dtype(config),
        sliding_window=window,
    )


def _gpt2(architecture: str, config: Mapping[str, Any]) -> ModelConfig:
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise UnservedError("this GPT-2 scales its attention unusually (scale_attn_*)")
    return ModelConfig(
        architecture=architecture,
        names=GPT2_NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["n_embd"],
        intermediate_size=config.get("n_inner") or 4 * config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        num_kv_heads=config["n_head"],
        head_dim=config["n_embd"] // config["n_head"],
        max_positions=config["n_positions"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new"), tuple(ACTIVATIONS)),
        rms_norm=False,
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        rope=None,
        conv1d=True,
        dtype=_dtype(config),
    )


def _opt(architecture: str, config: Mapping[str, Any]) -> ModelConfig:
    hidden = config["hidden_size"]
    if not config.get("do_layer_norm_before", True) or config.get("word_embed_proj_dim", hidden) != hidden:
        raise UnservedError("this OPT normalises after its blocks or projects its embeddings, as opt-350m does")
    if not config.get("layer_norm_elementwise_affine", True) or config.get("_remove_final_layer_norm"):
        raise UnservedError("this OPT has layer norms without weights, or none at the end, which no published size has")
    bias = bool(config.get("enable_bias", True))
    return ModelConfig(
        architecture=architecture,
        names=OPT_NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["ffn_dim"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_attention_heads"],
        head_dim=hidden // config["num_attention_heads"],
        max_positions=config["max_position_embeddings"],
        norm_eps=1e-5,
        activation=_activation(config.get("activation_function", "relu"), tuple(ACTIVATIONS)),
        rms_norm=False,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        rope=None,
        position_offset=2,
        dtype=_dtype(config),
    )


ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu")

ARCHITECTURES = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
}


def _activation(name: str, accepted: tuple[str, ...]) -> str:
    if name not in accepted:
        raise UnservedError(f"unsupported activation {name!r}; accepted here: {', '.join(accepted)}")
    return name


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnservedError(f"unsupported rotary scaling {kind!r}; accepted: {', '.join(ROPE_KINDS)}")
    if kind == "yarn" and parameters.get("mscale"):
        raise UnservedError(
            "unsupported rotary scaling: yarn with mscale, which only models of other architectures use"
        )
    for name in ROPE_KINDS[kind]:
        if not isinstance(value := parameters.get(name), int | float):
            raise ValueError(
                f"rotary scaling {kind!r} needs a number as {name}, but has {value!r}: write one into config.json"
            )
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    return Rope(float(theta), kind, parameters)


LLAMA3_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": LLAMA3_PARAMETERS,
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The kinds of rotary positions, and the parameters that each must have."""
