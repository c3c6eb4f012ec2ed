"""The arms of `python -m benchmarks pst`: one method, mask shape and seed each, fine-tuned under the same loop.

Rates are chosen from RATES on held-out *validation* sentences (`--grid`; docs/retraining.md has what it gave); batch,
epochs, schedule and examples are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.masks import MaskShape
from compressor.retraining.loop import LoopSettings
from compressor.retraining.pst import Pst, PstSettings
from compressor.retraining.task_training import TaskRun, finetune, start
from compressor.tasks import Task
from compressor.tasks.encoding import encode

PATTERNS = ("2:4", "50%", "90%")
BATCH = 32
LENGTH = 64
_CHECKPOINT_MINUTES = 3.0
_LOOP = LoopSettings(batch=BATCH, warmup=0.1, beta2=0.999, kl_weight=0.0)
# What --grid tries, for every method.
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# The chosen learning rate of the weights, or of U V; then score and head, as multiples of it.
_RATES = {
    "dense": (1e-4, 1.0, 5.0),
    "movement": (3e-4, 10.0, 5.0),
    "pst": (3e-4, 0.5, 5.0),
    "magnitude": (3e-4, 1.0, 5.0),
    "lora-magnitude": (3e-4, 0.5, 5.0),
}
METHODS = tuple(_RATES)
# The ablation: PST's score without one or both of its learned terms.
SCORES = {"pst |W'|": ("magnitude",), "pst |W'| + AB": ("magnitude", "low_rank")}


@dataclass(frozen=True)
class PstArm:
    """One row: `method` is a key of _RATES or of SCORES; the pattern of `dense` says nothing.

    Args:
        rate: one to try in place of the method's own.
    """

    method: str
    pattern: str
    seed: int
    rate: float | None = None

    @property
    def label(self) -> str:
        tried = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.method}, {self.pattern}, seed {self.seed}{tried}"


def arms(patterns: tuple[str, ...], seeds: int, *, ablation: bool) -> Iterator[PstArm]:
    """What the headline needs comes first, the plainer baselines last."""
    yield from (PstArm("dense", "none", seed) for seed in range(seeds))
    for pattern in patterns:
        scores = SCORES if ablation and pattern == "2:4" else ()
        for seed in range(seeds):
            yield from (PstArm(method, pattern, seed) for method in ("pst", "movement", *scores))
    for pattern in patterns:
        for seed in range(seeds):
            yield from (PstArm(method, pattern, seed) for method in ("magnitude", "lora-magnitude"))


def grid() -> Iterator[PstArm]:
    """Every method at every rate."""
    for rate in RATES:
        for method in METHODS:
            yield PstArm(method, "none" if method == "dense" else "2:4", 0, rate)


def settings_of(method: str, tried: float | None = None) -> tuple[str, LoopSettings, PstSettings]:
    """The method's name in the package, its loop and its settings; with the rate that is tried, if one is."""
    own = "pst" if method in SCORES else method
    rate, score, head = _RATES[own]
    rate = rate if tried is None else tried
    settings = PstSettings(score=SCORES[method]) if method in SCORES else PstSettings()
    return own, replace(_LOOP, learning_rate=rate), replace(settings, score_rate=score, head_rate=head)


def train_classifier(folder: Any, tokenizer: Any, task: Task, arm: PstArm, epochs: float) -> tuple[Any, dict[str, Any]]:
    """The fine-tuned model, and what its training cost."""
    from compressor.models import block_linears, load_classifier
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import LabelledSentences

    torch.manual_seed(arm.seed)  # of the head's first values
    model, head = load_classifier(folder, task.labels, torch.bfloat16)
    encoded = encode(tokenizer, task, task.train, LENGTH)
    return model, _train(model, LabelledSentences(encoded), block_linears(model), arm, Budget(epochs=epochs), head)  # type: ignore[arg-type]


def train_writer(
    folder: Any, tokenizer: Any, task: Task, arm: PstArm, epochs: float, work_dir: Path | None
) -> tuple[Any, dict[str, Any]]:
    """The same for a language model that writes answers; a run that was killed goes on from `work_dir`."""
    from compressor.models import block_linears, load_model
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import WrittenAnswers

    model = load_model(folder)
    objective = WrittenAnswers(encode(tokenizer, task, task.train, LENGTH))  # type: ignore[arg-type]
    return model, _train(model, objective, block_linears(model), arm, Budget(epochs=epochs), frozenset(), work_dir)


def _train(
    model: Any,
    objective: Any,
    linears: Mapping[str, Any],
    arm: PstArm,
    budget: Any,
    head: frozenset[str],
    work_dir: Path | None = None,
) -> dict[str, Any]:
    method, loop, settings = settings_of(arm.method, arm.rate)
    shape = MaskShape.parse("2:4" if arm.pattern == "none" else arm.pattern)
    what = TaskRun(method, shape, None, settings, head)
    loop = replace(loop, seed=arm.seed, checkpoint_minutes=_CHECKPOINT_MINUTES, keep_checkpoints=1)
    report = finetune(model, objective, linears, budget, what, loop=loop, work_dir=work_dir)
    return {
        "trained_parameters": report.trained_parameters,
        "optimizer_bytes": report.optimizer_bytes,
        "training_seconds": round(report.seconds, 1),
        "loss": round(report.metrics["total"], 4),
    }


def score_correlations(folder: Any, tokenizer: Any, task: Task, epochs: float) -> list[float]:
    """Rank correlation, layer by layer, of PST's learned score with the true sum of -G * W' over the same run."""
    from compressor.models import block_linears, load_classifier
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import LabelledSentences

    torch.manual_seed(0)
    model, head = load_classifier(folder, task.labels, torch.bfloat16)
    encoded = encode(tokenizer, task, task.train, LENGTH)
    _, loop, settings = settings_of("pst")
    what = TaskRun("pst", MaskShape(), None, settings, head)
    objective = LabelledSentences(encoded)  # type: ignore[arg-type]
    run, trainer = start(model, objective, block_linears(model), Budget(epochs=epochs), what, loop=loop)
    assert isinstance(trainer, Pst)
    for part in trainer.parts.values():
        part.track_movement()
    run.train()
    return [_rank_correlation(part.learned_score(), part.movement) for part in trainer.parts.values()]


def _rank_correlation(a: Tensor, b: Tensor | None) -> float:
    assert b is not None
    ranks = torch.stack([tensor.flatten().argsort().argsort().float() for tensor in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
