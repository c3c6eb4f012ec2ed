"""What of the GPU paths can be proven without a GPU: layouts, choices, fallbacks. Their products need one."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks.__main__ import main
from compressor.formats import make_format
from compressor.formats.positions import compress24
from compressor.kernels.cuda import AMPERE, choose, semi_structured
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import Scheme

HOPPER, TURING = (9, 0), (7, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (96, 256), (64, 640)])
def test_cutlass_layout_is_torchs(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 40 + 1
    weight = (weight * n_m_mask(weight.abs())).to(dtype)
    packed, meta = semi_structured.cutlass_layout(*compress24(weight))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)
    if dtype != torch.int8:  # without a third zero there is one way only to store a group
        full = torch.where(weight.view(-1, 4) != 0, weight.view(-1, 4), 0).view_as(weight)
        assert (full.view(-1, 4) != 0).sum(1).eq(2).all()
        expected_packed, expected_meta = sparse_semi_structured_from_dense_cutlass(full)
        assert torch.equal(packed, expected_packed)
        assert torch.equal(meta, expected_meta)


def test_groups_of_more_zeros_survive_the_layout() -> None:
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[:, 1::8] = 2.0
    weight[3] = 0
    packed, meta = semi_structured.cutlass_layout(*compress24(weight))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("sparse24_int4", HOPPER, 4096, 4096, 128, torch.bfloat16), "triton"),
        (("sparse24_int4", AMPERE, 33, 100, -1, torch.float16), "triton"),
        (("sparse24_int4", HOPPER, 64, 80, 40, torch.bfloat16), "unpack"),
        (("sparse24_int4", TURING, 4096, 4096, 128, torch.float16), "unpack"),
        (("sparse24", HOPPER, 4096, 4096, -1, torch.bfloat16), "semi_structured"),
        (("sparse24", HOPPER, 4095, 4096, -1, torch.bfloat16), "unpack"),
        (("sparse24", HOPPER, 4096, 4064, -1, torch.bfloat16), "unpack"),
        (("sparse24_fp8", HOPPER, 4096, 4096, 128, torch.bfloat16), "unpack"),
        (("int4", HOPPER, 4096, 4096, 128, torch.bfloat16), "unpack"),
    ],
)
def test_the_path_follows_capability_and_shape(
    arguments: tuple[str, tuple[int, int], int, int, int, torch.dtype], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: True)
    assert choose(*arguments) == path


def test_without_triton_weights_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: False)
    assert choose("sparse24_int4", HOPPER, 4096, 4096, 128, torch.bfloat16) == "unpack"


def test_bytes_of_the_triton_kernel_are_those_stored() -> None:
    """The kernel reads the stored tensors once: 3.125 bits a weight at group 128, 5.12 times fewer than bf16."""
    bits = make_format(Scheme("sparse24_int4", 128)).bits_per_weight(4096, 4096)
    assert bits == 3.125
    assert 16 / bits == pytest.approx(5.12)


def test_the_gpu_benchmark_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["kernels", "--device", "cuda"]) == 1
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "group"), [("sparse24_int4", 128), ("sparse24_int4", -1), ("sparse24", -1)])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_products_on_a_gpu(name: str, group: int, tokens: int) -> None:
    scheme = Scheme(name, group)
    fmt = make_format(scheme)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    stored = fmt.pack(rtn(weight * n_m_mask(weight.abs()), None, scheme))
    stored = {part: tensor.cuda() for part, tensor in stored.items()}
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    expected = x.double() @ fmt.unpack(stored).double().T
    found = fmt.linear(x, fmt.prepare(stored))
    assert (found.double() - expected).norm() < 0.01 * expected.norm()
