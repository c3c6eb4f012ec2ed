"""The benchmark's own parts: weights that the kernels accept, the peer's model, and the headline's arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import kernels as benchmark
from benchmarks.geometries import Geometry
from benchmarks.llama_cpp import LLAMA, write_gguf
from compressor.kernels import blob
from compressor.kernels.linear import linear


@pytest.mark.parametrize("name", benchmark.FORMATS)
def test_random_weights_are_whole_and_finite(name: str) -> None:
    weight = benchmark.random_weight(name, 40, 256, 64)
    assert weight.shape[0] == 40
    assert torch.isfinite(linear(torch.randn(3, 256), {blob.NAME: weight})).all()


def test_the_peers_model_has_the_shapes_and_bytes(tmp_path: Path) -> None:
    import gguf

    small = Geometry("small", 2, 32, 4, 4, 256, ((192, 64), (64, 64), (256, 64), (64, 128)))
    layer_bytes = write_gguf(tmp_path / "peer.gguf", small, 2)
    assert layer_bytes == small.weights * 18 // 32
    reader = gguf.GGUFReader(tmp_path / "peer.gguf")
    quantised = [t for t in reader.tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_0]
    assert sum(int(t.n_bytes) for t in quantised) == 2 * layer_bytes
    assert sorted(t.shape.tolist() for t in quantised if "ffn" in t.name) == sorted(
        [[64, 128], [64, 128], [128, 64]] * 2
    )


def test_the_headline_takes_the_issues_rows() -> None:
    def row(arm: str, batch: int, seconds: float, model: str = "Llama-2-7B") -> dict[str, object]:
        return {
            "model": model,
            "arm": arm,
            "batch": batch,
            "layer_seconds": seconds,
            "bandwidth_share": 0.9,
            "vs_torch_bf16": 8 / seconds,
            "weights_per_s": 1e11,
            "bytes_per_s": 2e10,
        }

    rows = [row("torch bf16", 1, 8), row("sparse24_int4", 1, 2), row("int4", 1, 3), row(LLAMA, 1, 3.5)]
    rows += [row("sparse24_int4", 8, 4), row("sparse24_int4", 512, 5), row("sparse24_int4", 1, 1, "SmolLM2-135M")]
    rows += [row(benchmark.LAYERS, 1, 1, "SmolLM2-135M")]
    numbers = benchmark.headline(rows, (2.5e-6, 1e-6), 4e10)
    assert numbers["vs_int4_b1"] == 1.5 and numbers["vs_llama_cpp_q4_0_b1"] == 1.75
    assert numbers["vs_torch_bf16_b1"] == 4 and numbers["min_vs_torch_bf16_any_batch"] == 1.6
    assert numbers["cached_gweights_per_s"] == 100 and numbers["cached_bandwidth_share"] == 0.5
    assert numbers["call_microseconds"] == 2.5 and numbers["torch_call_microseconds"] == 1
    assert "int8_vs_torch_bf16_b1" not in numbers
