"""PST, parameter-efficient sparsity (Li et al., IJCAI-22, arXiv 2205.11005): fine-tune and prune, 1.5 % of it trained.

Dense weights stay frozen. Beside each linear small matrices train: U V, which change the weight, and A B, R and C,
which with |W'| make the score that chooses the mask (pst_layer.py has the formulas). Sparsity grows by a cubic
schedule; at the end M * W' is written back and the small matrices are gone: a plain sparse model.

Masks come in three kinds on the same score: a share of each layer's weights (the paper), n of every m (2:4, what our
formats pack), or whole rows and heads (our extension, rows_and_heads.py). An n:m mask grows too: of the weights that
the final pattern would drop, those with the lowest scores go first.

Published settings, for scale: ranks 8 and 8, alpha1 = alpha2 = beta = 1; BERT-base on GLUE at rate 3e-5, batch 32,
20 epochs; GPT-2 on E2E at 1e-4, 5 epochs, label smoothing 0.1. Short runs need higher rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.masks import MaskShape
from compressor.retraining.optimizers import AdamSettings, Trained, Transform, adam_steps, train_dense
from compressor.retraining.pst_layer import TERMS, ScoredLinear, Terms, clock, cubic, scored_parts
from compressor.retraining.rows_and_heads import Structures

Snap = Callable[[str, Tensor], Transform]


@dataclass(frozen=True)
class PstSettings:
    """What PST adds to the loop.

    Args:
        weight_rank, score_rank: of U V and of A B.
        alpha1, alpha2, beta: weights of A B, of R + C and of U V.
        score: terms of the score, of `magnitude`, `low_rank`, `rows_columns`.
        straight_through: whether |W'| in the score passes a gradient on to U V.
        score_rate, head_rate: learning rates of the score's matrices and of the task's head, times the loop's.
        schedule_start, schedule_end: shares of the budget before the sparsity grows, and after.
        initial_sparsity: at the start.
        refresh_every: steps between masks.
    """

    weight_rank: int = 8
    score_rank: int = 8
    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    score: tuple[str, ...] = TERMS
    straight_through: bool = True
    score_rate: float = 1.0
    head_rate: float = 1.0
    schedule_start: float = 0.1
    schedule_end: float = 0.3
    initial_sparsity: float = 0.0
    refresh_every: int = 10

    def __post_init__(self) -> None:
        unknown = [term for term in self.score if term not in TERMS]
        if unknown or not self.score:
            raise ValueError(f"score terms {list(self.score)} given; accepted are one or more of {', '.join(TERMS)}")
        if self.weight_rank < 1 or self.score_rank < 1 or self.refresh_every < 1:
            raise ValueError("weight_rank, score_rank and refresh_every must be at least 1")
        if self.schedule_start < 0 or self.schedule_end < 0 or self.schedule_start + self.schedule_end >= 1:
            raise ValueError("schedule_start and schedule_end are shares of the budget, together below 1")
        if not 0 <= self.initial_sparsity < 1:
            raise ValueError(f"initial_sparsity {self.initial_sparsity} given; it must lie in [0, 1)")

    @property
    def terms(self) -> Terms:
        """What one layer must know."""
        return Terms(
            self.weight_rank, self.score_rank, self.alpha1, self.alpha2, self.beta, self.score, self.straight_through
        )


class Pst:
    """The method's part of a run.

    Args:
        linears: the linears to prune, by name.
        head: parameters that train as they are: the task's head.
        shape: which masks are possible; with `structures`, their share of rows and heads is pruned instead.
        seed: of U and A.
        snap: the packed grid of a linear's values, for loop.quantize_share.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        head: Mapping[str, nn.Parameter],
        shape: MaskShape,
        settings: PstSettings,
        adam: AdamSettings,
        *,
        structures: Structures | None = None,
        seed: int = 0,
        snap: Snap | None = None,
    ) -> None:
        self.settings, self.adam, self.shape, self.snap = settings, adam, shape, snap
        self.structures = structures
        generator = torch.Generator().manual_seed(seed)
        terms = settings.terms
        self.layers = {name: scored_parts(name, module, terms, generator) for name, module in linears.items()}
        self.parts: dict[str, ScoredLinear] = {part.name: part for parts in self.layers.values() for part in parts}
        self.head = [train_dense(name, parameter, adam) for name, parameter in head.items()]
        self._clock, self._spent = clock()
        self._hooks = [self._hook(linears[name], parts) for name, parts in self.layers.items()]

    def _hook(self, module: nn.Module, parts: list[ScoredLinear]) -> Callable[[], None]:
        """Let autograd compute G for this linear, use it and drop it."""
        weight = module.weight
        assert isinstance(weight, nn.Parameter)

        def consume(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            if gradient is not None:
                for part in parts:
                    part.project(gradient)

        weight.requires_grad_(True)
        return weight.register_post_accumulate_grad_hook(consume).remove

    @property
    def factors(self) -> list[Trained]:
        """The small matrices."""
        return [factor for part in self.parts.values() for factor in part.factors.values()]

    @property
    def trained(self) -> list[Trained]:
        return [*self.factors, *self.head, self._clock]

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the frozen weights in the compute dtype."""
        for part in self.parts.values():
            part.cast(dtype)

    def sparsity(self, progress: float) -> float:
        """Share of the final sparsity that is wanted by now, in [0, 1]."""
        settings = self.settings
        final = self._final_sparsity()
        wanted = cubic(progress, settings.initial_sparsity, final, settings.schedule_start, settings.schedule_end)
        return wanted / final

    def _final_sparsity(self) -> float:
        return self.shape.sparsity if self.structures is None else self.structures.pruned

    def before_step(self, step: int) -> dict[str, float]:
        """A new mask when it is time; the forward then sees M * W'."""
        metrics = {}
        if step % self.settings.refresh_every == 0:
            metrics = self.refresh(self.sparsity(float(self._spent)))
        for part in self.parts.values():
            part.publish()
        return metrics

    @torch.no_grad()
    def refresh(self, grown: float) -> dict[str, float]:
        """Choose all masks by the scores; `grown` is the share of the final sparsity that is wanted by now."""
        changed = pruned = total = 0
        for name, mask in self._masks(grown):
            part = self.parts[name]
            changed += int((part.mask.view(torch.int8) ^ mask.view(torch.int8)).sum(dtype=torch.int64))
            part.mask.copy_(mask)
            pruned += mask.numel() - int(mask.view(torch.int8).sum(dtype=torch.int64))
            total += mask.numel()
        return {"sparsity": pruned / total, "flip_rate": changed / total}

    def _masks(self, grown: float) -> list[tuple[str, Tensor]]:
        if self.structures is not None:
            return list(self.structures.masks({name: part.score() for name, part in self.parts.items()}, grown))
        return [(name, growing_mask(part.score(), self.shape, grown)) for name, part in self.parts.items()]

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]:
        """One optimiser step on the small matrices and the head."""
        settings, groups = self.settings, dict[float, list[Trained]]()
        for part in self.parts.values():
            for key, factor in part.factors.items():
                own = 1.0 if key in ("u", "v") else settings.score_rate
                groups.setdefault(own, []).append(factor)
        groups.setdefault(settings.head_rate, []).extend(self.head)
        for own, entries in groups.items():
            adam_steps(entries, self.adam, step=step + 1, rate=rate * own, decay=0.0, scale=scale)
        self._spent.fill_(progress)
        return {}

    def weights(self) -> dict[str, Tensor]:
        """M * W' of every linear, in bf16."""
        return {
            name: torch.cat([part.masked().to(torch.bfloat16) for part in parts]) for name, parts in self.layers.items()
        }

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None:
        """From now on the forward sees weights on the packed grids of these."""
        if self.snap is None:
            return
        for name, parts in self.layers.items():
            transform = self.snap(name, weights[name].float())
            for part in parts:
                part.transform = _shifted(transform, part.rows.start)

    @torch.no_grad()
    def finish(self) -> None:
        """Write M * W' back and prove that it is as sparse as promised; a run too short to get there is pruned now."""
        if not self._grown:
            self.refresh(1.0)
        for part in self.parts.values():
            part.publish()
            if self.structures is None:
                self.shape.check(part.mask)
                self.shape.check_weight(part.masked())

    @property
    def _grown(self) -> bool:
        """Whether the masks are final ones already: the last ones have been trained with, so they stay."""
        if self.sparsity(float(self._spent)) < 1.0:
            return False
        if self.structures is not None:
            return all(int(self.parts[name].mask.sum()) == int(mask.sum()) for name, mask in self._masks(1.0))
        return all(int(part.mask.sum()) == self.shape.kept(part.mask.numel()) for part in self.parts.values())

    def detach(self) -> None:
        """Take everything of the method off the model."""
        for remove in self._hooks:
            remove()


def _shifted(transform: Transform, start: int) -> Transform:
    """A transform of a module's rows, for a part that begins at `start`."""
    return lambda values, rows: transform(values, slice(rows.start + start, rows.stop + start))


def growing_mask(score: Tensor, shape: MaskShape, grown: float) -> Tensor:
    """The mask of a shape, or, while `grown` is below 1, with only that share of its zeros: those of lowest score."""
    if grown >= 1.0:
        return shape.mask(score)
    dropped = score.numel() - shape.kept(score.numel())
    wanted = int(grown * dropped)
    if wanted < 1:
        return torch.ones(score.shape, dtype=torch.bool, device=score.device)
    if shape.by_row:  # what the final mask keeps is out of reach; arithmetic, as torch is slow with bool
        score = score + shape.mask(score).view(torch.int8).float().mul_(2.0 * float(score.abs().max()) + 1.0)
    least = score.flatten().kthvalue(wanted).values
    mask = score > least
    short = score.numel() - wanted - int(mask.sum())
    if short:  # equal scores at the threshold, as all are at the start of movement pruning
        mask.view(-1)[(score == least).flatten().nonzero()[:short, 0]] = True
    return mask
