import pytest
import torch
from torch import Tensor

from compressor.calibration import LayerStats
from compressor.formats import FORMATS, make_format
from compressor.masks import MaskShape, n_m_mask
from compressor.quantizers import NEED_HESSIAN, QUANTIZERS, rtn, snap
from compressor.scheme import Scheme

SCHEMES = [
    *(Scheme(name, size) for name in ("int4", "sparse24_int4") for size in (32, 64, 128, -1)),
    Scheme("int8", -1), Scheme("sparse24_int8", 64), Scheme("fp8", 32), Scheme("sparse24_fp8", 64),
]  # fmt: skip


def layer(rows: int = 24, columns: int = 256) -> tuple[Tensor, Tensor, LayerStats]:
    """A weight, correlated inputs [T, I] and their statistics."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(512, columns, generator=generator) @ mixing * torch.rand(columns, generator=generator)
    return weight, x, LayerStats(x.square().sum(0).sqrt(), 512, x.T @ x)


def pruned(weight: Tensor, scheme: Scheme) -> Tensor:
    return weight * n_m_mask(weight.abs()) if make_format(scheme).sparse else weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.group_size}")
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_zeros_stay_zero_and_the_result_packs(name: str, scheme: Scheme) -> None:
    weight, _, stats = layer()
    weight = pruned(weight, scheme)
    result = QUANTIZERS[name](weight, stats, scheme)
    assert not result.values[weight == 0].any()
    fmt = make_format(scheme)
    assert torch.equal(fmt.unpack(fmt.pack(result)), result.dequantized().to(torch.bfloat16))
    assert (result.dequantized() - weight).norm() / weight.norm() < 0.25


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.group_size}")
def test_gptq_changes_the_output_less_than_rounding_to_nearest(scheme: Scheme) -> None:
    weight, x, stats = layer()
    weight = pruned(weight, scheme)
    errors = {
        name: float((x @ (QUANTIZERS[name](weight, stats, scheme).dequantized() - weight).T).norm())
        for name in ("rtn", "gptq")
    }
    assert errors["gptq"] < 0.95 * errors["rtn"]


@pytest.mark.parametrize("pattern", ["4:8", "50%"])
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_sparsity_that_is_stored_densely_stays(name: str, pattern: str) -> None:
    """Plain GPTQ's corrections would fill pruned positions; no format would notice here."""
    weight, _, stats = layer()
    sparse = weight * MaskShape.parse(pattern).mask(weight.abs())
    assert not QUANTIZERS[name](sparse, stats, Scheme("int4", 32)).values[sparse == 0].any()


def test_the_clip_search_beats_the_largest_weight() -> None:
    weight, _, _ = layer()
    weight[:, 0] *= 6
    plain = weight.abs().amax(1, keepdim=True) / 7
    error = (snap(weight, plain.to(torch.bfloat16), FORMATS["int4"](-1)).dequantized() - weight).norm()
    assert (rtn(weight, None, Scheme("int4", -1)).dequantized() - weight).norm() < 0.9 * error


def test_the_grid_is_turned_to_the_largest_weight() -> None:
    """The longer side of -8..7 lies where a group's largest weight is: less error than any positive scale has."""
    weight, _, _ = layer()
    fmt, groups = FORMATS["int4"](32), weight.unflatten(1, (8, 32))
    largest = groups.abs().amax(2)
    found = rtn(weight, None, Scheme("int4", 32))
    assert found.scale is not None
    turned = found.scale < 0
    assert turned.float().mean() > 0.3
    assert torch.equal(turned, (groups.amax(2) == largest) & (found.values.unflatten(1, (8, 32)).amin(2) == -8))
    errors = torch.stack(
        [
            (snap(weight, largest * (1.1 - step / 80) / 7, fmt).dequantized() - weight).square().unflatten(1, (8, 32))
            for step in range(41)
        ]
    ).sum(3)
    assert (found.dequantized() - weight).square().sum() < 0.95 * errors.amin(0).sum()


def test_important_inputs_are_rounded_better() -> None:
    weight, _, _ = layer()
    norm = torch.ones(256)
    norm[:16] = 100
    weighted = rtn(weight, LayerStats(norm, 512), Scheme("int4", -1)).dequantized()
    plain = rtn(weight, None, Scheme("int4", -1)).dequantized()
    assert (weighted - weight)[:, :16].norm() < (plain - weight)[:, :16].norm()


@pytest.mark.parametrize("name", NEED_HESSIAN)
def test_a_missing_hessian_is_said(name: str) -> None:
    weight, _, stats = layer()
    with pytest.raises(ValueError, match="Hessian"):
        QUANTIZERS[name](weight, LayerStats(stats.input_norm, 512), Scheme("int4", 32))
