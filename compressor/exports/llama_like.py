"""What ONNX and GGUF exports must know of a decoder of Llama's kind, read from `config.json`.

Llama, Mistral, Qwen2 and Qwen3 share one block: RMS norm, rotary positions, grouped queries, a gated MLP. They differ
in biases and in the norm of queries and keys, which the stored tensors themselves tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.exports.source import architecture_of

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class LlamaLike:
    """The numbers of `config.json` under short names."""

    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    eps: float
    rope_theta: float
    rope: Mapping[str, Any]
    tied: bool


def parse_llama_like(
    target: str, config: Mapping[str, Any], *, also: Sequence[str] = (), scalings: Sequence[str] = ()
) -> LlamaLike:
    """Reads a configuration; raises ValueError for what the exports to `target` do not know.

    Args:
        also: other architectures that the target takes, for the sentence that refuses this one.
        scalings: kinds of rotary scaling that the target takes.
    """
    architecture = architecture_of(config)
    if architecture not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *also))
        raise ValueError(f"export to {target} knows {known}, this is {architecture}; export to dense instead")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *scalings):
        raise ValueError(f"export to {target} knows no rotary scaling {kind!r}; export to dense instead")
    qwen = architecture.startswith("Qwen")
    if config.get("sliding_window") and (not qwen or config.get("use_sliding_window")):
        raise ValueError(f"export to {target} knows no sliding window; export to dense instead")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"export to {target} knows the activation silu, this is {config['hidden_act']!r}")
    heads = int(config["num_attention_heads"])
    return LlamaLike(
        architecture=architecture,
        vocabulary=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        positions=int(config.get("max_position_embeddings", 2048)),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope={**rope, "rope_type": kind},
        tied=bool(config.get("tie_word_embeddings", False)),
    )
