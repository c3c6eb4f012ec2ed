"""`python -m benchmarks exports OUT ...`: each export in its real consumer against the dense export in the same one.

The consumer reads held-out text, token by token given (teacher-forced), and says after every token what it thinks comes
next. The share of places where both exports say the same is the agreement; 99 % counts as the same tokens. Consumers
live in environments of their own and are named by their Python, llama.cpp by the folder of its programs; those not
named are left out. A row that the record holds already, of the same checkpoint, is not measured again.

llama.cpp compares by itself (`llama-perplexity --kl-divergence`): it scores the second half of every window.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import describe_all
from benchmarks.record import make_record, parser, read_record, write_record

CONSUMERS = {
    "vllm": ("compressed-tensors", "gptq"),
    "vllm, 8-bit activations": ("compressed-tensors",),
    "onnxruntime": ("onnx",),
    "optimum": ("onnx",),
    "llama.cpp": ("gguf",),
}
"""{consumer: the exports that it takes}."""
DENSE = {
    "vllm": "dense",
    "vllm, 8-bit activations": "dense",
    "onnxruntime": "onnx",
    "optimum": "onnx",
    "llama.cpp": "gguf",
}
"""{consumer: the layout in which it takes a dense model}."""
SETTINGS = {"vllm": {"VLLM_CPU_INT4_W4A8": "0"}}
"""Environment of a consumer. vLLM on a processor with AMX rounds the activations of W4A16 models to 8 bits unless it is
told not to; both are measured."""
SAME = 0.99
_SCRIPTS = Path(__file__).parent / "consumers"
_WINDOW, _WINDOWS = 512, 8


def main(argv: Sequence[str]) -> int:
    """Exports, asks every consumer, prints a table, writes the record."""
    flags = parser("exports", __doc__.splitlines()[0])
    flags.add_argument("models", nargs="+", metavar="OUT", help="checkpoints to export")
    for consumer in ("vllm", "onnxruntime", "optimum"):
        flags.add_argument(f"--{consumer}", metavar="PYTHON", help=f"the Python that has {consumer}")
    flags.add_argument("--llama-cpp", metavar="DIR", help="the folder that holds llama-perplexity")
    flags.add_argument("--work", type=Path, required=True, metavar="DIR", help="where exports are kept between runs")
    options = flags.parse_args(list(argv))
    rows = read_record(options.json, "exports")["rows"] if options.json and options.json.is_file() else []
    for model in describe_all(options.models):
        checkpoint = checkpoint_hash(model.folder)
        for consumer, targets in CONSUMERS.items():
            program = getattr(options, consumer.partition(",")[0].replace(".", "_"))
            for target in targets if program else ():
                wanted = {"model": model.label, "storage": model.storage, "consumer": consumer, "export": target}
                if any(
                    wanted.items() <= row.items() and row.get("checkpoint", checkpoint) == checkpoint for row in rows
                ):
                    continue
                wanted["checkpoint"] = checkpoint
                try:
                    rows.append(wanted | measure(model.folder, consumer, target, str(program), options.work))
                except OSError as error:  # a consumer that does not take this kind must not cost the other rows
                    print(f"{model.label}, {target} in {consumer}: {error}", file=sys.stderr, flush=True)
                    continue
                print(_sentence(rows[-1]), flush=True)
                _write(options.json, argv, rows)
    _write(options.json, argv, rows)
    return 0


def _write(file: Path | None, argv: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    if file:
        write_record(file, make_record("exports", argv, rows, summarise(rows)))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The headline: how many of the consumers' layouts said the same tokens for every model measured in them."""
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        if "agreement" in row:
            pair = row["consumer"], row["export"]
            worst[pair] = min(row["agreement"], worst.get(pair, 1.0))
    return {"exports_same_tokens": sum(agreement >= SAME for agreement in worst.values())}


def _sentence(row: Mapping[str, Any]) -> str:
    if "agreement" not in row:
        return f"{row['model']}, {row['export']} in {row['consumer']}: refused: {row['refused']}"
    return (
        f"{row['model']}, {row['export']} in {row['consumer']}: {row['agreement']:.2%} of {row['positions']} tokens as "
        f"the dense export, {row['bytes'] / 1e6:.1f} MB, {row['seconds']:.0f} s"
    )


