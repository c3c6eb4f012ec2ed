"""Token embedding and LM head of vLLM over packed tables; a tied head reads the embedding's tensors.

Some of vLLM's models (OPT among them) build these layers without the quantisation config, so two subclasses, which
vLLM puts in the place of its own, hand it on where the checkpoint is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation import backends
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, tie
from compressor.formats import make_format
from compressor.kernels import cuda
from compressor.scheme import QUANT_METHOD, Scheme
from serve.engine.models.linears import KernelEmbedding, KernelLinear, PlainEmbedding, PlainLinear, packed_embedding
from serve.vllm_plugin.linear import HalfweightLinearMethod, packed_part, run


class HalfweightEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """How a table [vocabulary, hidden] is created, loaded, and read by rows or as the head's weight.

    Args:
        head: whether the table is multiplied, as an LM head or as an embedding that one is tied to.
    """

    def __init__(self, scheme: Scheme, prefix: str, head: bool) -> None:
        self.scheme = scheme
        self.prefix = prefix or "the token embedding"
        self.head = head

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Registers a parameter for each stored tensor; vLLM pads the vocabulary with zeros."""
        HalfweightLinearMethod([self.scheme], self.prefix).create_weights(layer, *sizes, **attributes)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The head keeps nothing of its own."""
        for name in list(layer._parameters):
            if name != "bias":
                delattr(layer, name)
        layer.tied_to = (embed_tokens,)  # in a tuple, so that the embedding is no child of the head
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Takes the stored tensors to the kernel's layout and frees them."""
        if hasattr(layer, "tied_to"):
            layer.weight = layer.tied_to[0].weight
        if hasattr(layer, "packed") or hasattr(layer, "tied_to"):
            return
        stored = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False) if name != "bias"}
        if isinstance(layer, ParallelLMHead):
            layer.packed = quick_head(packed_part(self.scheme, stored, self.prefix), layer.params_dtype)
        else:
            layer.packed, layer.packed_head = packed_table(self.scheme, stored, self.prefix)
            if self.head and isinstance(head := quick_head(layer.packed_head, layer.params_dtype), PlainLinear):
                layer.packed, layer.packed_head = PlainEmbedding(head.weight), head
        for name in stored:
            delattr(layer, name)
        layer.weight = next(layer.packed.buffers())  # by this name vLLM's adapters find a layer's device

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """[..., hidden]: the rows `ids`."""
        rows: Tensor = layer.packed(ids)
        return rows.to(layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., vocabulary]; in float32 by a tied head, or by the embedding itself, which some models use as theirs."""
        table = layer.tied_to[0] if hasattr(layer, "tied_to") else layer
        if not hasattr(table, "packed_head"):
            return run(layer.packed, x, bias)
        head = table.packed_head
        return run(head, x.float() if isinstance(head, KernelLinear) else x, bias)


def packed_table(scheme: Scheme, stored: dict[str, Tensor], prefix: str) -> tuple[nn.Module, nn.Module]:
    """The embedding, and the LM head that shares its memory."""
    packed = make_format(scheme)
    try:
        packed.validate(stored)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}; part of it may be missing in the checkpoint") from None
    rows, columns = packed.shape_of(stored)
    with torch.device("meta"):
        table = CompressedEmbedding(rows, columns, scheme)
        head = CompressedLinear(columns, rows, scheme)
    table.assign(stored)
    embedding = packed_embedding(table)
    if isinstance(embedding, KernelEmbedding):
        return embedding, embedding.head()
    tie(head, table)
    return table, head


def quick_head(head: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The LM head, unpacked for good where a GPU would unpack all of it for every token."""
    if not isinstance(head, CompressedLinear) or head.scheme.low_rank is not None:
        return head
    shape = (head.out_features, head.in_features)
    if not cuda.unpacks(head.scheme.format, head.tensors, shape, head.scheme.group_size):
        return head
    return PlainLinear(head.unpacked().to(dtype), None)


def _own_config() -> Any:
    """The quantisation config of the model that is being built, if it is ours.

    The heads that guess tokens ahead are built under the config of the model that they guess for, and are not packed.
    """
    if backends.model_tag.endswith("_head"):
        return None
    current = get_current_vllm_config_or_none()
    config = None if current is None else current.quant_config
    return config if config is not None and config.get_name() == QUANT_METHOD else None


class _Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **({"quant_config": _own_config()} | named))


class _Head(ParallelLMHead):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **({"quant_config": _own_config()} | named))


def register_layers() -> None:
    """Puts the subclasses in the place of vLLM's classes, unless some plugin already did."""
    for layer, own in ((VocabParallelEmbedding, _Embedding), (ParallelLMHead, _Head)):
        if layer.__name__ not in op_registry_oot:
            layer.register_oot(own)
