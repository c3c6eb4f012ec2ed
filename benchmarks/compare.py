"""`python -m benchmarks compare DENSE OUT [OUT ...]`: one table of quality, speed and memory, dense against compressed.

Every model is measured in processes of its own, round by round in turn (A B C, A B C, ...), so that a machine that
becomes slower meanwhile does it to all of them alike; the table shows medians, the record also the range over rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import QualitySettings, SpeedSettings, in_own_process
from benchmarks.models import ModelFolder, describe_all
from benchmarks.record import make_record, parser, write_record
from compressor.plot import METRICS, read_curve

ROUNDS, QUICK_ROUNDS = 3, 1
QUALITY_TOKENS, QUICK_QUALITY_TOKENS = 16384, 4096
QUICK_SPEED = SpeedSettings(prefill_tokens=256, prompt_tokens=64, output_tokens=48, repeats=1)

CURVES = ("total", "kl", "ce", "flip_rate", "learning_rate", "gradient_norm")
"""What a record keeps of the metrics of retraining."""


def main(argv: Sequence[str]) -> int:
    """Parses the flags, measures, prints the table, writes what was asked for."""
    flags = parser("compare", "Compare a dense model with compressed ones: size, memory, speed and perplexity.")
    flags.add_argument("dense", metavar="DENSE", help="the dense model: a folder, a hub id or pypi:NAME")
    flags.add_argument("out", nargs="+", metavar="OUT", help="folder that `compress` made")
    flags.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    flags.add_argument(
        "--text", default="heldout", help="text of the perplexity: heldout, or a file (default: heldout)"
    )
    flags.add_argument("--wikitext", action="store_true", help="the text file is in WikiText's tokenised form: undo it")
    flags.add_argument("--window", type=int, default=512, help="tokens of a perplexity window (default: %(default)s)")
    flags.add_argument("--tokens", type=int, help=f"tokens of the perplexity (default: {QUALITY_TOKENS})")
    flags.add_argument("--rounds", type=int, help=f"rounds of the speed measurement (default: {ROUNDS})")
    options = flags.parse_args(list(argv))
    tokens = options.tokens or (QUICK_QUALITY_TOKENS if options.quick else QUALITY_TOKENS)
    record = compare(
        describe_all([options.dense, *options.out]),
        QUICK_SPEED if options.quick else SpeedSettings(),
        QualitySettings(options.text, options.window, tokens, options.wikitext),
        options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        argv,
    )
    from benchmarks.table import print_table

    print_table(record)
    if options.json:
        write_record(options.json, record)
        print(f"wrote {options.json}")
    if options.html:
        from benchmarks.report import write_page

        write_page(options.html, record)
        print(f"wrote {options.html}")
    return 0


def compare(
    models: Sequence[ModelFolder], speed: SpeedSettings, quality: QualitySettings, rounds: int, argv: Sequence[str]
) -> dict[str, Any]:
    """Measures all models and returns the record; the first one is the dense one.

    Raises:
        ValueError: no model at the place of the dense one, or a model that cannot be measured.
    """
    if models[0].compressed:
        raise ValueError(f"{models[0].folder} is compressed; the first folder is the dense model: compare DENSE OUT")
    if quality.text != "heldout" and not Path(quality.text).is_file():  # before the rounds, not after
        raise ValueError(f"text {quality.text!r} is not a file; give a UTF-8 text file, or heldout")
    speeds = measure_speed(models, speed, rounds)
    losses = measure_quality(models, quality)
    rows = make_rows(models, speeds, losses, speed, quality)
    last = models[-1]
    return make_record(
        "compare",
        argv,
        rows,
        headline(models, rows, losses),
        settings={"speed": vars(speed), "quality": vars(quality), "rounds": rounds},
        models=[
            model.to_dict() | {key: speeds[model.label][0][key] for key in ("formats", "kernels", "threads")}
            for model in models
        ],
        rounds={model.label: speeds[model.label] for model in models},
        perplexity={model.label: losses[model.label] for model in models},
        training=read_curve(last.folder / METRICS, CURVES),
    )


def measure_speed(
    models: Sequence[ModelFolder], settings: SpeedSettings, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """{label: one measurement a round}, the models taking turns."""
    from compressor.progress import reporter

    found: dict[str, list[dict[str, Any]]] = {model.label: [] for model in models}
    total = rounds * len(models)
    with reporter() as report:
        for done in range(total):
            model = models[done % len(models)]
            report("speed", done, total, {"round": f"{done // len(models) + 1}/{rounds}", "model": model.label})
            found[model.label].append(in_own_process("speed", model.folder, settings))
        report("speed", total, total, {"round": f"{rounds}/{rounds}", "model": ""})
    return found


def measure_quality(models: Sequence[ModelFolder], settings: QualitySettings) -> dict[str, dict[str, Any]]:
    """{label: perplexity and its error}; deterministic, so once for each model."""
    from compressor.progress import reporter

    found = {}
    with reporter() as report:
        for number, model in enumerate(models):

            def progress(done: int, total: int, number: int = number, label: str = model.label) -> None:
                report("perplexity", number * total + done, len(models) * total, {"model": label})

            found[model.label] = in_own_process("perplexity", model.folder, settings, progress)
    return found


def make_rows(
    models: Sequence[ModelFolder],
    speeds: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Mapping[str, Mapping[str, Any]],
    speed: SpeedSettings,
    quality: QualitySettings,
) -> list[dict[str, Any]]:
    """The table: per row a value, a range over rounds and a ratio against dense for every model."""

    def over_rounds(key: str) -> dict[str, list[float]]:
        return {label: [entry[key] for entry in entries] for label, entries in speeds.items()}

    text = next(iter(losses.values()))
    batch = "batch 1, greedy"
    scored = f"{text['text']}, {text['tokens']:,} tokens, window {quality.window}"
    sizes: dict[str, list[float]] = {model.label: [model.disk_bytes] for model in models}
    perplexities = {label: [loss["perplexity"]] for label, loss in losses.items()}
    return [
        _row("disk_bytes", "size on disk", "whole folder", "bytes", "lower", sizes),
        _row("weight_bytes", "weights in memory", "as served", "bytes", "lower", over_rounds("weight_bytes")),
        _row("rss_loaded_bytes", "RSS once loaded", "whole process", "bytes", "lower", over_rounds("rss_loaded_bytes")),
        _row("peak_rss_bytes", "peak RSS", "while it loads", "bytes", "lower", over_rounds("peak_rss_bytes")),
        _row(
            "prefill_tokens_per_s",
            "prefill",
            f"prompt of {speed.prefill_tokens} tokens, batch 1",
            "tokens/s",
            "higher",
            over_rounds("prefill_tokens_per_s"),
        ),
        _row(
            "decode_tokens_per_s",
            "decode",
            f"{speed.output_tokens} tokens, {batch}",
            "tokens/s",
            "higher",
            over_rounds("decode_tokens_per_s"),
        ),
        _row(
            "ttft_seconds",
            "time to first token",
            f"prompt of {speed.prompt_tokens} tokens",
            "s",
            "lower",
            over_rounds("ttft_seconds"),
        ),
        _row("perplexity", "perplexity", scored, "", "lower", perplexities)
        | {"relative_error": {label: loss["stderr_nll"] for label, loss in losses.items()}},
    ]


def _row(
    key: str, title: str, note: str, unit: str, better: str, values: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """`gain` is how many times better than dense: above 1 is better, whichever way the row counts."""
    middle = {label: median(found) for label, found in values.items()}
    dense = next(iter(middle.values()))
    gain = {label: value / dense if better == "higher" else dense / value for label, value in middle.items()}
    return {
        "key": key,
        "title": title,
        "note": note,
        "unit": unit,
        "better": better,
        "values": middle,
        "low": {label: min(found) for label, found in values.items()},
        "high": {label: max(found) for label, found in values.items()},
        "gain": gain,
    }


def headline(
    models: Sequence[ModelFolder], rows: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Plain numbers of the last model against dense; those of models between are named after their label."""
    result: dict[str, float] = {"perplexity_dense": losses[models[0].label]["perplexity"]}
    for model in models[1:]:
        end = "" if model is models[-1] else "_" + "".join(c if c.isalnum() else "_" for c in model.label)
        for row in rows:
            result[f"{row['key']}_gain{end}"] = row["gain"][model.label]
        result[f"perplexity{end}"] = losses[model.label]["perplexity"]
        result[f"loss_increase{end}"], error = loss_increase(losses[models[0].label], losses[model.label])
        if error is not None:
            result[f"loss_increase_stderr{end}"] = error
    return result


def loss_increase(dense: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float | None]:
    """Mean loss above dense, in nats a token, and its standard error, paired by window."""
    differences = [b - a for a, b in zip(dense["window_nll"], other["window_nll"], strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))
