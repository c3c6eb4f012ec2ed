"""`python -m benchmarks retraining`: retraining methods at equal tokens, from one dense model on one text.

Rows are arms (retraining_arms.py). Each is made by `compress` in a process of its own, which goes on where it was
killed. Of a method's settings at one budget the best on held-out *training* text counts; it alone is then looked at,
once: perplexity of held-out texts in windows, by transformers in bf16 on the unpacked weights, last-word accuracy
(last_word.py), and at the largest budget zero-shot tasks (zero_shot.py). A row that the record holds is not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import check_settings, parser, recorded_rows, stamp, update_record
from benchmarks.retraining_arms import BUDGETS, Arm, ablation_arms, arms_of, one_shot_arms
from benchmarks.zero_shot import check_tasks

_PUBLISHED, _OURS = "AST as published", "ours"
_WINDOWS = (512, 2048)
_TOKENS, _QUICK_TOKENS = 32_768, 4096
_ITEMS, _QUICK_ITEMS = 500, 50


def main(argv: Sequence[str]) -> int:
    """Makes and measures what is missing, prints a table, writes the record."""
    flags = parser("retraining", __doc__.splitlines()[0])
    flags.add_argument("--model", default="pypi:smollm2-135m-instruct", help="a dense model (default: %(default)s)")
    flags.add_argument("--work", type=Path, required=True, metavar="DIR", help="where models are kept between runs")
    flags.add_argument("--budgets", default="0.1M", help=f"comma-separated, of {', '.join(BUDGETS)} (default: 0.1M)")
    flags.add_argument("--methods", help="comma-separated methods to make rows of (default: all)")
    flags.add_argument("--ablation", action="store_true", help="the ablation's rows too")
    flags.add_argument("--wikitext", type=Path, metavar="FILE", help="WikiText-2 validation, in its tokenised form")
    flags.add_argument("--speeches", type=Path, metavar="FILE", help="a text out of domain, plain")
    flags.add_argument("--zero-shot", type=Path, metavar="DIR", help="tasks in JSONL, for dense and two arms at 1M")
    flags.add_argument("--jobs", type=int, default=1, help="arms made side by side: more than 1 on a GPU")
    flags.add_argument("--tokens", type=int, help=f"tokens of each evaluation text (default: {_TOKENS})")
    flags.add_argument("--minutes", type=float, default=math.inf, help="start no further row after so long")
    flags.add_argument("--cost", action="store_true", help="measure the cost of a step and the loop's speed too")
    options = flags.parse_args(list(argv))
    options.tokens = options.tokens or (_QUICK_TOKENS if options.quick else _TOKENS)
    if options.zero_shot:
        check_tasks(options.zero_shot)  # before the hours of making, not after
    check_settings(options.json, "retraining", _settings(options))
    rows = recorded_rows(options.json, "retraining")
    bench = Bench(options)
    bench.add_dense(rows)
    fill(rows, _wanted(options), bench, lambda: _write(options, argv, rows))
    if options.cost:
        from benchmarks.training_cost import cost_rows

        rows[:] = [row for row in rows if row.get("kind") != "cost"]
        rows += cost_rows(bench.dense, bench.windows["heldout"])
    _write(options, argv, rows)
    _print(rows)
    for key, value in headline(rows).items():
        print(f"{key:34} {value:.4f}")
    return 0


def fill(rows: list[dict[str, Any]], table: Sequence[Arm], bench: Bench, write: Callable[[], None]) -> None:
    """Makes and measures the rows that are missing, `--jobs` at a time; one that another packs comes first."""
    started, lock = time.monotonic(), threading.Lock()
    running: dict[str, Future[None]] = {}
    measured: set[str] = set()

    def late() -> bool:
        return (time.monotonic() - started) / 60 > bench.options.minutes

    def one(arm: Arm) -> None:
        if arm.base in running:
            running[arm.base].result()
        if late():
            return
        check_recipe(rows, arm)
        if not any(row["arm"] == arm.label for row in rows):
            made = bench.made(arm)
            with lock:
                rows.append(made | stamp())
                write()
                print(_sentence(made), flush=True)
        with lock:
            row = to_measure(rows, table, arm)
            if row is None or row["arm"] in measured:
                return
            measured.add(row["arm"])
        if not bench.folder(row["arm"]).is_dir():  # recorded on another machine: what is measured is this one's
            # It was chosen among rows of one machine, so their figures stay.
            again = bench.made(next(arm for arm in table if arm.label == row["arm"])) | stamp()
            row["made_again"] = {key: again[key] for key in again if row.get(key) != again[key]}
        found = bench.measured(row["arm"])
        with lock:
            row |= found
            write()
            print(_sentence(row), flush=True)

    with ThreadPoolExecutor(bench.options.jobs) as pool:
        for arm in sorted(table, key=lambda arm: arm.base is not None):  # one that waits takes no other's place
            running[arm.label] = pool.submit(one, arm)
        for future in running.values():
            future.result()
    if late():
        print("out of time: the same command goes on with the rows that are missing")


def _wanted(options: Any) -> list[Arm]:
    for budget in options.budgets.split(","):
        if budget not in BUDGETS:
            raise ValueError(f"budget {budget!r} given; accepted are {', '.join(BUDGETS)}")
    arms = [*one_shot_arms(), *(arm for budget in options.budgets.split(",") for arm in arms_of(budget))]
    arms += ablation_arms() if options.ablation else []
    if options.methods:
        names = options.methods.split(",")
        known = {arm.method for arm in arms}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"no method {unknown[0]!r}; accepted: {', '.join(sorted(known))}")
        arms = [arm for arm in arms if arm.method in names]
    return arms


def _settings(options: Any) -> dict[str, Any]:
    return {"tokens": options.tokens, "model": Path(options.model).name, "budgets": BUDGETS}


def _write(options: Any, argv: Sequence[str], rows: list[dict[str, Any]]) -> None:
    if options.json:
        update_record(options.json, "retraining", argv, rows, headline, _settings(options))


class Bench:
    """The dense model, the texts, and how an arm is made and measured."""

    def __init__(self, options: Any) -> None:
        from benchmarks.last_word import last_word_items
        from benchmarks.texts import read_windows
        from compressor.models import fetch_model, load_tokenizer

        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.dense = fetch_model(options.model)
        tokenizer = load_tokenizer(self.dense)
        sources = {"heldout": ("heldout", False)}
        if options.wikitext:
            sources["wikitext"] = (str(options.wikitext), True)
        if options.speeches:
            sources["speeches"] = (str(options.speeches), False)
        self.windows = {}
        for name, (source, detokenise) in sources.items():
            for window in _WINDOWS if name != "speeches" else _WINDOWS[:1]:
                found = read_windows(source, tokenizer, window=window, max_tokens=options.tokens, wikitext=detokenise)
                self.windows[name if window == _WINDOWS[0] else f"{name} @ {window}"] = found.tokens
        items = last_word_items(tokenizer, _QUICK_ITEMS if options.quick else _ITEMS)
        torch.save({"windows": self.windows, "items": [(item.context, item.word) for item in items]}, self._texts)

    def add_dense(self, rows: list[dict[str, Any]]) -> None:
        """What the arms are measured against."""
        if not any(row["arm"] == "dense" for row in rows):
            rows.insert(0, {"arm": "dense", "method": "dense", "tokens": 0} | self._measure("dense", self.dense))

    def made(self, arm: Arm) -> dict[str, Any]:
        """Makes one arm; its row, not measured yet."""
        name = _file_name(arm.label)
        out = self.work / name
        result = self.work / f"{name}.json"
        if not out.is_dir():
            recipe = dict(arm.recipe)
            if "retraining" in recipe:
                recipe["retraining"] = {**recipe["retraining"], "budget": f"{arm.tokens}tok"}
            job = {"model": str(self._base(arm)), "recipe": recipe, "out": str(out), "result": str(result)}
            self._child(arm.label, job)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        figures = {"recipe": digest(arm), **json.loads(result.read_text())}
        if figures["recipe"] != digest(arm):
            raise ValueError(
                f"{out} was made by another recipe than {arm.label} is now; delete it, or give another --work"
            )
        result.write_text(json.dumps(figures))
        return {"arm": arm.label, "method": arm.method, "tokens": arm.tokens, "bytes": size, **figures}

    def measured(self, label: str) -> dict[str, Any]:
        """What the held-out texts say of an arm that is made."""
        return self._measure(label, self.folder(label))

    def folder(self, label: str) -> Path:
        """Where an arm's model is, once it is made."""
        return self.work / _file_name(label)

    def _base(self, arm: Arm) -> Path:
        """What the arm compresses: the dense model, or another arm's, its zeros in place."""
        from compressor.exports import export_checkpoint

        if arm.base is None:
            return self.dense
        base = self.work / _file_name(arm.base)
        if not base.is_dir():
            raise ValueError(f"{arm.label} packs the model of {arm.base!r}: make that one first, in {self.work}")
        unpacked = self.work / f"{base.name}-unpacked"
        export_checkpoint(base, "dense", unpacked, force=True, allow_lossy=True)
        return unpacked

    @property
    def _texts(self) -> Path:
        return self.work / "texts.pt"

    def _measure(self, label: str, folder: Path) -> dict[str, Any]:
        """In a process of its own, so that several can be measured at once."""
        result = self.work / f"{_file_name(label)}-measured.json"
        tasks = self.options.zero_shot
        asked = tasks is not None and (label in ("dense", "ours @ 1M") or _is_published(label, "1M"))
        job = {"texts": str(self._texts), "folder": str(folder), "result": str(result)}
        self._child(label, job | ({"zero_shot": str(tasks)} if asked else {}))
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _child(self, label: str, job: Mapping[str, Any]) -> None:
        log = self.work / f"{_file_name(label)}.log"
        command = [sys.executable, "-m", "benchmarks.retraining", json.dumps(job)]
        with log.open("a") as file:
            if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
                raise ValueError(f"{label} could not be made or measured: {log.read_text().strip().splitlines()[-1]}")


