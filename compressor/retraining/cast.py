"""CAST, continuous and differentiable 2:4 training (arXiv 2509.25996), with its optimiser AdamS.

The forward is dense all along; the mask, chosen anew by |W| every few steps, acts in the optimiser alone, where an L1
decay takes over from the loss gradient on masked weights as the run goes on:

    mu  = b1*mu + (1-b1)*g                                   # all weights, loss gradient only
    mu~ = (1-a)*mu + a*lambda*sign(W)  on masked, mu on kept # a = progress; never written back into mu
    v   = b2*v + (1-b2)*mu~^2
    W   = W - rate * (mu~/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)

Once the decay dominates, a masked weight moves by about `rate` a step towards zero whatever lambda is, and ends within
about the final rate of it: rates must add up to more than the weights' size, and end small. One hard prune follows, and
the scales of the halves of each row, trained along, are folded into the weights.

Published settings (LLaMA2-7B): rate 2e-5, lambda 4e-7, KL weight 1/3, 7,500 steps of 256 x 4,096 tokens.

Shapes: O out_features, I in_features, P parts of a row, B rows of one block.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.calibration import weight_of
from compressor.low_rank import LowRankBranch
from compressor.masks import TWO_OF_FOUR, MaskShape, flip_rate
from compressor.retraining.ast import Snap, own_part
from compressor.retraining.optimizers import AdamSettings, Trained, adam_step, row_blocks, train_dense, train_linear


@dataclass(frozen=True)
class CastSettings:
    """What CAST adds to the loop.

    Args:
        l1_decay: lambda. It takes over where it outweighs (1-a)*mu: gradients of a small model are larger than those of
            the published run by far, and need a larger one (SmolLM2-135M: about 1e-4).
        refresh_every: steps between mask refreshes; 0 keeps the first mask.
        row_parts: scales per row, each for an equal part of its inputs; 0 trains none.
    """

    l1_decay: float = 4e-7
    refresh_every: int = 10
    row_parts: int = 2

    def __post_init__(self) -> None:
        if self.l1_decay <= 0 or self.refresh_every < 0 or self.row_parts < 0:
            raise ValueError("l1_decay must be above 0, refresh_every and row_parts must not be negative")


class Cast:
    """The method's part of a run."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        masks: Mapping[str, Tensor],
        dense: Mapping[str, nn.Parameter],
        settings: CastSettings,
        adam: AdamSettings,
        dtype: torch.dtype,
        snap: Snap | None = None,
        shapes: Mapping[str, MaskShape] | None = None,
    ) -> None:
        self.shapes = {name: (shapes or {}).get(name, TWO_OF_FOUR) for name in linears}
        self.settings, self.adam, self.snap, self.linears = settings, adam, snap, linears
        self.branches: dict[str, LowRankBranch] = {}
        self.sparse: dict[str, Trained] = {}
        self.scales: dict[str, Trained] = {}
        for name, module in linears.items():
            self.shapes[name].check(masks[name])
            mask = own_part(masks[name].to(weight_of(module).device).contiguous(), module)
            entry = train_linear(f"{name}.weight", module, mask, adam)
            entry.prunes = False
            if settings.row_parts:
                self._add_scale(name, entry)
            entry.publish()
            self.sparse[name] = entry
        self.dense = [train_dense(name, parameter, adam) for name, parameter in dense.items()]

    def _add_scale(self, name: str, entry: Trained) -> None:
        rows, columns = entry.master.shape
        if columns % self.settings.row_parts:
            raise ValueError(f"row_parts {self.settings.row_parts} given; {name} has {columns} inputs to divide")
        ones = nn.Parameter(torch.ones(rows, self.settings.row_parts, device=entry.master.device))
        scale = train_dense(f"{name}.row_scale", ones, self.adam)
        scale.decays = False
        entry.transform = lambda values, block: _scaled(values, scale.master[block])
        self.scales[name] = scale

    @property
    def trained(self) -> list[Trained]:
        return [*self.sparse.values(), *self.scales.values(), *self.dense]

    def before_step(self, step: int) -> dict[str, float]:
        """Choose the masks anew when it is time. The forward does not see them."""
        every = self.settings.refresh_every
        if not every or step == 0 or step % every:
            return {}
        flipped = kept = total = 0.0
        size = sum(entry.master.numel() for entry in self.sparse.values())
        for name, entry in self.sparse.items():
            magnitude = entry.master.abs()
            mask = self.shapes[name].mask(magnitude)
            assert entry.mask is not None
            flipped += flip_rate(entry.mask, mask) * mask.numel()
            entry.mask.copy_(mask)
            total += float(magnitude.sum())
            kept += float(magnitude.mul_(entry.kept()).sum())
        count = sum(self.shapes[name].kept(entry.master.numel()) for name, entry in self.sparse.items())
        means = {"mean_kept": kept / count, "mean_masked": (total - kept) / (size - count)}
        return {"flip_rate": flipped / size, **means}

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]:
        """One step of AdamS on sparse weights, of AdamW on all else."""
        for name, entry in self.sparse.items():
            self._update(entry, self.scales.get(name), step + 1, progress, rate, scale)
        for entry in [*self.scales.values(), *self.dense]:
            factor = 1.0 if entry.name.endswith(".row_scale") else scale
            adam_step(entry, self.adam, step=step + 1, rate=rate, decay=0.0, scale=factor)
        for name in self.scales:
            self.sparse[name].publish()
        return {"takeover": progress}

    @torch.no_grad()
    def _update(
        self, entry: Trained, row_scale: Trained | None, step: int, takeover: float, rate: float, clip: float
    ) -> None:
        if entry.gradient is None:
            return
        slopes = []
        for rows in row_blocks(entry.master):
            g = entry.gradient[rows].to(torch.float32) * clip
            if row_scale is not None:
                parts = row_scale.master.shape[1]
                slopes.append((g * entry.master[rows]).unflatten(1, (parts, -1)).sum(dim=-1))
                g = _scaled(g, row_scale.master[rows])
            self._adam_s(entry, g, rows, step, takeover, rate)
            if row_scale is None:
                entry.publish(rows)
        if row_scale is not None:
            row_scale.gradient = torch.cat(slopes)
        entry.gradient = None

    def _adam_s(self, entry: Trained, g: Tensor, rows: slice, step: int, takeover: float, rate: float) -> None:
        adam = self.adam
        w, m, v = entry.master[rows], entry.momentum[rows], entry.variance[rows]
        m.lerp_(g, 1.0 - adam.beta1)
        pulled = w.sign().mul_(self.settings.l1_decay).lerp(m, 1.0 - takeover)
        u = m + (pulled - m).mul_(1.0 - entry.kept(rows))
        v.mul_(adam.beta2).addcmul_(u, u, value=1.0 - adam.beta2)
        root = v.sqrt().div_(math.sqrt(1.0 - adam.beta2**step)).add_(adam.eps)
        if entry.decays:
            w.mul_(1.0 - rate * adam.weight_decay)
        w.addcdiv_(u, root, value=-rate / (1.0 - adam.beta1**step))

    @contextmanager
    def pruned(self) -> Iterator[None]:
        """Inside, the forward sees M*W, as it is left at the end."""
        self._show(pruned=True)
        yield
        self._show(pruned=False)

    def _show(self, *, pruned: bool) -> None:
        for entry in self.sparse.values():
            entry.prunes = pruned
            entry.publish()

    def weights(self) -> dict[str, Tensor]:
        """The scaled M*W of every sparse linear, in bf16."""
        return {name: self._folded(name).to(torch.bfloat16) for name in self.sparse}

    def _folded(self, name: str) -> Tensor:
        entry = self.sparse[name]
        masked = entry.masked()
        return _scaled(masked, self.scales[name].master) if name in self.scales else masked

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None:
        """From now on the forward sees pruned weights on the packed grids of these: the hard prune comes here."""
        if self.snap is None:
            return
        for name, entry in self.sparse.items():
            snapped, before = self.snap(name, weights[name].to(torch.float32)), entry.transform
            entry.prunes = True
            entry.transform = lambda values, rows, snapped=snapped, before=before: snapped(
                values if before is None else before(values, rows), rows
            )
            entry.publish()

    @torch.no_grad()
    def finish(self) -> None:
        """The hard prune, with the row scales folded in."""
        for name, entry in self.sparse.items():
            shape = self.shapes[name]
            assert entry.mask is not None
            if self.settings.refresh_every and not entry.prunes:
                entry.mask.copy_(shape.mask(entry.master.abs()))
            shape.check(entry.mask)
            entry.prunes = True
            entry.publish()
            shape.check_weight(entry.visible)

    def detach(self) -> None:
        """Nothing hangs on the model."""


def _scaled(values_BI: Tensor, scale_BP: Tensor) -> Tensor:
    """Each part of a row times its scale."""
    scaled: Tensor = (values_BI.unflatten(1, (scale_BP.shape[1], -1)) * scale_BP.unsqueeze(-1)).flatten(1)
    return scaled
