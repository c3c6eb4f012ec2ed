"""One-shot pruning of a model: which linears, by which criterion or solver, and which are too sensitive for it.

Sensitivity is measured on calibration text: the error that pruning a linear makes in its output, over the output's
energy, `|(W - W') X|^2 / |W X|^2`, both from the Hessian X X^T of the dense model's inputs.

Shapes: O out_features, I in_features.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from compressor.calibration import IN_MEMORY, LayerStats, Residence, calibrate, calibrate_blocks, weight_of
from compressor.criteria import CRITERIA
from compressor.masks import MaskShape, keep_highest_of_rows
from compressor.solvers import SOLVERS, solve_block, without_hessians

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
Pruned = tuple[dict[str, Tensor], dict[str, LayerStats]]


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    shapes: Mapping[str, MaskShape],
    criterion: str,
    report: Report,
) -> Pruned:
    """The masks [O, I] of the linears that have a shape, and the statistics of all, without Hessians.

    A solver changes weights in place; a criterion leaves them as they are.
    """
    if criterion in SOLVERS:
        return _by_solver(model, batches, linears, shapes, criterion, report)
    batches = list(batches)
    stats = {}
    if batches:
        stats = calibrate(model, batches, linears, progress=lambda done, total: report("calibrate", done, total))
    masks: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        masks[name] = score_mask(name, weight_of(linears[name]).detach(), stats.get(name), shape, criterion)
        report("prune", len(masks), len(shapes))
    return masks, stats


def _by_solver(
    model: nn.Module,
    batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    shapes: Mapping[str, MaskShape],
    solver: str,
    report: Report,
) -> Pruned:
    """Block after block; each is calibrated on the output of the pruned ones before it."""
    masks: dict[str, Tensor] = {}
    kept: dict[str, LayerStats] = {}
    for stats in calibrate_blocks(model, batches, linears, hessian=True):
        masks |= solve_block(linears, stats, shapes, solver)
        kept |= without_hessians(stats)
        report("prune", len(kept), len(linears))
    return masks, kept


def score_mask(name: str, weight: Tensor, stats: LayerStats | None, shape: MaskShape, criterion: str) -> Tensor:
    """The mask [O, I] of a weight by a criterion's score."""
    if criterion == "given":
        try:
            shape.check_weight(weight)
        except ValueError as error:
            raise ValueError(
                f"{name} is not pruned to {shape}: {error}. Give the pattern that it has with sparsity.pattern or "
                "overrides, leave it dense with --keep-dense, or choose another criterion."
            ) from None
    score = CRITERIA[criterion](weight.float(), stats)
    if criterion == "wanda" and not shape.by_row:  # it compares the weights of one output
        return keep_highest_of_rows(score, shape.kept(score.numel()))
    return shape.mask(score)


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    shapes: Mapping[str, MaskShape],
    criterion: str,
    report: Report,
    residence: Residence = IN_MEMORY,
) -> dict[str, float]:
    """The relative output error that pruning each linear alone would make; the model stays as it is."""
    found: dict[str, float] = {}
    inside = {name: linears[name] for name in shapes}
    for stats in calibrate_blocks(model, batches, inside, hessian=True, residence=residence):
        for name, layer in stats.items():
            weight = weight_of(linears[name]).detach().float()
            if criterion in SOLVERS:
                pruned, _ = SOLVERS[criterion](weight, layer, shapes[name])
            else:
                pruned = weight * score_mask(name, weight, layer, shapes[name], criterion)
            found[name] = _energy(weight - pruned, layer) / max(_energy(weight, layer), 1e-30)
            report("rank", len(found), len(shapes))
    return found


def _energy(weight: Tensor, stats: LayerStats) -> float:
    """|W X|^2 over the calibration text."""
    assert stats.hessian is not None
    return float(((weight @ stats.hessian) * weight).sum())


def most_sensitive(sensitivity: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """The most sensitive layers that fit into a share of all weights; one that is too large lets the next try."""
    left = share * sum(sizes.values())
    chosen = []
    for name in sorted(sensitivity, key=lambda key: (-sensitivity[key], key)):
        if sizes[name] <= left:
            left -= sizes[name]
            chosen.append(name)
            log.info("%s stays dense: pruning it changes its output by %.1f %%", name, 100 * sensitivity[name] ** 0.5)
    return chosen
