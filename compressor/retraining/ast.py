"""AST, the Adaptive Sparse Trainer (Huang et al., AAAI-25, arXiv 2407.20584).

Sparse weights train dense. The forward uses M*W, the gradient reaches all of W (straight-through), a decay that
ramps up draws masked weights to zero, and every few steps, before the step, the mask is chosen anew by |W|: weights
that the decay could not hold come back, others leave.

Published settings, for scale (GPT-2 / LLaMA2-7B): rate 2e-4 / 2e-5, lambda 1e-4 / 6e-5 reached after 25 % / 20 %
of the steps, KL weight 0.67 / 0.33, T = 2, weight decay 0.1 / 0, betas (0.9, 0.95), clip 1, refresh every 10
steps, form decoupled / coupled, from the magnitude mask with the dense weights kept under it (`masked_start` 1).

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressor import kernels
from compressor.calibration import is_conv1d, weight_of
from compressor.kernels import training
from compressor.low_rank import INITS, LowRankBranch, initial_branch
from compressor.masks import TWO_OF_FOUR, MaskShape, flip_rate
from compressor.retraining.optimizers import (
    FORMS,
    AdamSettings,
    Trained,
    Transform,
    adam_steps,
    train_dense,
    train_linear,
)
from compressor.retraining.schedules import ramp
from compressor.retraining.shards import shard_like, whole

# From a linear's name and its M*W [O, I], what the forward is to see of it once it is quantised.
Snap = Callable[[str, Tensor], Transform]


@dataclass(frozen=True)
class LowRankSettings:
    """SLoRB; `projection` trains X as the paper's runs do, `int8` trains S on the grid it is stored on."""

    segment: int = 16
    init: str = "mean"
    projection: bool = False
    int8: bool = True

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"low-rank init {self.init!r} given; accepted are {', '.join(INITS)}")
        if self.init == "svd" and not self.projection:
            raise ValueError(
                "low-rank init 'svd' starts the projection X too, which must be trained then: set low_rank.projection "
                "to true, or take init mean, sum or zero"
            )


@dataclass(frozen=True)
class AstSettings:
    """What AST adds to the loop. Defaults are for budgets of 10^5 to 10^6 tokens.

    Args:
        mask_decay: lambda, reached after the share `mask_decay_ramp` of the budget.
        form: where the decay enters Adam, "decoupled" or "coupled".
        refresh_every: steps between mask refreshes; 0 keeps the first mask.
        masked_start: what masked weights start as, times their dense value. 1 is the paper's; with 0 the first
            refresh cannot throw away a mask that was chosen by more than magnitude.
    """

    mask_decay: float = 1e-4
    mask_decay_ramp: float = 0.25
    form: str = "coupled"
    refresh_every: int = 10
    masked_start: float = 0.0
    low_rank: LowRankSettings | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} given; accepted are {', '.join(FORMS)}")
        if self.mask_decay < 0 or not 0 < self.mask_decay_ramp <= 1 or self.refresh_every < 0:
            raise ValueError("mask_decay and refresh_every must not be negative, mask_decay_ramp be in (0, 1]")


