"""The exports' benchmark with a consumer made for the test."""

import json
import shutil
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
    recipe = parse_recipe({"quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, tmp_path / "out", report=lambda *_: None)
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


def test_the_headline_wants_every_model_to_agree(tiny_llama: Path, tmp_path: Path) -> None:
    said = {"consumer": "vllm", "export": "gptq"}, {"consumer": "vllm", "export": "compressed-tensors"}
    rows = [{**said[0], "agreement": 0.995}, {**said[0], "agreement": 0.99}, {**said[0], "refused": "fp16"}]
    rows += [{**said[1], "agreement": 1.0}, {**said[1], "agreement": 0.9}]
    rows += [{"consumer": "llama.cpp", "export": "gguf", "refused": "no such block"}]
    file = tmp_path / "exports.json"
    file.write_text(json.dumps({"name": "exports", "rows": rows}))
    assert exports.main([str(tiny_llama), "--work", str(tmp_path), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["headline"] == {"exports_same_tokens": 1}


def test_another_checkpoint_in_the_same_place_is_measured(bench: Path, tiny_llama: Path) -> None:
    file, work = bench / "exports.json", bench / "work"
    work.mkdir()
    command = [str(bench / "out"), "--work", str(work), "--json", str(file), "--onnxruntime", sys.executable]
    assert exports.main(command) == 0
    # Of the same label, of the same storage and in a folder of the same name.
    recipe = parse_recipe({"name": "again", "quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, bench / "out", force=True, report=lambda *_: None)
    for _ in range(2):
        assert exports.main(command) == 0
        rows = json.loads(file.read_text())["rows"]
        assert [row["model"] for row in rows] == ["int4", "int4"]
        assert len({row["checkpoint"] for row in rows}) == 2
        assert all(len(list(work.glob(f"{bench.name}-out-onnx-{row['checkpoint']}"))) == 1 for row in rows)
        assert len(list(work.glob("*onnx*.onnxruntime.json"))) == 4
    del rows[0]["checkpoint"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": rows[:1]}))
    assert exports.main(command) == 0
    assert json.loads(file.read_text())["rows"] == rows[:1]


def test_a_folder_without_a_manifest_is_told_by_config_and_sizes(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "manifest.json").unlink(missing_ok=True)
    seen = [exports.checkpoint_hash(folder)]
    assert exports.checkpoint_hash(folder) == seen[0]
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "46"))
    seen.append(exports.checkpoint_hash(folder))
    with next(folder.glob("*.safetensors")).open("ab") as file:
        file.write(b"0")
    assert len({*seen, exports.checkpoint_hash(folder)}) == 3


LLAMA = """#!/bin/sh
while [ "$1" != --kl-divergence-base ]; do shift; done
if [ "$3" = --kl-divergence ]; then
    [ "$(cat "$2")" = whole ] && echo "   1  12.5" && echo "Same top p: 99.500 %"
else
    printf whole > "$2"
    if [ -e "$0.stop" ]; then printf half > "$2"; exit 1; fi
fi
"""


def test_a_half_of_the_dense_logits_is_not_taken(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, program = bench / "exports.json", bench / "bin" / "llama-perplexity"
    for folder in ("work", "bin"):
        (bench / folder).mkdir()
    program.write_text(LLAMA)
    program.chmod(0o755)
    stop = program.with_name("llama-perplexity.stop")
    stop.touch()
    command = [str(bench / "out"), "--work", str(bench / "work"), "--json", str(file)]
    command += ["--llama-cpp", str(program.parent)]
    assert exports.main(command) == 0
    assert "llama-perplexity failed" in capsys.readouterr().err
    stop.unlink()
    assert exports.main(command) == 0
    assert [row["agreement"] for row in json.loads(file.read_text())["rows"]] == [0.995]
