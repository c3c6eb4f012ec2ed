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
from compressor.formats.low_rank import low_rank_spec, pack_low_rank
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import LowRank, Scheme

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
@given(data=st.data(), size=st.sampled_from([8, 32]), groups=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_slices_commute_with_packing(name: str, data: st.DataObject, size: int, groups: int, seed: int) -> None:
    """Any rows, and any run of groups of inputs."""
    fmt = FORMATS[name](size)
    weight = quantized(fmt, random_weight(9, groups * size, seed))
    top, left = data.draw(st.integers(0, 8)), data.draw(st.integers(0, groups - 1))
    bottom, right = data.draw(st.integers(top + 1, 9)), data.draw(st.integers(left + 1, groups))
    scale = None if weight.scale is None else weight.scale[top:bottom, left:right]
    part = fmt.pack(QuantizedWeight(weight.values[top:bottom, left * size : right * size], scale))
    for key, tensor in fmt.pack(weight).items():
        columns = slice(left * tensor.shape[1] // groups, right * tensor.shape[1] // groups)
        assert torch.equal(part[key].float(), tensor[top:bottom, columns].float()), key


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


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_golden_bytes_of_the_low_rank_branch(dtype: str) -> None:
    """S [2, 4] by hand: the largest of a row is 7 or 127 steps; bf16 1.0 is 80 3f, 0.5 is 00 3f."""
    limit = {"int8": 127.0, "int4": 7.0, "bfloat16": 1.0}[dtype]
    s = torch.tensor([[limit, -0.0, -limit, 1.0], [0.0, 0.5, 0.0, -0.5 * limit]])
    golden = {
        "int8": {"low_rank_b": "7f 00 81 01 00 01 00 81", "low_rank_b_scale": "803f 003f"},
        "int4": {"low_rank_b": "8f 91 98 18", "low_rank_b_scale": "803f 003f"},
        "bfloat16": {"low_rank_b": "803f 0000 80bf 803f 0000 003f 0000 00bf"},
    }[dtype]
    packed = pack_low_rank(LowRank(8, dtype), s)
    assert {key: bytes(t.view(torch.uint8).flatten().tolist()) for key, t in packed.items()} == {
        key: bytes.fromhex(text) for key, text in golden.items()
    }
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == low_rank_spec(LowRank(8, dtype), 2, 32)


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_branch_of_nan_or_infinity_is_refused(dtype: str, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN"):
        pack_low_rank(LowRank(8, dtype), torch.tensor([[1.0, bad]]))


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
@given(bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), place=st.integers(0, 47))
@settings(max_examples=25, deadline=None)
def test_nan_and_infinity_are_refused(name: str, bad: float, place: int) -> None:
    fmt = FORMATS[name](8)
    values = torch.zeros(3, 16)
    values.view(-1)[place] = bad
    with pytest.raises(ValueError):
        fmt.pack(QuantizedWeight(values, torch.ones(3, 2) if fmt.scaled else None))
    with pytest.raises(ValueError, match="NaN"):
        rtn(values, None, Scheme(name, 8))


@QUANTIZED
def test_bad_scales_and_values_beyond_the_grid_are_refused(name: str) -> None:
    fmt = FORMATS[name](8)
    zeros = torch.zeros(1, 8)
    signs = [] if fmt.lopsided else [torch.tensor([[-1.0]])]
    for scale in (torch.tensor([[float("inf")]]), *signs, torch.ones(1, 2), None):
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


@ALL
@given(power=st.integers(-149, 127), dtype=st.sampled_from(["bfloat16", "float16"]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_weights_of_any_size_come_back_or_are_refused(name: str, power: int, dtype: str, seed: int) -> None:
    """Scales may run under and over; a weight is then rounded to zero or refused, and never becomes NaN or infinite."""
    scheme = Scheme(name, 8, dtype)
    fmt = make_format(scheme)
    weight = (random_weight(2, 16, seed).clamp(-1.99, 1.99).double() * 2.0**power).float()
    weight = weight * n_m_mask(weight.abs()) if fmt.sparse else weight
    largest, info = float(weight.abs().max()), torch.finfo(fmt.dtype)
    try:
        unpacked = fmt.unpack(fmt.pack(rtn(weight, None, scheme)))
    except ValueError:
        assert largest > 0.99 * info.max
        return
    assert torch.isfinite(unpacked).all()
    assert not unpacked[weight == 0].any()
    half_step = 0.08 * largest + info.tiny  # int4 is the coarsest: a fourteenth
    assert float((unpacked.double() - weight.double()).norm()) <= half_step * weight.numel() ** 0.5


@QUANTIZED
def test_values_beyond_the_dtype_are_refused(name: str) -> None:
    """fp16 ends at 65504: a scale of 8248 is one of its numbers, eight of them are not."""
    fmt = FORMATS[name](8, torch.float16)
    scale = torch.full((1, 1), 66000 / fmt.largest).half()
    weight = torch.zeros(1, 8)
    weight[0, 1] = -fmt.largest
    with pytest.raises(ValueError, match=r"beyond torch\.float16"):
        fmt.pack(QuantizedWeight(weight, scale))
    fmt.pack(QuantizedWeight(weight, scale * 0.99))


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
