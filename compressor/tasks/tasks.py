"""Tasks by name: packaged ones, GLUE's, E2E, and files of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.tasks.glue import GLUE, GlueTask
from compressor.tasks.packaged import rotten_tomatoes, story_words
from compressor.tasks.readers import ACCEPTED, files_of, hub_records, read_records
from compressor.tasks.task import KINDS, Example, Task, TaskSource, split_of

_PACKAGED: dict[str, Callable[[], Task]] = {"rotten-tomatoes": rotten_tomatoes, "story-words": story_words}
_METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "generation": ("bleu", "rouge_l"),
}
TASKS = (*_PACKAGED, *GLUE, "e2e", "custom")
"""Every name that `load_task` takes."""

Records = Mapping[str, list[dict[str, Any]]]


def load_task(name: str, source: TaskSource | None = None) -> Task:
    """The task of a name, with its examples.

    Raises:
        ValueError: no such task, or its examples cannot be read; says what is accepted.
    """
    source = source or TaskSource()
    if name in _PACKAGED:
        if source.path is not None:
            raise ValueError(f"task {name!r} brings its own examples; leave task.source out, or name the task 'custom'")
        return _PACKAGED[name]()
    if name in GLUE:
        return _glue(name, GLUE[name], source.path)
    if name == "e2e":
        return _e2e(source.path)
    if name == "custom":
        return _custom(source)
    raise ValueError(f"no task {name!r}; accepted: {', '.join(TASKS)}")


def _glue(name: str, task: GlueTask, path: str | None) -> Task:
    if path is None or not Path(path).expanduser().is_dir():
        records: Records = hub_records(path or "nyu-mll/glue", name, task.matched)
        archive = False
    else:
        files = files_of(Path(path).expanduser(), task.matched)
        archive = files["train"].suffix == ".tsv" and not _has_hub_fields(files["train"], task)
        columns = task.columns if archive else None
        records = {split: read_records(file, columns) for split, file in files.items() if split != "test"}
    fields = task.tsv_fields if archive else task.fields
    label = task.tsv_label if archive else "label"
    splits = {split: _examples(rows, fields, label, task.labels, task.kind) for split, rows in records.items()}
    if not splits.get("validation"):
        raise ValueError(f"{name} at {path or 'the hub'} has no development set (dev.tsv, or validation.jsonl)")
    train, held_out = _hold_out(splits["train"])
    return Task(name, task.kind, task.labels, task.metrics, train, held_out, splits["validation"], "see GLUE's page")


def _has_hub_fields(file: Path, task: GlueTask) -> bool:
    """Whether a TSV has a header with the hub's names, as exports of it do."""
    with file.open(encoding="utf-8-sig") as lines:
        header = lines.readline().rstrip("\r\n").split("\t")
    return {*task.fields, "label"} <= set(header)


def _hold_out(examples: Sequence[Example], what: str = "validation") -> tuple[list[Example], list[Example]]:
    """All but a tenth of the examples, and that tenth, by the hash of their text and of what they are held out for."""
    parts: dict[str, list[Example]] = {"train": [], "validation": []}
    for example in examples:
        parts[split_of(f"{what}\n{example.text}\n{example.pair}", test=0, validation=1)].append(example)
    return parts["train"], parts["validation"]


def _examples(
    records: Sequence[Mapping[str, Any]], fields: Sequence[str], label: str, labels: Sequence[str], kind: str
) -> list[Example]:
    examples = []
    for number, record in enumerate(records, start=1):
        missing = [field for field in fields if record.get(field) is None]
        missing += [label] if _blank(record.get(label)) else []
        if missing:
            raise ValueError(f"record {number} has no {', '.join(missing)}; it has {', '.join(map(str, record))}")
        text, *pair = (str(record[field]) for field in fields)
        value = _number(record[label], number) if kind == "regression" else _class_of(record[label], labels, number)
        if kind == "regression" or value >= 0:  # the hub marks what nobody labelled with -1
            examples.append(Example(text, pair[0] if pair else None, value))
    return examples


def _blank(value: Any) -> bool:
    """Whether a field holds nothing: in CSV and TSV that is an empty text."""
    return value is None or not str(value).strip()


def _number(value: Any, number: int) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"record {number} has the label {value!r}; a regression needs a finite number")
    return found


