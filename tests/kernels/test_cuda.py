"""What of the GPU paths can be proven without a GPU: layouts, choices, fallbacks. Their products need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks.__main__ import main
from compressor.formats import Format, make_format
from compressor.formats.positions import compress24
from compressor.kernels import cuda
from compressor.kernels.cuda import AMPERE, choose, semi_structured, tuning
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import Scheme

HOPPER, TURING = (9, 0), (7, 5)
PLACE = f"H100/{torch.__version__}/{torch.version.cuda}"
"""Of the settings of the device that `device` stands for."""


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
        (("sparse24", AMPERE, 4096, 4096, -1, torch.bfloat16), "semi_structured"),
        (("sparse24", AMPERE, 4095, 4096, -1, torch.bfloat16), "unpack"),
        (("sparse24", AMPERE, 4096, 4064, -1, torch.bfloat16), "unpack"),
        (("sparse24", HOPPER, 4096, 4096, -1, torch.bfloat16), "unpack"),
        (("sparse24_int8", AMPERE, 4096, 4096, -1, torch.bfloat16), "semi_structured"),
        (("sparse24_int8", AMPERE, 4096, 4096, 128, torch.bfloat16), "unpack"),
        (("sparse24_int8", AMPERE, 4096, 4160, -1, torch.bfloat16), "unpack"),
        (("sparse24_int8", HOPPER, 4096, 4096, -1, torch.bfloat16), "unpack"),
        (("sparse24_fp8", HOPPER, 4096, 4096, -1, torch.bfloat16), "unpack"),
        (("sparse24_fp8", HOPPER, 4096, 4096, 128, torch.bfloat16), "unpack"),
        (("int4", HOPPER, 4096, 4096, 128, torch.bfloat16), "unpack"),
    ],
)
def test_the_path_follows_capability_and_shape(
    arguments: tuple[str, tuple[int, int], int, int, int, torch.dtype], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without cuSPARSELt, whose place CUTLASS takes on 8.x alone."""
    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert choose(*arguments) == path


