"""AWQ (arXiv 2306.00978): scales input channels before quantising, so that those with large activations round finer.

`W x = (W s) (x / s)`: the columns of a linear are multiplied by s, and what makes its input, a norm or another linear,
is divided by it, so the model computes what it did. s = rms(x)^alpha, with alpha searched for the least output error
after rounding to the recipe's own grid, `|(Q(W s) / s - W) x|`, from the Hessian of the calibration text. A column that
is multiplied keeps its zeros: a 2:4 mask stays as it is.

Shapes: O out_features, I in_features, H heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import LayerStats, calibrate_blocks, weight_of
from compressor.quantizers.rtn import rtn
from compressor.scheme import Scheme

ALPHAS = tuple(step / 10 for step in range(1, 10))
_LLAMA = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
_OPT = (
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.out_proj",)),
    ("final_layer_norm", ("fc1",)),
)
NEIGHBOURS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
    "gpt2": (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
}
"""{model type: (what makes the input, the linears that read it)} within a block; only what commutes with a scale."""


def check_awq(config: Any) -> None:
    """Raises ValueError for a model whose neighbours are not known."""
    if config.model_type not in NEIGHBOURS:
        raise ValueError(
            f"transform 'awq' knows {', '.join(NEIGHBOURS)}; this model is {config.model_type!r}: leave it out"
        )
    if not getattr(config, "do_layer_norm_before", True):
        raise ValueError("transform 'awq' knows OPT with norms before attention; this one has them after: leave it out")


@torch.no_grad()
def apply_awq(
    model: nn.Module,
    batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    schemes: Mapping[str, Scheme],
    progress: Callable[[int, int], None],
) -> dict[str, LayerStats]:
    """Scales the model in place; returns the statistics of the scaled inputs, without Hessians."""
    neighbours = NEIGHBOURS[str(model.config.model_type)]  # type: ignore[union-attr]
    found: dict[str, LayerStats] = {}
    for stats in calibrate_blocks(model, batches, linears, hessian=True):
        block = _block_prefix(stats)
        for source, readers in neighbours:
            names = [f"{block}.{reader}" for reader in readers if f"{block}.{reader}" in stats]
            if len(names) == len(readers):
                scale = _scale_pair(model, f"{block}.{source}", names, stats[names[0]], schemes)
                stats |= dict.fromkeys(names, LayerStats(stats[names[0]].input_norm / scale, stats[names[0]].tokens))
        found |= {name: LayerStats(layer.input_norm, layer.tokens) for name, layer in stats.items()}
        progress(len(found), len(linears))
    return found


def _block_prefix(stats: Mapping[str, LayerStats]) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`: up to the number of the block."""
    parts = next(iter(stats)).split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def _scale_pair(
    model: nn.Module, source: str, readers: list[str], stats: LayerStats, schemes: Mapping[str, Scheme]
) -> Tensor:
    """Finds s [I] for linears that read the same input, and moves it from their columns into what makes the input."""
    linears = [model.get_submodule(name) for name in readers]
    maker = model.get_submodule(source)
    heads = _heads_of(maker, stats.input_norm.numel(), model.config)
    activity = heads.equalised(stats.input_norm / max(stats.tokens, 1) ** 0.5)
    weights = torch.cat([weight_of(linear).detach().float() for linear in linears])
    scale = _search(weights, activity, stats, schemes[readers[0]])
    for linear in linears:
        weight_of(linear).mul_(scale)
    _divide(maker, heads.by_row(scale))
    return scale


@dataclass(frozen=True)
class _Heads:
    """How rows of a maker feed inputs: with grouped queries, row D * k + d feeds the inputs of R query heads."""

    repeats: int = 1
    size: int = 1

    def equalised(self, vector: Tensor) -> Tensor:
        """A vector [I] with one value, the geometric mean, for all inputs that one row feeds."""
        if self.repeats == 1:
            return vector
        by_head = vector.clamp_min(1e-20).view(-1, self.repeats, self.size).log().mean(1, keepdim=True).exp()
        return by_head.expand(-1, self.repeats, -1).reshape(-1)

    def by_row(self, vector: Tensor) -> Tensor:
        """The value of each row, of an equalised vector."""
        return vector if self.repeats == 1 else vector.view(-1, self.repeats, self.size)[:, 0].reshape(-1)


def _heads_of(maker: nn.Module, width: int, config: Any) -> _Heads:
    if not isinstance(maker, nn.Linear) or maker.out_features == width:
        return _Heads()
    return _Heads(width // maker.out_features, maker.out_features // int(config.num_key_value_heads))


def _search(weight: Tensor, activity: Tensor, stats: LayerStats, scheme: Scheme) -> Tensor:
    """The scale of least output error; ones where none is better than leaving the weight alone."""
    assert stats.hessian is not None
    best = torch.ones_like(activity)
    least = _error(weight, best, stats, scheme)
    activity = activity.clamp_min(activity.max() * 1e-4 + 1e-20)
    for alpha in ALPHAS:
        scale = activity**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = _error(weight, scale, stats, scheme)
        if error < least:
            best, least = scale, error
    return best


def _error(weight: Tensor, scale: Tensor, stats: LayerStats, scheme: Scheme) -> float:
    """|(Q(W s) / s - W) x|^2 over the calibration text."""
    assert stats.hessian is not None
    scaled = LayerStats(stats.input_norm / scale, stats.tokens)
    change = rtn(weight * scale, scaled, scheme, ratios=(1.0,)).dequantized() / scale - weight
    return float(((change @ stats.hessian) * change).sum())


def _divide(maker: nn.Module, scale: Tensor) -> None:
    """Divides what a norm or a linear puts out, feature by feature."""
    weight, bias = maker.weight, getattr(maker, "bias", None)
    assert isinstance(weight, Tensor)
    weight.div_(scale if weight.dim() == 1 else scale[:, None])
    if isinstance(bias, Tensor):
        bias.div_(scale)
