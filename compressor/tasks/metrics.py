"""Metrics by name, computed by the libraries that the field reports with.

Classes: predicted and true class indices. Regression: predicted and true numbers. Generation: texts, and for each the
list of its references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

_HINT = "metrics of tasks need scikit-learn, sacrebleu and rouge-score: pip install 'halfweight[tasks]'"


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Share of right answers."""
    return sum(a == b for a, b in zip(predicted, true, strict=True)) / len(true)


def f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    """F1 of class 1 where there are two classes, else the mean over classes."""
    two = max(*predicted, *true) <= 1
    return float(_library("f1").f1_score(true, predicted, average="binary" if two else "macro", zero_division=0.0))


def matthews(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Matthews correlation; 0 where one class is never predicted."""
    return float(_library("matthews").matthews_corrcoef(true, predicted))


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Pearson correlation; 0 where all predictions are the same."""
    return _correlation("pearsonr", predicted, true)


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Spearman rank correlation; 0 where all predictions are the same."""
    return _correlation("spearmanr", predicted, true)


def bleu(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's default tokenisation."""
    width = max(map(len, references))
    streams: Any = [[(given[place] if place < len(given) else None) for given in references] for place in range(width)]
    return float(_library("bleu").corpus_bleu(list(predicted), streams).score)


def rouge_l(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F1 against the best of the references."""
    scorer = _library("rouge_l").RougeScorer(["rougeL"], use_stemmer=False)
    scores = [scorer.score_multi(list(given), text)["rougeL"].fmeasure for text, given in _pairs(predicted, references)]
    return float(sum(scores) / len(scores))


def _pairs(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return list(zip(predicted, references, strict=True))


def _correlation(name: str, predicted: Sequence[float], true: Sequence[float]) -> float:
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return 0.0
    return float(getattr(_library("pearson"), name)(predicted, true).statistic)


def _library(name: str) -> Any:
    try:
        return import_module(_LIBRARIES[name])
    except ImportError:
        raise ValueError(_HINT) from None


_LIBRARIES = {
    "f1": "sklearn.metrics",
    "matthews": "sklearn.metrics",
    "pearson": "scipy.stats",
    "spearman": "scipy.stats",
    "bleu": "sacrebleu",
    "rouge_l": "rouge_score.rouge_scorer",
}

METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "bleu": bleu,
    "rouge_l": rouge_l,
}


def check_metrics(names: Iterable[str]) -> None:
    """Raises ValueError where a metric's library is not installed."""
    for name in names:
        if name in _LIBRARIES:
            _library(name)


def measure(names: Sequence[str], predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
    """Every metric of a task."""
    return {name: METRICS[name](predicted, true) for name in names}
