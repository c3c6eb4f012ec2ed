"""A linear of vLLM over packed weights: stored tensors come in as rows and columns and leave in the kernel's layout.

Every stored tensor is [O, proportional to I], so q/k/v and gate/up that are stored alike are one product, and shared
among tensor-parallel ranks by vLLM's own slices. Where they differ, or have a trained low-rank projection X [I / k, I],
which each needs whole, a layer consists of parts with parameters of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from compressor.compressed_linear import CompressedLinear
from compressor.formats import make_format
from compressor.formats.format import Spec
from compressor.formats.low_rank import low_rank_spec
from compressor.scheme import Scheme
from serve.engine.models.linears import KernelLinear, PlainLinear, packed_linear
from serve.vllm_plugin import int4

_PROJECTION = "low_rank_a"
_SHARDS = {"q": 0, "k": 1, "v": 2}
"""The names that vLLM has for modules of an attention's fused layer; those of others it numbers."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a layer that are one product."""

    scheme: Scheme | None
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """What a rank keeps of one stored tensor: its width, whether the ranks share the columns, and rows of its own."""

    width: int
    dtype: torch.dtype
    shared: bool
    rows: int | None = None  # as many as the part has


class HalfweightLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How one of vLLM's linears is created, loaded and run.

    Args:
        schemes: of the checkpoint's modules that the layer stands for; None is a plain weight.
        prefix: the layer's name, for messages.
        turned: whether vLLM turns the tensors named `weight`, which lie as it wants them.
    """

    def __init__(self, schemes: Sequence[Scheme | None], prefix: str, *, turned: bool = False) -> None:
        self.schemes = tuple(schemes)
        self.prefix = prefix
        self.turned = turned

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Registers a parameter for each stored tensor, filled with what is refused unless it is loaded."""
        layer.parts = parts_of(self.schemes, output_partition_sizes, self.prefix)
        layer.stored = [{} for _ in layer.parts]
        for number, part in enumerate(layer.parts):
            for name, stored in self._stored(part, input_size_per_partition, input_size, params_dtype).items():
                tensor = unloaded((stored.rows or part.stop - part.start, stored.width), stored.dtype)
                if len(layer.parts) > 1:  # what vLLM finds by the name takes each module's tensor to its part
                    layer.stored[number][name] = f"{name}_{number}"
                    register(layer, f"{name}_{number}", tensor)
                    loader = shard_loader(layer, name, output_partition_sizes)
                    register(layer, name, torch.empty(0), weight_loader=loader)
                    continue
                layer.stored[number][name] = name
                sides = ({"output_dim": 0} if stored.rows is None else {}) | ({"input_dim": 1} if stored.shared else {})
                loader = attributes["weight_loader"]
                loader = turned_back(loader) if self.turned and name == "weight" else loader
                register(layer, name, tensor, weight_loader=loader, **sides)

    def _stored(self, part: Part, columns: int, all_columns: int, dtype: torch.dtype) -> dict[str, Stored]:
        try:
            return stored_tensors(part.scheme, columns, all_columns, dtype)
        except ValueError as error:
            share = "" if columns == all_columns else f" ({columns} of its {all_columns} inputs on each rank)"
            raise ValueError(f"{self.prefix}{share}: {error}") from None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Takes the stored tensors to the kernel's layout, part by part, and frees them."""
        if hasattr(layer, "packed"):
            return
        layer.packed = nn.ModuleList()
        for part, names in zip(layer.parts, layer.stored, strict=True):
            tensors = {name: getattr(layer, own).data for name, own in names.items()}
            layer.packed.append(self._packed(part.scheme, tensors, layer.params_dtype))
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, name)
        # By this name vLLM's adapters find a layer's device.
        layer.weight_packed = next(chain(layer.packed.buffers(), layer.packed.parameters())).data

    def _packed(self, scheme: Scheme | None, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        if scheme is not None and int4.takes(scheme, tensors, dtype):
            with suppress(ValueError):  # no kernel of vLLM's takes it
                return int4.StockInt4(checked(tensors, self.prefix), scheme.group_size, dtype)
        return packed_part(scheme, tensors, self.prefix)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., O] in x's dtype."""
        if len(layer.packed) == 1:
            return run(layer.packed[0], x, bias)
        biases = [None if bias is None else bias[part.start : part.stop] for part in layer.parts]
        return torch.cat([run(linear, x, own) for linear, own in zip(layer.packed, biases, strict=True)], dim=-1)


