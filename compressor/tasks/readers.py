"""Records of labelled data: TSV as GLUE writes it, CSV, JSONL, parquet, or a hub data set.

GLUE's TSV files have no quoting: a lone quotation mark is text, so a reader that honours quotes joins lines without a
word. CoLA's have no header either, and a few questions of QQP's hold line breaks: such torn lines are left out.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressor.data import parse_json

log = logging.getLogger(__name__)

# More torn lines than one in so many, and the file is not what it is taken for.
_LINES_PER_TORN = 1000
_FIELD_CHARACTERS = 1 << 30
SUFFIXES = (".jsonl", ".tsv", ".csv", ".parquet")
ACCEPTED = "a folder with train and dev files, one file (.jsonl, .tsv, .csv, .parquet), or a hub data set id"
_NAMES = {"train": ("train", "trainset"), "validation": ("dev", "validation", "valid", "devset"), "test": ("test",)}


def read_records(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Every record of a file; `columns` names those of a TSV without a header.

    Raises:
        ValueError: the file is of another kind, badly encoded or torn; says where.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is not understood; accepted: {', '.join(SUFFIXES)}")
    try:
        records = list(read(path, columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def _tsv(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    lines = path.read_text("utf-8-sig").split("\n")
    names = list(columns) if columns else lines.pop(0).rstrip("\r").split("\t")
    torn = []
    for number, line in enumerate(lines, start=1 if columns else 2):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) >= len(names):
            yield dict(zip(names, fields, strict=False))
            continue
        torn.append(f"line {number} has {len(fields)} fields; {len(names)} are expected: {names}")
        if len(torn) * _LINES_PER_TORN > len(lines):
            raise ValueError(f"{path}, {torn[0]}")
    if torn:
        log.warning("%s: %d torn lines are left out; %s", path, len(torn), torn[0])


def _csv(path: Path, _columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num} is not CSV: {error}") from None


def _jsonl(path: Path, _columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        record = parse_json(line, f"{path}, line {number}")
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not an object")
        yield record


def _parquet(path: Path, _columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'halfweight[data]'") from None
    yield from parquet.read_table(path).to_pylist()


_READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def files_of(folder: Path, matched: str = "") -> dict[str, Path]:
    """{split: file} of a folder; `matched` is what GLUE's MNLI appends to dev and test."""
    found: dict[str, Path] = {}
    for split, names in _NAMES.items():
        candidates = [folder / f"{name}{end}{suffix}" for name in names for end in (matched, "") for suffix in SUFFIXES]
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None:
            found[split] = path
    if "train" not in found:
        raise ValueError(f"{folder} has no train file; accepted: train{', train'.join(SUFFIXES)}")
    return found


def hub_records(name: str, configuration: str | None = None, matched: str = "") -> dict[str, list[dict[str, Any]]]:
    """{split: records} of a hub data set."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name!r} is no file here, so a hub data set is meant, which needs the package 'datasets': "
            f"pip install 'halfweight[data]'. Otherwise give {ACCEPTED}"
        ) from None
    try:
        found = load_dataset(name, configuration)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"data set {name!r} could not be read: {reason}. Accepted is {ACCEPTED}") from None
    splits = {split: found.get(f"{split}{matched}", found.get(split)) for split in _NAMES}
    return {split: list(rows) for split, rows in splits.items() if rows is not None}
