"""`onnx`: a graph for onnxruntime and Optimum; int4 and int8 weights in `MatMulNBits`, bit by bit.

Language models of Llama's kind get a KV cache; BERT and RoBERTa are encoders, with or without a head for classes.

Grid values and scales are kept exactly: `MatMulNBits` reads unsigned values around half the range, which is what a
symmetric grid becomes, and its blocks are powers of two, so that a scale may stand several times. Tables and weights
without a grid are bf16. Tensors lie in `model.onnx_data`, each written as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from compressor.exports import bert_like
from compressor.exports import source as exported
from compressor.exports.bert_like import BertLike, parse_bert_like
from compressor.exports.dense import write_config
from compressor.exports.llama_like import LlamaLike, parse_llama_like
from compressor.exports.source import Source, architecture_of, bits_of
from compressor.formats import QuantizedWeight
from compressor.formats.nibbles import pack_nibbles, unpack_nibbles
from compressor.scheme import Scheme

_DATA = "model.onnx_data"
_OPSET, _IR_VERSION = 18, 8
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_HINT = "export to onnx needs the package 'onnx': pip install 'halfweight[onnx]'"


def losses(source: Source) -> list[str]:
    """Nothing beyond what no target holds.

    Raises:
        ValueError: the model is not of a kind that the graph knows, or the package onnx is missing.
    """
    _shape(source.config)
    _package()
    return []


def _shape(config: Mapping[str, Any]) -> LlamaLike | BertLike:
    if architecture_of(config) in bert_like.ARCHITECTURES:
        return parse_bert_like("onnx", config)
    return parse_llama_like("onnx", config, also=bert_like.ARCHITECTURES)


def _package() -> Any:
    try:
        import onnx
    except ImportError:
        raise ValueError(_HINT) from None
    return onnx


def write(source: Source, stage: Path) -> None:
    """Writes model.onnx, its data and config.json."""
    onnx = _package()
    with (stage / _DATA).open("wb") as data:
        graph = _graph(_shape(source.config), _Weights(source, data))
    opsets = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="halfweight")
    onnx.save(model, stage / "model.onnx")
    write_config(stage, source.config)


def _graph(shape: LlamaLike | BertLike, weights: _Weights) -> Any:
    from compressor.exports import onnx_encoder, onnx_graph

    return onnx_encoder.build(shape, weights) if isinstance(shape, BertLike) else onnx_graph.build(shape, weights)


def block_size(group: int) -> int | None:
    """The largest block of `MatMulNBits` that divides a group, or None."""
    block = min(group & -group, _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else None


class _Weights:
    """Adds linears to a graph, and their tensors to the data file, one layer at a time."""

    def __init__(self, source: Source, data: IO[bytes]) -> None:
        self.source, self.data = source, data
        self.stored: dict[str, Any] = {}

    def linear(self, graph: Any, x: str, module: str) -> str:
        tied = module == "lm_head" and self.source.config.get("tie_word_embeddings", False)
        stored = "model.embed_tokens" if tied else module
        product = self._product(graph, x, stored)
        bias = f"{module}.bias"
        return graph.op("Add", product, self._floats(graph, bias)) if self.holds(bias) else product

    def _product(self, graph: Any, x: str, module: str) -> str:
        grid = self._grid(graph, module)
        if grid is None:
            return graph.op("MatMul", x, graph.op("Transpose", self._floats(graph, f"{module}.weight"), perm=[1, 0]))
        names = (f"{module}.weight_packed", f"{module}.weight_scale")
        rows, columns = grid.shape
        return graph.op(
            "MatMulNBits", x, *names, domain="com.microsoft", K=columns, N=rows, bits=grid.bits, block_size=grid.block
        )

    def embedding(self, graph: Any, ids: str, module: str) -> str:
        grid = self._grid(graph, module)
        if grid is None:
            return graph.op("Gather", self._floats(graph, f"{module}.weight"), ids, axis=0)
        if grid.bits != 8 or grid.groups != 1:
            raise ValueError("embeddings are stored as int8 with one scale a row; this checkpoint has others")
        blocks = graph.op("Gather", f"{module}.weight_packed", ids, axis=0)
        values = graph.op("Reshape", graph.op("Cast", blocks, to=1), graph.ints(0, 0, -1))
        per_block = graph.op("Reshape", f"{module}.weight_scale", graph.ints(grid.shape[0], -1))
        scale = graph.op("Gather", graph.op("Slice", per_block, *map(graph.ints, (0, 1, 1))), ids, axis=0)
        return graph.op("Mul", graph.op("Sub", values, graph.constant(128.0)), scale)

    def parameter(self, graph: Any, name: str) -> str:
        return self._floats(graph, name)

    def holds(self, name: str) -> bool:
        return name in self.source.checkpoint.shards

    def _floats(self, graph: Any, name: str) -> str:
        """A tensor of floats, stored in its own dtype and read as float32."""
        if name not in self.stored:
            module, _, key = name.rpartition(".")
            packed = module in self.source.schemes and key == "weight"
            tensor = self.source.layer(module).dense() if packed else self.source.checkpoint.tensor(name)
            self._add(graph, name, tensor)
            self.stored[name] = graph.op("Cast", name, to=1)
        return self.stored[name]

    def _grid(self, graph: Any, module: str) -> _Grid | None:
        """Stores a module's grid values and scales, once; None where it has none that MatMulNBits can read."""
        if module in self.stored:
            return self.stored[module]
        scheme = self.source.exported_schemes().get(module)
        bits = bits_of(scheme)
        grid = None
        if scheme is not None and bits is not None:
            grid = self._store(graph, module, bits)
        self.stored[module] = grid
        return grid

    def _store(self, graph: Any, module: str, bits: int) -> _Grid | None:
        weight = self.source.layer(module).weight
        assert weight.scale is not None
        (rows, columns), groups = weight.values.shape, weight.scale.shape[1]
        block = block_size(columns // groups)
        if block is None:
            return None
        unsigned = pack_nibbles(weight.values) if bits == 4 else (weight.values.to(torch.int16) + 128).to(torch.uint8)
        scale = weight.scale.float().repeat_interleave(columns // groups // block, dim=1)
        self._add(graph, f"{module}.weight_packed", unsigned.reshape(rows, columns // block, block * bits // 8))
        self._add(graph, f"{module}.weight_scale", scale.flatten())
        return _Grid((rows, columns), bits, block, groups)

    def _add(self, graph: Any, name: str, tensor: Tensor) -> None:
        """An initialiser whose bytes go to the data file."""
        onnx = _package()
        kinds = onnx.TensorProto
        dtypes = {torch.uint8: kinds.UINT8, torch.float32: kinds.FLOAT, torch.bfloat16: kinds.BFLOAT16}
        dtypes[torch.float16] = kinds.FLOAT16
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        proto = kinds(name=name, data_type=dtypes[tensor.dtype], dims=tensor.shape, data_location=kinds.EXTERNAL)
        entries = {"location": _DATA, "offset": self.data.tell(), "length": raw.nbytes}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))
        self.data.write(raw)
        self.data.write(b"\0" * (-raw.nbytes % 64))
        graph.initializers.append(proto)


@dataclass(frozen=True)
class _Grid:
    """How a weight [O, I] was given to MatMulNBits."""

    shape: tuple[int, int]
    bits: int
    block: int
    groups: int


class Exported(exported.Exported):
    """Initialisers under the names of the checkpoint."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        model = _package().load(folder / "model.onnx", load_external_data=False)
        self._found = {proto.name: proto for proto in model.graph.initializer if proto.external_data}
        self._bytes = np.memmap(folder / _DATA, np.uint8, "r")

    def weight(self, name: str, scheme: Scheme) -> QuantizedWeight | None:
        bits = bits_of(scheme)
        if bits is None or f"{name}.weight_packed" not in self._found:
            return exported.fitted(self.dense(name), scheme)
        packed = self._tensor(f"{name}.weight_packed")
        unsigned = packed.flatten(1)
        values = unpack_nibbles(unsigned) if bits == 4 else (unsigned.to(torch.int16) - 128).to(torch.int8)
        groups = 1 if scheme.group_size == -1 else values.shape[1] // scheme.group_size
        scale = self._tensor(f"{name}.weight_scale").reshape(len(values), groups, -1)[:, :, 0]
        return QuantizedWeight(values, scale.to(getattr(torch, scheme.dtype)))

    def dense(self, name: str) -> Tensor:
        return self._tensor(f"{name}.weight")

    def plain(self, modules: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self._found):
            module, _, key = name.rpartition(".")
            if module not in modules or key == "bias":
                yield name, self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        proto = self._found[name]
        kinds = _package().TensorProto
        dtypes = {kinds.UINT8: torch.uint8, kinds.FLOAT: torch.float32, kinds.BFLOAT16: torch.bfloat16}
        dtypes[kinds.FLOAT16] = torch.float16
        entries = {entry.key: entry.value for entry in proto.external_data}
        start, length = int(entries["offset"]), int(entries["length"])
        raw = torch.from_numpy(np.array(self._bytes[start : start + length]))
        return raw.view(dtypes[proto.data_type]).reshape(tuple(proto.dims))
