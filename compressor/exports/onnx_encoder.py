"""The ONNX graph of an encoder of BERT's kind, under Optimum's names for inputs and outputs.

Inputs are `input_ids`, `attention_mask` and, for BERT, `token_type_ids`; the output is `logits`, or `last_hidden_state`
where the model has no head for classes, with `pooler_output` where a pooler is stored. Everything is computed in
float32; linears and tables come from `weights`, as in the decoder's graph.

Shapes: B batch, S tokens, E hidden size, H heads, D head size.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto, helper

from compressor.exports.bert_like import HEADS, BertLike
from compressor.exports.onnx_graph import Graph, Weights


def build(shape: BertLike, weights: Weights) -> GraphProto:
    """The whole graph."""
    graph = Graph()
    bias = _padding_bias(graph)
    hidden = _embeddings(graph, shape, weights)
    for index in range(shape.layers):
        block = f"{shape.prefix}encoder.layer.{index}"
        mixed = _attention(graph, hidden, f"{block}.attention", shape, weights, bias)
        hidden = _add_and_norm(graph, mixed, hidden, f"{block}.attention.output", shape, weights)
        inner = _gelu(graph, weights.linear(graph, hidden, f"{block}.intermediate.dense"))
        hidden = _add_and_norm(graph, inner, hidden, f"{block}.output", shape, weights)
    outputs = _head(graph, hidden, shape, weights)
    return helper.make_graph(graph.nodes, "encoder", _inputs(shape), outputs, graph.initializers)


def _padding_bias(graph: Graph) -> str:
    """[B, 1, 1, S]: 0 for a token, very negative for padding."""
    real = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=TensorProto.BOOL), graph.ints(1, 2))
    return graph.op("Where", real, graph.constant(0.0), graph.constant(float(np.finfo(np.float32).min)))


def _embeddings(graph: Graph, shape: BertLike, weights: Weights) -> str:
    """Word, token type and position, summed and normed; RoBERTa's token type is always the first."""
    block = f"{shape.prefix}embeddings"
    types = "token_type_ids" if shape.padding is None else graph.constant([[0]], np.int64)
    total = weights.embedding(graph, "input_ids", f"{block}.word_embeddings")
    total = graph.op("Add", total, weights.embedding(graph, types, f"{block}.token_type_embeddings"))
    positions = _positions(graph) if shape.padding is None else _positions_after_padding(graph, shape.padding)
    total = graph.op("Add", total, weights.embedding(graph, positions, f"{block}.position_embeddings"))
    return _layer_norm(graph, total, f"{block}.LayerNorm", shape, weights)


def _positions(graph: Graph) -> str:
    """[1, S]: 0, 1, 2, ..."""
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    length = graph.op("Squeeze", graph.op("Shape", "input_ids", start=1, end=2), graph.ints(0))
    return graph.op("Unsqueeze", graph.op("Range", zero, length, one), graph.ints(0))


def _positions_after_padding(graph: Graph, padding: int) -> str:
    """[B, S]: padding + 1, padding + 2, ... for tokens, wherever they begin; `padding` for the padding token."""
    start = graph.constant(padding, np.int64)
    real = graph.op("Cast", graph.op("Not", graph.op("Equal", "input_ids", start)), to=TensorProto.INT64)
    counted = graph.op("Mul", graph.op("CumSum", real, graph.constant(1, np.int64)), real)
    return graph.op("Add", counted, start)


def _attention(graph: Graph, x: str, block: str, shape: BertLike, weights: Weights, bias: str) -> str:
    """What every token takes from the others, [B, S, E], before the output projection."""
    head_dim = shape.hidden // shape.heads
    split = {
        name: graph.op(
            "Reshape", weights.linear(graph, x, f"{block}.self.{name}"), graph.ints(0, 0, shape.heads, head_dim)
        )
        for name in ("query", "key", "value")
    }
    query, value = (graph.op("Transpose", split[name], perm=[0, 2, 1, 3]) for name in ("query", "value"))
    keys = graph.op("Transpose", split["key"], perm=[0, 2, 3, 1])
    scores = graph.op("Mul", graph.op("MatMul", query, keys), graph.constant(head_dim**-0.5))
    shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
    return graph.op("Reshape", mixed, graph.ints(0, 0, -1))


def _add_and_norm(graph: Graph, x: str, residual: str, block: str, shape: BertLike, weights: Weights) -> str:
    total = graph.op("Add", weights.linear(graph, x, f"{block}.dense"), residual)
    return _layer_norm(graph, total, f"{block}.LayerNorm", shape, weights)


def _layer_norm(graph: Graph, x: str, module: str, shape: BertLike, weights: Weights) -> str:
    scale, bias = (weights.parameter(graph, f"{module}.{key}") for key in ("weight", "bias"))
    return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=shape.eps)


def _gelu(graph: Graph, x: str) -> str:
    """The exact one, in the order of operations that onnxruntime fuses."""
    error = graph.op("Erf", graph.op("Div", x, graph.constant(math.sqrt(2.0))))
    return graph.op("Mul", graph.op("Mul", x, graph.op("Add", error, graph.constant(1.0))), graph.constant(0.5))


def _head(graph: Graph, hidden: str, shape: BertLike, weights: Weights) -> list[ValueInfoProto]:
    """Adds and declares the outputs."""
    if shape.architecture in HEADS:
        dense, out = HEADS[shape.architecture]
        graph.op("Identity", weights.linear(graph, _pooled(graph, hidden, dense, weights), out), outputs=["logits"])
        return [_output("logits", "batch", shape.labels)]
    graph.op("Identity", hidden, outputs=["last_hidden_state"])
    outputs = [_output("last_hidden_state", "batch", "sequence", shape.hidden)]
    if weights.holds("pooler.dense.weight"):
        graph.op("Identity", _pooled(graph, hidden, "pooler.dense", weights), outputs=["pooler_output"])
        outputs.append(_output("pooler_output", "batch", shape.hidden))
    return outputs


def _pooled(graph: Graph, hidden: str, module: str, weights: Weights) -> str:
    """[B, E]: the first token after a linear and tanh."""
    first = graph.op("Gather", hidden, graph.constant(0, np.int64), axis=1)
    return graph.op("Tanh", weights.linear(graph, first, module))


def _output(name: str, *axes: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)


def _inputs(shape: BertLike) -> list[ValueInfoProto]:
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if shape.padding is None else [])]
    return [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