class TurnedBack(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's own method for a plain weight that is loaded as it was before vLLM turned it."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        attributes["weight_loader"] = turned_back(attributes["weight_loader"])
        super().create_weights(layer, *sizes, **attributes)


def turned_back(load: Callable[..., None]) -> Callable[..., None]:
    """A loader that gets matrices [I, O] and loads [O, I]."""

    def turn(parameter: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
        load(parameter, loaded.t(), *shard)

    return turn


def parts_of(schemes: Sequence[Scheme | None], sizes: Sequence[int], prefix: str) -> list[Part]:
    """The products of a layer: neighbours that are stored alike are one, unless each has a projection of its own."""
    if len(schemes) != len(sizes):  # fused in the checkpoint already, as GPT-2's c_attn
        if len(set(schemes)) > 1:
            raise ValueError(
                f"{prefix} has {len(sizes)} parts, but the checkpoint stores {len(schemes)} unlike modules"
            )
        return [Part(schemes[0], 0, sum(sizes))]
    found: list[Part] = []
    for scheme, size, stop in zip(schemes, sizes, accumulate(sizes), strict=True):
        alone = scheme is not None and scheme.low_rank is not None and scheme.low_rank.trained_projection
        if found and found[-1].scheme == scheme and not alone:
            found[-1] = Part(scheme, found[-1].start, stop)
        else:
            found.append(Part(scheme, stop - size, stop))
    return found


def stored_tensors(scheme: Scheme | None, columns: int, all_columns: int, dtype: torch.dtype) -> dict[str, Stored]:
    """What a rank with `columns` of the inputs keeps; ValueError where they cannot be cut out."""
    if scheme is None:
        return {"weight": Stored(columns, dtype, columns != all_columns)}
    own, whole = _spec(scheme, columns), _spec(scheme, all_columns)
    if scheme.low_rank is not None and scheme.low_rank.trained_projection:
        # Every rank projects its own inputs onto all of X's rows; the sum over ranks is taken after S.
        own |= {name: whole[name] for name in whole if name.startswith("low_rank_b")}
    found = {}
    for name, ((_, width), kind) in own.items():
        total = whole[name][0][1]
        if width != total and width * all_columns != total * columns:
            raise ValueError(
                f"{scheme.format} stores {name} in bytes of several inputs, which a rank's share would cut"
            )
        found[name] = Stored(width, kind, width != total, whole[name][0][0] if name == _PROJECTION else None)
    return found


def _spec(scheme: Scheme, columns: int) -> Spec:
    branch = {} if scheme.low_rank is None else low_rank_spec(scheme.low_rank, 1, columns)
    return make_format(scheme).spec(1, columns) | branch


def register(layer: nn.Module, name: str, tensor: Tensor, **attributes: Any) -> None:
    """A parameter with the attributes that vLLM's loaders look for."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    set_weight_attrs(parameter, attributes)
    layer.register_parameter(name, parameter)


def unloaded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that `checked` refuses until it is loaded: NaN, or 0, which no pair of 2:4 positions is."""
    return torch.full(shape, torch.nan, dtype=dtype) if dtype.itemsize > 1 else torch.zeros(shape, dtype=dtype)


def shard_loader(layer: Any, name: str, sizes: Sequence[int]) -> Callable[..., None]:
    """Loads one module's rows of a stored tensor into the part that they belong to."""

    def load(_: nn.Parameter, loaded: Tensor, shard: str | int) -> None:
        module = _SHARDS[shard] if isinstance(shard, str) else shard
        start, rows = sum(sizes[:module]), sizes[module]
        [number] = [n for n, part in enumerate(layer.parts) if part.start <= start < part.stop]
        target = getattr(layer, layer.stored[number][name])
        if name != _PROJECTION:
            copies = layer.num_kv_head_replicas if shard in ("k", "v") else 1
            loaded = loaded.narrow(0, layer.tp_rank // copies * rows, rows)
            target = target.narrow(0, start - layer.parts[number].start, rows)
        assert target.shape == loaded.shape, (name, shard, target.shape, loaded.shape)
        target.data.copy_(loaded)

    return load


def packed_part(scheme: Scheme | None, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The module that computes with loaded tensors; ValueError where one is missing or breaks its format."""
    if scheme is None:
        return PlainLinear(checked(tensors, prefix)["weight"], None)
    own = checked(tensors, prefix)
    weight = {name: tensor for name, tensor in own.items() if name.startswith("weight")}
    packed = make_format(scheme)
    try:
        packed.validate(weight)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}; part of it may be missing in the checkpoint") from None
    out_features, in_features = packed.shape_of(weight)
    with torch.device("meta"):
        stored = CompressedLinear(in_features, out_features, scheme)
    for name, tensor in own.items():  # a rank's low-rank tensors have shapes of their own, so they are not compared
        stored._buffers[name] = tensor.contiguous()
    linear = packed_linear(stored)
    if linear is stored:
        stored.prepare()
    return linear


def checked(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors; ValueError where one holds NaN or infinity, as those do that were never loaded."""
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{prefix}: {name} is missing in the checkpoint, or holds NaN or infinity")
    return dict(tensors)


def run(linear: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """[..., O] of one part, with vLLM's bias."""
    if isinstance(linear, KernelLinear):
        out: Tensor = torch.ops.halfweight.linear.default(x, linear.weight, bias, linear.low_rank, False)
        return out
    y: Tensor = linear(x)
    return y if bias is None else y + bias.to(y.dtype)
