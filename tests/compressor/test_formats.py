"""The contract of `docs/format.md`, over every registered format."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.checkpoint import ShardWriter
from compressor.formats import FORMATS, Format, QuantizedWeight, make_format
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import Scheme

GOLDEN = Path(__file__).parent / "golden_formats.json"
ALL = pytest.mark.parametrize("name", list(FORMATS))
QUANTIZED = pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.scaled])
SPARSE = pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.sparse])


def quantized(fmt: Format, weight: Tensor) -> QuantizedWeight:
    if fmt.sparse:
        weight = weight * n_m_mask(weight.abs())
    return rtn(weight, None, Scheme(fmt.name, fmt.group_size))


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@ALL
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), size=st.sampled_from([-1, 8, 32]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_pack_then_unpack_is_exact_and_matches_the_specification(
    name: str, rows: int, groups: int, size: int, seed: int
) -> None:
    fmt = FORMATS[name](size)
    weight = quantized(fmt, random_weight(rows, groups * 32, seed))
    tensors = fmt.pack(weight)
    fmt.validate(tensors)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == fmt.spec(rows, groups * 32)
    assert torch.equal(fmt.unpack(tensors), weight.dequantized().to(fmt.dtype))
    again = fmt.unpack_quantized(tensors)
    assert torch.equal(again.dequantized().to(fmt.dtype), weight.dequantized().to(fmt.dtype))


@ALL
def test_slices_commute_with_packing(name: str) -> None:
    fmt = FORMATS[name](32)
    weight = quantized(fmt, random_weight(12, 128))
    whole = fmt.pack(weight)
    scale = weight.scale
    rows = fmt.pack(QuantizedWeight(weight.values[3:7], None if scale is None else scale[3:7]))
    assert all(torch.equal(rows[key], whole[key][3:7]) for key in whole)
    block = fmt.pack(QuantizedWeight(weight.values[:, 32:96], None if scale is None else scale[:, 1:3]))
    for key, tensor in block.items():
        start = whole[key].shape[1] // 4
        assert torch.equal(tensor, whole[key][:, start : start + tensor.shape[1]]), key


@ALL
def test_linear_equals_the_unpacked_weight(name: str) -> None:
    fmt = FORMATS[name](32)
    tensors = fmt.pack(quantized(fmt, random_weight(17, 96)))
    x, bias = random_weight(5, 96, 1), random_weight(1, 17, 2)[0]
    expected = x.double() @ fmt.unpack_quantized(tensors).dequantized().double().T + bias
    assert torch.allclose(fmt.linear(x, tensors, bias).double(), expected, rtol=1e-2, atol=5e-2)
    prepared = fmt.linear(x, fmt.prepare(tensors), bias).double()
    assert (prepared - expected).norm() / expected.norm() < 2e-2


@ALL
def test_rows_gathers_the_unpacked_rows_in_either_layout(name: str) -> None:
    fmt = FORMATS[name](32)
    tensors = fmt.pack(quantized(fmt, random_weight(40, 64)))
    ids = torch.tensor([[0, 39, 7], [7, 16, 15]])
    assert torch.equal(fmt.rows(tensors, ids), fmt.unpack(tensors)[ids])
    if name in ("dense", "int8"):  # the formats that embeddings take
        assert torch.equal(fmt.rows(fmt.prepare(tensors), ids), fmt.unpack(tensors)[ids])


@ALL
def test_golden_bytes(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    fmt = FORMATS[name](golden["group_size"])
    scale = golden.get("scale")
    weight = QuantizedWeight(
        torch.tensor(golden["values"], dtype=torch.float32 if fmt.grid is None else torch.int8),
        None if scale is None else torch.tensor(scale),
    )
    packed = {key: t.contiguous().view(torch.uint8).flatten().tolist() for key, t in fmt.pack(weight).items()}
    assert {key: bytes(data).hex() for key, data in packed.items()} == golden["bytes"]


@ALL
def test_negative_zero_is_stored_as_zero(name: str) -> None:
    fmt = FORMATS[name](8)
    values = torch.tensor([[1.0, -0.0, -0.0, 2.0, -0.0, -0.0, -0.0, 1.0]])
    scale = torch.ones(1, 1) if fmt.scaled else None
    tensors = fmt.pack(QuantizedWeight(values, scale))
    positive = fmt.pack(QuantizedWeight(values.abs(), scale))
    assert all(torch.equal(a.view(torch.uint8), positive[key].view(torch.uint8)) for key, a in tensors.items())
    assert not torch.signbit(fmt.unpack(tensors)).any()


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    fmt = FORMATS[name](8)
    values = torch.tensor([[bad, 0, 0, 0, 0, 0, 0, 0]])
    with pytest.raises(ValueError):
        fmt.pack(QuantizedWeight(values, torch.ones(1, 1) if fmt.scaled else None))
    with pytest.raises(ValueError, match="NaN"):
        rtn(values, None, Scheme(name, 8))


@QUANTIZED
def test_bad_scales_and_values_beyond_the_grid_are_refused(name: str) -> None:
    fmt = FORMATS[name](8)
    zeros = torch.zeros(1, 8)
    for scale in (torch.tensor([[float("inf")]]), torch.tensor([[-1.0]]), torch.ones(1, 2), None):
        with pytest.raises(ValueError, match="scale"):
            fmt.pack(QuantizedWeight(zeros, scale))
    beyond = zeros.clone()
    beyond[0, 0] = fmt.largest + 1
    with pytest.raises(ValueError, match=r"grid|e4m3"):
        fmt.pack(QuantizedWeight(beyond, torch.ones(1, 1)))
    between = zeros.clone()
    between[0, 0] = 0.53
    with pytest.raises(ValueError, match=r"grid|e4m3"):
        fmt.pack(QuantizedWeight(between, torch.ones(1, 1)))


@QUANTIZED
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-8, 1e4])
def test_extreme_scales_keep_weights_finite(name: str, magnitude: float) -> None:
    fmt = FORMATS[name](8, torch.float16)
    weight = quantized(fmt, torch.full((2, 16), magnitude))
    weight = rtn(weight.dequantized(), None, Scheme(name, 8, "float16"))
    unpacked = fmt.unpack(fmt.pack(weight))
    assert torch.isfinite(unpacked).all()


@SPARSE
def test_more_than_two_of_four_is_refused(name: str) -> None:
    fmt = FORMATS[name](8)
    values = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="not 2:4 sparse"):
        fmt.pack(QuantizedWeight(values, torch.ones(1, 1) if fmt.scaled else None))


@SPARSE
def test_positions_out_of_order_are_refused(name: str) -> None:
    fmt = FORMATS[name](32)
    tensors = fmt.pack(quantized(fmt, random_weight(3, 32)))
    for code in (0b0101, 0b0001, 0b0000, 0b1111):
        tensors["weight_meta"][1, 2] = code | 0b0100 << 4
        with pytest.raises(ValueError, match="positions"):
            fmt.validate(tensors)


@ALL
def test_validate_refuses_wrong_shapes_dtypes_and_names(name: str) -> None:
    fmt = FORMATS[name](32)
    tensors = fmt.pack(quantized(fmt, random_weight(3, 64)))
    for key, tensor in tensors.items():
        for broken in ({**tensors, key: tensor.double()}, {**tensors, "extra": tensor}):
            with pytest.raises(ValueError):
                fmt.validate(broken)
        with pytest.raises(ValueError):
            fmt.validate({other: value for other, value in tensors.items() if other != key})
        if len(tensors) > 1:
            with pytest.raises(ValueError):
                fmt.validate({**tensors, key: tensor[:, :-1]})


@SPARSE
def test_shapes_that_sparsity_cannot_take_say_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        FORMATS[name](-1).spec(8, 30)


@QUANTIZED
def test_a_group_that_does_not_divide_names_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match=r"576 is not a multiple of group_size 128; usable here: 64, 32, 16, -1"):
        FORMATS[name](128).spec(8, 576)


@SPARSE
def test_in_features_of_four_more_than_eight(name: str) -> None:
    fmt = FORMATS[name](-1)
    weight = quantized(fmt, random_weight(5, 12))
    tensors = fmt.pack(weight)
    fmt.validate(tensors)
    assert torch.equal(fmt.unpack(tensors), weight.dequantized().to(fmt.dtype))


@pytest.mark.parametrize(
    ("name", "size", "bits"),
    [
        ("sparse24_int4", 128, 3.125),
        ("sparse24_int4", 64, 3.25),
        ("int4", 64, 4.25),
        ("sparse24", -1, 9),
        ("dense", -1, 16),
    ],
)
def test_bits_per_weight_is_the_arithmetic(name: str, size: int, bits: float) -> None:
    assert FORMATS[name](size).bits_per_weight(256, 1024) == bits


def test_unknown_format_names_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="accepted: dense, fp8, int8, int4"):
        make_format(Scheme("sparse42"))


@ALL
@given(rows=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 999), kept=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_groups_with_any_number_of_zeros_come_back(name: str, rows: int, groups: int, seed: int, kept: int) -> None:
    """Groups of four with three or four zeros, negative zeros among them, in every format."""
    fmt = FORMATS[name](32)
    weight = random_weight(rows, groups * 32, seed)
    places = random_weight(rows, groups * 8 * 4, seed + 1).unflatten(1, (-1, 4)).argsort(2).flatten(1)
    weight = torch.where(places < kept, weight, -torch.zeros(()))
    snapped = quantized(fmt, weight)
    tensors = fmt.pack(snapped)
    fmt.validate(tensors)
    unpacked = fmt.unpack(tensors)
    assert torch.equal(unpacked, snapped.dequantized().to(fmt.dtype))
    assert not torch.signbit(unpacked[unpacked == 0]).any()
    assert not unpacked[weight == 0].any()


@ALL
@pytest.mark.parametrize("size", [64, 128])
def test_a_file_has_the_size_that_the_arithmetic_says(name: str, size: int, tmp_path: Path) -> None:
    table = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"`{name}` |"))
    said = [float(number) for number in row.rpartition("|")[2].split(",")]
    bits = said[0 if size == 64 else -1]
    writer = ShardWriter(tmp_path)
    fmt = FORMATS[name](size)
    for key, tensor in fmt.pack(quantized(fmt, random_weight(256, 1024))).items():
        writer.add(f"layer.{key}", tensor)
    writer.close()
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(bits / 8 * 256 * 1024, rel=0.01)
    assert fmt.bits_per_weight(256, 1024) == bits
