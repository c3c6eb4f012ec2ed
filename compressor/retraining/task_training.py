"""Fine-tune a model for a task while pruning it: PST, or one of the methods that it is compared with.

The loop, its schedules, resuming and metrics are those of retraining; the objective is the task's, and the method
decides what trains. PST and LoRA train their small matrices and the task's head; the others train everything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.calibration import blocks_of
from compressor.masks import TWO_OF_FOUR, MaskShape
from compressor.precision import compute_dtype
from compressor.retraining.distribution import distribution
from compressor.retraining.loop import (
    LoopSettings,
    Progress,
    Run,
    check_spread,
    checkpointed,
    identity_of,
    plain_attention,
    training_device,
)
from compressor.retraining.objective import Objective
from compressor.retraining.optimizers import AdamSettings, Trained
from compressor.retraining.pst import Pst, PstSettings, Snap
from compressor.retraining.rows_and_heads import Structures
from compressor.retraining.schedules import Budget, Plan
from compressor.retraining.snapshots import Snapshots
from compressor.retraining.task_methods import METHODS, FullTraining, lora_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRun:
    """What is to be trained, beside the model and its examples.

    Args:
        method: a name in METHODS.
        shape: which masks are possible.
        structures: whole rows and heads instead; for PST only.
        head: names of the parameters that the task brought, which train under every method.
    """

    method: str = "pst"
    shape: MaskShape = TWO_OF_FOUR
    structures: Structures | None = None
    settings: PstSettings = field(default_factory=PstSettings)
    head: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"task method {self.method!r} given; accepted are {', '.join(METHODS)}")
        if self.structures is not None and self.method not in ("pst", "lora-magnitude"):
            raise ValueError(f"rows and heads are pruned by pst only, not by {self.method!r}")
        final = self.shape.sparsity if self.structures is None else self.structures.pruned
        initial = self.settings.initial_sparsity
        if initial > final:
            raise ValueError(f"initial_sparsity {initial} given; it must not exceed {final:g}, the final one")


@dataclass(frozen=True)
class FinetuningReport:
    """What happened, for the model card; `trainer` still holds the small matrices and the scores."""

    steps: int
    seconds: float
    precision: str
    parameters: int
    trained_parameters: int
    optimizer_bytes: int
    metrics: dict[str, float]
    trainer: Pst | FullTraining = field(repr=False)

    @property
    def trained_share(self) -> float:
        """Trained parameters over those of the dense model."""
        return self.trained_parameters / self.parameters


def finetune(
    model: nn.Module,
    objective: Objective,
    linears: Mapping[str, nn.Module],
    budget: Budget,
    what: TaskRun,
    *,
    loop: LoopSettings,
    work_dir: Path | None = None,
    snap: Snap | None = None,
    progress: Progress | None = None,
) -> FinetuningReport:
    """Fine-tune `model` in place; it ends as a plain model, as sparse as the method makes it, in the dtype it came in.

    Args:
        linears: the linears to prune, by name.
        work_dir: where snapshots and metrics.jsonl are kept, so that a killed run goes on; None keeps nothing.
        snap: the packed grid of a linear's values, for loop.quantize_share.
    """
    before, home = next(model.parameters()).dtype, next(model.parameters()).device
    model.to(training_device())
    spread = distribution(loop.distribution)
    check_spread(spread, loop, for_task=True)
    spread.take_from_first(model.parameters())
    snapshots = None
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        named = repr(replace(what, head=frozenset())), sorted(what.head)  # a set's order differs from run to run
        record = {"loop": asdict(loop), "what": named, "budget": asdict(budget)}
        identity = identity_of(model, {}, objective.identity(), record)
        snapshots = Snapshots(work_dir / "snapshots", identity, loop.keep_checkpoints, spread.rank, 1, spread.wait)
    run, trainer = start(
        model,
        objective,
        linears,
        budget,
        what,
        loop=loop,
        snap=snap,
        snapshots=snapshots,
        metrics_file=None if work_dir is None else work_dir / "metrics.jsonl",
        progress=progress,
        distribution=spread,
    )
    blocks = [model.get_submodule(name) for name in blocks_of(model, linears)]
    with plain_attention(model, objective.tokens), checkpointed(blocks, loop.checkpoint_activations):
        run.train()
    trainer.finish()
    trainer.detach()
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    _cast(model.requires_grad_(True).to(home), before)
    log.info("fine-tuned %d steps in %.0f s", run.step, run.plan.spent_seconds)
    trained, state = sizes(trainer.trained)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return FinetuningReport(run.step, run.plan.spent_seconds, precision, parameters, trained, state, run.last, trainer)


def start(
    model: nn.Module,
    objective: Objective,
    linears: Mapping[str, nn.Module],
    budget: Budget,
    what: TaskRun,
    *,
    loop: LoopSettings,
    snap: Snap | None = None,
    **watched: Any,
) -> tuple[Run, Pst | FullTraining]:
    """A run at its first step, and its method; `watched` are the run's snapshots, progress and the like."""
    dtype = compute_dtype(loop.precision, next(model.parameters()).device)
    model.eval().requires_grad_(False)
    trainer = _trainer(model, linears, what, loop, snap)
    _cast(model, dtype)
    if isinstance(trainer, Pst):
        trainer.cast(dtype)
    for entry in trainer.trained:
        entry.parameter.requires_grad_(True)
    objective.prepare(model, dtype)
    budget = budget.resolved(objective.count, objective.tokens, loop.batch)
    return Run(model, objective, trainer, loop, Plan(budget, loop.batch * objective.tokens), **watched), trainer


def _trainer(
    model: nn.Module, linears: Mapping[str, nn.Module], what: TaskRun, loop: LoopSettings, snap: Snap | None
) -> Pst | FullTraining:
    adam = AdamSettings(loop.beta1, loop.beta2, loop.eps, loop.weight_decay)
    sparse = {id(module.weight) for module in linears.values()}
    others = {name: p for name, p in model.named_parameters() if id(p) not in sparse}
    if what.method not in ("pst", "lora-magnitude"):
        return FullTraining(what.method, linears, others, what.shape, what.settings, adam, head=what.head, snap=snap)
    settings = what.settings if what.method == "pst" else lora_settings(what.settings)
    head = {name: parameter for name, parameter in others.items() if name in what.head}
    return Pst(linears, head, what.shape, settings, adam, structures=what.structures, seed=loop.seed or 0, snap=snap)


def sizes(entries: Iterable[Trained]) -> tuple[int, int]:
    """Numbers that train, and bytes that the optimiser keeps for them: fp32 copy and both moments."""
    trained = state = 0
    for entry in entries:
        trained += entry.master.numel()
        state += entry.momentum.nbytes + entry.variance.nbytes
        state += 0 if entry.master.data_ptr() == entry.parameter.data_ptr() else entry.master.nbytes
    return trained, state


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
