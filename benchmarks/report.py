"""`python -m benchmarks report FILE`: a saved comparison as a table, as Markdown, or as one self-contained HTML page.

The page needs nothing but its own file: no script, no font and no image from elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.record import machine_sentence, read_record
from benchmarks.table import gain_text, labels, markdown, notes, print_table, range_text, value_text

_CARDS = ("disk_bytes", "weight_bytes", "decode_tokens_per_s", "prefill_tokens_per_s", "perplexity")
_BARS = (
    *("disk_bytes", "weight_bytes", "rss_loaded_bytes", "peak_rss_bytes"),
    *("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_seconds"),
)


def main(argv: Sequence[str]) -> int:
    """Shows a record that `compare` wrote."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks report", description="Show a saved comparison again.")
    flags.add_argument("record", type=Path, metavar="FILE", help="what `compare --json FILE` wrote")
    flags.add_argument("--markdown", action="store_true", help="print Markdown instead of a table")
    flags.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    options = flags.parse_args(list(argv))
    if not options.record.is_file():
        raise ValueError(f"{options.record} is not a file; give what `python -m benchmarks compare --json FILE` wrote")
    record = read_record(options.record, "compare")
    if options.markdown:
        print(markdown(record))
    else:
        print_table(record)
    if options.html:
        write_page(options.html, record)
        print(f"wrote {options.html}")
    return 0


def write_page(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the page of a comparison."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(record), "utf-8")


def page(record: Mapping[str, Any]) -> str:
    """The page of a comparison, from its record alone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("benchmarks"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows = {row["key"]: row for row in record["rows"]}
    names = labels(record)
    return environment.get_template("report.html").render(
        record=record,
        names=names,
        title=_title(record),
        cards=[_card(rows[key], names) for key in _CARDS],
        table=[_table_row(row, names) for row in record["rows"]],
        bars=[(rows[key], _bars(rows[key], names)) for key in _BARS if key in rows],
        perplexity=(rows["perplexity"], _bars(rows["perplexity"], names)),
        curves=_curves(record["training"]),
        machine=machine_sentence(record),
        notes=notes(record),
        limits=limits(record),
        recipe=_recipe(record),
    )


def _title(record: Mapping[str, Any]) -> str:
    """The model's name, out of the name it was given by."""
    return str(record["models"][0]["name"]).rstrip("/").rpartition("/")[2].removeprefix("pypi:")


def _verdict(row: Mapping[str, Any], label: str) -> str:
    gain = row["gain"][label]
    return "same" if 1 / 1.02 < gain < 1.02 else "better" if gain > 1 else "worse"


def _card(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The last model against dense."""
    dense, last = value_text(row, names[0]), value_text(row, names[-1])
    return {
        "title": row["title"],
        "gain": gain_text(row, names[-1]),
        "change": f"{dense} → {last}",
        "verdict": _verdict(row, names[-1]),
    }


def _table_row(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    cells = [
        {
            "value": value_text(row, name),
            "range": range_text(row, name),
            "gain": gain_text(row, name) if number else "",
            "verdict": _verdict(row, name) if number else "",
        }
        for number, name in enumerate(names)
    ]
    return {"title": row["title"], "note": row["note"], "cells": cells}


def _bars(row: Mapping[str, Any], names: Sequence[str]) -> str:
    texts = [value_text(row, name) for name in names]
    summary = f"{row['title']}: " + ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True))
    return plots.bars(names, [row["values"][name] for name in names], texts, summary)


def _curves(points: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """(title, plot) of the loss and of the share of mask entries that changed, where there are enough points."""
    wanted = (
        ("kl", "KL, nats a token", "Distance from the dense model", "s2"),
        ("flip_rate", "share that changed", "How much the mask still moves", "s1"),
    )
    found = []
    for key, axis, title, style in wanted:
        having = [point for point in points if key in point]
        if len(having) > 1:
            x, y = [point["tokens"] for point in having], [point[key] for point in having]
            summary = f"{title}: from {y[0]:.3g} to {y[-1]:.3g} over {x[-1]:,.0f} tokens"
            found.append((title, plots.curve(x, y, "tokens of retraining", axis, summary, style)))
    return found


def _recipe(record: Mapping[str, Any]) -> str:
    import yaml

    recipe = record["models"][-1]["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else ""


def limits(record: Mapping[str, Any]) -> list[str]:
    """What the figures do not say."""
    names, rows = labels(record), {row["key"]: row for row in record["rows"]}
    found = [
        "Speed and memory hold for this machine, this model and batch 1; another machine has other ratios. "
        "Run the command below on yours.",
        "RSS is the whole process: Python, torch, the weights; at its peak the pages of the file that is read too.",
        f"Perplexity is one measure on one text ({rows['perplexity']['note']}); it does not say how answers read.",
    ]
    if record["models"][0]["source"]:
        found.insert(0, f"The dense model is {record['models'][0]['source']}; it is not the publisher's own bf16 file.")
    worse = [row["title"] for row in record["rows"] if row["gain"][names[-1]] < 1 / 1.02]
    if worse:
        found.append(f"Worse than dense: {', '.join(worse)}.")
    budget = ((record["models"][-1]["recipe"] or {}).get("retraining") or {}).get("budget")
    if budget:
        found.append(f"Retraining was bounded to {budget}; a longer one recovers more of what pruning costs.")
    return found
