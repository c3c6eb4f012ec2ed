"""Attention, cache writes, norms, activation and rotary positions: the kernels against the portable torch path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor import kernels
from compressor.kernels import attention, fused, loading
from tests.kernels.test_linear import EXAMPLES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def portable(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "LIBRARY", None)
        return function(*arguments)


def assert_close(ours: Tensor, theirs: Tensor, noise: float = 4e-6) -> None:
    """At most one rounding apart, beside fp32 noise: a share of the largest value."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    step = torch.finfo(ours.dtype).eps
    allowed = 1.01 * step * theirs.float().abs() + noise * max(1.0, float(theirs.float().abs().max()))
    assert ((ours.float() - theirs.float()).abs() <= allowed).all()


def attention_noise(dtype: torch.dtype) -> float:
    """Matrix tiles round the softmax's weights to bf16, where the queries are no better."""
    return 2e-3 if kernels.isa() == "amx" and dtype == torch.bfloat16 else 4e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (3, 5, 64), (0, 64)])
def test_norms_and_activation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    if x.numel():
        assert_close(fused.rms_norm(x, weight, 1e-5), portable(fused.rms_norm, x, weight, 1e-5))
        ours = fused.add_rms_norm(x, residual, weight, 1e-5)
        theirs = portable(fused.add_rms_norm, x, residual, weight, 1e-5)
        assert_close(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    else:
        assert fused.rms_norm(x, weight, 1e-5).shape == shape
    wide = torch.randn((*shape[:-1], 2 * shape[-1])).to(dtype) * 20
    assert fused.silu_and_mul(wide).shape == shape
    if x.numel():
        assert_close(fused.silu_and_mul(wide), portable(fused.silu_and_mul, wide))


def test_activation_at_its_ends() -> None:
    gate = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0, float("nan")]])
    y = fused.silu_and_mul(torch.cat([gate, torch.ones(1, 6)], dim=1))[0]
    assert y[:2].abs().max() < 1e-30 and y[2] == 0
    assert torch.equal(y[3:5], gate[0, 3:5]) and y[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 64, 128])
def test_rotary_reads_slices_of_a_fused_projection(dtype: torch.dtype, dim: int) -> None:
    projected = torch.randn(5, 9 * dim).to(dtype)
    q, k = projected[:, : 6 * dim].unflatten(1, (6, dim)), projected[:, 6 * dim : 8 * dim].unflatten(1, (2, dim))
    cos_sin, positions = torch.randn(40, dim), torch.tensor([39, 0, 7, 7, 12])
    for ours, theirs in zip(
        fused.rotary_embedding(q, k, cos_sin, positions),
        portable(fused.rotary_embedding, q, k, cos_sin, positions),
        strict=True,
    ):
        assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="position 40 is beyond cos_sin's 40"):
        fused.rotary_embedding(q, k, cos_sin, positions + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv_writes_the_slots_and_nothing_else(dtype: torch.dtype) -> None:
    projected = torch.randn(4, 6, 32).to(dtype)
    key, value = projected[:, :3], projected[:, 3:]
    caches = [torch.randn(5, 8, 3, 32).to(torch.bfloat16) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([39, -1, 0, 17])
    attention.store_kv(key, value, *caches, slots)
    portable(attention.store_kv, key, value, *expected, slots)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])
    with pytest.raises(RuntimeError, match="slot 40 is out of range"):
        attention.store_kv(key, value, *caches, slots + 1)


