"""A small comparison that no process measured, and a compressed tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import headline, make_rows
from benchmarks.measure import QualitySettings, SpeedSettings, summary
from benchmarks.models import ModelFolder
from compressor.pipeline import compress
from compressor.recipe import load_recipe


@pytest.fixture(scope="session")
def tiny_compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    recipe = load_recipe("one-shot-2of4-int4", ["sparsity.criterion=magnitude"])
    compress(str(tiny_llama), recipe, out, report=lambda *_: None)
    return out


def _speed(weight: float, decode: float, first: float) -> list[dict[str, Any]]:
    return [
        {
            "weight_bytes": weight,
            "peak_rss_bytes": weight + 3e8,
            "rss_loaded_bytes": weight + 2e8,
            "prefill_tokens_per_s": 500.0,
            "decode_tokens_per_s": decode + jitter,
            "ttft_seconds": first,
        }
        for jitter in (0.0, 2.0, -4.0)
    ]


def _loss(nll: list[float]) -> dict[str, Any]:
    return summary(nll) | {"tokens": 2044, "text": "held-out C4", "window_nll": nll}


@pytest.fixture
def record() -> dict[str, Any]:
    """Dense against one-shot and retrained; the last decodes faster, answers later, and has a higher perplexity."""
    source = "<model>.gguf, dequantised to bf16"
    dense = ModelFolder("hub/tiny", Path("a"), "dense bf16", False, "dense bf16", source, None, 270_000_000)
    recipe = {"name": "ast", "sparsity": {"criterion": "wanda"}, "retraining": {"budget": "5m"}}
    one = ModelFolder("demo/one", Path("b"), "one-shot", True, "linears sparse24_int4", "", None, 75_000_000)
    last = ModelFolder("demo/out", Path("c"), "retrained", True, "linears sparse24_int4", "", recipe, 75_000_000)
    models = [dense, one, last]
    speeds = {"dense bf16": _speed(2.7e8, 40.0, 0.3), "one-shot": _speed(9e7, 80.0, 0.3)}
    speeds["retrained"] = _speed(9e7, 80.0, 0.6)
    losses = {"dense bf16": _loss([3.0, 3.2, 3.4]), "one-shot": _loss([6.0, 6.1, 6.5])}
    losses["retrained"] = _loss([3.5, 3.7, 3.9])
    speed, quality = SpeedSettings(), QualitySettings()
    rows = make_rows(models, speeds, losses, speed, quality)
    return {
        "name": "compare",
        "date": "2026-11-23T12:00:00Z",
        "command": "python -m benchmarks compare hub/tiny demo/one demo/out",
        "machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "read_bandwidth_bytes_per_s": 2e10},
        "versions": {"python": "3.11", "halfweight": "0.1.0"},
        "settings": {"speed": vars(speed), "quality": vars(quality), "rounds": 3},
        "models": [model.to_dict() | {"kernels": "CPU kernels with avx2", "threads": 2} for model in models],
        "training": [
            {"tokens": 1000.0 * i, "step": float(i), "kl": 3.0 / i, "flip_rate": 0.1 / i} for i in range(1, 9)
        ],
        "rows": rows,
        "headline": headline(models, rows, losses),
    }
