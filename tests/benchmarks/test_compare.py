from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import loss_increase, main
from benchmarks.models import describe_all
from benchmarks.table import gain_text, markdown, range_text, value_text


def rows(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in record["rows"]}


def test_gains_are_above_one_where_it_became_better(record: dict[str, Any]) -> None:
    found = {key: row["gain"]["retrained"] for key, row in rows(record).items()}
    assert found["disk_bytes"] == pytest.approx(3.6)
    assert found["weight_bytes"] == pytest.approx(3.0)
    assert found["decode_tokens_per_s"] == pytest.approx(2.0)
    assert found["prefill_tokens_per_s"] == pytest.approx(1.0)
    assert found["ttft_seconds"] == pytest.approx(0.5)
    assert found["perplexity"] == pytest.approx(math.exp(-0.5))


def test_the_table_speaks_of_worse_as_of_better(record: dict[str, Any]) -> None:
    table = rows(record)
    assert gain_text(table["disk_bytes"], "retrained") == "3.60x smaller"
    assert gain_text(table["decode_tokens_per_s"], "retrained") == "2.00x faster"
    assert gain_text(table["prefill_tokens_per_s"], "retrained") == "about the same"
    assert gain_text(table["ttft_seconds"], "retrained") == "2.00x later"
    assert gain_text(table["perplexity"], "one-shot") == "20x higher"
    assert value_text(table["ttft_seconds"], "dense bf16") == "300 ms"
    assert value_text(table["decode_tokens_per_s"], "dense bf16") == "40.0 tokens/s"
    assert range_text(table["decode_tokens_per_s"], "dense bf16") == "36.0 to 42.0"
    assert value_text(table["perplexity"], "dense bf16") == "24.5 ± 2.8"


def test_markdown_names_the_dequantised_source(record: dict[str, Any]) -> None:
    text = markdown(record)
    assert "dense bf16: <model>.gguf, dequantised to bf16" in text
    assert "| **decode**<br>128 tokens, batch 1, greedy | 40.0 tokens/s | 80.0 tokens/s<br>2.00x faster |" in text


def test_headline_is_about_the_last_model(record: dict[str, Any]) -> None:
    found = record["headline"]
    assert found["decode_tokens_per_s_gain"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(math.exp(3.7))
    assert found["perplexity_one_shot"] == pytest.approx(math.exp(6.2))
    assert found["loss_increase"] == pytest.approx(0.5)
    assert found["loss_increase_stderr"] == pytest.approx(0.0, abs=1e-12)
    assert all(isinstance(value, int | float) for value in found.values())


def test_loss_increase_is_paired_by_window() -> None:
    mean, error = loss_increase({"window_nll": [1.0, 5.0, 3.0]}, {"window_nll": [1.3, 5.1, 3.2]})
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert loss_increase({"window_nll": [1.0]}, {"window_nll": [2.0]}) == (1.0, None)


def test_labels_of_like_models_differ(tiny_llama: Path, tiny_compressed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_compressed, other)
    dense, first, second = describe_all([str(tiny_llama), str(tiny_compressed), str(other)])
    assert (dense.label, dense.compressed) == ("dense bf16", False)
    assert [first.label, second.label] == ["one-shot 2:4 int4 (out)", "one-shot 2:4 int4 (other)"]
    assert "sparse24_int4" in second.storage
    assert second.disk_bytes == sum(file.stat().st_size for file in other.iterdir())
    with pytest.raises(ValueError, match="the same folder"):
        describe_all([str(tiny_llama), str(other), str(other)])


def test_a_compressed_model_is_no_baseline(tiny_compressed: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="the first folder is the dense model"):
        main([str(tiny_compressed), str(tiny_llama)])


def test_compare_measures_writes_and_prints(
    tiny_llama: Path, tiny_compressed: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, page = tmp_path / "r.json", tmp_path / "r.html"
    flags = ["--quick", "--text", str(prose), "--window", "64", "--tokens", "640"]
    assert main([str(tiny_llama), str(tiny_compressed), *flags, "--json", str(written), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "dense bf16" in shown and "one-shot 2:4 int4" in shown
    record = json.loads(written.read_text())
    found = {row["key"]: row["values"] for row in record["rows"]}
    dense, packed = "dense bf16", "one-shot 2:4 int4"
    assert found["weight_bytes"][packed] < found["weight_bytes"][dense]
    assert found["perplexity"][dense] == pytest.approx(259, rel=0.5)
    assert all(value > 0 for values in found.values() for value in values.values())
    assert all("folder" not in model for model in record["models"])
    assert "prose.txt" in page.read_text()
