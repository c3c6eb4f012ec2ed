"""What the stages of a compression hand on: the model with what belongs to it, and the record of what was done.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import LayerStats, weight_of
from compressor.formats import QuantizedWeight, make_format
from compressor.low_rank import LowRankBranch
from compressor.preflight import Plan
from compressor.quantizers import IntegerGrid, rtn, snap
from compressor.retraining.optimizers import Transform
from compressor.scheme import Scheme

Report = Callable[[str, int, int, dict[str, Any]], None]
"""`report(stage, done, total, figures)`: called as a stage goes on."""


@dataclass
class Result:
    """What came out, and what is written on the model card."""

    out: Path
    plan: Plan
    stored_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None


@dataclass
class SparseModel:
    """A model whose linears hold sparse weights, with the low-rank branches that were trained beside them."""

    model: Any
    stats: dict[str, LayerStats]
    masks: dict[str, Tensor]
    """Those that the criterion chose, by linear. Retraining takes them over and moves them: see `mask_of`."""
    low_rank: dict[str, LowRankBranch] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    """The scales that the last part of retraining saw; packing keeps them, so that what was trained is served."""

    def to_cpu(self) -> None:
        """Brings everything back from the accelerator, to be packed."""
        self.model.to("cpu")
        self.stats = {name: layer.to_cpu() for name, layer in self.stats.items()}
        for tensors in (self.masks, self.scales):
            tensors |= {name: tensor.cpu() for name, tensor in tensors.items()}
        for branch in self.low_rank.values():
            branch.to("cpu")

    @contextmanager
    def branches_attached(self) -> Iterator[None]:
        """Inside, the model computes with its low-rank branches, as it is served."""
        detach = [branch.attach(self.model.get_submodule(name)) for name, branch in self.low_rank.items()]
        try:
            yield
        finally:
            for remove in detach:
                remove()

    def mask_of(self, name: str) -> Tensor:
        """Where a linear's weight [O, I] may be other than zero as it is now: retraining moves masks."""
        weight = weight_of(self.model.get_submodule(name)).detach().contiguous()  # a Conv1D's is turned
        return weight != 0 if name in self.masks else torch.ones_like(weight, dtype=torch.bool)

    def snap_to_grid(self, name: str, weight: Tensor, scheme: Scheme) -> Transform:
        """Fixes a layer's scales as of now; returns what the forward is to see of rows of its weight from then on."""
        scale = rtn(weight.cpu(), self.stats.get(name), scheme).scale
        if scale is None:
            return lambda values, _rows: values
        self.scales[name] = scale
        return self.grid_of(name, weight, scheme)

    def grid_of(self, name: str, weight: Tensor, scheme: Scheme) -> Transform:
        """What the forward is to see of rows of a weight on its grid, whose scales are fixed now if they are not."""
        if name not in self.scales:
            return self.snap_to_grid(name, weight, scheme)
        fmt, near = make_format(scheme), self.scales[name].to(weight.device)  # of a model that trains on an accelerator
        if fmt.grid is not None:
            return IntegerGrid(near.float(), *fmt.grid)
        return lambda values, rows: snap(values, near[rows], fmt).dequantized()

    def quantize(self, name: str, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        """A weight on its grid: on the one that it was trained on, if it was."""
        if name in self.scales:
            return snap(weight.float(), self.scales[name], make_format(scheme))
        return rtn(weight, self.stats.get(name), scheme)


def work_folder(out: Path) -> Path:
    """Where an interrupted retraining is resumed from."""
    return out.with_name(f".{out.name}.work")


def watched(metrics: Mapping[str, float]) -> dict[str, Any]:
    """The figures worth watching, shortly named."""
    names = {
        "total": "loss", "kl": "KL", "flip_rate": "flips", "mean_kept": "|w| kept", "mean_masked": "|w| masked",
        "tokens_per_second": "tok/s", "learning_rate": "lr", "accuracy": "accuracy", "sparsity": "sparsity",
    }  # fmt: skip
    return {short: metrics[name] for name, short in names.items() if name in metrics}
