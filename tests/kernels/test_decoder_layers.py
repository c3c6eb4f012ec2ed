"""All layers as one operator against the operators one by one: the same bits, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.kernels import attention, fused, loading, low_rank
from compressor.kernels.linear import linear
from tests.kernels.weights import random_weight

pytestmark = pytest.mark.skipif(loading.LIBRARY is None, reason="the CPU kernels are not installed")

HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS = 96, 6, 2, 32, 160, 2
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
    "up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
Layers = list[dict[str, list[Tensor | None]]]
ORDER = ("attention_norm", "qkv", "q_norm", "k_norm", "o", "mlp_norm", "up", "down")


def make_layer(name: str, biased: bool, branched: bool, normed: bool, seed: int) -> dict[str, list[Tensor | None]]:
    """The parts of a layer by name; a linear is its blob, bias and low-rank blob."""
    generator = torch.Generator().manual_seed(seed)

    def vector(size: int) -> Tensor:
        return (torch.rand(size, generator=generator) + 0.5).to(torch.bfloat16)

    layer: dict[str, list[Tensor | None]] = {}
    for part in ORDER:
        if part not in SHAPES:
            head = part in ("q_norm", "k_norm")
            layer[part] = [vector(DIM if head else HIDDEN) if normed or not head else None]
            continue
        rows, columns = SHAPES[part]
        blob = random_weight(name, rows, columns, 32, torch.bfloat16, seed).prepared["weight_kernel"]
        stored = {"low_rank_b": torch.randn(rows, columns // 16, generator=generator).to(torch.bfloat16) * 0.1}
        branch = low_rank.prepare(stored, 16) if branched else None
        layer[part] = [blob, vector(rows) if biased else None, branch]
    return layer


def one_by_one(layers: Layers, x: Tensor, caches: list[list[Tensor]], step: list[Tensor]) -> tuple[Tensor, Tensor]:
    cos_sin, positions, slots, tables, starts, lengths = step
    residual = None

    def run(layer: dict[str, list[Tensor | None]], part: str, x: Tensor) -> Tensor:
        blob, bias, branch = layer[part]
        return linear(x, {"weight_kernel": blob}, bias, branch)

    for i, layer in enumerate(layers):
        norm, after = layer["attention_norm"][0], layer["mlp_norm"][0]
        if residual is None:
            normed, residual = fused.rms_norm(x, norm, 1e-5), x
        else:
            normed, residual = fused.add_rms_norm(x, residual, norm, 1e-5)
        heads = run(layer, "qkv", normed).view(len(x), -1, DIM)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        if layer["q_norm"][0] is not None:
            q, k = fused.rms_norm(q, layer["q_norm"][0], 1e-5), fused.rms_norm(k, layer["k_norm"][0], 1e-5)
        q, k = fused.rotary_embedding(q, k, cos_sin, positions)
        attention.store_kv(k, v, caches[0][i], caches[1][i], slots)
        mixed = attention.paged_attention(q, caches[0][i], caches[1][i], tables, starts, lengths, 0.2)
        x, residual = fused.add_rms_norm(run(layer, "o", mixed.flatten(1)), residual, after, 1e-5)
        x = run(layer, "down", fused.silu_and_mul(run(layer, "up", x)))
    return x, residual


def filled_cache(blocks: int, dtype: torch.dtype) -> Tensor:
    cache = attention.empty_cache(blocks, 16, KV_HEADS, DIM, dtype)
    values = torch.randn(blocks * 16, KV_HEADS, DIM)
    attention.store_kv(values, values, cache, torch.empty_like(cache), torch.arange(blocks * 16))
    return cache


def make_step(queries: list[int], lengths: list[int], padding: int) -> list[Tensor]:
    """Blocks of 16, in a shuffled order; `padding` tokens that belong to no sequence."""
    needed = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1))
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    positions, slots, at = [], [], 0
    for s, (query, length) in enumerate(zip(queries, lengths, strict=True)):
        tables[s, : needed[s]] = order[at : at + needed[s]]
        at += needed[s]
        place = range(length - query, length)
        positions += place
        slots += [int(tables[s, p // 16]) * 16 + p % 16 for p in place]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    cos_sin = torch.randn(max(lengths), DIM, generator=torch.Generator().manual_seed(2))
    extra = [torch.tensor([*positions, *[0] * padding]), torch.tensor([*slots, *[-1] * padding])]
    return [cos_sin, *extra, tables, starts, torch.tensor(lengths, dtype=torch.int32)]


def as_one(layers: Layers, x: Tensor, caches: list[list[Tensor]], step: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = [[tensor for part in ORDER for tensor in layer[part]] for layer in layers]
    present = sum(1 << i for i, tensor in enumerate(parts[0]) if tensor is not None)
    weights = [tensor for part in parts for tensor in part if tensor is not None]
    return torch.ops.halfweight.decoder_layers(x, weights, present, *caches, *step, HEADS, INNER, 1e-5, 0.2)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("sparse24_int4", torch.bfloat16), ("sparse24_int4", torch.int8), ("sparse24_int8", torch.bfloat16)]
    + [(name, torch.bfloat16) for name in ("sparse24", "int4")],
)
@pytest.mark.parametrize(("biased", "branched", "normed"), [(False, False, False), (True, True, True)])
@pytest.mark.parametrize(
    ("queries", "lengths", "padding"), [([1], [1], 0), ([1, 1, 1], [300, 17, 64], 0), ([40, 1, 3], [75, 9, 140], 2)]
)
def test_the_same_bits_as_one_by_one(
    name: str,
    cache: torch.dtype,
    biased: bool,
    branched: bool,
    normed: bool,
    queries: list[int],
    lengths: list[int],
    padding: int,
) -> None:
    layers = [make_layer(name, biased, branched, normed, seed) for seed in range(LAYERS)]
    step = make_step(queries, lengths, padding)
    x = torch.randn(sum(queries) + padding, HIDDEN).to(torch.bfloat16)
    blocks = sum(-(-length // 16) for length in lengths)
    caches = [[filled_cache(blocks, cache) for _ in layers] for _ in range(2)]
    expected_caches = [[cache.clone() for cache in kind] for kind in caches]
    expected = one_by_one(layers, x, expected_caches, step)
    before, threads = [[cache.clone() for cache in kind] for kind in caches], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            used = [[cache.clone() for cache in kind] for kind in before]
            out = as_one(layers, x, used, step)
            assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
            for ours, theirs in zip(used, expected_caches, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_no_tokens_and_what_is_refused() -> None:
    layers = [make_layer("sparse24_int4", False, False, False, 0)]
    step = make_step([1], [5], 0)
    caches = [[torch.zeros(1, 16, KV_HEADS, DIM, dtype=torch.bfloat16)] for _ in range(2)]
    x = torch.randn(1, HIDDEN).to(torch.bfloat16)
    nothing = [step[0], *(t[:0] for t in step[1:3]), step[3][:0], step[4][:1], step[5][:0]]
    assert as_one(layers, x[:0], caches, nothing)[0].shape == (0, HIDDEN)
    with pytest.raises(RuntimeError, match="position 9 is beyond cos_sin's 5"):
        as_one(layers, x, caches, [step[0], step[1] * 0 + 9, *step[2:]])
    with pytest.raises(RuntimeError, match="slot 16 is out of range: the cache has 16"):
        as_one(layers, x, caches, [*step[:2], step[2] * 0 + 16, *step[3:]])
    with pytest.raises(RuntimeError, match="block 7 of sequence 0 is out of range"):
        as_one(layers, x, caches, [*step[:3], step[3] * 0 + 7, *step[4:]])
    swapped = [{**layers[0], "qkv": layers[0]["o"]}]
    with pytest.raises(RuntimeError, match=r"qkv is \[96, 192\]; the layer needs \[320, 96\]"):
        as_one(swapped, x, caches, step)
    with pytest.raises(RuntimeError, match="one cache a layer"):
        as_one(layers, x, [caches[0], []], step)
    twice = [layers[0], layers[0]]
    with pytest.raises(RuntimeError, match="weights has 12 tensors; 1 layers need 6"):
        as_one(twice, x, caches, step)
    broken = [{**layers[0], "qkv": [torch.zeros(320, 40, dtype=torch.uint8), None, None]}]
    with pytest.raises(RuntimeError, match="not a prepared weight"):
        as_one(broken, x, caches, step)


def test_the_tracer_knows_its_results() -> None:
    layers = [make_layer("sparse24_int4", False, False, False, 0)]
    step = make_step([2], [5], 0)
    caches = [[torch.zeros(1, 16, KV_HEADS, DIM, dtype=torch.bfloat16)] for _ in range(2)]
    x = torch.randn(2, HIDDEN).to(torch.bfloat16)
    weights = [tensor for part in ORDER for tensor in layers[0][part] if tensor is not None]
    present = sum(1 << i for i, t in enumerate([t for part in ORDER for t in layers[0][part]]) if t is not None)
    arguments = (x, weights, present, *caches, *step, HEADS, INNER, 1e-5, 0.2)
    torch.library.opcheck(
        torch.ops.halfweight.decoder_layers.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
