"""SLoRB: the low-rank branch that gives a pruned weight back its segment sums (AST, arXiv 2407.20584, section 3.4).

    y = (M*W) x + S (X x),   X[i, j] = 1 where floor(j / k) == i

With X fixed, `X x` is a segment sum of the activation and X is never stored. S starts as the mean, over the k
positions of a segment, of what pruning took away, so every segment sum of W survives; where X is trained, both may
start from the best rank-R approximation of what pruning took away instead (`svd`). S X cannot be folded into a 2:4
weight. Where the kept weights make up for the pruned ones already (SparseGPT, rebuilt blocks) nothing is left under the
mask: S then starts at zero, for giving it back twice would undo that, and X as segment sums.

Shapes: O out_features, I in_features, k segment, R = I / k.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS = ("mean", "sum", "zero", "svd")


def initial_branch(weight_OI: Tensor, mask_OI: Tensor, segment: int, init: str = "mean") -> tuple[Tensor, Tensor]:
    """S [O, R] and X [R, I] in fp32."""
    s = initial_s(weight_OI, mask_OI, segment, "zero" if init == "svd" else init)
    x = segment_matrix(weight_OI.shape[1], segment).to(s.device)
    pruned = torch.where(mask_OI, 0.0, weight_OI.to(torch.float32))
    if init == "svd" and pruned.any():  # two factors of zero would never learn
        _start_from_svd(s, x, pruned)
    return s, x


def _start_from_svd(s_OR: Tensor, x_RI: Tensor, pruned_OI: Tensor) -> None:
    """Best S X of rank R, the singular values shared evenly; where O < R the last rows of X stay segment sums."""
    u, sizes, v = torch.linalg.svd(pruned_OI, full_matrices=False)
    rank = min(len(x_RI), len(sizes))
    roots = sizes[:rank].sqrt()
    s_OR[:, :rank] = u[:, :rank] * roots
    x_RI[:rank] = roots[:, None] * v[:rank]


def initial_s(weight_OI: Tensor, mask_OI: Tensor, segment: int, init: str = "mean") -> Tensor:
    """S [O, R] in fp32 from the pruned part of a weight, for segment sums."""
    if init not in INITS[:-1]:
        raise ValueError(f"low-rank init {init!r} given; accepted are {', '.join(INITS[:-1])}")
    if segment < 1 or weight_OI.shape[1] % segment:
        raise ValueError(
            f"low-rank segment {segment} given for {weight_OI.shape[1]} input features; it must divide them"
        )
    pruned = torch.where(mask_OI, 0.0, weight_OI.to(torch.float32)).unflatten(1, (-1, segment))
    if init == "zero":
        return torch.zeros(pruned.shape[:2], device=pruned.device)
    sums: Tensor = pruned.sum(dim=-1)
    return sums / segment if init == "mean" else sums


def segment_matrix(in_features: int, segment: int) -> Tensor:
    """X [R, I] of ones and zeros."""
    return torch.eye(in_features // segment).repeat_interleave(segment, dim=1)


def on_int8_grid(s_OR: Tensor) -> Tensor:
    """S as it will be stored (int8, one bf16 scale a row), with a straight-through gradient."""
    with torch.no_grad():
        largest = s_OR.to(torch.float32).abs().amax(dim=1, keepdim=True)
        scale = (largest / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).to(torch.float32)
        stored = (s_OR.to(torch.float32) / scale).round_().clamp_(-127, 127) * scale
    return s_OR + (stored.to(s_OR.dtype) - s_OR).detach()


class LowRankBranch(nn.Module):
    """The branch while it is trained; hooked onto its linear's output.

    Args:
        s: initial S [O, R].
        segment: k.
        x: the initial projection X [R, I] where it is trained too; without one X takes segment sums.
        int8: let the forward see S on its int8 grid.
    """

    def __init__(
        self, s: Tensor, segment: int, *, dtype: torch.dtype, x: Tensor | None = None, int8: bool = True
    ) -> None:
        super().__init__()
        self.segment, self.int8 = segment, int8
        self.s = nn.Parameter(s.to(dtype))
        self.x = None if x is None else nn.Parameter(x.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] from activations [..., I]."""
        projected = self._segment_sums(x) if self.x is None else F.linear(x, self.x)
        return F.linear(projected, on_int8_grid(self.s) if self.int8 else self.s)

    def _segment_sums(self, x: Tensor) -> Tensor:
        sums: Tensor = x.unflatten(-1, (-1, self.segment)).sum(dim=-1)
        return sums

    def attach(self, linear: nn.Module) -> Callable[[], None]:
        """Add the branch to a linear's output; returns what detaches it."""

        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + self(args[0].to(self.s.dtype)).to(output.dtype)

        return linear.register_forward_hook(add).remove
