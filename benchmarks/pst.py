"""`python -m benchmarks pst`: PST beside what it is compared with, on tasks that any machine can have.

Sentence classification (`rotten-tomatoes`, 3.7k test sentences) on the MiniLM encoder, and with --generation writing
sentences (`story-words`) with SmolLM2-135M. A row is one method, mask shape and seed; rows that the record holds are
not made again. Intervals are paired: of the difference of right answers to the same sentences with the same seeds.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.pst_arms import DISTILLED, METHODS, PATTERNS, SCORES, WRITING, PstArm, arms, as_chosen, grid
from benchmarks.record import check_settings, parser, recorded_rows, stamp, update_record

_QUICK_EXAMPLES = 256
_WRITING_EXAMPLES, _WRITING_EPOCHS = 2000, 3.0
_KNOWN = (*METHODS, DISTILLED, *SCORES)


def main(argv: Sequence[str]) -> int:
    """Makes and measures what is missing, prints a table, writes the record."""
    flags = parser("pst", __doc__.splitlines()[0])
    flags.add_argument("--encoder", default="pypi:all-minilm-l6-v2", help="BERT-like encoder (default: %(default)s)")
    flags.add_argument("--model", default="pypi:smollm2-135m-instruct", help="language model (default: %(default)s)")
    flags.add_argument("--patterns", default=",".join(PATTERNS), help="mask shapes (default: %(default)s)")
    flags.add_argument("--methods", default=",".join(_KNOWN), help="only these (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    flags.add_argument("--examples", type=int, help="sentences to train on (default: all 8.0k)")
    flags.add_argument("--jobs", type=int, default=1, help="rows made side by side: more than 1 on a GPU")
    flags.add_argument("--test", type=int, help="sentences to test on (default: all 3.7k)")
    flags.add_argument("--epochs", type=float, default=3.0, help="passes over them (default: %(default)s)")
    flags.add_argument("--grid", action="store_true", help="each method's learning rates, on validation sentences")
    flags.add_argument("--ablation", action="store_true", help="the score without its learned terms, too")
    flags.add_argument("--correlation", action="store_true", help="the learned score against the true one")
    flags.add_argument("--cost", action="store_true", help="memory and time of a step at BERT-base's size")
    flags.add_argument("--generation", action="store_true", help="SmolLM2 writing sentences: dense, movement, PST")
    flags.add_argument("--writings", type=int, default=200, help="sentences to write (default: %(default)s)")
    flags.add_argument("--work", type=Path, metavar="DIR", help="where a writing arm that is killed goes on from")
    flags.add_argument("--minutes", type=float, default=math.inf, help="start no further row after so long")
    options = flags.parse_args(list(argv))
    if options.quick:
        options.examples, options.test, options.epochs, options.seeds = _QUICK_EXAMPLES, _QUICK_EXAMPLES, 1.0, 1
    _check(options)
    check_settings(options.json, "pst", _settings(options))
    rows = recorded_rows(options.json, "pst")
    for jobs in _wanted(options):  # the grid first: it decides on what follows
        missing = [(kind, arm) for label, kind, arm in jobs if label not in {row["arm"] for row in rows}]
        dense = as_chosen(PstArm("dense", "none", 0), rows)
        chosen = [(kind, arm if arm is None or kind == "write" else as_chosen(arm, rows)) for kind, arm in missing]
        for row in _made(options, chosen, dense):
            rows.append(row | stamp())
            print(_sentence(row), flush=True)
            _write(options, argv, rows)
    _write(options, argv, rows)
    _print(rows)
    for key, value in headline(rows).items():
        print(f"{key:34} {value:.4f}")
    return 0


_STARTED = time.monotonic()


def _write(options: Any, argv: Sequence[str], rows: list[dict[str, Any]]) -> None:
    if options.json:
        update_record(options.json, "pst", argv, rows, headline, _settings(options))


def _settings(options: Any) -> dict[str, Any]:
    models = {"encoder": Path(options.encoder).name, "model": Path(options.model).name}
    return {"examples": options.examples, "epochs": options.epochs, "test": options.test, **models}


def _check(options: Any) -> None:
    for name in options.methods.split(","):
        if name not in _KNOWN:
            raise ValueError(f"no method {name!r}; accepted: {', '.join(_KNOWN)}")


Job = tuple[str, str, "PstArm | None"]
"""Label of the row, what makes it (a name in `_row`), and its arm."""


def _wanted(options: Any) -> list[list[Job]]:
    """What is to be in the record, in rounds."""
    methods, patterns = options.methods.split(","), tuple(options.patterns.split(","))
    tried = [arm for arm in (grid() if options.grid else ()) if arm.method in methods]
    found = [arm for arm in arms(patterns, options.seeds, ablation=options.ablation) if arm.method in methods]
    jobs: list[Job] = [(arm.label, "classify", arm) for arm in found]
    if options.generation:
        for method in ("dense", "pst", "movement"):
            arm = replace(WRITING, method=method, pattern="none" if method == "dense" else "2:4")
            jobs.append((f"writing: {arm.label}", "write", arm))
    if options.correlation:
        jobs.append(("correlation", "correlation", PstArm("pst", "2:4", 0)))
    if options.cost:
        jobs += [("memory", "memory", None), ("step time", "time", None)]
    return [[(arm.tried, "validate", arm) for arm in tried], jobs]


def _made(options: Any, jobs: Sequence[tuple[str, Any]], dense: PstArm) -> Iterator[dict[str, Any]]:
    """The rows of some jobs as they are made, `--jobs` at a time."""
    if options.jobs == 1:
        for kind, arm in jobs:
            if _late(options):
                return
            yield _row(options, kind, arm, dense)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_row, options, kind, arm, dense) for kind, arm in jobs]):
            yield future.result()
            if _late(options):
                pool.shutdown(cancel_futures=True)
                return


def _late(options: Any) -> bool:
    late = (time.monotonic() - _STARTED) / 60 > options.minutes
    if late:
        print("out of time: the same command goes on with the rows that are missing")
    return late


def _row(options: Any, kind: str, arm: PstArm | None, dense: PstArm) -> dict[str, Any]:
    from benchmarks.pst_cost import memory_row, time_row

    bench = Bench(options, dense)
    makers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "validate": bench.validate, "classify": bench.classify, "write": bench.write, "correlation": bench.correlation,
        "memory": lambda _: memory_row(), "time": lambda _: time_row(),
    }  # fmt: skip
    return makers[kind](arm)


class Bench:
    """Encoder, language model and tasks, each loaded when it is needed; `dense` has the rate of dense fine-tuning."""

    def __init__(self, options: Any, dense: PstArm) -> None:
        self.options, self.dense = options, dense

    def _prepared(self, model: str, task: str, test: int | None, train: int | None = None) -> tuple[Path, Any, Any]:
        from compressor.models import fetch_model, load_tokenizer
        from compressor.tasks import load_task

        folder = fetch_model(model)
        return folder, load_tokenizer(folder), load_task(task).limited(train or self.options.examples, test, 0)

    def classify(self, arm: PstArm) -> dict[str, Any]:
        """Accuracy on the test sentences."""
        right, cost = self._answers(arm, "test")
        return {
            "arm": arm.label, "method": arm.method, "pattern": arm.pattern, "seed": arm.seed,
            "rate": arm.rate, "score_rate": arm.score_rate, "rank": arm.rank,
            "accuracy": float(right.mean()), "test_examples": len(right), **cost,
            "right": np.packbits(right).tobytes().hex(),
        }  # fmt: skip

    def validate(self, arm: PstArm) -> dict[str, Any]:
        """Accuracy on the validation sentences, by which a rate may be chosen."""
        right, cost = self._answers(arm, "validation")
        return {
            "arm": arm.tried, "kind": "grid", "method": arm.method, "pattern": arm.pattern, "rate": arm.rate,
            "score_rate": arm.score_rate, "rank": arm.rank,
            "validation_accuracy": float(right.mean()), "validation_examples": len(right),
            "train_examples": cost["train_examples"], "training_seconds": cost["training_seconds"],
        }  # fmt: skip

    def _answers(self, arm: PstArm, split: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Which sentences of a split the arm's model classes rightly [N], and what its training cost."""
        from benchmarks.pst_arms import LENGTH, train_classifier
        from compressor.retraining.loop import training_device
        from compressor.tasks.encoding import encode_labelled
        from compressor.tasks.evaluation import predict

        folder, tokenizer, task = self._prepared(self.options.encoder, "rotten-tomatoes", self.options.test)
        dense = replace(self.dense, seed=arm.seed) if arm.method == DISTILLED else None
        model, cost = train_classifier(folder, tokenizer, task, arm, self.options.epochs, dense=dense)
        model.to(training_device())
        encoded = encode_labelled(tokenizer, getattr(task, split), LENGTH, regression=False)
        right = np.array(predict(model, encoded)) == encoded.labels.numpy()
        return right, {"train_examples": len(task.train), **cost}

    def write(self, arm: PstArm) -> dict[str, Any]:
        """BLEU and ROUGE-L of what the model writes, by beam search."""
        from benchmarks.pst_arms import LENGTH, train_writer
        from compressor.retraining.loop import training_device
        from compressor.tasks.evaluation import evaluate

        options = self.options
        count = options.examples if options.quick else _WRITING_EXAMPLES
        folder, tokenizer, task = self._prepared(options.model, "story-words", options.writings, count)
        work_dir = options.work and options.work / arm.method
        epochs = options.epochs if options.quick else _WRITING_EPOCHS
        model, cost = train_writer(folder, tokenizer, task, arm, epochs, work_dir)
        model.to(training_device())
        found = evaluate(model, tokenizer, task, task.test, length=LENGTH)
        if work_dir:
            shutil.rmtree(work_dir)
        return {
            "arm": f"writing: {arm.label}", "kind": "writing", "method": arm.method, "pattern": arm.pattern,
            "train_examples": count, "test_examples": len(task.test), **found, **cost,
        }  # fmt: skip

    def correlation(self, arm: PstArm) -> dict[str, Any]:
        """Of the learned score with the true one."""
        from benchmarks.pst_arms import score_correlations

        prepared = self._prepared(self.options.encoder, "rotten-tomatoes", None)
        found = score_correlations(*prepared, arm, self.options.epochs)
        return {
            "arm": "correlation", "kind": "cost", "by_layer": found, "figures": {"score_rank_correlation": fmean(found)}
        }  # fmt: skip


