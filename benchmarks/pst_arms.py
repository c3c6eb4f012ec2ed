"""The arms of `python -m benchmarks pst`: one method, mask shape and seed each, fine-tuned under the same loop.

Rates are chosen on held-out *validation* sentences at 2:4 (`--grid`), and for PST the score's rate and the rank of U V
too; magnitude pruning takes the rate of dense fine-tuning. Batch, epochs, schedule and examples are everybody's. A
record's grid decides; where it has none, `PstArm` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.masks import MaskShape
from compressor.retraining.loop import LoopSettings, training_device
from compressor.retraining.pst import Pst, PstSettings
from compressor.retraining.pst_layer import TERMS
from compressor.retraining.task_training import TaskRun, finetune, start
from compressor.tasks import Task
from compressor.tasks.encoding import encode

PATTERNS = ("2:4", "50%", "90%")
BATCH = 32
WRITING_BATCH = 8  # with 2,000 examples, three epochs are then 750 steps, as many as of the sentences to class
LENGTH = 64
_CHECKPOINT_MINUTES = 3.0
# No arm is led back to a lower rate than it was given: movement pruning's first masks cost SmolLM2 some 20 nats.
_LOOP = LoopSettings(batch=BATCH, warmup=0.1, beta2=0.999, kl_weight=0.0, explosion=0.0)
# What --grid tries, for every method: learning rates of the weights, or of U V.
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
# And for PST: the score's, as a multiple of it, and the rank of U V. Movement's scores start at zero and only their
# order counts, so their rate changes nothing.
_SCORE_RATES, _RANKS = (0.1, 1.0), (8, 64)
_HEAD_RATE = 5.0
METHODS = ("dense", "movement", "pst", "magnitude", "lora-magnitude")
# PST on the model that dense fine-tuning made, which is its teacher too: `compress FINE_TUNED --recipe pst-...`.
DISTILLED = "pst from the fine-tuned model"
_DISTILLATION = (0.5, 2.0)  # weight of the teacher's answers, temperature
_LOW_RANK = ("pst", "lora-magnitude")
# The ablation: PST's score without one or both of its learned terms.
SCORES = {"pst |W'|": ("magnitude",), "pst |W'| + AB": ("magnitude", "low_rank")}
_AS = {**dict.fromkeys((*SCORES, DISTILLED), "pst"), "magnitude": "dense"}
"""{method: the one by whose grid it goes}: magnitude pruning trains what dense fine-tuning trains."""


@dataclass(frozen=True)
class PstArm:
    """One row: `method` is one of METHODS or of SCORES, or DISTILLED; the pattern of `dense` says nothing.

    Args:
        rate: of the weights, or of U V.
        score_rate: of the score's matrices, times the rate.
        rank: of U V.
    """

    method: str
    pattern: str
    seed: int
    rate: float = 3e-4
    score_rate: float = 0.5
    rank: int = 8

    @property
    def label(self) -> str:
        return f"{self.method}, {self.pattern}, seed {self.seed}"

    @property
    def tried(self) -> str:
        """The label of a row of the grid."""
        more = f", score {self.score_rate:g}" if self.method == "pst" else ""
        more += f", rank {self.rank}" if self.method in _LOW_RANK else ""
        return f"grid: {self.method}, {self.pattern}, rate {self.rate:g}{more}"


WRITING = PstArm("pst", "2:4", 0, rate=1e-4, score_rate=1.0)
"""The paper's rate and ranks of GPT-2 on E2E; the grid is of another model and task."""


def arms(patterns: tuple[str, ...], seeds: int, *, ablation: bool) -> Iterator[PstArm]:
    """What the headline needs comes first, the plainer baselines last."""
    yield from (PstArm("dense", "none", seed) for seed in range(seeds))
    for pattern in patterns:
        scores = SCORES if ablation and pattern == "2:4" else ()
        distilled = (DISTILLED,) if pattern == "2:4" else ()
        for seed in range(seeds):
            yield from (PstArm(method, pattern, seed) for method in ("pst", *distilled, "movement", *scores))
    for pattern in patterns:
        for seed in range(seeds):
            yield from (PstArm(method, pattern, seed) for method in ("magnitude", "lora-magnitude"))


def grid() -> Iterator[PstArm]:
    """Every method at every setting, but for those that take another's."""
    for method in (method for method in METHODS if method not in _AS):
        for rate in RATES:
            for rank in _RANKS if method in _LOW_RANK else _RANKS[:1]:
                for score in _SCORE_RATES if method == "pst" else (0.5,):
                    yield PstArm(method, "none" if method == "dense" else "2:4", 0, rate, score, rank)


