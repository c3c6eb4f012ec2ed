"""One decoder for Llama, Mistral, Qwen2, Qwen3, GPT-2 and OPT, over a flat batch of tokens and a paged KV cache.

A step's tokens of all sequences lie one after another; only attention knows where a sequence begins. Linears come
from the checkpoint in whatever format it stores them, q/k/v as one and gate/up as one.

Shapes: T tokens of this step, S sequences, C hidden size, H query heads, Hkv key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.kernels.attention import takes
from serve.engine import ops
from serve.engine.models.config import ModelConfig
from serve.engine.models.linears import KernelLinear
from serve.engine.models.rotary import rotary_table


class StepInputs(NamedTuple):
    """The tensors of one step, as the kernels want them."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64, -1: keep nothing of this token
    block_tables: Tensor  # [S, max_blocks] int32
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32


class Norm(nn.Module):
    """RMS or layer norm of `x + residual`, which it also returns: the sum is the stream that the next block adds to."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps = eps
        self.rms = rms

    def forward(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.rms:
            x_TC = x_TC if residual_TC is None else x_TC + residual_TC
            return F.layer_norm(x_TC, (x_TC.shape[-1],), self.weight, self.bias, self.eps), x_TC
        if residual_TC is None:
            return ops.rms_norm(x_TC, self.weight, self.eps), x_TC
        return ops.add_rms_norm(x_TC, residual_TC, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, qkv: nn.Module, o: nn.Module, q_norm: Norm | None, k_norm: Norm | None):
        super().__init__()
        self.qkv, self.o, self.q_norm, self.k_norm = qkv, o, q_norm, k_norm
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.scale

    def forward(
        self, x_TC: Tensor, step: StepInputs, k_cache: Tensor, v_cache: Tensor, cos_sin: Tensor | None
    ) -> Tensor:
        heads = self.qkv(x_TC).view(x_TC.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        q_THD, k_THD, v_THD = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_THD = _norm_heads(self.q_norm, q_THD), _norm_heads(self.k_norm, k_THD)
        if cos_sin is not None:
            q_THD, k_THD = ops.rotary_embedding(q_THD, k_THD, cos_sin, step.positions)
        ops.store_kv(k_THD, v_THD, k_cache, v_cache, step.slot_mapping)
        attended = ops.paged_attention(
            q_THD, k_cache, v_cache, step.block_tables, step.query_start, step.context_lens, self.scale
        )
        out: Tensor = self.o(attended.reshape(x_TC.shape[0], -1))
        return out


def _norm_heads(norm: Norm, x_THD: Tensor) -> Tensor:
    normed: Tensor = norm(x_THD.reshape(-1, x_THD.shape[-1]))[0]
    return normed.view(x_THD.shape)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.gated, self.activation = config.gated_mlp, config.activation

    def forward(self, x_TC: Tensor) -> Tensor:
        inner = self.up(x_TC)
        out: Tensor = self.down(ops.silu_and_mul(inner) if self.gated else _activate(inner, self.activation))
        return out


def _activate(x: Tensor, name: str) -> Tensor:
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if name == "gelu" else "tanh")


class DecoderLayer(nn.Module):
    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self,
        x_TC: Tensor,
        residual_TC: Tensor | None,
        step: StepInputs,
        k_cache: Tensor,
        v_cache: Tensor,
        cos_sin: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x_TC, residual_TC = self.attention_norm(x_TC, residual_TC)
        x_TC = self.attention(x_TC, step, k_cache, v_cache, cos_sin)
        x_TC, residual_TC = self.mlp_norm(x_TC, residual_TC)
        return self.mlp(x_TC), residual_TC

    def parts(self) -> list[Tensor | None] | None:
        """What `decoder_layers` takes of a layer, in its order; None if a part of it has no kernel."""
        attention, mlp = self.attention, self.mlp
        qkv, o, up, down = attention.qkv, attention.o, mlp.up, mlp.down
        if not (self.attention_norm.rms and mlp.gated):
            return None
        if not all(isinstance(linear, KernelLinear) for linear in (qkv, o, up, down)):
            return None
        norms = [None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
        before, after = [self.attention_norm.weight, *_tensors(qkv), *norms], [self.mlp_norm.weight]
        return [*before, *_tensors(o), *after, *_tensors(up), *_tensors(down)]


def _tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert isinstance(linear, KernelLinear)
    return linear.weight, linear.bias, linear.low_rank


class FusedLayers:
    """All layers as one operator, to the same bits as the modules one by one; the weights are theirs."""

    def __init__(self, config: ModelConfig, weights: list[Tensor], present: int) -> None:
        self.weights, self.present = weights, present
        self.constants = (config.num_heads, config.intermediate_size, config.norm_eps, config.scale)

    @classmethod
    def of(cls, config: ModelConfig, layers: list[DecoderLayer], dtype: torch.dtype) -> FusedLayers | None:
        """None where the operator does not know these layers: another norm, a plain linear, layers that differ."""
        parts = [layer.parts() for layer in layers]
        if config.rope is None or dtype != torch.bfloat16:
            return None
        if not takes(config.num_heads, config.num_kv_heads, config.head_dim):
            return None
        if not parts or any(part is None for part in parts):
            return None
        present = {sum(1 << i for i, tensor in enumerate(part or ()) if tensor is not None) for part in parts}
        if len(present) > 1:
            return None
        weights = [tensor for part in parts for tensor in part or () if tensor is not None]
        return cls(config, weights, present.pop())

    def __call__(
        self, x_TC: Tensor, step: StepInputs, k_caches: list[Tensor], v_caches: list[Tensor], cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        # token_ids is the embedding's.
        out: tuple[Tensor, Tensor] = torch.ops.halfweight.decoder_layers.default(
            x_TC, self.weights, self.present, k_caches, v_caches, cos_sin, *step[1:], *self.constants
        )
        return out


class Decoder(nn.Module):
    """`forward` gives the normed hidden states of every token, `logits` those of the tokens one asks for."""

    def __init__(
        self,
        config: ModelConfig,
        embed: nn.Module,
        embed_positions: Tensor | None,
        layers: list[DecoderLayer],
        norm: Norm,
        lm_head: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.fused = FusedLayers.of(config, layers, dtype)
        self.norm = norm
        self.lm_head = lm_head
        self.embed_positions: Tensor | None
        self.cos_sin: Tensor | None
        self.register_buffer("embed_positions", embed_positions)
        self.register_buffer("cos_sin", None)

    def reach(self, num_positions: int) -> None:
        """Make the rotary table for so many positions: once, before anything is computed."""
        if self.config.rope is not None:
            self.cos_sin = rotary_table(self.config.rope, self.config.head_dim, num_positions)

    def forward(self, step: StepInputs, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        x_TC = self.embed(step.token_ids).to(self.dtype)
        if self.embed_positions is not None:
            x_TC = x_TC + self.embed_positions[step.positions + self.config.position_offset]
        residual_TC = None
        if self.fused is not None and self.cos_sin is not None:
            x_TC, residual_TC = self.fused(x_TC, step, k_caches, v_caches, self.cos_sin)
        else:
            for layer, k_cache, v_cache in zip(self.layers, k_caches, v_caches, strict=True):
                x_TC, residual_TC = layer(x_TC, residual_TC, step, k_cache, v_cache, self.cos_sin)
        out: Tensor = self.norm(x_TC, residual_TC)[0]
        return out

    def logits(self, hidden_TC: Tensor) -> Tensor:
        logits_TV: Tensor = self.lm_head(hidden_TC)
        return logits_TV.float()