@pytest.mark.parametrize(
    ("name", "unpacked"), [("int8", True), ("fp8", True), ("sparse24_int4", False), ("sparse24_fp8", True)]
)
def test_weights_without_a_path_are_known(name: str, unpacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    _, stored = packed(name, -1)
    assert not cuda.unpacks(name, stored, (64, 256), -1), "on a CPU"
    stored["weight_packed"] = cast(Tensor, SimpleNamespace(is_cuda=True, device="cuda:0"))
    assert cuda.unpacks(name, stored, (64, 256), -1) == unpacked
    assert not cuda.unpacks(name, {"semi_packed": torch.zeros(1)}, (64, 256), -1)


def test_cusparselt_multiplies_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for name in ("sparse24", "sparse24_int8"):
        assert choose(name, HOPPER, 4096, 4096, -1, torch.bfloat16) == "semi_structured"


@pytest.mark.parametrize("name", ["sparse24", "sparse24_int8", "sparse24_fp8"])
def test_what_is_unpacked_compiles_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM compiles it. To ask torch for cuSPARSELt there would end in an error."""
    properties = SimpleNamespace(major=HOPPER[0], minor=HOPPER[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    _, stored = packed(name, -1)

    def multiply(x: Tensor) -> Tensor:
        return x if cuda.linear(name, x, stored, -1) is None else x + 1

    torch._dynamo.reset()
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(multiply, backend="eager", fullgraph=True)(x), x)


@pytest.mark.parametrize(("capability", "path"), [(AMPERE, "unpack"), ((8, 9), "semi_structured")])
def test_fp8_needs_cusparselt_and_ada(capability: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert choose("sparse24_fp8", capability, 4096, 4096, -1, torch.bfloat16) == path


def packed(name: str, group: int, rows: int = 64, columns: int = 256) -> tuple[Format, dict[str, Tensor]]:
    """A random weight in a format, as stored."""
    scheme = Scheme(name, group)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return make_format(scheme), make_format(scheme).pack(rtn(weight * n_m_mask(weight.abs()), None, scheme))


def sparse_linear(x: Tensor, values: Tensor, meta: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """What CUTLASS computes, from its own layout and transposed in memory, in torch."""
    assert x.shape[0] % 16 == 0
    assert x.dtype == values.dtype
    dense = sparse_semi_structured_to_dense_cutlass(values, meta)
    return (dense.double() @ x.double().T).to(out_dtype or x.dtype).T


def cusparselt(compressed: Tensor, x: Tensor, *, out_dtype: torch.dtype | None, alg_id: int) -> Tensor:
    """What cuSPARSELt computes, in torch; `compressed` is dense here, and one algorithm alone works."""
    if alg_id != 7:
        raise RuntimeError("algorithm not supported")
    if out_dtype is not None and x.dtype == torch.bfloat16:
        raise RuntimeError("out_dtype is for 8-bit values")
    return (compressed.double() @ x.double()).to(out_dtype or x.dtype)


@pytest.mark.parametrize("library", ["cutlass", "cusparselt"])
@pytest.mark.parametrize(("name", "error"), [("sparse24", 0.004), ("sparse24_int8", 0.02), ("sparse24_fp8", 0.06)])
def test_the_sparse_product_is_that_of_the_stored_weight(
    name: str, error: float, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the library's own product: layout, padding, rounding of activations, scales, the search."""
    if name == "sparse24_fp8" and library == "cutlass":
        pytest.skip("CUTLASS has no fp8 here")
    monkeypatch.setattr(torch, "_sparse_semi_structured_linear", sparse_linear)
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cusparselt)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library == "cusparselt")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: AMPERE)
    monkeypatch.setattr(semi_structured, "tuned", lambda key, settings, run: run(settings[7]))
    fmt, stored = packed(name, -1)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, 1] = 0
    semi_structured._cusparselt_multiplies.cache_clear()
    prepared = semi_structured.prepare(stored["weight_packed"], stored["weight_meta"], stored.get("weight_scale"))
    assert prepared is not None
    assert (semi_structured.COMPRESSED in prepared) == (library == "cusparselt")
    found = cuda.linear(name, x, prepared, -1)
    expected = x.double() @ fmt.unpack_quantized(stored).dequantized().double().T
    assert found is not None
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert found[0, 1].abs().max() == 0
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("capability", [(8, 9), HOPPER])
@pytest.mark.parametrize("name", ["sparse24", "sparse24_int8", "sparse24_fp8"])
def test_where_cusparselt_refuses_another_path_is_taken(
    name: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> Tensor:
        raise RuntimeError("not supported on this device")

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", refuse)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(semi_structured, "tuned", lambda key, settings, run: run(settings[7]))
    semi_structured._cusparselt_multiplies.cache_clear()
    _, stored = packed(name, -1)
    prepared = semi_structured.prepare(stored["weight_packed"], stored["weight_meta"], stored.get("weight_scale"))
    semi_structured._cusparselt_multiplies.cache_clear()
    if name == "sparse24_fp8" or capability == HOPPER:
        assert prepared is None, "nothing but cuSPARSELt multiplies it: it is unpacked"
    else:
        assert prepared is not None and semi_structured.PACKED in prepared


def test_the_search_is_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        chosen.append(x)
        yield
        chosen.pop()

    def tuned(key: str, settings: tuple[int, ...], run: Callable[[int], Tensor]) -> Tensor:
        assert len(chosen) == 1
        return run(settings[7])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cusparselt)
    monkeypatch.setattr(semi_structured, "tuned", tuned)
    found = semi_structured._cusparselt(torch.ones(16, 64), torch.ones(32, 64), 32, torch.float32)
    assert torch.equal(found, torch.full((16, 32), 64.0))


def test_a_token_of_nan_makes_no_other_nan() -> None:
    x = torch.tensor([[1.0, -2.0], [torch.nan, 1.0], [0.0, 0.0]])
    rounded, scale = semi_structured.eight_bits(x, torch.int8)
    assert torch.equal(rounded[0], torch.tensor([64, -127], dtype=torch.int8))
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_without_triton_weights_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: False)
    assert choose("sparse24_int4", HOPPER, 4096, 4096, 128, torch.bfloat16) == "unpack"