def measure(folder: Path, consumer: str, target: str, program: str, work: Path) -> dict[str, Any]:
    """One row: the export's size and its agreement with the dense export."""
    start = time.monotonic()
    try:
        mine = _exported(folder, target, work)
    except ValueError as error:
        return {"refused": str(error).replace(str(folder), folder.name)}
    dense = _exported(folder, "dense", work)
    if DENSE[consumer] != "dense":
        dense = _exported(dense, DENSE[consumer], work)
    if consumer == "llama.cpp":
        agreement, positions = _llama_agreement(mine, dense, Path(program), work)
    else:
        first, second = (_predictions(consumer, program, model, work) for model in (mine, dense))
        pairs = [(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)]
        agreement, positions = sum(a == b for a, b in pairs) / len(pairs), len(pairs)
    size = sum(file.stat().st_size for file in mine.iterdir())
    return {
        "agreement": agreement,
        "positions": positions,
        "bytes": size,
        "seconds": round(time.monotonic() - start, 1),
    }


def checkpoint_hash(folder: Path) -> str:
    """Tells checkpoints apart: of the manifest, which holds every file's hash; else of the config and files' sizes."""
    from compressor.checkpoint import MANIFEST

    manifest = folder / MANIFEST
    if manifest.is_file():
        told = manifest.read_bytes()
    else:
        sizes = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
        told = (folder / "config.json").read_bytes() + json.dumps(sizes).encode()
    return hashlib.sha256(told).hexdigest()[:12]


def _exported(folder: Path, target: str, work: Path) -> Path:
    """The export of a folder, made once for each checkpoint that lies there."""
    from compressor.exports import export_checkpoint

    out = work / f"{folder.parent.name}-{folder.name}-{target}-{checkpoint_hash(folder)}"
    if not (out / "config.json").is_file():
        export_checkpoint(folder, target, out)
    return out


def _windows(model: Path, work: Path) -> tuple[list[list[int]], str]:
    """Token windows of the held-out text, and the text itself."""
    from benchmarks.texts import read_windows
    from compressor.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = read_windows("heldout", tokenizer, window=_WINDOW, max_tokens=_WINDOW * (_WINDOWS + 3), wikitext=False)
    ids = found.tokens
    return ids[:_WINDOWS].tolist(), tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True)


def _predictions(consumer: str, python: str, model: Path, work: Path) -> list[list[int]]:
    """The most likely next tokens by a consumer; kept, for the dense export is asked for more than once."""
    script = _SCRIPTS / f"{consumer.partition(',')[0]}_tokens.py"
    out = work / f"{model.name}.{consumer}.json"
    if not out.is_file():
        windows = work / "windows.json"
        windows.write_text(json.dumps(_windows(model, work)[0]))
        part = out.with_name(f".{out.name}.part")
        command = [python, str(script), str(model), str(windows), str(part)]
        settings = os.environ | SETTINGS.get(consumer, {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
        if done.returncode:
            raise OSError(f"{script.name} failed on {model.name}: {(done.stderr or done.stdout)[-2000:]}")
        part.replace(out)
    found: list[list[int]] = json.loads(out.read_text())
    return found


def _llama_agreement(model: Path, dense: Path, programs: Path, work: Path) -> tuple[float, int]:
    """llama.cpp's own comparison of two files."""
    text, base = work / "text.txt", work / f"{dense.name}.logits"
    text.write_text(_windows(model, work)[1])
    # Without --no-repack, llama.cpp crashes on its own Q4_0 files too where the processor has AMX (build of 2026-11).
    shared = ["-f", str(text), "-c", str(_WINDOW), "-t", "2", "--no-repack", "--kl-divergence-base"]
    if not base.is_file():
        part = base.with_name(f".{base.name}.part")
        _llama(programs, "-m", str(dense / "model.gguf"), *shared, str(part))
        part.replace(base)
    said = _llama(programs, "-m", str(model / "model.gguf"), *shared, str(base), "--kl-divergence")
    share = re.search(r"Same top p:\s*([\d.]+)", said)
    chunks = re.findall(r"^\s*(\d+)\s+[-\d.]+", said, flags=re.MULTILINE)
    if share is None:
        raise OSError(f"llama-perplexity said nothing about the same top token: {said[-1000:]}")
    return float(share[1]) / 100, int(chunks[-1]) * (_WINDOW - 1 - _WINDOW // 2) if chunks else 0


def _llama(programs: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(programs / "llama-perplexity"), *arguments], capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode:
        raise OSError(f"llama-perplexity failed: {done.stderr[-1500:]}")
    return done.stdout + done.stderr
