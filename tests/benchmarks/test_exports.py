"""The exports' benchmark with a consumer made for the test."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import exports
from compressor.pipeline import compress
from compressor.recipe import parse_recipe

CONSUMER = """
import json, sys
windows = json.load(open(sys.argv[2]))
wrong = "dense" in sys.argv[1]
said = [[token + (wrong and place == 0) for place, token in enumerate(window[:-1])] for window in windows]
json.dump(said, open(sys.argv[3], "w"))
"""


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packed folder; every consumer is the script above, which differs at the first place of a window."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("vllm", "onnxruntime"):
        (scripts / f"{name}_tokens.py").write_text(CONSUMER)
    monkeypatch.setattr(exports, "_SCRIPTS", scripts)
    monkeypatch.setattr(exports, "_windows", lambda *_: ([list(range(11)), list(range(11))], "text"))
    compress(
        str(tiny_llama), parse_recipe({"quantization": {"group_size": 32}}), tmp_path / "out", report=lambda *_: None
    )
    return tmp_path


def test_agreement_is_counted_and_kept(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench / "exports.json"
    command = [str(bench / "out"), "--work", str(bench / "work"), "--json", str(file), "--vllm", sys.executable]
    (bench / "work").mkdir()
    assert exports.main(command) == 0
    record = json.loads(file.read_text())
    found = {(row["consumer"], row["export"]): (row["agreement"], row["positions"]) for row in record["rows"]}
    assert found == {
        ("vllm", "compressed-tensors"): (0.9, 20),
        ("vllm", "gptq"): (0.9, 20),
        ("vllm, 8-bit activations", "compressed-tensors"): (0.9, 20),
    }
    assert record["headline"] == {"exports_same_tokens": 0}
    assert str(bench) not in file.read_text()
    for row in record["rows"]:
        row["agreement"] = 0.995
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert exports.main([*command, "--onnxruntime", sys.executable]) == 0
    assert capsys.readouterr().out.startswith("int4, onnx in onnxruntime: 90.00% of 20 tokens")
    assert json.loads(file.read_text())["headline"] == {"exports_same_tokens": 3}


def test_a_consumer_that_fails_costs_its_row_only(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bench / "work").mkdir()
    (bench / "scripts" / "onnxruntime_tokens.py").write_text("raise SystemExit('no such operator')")
    command = [str(bench / "out"), "--work", str(bench / "work"), "--onnxruntime", sys.executable]
    assert exports.main(command) == 0
    assert "no such operator" in capsys.readouterr().err
