"""A comparison as a table: on the terminal and in Markdown. What became worse is as large as what became better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.record import machine_sentence

_WORDS = {
    "disk_bytes": ("smaller", "larger"),
    "weight_bytes": ("smaller", "larger"),
    "rss_loaded_bytes": ("smaller", "larger"),
    "peak_rss_bytes": ("smaller", "larger"),
    "prefill_tokens_per_s": ("faster", "slower"),
    "decode_tokens_per_s": ("faster", "slower"),
    "ttft_seconds": ("sooner", "later"),
    "perplexity": ("lower", "higher"),
}
_ALIKE = 1.02


def value_text(row: Mapping[str, Any], label: str) -> str:
    """A figure as people read it: `71.7 MB`, `154 tokens/s`, `31 ms`, `24.1 ± 0.9`."""
    value, unit = row["values"][label], row["unit"]
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    if unit == "s":
        return f"{1000 * value:.0f} ms" if value < 10 else f"{value:.1f} s"
    if unit == "tokens/s":
        return f"{value:.0f} tokens/s" if value >= 100 else f"{value:.1f} tokens/s"
    error = (row.get("relative_error") or {}).get(label)
    digits = 1 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ± {value * error:,.{digits}f}" if error else "")


def gain_text(row: Mapping[str, Any], label: str) -> str:
    """`3.4x smaller`, `1.3x slower`, `about the same`."""
    gain = row["gain"][label]
    better, worse = _WORDS[row["key"]]
    if 1 / _ALIKE < gain < _ALIKE:
        return "about the same"
    factor = max(gain, 1 / gain)
    return f"{factor:.{2 if factor < 10 else 0}f}x {better if gain > 1 else worse}"


def range_text(row: Mapping[str, Any], label: str) -> str:
    """The range over rounds, where there is one: `148 to 156`."""
    low, high = row["low"][label], row["high"][label]
    if low == high:
        return ""
    scale = {"bytes": 1e-6, "s": 1e3}.get(row["unit"], 1.0)
    digits = 0 if high * scale >= 100 else 1
    return f"{low * scale:.{digits}f} to {high * scale:.{digits}f}"


def labels(record: Mapping[str, Any]) -> list[str]:
    return [model["label"] for model in record["models"]]


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, in sentences."""
    found = [f"{model['label']}: {model['source']}" for model in record["models"] if model["source"]]
    found += [f"{model['label']}: {model['storage']}" for model in record["models"] if model["compressed"]]
    kernels = sorted({model["kernels"] for model in record["models"]})
    found.append(f"kernels: {'; '.join(kernels)}; {record['models'][0]['threads']} threads")
    found.append(f"machine: {machine_sentence(record)}")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    found.append(f"versions: {versions}; measured {record['date']}")
    rounds = record["settings"]["rounds"]
    found.append(
        f"speed and memory: {'median of ' if rounds > 1 else ''}{rounds} fresh process{'es' if rounds > 1 else ''} a "
        f"model{', models taking turns' if rounds > 1 else ''}; perplexity ± standard error over windows"
    )
    return found


def print_table(record: Mapping[str, Any], console: Console | None = None) -> None:
    """The comparison on a terminal."""
    console = console or Console(width=None if Console().is_terminal else 110)
    table = Table(title="dense against compressed", title_justify="left")
    table.add_column("")
    for number, label in enumerate(labels(record)):
        table.add_column(label, justify="right", style="bold" if number else "")
    for row in record["rows"]:
        head = Text(row["title"])
        head.append(f"\n{row['note']}", style="dim")
        table.add_row(
            head, *(_cell(row, label, first=not n) for n, label in enumerate(labels(record))), end_section=True
        )
    console.print(table)
    for note in notes(record):
        console.print(Text(note, style="dim"))


def _cell(row: Mapping[str, Any], label: str, first: bool) -> Text:
    cell = Text(value_text(row, label))
    if not first:
        gain = row["gain"][label]
        style = "green" if gain >= _ALIKE else "red" if gain <= 1 / _ALIKE else ""
        cell.append(f"\n{gain_text(row, label)}", style=style)
    return cell


def markdown(record: Mapping[str, Any]) -> str:
    """The comparison as Markdown, for a README."""
    names = labels(record)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in record["rows"]:
        cells = [value_text(row, names[0])]
        cells += [f"{value_text(row, name)}<br>{gain_text(row, name)}" for name in names[1:]]
        lines.append(f"| **{row['title']}**<br>{row['note']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(record))])
