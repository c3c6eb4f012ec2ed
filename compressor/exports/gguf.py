"""`gguf`: one file for llama.cpp; int4 as Q4_0, int8 as Q8_0, the rest bf16, norms in float32.

Both types keep an fp16 scale for 32 values of a row, so a group of 32 or of a multiple repeats its scale and nothing is
rounded, as long as fp16 holds the scale; where it does not, it is said first. Groups that 32 does not divide are stored
in bf16. Llama's queries and keys are stored with the rows of each head in llama.cpp's rotary order.

Stored blocks: Q4_0 is a scale and 16 bytes, byte j with value j low and value j + 16 high, each plus 8; Q8_0 is a scale
and 32 signed bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from compressor.exports import source as exported
from compressor.exports.dense import write_config
from compressor.exports.gguf_tokenizer import add_tokenizer, check_tokenizer
from compressor.exports.gptq import inexact_in_fp16
from compressor.exports.llama_like import LlamaLike, parse_llama_like
from compressor.exports.source import Source, bits_of
from compressor.formats import QuantizedWeight
from compressor.from_gguf import ROPE_FACTORS, llama3_factors, yarn_attention
from compressor.scheme import Scheme

FILE = "model.gguf"
_BLOCK = 32
_TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


_SCALINGS = ("linear", "yarn", "llama3")


def _shape(config: Mapping[str, Any]) -> LlamaLike:
    return parse_llama_like("gguf", config, scalings=_SCALINGS)


def losses(source: Source) -> list[str]:
    """Scales that fp16 does not hold.

    Raises:
        ValueError: an architecture or a tokenizer that llama.cpp would not take from here.
    """
    check_tokenizer(source.checkpoint.folder, _shape(source.config).vocabulary)
    fitting = [name for name, scheme in source.exported_schemes().items() if _fits(scheme, source.shape_of(name)[1])]
    count = sum(inexact_in_fp16(source.scale(name)) for name in fitting)
    return [f"{count} scales are rounded to fp16"] if count else []


def _fits(scheme: Scheme, columns: int) -> bool:
    return bits_of(scheme) is not None and (columns if scheme.group_size == -1 else scheme.group_size) % _BLOCK == 0


def write(source: Source, stage: Path) -> None:
    """Writes model.gguf, and config.json for whoever reads the folder."""
    shape = _shape(source.config)
    writer = gguf.GGUFWriter(
        stage / FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[shape.architecture]], use_temp_file=True
    )
    # Its own would lie in the system's folder for temporary files, which may be small, or in memory.
    writer.temp_file = tempfile.TemporaryFile(dir=stage)  # noqa: SIM115
    _add_shape(writer, shape)
    add_tokenizer(writer, source.checkpoint.folder, shape.vocabulary)
    names = _Names(shape)
    schemes = source.exported_schemes()
    for name in source.schemes:
        layer = source.layer(name)
        weight = names.reordered(name, layer.weight)
        bits = bits_of(schemes[name]) if _fits(schemes[name], weight.values.shape[1]) else None
        if bits is None:
            dtype = getattr(torch, schemes[name].dtype)
            _add_floats(writer, names[f"{name}.weight"], weight.dequantized().to(dtype))
        else:
            writer.add_tensor(names[f"{name}.weight"], blocks(weight, bits).numpy(), raw_dtype=_TYPES[bits])
    for name, tensor in source.plain():
        module = name.rpartition(".")[0]
        _add_floats(writer, names[name], names.reordered(module, QuantizedWeight(tensor)).values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_config(stage, source.config)


def _add_shape(writer: Any, shape: LlamaLike) -> None:
    writer.add_name("halfweight export")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    _add_rope_scaling(writer, shape)


def _add_rope_scaling(writer: Any, shape: LlamaLike) -> None:
    """llama.cpp divides Llama 3's frequencies by factors that it reads; of the others it knows the formula."""
    kind, rope = shape.rope["rope_type"], shape.rope
    if kind == "llama3":
        writer.add_tensor(ROPE_FACTORS, llama3_factors(shape.head_dim, shape.rope_theta, rope).astype(np.float32))
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings") or shape.positions))
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_attn_factors(
                float(rope["attention_factor"]) / yarn_attention(float(rope["factor"]))
            )


