"""What PST is compared with, under the same loop: dense fine-tuning, magnitude and movement pruning, LoRA + magnitude.

`dense` trains everything and prunes nothing. `magnitude` trains everything and masks the smallest |W| of each layer
(Zhu & Gupta, arXiv 1710.01878). `movement` trains everything and, beside each weight, a score of its own
(Sanh et al., NeurIPS 2020, arXiv 2005.07683): with G = dL/d(M * W), dL/dS = G * W, so S adds up -G * W. Under both
dL/dW = M * G: a masked weight rests. Masks grow by the same cubic schedule. LoRA + magnitude is PST with |W'| alone as
its score and no gradient through it.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressor.calibration import weight_of
from compressor.masks import MaskShape
from compressor.retraining.optimizers import AdamSettings, Trained, adam_steps, train_dense, train_linear
from compressor.retraining.pst import PstSettings, Snap, growing_mask
from compressor.retraining.pst_layer import Small, clock, cubic, small

METHODS = ("pst", "dense", "magnitude", "movement", "lora-magnitude")


def lora_settings(settings: PstSettings) -> PstSettings:
    """PST's settings as LoRA + magnitude."""
    return replace(settings, score=("magnitude",), straight_through=False)


@dataclass
class _Sparse:
    """One linear that trains in full, with its score under movement pruning."""

    weight: Trained
    mask: Tensor
    score: Small | None = None


class FullTraining:
    """Everything trains; linears are pruned by `criterion`, or not at all.

    Args:
        linears: the linears to prune, by name.
        dense: every other parameter that trains.
        criterion: `dense`, `magnitude` or `movement`.
    """

    def __init__(
        self,
        criterion: str,
        linears: Mapping[str, nn.Module],
        dense: Mapping[str, nn.Parameter],
        shape: MaskShape,
        settings: PstSettings,
        adam: AdamSettings,
        *,
        head: frozenset[str] = frozenset(),
        snap: Snap | None = None,
    ) -> None:
        self.criterion, self.shape, self.settings = criterion, shape, settings
        self.adam = replace(adam, form="coupled")  # without a decay of masked weights that is plain Adam
        self.snap, self._head = snap, head
        self.sparse = {name: self._sparse(name, module) for name, module in linears.items()}
        self.dense = [train_dense(name, parameter, adam) for name, parameter in dense.items()]
        self._clock, self._spent = clock()

    def _sparse(self, name: str, module: nn.Module) -> _Sparse:
        weight = weight_of(module).detach()
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        zeros = torch.zeros(weight.shape, device=weight.device)
        score = small(f"{name}.score", zeros) if self.criterion == "movement" else None
        return _Sparse(train_linear(f"{name}.weight", module, mask, self.adam), mask, score)

    @property
    def trained(self) -> list[Trained]:
        weights = [layer.weight for layer in self.sparse.values()]
        return [*weights, *self.dense, *self._scores, self._clock]

    @property
    def _scores(self) -> list[Trained]:
        return [layer.score for layer in self.sparse.values() if layer.score is not None]

    def before_step(self, step: int) -> dict[str, float]:
        """A new mask when it is time."""
        if self.criterion == "dense" or step % self.settings.refresh_every:
            return {}
        return self.refresh(self._growth())

    def _growth(self) -> float:
        settings, final = self.settings, self.shape.sparsity
        spent = float(self._spent)
        wanted = cubic(spent, settings.initial_sparsity, final, settings.schedule_start, settings.schedule_end)
        return wanted / final

    @torch.no_grad()
    def refresh(self, grown: float) -> dict[str, float]:
        """Choose all masks; `grown` is the share of the final sparsity that is wanted by now."""
        changed = pruned = total = 0
        for layer in self.sparse.values():
            score = layer.weight.master.abs() if layer.score is None else layer.score.master
            mask = growing_mask(score, self.shape, grown)
            changed += int((layer.mask.view(torch.int8) ^ mask.view(torch.int8)).sum(dtype=torch.int64))
            layer.mask.copy_(mask)
            layer.weight.publish()
            pruned += mask.numel() - int(mask.view(torch.int8).sum(dtype=torch.int64))
            total += mask.numel()
        return {"sparsity": pruned / total, "flip_rate": changed / total}

    @torch.no_grad()
    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]:
        """One optimiser step on everything that trains."""
        for layer in self.sparse.values():
            gradient = layer.weight.gradient
            if gradient is None:
                continue
            if layer.score is not None:
                layer.score.gradient = gradient.float() * layer.weight.master
                own = rate * self.settings.score_rate  # one at a time: never do all their gradients exist
                adam_steps([layer.score], self.adam, step=step + 1, rate=own, decay=0.0, scale=scale)
            if self.criterion != "dense":
                gradient.mul_(layer.mask.view(torch.int8))  # dL/dW = M * G: what is masked does not move
        weights = [layer.weight for layer in self.sparse.values()]
        head = [entry for entry in self.dense if entry.name in self._head]
        rest = [entry for entry in self.dense if entry.name not in self._head]
        for entries, own in (([*weights, *rest], 1.0), (head, self.settings.head_rate)):
            adam_steps(entries, self.adam, step=step + 1, rate=rate * own, decay=0.0, scale=scale)
        self._spent.fill_(progress)
        return {}

    def weights(self) -> dict[str, Tensor]:
        """M * W of every linear, in bf16."""
        return {name: layer.weight.masked().to(torch.bfloat16) for name, layer in self.sparse.items()}

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None:
        """From now on the forward sees weights on the packed grids of these."""
        if self.snap is None:
            return
        for name, layer in self.sparse.items():
            layer.weight.transform = self.snap(name, weights[name].float())
            layer.weight.publish()

    @torch.no_grad()
    def finish(self) -> None:
        """Prune by the last mask, or by a final one where the run was too short to get there."""
        if self.criterion == "dense":
            return
        kept = [int(layer.mask.sum()) == self.shape.kept(layer.mask.numel()) for layer in self.sparse.values()]
        if self._growth() < 1.0 or not all(kept):
            self.refresh(1.0)
        for layer in self.sparse.values():
            layer.weight.publish()
            self.shape.check(layer.mask)
            self.shape.check_weight(layer.weight.masked())

    def detach(self) -> None:
        """Nothing was put on the model."""
