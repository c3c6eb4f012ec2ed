"""`python -m benchmarks quality --arms quantisers`: what each quantiser costs, on a dense model and on a 2:4 one.

Every arm is a real checkpoint, made by `compress` from the same dense model or from the same SparseGPT-pruned one, and
measured by unpacking it: perplexity of held-out text in windows, by transformers in bf16, so that only the stored
weights differ. llama.cpp's files are made from the same dense model by its own `llama-quantize` and measured through
the same windows. A row that the record holds already is not measured again.

Stock GPTQ is ours without the mask: it rounds the 2:4 model as if it were dense, and fills what was pruned.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import make_record, parser, read_record, stamp, write_record
from compressor.precision import widened

_BATCH = 4
_SAMPLES = 32
_LLAMA_TYPES = ("Q4_0", "Q3_K_M", "Q2_K")
_METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"quantizer": "rtn"},
    "GPTQ": {"quantizer": "gptq"},
    "GPTQ act-order": {"quantizer": "gptq-act-order"},
    "AWQ": {"quantizer": "rtn", "transform": "awq"},
    "AWQ + GPTQ": {"quantizer": "gptq", "transform": "awq"},
}
_STOCK = "stock GPTQ"


@dataclass(frozen=True)
class Arm:
    """One row: which model is rounded (`dense` or `2:4`), how, and to what."""

    base: str
    method: str
    values: str

    @property
    def label(self) -> str:
        return f"{self.base} {self.method} {self.values}"


def arms(llama: bool) -> Iterator[Arm]:
    """All rows in the order of the table."""
    for base in ("dense", "2:4"):
        yield Arm(base, "none", "bfloat16")
        yield Arm(base, "RTN", "fp8")
        for values in ("int8", "int4"):
            for method in ("RTN", "GPTQ", "AWQ") if values == "int8" else _METHODS:
                yield Arm(base, method, values)
    yield Arm("2:4", _STOCK, "int4")
    for kind in _LLAMA_TYPES if llama else ():
        yield Arm("dense", "llama.cpp", kind)


def _turn(arm: Arm) -> int:
    """int4 and what it is compared with come first, so that a run that is cut short has the headline."""
    if arm.method in ("GPTQ act-order", "AWQ + GPTQ"):
        return 2
    return int(arm.values in ("int8", "fp8"))


def main(argv: Sequence[str]) -> int:
    """Measures what is missing, prints a table, writes the record."""
    flags = parser("quality", __doc__.splitlines()[0])
    flags.add_argument("--arms", choices=["quantisers"], required=True, help="which set of rows")
    flags.add_argument("--model", default="pypi:smollm2-135m-instruct", help="a dense model (default: %(default)s)")
    flags.add_argument("--work", type=Path, required=True, metavar="DIR", help="where models are kept between runs")
    flags.add_argument("--llama-cpp", type=Path, metavar="DIR", help="the folder that holds llama-quantize")
    flags.add_argument("--tokens", type=int, default=16_384, help="tokens of held-out text (default: %(default)s)")
    flags.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    flags.add_argument("--exports", type=Path, metavar="FILE", help="the record of `benchmarks exports`, to quote")
    flags.add_argument("--packing", type=Path, metavar="FILE", help="the record of `benchmarks packing`, to quote")
    options = flags.parse_args(list(argv))
    rows: list[dict[str, Any]] = []
    if options.json and options.json.is_file():
        rows = read_record(options.json, "quality")["rows"]
    bench = Bench(options)
    table = list(arms(options.llama_cpp is not None))
    for arm in sorted(table, key=_turn):
        if not any(row["arm"] == arm.label for row in rows):
            rows.append(bench.row(arm) | stamp())
            print(_sentence(rows[-1]), flush=True)
            order = [each.label for each in table]
            rows.sort(key=lambda row: order.index(row["arm"]) if row["arm"] in order else len(order))
            _write(options, argv, rows)
    _write(options, argv, rows)
    _print(rows)
    return 0


def _write(options: Any, argv: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    if not options.json:
        return
    settings = {"window": options.window, "tokens": options.tokens, "model": Path(options.model).name}
    quoted = _quoted(options.exports, "exports") | _quoted(options.packing, "packing")
    write_record(options.json, make_record("quality", argv, rows, _headline(rows) | quoted, settings=settings))


def _quoted(file: Path | None, name: str) -> dict[str, float]:
    return dict(read_record(file, name)["headline"]) if file is not None and file.is_file() else {}


def _headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from compressor.formats import make_format
    from compressor.scheme import Scheme

    losses = {row["arm"]: row["mean_nll"] for row in rows}
    result = {
        "bits_per_weight_sparse24_int4_g128": make_format(Scheme("sparse24_int4", 128)).bits_per_weight(4096, 4096)
    }
    pairs = {
        "gptq24_vs_rtn24_log_ppl": ("2:4 GPTQ int4", "2:4 RTN int4"),
        "gptq_vs_rtn_log_ppl": ("dense GPTQ int4", "dense RTN int4"),
        "awq24_vs_rtn24_log_ppl": ("2:4 AWQ int4", "2:4 RTN int4"),
    }
    found = {key: losses[a] - losses[b] for key, (a, b) in pairs.items() if a in losses and b in losses}
    return found | result


class Bench:
    """The models of a run and the text that measures them."""

    def __init__(self, options: Any) -> None:
        from benchmarks.texts import read_windows
        from compressor.models import fetch_model, load_tokenizer

        self.work: Path = options.work
        self.llama: Path | None = options.llama_cpp
        self.work.mkdir(parents=True, exist_ok=True)
        self.dense = fetch_model(options.model)
        tokenizer = load_tokenizer(self.dense)
        found = read_windows("heldout", tokenizer, window=options.window, max_tokens=options.tokens, wikitext=False)
        self.windows = found.tokens

    def row(self, arm: Arm) -> dict[str, Any]:
        """Makes and measures one arm."""
        start = time.monotonic()
        measured = self._llama_row(arm.values) if arm.method == "llama.cpp" else self._own_row(arm)
        shown = {"arm": arm.label, "base": arm.base, "method": arm.method, "values": arm.values}
        return shown | measured | {"seconds": round(time.monotonic() - start, 1)}

    def _own_row(self, arm: Arm) -> dict[str, Any]:
        base = self.dense if arm.base == "dense" else self._pruned()
        if arm.method == "none":
            return self._measured(base) | _stored(base) | self._mask(arm, base)
        out = self.work / "arm"
        _compress(base, out, _recipe(arm))
        result = _stored(out)
        dense = self.work / "arm-dense"
        _export(out, "dense", dense)
        shutil.rmtree(out)
        return self._measured(dense) | result | self._mask(arm, dense)

    def _pruned(self) -> Path:
        """The dense model with SparseGPT's 2:4 mask, as a plain folder; made once."""
        folder = self.work / "pruned"
        if not folder.is_dir():
            packed = self.work / "pruned-packed"
            settings = {"values": "bfloat16", "embeddings": "dense"}
            _compress(
                self.dense,
                packed,
                {"sparsity": {"criterion": "sparsegpt", "samples": _SAMPLES}, "quantization": settings},
            )
            _export(packed, "dense", folder)
        return folder

    def _mask(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """Of the 2:4 arms: the share of groups of four with at most two non-zeros, 1 where the mask is whole."""
        if arm.base == "dense":
            return {}
        from compressor.checkpoint import Checkpoint

        checkpoint, whole, groups = Checkpoint.open(folder), 0, 0
        for name in checkpoint.names():
            if "_proj.weight" in name:
                used = (checkpoint.tensor(name) != 0).unflatten(1, (-1, 4)).sum(2)
                whole, groups = whole + int((used <= 2).sum()), groups + used.numel()
        return {"groups_2_of_4": whole / groups, "mask_intact": whole == groups}

    def _measured(self, folder: Path) -> dict[str, Any]:
        from compressor.models import load_model

        losses = perplexity_losses(load_model(folder), self.windows)
        mean = float(losses.mean())
        error = float(losses.std() / len(losses) ** 0.5)
        return {"perplexity": float(torch.tensor(mean).exp()), "mean_nll": mean, "stderr_nll": error}

    def _llama_row(self, kind: str) -> dict[str, Any]:
        import gguf

        from compressor.models import fetch_model

        assert self.llama is not None
        source, file = self.work / "dense-gguf", self.work / f"{kind}.gguf"
        if not source.is_dir():
            _export(self.dense, "gguf", source)
        program = self.llama / "llama-quantize"
        subprocess.run([str(program), str(source / "model.gguf"), str(file), kind], check=True, capture_output=True)
        tensors = gguf.GGUFReader(file).tensors
        linears = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
        stored, weights = sum(int(t.n_bytes) for t in linears), sum(int(t.n_elements) for t in linears)
        converted = fetch_model(str(file))
        result = {
            **self._measured(converted),
            "bits_per_weight": 8 * stored / weights,
            "bytes": file.stat().st_size,
            "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in linears)),
        }
        shutil.rmtree(converted)
        return result


@torch.no_grad()
def perplexity_losses(model: Any, windows: Tensor) -> Tensor:
    """The mean loss of each window [N]."""
    losses = []
    device = next(model.parameters()).device
    with widened(model):
        for batch in windows.to(device).split(_BATCH):
            logits = model(input_ids=batch).logits[:, :-1].float()
            each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(each.view(len(batch), -1).mean(1))
    return torch.cat(losses).cpu()


def _recipe(arm: Arm) -> dict[str, Any]:
    """What `compress` is told. Magnitude keeps the mask of a model that is 2:4 already; stock GPTQ knows of none."""
    method = {"quantizer": "gptq"} if arm.method == _STOCK else _METHODS[arm.method]
    settings = {"values": arm.values, "samples": _SAMPLES, **method}
    sparsity = {"sparsity": {"criterion": "magnitude"}} if arm.base == "2:4" and arm.method != _STOCK else {}
    return sparsity | {"quantization": settings}


def _compress(model: Path, out: Path, record: dict[str, Any]) -> None:
    from compressor.pipeline import compress
    from compressor.recipe import parse_recipe

    compress(str(model), parse_recipe(record), out, force=True, report=lambda *_: None)


def _export(folder: Path, target: str, out: Path) -> None:
    from compressor.exports import export_checkpoint

    export_checkpoint(folder, target, out, force=True)


def _stored(folder: Path) -> dict[str, Any]:
    """Bits a weight of the blocks' linears, and bytes of all weights."""
    from compressor.inspection import inspect

    rows = inspect(folder).rows
    linears = [(row.stored_bytes, 8 * row.stored_bytes / row.bits_per_weight) for row in rows if "_proj" in row.layers]
    bits = 8 * sum(size for size, _ in linears) / sum(weights for _, weights in linears)
    return {"bits_per_weight": bits, "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def _sentence(row: Mapping[str, Any]) -> str:
    mask = "" if row.get("mask_intact", True) else f", mask broken: {row['groups_2_of_4']:.1%} of groups are still 2:4"
    return (
        f"{row['arm']}: perplexity {row['perplexity']:.2f}, {row['bits_per_weight']:.2f} bits a weight, "
        f"{row['bytes'] / 1e6:.1f} MB, {row['seconds']:.0f} s{mask}"
    )


_COLUMNS = ("arm", "perplexity", "log ppl", "bits/weight", "MB", "2:4 mask or tensors")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table; of llama.cpp's files the types that their linears really have."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.get("tensor_types", {}).items())
    mask = {None: kinds, True: "intact", False: f"broken ({1 - row.get('groups_2_of_4', 1):.1%} of groups)"}
    return (
        row["arm"], f"{row['perplexity']:,.2f}", f"{row['mean_nll']:.4f} ± {row['stderr_nll']:.4f}",
        f"{row['bits_per_weight']:.3f}", f"{row['bytes'] / 1e6:.1f}", mask[row.get("mask_intact")],
    )  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/quantisers.md."""
    lines = [_COLUMNS, ("---", "---:", "---:", "---:", "---:", "---"), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=None if Console().is_terminal else 110).print(table)
