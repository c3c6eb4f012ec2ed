"""Scales of a quantised model trained end to end: E2E-QP of EfficientQAT (Chen et al., arXiv 2407.11062, section 3.2).

The grid values stay as they are, so that no weight can be rounded to the other side and back; one number for each group
of weights learns what the whole depth makes of all the rounding. A scale is `s * (1 + d)`, rounded to the dtype that it
is stored in, and d trains: rates are shares of a scale.

Unlike there, the teacher is the model as it was before it was rounded, and the loss is KL alone. The two are so near
that little noise is in the gradient, and nothing is learnt of the text but what rounding lost: against the dense model
and the text itself, held-out text of the same kind gained a third as much, and other text lost (docs/retraining.md).

Shapes: O out_features, I in_features, G groups a row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.calibration import blocks_of, is_conv1d, weight_of
from compressor.precision import compute_dtype
from compressor.quantizers import IntegerGrid
from compressor.retraining.distillation import text_loss
from compressor.retraining.loop import (
    LoopSettings,
    Progress,
    Run,
    checkpointed,
    identity_of,
    plain_attention,
    training_device,
)
from compressor.retraining.objective import Objective
from compressor.retraining.optimizers import AdamSettings, Trained, adam_steps
from compressor.retraining.reconstruction import computing_in
from compressor.retraining.schedules import Budget, Plan
from compressor.retraining.snapshots import Snapshots

log = logging.getLogger(__name__)

_ADAM = AdamSettings(form="coupled")


@dataclass(frozen=True)
class ScaleSettings:
    """How scales are trained.

    Args:
        samples: blocks of text, `batch` a step.
        learning_rate: Adam's, as a share of a scale.
    """

    samples: int = 128
    batch: int = 1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.samples, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError("samples, batch and learning_rate of scales must be above 0")


class GroupScales(Trained):
    """The scales of one weight: the master holds d [O, G], the parameter shows `values * scale`."""

    @classmethod
    def of(
        cls, name: str, module: nn.Module, grid: IntegerGrid, dtype: torch.dtype, device: torch.device
    ) -> GroupScales:
        """From a weight that lies on the grid, or is to.

        Args:
            dtype: in which scales are stored.
            device: where they train.
        """
        start = grid.scale.to(device)
        groups = weight_of(module).detach().to(device, torch.float32).unflatten(1, (start.shape[1], -1))
        values = (groups / start[:, :, None]).round_().clamp_(grid.lowest, grid.highest).to(torch.int8)
        d, momentum, variance = (torch.zeros_like(start) for _ in range(3))
        entry = cls(name, module.weight, is_conv1d(module), d, momentum, variance)  # type: ignore[arg-type]
        entry.start, entry.values, entry.dtype = start, values, dtype
        entry.transform = entry._shown
        return entry

    start: Tensor
    values: Tensor
    dtype: torch.dtype

    def scale(self, rows: slice = slice(None)) -> Tensor:
        """As it is stored [O, G]."""
        return (self.start[rows] * (1.0 + self.master[rows])).to(self.dtype)

    def _shown(self, _d: Tensor, rows: slice) -> Tensor:
        return (self.values[rows] * self.scale(rows).float()[:, :, None]).flatten(1)

    def take_gradient(self, several: bool) -> None:
        """The weight's gradient, summed over each group as far as it goes along the values."""
        before, self.gradient = self.gradient, None
        super().take_gradient(several=False)
        found = self.gradient
        if found is not None:
            along = found.unflatten(1, (self.start.shape[1], -1)).float().mul_(self.values).sum(2).mul_(self.start)
            self.gradient = along if before is None else before.add_(along)
        else:
            self.gradient = before


class ScaleTraining:
    """The method's part of a run: scales train, all else of the model is frozen."""

    def __init__(self, entries: list[GroupScales]) -> None:
        self.entries = entries

    @property
    def trained(self) -> list[Trained]:
        return list(self.entries)

    def before_step(self, step: int) -> dict[str, float]:
        return {}

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]:
        adam_steps(self.entries, _ADAM, step=step + 1, rate=rate, decay=0.0, scale=scale)
        return {}

    def weights(self) -> dict[str, Tensor]:
        return {}

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None:
        """Weights are on their grids from the start."""

    def finish(self) -> None:
        """Scales are what the forward saw last."""

    def detach(self) -> None:
        """Nothing hangs on the model."""


def train_scales(
    model: nn.Module,
    objective: Objective,
    linears: Mapping[str, nn.Module],
    grids: Mapping[str, IntegerGrid],
    dtypes: Mapping[str, torch.dtype],
    settings: ScaleSettings,
    *,
    loop: LoopSettings | None = None,
    seed: int = 0,
    validation: Tensor | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], float | None, float | None]:
    """Train the scales of weights that lie on their grids; the model ends on the new ones, in the dtype it came in.

    Scales that make the loss on `validation` worse are not kept.

    Args:
        linears: by name; `grids` their grids, and `dtypes` those that their scales are stored in, by the same names.
        loop: of the run before, whose precision, micro-batch, checkpointing of activations and minutes are kept.
        seed: of the order of the text.
        validation: text blocks [n, L] that are only measured.
        work_dir: where snapshots are kept, so that a killed run goes on.

    Returns:
        The scales [O, G] by name, and the validation loss before and after.
    """
    device = training_device()
    before = loop or LoopSettings()
    dtype = compute_dtype(before.precision, device)
    loop = LoopSettings(
        learning_rate=settings.learning_rate,
        batch=settings.batch,
        micro_batch=before.micro_batch if settings.batch % (before.micro_batch or 1) == 0 else None,
        precision=before.precision,
        checkpoint_minutes=before.checkpoint_minutes,
        checkpoint_activations=before.checkpoint_activations,
        keep_checkpoints=1,
        seed=seed,
    )
    blocks = [model.get_submodule(name) for name in blocks_of(model, linears)] if loop.checkpoint_activations else []
    snapshots = None
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        examples = (*objective.identity(), *(grids[name].scale for name in sorted(grids)))
        identity = identity_of(model, {}, examples, {"scales": asdict(settings), "loop": asdict(loop)})
        snapshots = Snapshots(work_dir / "snapshots", identity, loop.keep_checkpoints)
        snapshots.clear_others()
    method = ScaleTraining([GroupScales.of(name, linears[name], grids[name], dtypes[name], device) for name in grids])
    plan = Plan(Budget(tokens=settings.samples * objective.tokens), settings.batch * objective.tokens)
    with computing_in(model, device, dtype), plain_attention(model, objective.tokens):
        for entry in method.entries:
            entry.parameter.requires_grad_(True)
            entry.publish()
        objective.prepare(model, dtype)
        start = None if validation is None else text_loss(model, validation)
        with checkpointed(blocks, loop.checkpoint_activations):
            Run(model, objective, method, loop, plan, snapshots, None, progress).train()
        end = None if validation is None else text_loss(model, validation)
    if start is not None and end is not None and not end <= start:
        log.warning("training the scales made it worse (%.4f from %.4f); they stay as they were", end, start)
        end = start
        for entry in method.entries:
            entry.master.zero_()
    for entry in method.entries:
        entry.publish()
    return {entry.name: entry.scale().cpu() for entry in method.entries}, start, end
