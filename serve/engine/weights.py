"""From a checkpoint folder to a decoder, layer by layer, in whatever format each module is stored.

Each linear is read, fused with its neighbours, and brought into its kernel's layout before the next one is read, so
that memory never holds more than the model and one linear. No packed weight is ever dequantised as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint import Checkpoint, check_manifest
from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, PackedModule, tie
from serve.engine.models.config import ModelConfig, UnservedError, parse_config
from serve.engine.models.decoder import MLP, Attention, Decoder, DecoderLayer, Norm
from serve.engine.models.linears import (
    KernelEmbedding,
    PlainEmbedding,
    SideBySide,
    fixed_rows,
    packed_embedding,
    packed_linear,
    plain_embedding,
    plain_linear,
)
from serve.engine.tokenizer import read_json
from serve.engine.transformers_model import NOTE, TransformersConfig, TransformersModel, load_with_transformers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    config: ModelConfig | TransformersConfig
    decoder: Decoder | TransformersModel
    formats: tuple[str, ...]
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, Any]
    kv_cache_dtype: str | None = None  # what the checkpoint says of the cache

    @property
    def weight_bytes(self) -> int:
        return bytes_of(self.decoder)


def load_model(folder: Path, dtype: str = "bfloat16", deterministic: bool = False) -> LoadedModel:
    """Read `folder`; ValueError says what is wrong with it. `deterministic`: no token's result depends on others."""
    checkpoint = Checkpoint.open(folder, verify=False)
    with ThreadPoolExecutor(1, "manifest") as pool:  # hashing takes as long as reading, and needs no lock of Python's
        verified = pool.submit(check_manifest, folder) if checkpoint.packed else None
        try:
            decoder, formats = _decoder(checkpoint, getattr(torch, dtype), fixed_rows if deterministic else None)
        finally:
            if verified is not None:
                verified.result()  # an altered file is the better reason for whatever else failed
    checkpoint.close()
    generation = read_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return LoadedModel(
        config=decoder.config,
        decoder=decoder,
        formats=formats,
        eos_token_ids=eos_ids(eos, decoder.config.vocab_size),
        generation_defaults=generation,
        kv_cache_dtype=_recorded_dtype(checkpoint, decoder),
    )


def _decoder(
    checkpoint: Checkpoint, dtype: torch.dtype, wrap: Callable[[nn.Module], nn.Module] | None
) -> tuple[Decoder | TransformersModel, tuple[str, ...]]:
    """The model, ours where it knows the architecture, and the formats it is stored in."""
    try:
        config = parse_config(checkpoint.config)
    except UnservedError as reason:
        model = load_with_transformers(checkpoint, dtype, reason)
        logger.warning("%s runs %s (%s)", model.config.architecture, NOTE, reason)
        return model, model.formats
    loader = _Loader(checkpoint, config, dtype, wrap)
    return loader.decoder().eval(), tuple(sorted(loader.formats))


def _recorded_dtype(checkpoint: Checkpoint, decoder: Decoder | TransformersModel) -> str | None:
    """The dtype of keys and values that the checkpoint asks for, where it can be served."""
    recorded = checkpoint.quantization.kv_cache_dtype
    if isinstance(decoder, Decoder) or recorded in (None, "bfloat16"):
        return recorded
    says = "%s keeps keys and values as it computes them, not in %s as the checkpoint asks"
    logger.warning(says, decoder.config.architecture, recorded)
    return None


def bytes_of(model: nn.Module) -> int:
    """Bytes of all weights as they lie in memory, shared ones counted once."""
    seen: dict[int, int] = {}
    for name, buffer in (*model.named_buffers(), *model.named_parameters()):
        if name != "cos_sin":
            storage = buffer.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() if _owned(buffer) else buffer.nbytes
    return sum(seen.values())


def _owned(buffer: Tensor) -> bool:
    return buffer.untyped_storage().nbytes() <= 2 * buffer.nbytes