def _add_floats(writer: Any, name: str, tensor: Tensor) -> None:
    """Vectors in float32, as llama.cpp wants norms and biases; matrices in their own dtype."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype in (torch.float16, torch.float32):
        writer.add_tensor(name, tensor.numpy())
    else:
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def blocks(weight: QuantizedWeight, bits: int) -> Tensor:
    """[O, I] grid values and scales as rows of Q4_0 or Q8_0 blocks, uint8."""
    assert weight.scale is not None
    rows, columns = weight.values.shape
    repeats = columns // weight.scale.shape[1] // _BLOCK
    scale = weight.scale.to(torch.float16).repeat_interleave(repeats, dim=1)[:, :, None].view(torch.uint8)
    values = weight.values.view(rows, -1, _BLOCK)
    if bits == 4:
        low, high = (values + 8).to(torch.uint8).split(_BLOCK // 2, dim=2)
        data = low | high << 4
    else:
        data = values.contiguous().view(torch.uint8)
    return torch.cat((scale, data), dim=2).flatten(1)


def from_blocks(raw: Tensor, bits: int) -> QuantizedWeight:
    """The inverse of `blocks`, with a scale for each 32 values."""
    size = 2 + _BLOCK * bits // 8
    parts = raw.unflatten(1, (-1, size))
    scale = parts[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    data = parts[:, :, 2:]
    if bits == 4:
        values = torch.cat((data & 15, data >> 4), dim=2).to(torch.int8) - 8
    else:
        values = data.contiguous().view(torch.int8)
    return QuantizedWeight(values.flatten(1), scale)


class _Names:
    """llama.cpp's names of tensors, and its order of rows."""

    def __init__(self, shape: LlamaLike) -> None:
        self._map = gguf.get_tensor_name_map(_ARCHITECTURES[shape.architecture], shape.layers)
        self._turns = shape.architecture in ("LlamaForCausalLM", "MistralForCausalLM")
        self._heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}

    def __getitem__(self, name: str) -> str:
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no place for the tensor {name!r}; export to dense instead")
        return str(found)

    def reordered(self, module: str, weight: QuantizedWeight, *, back: bool = False) -> QuantizedWeight:
        """Rows of each head of q and k with the halves that rotate together side by side, or `back`."""
        heads = self._heads.get(module.rpartition(".")[2])
        if heads is None or not self._turns:
            return weight
        rows = torch.arange(len(weight.values)).view(heads, 2, -1).transpose(1, 2).flatten()
        rows = rows.argsort() if back else rows
        return QuantizedWeight(weight.values[rows], None if weight.scale is None else weight.scale[rows])


class Exported(exported.Exported):
    """Tensors of the file under the names of the checkpoint."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self._names = _Names(_shape(config))
        self._found = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}

    def weight(self, name: str, scheme: Scheme) -> QuantizedWeight | None:
        tensor = self._found[self._names[f"{name}.weight"]]
        bits = next((bits for bits, kind in _TYPES.items() if kind == tensor.tensor_type), None)
        if bits is None:
            return exported.fitted(self.dense(name), scheme)
        weight = from_blocks(torch.from_numpy(np.array(tensor.data)), bits)
        assert weight.scale is not None
        groups = 1 if scheme.group_size == -1 else weight.values.shape[1] // scheme.group_size
        scale = weight.scale.unflatten(1, (groups, -1))[:, :, 0].to(getattr(torch, scheme.dtype))
        return self._names.reordered(name, QuantizedWeight(weight.values, scale), back=True)

    def dense(self, name: str) -> Tensor:
        return self._floats(f"{name}.weight")

    def plain(self, modules: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name in exported.plain_names(self.folder, modules):
            if self._names[name] in self._found:
                yield name, self._floats(name)

    def _floats(self, name: str) -> Tensor:
        tensor = self._found[self._names[name]]
        data = torch.from_numpy(np.array(tensor.data))
        if data.dtype != torch.float16:
            data = data.view(torch.bfloat16) if data.dtype == torch.uint8 else data.to(torch.bfloat16)
        module = name.rpartition(".")[0]
        return self._names.reordered(module, QuantizedWeight(data), back=True).values