def digest(arm: Arm) -> str:
    """Of the recipe that an arm is."""
    return hashlib.sha256(json.dumps(arm.recipe, sort_keys=True).encode()).hexdigest()[:12]


def check_recipe(rows: Sequence[Mapping[str, Any]], arm: Arm) -> None:
    """Raises ValueError where an arm's row was made by another recipe; a row that does not say is taken as it is."""
    row = next((row for row in rows if row["arm"] == arm.label), {})
    if row.get("recipe", digest(arm)) != digest(arm):
        raise ValueError(f"the row {arm.label!r} was made by another recipe than it is now: give it another name there")


def _is_published(label: str, budget: str) -> bool:
    return label.startswith(_PUBLISHED) and label.endswith(f"@ {budget}")


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label)


def to_measure(rows: Sequence[dict[str, Any]], table: Sequence[Arm], arm: Arm) -> dict[str, Any] | None:
    """The best row of the arm's method and budget, once all its settings are made and where it is not measured yet."""
    made = {row["arm"] for row in rows}
    if any(other.label not in made for other in table if (other.method, other.tokens) == (arm.method, arm.tokens)):
        return None
    found = best(rows, arm.method, arm.tokens)
    return found if found is not None and "last_word_accuracy" not in found else None


def best(rows: Sequence[dict[str, Any]], method: str, tokens: int) -> dict[str, Any] | None:
    """Of a method's rows at one budget, the one with the lowest loss on held-out training text.

    It counts from the dense model's, which machines take differently (3.66 on one, 3.65 on another).
    """
    found = [row for row in rows if row.get("method") == method and row.get("tokens") == tokens]

    def lost(row: Mapping[str, Any]) -> float:
        return (row.get("validation_loss_retrained") or math.inf) - (row.get("validation_loss_dense") or 0)

    return min(found, key=lost, default=None)


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Remaining gaps to dense in log-perplexity, ours over the published recipe's; the ablation's losses; cost."""
    result: dict[str, float] = {}
    dense = best(rows, "dense", 0)
    texts, increases = ("heldout", "wikitext"), []
    for budget, tokens in BUDGETS.items():
        ours, theirs = best(rows, _OURS, tokens), best(rows, _PUBLISHED, tokens)
        packed = best(rows, "ours int4", tokens)
        if dense is None or ours is None or not _are_measured(ours):
            continue
        if packed is not None and _are_measured(packed):
            increases += [math.exp(packed[f"log_ppl {text}"] - ours[f"log_ppl {text}"]) - 1 for text in texts if
                          f"log_ppl {text}" in dense]  # fmt: skip
        if theirs is None or not _are_measured(theirs):
            continue
        ratios = [
            (ours[f"log_ppl {text}"] - dense[f"log_ppl {text}"])
            / (theirs[f"log_ppl {text}"] - dense[f"log_ppl {text}"])
            for text in texts
            if f"log_ppl {text}" in dense
        ]
        result[f"log_ppl_gap_vs_paper_{budget}"] = max(ratios)
    if increases:
        result["int4_ppl_increase"] = max(increases)  # of all budgets and texts
    full = next((row for row in rows if row["arm"] == "ablation: full"), None)
    for key in ("no distillation", "fixed mask", "constant decay"):
        row = next((row for row in rows if row["arm"] == f"ablation: {key}"), None)
        if full is not None and row is not None and _are_measured(full, row):
            result[f"ablation_{key.replace(' ', '_')}"] = row["log_ppl heldout"] - full["log_ppl heldout"]
    for row in rows:
        if row.get("kind") == "cost":
            result |= row["figures"]
    return result


def _are_measured(*rows: Mapping[str, Any]) -> bool:
    return all("log_ppl heldout" in row for row in rows)


def _sentence(row: Mapping[str, Any]) -> str:
    if not _are_measured(row):
        return f"{row['arm']}: validation loss {row.get('validation_loss_retrained')}"
    texts = ", ".join(f"{key[4:]} {value:.2f}" for key, value in row.items() if key.startswith("ppl "))
    trained = row.get("validation_loss_retrained")
    return f"{row['arm']}: perplexity {texts}; validation loss {trained}; last words {row['last_word_accuracy']:.3f}"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [row for row in rows if row.get("kind") != "cost"]
    names = [key[4:] for key in shown[0] if key.startswith("ppl ")]
    table = Table("arm", "training loss", *(f"ppl {name}" for name in names), "last words", "min")
    for row in shown:
        loss = row.get("validation_loss_retrained") or row.get("validation_loss_one_shot")
        minutes = row.get("retraining_seconds")
        table.add_row(
            row["arm"], f"{loss:.3f}" if loss else "", *_measured_cells(row, names),
            f"{minutes / 60:.0f}" if minutes else "",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(table)


def _measured_cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if not _are_measured(row):
        return [""] * (len(names) + 1)
    words = f"{row['last_word_accuracy']:.3f} ± {row['last_word_stderr']:.3f}"
    # A text that one run was not given is missing in its rows.
    return [*(f"{row[f'ppl {name}']:,.2f}" if f"ppl {name}" in row else "" for name in names), words]


def make(job: Mapping[str, Any]) -> None:
    """The process that makes one arm: `compress`, then its figures beside the folder."""
    from compressor.pipeline import compress
    from compressor.progress import reporter
    from compressor.recipe import parse_recipe

    with reporter() as report:
        result = compress(job["model"], parse_recipe(job["recipe"]), job["out"], report=report)
    Path(job["result"]).write_text(json.dumps(result.figures))


def measure(job: Mapping[str, Any]) -> None:
    """The process that measures one model."""
    from benchmarks.last_word import Item, accuracy
    from benchmarks.quantisers import perplexity_losses
    from benchmarks.zero_shot import zero_shot_accuracies
    from compressor.models import load_tokenizer
    from compressor.retraining.loop import training_device

    model, texts = _unpacked(Path(job["folder"])).to(training_device()), torch.load(job["texts"])
    result: dict[str, Any] = {}
    for name, windows in texts["windows"].items():
        losses = perplexity_losses(model, windows)
        mean = float(losses.mean())
        result[f"log_ppl {name}"] = mean
        result[f"ppl {name}"] = math.exp(mean)
        result[f"stderr {name}"] = float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else None
    result |= accuracy(model, [Item(*item) for item in texts["items"]])
    if "zero_shot" in job:
        result |= zero_shot_accuracies(model, load_tokenizer(Path(job["folder"])), Path(job["zero_shot"]))
    Path(job["result"]).write_text(json.dumps(result))


def _unpacked(folder: Path) -> Any:
    """The model in bf16, whether packed or not; a low-rank branch is folded into its weight."""
    from compressor.exports import export_checkpoint
    from compressor.models import load_model

    if "quantization_config" not in json.loads((folder / "config.json").read_text()):
        return load_model(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        dense = Path(scratch) / "dense"
        export_checkpoint(folder, "dense", dense, allow_lossy=True)
        return load_model(dense)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    (measure if "texts" in given else make)(given)