def paired_interval(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of accuracy in points, and its 95 % interval.

    Of one seed the interval is of the examples alone; of several it is Student's, of the seeds' differences, where that
    is wider: three seeds tell little of how far others lie, and a bootstrap over them still less.

    Args:
        a, b: right answers [N] of each seed, of the same seeds and examples.
    """
    from scipy.stats import t as student

    difference = 100 * (np.stack(a).astype(np.float64) - np.stack(b).astype(np.float64))
    seeds, examples = difference.shape
    mean = float(difference.mean())
    half = float(student.ppf(0.975, examples - 1) * difference.mean(0).std(ddof=1) / math.sqrt(examples))
    if seeds > 1:
        half = max(half, float(student.ppf(0.975, seeds - 1) * difference.mean(1).std(ddof=1) / math.sqrt(seeds)))
    return mean, mean - half, mean + half


def _right(rows: Sequence[Mapping[str, Any]], method: str, pattern: str) -> dict[int, np.ndarray]:
    return {
        row["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[: row["test_examples"]]
        for row in rows
        if row.get("method") == method and row.get("pattern") == pattern and "right" in row
    }


def comparison(
    rows: Sequence[Mapping[str, Any]], method: str, other: str, pattern: str
) -> tuple[float, float, float] | None:
    """Points of accuracy that `method` has over `other` at a mask shape, over the seeds that both have."""
    ours = _right(rows, method, pattern)
    theirs = _right(rows, other, "none" if other == "dense" else pattern)
    seeds = sorted(ours.keys() & theirs.keys())
    return paired_interval([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """PST over movement at its worst mask shape, over dense at 2:4, and what it costs."""
    result: dict[str, float] = {}
    found = [points for pattern in PATTERNS if (points := comparison(rows, "pst", "movement", pattern))]
    if len(found) == len(PATTERNS):
        result["pst_vs_movement_accuracy_points"] = min(points[0] for points in found)
    for key, method in (("pst24", DISTILLED), ("pst24_from_the_encoder", "pst")):
        if dense := comparison(rows, method, "dense", "2:4"):
            result[f"{key}_vs_dense_accuracy_points"] = dense[0]
    classified = {row["method"]: row for row in rows if "right" in row}
    if classified.keys() >= {"pst", "movement"}:
        for key in ("trained_parameters", "optimizer_bytes"):
            result[f"{key}_vs_movement"] = classified["pst"][key] / classified["movement"][key]
    for row in rows:
        result |= row.get("figures", {})
    return result


def _sentence(row: Mapping[str, Any]) -> str:
    if "accuracy" in row:
        return f"{row['arm']}: accuracy {row['accuracy']:.4f}, {row['trained_parameters']:,} parameters trained"
    if "validation_accuracy" in row:
        return f"{row['arm']}: validation accuracy {row['validation_accuracy']:.4f}"
    if "figures" in row:
        return f"{row['arm']}: " + ", ".join(f"{key} {value:.4f}" for key, value in row["figures"].items())
    return f"{row['arm']}: BLEU {row['bleu']:.2f}, ROUGE-L {row['rouge_l']:.4f}"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "mask", "seeds", "accuracy", "PST's points over it (95 %)", "trained", "optimiser MB")
    groups = dict.fromkeys((row["method"], row["pattern"]) for row in rows if "right" in row)
    for method, pattern in groups:
        chosen = [row for row in rows if row.get("method") == method and row.get("pattern") == pattern]
        chosen = [row for row in chosen if "right" in row]
        values = [row["accuracy"] for row in chosen]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        points = comparison(rows, "pst", method, "2:4" if pattern == "none" else pattern) if method != "pst" else None
        table.add_row(
            method, pattern, str(len(values)), f"{fmean(values):.4f}{spread}",
            f"{points[0]:+.2f} ({points[1]:+.2f} to {points[2]:+.2f})" if points else "",
            f"{chosen[0]['trained_parameters']:,}", f"{chosen[0]['optimizer_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in rows:
        if row.get("kind") in ("writing", "grid"):
            print(_sentence(row))
