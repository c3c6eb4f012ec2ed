"""Runs in a Python that has vLLM: prints, as JSON, how far vLLM's layers with our methods are from dense products.

    python -m tests.vllm.layers

Each case is loaded by vLLM's own loaders, on one rank after the other; the figure is relative to the product's norm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm.model_executor.layers.linear as stock
import vllm.model_executor.layers.vocab_parallel_embedding as tables
import vllm.model_executor.parameter as parameters
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import HummingLinearKernel
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from compressor.formats import make_format
from compressor.formats.low_rank import low_rank_weight
from compressor.scheme import LowRank, QuantizationConfig, Scheme
from serve.engine.models.linears import PlainEmbedding, PlainLinear
from serve.vllm_plugin import embedding, int4
from serve.vllm_plugin.config import HalfweightConfig
from tests.vllm.models import packed_tensors

SPARSE, INT4 = Scheme("sparse24_int4", 32), Scheme("int4", 32)
TRAINED = Scheme("sparse24_int4", 32, low_rank=LowRank(16, trained_projection=True))
HEADS, HEAD = 4, 32
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(schemes: dict[str, Scheme | None]) -> HalfweightConfig:
    packed = {f"m.{name}": scheme for name, scheme in schemes.items() if scheme is not None}
    config = HalfweightConfig.from_config(QuantizationConfig.from_schemes(packed).to_dict())
    config.packed_modules_mapping = FUSED
    return config


def module(rows: int, columns: int, scheme: Scheme | None, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """What a checkpoint stores of one module, and the weight that it stands for."""
    weight = random(rows, columns, seed=seed)
    if scheme is None:
        return {"weight": weight.bfloat16()}, weight.bfloat16().float()
    stored = packed_tensors(weight, scheme)
    own = {name: tensor for name, tensor in stored.items() if name.startswith("weight")}
    dense = make_format(scheme).unpack_quantized(own).dequantized()
    return stored, dense if scheme.low_rank is None else dense + low_rank_weight(stored, columns)


def on_each_rank(ranks: int) -> Iterator[int]:
    """Ranks one after the other, each of which vLLM's layers take for theirs while it lasts."""
    for rank in range(ranks):
        for where in (stock, tables, parameters):
            where.get_tensor_model_parallel_world_size = lambda: ranks
            where.get_tensor_model_parallel_rank = lambda rank=rank: rank
        yield rank


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def qkv(
    *schemes: Scheme | None, columns: int = 128, kv_heads: int = 2, ranks: int = 1, dtype: torch.dtype = torch.float32
) -> float:
    """q, k and v in one layer with biases, whose output the ranks share."""
    names = dict(zip(FUSED["qkv_proj"], schemes, strict=True))
    rows = [HEADS * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    made = [module(n, columns, scheme, seed) for seed, (n, scheme) in enumerate(zip(rows, schemes, strict=True))]
    biases = [random(n, seed=10 + seed) for seed, n in enumerate(rows)]
    x = random(5, columns, seed=99)
    shares: list[list[Tensor]] = []
    for _ in on_each_rank(ranks):
        layer = stock.QKVParallelLinear(
            columns, HEAD, HEADS, kv_heads, bias=True, params_dtype=dtype, quant_config=config_of(names),
            prefix="m.qkv_proj",
        )  # fmt: skip
        for shard, (stored, _), bias in zip("qkv", made, biases, strict=True):
            for name, tensor in (stored | {"bias": bias}).items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, shard)
        layer.quant_method.process_weights_after_loading(layer)
        shares.append(list(layer(x.to(dtype))[0].split([s // ranks for s in layer.output_sizes], -1)))
    expected = [x @ weight.T + bias for (_, weight), bias in zip(made, biases, strict=True)]
    copies = max(1, ranks // kv_heads)
    own = [torch.cat(part[:: copies if n else 1], -1) for n, part in enumerate(zip(*shares, strict=True))]
    return max(error(part, wanted) for part, wanted in zip(own, expected, strict=True))


def gate_up(*schemes: Scheme | None, ranks: int = 1) -> float:
    names = dict(zip(FUSED["gate_up_proj"], schemes, strict=True))
    made = [module(96, 128, scheme, seed) for seed, scheme in enumerate(schemes)]
    x = random(5, 128, seed=99)
    shares = []
    for _ in on_each_rank(ranks):
        layer = stock.MergedColumnParallelLinear(
            128,
            [96, 96],
            bias=False,
            params_dtype=torch.float32,
            quant_config=config_of(names),
            prefix="m.gate_up_proj",
        )
        for shard, (stored, _) in enumerate(made):
            for name, tensor in stored.items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, shard)
        layer.quant_method.process_weights_after_loading(layer)
        shares.append(layer(x)[0].chunk(2, -1))
    own = [torch.cat(part, -1) for part in zip(*shares, strict=True)]
    return max(error(part, x @ weight.T) for part, (_, weight) in zip(own, made, strict=True))


def down(scheme: Scheme, ranks: int = 1) -> float:
    """One module whose inputs the ranks share: their sum."""
    stored, weight = module(96, 128, scheme, 0)
    x = random(5, 128, seed=99)
    total = torch.zeros(5, 96)
    for rank in on_each_rank(ranks):
        layer = stock.RowParallelLinear(
            128, 96, bias=False, params_dtype=torch.float32, quant_config=config_of({"down_proj": scheme}),
            prefix="m.down_proj",
        )  # fmt: skip
        for name, tensor in stored.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x.chunk(ranks, -1)[rank])
    return error(total, x @ weight.T)


def marlin_biases() -> float:
    """Dense int4 by a kernel that, as Marlin, takes a bias in another order than the checkpoint's."""
    chosen = int4.choose

    def choose(config: Any) -> Any:
        class Permuting(chosen(config)):  # type: ignore[misc]
            def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
                return super().apply_weights(layer, x, None if bias is None else bias.flip(0))

        return Permuting

    taken, int4.choose = int4.takes, choose
    int4.takes = lambda scheme, tensors, dtype: True
    try:
        return qkv(INT4, INT4, INT4, dtype=torch.bfloat16)
    finally:
        int4.takes, int4.choose = taken, chosen


def hopper_kernels() -> float:
    """Dense int4 on Hopper goes to Machete, to Marlin, before which vLLM itself would take Humming, or to neither."""
    chosen = []
    names = ("is_cpu", "is_cuda", "is_device_capability", "get_device_capability")
    with ExitStack() as stack:
        stack.enter_context(mock.patch(f"{HummingLinearKernel.__module__}.has_humming", lambda: True))
        for name, value in zip(names, (False, True, True, DeviceCapability(9, 0)), strict=True):
            stack.enter_context(mock.patch.object(type(current_platform), name, lambda *_, value=value, **__: value))
        for rows, group in ((4096, 128), (4096, 32), (4160, 128), (4096, 96)):
            config = int4.MPLinearLayerConfig(
                full_weight_shape=(4608, rows),
                partition_weight_shape=(4608, rows),
                weight_type=int4.scalar_types.uint4b8,
                act_type=torch.bfloat16,
                group_size=group,
                zero_points=False,
            )
            try:
                chosen.append(int4.choose(config).__name__)
            except ValueError as error:
                chosen.append(str(error))
    neither = "neither Machete nor Marlin takes int4 in groups of 96 on this device"
    assert chosen == ["MacheteLinearKernel", "MarlinLinearKernel", "MarlinLinearKernel", neither], chosen
    return 0.0


def gpu_head(tied: bool) -> float:
    """An LM head that a GPU would unpack for every token (fp8, which the CPU unpacks too): it must be plain."""
    scheme, x = Scheme("fp8"), random(5, 128, seed=99)
    stored, weight = module(256, 128, scheme, 0)
    own = {"params_dtype": torch.float32, "quant_config": config_of({"embed_tokens": scheme, "lm_head": scheme})}
    unpacks, tells = embedding.cuda.unpacks, HalfweightConfig.tied
    embedding.cuda.unpacks, HalfweightConfig.tied = lambda *_: True, lambda _: tied
    try:
        for _ in on_each_rank(1):
            table = tables.VocabParallelEmbedding(256, 128, prefix="m.embed_tokens", **own)
            head = tables.ParallelLMHead(256, 128, prefix="m.lm_head", **own)
            head = head.tie_weights(table) if tied else head
            for layer in (table,) if tied else (table, head):
                for name, tensor in stored.items():
                    parameter = getattr(layer, name)
                    parameter.weight_loader(parameter, tensor)
            for layer in (table, head):
                layer.quant_method.process_weights_after_loading(layer)
    finally:
        embedding.cuda.unpacks, HalfweightConfig.tied = unpacks, tells
    assert isinstance(table.packed, PlainEmbedding) == tied, table.packed
    assert isinstance(table.packed_head if tied else head.packed, PlainLinear)
    assert not tied or table.packed_head.weight is table.packed.weight
    ids = torch.tensor([3, 200])
    logits = head.quant_method.apply(head, x)
    return max(error(logits, x @ weight.T), error(table(ids), weight[ids]))


CASES = {
    "alike": lambda: qkv(SPARSE, SPARSE, SPARSE),
    "mixed formats": lambda: qkv(SPARSE, INT4, SPARSE),
    "mixed formats on two ranks": lambda: qkv(SPARSE, INT4, SPARSE, ranks=2),
    "mixed formats with copied heads": lambda: qkv(INT4, SPARSE, INT4, kv_heads=1, ranks=2),
    "mixed groups": lambda: qkv(SPARSE, Scheme("sparse24_int4", 64), None),
    "mixed gate and up on two ranks": lambda: gate_up(INT4, SPARSE, ranks=2),
    "plain up": lambda: gate_up(INT4, None),
    "plain beside a trained projection": lambda: qkv(None, None, TRAINED),
    "trained projections": lambda: qkv(TRAINED, TRAINED, TRAINED, ranks=2),
    "a trained projection of shared inputs": lambda: down(TRAINED, ranks=2),
    "groups of 192": lambda: qkv(*[Scheme("sparse24_int4", 192)] * 3, columns=576),
    "groups of 96": lambda: qkv(*[Scheme("int8", 96)] * 3, columns=576),
    "segments of 24": lambda: qkv(*[Scheme("sparse24_int4", 96, low_rank=LowRank(24))] * 3, columns=576),
    "biases beside Marlin": marlin_biases,
    "kernels on Hopper": hopper_kernels,
    "a head on a GPU": lambda: gpu_head(tied=False),
    "a tied head on a GPU": lambda: gpu_head(tied=True),
}
if "avx512f" not in Path("/proc/cpuinfo").read_text():  # vLLM's int4 kernel needs it
    del CASES["biases beside Marlin"]


def main() -> None:
    found: dict[str, float | str] = {}
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        for name, case in CASES.items():
            try:
                found[name] = case()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
