"""GLUE (Wang et al., 2019): where each task keeps its sentences and labels, and which metrics it is judged by.

Two forms are known: the TSV files of the benchmark's own archive, and the hub's records (`nyu-mll/glue`), whose names
JSONL files share. The test split has no labels there: the development set is what everybody reports, so it is the
test set here, and a tenth of the training examples is held out for choosing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """Fields in the hub's records, then in the archive's TSV files; `columns` where those have no header."""

    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    tsv_fields: tuple[str, ...]
    tsv_label: str = "label"
    columns: tuple[str, ...] | None = None
    matched: str = ""

    @property
    def kind(self) -> str:
        return "classification" if self.labels else "regression"


_ENTAILS = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")

GLUE = {
    "cola": GlueTask(
        ("unacceptable", "acceptable"), ("matthews", "accuracy"), ("sentence",), ("sentence",),
        columns=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask(("negative", "positive"), ("accuracy",), ("sentence",), ("sentence",)),
    "mrpc": GlueTask(
        ("not_equivalent", "equivalent"), ("f1", "accuracy"), _PAIR, ("#1 String", "#2 String"), tsv_label="Quality"
    ),
    "qqp": GlueTask(
        ("not_duplicate", "duplicate"), ("f1", "accuracy"), ("question1", "question2"), ("question1", "question2"),
        tsv_label="is_duplicate",
    ),
    "stsb": GlueTask((), ("pearson", "spearman"), _PAIR, _PAIR, tsv_label="score"),
    "mnli": GlueTask(_NLI, ("accuracy",), ("premise", "hypothesis"), _PAIR, tsv_label="gold_label", matched="_matched"),
    "qnli": GlueTask(_ENTAILS, ("accuracy",), ("question", "sentence"), ("question", "sentence")),
    "rte": GlueTask(_ENTAILS, ("accuracy",), _PAIR, _PAIR),
    "wnli": GlueTask(("not_entailment", "entailment"), ("accuracy",), _PAIR, _PAIR),
}  # fmt: skip
