"""The ONNX graph of a decoder of Llama's kind, with a KV cache, under Optimum's names for inputs and outputs.

Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key/value`; outputs are `logits` and
`present.N.key/value`. Everything is computed in float32; linears are calls of `weights.linear`, which may be
`MatMulNBits` of onnxruntime (ONNX itself has no 4-bit product, and no 2:4 tensor).

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key heads, R = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from compressor.exports.llama_like import LlamaLike


class Weights(Protocol):
    """Where the graph's linears and tables come from."""

    def linear(self, graph: Graph, x: str, module: str) -> str:
        """Adds `x W^T + b`; returns the name of the result."""

    def embedding(self, graph: Graph, ids: str, module: str) -> str:
        """Adds the lookup of ids [B, S] in a table."""

    def parameter(self, graph: Graph, name: str) -> str:
        """The float32 values of a stored vector."""

    def holds(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""


class Graph:
    """A list of nodes that grows; every method returns the name of what it added."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[Any, str] = {}

    def op(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a node; returns its first output."""
        names = list(outputs) or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """A small constant, kept once."""
        array: np.ndarray[Any, Any] = np.array(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant list of integers: a shape, axes or slices."""
        return self.constant(values, np.int64)


def build(shape: LlamaLike, weights: Weights) -> GraphProto:
    """The whole graph."""
    graph = Graph()
    rotary = _rotary(graph, shape)
    bias = _causal_bias(graph)
    hidden = weights.embedding(graph, "input_ids", "model.embed_tokens")
    for index in range(shape.layers):
        block = f"model.layers.{index}"
        normed = _rms_norm(graph, hidden, f"{block}.input_layernorm", weights, shape.eps)
        hidden = graph.op("Add", hidden, _attention(graph, normed, index, shape, weights, rotary, bias))
        normed = _rms_norm(graph, hidden, f"{block}.post_attention_layernorm", weights, shape.eps)
        hidden = graph.op("Add", hidden, _mlp(graph, normed, f"{block}.mlp", weights))
    hidden = _rms_norm(graph, hidden, "model.norm", weights, shape.eps)
    logits = weights.linear(graph, hidden, "lm_head")
    graph.op("Identity", logits, outputs=["logits"])
    return helper.make_graph(graph.nodes, "decoder", _inputs(shape), _outputs(shape), graph.initializers)


def _rms_norm(graph: Graph, x: str, module: str, weights: Weights, eps: float) -> str:
    if not weights.holds(f"{module}.weight"):
        return x
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.ints(-1), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps)))
    return graph.op("Mul", graph.op("Div", x, root), weights.parameter(graph, f"{module}.weight"))


def _rotary(graph: Graph, shape: LlamaLike) -> tuple[str, str]:
    """Cosine and sine [B, 1, S, D] of every position."""
    frequencies = 1.0 / shape.rope_theta ** (np.arange(0, shape.head_dim, 2, dtype=np.float32) / shape.head_dim)
    positions = graph.op("Unsqueeze", graph.op("Cast", "position_ids", to=TensorProto.FLOAT), graph.ints(1, 3))
    angles = graph.op("Mul", positions, graph.constant(frequencies))
    both = graph.op("Concat", angles, angles, axis=-1)
    return graph.op("Cos", both), graph.op("Sin", both)


def _rotate(graph: Graph, x: str, rotary: tuple[str, str], half: int) -> str:
    first = graph.op("Slice", x, graph.ints(0), graph.ints(half), graph.ints(-1))
    second = graph.op("Slice", x, graph.ints(half), graph.ints(2 * half), graph.ints(-1))
    turned = graph.op("Concat", graph.op("Neg", second), first, axis=-1)
    return graph.op("Add", graph.op("Mul", x, rotary[0]), graph.op("Mul", turned, rotary[1]))


def _causal_bias(graph: Graph) -> str:
    """[B, 1, 1, S, T]: 0 where a token may look, very negative where it may not."""
    new = graph.op("Squeeze", graph.op("Shape", "input_ids", start=1, end=2), graph.ints(0))
    total = graph.op("Squeeze", graph.op("Shape", "attention_mask", start=1, end=2), graph.ints(0))
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    rows = graph.op("Unsqueeze", graph.op("Range", graph.op("Sub", total, new), total, one), graph.ints(1))
    causal = graph.op("LessOrEqual", graph.op("Range", zero, total, one), rows)
    real = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=TensorProto.BOOL), graph.ints(1, 2, 3))
    lowest = graph.constant(float(np.finfo(np.float32).min))
    return graph.op("Where", graph.op("And", real, causal), graph.constant(0.0), lowest)


def _heads(graph: Graph, x: str, module: str, count: int, shape: LlamaLike, weights: Weights) -> str:
    """A projection as [B, S, heads, D]."""
    return graph.op("Reshape", weights.linear(graph, x, module), graph.ints(0, 0, count, shape.head_dim))


def _attention(
    graph: Graph, x: str, index: int, shape: LlamaLike, weights: Weights, rotary: tuple[str, str], bias: str
) -> str:
    block = f"model.layers.{index}.self_attn"
    turned = {}
    for letter, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        heads = _heads(graph, x, f"{block}.{letter}_proj", count, shape, weights)
        if letter != "v":
            heads = _rms_norm(graph, heads, f"{block}.{letter}_norm", weights, shape.eps)
        turned[letter] = graph.op("Transpose", heads, perm=[0, 2, 1, 3])
    q, k = (_rotate(graph, turned[letter], rotary, shape.head_dim // 2) for letter in "qk")
    k = graph.op("Concat", f"past_key_values.{index}.key", k, axis=2, outputs=[f"present.{index}.key"])
    v = graph.op("Concat", f"past_key_values.{index}.value", turned["v"], axis=2, outputs=[f"present.{index}.value"])
    repeats = shape.heads // shape.kv_heads
    grouped = graph.op("Reshape", q, graph.ints(0, shape.kv_heads, repeats, -1, shape.head_dim))
    keys = graph.op("Unsqueeze", graph.op("Transpose", k, perm=[0, 1, 3, 2]), graph.ints(2))
    scores = graph.op("Mul", graph.op("MatMul", grouped, keys), graph.constant(shape.head_dim**-0.5))
    shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    mixed = graph.op("MatMul", shares, graph.op("Unsqueeze", v, graph.ints(2)))
    by_head = graph.op("Reshape", mixed, graph.ints(0, shape.heads, -1, shape.head_dim))
    joined = graph.op("Reshape", graph.op("Transpose", by_head, perm=[0, 2, 1, 3]), graph.ints(0, 0, -1))
    return weights.linear(graph, joined, f"{block}.o_proj")


def _mlp(graph: Graph, x: str, block: str, weights: Weights) -> str:
    gate = weights.linear(graph, x, f"{block}.gate_proj")
    silu = graph.op("Mul", gate, graph.op("Sigmoid", gate))
    up = weights.linear(graph, x, f"{block}.up_proj")
    return weights.linear(graph, graph.op("Mul", silu, up), f"{block}.down_proj")


def _inputs(shape: LlamaLike) -> list[ValueInfoProto]:
    ids = [("input_ids", "sequence"), ("attention_mask", "total_sequence"), ("position_ids", "sequence")]
    result = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", axis]) for name, axis in ids]
    return result + _cache(shape, "past_key_values", "past_sequence")


def _outputs(shape: LlamaLike) -> list[ValueInfoProto]:
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", shape.vocabulary])
    return [logits, *_cache(shape, "present", "total_sequence")]


def _cache(shape: LlamaLike, prefix: str, axis: str) -> list[ValueInfoProto]:
    size = ["batch", shape.kv_heads, axis, shape.head_dim]
    names = [f"{prefix}.{index}.{part}" for index in range(shape.layers) for part in ("key", "value")]
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in names]