def _class_of(value: Any, labels: Sequence[str], number: int) -> int:
    text = str(value)
    if text in labels:
        return labels.index(text)
    named = not any(label.lstrip("-").replace(".", "").isdigit() for label in labels)  # numbers are names, not places
    if text == "-1" or (named and text.isdigit() and int(text) < len(labels)):
        return int(text)
    accepted = ", ".join(labels) + (", or their numbers" if named else "")
    raise ValueError(f"record {number} has the label {text!r}; accepted: {accepted}")


def _e2e(path: str | None) -> Task:
    """E2E (Novikova et al., 2017): trainset.csv and devset.csv with `mr` and `ref`; several references to one `mr`."""
    if path is None or not Path(path).expanduser().is_dir():
        records: Records = hub_records(path or "GEM/e2e_nlg")
        fields = ("meaning_representation", "target")
    else:
        files = files_of(Path(path).expanduser())
        records = {split: read_records(file) for split, file in files.items()}
        fields = ("mr", "ref")
    train = [example for example in _generation(records["train"], *fields)]
    test = _gathered(_generation(records.get("validation", records.get("test", [])), *fields))
    if not test:
        raise ValueError(f"e2e at {path or 'the hub'} has no development set (devset.csv)")
    train, held_out = _hold_out(train)
    return Task("e2e", "generation", (), _METRICS["generation"], train, _gathered(held_out), test, "CC BY-SA 4.0")


def _generation(records: Sequence[Mapping[str, Any]], source: str, target: str) -> list[Example]:
    examples = []
    for number, record in enumerate(records, start=1):
        if record.get(source) is None or _blank(record.get(target)):
            raise ValueError(f"record {number} has no {source} or no {target}; it has {', '.join(map(str, record))}")
        found = record[target] if isinstance(record[target], list) else [record[target]]
        references = tuple(f" {str(text).strip()}" for text in found)
        examples.append(Example(f"{str(record[source]).strip()}\n", references=references))
    return examples


def _gathered(examples: Sequence[Example]) -> list[Example]:
    """One example a source, with all of its references."""
    references: dict[str, list[str]] = {}
    for example in examples:
        references.setdefault(example.text, []).extend(example.references)
    return [Example(text, references=tuple(found)) for text, found in references.items()]


def _custom(source: TaskSource) -> Task:
    if source.kind not in KINDS:
        raise ValueError(f"task kind {source.kind!r} given; accepted: {', '.join(KINDS)}")
    if source.path is None:
        raise ValueError(f"a custom task needs task.source: {ACCEPTED}")
    records = _custom_records(source.path)
    if source.kind == "generation":
        splits = {split: _generation(rows, source.text, source.label) for split, rows in records.items()}
        labels: tuple[str, ...] = ()
    else:
        labels = _labels(records["train"], source.label) if source.kind == "classification" else ()
        fields = [source.text] if source.pair is None else [source.text, source.pair]
        splits = {split: _examples(rows, fields, source.label, labels, source.kind) for split, rows in records.items()}
    train, held_out = splits["train"], splits.get("validation")
    test = splits.get("test") or held_out
    if test is None:
        train, test = _hold_out(train, "test")
    if held_out is None or held_out is test:
        train, held_out = _hold_out(train)
    if not (train and held_out and test):
        raise ValueError(f"{source.path} has too few examples to hold some out for testing")
    name = Path(source.path).name
    return Task(name, source.kind, labels, _METRICS[source.kind], train, held_out, test)


def _custom_records(path: str) -> Records:
    local = Path(path).expanduser()
    if local.is_dir():
        return {split: read_records(file) for split, file in files_of(local).items()}
    if local.is_file():
        return {"train": read_records(local)}
    if local.suffix or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"task.source {path!r} is not there; accepted is {ACCEPTED}")
    return hub_records(path)


def _labels(records: Sequence[Mapping[str, Any]], field: str) -> tuple[str, ...]:
    """The classes' names in order; numbers in the order of numbers."""
    found = {str(record[field]) for record in records if not _blank(record.get(field))}
    if len(found) < 2:
        raise ValueError(f"field {field!r} holds {len(found)} different labels; a classifier needs at least 2")
    if len(found) > 1000:
        raise ValueError(
            f"field {field!r} holds {len(found)} different labels; for numbers set task.source.kind=regression"
        )
    return tuple(sorted(found, key=lambda text: (0, int(text), "") if text.isdigit() else (1, 0, text)))
