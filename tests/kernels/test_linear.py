"""Every format's linear against float64 of the unpacked weight, whatever instruction set is in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import kernels
from compressor.formats import FORMATS, QuantizedWeight
from compressor.kernels import blob, low_rank
from compressor.kernels.linear import linear
from tests.kernels.weights import QUANTISED, WITH_KERNEL, bound, random_weight

EXAMPLES = int(os.environ.get("HALFWEIGHT_TEST_EXAMPLES", "60"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_the_kernels_are_installed() -> None:
    assert kernels.available()
    assert kernels.isa() in kernels.supported_isas()


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_linear_is_within_its_bound_of_float64(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(WITH_KERNEL))
    group = data.draw(st.sampled_from([32, 64, 96, 128, 256, -1]))
    groups = data.draw(st.integers(1, 5))
    in_features = group * groups if group > 0 else 4 * data.draw(st.integers(1, 150))
    out_features = data.draw(st.integers(1, 70))
    tokens = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100]))
    dtype = data.draw(st.sampled_from(DTYPES))
    exact = data.draw(st.booleans()) or name == "sparse24"
    half = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    packed = random_weight(name, out_features, in_features, group, half, seed=data.draw(st.integers(0, 99)))
    x = torch.randn(tokens, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if data.draw(st.booleans()) else None

    y = packed.kernel.linear(x, packed.prepared, bias, exact=exact)

    expected = x.double() @ packed.weight.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype and y.shape == (tokens, out_features)
    excess = (y.double() - expected).abs() - bound(x, packed.weight, expected, group, exact)
    assert excess.max() <= 0


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("group", [32, 64, 96, 256])
@pytest.mark.parametrize("tokens", [1, 9])
def test_sums_of_the_largest_products_are_whole(name: str, group: int, tokens: int) -> None:
    columns = group * 3
    packed_format = FORMATS[name](group, torch.bfloat16)
    assert packed_format.grid is not None
    lowest = torch.full((16, columns), packed_format.grid[0], dtype=torch.int8)
    if packed_format.sparse:
        lowest[:, 2::4] = lowest[:, 3::4] = 0
    stored = packed_format.pack(QuantizedWeight(lowest, torch.ones(16, 3, dtype=torch.bfloat16)))
    prepared = import_module(f"compressor.kernels.{name}").prepare(stored, group)
    for sign in (1.0, -1.0):  # each is the grid's end, so nothing is rounded
        y = linear(torch.full((tokens, columns), sign), prepared)
        expected = sign * float(lowest[0].sum())
        torch.testing.assert_close(y, torch.full_like(y, expected), rtol=1e-6, atol=0)


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    kernels.set_batch_invariant(True)
    yield
    kernels.set_batch_invariant(False)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize(("tokens", "columns", "group"), [(3, 320, 64), (40, 320, 64), (9, 3264, 96), (9, 2048, 2048)])
def test_a_batch_equals_its_tokens_one_by_one(name: str, tokens: int, columns: int, group: int) -> None:
    packed = random_weight(name, 83, columns, group, torch.bfloat16)
    x = torch.randn(tokens, columns)
    together = linear(x, packed.prepared)
    assert torch.equal(together, torch.cat([linear(row, packed.prepared) for row in x.split(1)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("tokens", [97, 130])
def test_many_tokens_are_as_good_as_bf16_where_there_are_tiles(name: str, tokens: int, dtype: torch.dtype) -> None:
    packed = random_weight(name, 83, 320, 64, torch.bfloat16)
    branch = {"low_rank_b": torch.randn(83, 20).to(torch.bfloat16)}
    x = torch.randn(tokens, 320).to(dtype)
    y = linear(x, packed.prepared, low_rank=low_rank.prepare(branch, 16)).double()
    sums = x.double().unflatten(1, (-1, 16)).sum(2)
    expected = x.double() @ packed.weight.T + sums @ branch["low_rank_b"].double().T
    error = float((y - expected).norm() / expected.norm())
    assert error < (0.004 if kernels.isa() == "amx" else 0.015)


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("exact", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(name: str, tokens: int, exact: bool) -> None:
    packed = random_weight(name, 500, 256, 128, torch.bfloat16)
    x = torch.randn(tokens, 256, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(linear(x, packed.prepared, exact=exact))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(
    name: str, tokens: int, exact: bool, value: float
) -> None:
    packed = random_weight(name, 40, 256, 64, torch.bfloat16)
    x = torch.randn(tokens, 256)
    x[1, 77] = value
    y = linear(x, packed.prepared, exact=exact)
    assert not torch.isfinite(y[1]).any()
    x[1] = 0
    clean = linear(x, packed.prepared, exact=exact)
    others = [i for i in range(tokens) if i != 1]
    assert torch.equal(y[others], clean[others]) and torch.isfinite(clean).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-39, 1e-36, 1e-30, 1e30])
def test_extreme_magnitudes(name: str, magnitude: float) -> None:
    packed = random_weight(name, 20, 128, 64, torch.bfloat16)
    x = torch.randn(3, 128) * magnitude
    for exact in (False, True):
        y = linear(x, packed.prepared, exact=exact)
        expected = x.double() @ packed.weight.T
        allowed = bound(x, packed.weight, expected, 64, exact) + packed.weight.abs().sum(1) * 1e-35
        assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_shapes_strides_and_addresses(name: str) -> None:
    packed = random_weight(name, 37, 192, 64, torch.bfloat16)
    x = torch.randn(4, 3, 192)
    expected = linear(x.flatten(0, 1), packed.prepared)
    assert torch.equal(linear(x, packed.prepared), expected.view(4, 3, 37))
    assert torch.equal(linear(x[0, 0], packed.prepared), expected[0])
    assert torch.equal(linear(x.transpose(0, 1), packed.prepared), expected.view(4, 3, 37).transpose(0, 1))
    assert linear(x[:0], packed.prepared).shape == (0, 3, 37)
    # Neither the activations nor the weights need any alignment.
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    weight = packed.prepared[blob.NAME]
    odd = torch.empty(weight.numel() + 1, dtype=torch.uint8)[1:].view_as(weight).copy_(weight)
    for batch in (slice(0, 1), slice(0, 4)):
        y = linear(shifted[batch], {blob.NAME: odd})
        assert torch.equal(y, expected.view(4, 3, 37)[batch])


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("tokens", [1, 6, 50])
@pytest.mark.parametrize("branch_dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("segment", [16, 32])
def test_low_rank_branch(name: str, tokens: int, branch_dtype: torch.dtype, segment: int) -> None:
    packed = random_weight(name, 45, 576, 64, torch.bfloat16)
    branch = {"low_rank_b": (torch.randn(45, 576 // segment) * 30).to(branch_dtype)}
    dense = branch["low_rank_b"].double()
    if branch_dtype == torch.int8:
        branch["low_rank_b_scale"] = (torch.rand(45, 1) * 0.01).to(torch.bfloat16)
        dense = dense * branch["low_rank_b_scale"].double()
    x = torch.randn(tokens, 576)
    sums = x.double().unflatten(1, (-1, segment)).sum(2)
    expected = x.double() @ packed.weight.T + sums @ dense.T
    for exact in (False, True):
        y = linear(x, packed.prepared, low_rank=low_rank.prepare(branch, segment), exact=exact)
        plain = exact or name == "sparse24"  # float weights make the whole linear one of floats
        allowed = bound(x, packed.weight, expected, 64, plain)
        allowed += bound(sums.float(), dense, expected, -1, plain or branch_dtype == torch.bfloat16)
        if kernels.isa() == "amx" and not exact:  # many tokens: both factors rounded to bf16
            allowed += sums.abs() @ dense.abs().T * 2**-8
        assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rows_are_the_unpacked_weight(name: str, half: torch.dtype) -> None:
    packed = random_weight(name, 37, 164, -1, half)
    ids = torch.tensor([[36, 0, 5], [16, 15, 36]])
    assert torch.equal(packed.kernel.rows(packed.prepared, ids, torch.float32).double(), packed.weight[ids])
    with pytest.raises(RuntimeError, match="row 37 is out of range"):
        packed.kernel.rows(packed.prepared, torch.tensor([37]))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_group_without_kernel_keeps_the_stored_layout(name: str) -> None:
    packed = random_weight(name, 8, 80, 40, torch.bfloat16)
    assert packed.prepared.keys() == packed.stored.keys() and packed.format.stored(packed.prepared)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_the_kernel_layout_is_as_small_as_the_stored_one(name: str) -> None:
    packed = random_weight(name, 256, 1024, 128, torch.bfloat16)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (packed.stored, packed.prepared)]
    assert sizes[1] - sizes[0] < blob.HEADER_BYTES + 256


def test_compile_traces_through() -> None:
    packed = random_weight("sparse24_int4", 40, 128, 64, torch.bfloat16)
    table = random_weight("int8", 50, 128, -1, torch.bfloat16)

    def model(ids: torch.Tensor) -> torch.Tensor:
        x = table.kernel.rows(table.prepared, ids, torch.float32)
        return torch.relu(packed.kernel.linear(x, packed.prepared))

    ids = torch.tensor([3, 49, 7])
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))


def test_fake_implementations_agree() -> None:
    packed = random_weight("sparse24_int4", 40, 128, 64, torch.bfloat16)
    weight = packed.prepared[blob.NAME]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.halfweight.linear.default, (torch.randn(3, 128), weight, None, None, False), test_utils=tests
    )
    torch.library.opcheck(torch.ops.halfweight.rows.default, (weight, torch.tensor([1, 2]), 128), test_utils=tests)


def test_mistakes_are_named() -> None:
    packed = random_weight("int4", 16, 128, 64, torch.bfloat16)
    weight = packed.prepared[blob.NAME]
    with pytest.raises(RuntimeError, match="x has 64 features, the weight 128"):
        linear(torch.randn(2, 64), packed.prepared)
    with pytest.raises(RuntimeError, match="x must be bfloat16, float16 or float32"):
        linear(torch.randn(2, 128).double(), packed.prepared)
    with pytest.raises(RuntimeError, match="bias must be contiguous with 16 elements"):
        linear(torch.randn(2, 128), packed.prepared, torch.randn(15))
    with pytest.raises(RuntimeError, match="wrong length"):
        linear(torch.randn(2, 128), {blob.NAME: weight[:, :-1].contiguous()})
    with pytest.raises(RuntimeError, match="uint8 matrix"):
        linear(torch.randn(2, 128), {blob.NAME: weight.float()})


@settings(max_examples=EXAMPLES, deadline=None)
@given(word=st.integers(0, 8), value=st.integers(-(2**31), 2**31 - 1))
def test_a_damaged_header_is_refused_or_harmless(word: int, value: int) -> None:
    packed = random_weight("sparse24_int4", 20, 128, 64, torch.bfloat16)
    weight = packed.prepared[blob.NAME].clone()
    weight.view(-1)[4 * word : 4 * word + 4] = torch.tensor([value], dtype=torch.int32).view(torch.uint8)
    try:
        assert linear(torch.randn(2, 128), {blob.NAME: weight}).shape == (2, 20)
    except RuntimeError as error:
        assert "weight" in str(error)