def int8_caches(blocks: int, block_size: int, kv_heads: int, dim: int) -> list[Tensor]:
    """Filled with random keys and values, of very different sizes from head to head."""
    caches = [attention.empty_cache(blocks, block_size, kv_heads, dim, torch.int8) for _ in range(2)]
    tokens = blocks * block_size
    keys, values = (torch.randn(tokens, kv_heads, dim) * torch.rand(tokens, kv_heads, 1) * 3 for _ in range(2))
    attention.store_kv(keys, values, *caches, torch.arange(tokens))
    return caches


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv_in_int8(dtype: torch.dtype) -> None:
    key, value = torch.randn(4, 3, 32).to(dtype), torch.randn(4, 3, 32).to(dtype) * 1000
    key[2, 1], value[1, 0] = 0, 1e-37
    caches = int8_caches(5, 8, 3, 32)
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([39, 5, 0, -1])
    attention.store_kv(key, value, *caches, slots)
    portable(attention.store_kv, key, value, *expected, slots)
    for ours, theirs in zip(caches, expected, strict=True):  # ties may round differently
        apart = ours[..., :32].view(torch.int8).int() - theirs[..., :32].view(torch.int8).int()
        assert int(apart.abs().max()) <= 1 and int(apart.count_nonzero()) < 20
        assert torch.equal(ours[..., 32:], theirs[..., 32:])
    rows = caches[0].flatten(0, 1)[39]
    values, factors = rows[:, :32].view(torch.int8).float(), rows[:, 32:].contiguous().view(torch.float32)
    assert float(factors.abs().max()) > 0
    assert float((values * factors - key[0].float()).abs().max()) <= 0.51 * float(factors.max())
    key[0, 0, 7] = float("nan")
    attention.store_kv(key, value, *caches, slots)
    assert caches[0].flatten(0, 1)[39, 0, 32:].contiguous().view(torch.float32).isnan()
    with pytest.raises(RuntimeError, match="differ in size or dtype"):
        attention.store_kv(key, value, caches[0], torch.zeros(5, 8, 3, 32).bfloat16(), slots)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_attention_matches_torch(data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([1, 3]))
    heads = kv_heads * data.draw(st.sampled_from([1, 3, 8]))
    dim, block_size = data.draw(st.sampled_from([16, 64, 80, 128])), data.draw(st.sampled_from([1, 16, 32]))
    dtype = data.draw(st.sampled_from(DTYPES))
    lengths, queries = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        lengths.append(data.draw(st.sampled_from([1, 2, 33, 64, 65, 200, 700, 1100])))
        queries.append(min(lengths[-1], data.draw(st.sampled_from([0, 1, 2, 5, 40, 130]))))
    needed = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(needed) + 3)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for s, n in enumerate(needed):
        tables[s, :n] = blocks[sum(needed[:s]) : sum(needed[:s]) + n]
    if data.draw(st.booleans()):
        caches = int8_caches(len(blocks), block_size, kv_heads, dim)
    else:
        caches = [torch.randn(len(blocks), block_size, kv_heads, dim).to(torch.bfloat16) for _ in range(2)]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    query = torch.randn(int(starts[-1]) + 2, heads, dim).to(dtype)
    arguments = (query, *caches, tables, starts, torch.tensor(lengths, dtype=torch.int32), dim**-0.5)
    noise = attention_noise(dtype)
    assert_close(attention.paged_attention(*arguments), portable(attention.paged_attention, *arguments), noise)


def test_attention_with_large_scores_and_bad_tables() -> None:
    caches = [torch.randn(2, 64, 1, 64).to(torch.bfloat16) * 30 for _ in range(2)]
    tables, starts = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    lengths = torch.tensor([100], dtype=torch.int32)
    query = torch.randn(3, 4, 64) * 30
    arguments = (query, *caches, tables, starts, lengths, 1.0)
    # fp32 knows scores of some 10^4 to 10^-3 only, and so the probabilities that are made of them.
    assert_close(attention.paged_attention(*arguments), portable(attention.paged_attention, *arguments), noise=1e-3)
    query[1, 2, 5] = float("nan")
    y = attention.paged_attention(query, *caches, tables, starts, lengths, 1.0)
    assert y[1, 2].isnan().all() and torch.isfinite(y[0]).all() and torch.isfinite(y[2]).all()
    with pytest.raises(RuntimeError, match="block 2 of sequence 0 is out of range"):
        attention.paged_attention(query, *caches, tables + 1, starts, lengths, 1.0)
    with pytest.raises(RuntimeError, match="needs 3 blocks, block_tables has 2"):
        attention.paged_attention(query, *caches, tables, starts, lengths + 60, 1.0)


@pytest.mark.parametrize("queries", [1, 70])
def test_attention_does_not_depend_on_the_number_of_threads(queries: int) -> None:
    caches = [torch.randn(80, 16, 3, 64).to(torch.bfloat16) for _ in range(2)]
    tables = torch.arange(80, dtype=torch.int32)[None]
    starts = torch.tensor([0, queries], dtype=torch.int32)
    query = torch.randn(queries, 9, 64)
    lengths = torch.tensor([1280], dtype=torch.int32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(attention.paged_attention(query, *caches, tables, starts, lengths, 0.125))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_fake_implementations_agree() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    caches = [torch.randn(4, 16, 2, 64).to(torch.bfloat16) for _ in range(2)]
    key = torch.randn(3, 2, 64)
    tables, starts = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    cases = {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, x, weight, 1e-5),
        "silu_and_mul": (x,),
        "rotary_embedding": (key, key, torch.randn(9, 64), torch.tensor([1, 2, 3])),
        "store_kv": (key, key, *caches, torch.tensor([0, 5, 9])),
        "paged_attention": (key, *caches, tables, starts, torch.tensor([9], dtype=torch.int32), 0.1),
    }
    for name, arguments in cases.items():
        operator = getattr(torch.ops.halfweight, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