def eos_ids(value: Any, vocab_size: int) -> frozenset[int]:
    """The tokens that a configuration names as the end of an answer: one, several or none, of those that there are."""
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size)


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        wrap: Callable[[nn.Module], nn.Module] | None,
    ) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        self.wrap: Callable[[nn.Module], nn.Module] = wrap or (lambda linear: linear)
        self.stored = frozenset(checkpoint.names())
        self.formats: set[str] = set()
        # The hub's GPT-2 and OPT were saved without their head, and so without the outermost name.
        base = config.names.embed.split(".")[0] + "."
        self.strip = "" if any(name.startswith(base) for name in self.stored) else base

    def decoder(self) -> Decoder:
        config, names = self.config, self.config.names
        embed = self._embedding(self._name(names.embed))
        head = self._head(embed)
        layers = [self._layer(i) for i in range(config.num_layers)]
        positions = None if names.positions is None else self._tensor(self._name(names.positions) + ".weight")
        norm = self._norm(self._name(names.final_norm))
        return Decoder(config, embed, positions, layers, norm, head, self.dtype)

    def _layer(self, i: int) -> DecoderLayer:
        config, names = self.config, self.config.names
        at = self._name(names.layer.format(i=i))
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        rows = [count * config.head_dim for count in heads]
        inner = [config.intermediate_size] * (2 if config.gated_mlp else 1)
        qkv = self._linears([f"{at}.{q}" for q in names.q], config.hidden_size, rows, config.qkv_bias)
        o = self._linear([f"{at}.{names.o}"], config.num_heads * config.head_dim, config.hidden_size, config.o_bias)
        up = self._linears([f"{at}.{up}" for up in names.up], config.hidden_size, inner, config.mlp_bias)
        down = self._linear([f"{at}.{names.down}"], config.intermediate_size, config.hidden_size, config.mlp_bias)
        q_norm = self._norm(f"{at}.{names.q_norm}") if config.qk_norm else None
        k_norm = self._norm(f"{at}.{names.k_norm}") if config.qk_norm else None
        return DecoderLayer(
            self._norm(f"{at}.{names.attention_norm}"),
            Attention(config, qkv, o, q_norm, k_norm),
            self._norm(f"{at}.{names.mlp_norm}"),
            MLP(config, up, down),
        )

    def _name(self, name: str) -> str:
        return name.removeprefix(self.strip) if self.strip else name

    def _tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).to(self.dtype).contiguous()

    def _norm(self, name: str) -> Norm:
        bias = None if self.config.rms_norm else self._tensor(f"{name}.bias")
        return Norm(self._tensor(f"{name}.weight"), bias, self.config.norm_eps, self.config.rms_norm)

    def _linears(self, names: list[str], in_features: int, sizes: list[int], bias: bool) -> nn.Module:
        """Linears of the same input: as one where they are stored alike, else side by side."""
        schemes = {self.checkpoint.scheme_of(name) for name in names}
        own_projections = any(s and s.low_rank and s.low_rank.trained_projection for s in schemes)
        if len(schemes) == 1 and not own_projections:
            return self._linear(names, in_features, sum(sizes), bias)
        parts = zip(names, sizes, strict=True)
        return SideBySide([self._linear([name], in_features, size, bias) for name, size in parts])

    def _linear(
        self, names: list[str], in_features: int, out_features: int, bias: bool, float_out: bool = False
    ) -> nn.Module:
        scheme = self.checkpoint.scheme_of(names[0])
        tensors = self.checkpoint.linear(names)
        if bias != ("bias" in tensors):
            raise ValueError(f"{names[0]} {'lacks' if bias else 'has'} a bias, which config.json does not say")
        if scheme is None:
            weight = tensors["weight"]
            if self.config.conv1d and names[0] != self.config.names.lm_head:  # GPT-2 stores its linears as [in, out]
                weight = weight.t()
            weight = self._plain(names[0], weight, (out_features, in_features))
            return self.wrap(plain_linear(weight, tensors["bias"].to(self.dtype) if bias else None, float_out))
        if bias:
            tensors["bias"] = tensors["bias"].to(getattr(torch, scheme.dtype))
        with torch.device("meta"):
            stored = CompressedLinear(in_features, out_features, scheme, bias=bias)
        self._fill(stored, names[0], tensors)
        return self.wrap(packed_linear(stored, float_out))

    def _embedding(self, name: str) -> nn.Module:
        config, scheme = self.config, self.checkpoint.scheme_of(name)
        tensors = self.checkpoint.module(name)
        if scheme is None:
            return plain_embedding(self._plain(name, tensors["weight"], (config.vocab_size, config.hidden_size)))
        with torch.device("meta"):
            stored = CompressedEmbedding(config.vocab_size, config.hidden_size, scheme)
        self._fill(stored, name, tensors)
        return packed_embedding(stored)

    def _plain(self, name: str, weight: Tensor, shape: tuple[int, int]) -> Tensor:
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, but config.json says {shape}")
        self.formats.add("dense")
        return weight.to(self.dtype).contiguous()

    def _head(self, embed: nn.Module) -> nn.Module:
        config, name = self.config, self.config.names.lm_head
        tied = self._is_tied()
        if any(stored.startswith(f"{name}.") for stored in self.stored) and not tied:
            return self._linear([name], config.hidden_size, config.vocab_size, bias=False, float_out=True)
        if not tied:
            raise ValueError(f"the checkpoint has no {name}, and config.json does not tie it to the embedding")
        if isinstance(embed, KernelEmbedding | PlainEmbedding):
            return self.wrap(embed.head())
        assert isinstance(embed, CompressedEmbedding)
        with torch.device("meta"):
            head = CompressedLinear(config.hidden_size, config.vocab_size, embed.scheme)
        tie(head, embed)
        return self.wrap(head)

    def _is_tied(self) -> bool:
        """Whether the embedding is the head too; one that a dense folder stores beside it, and differs, was trained."""
        names = [f"{self._name(self.config.names.embed)}.weight", f"{self.config.names.lm_head}.weight"]
        if not self.config.tied or not self.stored.issuperset(names):
            return self.config.tied
        embedding, head = map(self.checkpoint.tensor, names)
        return torch.equal(embedding, head)

    def _fill(self, module: PackedModule, name: str, tensors: dict[str, Tensor]) -> None:
        try:
            module.assign(tensors)
        except ValueError as error:
            raise ValueError(f"{name} does not fit config.json: {error}") from None
        self.formats.add(module.scheme.format)
