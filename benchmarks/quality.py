"""`python -m benchmarks quality MODEL ...`: perplexity on held-out text, through the engine that serves the models.

`--arms quantisers` measures a fixed set of checkpoints instead (`benchmarks/quantisers.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compare import QUICK_QUALITY_TOKENS, loss_increase, measure_quality
from benchmarks.measure import QualitySettings
from benchmarks.models import ModelFolder, describe_all
from benchmarks.record import make_record, parser, write_record


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, writes the record."""
    if "--arms" in argv:
        return importlib.import_module("benchmarks.quantisers").main(argv)
    flags = parser(
        "quality", "Perplexity of models, dense or compressed; the first one is what others are compared with."
    )
    flags.add_argument("models", nargs="+", metavar="MODEL", help="a folder, a hub id or pypi:NAME")
    flags.add_argument("--text", default="heldout", help="heldout, or a UTF-8 text file (default: heldout)")
    flags.add_argument("--wikitext", action="store_true", help="the text file is in WikiText's tokenised form: undo it")
    flags.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    flags.add_argument("--tokens", type=int, help="stop after so many tokens (default: the whole text)")
    options = flags.parse_args(list(argv))
    tokens = options.tokens or (QUICK_QUALITY_TOKENS if options.quick else None)
    models = describe_all(options.models)
    settings = QualitySettings(options.text, options.window, tokens, options.wikitext)
    losses = measure_quality(models, settings)
    rows = [_row(model, losses[model.label], losses[models[0].label]) for model in models]
    record = make_record("quality", argv, rows, _headline(rows), settings=vars(settings))
    _print(record)
    if options.json:
        write_record(options.json, record)
        print(f"wrote {options.json}")
    return 0


def _row(model: ModelFolder, loss: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    increase, error = loss_increase(first, loss)
    own = {key: value for key, value in loss.items() if key != "window_nll"}
    return {
        "model": model.label,
        "name": model.name,
        "source": model.source,
        **own,
        "loss_increase": increase,
        "loss_increase_stderr": error,
    }


def _headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The first model's perplexity, and the worst of all."""
    return {"perplexity": rows[0]["perplexity"], "perplexity_worst": max(row["perplexity"] for row in rows)}


def _print(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = record["rows"][0]
    table = Table("model", "perplexity", "loss (nats)", "above the first")
    for row in record["rows"]:
        error = row["stderr_nll"]
        above = "" if row is first else f"{row['loss_increase']:+.4f}{_plus_minus(row['loss_increase_stderr'], 4)}"
        perplexity = f"{row['perplexity']:,.2f}{_plus_minus(error and error * row['perplexity'], 2)}"
        table.add_row(row["model"], perplexity, f"{row['mean_nll']:.4f}{_plus_minus(error, 4)}", above)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    window = record["settings"]["window"]
    print(f"{first['text']}: {first['tokens']:,} tokens scored in {first['windows']} windows of {window}")
    for row in record["rows"]:
        if row["source"]:
            print(f"{row['model']}: {row['source']}")


def _plus_minus(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:,.{digits}f}"
