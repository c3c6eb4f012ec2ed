"""Adam on fp32 masters, with AST's decay of masked weights (Huang et al., arXiv 2407.20584, eq. 2-3).

The forward sees a parameter in the compute dtype; the master is what is trained. For a sparse weight the
parameter holds M*W, so the gradient that autograd leaves on it *is* the straight-through gradient of the whole W:
nothing is masked in forward or backward, and M*W is formed once per step, here, while W passes through the cache.

Two forms of the decay, both from the published code:
    decoupled   u = m + lambda * ~M * W after the momentum m, v from u             (its GPT-2 path)
    coupled     g + lambda * ~M * W before Adam, as in SR-STE                      (its LLaMA path)

Shapes: O out_features, I in_features, B rows of one block.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor import kernels
from compressor.calibration import is_conv1d
from compressor.kernels import training
from compressor.quantizers import IntegerGrid
from compressor.retraining.shards import local

FORMS = ("decoupled", "coupled")

# Entries updated at a time on a CPU: a dozen passes over this many floats stay in cache.
_BLOCK = 1 << 18
# And on an accelerator, where launches count: so many entries of as many tensors as that takes.
_GROUP = 1 << 26

# What the forward is to see of some rows of M*W, for example the rows snapped to their packed grid.
Transform = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class AdamSettings:
    """The numbers that hold for every step."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    form: str = "decoupled"


@dataclass
class Trained:
    """One trained tensor: its parameter, fp32 master and Adam moments, all as [rows, columns]."""

    name: str
    parameter: nn.Parameter
    transposed: bool
    master: Tensor
    momentum: Tensor
    variance: Tensor
    mask: Tensor | None = None
    prunes: bool = True
    """Whether the forward sees M*W (straight-through) or all of W."""
    decays: bool = False
    gradient: Tensor | None = field(default=None, repr=False)
    transform: Transform | None = field(default=None, repr=False)

    @property
    def visible(self) -> Tensor:
        """The parameter's values, oriented like the master."""
        return _oriented(local(self.parameter.detach()), self.transposed)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint stores of it."""
        tensors = {"master": self.master, "momentum": self.momentum, "variance": self.variance}
        if self.mask is not None:
            tensors["mask"] = self.mask
        return {f"{self.name}/{kind}": tensor for kind, tensor in tensors.items()}

    def take_gradient(self, several: bool) -> None:
        """Move the parameter's gradient over; sums over micro-batches are kept in fp32."""
        found = self.parameter.grad
        self.parameter.grad = None
        if found is None:
            return
        found = _oriented(local(found), self.transposed)
        if not several:
            self.gradient = found
        elif self.gradient is None:
            self.gradient = found.to(torch.float32, copy=True)
        else:
            self.gradient += found

    def masked(self, rows: slice = slice(None)) -> Tensor:
        """M*W in fp32."""
        values = self.master[rows]
        return values if self.mask is None else values * self.kept(rows)

    def kept(self, rows: slice = slice(None)) -> Tensor:
        """M as fp32 ones and zeros. Bytes convert ten times faster than torch's bool does."""
        assert self.mask is not None
        return self.mask[rows].view(torch.int8).to(torch.float32)

    @torch.no_grad()
    def publish(self, rows: slice = slice(None)) -> None:
        """Let the forward see the master: masked, and snapped to the packed grid when a transform is set."""
        values = self.masked(rows) if self.prunes else self.master[rows]
        if self.transform is not None:
            values = self.transform(values, rows)
        self.visible[rows].copy_(values)