class Ast:
    """The method's part of a run: which tensors train, and what happens before and at an optimiser step."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        masks: Mapping[str, Tensor],
        dense: Mapping[str, nn.Parameter],
        settings: AstSettings,
        adam: AdamSettings,
        dtype: torch.dtype,
        snap: Snap | None = None,
        shapes: Mapping[str, MaskShape] | None = None,
    ) -> None:
        self.snap = snap
        self.shapes = {name: (shapes or {}).get(name, TWO_OF_FOUR) for name in linears}
        self.settings, self.adam, self.linears = settings, replace(adam, form=settings.form), linears
        self.sparse: dict[str, Trained] = {}
        self.branches: dict[str, LowRankBranch] = {}
        self._detach: list[Callable[[], None]] = []
        for name, module in linears.items():
            self.shapes[name].check(masks[name])
            mask = masks[name].to(weight_of(module).device).contiguous()
            if settings.low_rank is not None:
                self._add_branch(name, module, mask, settings.low_rank, dtype)
            mask = own_part(mask, module)
            module.register_buffer("weight_mask", mask, persistent=False)
            entry = train_linear(f"{name}.weight", module, mask, adam)
            kept = entry.kept()
            entry.master.mul_(kept + (1.0 - kept) * settings.masked_start)
            entry.publish()
            self.sparse[name] = entry
        self.dense = [train_dense(name, parameter, adam) for name, parameter in dense.items()]
        self.dense += [
            train_dense(f"{name}.low_rank.{part}", parameter, adam)
            for name, branch in self.branches.items()
            for part, parameter in branch.named_parameters()
        ]

    def _add_branch(
        self, name: str, module: nn.Module, mask: Tensor, settings: LowRankSettings, dtype: torch.dtype
    ) -> None:
        s, x = initial_branch(whole(weight_of(module).detach()), mask, settings.segment, settings.init)
        projection = x if settings.projection else None
        branch = LowRankBranch(s, settings.segment, dtype=dtype, x=projection, int8=settings.int8)
        self.branches[name] = branch
        self._detach.append(branch.attach(module))

    @property
    def trained(self) -> list[Trained]:
        return [*self.sparse.values(), *self.dense]

    def before_step(self, step: int) -> dict[str, float]:
        """Refresh the masks when it is time, and tell how they moved. The loop counts steps, not forward calls."""
        every = self.settings.refresh_every
        if not every or step == 0 or step % every or not self.sparse:
            return {}
        found = [self._refresh(name) for name in self.sparse]
        changed, kept, total = (sum(values) for values in zip(*found, strict=True))
        weights = sum(entry.master.numel() for entry in self.sparse.values())
        count = sum(self.shapes[name].kept(entry.master.numel()) for name, entry in self.sparse.items())
        means = {"mean_kept": kept / count, "mean_masked": (total - kept) / (weights - count)}
        return {"flip_rate": changed / weights, **means}

    @torch.no_grad()
    def _refresh(self, name: str) -> tuple[float, float, float]:
        """Mask bits that changed, and sums of |w| of the kept weights and of all."""
        entry, shape = self.sparse[name], self.shapes[name]
        assert entry.mask is not None
        if shape == TWO_OF_FOUR and kernels.available() and entry.master.device.type == "cpu":
            direct = entry.transform is None and entry.visible.is_contiguous()
            found = training.refresh(entry.master, entry.mask, entry.visible if direct else None)
            if found[0] and not direct:
                entry.publish()
            return found
        size = entry.master.abs()
        mask = shape.mask(size)
        rate = flip_rate(entry.mask, mask)
        if rate:
            entry.mask.copy_(mask)
            entry.publish()
        total = float(size.sum())
        return rate * size.numel(), float(size.mul_(entry.kept()).sum()), total

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]:
        """One optimiser step on everything that trains."""
        decay = ramp(progress, self.settings.mask_decay, self.settings.mask_decay_ramp)
        adam_steps(self.trained, self.adam, step=step + 1, rate=rate, decay=decay, scale=scale)
        return {"mask_decay": decay}

    def weights(self) -> dict[str, Tensor]:
        """M*W of every sparse linear, in bf16."""
        return {name: entry.masked().to(torch.bfloat16) for name, entry in self.sparse.items()}

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None:
        """From now on the forward sees weights on the packed grids of these; the masters stay what is trained."""
        if self.snap is None:
            return
        for name, entry in self.sparse.items():
            entry.transform = self.snap(name, weights[name].to(torch.float32))
            entry.publish()

    @torch.no_grad()
    def finish(self) -> None:
        """Hard prune by the final mask and prove it."""
        for name, entry in self.sparse.items():
            entry.publish()
            if entry.mask is not self.linears[name].weight_mask:
                raise RuntimeError(f"{name} lost its mask during training; its weights cannot be trusted to be sparse")
            self.shapes[name].check(entry.mask)
            self.shapes[name].check_weight(entry.visible)

    def detach(self) -> None:
        """Take everything of the method off the model, whose weights are now plain sparse ones."""
        for module in self.linears.values():
            del module.weight_mask
        for detach in self._detach:
            detach()


def own_part(mask: Tensor, module: nn.Module) -> Tensor:
    """The part of a mask that goes with this process's part of the weight."""
    return shard_like(mask, module.weight, is_conv1d(module))  # type: ignore[arg-type]
