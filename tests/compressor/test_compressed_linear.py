import pytest
import torch
from torch import Tensor, nn

from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, linear_shape, tie
from compressor.formats import FORMATS, make_format
from compressor.formats.low_rank import pack_low_rank
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import LowRank, Scheme


def packed(scheme: Scheme, rows: int = 40, columns: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors, and the weight they stand for in float64."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    fmt = make_format(scheme)
    if fmt.sparse:
        weight = weight * n_m_mask(weight.abs())
    tensors = fmt.pack(rtn(weight, None, scheme))
    return tensors, fmt.unpack_quantized(tensors).dequantized().double()


@pytest.mark.parametrize(
    "low_rank", [None, LowRank(16), LowRank(8, "bfloat16"), LowRank(16, "int4"), LowRank(16, "int8", True)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_forward_is_weight_and_branch_and_bias(name: str, bias: bool, low_rank: LowRank | None) -> None:
    scheme = Scheme(name, 32, low_rank=low_rank)
    tensors, expected_weight = packed(scheme)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 64, generator=generator)
    expected = x.double() @ expected_weight.T
    if low_rank is not None:
        rank = 64 // low_rank.segment
        s = torch.randn(40, rank, generator=generator)
        projection = torch.randn(rank, 64, generator=generator) if low_rank.trained_projection else None
        branch = pack_low_rank(low_rank, s, projection)
        scale = branch.get("low_rank_b_scale", torch.ones(1))
        sums = torch.eye(rank).repeat_interleave(low_rank.segment, 1) if projection is None else branch["low_rank_a"]
        stored = branch["low_rank_b"]
        if low_rank.dtype == "int4":
            stored = torch.stack((stored & 15, stored >> 4), dim=2).flatten(1).double() - 8
        expected = expected + x.double() @ (stored.double() * scale.double() @ sums.double()).T
        tensors |= branch
    layer = CompressedLinear(64, 40, scheme, bias=bias)
    if bias:
        tensors["bias"] = torch.randn(40, generator=generator).bfloat16()
        expected = expected + tensors["bias"]
    layer.assign(tensors)
    for _ in range(2):  # the stored layout, then the kernel's
        found = layer(x)
        assert found.dtype == x.dtype
        assert (found.double() - expected).norm() / expected.norm() < 0.02
        layer.prepare()
        layer.prepare()


@pytest.mark.parametrize("low_rank", [None, LowRank(16)])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_compiler_takes_it_as_one_graph(name: str, prepared: bool, low_rank: LowRank | None) -> None:
    scheme = Scheme(name, 32, low_rank=low_rank)
    layer = CompressedLinear(64, 40, scheme)
    branch = {} if low_rank is None else pack_low_rank(low_rank, torch.randn(40, 4))
    layer.assign(packed(scheme)[0] | branch)
    if prepared:
        layer.prepare()
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_state_dict_is_the_stored_checkpoint() -> None:
    scheme = Scheme("sparse24_int4", 32)
    tensors, _ = packed(scheme)
    layer = CompressedLinear(64, 40, scheme)
    assert set(layer.state_dict()) == set(tensors)
    layer.load_state_dict(tensors)
    assert torch.equal(layer.unpacked(), make_format(scheme).unpack(tensors))


def test_prepare_keeps_no_second_copy() -> None:
    for name in FORMATS:
        scheme = Scheme(name, 32)
        tensors, _ = packed(scheme, rows=64, columns=256)
        layer = CompressedLinear(256, 64, scheme)
        layer.assign(tensors)
        before = layer.weight_bytes
        layer.prepare()
        assert layer.weight_bytes <= 1.1 * before + 256


def test_assign_refuses_other_shapes() -> None:
    tensors, _ = packed(Scheme("int4", 32))
    with pytest.raises(ValueError, match="expected tensors"):
        CompressedLinear(64, 41, Scheme("int4", 32)).assign(tensors)


def test_a_tied_head_reads_the_embedding() -> None:
    tensors, weight = packed(Scheme("int8"))
    embedding = CompressedEmbedding(40, 64, Scheme("int8"))
    embedding.assign(tensors)
    head = CompressedLinear(64, 40, Scheme("int8"))
    embedding.prepare()
    tie(head, embedding)
    assert all(a is b for a, b in zip(head.tensors.values(), embedding.tensors.values(), strict=True))
    ids = torch.tensor([3, 39])
    assert torch.allclose(embedding(ids).double(), weight[ids], atol=1e-2)
    logits = head(embedding(ids).float()).double()
    assert (logits - weight[ids] @ weight.T).norm() / (weight[ids] @ weight.T).norm() < 0.02


def test_shape_of_other_modules_is_refused() -> None:
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    with pytest.raises(ValueError, match="accepted"):
        linear_shape(nn.Conv2d(1, 1, 1))