def _oriented(tensor: Tensor, transposed: bool) -> Tensor:
    """As rows by columns: a Conv1D's weight is turned, a vector is one row."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    return tensor.t() if transposed else tensor.flatten(1)


def train_linear(name: str, module: nn.Module, mask: Tensor, settings: AdamSettings) -> Trained:
    """A sparse weight: dense master [O, I] beside the masked parameter."""
    return _trained(name, module.weight, is_conv1d(module), mask, settings)  # type: ignore[arg-type]


def train_dense(name: str, parameter: nn.Parameter, settings: AdamSettings) -> Trained:
    """A norm, bias or embedding, trained without a mask."""
    return _trained(name, parameter, False, None, settings)


def _trained(
    name: str, parameter: nn.Parameter, transposed: bool, mask: Tensor | None, settings: AdamSettings
) -> Trained:
    values = _oriented(local(parameter.detach()), transposed)
    if mask is not None and mask.shape != values.shape:
        raise ValueError(f"mask of {tuple(mask.shape)} given for {name}, whose weight is {tuple(values.shape)}")
    master = values.to(torch.float32, copy=True).contiguous()
    decays = settings.weight_decay > 0 and parameter.dim() > 1
    return Trained(
        name, parameter, transposed, master, torch.zeros_like(master), torch.zeros_like(master), mask, decays=decays
    )


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows that are updated together: on a CPU as many as stay in cache, elsewhere all."""
    on_cpu = matrix.device.type == "cpu"
    height = max(1, _BLOCK // max(1, matrix.shape[1]) if on_cpu else matrix.shape[0])
    for start in range(0, matrix.shape[0], height):
        yield slice(start, start + height)


@torch.no_grad()
def adam_step(
    entry: Trained, settings: AdamSettings, *, step: int, rate: float, decay: float, scale: float = 1.0
) -> None:
    """One update of a tensor, in blocks of rows.

    Args:
        step: counts from 1, for the bias corrections.
        rate: learning rate.
        decay: AST's lambda, on masked weights.
        scale: what the gradient is multiplied by (clipping, micro-batches).
    """
    if entry.gradient is None:
        return
    if kernels.available() and entry.master.device.type == "cpu":
        _update_by_kernel(entry, entry.gradient, settings, step, rate, decay, scale)
    else:
        for rows in row_blocks(entry.master):
            _update_rows(entry, entry.gradient[rows], rows, settings, step, rate, decay, scale)
            entry.publish(rows)
    entry.gradient = None


def adam_steps(
    entries: Iterable[Trained], settings: AdamSettings, *, step: int, rate: float, decay: float, scale: float = 1.0
) -> None:
    """`adam_step` of many tensors; on an accelerator some operations for all of them, not a dozen for each."""
    group: list[Trained] = []
    size = 0
    for entry in entries:
        if entry.master.device.type == "cpu":
            adam_step(entry, settings, step=step, rate=rate, decay=decay, scale=scale)
        elif entry.gradient is not None:
            group.append(entry)
            size += entry.master.numel()
        if size > _GROUP:
            _update_together(group, settings, step, rate, decay, scale)
            group, size = [], 0
    if group:
        _update_together(group, settings, step, rate, decay, scale)


@torch.no_grad()
def _update_together(
    entries: list[Trained], settings: AdamSettings, step: int, rate: float, decay: float, scale: float
) -> None:
    for masked in (True, False):
        for decays in (True, False):
            alike = [entry for entry in entries if entry.decays == decays and (entry.mask is not None) == masked]
            if not alike:
                continue
            gradients = [entry.gradient.to(torch.float32).contiguous() for entry in alike]  # type: ignore[union-attr]
            torch._foreach_mul_(gradients, scale)
            state = [[getattr(entry, name) for entry in alike] for name in ("master", "momentum", "variance")]
            weight_decay = settings.weight_decay if decays else 0.0
            if masked:
                pulled = [entry.master.masked_fill(entry.mask, 0.0) for entry in alike]  # type: ignore[arg-type]
                if settings.form == "decoupled":
                    _decoupled(state, gradients, pulled, settings, step, rate, weight_decay, decay)
                else:
                    torch._foreach_add_(gradients, pulled, alpha=decay)
            if not (masked and settings.form == "decoupled"):
                _fused_adam(state, gradients, settings, step, rate, weight_decay)
            _publish_together(alike)
    for entry in entries:
        entry.gradient = None


def _publish_together(entries: list[Trained]) -> None:
    plain = [
        entry for entry in entries if entry.transform is None and entry.parameter.data_ptr() != entry.master.data_ptr()
    ]
    masked = [entry.master * entry.mask if entry.mask is not None and entry.prunes else entry.master for entry in plain]
    if plain:
        torch._foreach_copy_([entry.visible for entry in plain], masked)
    for entry in entries:
        if entry.transform is not None:
            entry.publish()


def _decoupled(
    state: list[list[Tensor]],
    g: list[Tensor],
    pulled: list[Tensor],
    settings: AdamSettings,
    step: int,
    rate: float,
    weight_decay: float,
    decay: float,
) -> None:
    w, m, v = state
    torch._foreach_lerp_(m, g, 1.0 - settings.beta1)
    torch._foreach_mul_(pulled, decay)
    torch._foreach_add_(pulled, m)  # u
    torch._foreach_mul_(v, settings.beta2)
    torch._foreach_addcmul_(v, pulled, pulled, value=1.0 - settings.beta2)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, math.sqrt(1.0 - settings.beta2**step))
    torch._foreach_add_(root, settings.eps)
    torch._foreach_mul_(w, 1.0 - rate * weight_decay)
    torch._foreach_addcdiv_(w, pulled, root, value=-rate / (1.0 - settings.beta1**step))


