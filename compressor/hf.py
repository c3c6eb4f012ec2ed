"""Importing this registers the checkpoint format with transformers, for `AutoModelForCausalLM.from_pretrained(OUT)`.

Linears and embeddings that the configuration names become `CompressedLinear` and `CompressedEmbedding` before the
weights load. The folder's manifest is not checked on this path; `compress verify OUT` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, linear_shape, tie
from compressor.scheme import QUANT_METHOD, QuantizationConfig


class HalfweightConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` block as transformers holds it."""

    def __init__(self, **record: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.parsed = QuantizationConfig.from_dict({**record, "quant_method": QUANT_METHOD})

    def to_dict(self) -> dict[str, Any]:
        return self.parsed.to_dict()


class HalfweightQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules for packed ones before transformers loads the weights."""

    requires_calibration = True
    quantization_config: HalfweightConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        replace_modules(model, self.quantization_config.parsed)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        tie_head(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from compressor.finetuning import dense_modules

        dense_modules(model, dtype or torch.bfloat16)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def replace_modules(model: Any, config: QuantizationConfig) -> None:
    """Puts packed modules, on the meta device and without values, in the place of those that `config` names."""
    for name, module in list(model.named_modules()):
        scheme = config.scheme_of(name)
        if scheme is None:
            continue
        with torch.device("meta"):
            packed: nn.Module
            if isinstance(module, nn.Embedding):
                packed = CompressedEmbedding(
                    module.num_embeddings, module.embedding_dim, scheme, factor=_embedding_factor(module)
                )
            else:
                out_features, in_features = linear_shape(module)
                has_bias = getattr(module, "bias", None) is not None
                packed = CompressedLinear(in_features, out_features, scheme, bias=has_bias)
        prefix, _, child = name.rpartition(".")
        parent = model.get_submodule(prefix)
        setattr(parent, child, packed)
        if next(parent.parameters(recurse=False), None) is None and next(parent.buffers(recurse=False), None) is None:
            # Else GPT-2 would give this module's linears initial values, and not find their plain weights.
            parent._is_hf_initialized = True
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, CompressedEmbedding) and isinstance(head, nn.Linear) and model.config.tie_word_embeddings:
        with torch.device("meta"):
            tied = CompressedLinear(embedding.embedding_dim, embedding.num_embeddings, embedding.scheme)
        for tensor in list(tied.tensors):
            del tied._buffers[tensor]
        model.set_output_embeddings(tied)
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}


def _embedding_factor(module: nn.Embedding) -> float:
    """What a model's own kind of embedding multiplies its rows by."""
    factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(factor)


def tie_head(model: Any) -> None:
    """Lets an LM head without tensors of its own read the embedding's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, CompressedEmbedding) and isinstance(head, CompressedLinear) and not head.tensors:
        tie(head, embedding)


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(HalfweightConfig)
    register_quantizer(QUANT_METHOD)(HalfweightQuantizer)
