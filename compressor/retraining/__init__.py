"""Retraining of sparse weights against the dense teacher.

`retrain` runs a method of METHODS for a budget and leaves the model hard-pruned, verified, in its own dtype. Methods
differ in what they train and how a step updates it (ast.py); batches, loss, precision, schedules, resuming and
metrics are the loop's (loop.py).
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.calibration import blocks_of
from compressor.low_rank import LowRankBranch
from compressor.masks import MaskShape
from compressor.precision import compute_dtype
from compressor.retraining.ast import Ast, AstSettings, LowRankSettings, Snap
from compressor.retraining.cast import Cast, CastSettings
from compressor.retraining.distillation import text_loss
from compressor.retraining.distribution import distribution, shard
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
from compressor.retraining.optimizers import AdamSettings
from compressor.retraining.rollback import DivergedError
from compressor.retraining.schedules import Budget, Plan
from compressor.retraining.shards import whole
from compressor.retraining.snapshots import Snapshots
from compressor.retraining.text import TextDistillation

__all__ = [
    "METHODS",
    "AstSettings",
    "Budget",
    "CastSettings",
    "DivergedError",
    "LoopSettings",
    "LowRankSettings",
    "Objective",
    "RetrainingReport",
    "TextDistillation",
    "retrain",
    "text_loss",
]

log = logging.getLogger(__name__)

METHODS: dict[str, Callable[..., Ast | Cast]] = {"ast": Ast, "cast": Cast}


@dataclass(frozen=True)
class RetrainingReport:
    """What happened, for the model card; `low_rank` holds the trained branches by linear."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    precision: str
    validation_loss_before: float | None
    validation_loss: float | None
    metrics: dict[str, float]
    low_rank: dict[str, LowRankBranch] = field(repr=False, default_factory=dict)


def retrain(
    model: nn.Module,
    objective: Objective,
    linears: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    budget: Budget,
    *,
    loop: LoopSettings,
    settings: AstSettings | CastSettings,
    method: str = "ast",
    validation: Tensor | None = None,
    work_dir: Path | None = None,
    shapes: Mapping[str, MaskShape] | None = None,
    snap: Snap | None = None,
    progress: Progress | None = None,
) -> RetrainingReport:
    """Retrain `model` in place from one-shot masks; it ends hard-pruned, in the dtype it came in.

    Args:
        objective: what is trained on, for example TextDistillation.
        linears: the sparse linears by name; `masks` [O, I] under the same names, which the run takes over and changes.
        validation: text blocks [n, L] that are only measured.
        work_dir: where snapshots and metrics.jsonl are kept, so that a killed run goes on; None keeps nothing.
        shapes: of the masks, by the same names; 2:4 where not named.
        snap: the packed grid of a linear's values, for loop.quantize_share.
        progress: called after every step with the step, the total and the step's metrics.
    """
    _check(linears, masks, method)
    spread = distribution(loop.distribution)
    check_spread(spread, loop, (shapes or {}).values())
    given, names = model, list(linears)
    home, device = next(model.parameters()).device, training_device()
    model = model.to(device)
    spread.take_from_first([*model.parameters(), *masks.values()])
    before, dtype = next(model.parameters()).dtype, compute_dtype(loop.precision, device)
    record = {"loop": asdict(loop), "settings": asdict(settings), "method": method, "budget": asdict(budget)}
    snapshots = None
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        identity = identity_of(model, masks, objective.identity(), record)
        parts = spread.world if spread.sharded else 1
        snapshots = Snapshots(work_dir / "snapshots", identity, loop.keep_checkpoints, spread.rank, parts, spread.wait)
    blocks = blocks_of(model, linears)
    if spread.sharded:
        model = copy.deepcopy(model)
        shard(model, [model.get_submodule(name) for name in blocks])
        linears = {name: model.get_submodule(name) for name in names}
    adam = AdamSettings(loop.beta1, loop.beta2, loop.eps, loop.weight_decay)
    dense = _dense_parameters(model, linears, loop.train)
    model.eval().requires_grad_(False)
    trainer = METHODS[method](linears, masks, dense, settings, adam, dtype, snap, shapes)
    _cast(model, dtype)
    for entry in trainer.trained:
        entry.parameter.requires_grad_(True)
    objective.prepare(model, dtype)
    run = Run(
        model,
        objective,
        trainer,
        loop,
        Plan(budget, loop.batch * objective.tokens),
        snapshots,
        None if work_dir is None else work_dir / "metrics.jsonl",
        progress,
        spread,
    )
    with checkpointed([model.get_submodule(name) for name in blocks], loop.checkpoint_activations):
        report = _run(run, trainer, before, validation)
    if model is not given:
        with torch.no_grad():
            for target, source in zip(given.parameters(), model.parameters(), strict=True):
                target.copy_(whole(source))
    given.to(home)
    return report


def _run(run: Run, trainer: Ast | Cast, dtype: torch.dtype, validation: Tensor | None) -> RetrainingReport:
    started = time.monotonic()
    with plain_attention(run.model, run.objective.tokens):
        with trainer.pruned() if isinstance(trainer, Cast) else nullcontext():
            loss_before = None if validation is None else text_loss(run.model, validation)
        run.train()
        trainer.finish()
        loss_after = None if validation is None else text_loss(run.model, validation)
        trainer.detach()
    seconds, precision = run.plan.spent_seconds, next(run.model.parameters()).dtype
    _cast(run.model.requires_grad_(True), dtype)
    log.info("retrained %d steps in %.0f s", run.step, time.monotonic() - started)
    return RetrainingReport(
        steps=run.step,
        tokens=run.trained_tokens,
        seconds=seconds,
        tokens_per_second=run.trained_tokens / max(seconds, 1e-9),
        precision=str(precision).removeprefix("torch."),
        validation_loss_before=loss_before,
        validation_loss=loss_after,
        metrics=run.last,
        low_rank=trainer.branches,
    )


def _check(linears: Mapping[str, nn.Module], masks: Mapping[str, Tensor], method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"retraining method {method!r} given; accepted are {', '.join(METHODS)}")
    if not linears or linears.keys() != masks.keys():
        raise ValueError(f"{len(masks)} masks given for {len(linears)} linears; each sparse linear needs one")


def _dense_parameters(model: nn.Module, linears: Mapping[str, nn.Module], train: str) -> dict[str, nn.Parameter]:
    """What trains besides the sparse weights: norms, biases and dense linears, and with "all" embeddings and head."""
    sparse = {id(module.weight) for module in linears.values()}
    if train != "all":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for module in model.modules():
            if isinstance(module, nn.Embedding) or module is head:
                sparse |= {id(parameter) for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in sparse}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