def as_chosen(arm: PstArm, rows: Sequence[Mapping[str, Any]]) -> PstArm:
    """The arm with the settings that were best for its method in a record's grid, if it has one."""
    method = _AS.get(arm.method, arm.method)
    tried = [row for row in rows if row.get("kind") == "grid" and row["method"] == method]
    if not tried:
        return arm
    best = max(tried, key=lambda row: row["validation_accuracy"])
    return replace(arm, rate=best["rate"], score_rate=best["score_rate"], rank=best["rank"])


def settings_of(arm: PstArm) -> tuple[str, LoopSettings, PstSettings]:
    """The method's name in the package, its loop and its settings."""
    score = SCORES.get(arm.method, TERMS)
    settings = PstSettings(weight_rank=arm.rank, score=score, score_rate=arm.score_rate, head_rate=_HEAD_RATE)
    method = "pst" if arm.method in (*SCORES, DISTILLED) else arm.method
    return method, replace(_LOOP, learning_rate=arm.rate), settings


def train_classifier(
    folder: Any, tokenizer: Any, task: Task, arm: PstArm, epochs: float, *, dense: PstArm | None = None
) -> tuple[Any, dict[str, Any]]:
    """The fine-tuned model, and what its training cost, but for that of the `dense` arm from which it starts."""
    from compressor.models import block_linears, load_classifier
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import LabelledSentences, Teacher

    torch.manual_seed(arm.seed)  # of the head's first values
    model, head, _ = load_classifier(folder, task.labels, torch.bfloat16)
    encoded, teacher = encode(tokenizer, task, task.train, LENGTH), None
    if dense is not None:
        model, _ = train_classifier(folder, tokenizer, task, dense, epochs)
        teacher = Teacher(copy.deepcopy(model), *_DISTILLATION)
    objective = LabelledSentences(encoded, teacher)  # type: ignore[arg-type]
    return model, _train(model, objective, block_linears(model), arm, Budget(epochs=epochs), head)


def train_writer(
    folder: Any, tokenizer: Any, task: Task, arm: PstArm, epochs: float, work_dir: Path | None
) -> tuple[Any, dict[str, Any]]:
    """The same for a language model that writes answers; a run that was killed goes on from `work_dir`."""
    from compressor.models import block_linears, load_model
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import WrittenAnswers

    model = load_model(folder)
    objective = WrittenAnswers(encode(tokenizer, task, task.train, LENGTH))  # type: ignore[arg-type]
    linears, budget = block_linears(model), Budget(epochs=epochs)
    return model, _train(model, objective, linears, arm, budget, frozenset(), work_dir, batch=WRITING_BATCH)


def _train(
    model: Any,
    objective: Any,
    linears: Mapping[str, Any],
    arm: PstArm,
    budget: Any,
    head: frozenset[str],
    work_dir: Path | None = None,
    *,
    batch: int = BATCH,
) -> dict[str, Any]:
    method, loop, settings = settings_of(arm)
    shape = MaskShape.parse("2:4" if arm.pattern == "none" else arm.pattern)
    what = TaskRun(method, shape, None, settings, head)
    loop = replace(loop, batch=batch, seed=arm.seed, checkpoint_minutes=_CHECKPOINT_MINUTES, keep_checkpoints=1)
    report = finetune(model, objective, linears, budget, what, loop=loop, work_dir=work_dir)
    return {
        "trained_parameters": report.trained_parameters,
        "optimizer_bytes": report.optimizer_bytes,
        "training_seconds": round(report.seconds, 1),
        "loss": round(report.metrics["total"], 4),
    }


def score_correlations(folder: Any, tokenizer: Any, task: Task, arm: PstArm, epochs: float) -> list[float]:
    """Rank correlation, layer by layer, of PST's learned score with the true sum of -G * W' over the same run."""
    from compressor.models import block_linears, load_classifier
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import LabelledSentences

    torch.manual_seed(0)
    model, head, _ = load_classifier(folder, task.labels, torch.bfloat16)
    encoded = encode(tokenizer, task, task.train, LENGTH)
    _, loop, settings = settings_of(arm)
    what = TaskRun("pst", MaskShape(), None, settings, head)
    objective = LabelledSentences(encoded)  # type: ignore[arg-type]
    model.to(training_device())
    run, trainer = start(model, objective, block_linears(model), Budget(epochs=epochs), what, loop=loop)
    assert isinstance(trainer, Pst)
    for part in trainer.parts.values():
        part.track_movement()
    run.train()
    return [_rank_correlation(part.learned_score(), part.movement) for part in trainer.parts.values()]


def _rank_correlation(a: Tensor, b: Tensor | None) -> float:
    assert b is not None
    ranks = torch.stack([tensor.flatten().argsort().argsort().double() for tensor in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
