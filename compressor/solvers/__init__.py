"""One-shot solvers: they choose a mask and change the kept weights to make up for the pruned ones.

A solver maps a weight [O, I] and statistics with a Hessian to (weight, mask); pruned entries of the weight are zero. A
new one is one file here and one line in SOLVERS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.calibration import LayerStats, Progress, calibrate_blocks, weight_of
from compressor.solvers import sparsegpt

Solver = Callable[[Tensor, LayerStats], tuple[Tensor, Tensor]]

SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt.solve}


def prune_blocks(
    model: nn.Module,
    token_batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    *,
    solver: str = "sparsegpt",
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], dict[str, LayerStats]]:
    """Prune a model in place, block after block; each block is calibrated on the output of the pruned ones before it.

    Returns the masks [O, I] and the statistics of each linear without their Hessians, which live for one block only.
    """
    solve = SOLVERS[solver]
    masks: dict[str, Tensor] = {}
    kept: dict[str, LayerStats] = {}
    for stats in calibrate_blocks(model, token_batches, linears, hessian=True):
        for layer, names in by_input(stats):
            weights = [weight_of(linears[name]).detach() for name in names]
            heights = [weight.shape[0] for weight in weights]
            solved, mask = solve(torch.cat(weights), layer)
            for name, weight, rows, kept_rows in zip(
                names, weights, solved.split(heights), mask.split(heights), strict=True
            ):
                weight.copy_(rows)
                masks[name], kept[name] = kept_rows.clone(), replace(layer, hessian=None)
        if progress is not None:
            progress(len(masks), len(linears))
    return masks, kept


def by_input(stats: Mapping[str, LayerStats]) -> list[tuple[LayerStats, list[str]]]:
    """Linears that read the same input are solved together: rows are independent, the factorisation is shared."""
    groups: dict[int, tuple[LayerStats, list[str]]] = {}
    for name, layer in stats.items():
        groups.setdefault(id(layer), (layer, []))[1].append(name)
    return list(groups.values())
