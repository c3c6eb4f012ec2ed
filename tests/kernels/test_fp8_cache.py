"""Keys and values in e4m3: every byte, every rounding, and attention over them."""

import pytest
import torch
from torch import Tensor

from compressor.kernels import attention, loading
from tests.kernels.test_steps import assert_close, attention_noise, portable

pytestmark = pytest.mark.skipif(loading.LIBRARY is None, reason="the CPU kernels are not installed")


def caches(blocks: int, block_size: int, kv_heads: int, dim: int) -> list[Tensor]:
    made = [attention.empty_cache(blocks, block_size, kv_heads, dim, attention.FP8) for _ in range(2)]
    tokens = blocks * block_size
    keys, values = (torch.randn(tokens, kv_heads, dim) * torch.rand(tokens, kv_heads, 1) * 3 for _ in range(2))
    attention.store_kv(keys, values, *made, torch.arange(tokens))
    return made


def numbers() -> Tensor:
    """All e4m3 numbers, the middles between neighbours, what is beyond the range, NaN and infinity: [1, 1, 32 n]."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(attention.FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((middles.nextafter(torch.tensor(0.0)), middles, middles.nextafter(torch.tensor(500.0))))
    ends = torch.tensor([447.9, 448.1, 464.0, 1e5, 3e38, 1e-10, 1e-40, float("inf"), float("nan")])
    positive = torch.cat((codes, near, ends))
    both = torch.cat((positive, -positive))
    return torch.nn.functional.pad(both, (0, -len(both) % 32))[None, None]


def test_every_number_is_stored_as_torch_rounds_it() -> None:
    given = numbers()
    ours, theirs = ([torch.zeros(1, 1, *given.shape[1:], dtype=torch.uint8) for _ in range(2)] for _ in range(2))
    attention.store_kv(given, -given, *ours, torch.tensor([0]))
    portable(attention.store_kv, given, -given, *theirs, torch.tensor([0]))
    for mine, expected in zip(ours, theirs, strict=True):
        mine, expected = (cache.view(attention.FP8).float() for cache in (mine, expected))
        assert torch.equal(mine.nan_to_num(1000), expected.nan_to_num(1000))
        assert int(mine.isnan().sum()) == 4


@pytest.mark.parametrize("queries", [1, 40])
def test_every_byte_is_read_as_torch_reads_it(queries: int) -> None:
    """One key a sequence has all of the attention: its values come out as they are, by either path of the kernel."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, queries, 1, 256).contiguous()
    keys = torch.zeros_like(values)
    tables, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([queries], dtype=torch.int32)
    starts = torch.tensor([0, queries], dtype=torch.int32)
    query = torch.randn(queries, 1, 256)
    found = attention.paged_attention(query, keys, values, tables, starts, lengths, 1.0)
    expected = values[0, 0, 0].view(attention.FP8).float()
    assert torch.equal(found.isnan(), expected.isnan().expand_as(found))
    assert torch.allclose(found.nan_to_num(), expected.nan_to_num().expand_as(found), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "queries", "dim"), [(1, 1, 64), (3, 1, 80), (8, 5, 128), (3, 40, 16)])
def test_attention_matches_torch(dtype: torch.dtype, heads: int, queries: int, dim: int) -> None:
    made = caches(9, 16, 2, dim)
    tables = torch.randperm(9)[None].int()
    starts, lengths = torch.tensor([0, queries]).int(), torch.tensor([130], dtype=torch.int32)
    query = torch.randn(queries, 2 * heads, dim).to(dtype)
    arguments = (query, *made, tables, starts, lengths, dim**-0.5)
    noise = attention_noise(dtype)
    assert_close(attention.paged_attention(*arguments), portable(attention.paged_attention, *arguments), noise)


def test_a_key_that_is_not_a_number_is_let_through() -> None:
    made = caches(2, 16, 1, 64)
    arguments = (torch.tensor([[0]], dtype=torch.int32), torch.tensor([0, 1]).int(), torch.tensor([16]).int(), 0.125)
    query = torch.randn(1, 2, 64)
    assert attention.paged_attention(query, *made, *arguments).isfinite().all()
    made[0][0, 5, 0, 9] = 0x7F
    assert attention.paged_attention(query, *made, *arguments).isnan().all()


def test_rows_of_another_size_are_refused() -> None:
    made = caches(2, 16, 1, 64)
    key = torch.randn(1, 1, 48)
    with pytest.raises(RuntimeError, match="with the caches' D"):
        attention.store_kv(key, key, *made, torch.tensor([0]))