def _update_by_kernel(
    entry: Trained, gradient: Tensor, settings: AdamSettings, step: int, rate: float, decay: float, scale: float
) -> None:
    visible, grid = entry.visible, entry.transform if isinstance(entry.transform, IntegerGrid) else None
    direct = (entry.transform is None or grid is not None) and visible.is_contiguous()
    training.adam_step(
        entry.master,
        entry.momentum,
        entry.variance,
        gradient,
        entry.mask,
        visible if direct else None,
        scale=scale,
        rate=rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay if entry.decays else 0.0,
        mask_decay=decay,
        step=step,
        decoupled=settings.form == "decoupled",
        prunes=entry.prunes,
        scales=None if grid is None else grid.scale,
        grid=(0, 0) if grid is None else (grid.lowest, grid.highest),
    )
    if not direct:
        for rows in row_blocks(entry.master):
            entry.publish(rows)


def _update_rows(
    entry: Trained,
    gradient_BI: Tensor,
    rows: slice,
    settings: AdamSettings,
    step: int,
    rate: float,
    decay: float,
    scale: float,
) -> None:
    w, m, v = entry.master[rows], entry.momentum[rows], entry.variance[rows]
    g = (gradient_BI.to(torch.float32) * scale).contiguous()  # the fused kernel walks raw memory
    weight_decay = settings.weight_decay if entry.decays else 0.0
    pulled = None if entry.mask is None else entry.kept(rows).sub_(1.0).mul_(w).mul_(-decay)
    if pulled is None or settings.form == "coupled":
        _fused_adam([[w], [m], [v]], [g if pulled is None else g.add_(pulled)], settings, step, rate, weight_decay)
        return
    m.lerp_(g, 1.0 - settings.beta1)
    u = pulled.add_(m)
    v.mul_(settings.beta2).addcmul_(u, u, value=1.0 - settings.beta2)
    root = v.sqrt().div_(math.sqrt(1.0 - settings.beta2**step)).add_(settings.eps)
    w.mul_(1.0 - rate * weight_decay)
    w.addcdiv_(u, root, value=-rate / (1.0 - settings.beta1**step))


def _fused_adam(
    state: list[list[Tensor]], g: list[Tensor], settings: AdamSettings, step: int, rate: float, weight_decay: float
) -> None:
    """Plain AdamW in one pass over memory: the kernel under torch.optim.AdamW(fused=True)."""
    w, m, v = state
    torch._fused_adamw_(
        w,
        g,
        m,
        v,
        [],
        [torch.full((), float(step), device=w[0].device)] * len(w),
        lr=rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