def test_the_triton_kernel_is_given_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other layout and no copy: 3.125 bits a weight at group 128, 5.12 times fewer than bf16."""
    given: list[object] = []

    def multiply(x: Tensor, *weight: object) -> Tensor:
        given.extend(weight)
        return x

    monkeypatch.setattr("compressor.kernels.cuda.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(cuda, "sparse24_int4", SimpleNamespace(linear=multiply), raising=False)
    _, stored = packed("sparse24_int4", 128)
    prepared = cuda.prepare("sparse24_int4", stored, (64, 256), 128)
    cuda.linear("sparse24_int4", torch.ones(3, 256, dtype=torch.bfloat16), prepared, 128)
    *tensors, group = given
    assert group == 128
    assert [id(tensor) for tensor in tensors] == [
        id(stored[name]) for name in ("weight_packed", "weight_meta", "weight_scale")
    ]
    assert 8 * sum(tensor.nbytes for tensor in stored.values()) == 3.125 * 64 * 256


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A device that torch does not have, whose settings take as many milliseconds as they say; those measured."""
    measured: list[int] = []

    def milliseconds(run: Callable[[], object]) -> float:
        measured.append(cast(int, run()))
        return measured[-1]

    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    restart()
    yield measured
    restart()


def restart() -> None:
    """What the next process knows: what lies on disk."""
    tuning._known.cache_clear()
    tuning._measured.clear()


def slow(setting: int) -> int:
    """A call that takes `setting` milliseconds, or does not run at all."""
    if setting < 0:
        raise RuntimeError("too much shared memory")
    return setting


def test_a_search_is_kept_on_disk(device: list[int], tmp_path: Path) -> None:
    assert tuning.tuned("shape", (-1, 5, 3, 4), slow) == 3
    assert device == [5, 3, 4]
    restart()
    assert tuning.tuned("shape", (-1, 5, 3, 4), slow) == 3
    assert device == [5, 3, 4]
    assert tuning.tuned("another", (2, 1), slow) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["gpu-settings.json"]


def test_a_stored_setting_that_fails_is_searched_for_anew_once(device: list[int]) -> None:
    assert tuning.tuned("shape", (5, 3), slow) == 3
    restart()
    assert tuning.tuned("shape", (5, -1), slow) == 5
    restart()
    assert tuning.tuned("shape", (5, -1), slow) == 5
    assert device == [5, 3, 5], "what was found anew is what is stored"
    assert tuning.tuned("another", (5, 3), slow) == 3
    with pytest.raises(RuntimeError, match="too much shared memory"):  # not for want of a search
        tuning.tuned("another", (5, -1), slow)
    assert device == [5, 3, 5, 5, 3]


def test_another_torch_has_settings_of_its_own(device: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.tuned("shape", (5, 3), slow) == 3
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert tuning.tuned("shape", (1, 2), slow) == 1


def test_ranks_keep_what_each_other_measured(device: list[int], tmp_path: Path) -> None:
    assert tuning.tuned("mine", (5, 3), slow) == 3
    file = tmp_path / "gpu-settings.json"
    others = f'{{"{PLACE}/theirs": 1,'
    file.write_text(file.read_text().replace("{", others))  # as another process does meanwhile
    assert tuning.tuned("mine too", (5, 3), slow) == 3
    restart()
    measured = len(device)
    assert [tuning.tuned(key, (5, 3), slow) for key in ("mine", "mine too", "theirs")] == [3, 3, 3]
    assert len(device) == measured


@pytest.mark.parametrize("text", ["{", "[]", f'{{"{PLACE}/shape": 99}}', f'{{"{PLACE}/shape": "x"}}'])
def test_a_damaged_cache_does_not_stop_anything(device: list[int], tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu-settings.json").write_text(text)
    assert tuning.tuned("shape", (5, 3), slow) == 3


def test_nothing_is_measured_inside_a_graph(device: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tuned("shape", (5, 3), slow) == 5
    assert device == []


def test_a_shape_that_nothing_serves_is_said(device: list[int]) -> None:
    with pytest.raises(RuntimeError, match="no setting of shape runs on this device"):
        tuning.tuned("shape", (-1, -2), slow)


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_search(
    device: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "file"))
    assert tuning.tuned("shape", (5, 3), slow) == 3


def test_the_gpu_benchmark_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["kernels", "--device", "cuda"]) == 1
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "group", "error"),
    [
        ("sparse24_int4", 128, 0.01), ("sparse24_int4", -1, 0.01), ("sparse24", -1, 0.01),
        ("sparse24_int8", -1, 0.02), ("sparse24_fp8", -1, 0.06), ("int4", 128, 0.01),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_products_on_a_gpu(name: str, group: int, error: float, tokens: int) -> None:
    fmt, stored = packed(name, group, 256, 512)
    stored = {part: tensor.cuda() for part, tensor in stored.items()}
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    expected = x.double() @ fmt.unpack(stored).double().T
    found = fmt.linear(x, fmt.prepare(stored))
    assert (found.double() - expected).norm() < error * expected.norm()
