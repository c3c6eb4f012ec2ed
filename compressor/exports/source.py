"""What is exported: a checkpoint, layer by layer, as grid values and scales; and the way back.

Only one layer is held at a time. A weight [O, I] comes as `QuantizedWeight`, whatever its packing was; a low-rank
branch is folded into a plain dense weight, which is the one thing that no other runtime's layout can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import is_conv1d
from compressor.checkpoint import Checkpoint
from compressor.exports.regrid import fit_grid
from compressor.formats import FORMATS, QuantizedWeight, make_format
from compressor.formats.low_rank import low_rank_weight
from compressor.inspection import packed_modules
from compressor.models import name_of, skeleton
from compressor.scheme import Scheme

RECORD = "halfweight.json"
_HUB_PREFIXES = {"GPTNeoXForCausalLM": ("lm_head.", "embed_out.")}
"""{architecture: what transformers 5 calls a tensor, what checkpoints and all other readers call it}."""
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""{what vLLM makes of some linears: their names}."""


@dataclass(frozen=True)
class Layer:
    """One packed module as it is to be exported.

    Args:
        name: of the module.
        scheme: what it is stored as; plain dense where a branch was folded.
        weight: [O, I] values, and their scales.
        transposed: whether the model itself keeps this weight as [I, O] (GPT-2's Conv1D).
    """

    name: str
    scheme: Scheme
    weight: QuantizedWeight
    transposed: bool

    def dense(self) -> Tensor:
        """The weight as the model's own module keeps it, rounded once to the scheme's dtype."""
        values = self.weight.dequantized().to(getattr(torch, self.scheme.dtype))
        return values.t().contiguous() if self.transposed else values


class Source:
    """An opened checkpoint, or a plain dense folder, for exporting."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.schemes: Mapping[str, Scheme] = packed_modules(self.checkpoint)
        model = skeleton(folder)
        self._transposed = {name for name, module in model.named_modules() if is_conv1d(module)}
        tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        head = name_of(model, model.get_output_embeddings())
        self.embeddings = tables if head is None else tables | {head}
        """Names of the embeddings and of the LM head, packed or not."""
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
        self._shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if _has_matrix(m)}
        self._linears = [name for name in linears if name not in self.embeddings]
        self._tied: bool = model.config.tie_word_embeddings
        self._tied_by_default: bool = type(model.config)().tie_word_embeddings

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` without our record of what is packed; a head that differs from the embedding is not tied."""
        config = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        if config.get("tie_word_embeddings", self._tied_by_default) and not self._tied:
            config["tie_word_embeddings"] = False
        return config

    def hub_name(self, name: str) -> str:
        """The name that checkpoints of the hub give one of the model's tensors."""
        ours, theirs = _HUB_PREFIXES.get(architecture_of(self.config), ("", ""))
        return theirs + name.removeprefix(ours) if ours and name.startswith(ours) else name

    def fused(self) -> dict[str, set[tuple[int, int] | None]]:
        """{linear that vLLM makes of several: the (bits, group size) of these, or None of a dense one}."""
        linears = self.linears()
        found: dict[str, set[tuple[int, int] | None]] = {}
        for name in {*linears, *self.dense_linears()}:
            parent, dot, own = name.rpartition(".")
            for fused, parts in _FUSED.items():
                if own in parts:
                    scheme = linears.get(name, Scheme())
                    bits = bits_of(scheme)
                    kind = None if bits is None else (bits, scheme.group_size)
                    found.setdefault(f"{parent}{dot}{fused}", set()).add(kind)
        return found

    def unlike_parts(self) -> list[str]:
        """A sentence on linears of which vLLM makes one and that are exported unlike, where there are any."""
        unlike = sorted(name for name, kinds in self.fused().items() if len(kinds) > 1)
        if not unlike:
            return []
        parent, _, own = unlike[0].rpartition(".")
        places = f"places ({parent}, ...)" if len(unlike) > 1 else f"place ({parent})"
        return [
            f"the scheme of {' and '.join(_FUSED[own])} differs in {len(unlike)} {places}, which vLLM "
            "does not load; transformers does"
        ]

    def losses(self) -> list[str]:
        """What no target holds."""
        branched = [name for name, scheme in self.schemes.items() if scheme.low_rank is not None]
        if not branched:
            return []
        return [
            f"the low-rank branches of {len(branched)} layers ({branched[0]}, ...) are folded into their weights, "
            "which are then neither sparse nor quantised and are stored in bf16"
        ]

    def exported_schemes(self) -> dict[str, Scheme]:
        """{module: scheme} of every packed module, as it is exported."""
        return {name: _exported(scheme) for name, scheme in self.schemes.items()}

    def linears(self) -> dict[str, Scheme]:
        """{module: scheme} of the packed linears other than the LM head, as they are exported."""
        return {name: scheme for name, scheme in self.exported_schemes().items() if name not in self.embeddings}

    def dense_linears(self) -> list[str]:
        """Linears that are exported as plain numbers: left dense, or with a branch folded in."""
        return [name for name in self._linears if make_format(self.linears().get(name, Scheme())).grid is None]

    def is_transposed(self, name: str) -> bool:
        """Whether the model keeps this weight as [I, O]."""
        return name in self._transposed

    def shape_of(self, name: str) -> tuple[int, int]:
        """[O, I] of a linear or a table."""
        rows, columns = self._shapes[name]
        return (columns, rows) if self.is_transposed(name) else (rows, columns)

    def scale(self, name: str) -> Tensor:
        """The scales of one packed module."""
        return self.checkpoint.tensor(f"{name}.weight_scale")

    def layer(self, name: str) -> Layer:
        """One packed module."""
        scheme, tensors = self.schemes[name], self.checkpoint.module(name)
        fmt = make_format(scheme)
        weight = fmt.unpack_quantized({key: t for key, t in tensors.items() if key.startswith("weight")})
        if scheme.low_rank is not None:
            weight = QuantizedWeight(weight.dequantized() + low_rank_weight(tensors, weight.values.shape[1]))
        return Layer(name, _exported(scheme), weight, name in self._transposed)

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not part of a packed weight: norms, biases, layers that were left dense."""
        for name in self.checkpoint.names():
            module, _, key = name.rpartition(".")
            if module not in self.schemes or key == "bias":
                yield name, self.checkpoint.tensor(name)


def bits_of(scheme: Scheme | None) -> int | None:
    """4 or 8 for symmetric integer grids, None for what is stored plainly."""
    if scheme is None or FORMATS[scheme.format].grid is None:
        return None
    return 4 if FORMATS[scheme.format].grid == (-8, 7) else 8


def _has_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first architecture that a configuration names."""
    return str((config.get("architectures") or ["(none named)"])[0])


def _exported(scheme: Scheme) -> Scheme:
    return scheme if scheme.low_rank is None else Scheme("dense", -1, scheme.dtype)


class Exported:
    """A folder in a target's layout, read back. Targets say how a weight is read; norms and biases they share."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.checkpoint = Checkpoint.open(folder, verify=False, foreign=True)
        model = skeleton(folder)
        ours, theirs = _HUB_PREFIXES.get(architecture_of(config), ("", ""))
        self._renamed = {
            name: ours + name.removeprefix(theirs)
            for name in self.checkpoint.names()
            if theirs and name.startswith(theirs)
        }
        """{stored name: the model's}, where they differ."""
        self.transposed = {name for name, module in model.named_modules() if is_conv1d(module)}

    def weight(self, name: str, scheme: Scheme) -> QuantizedWeight | None:
        """The weight [O, I] on the grid that it had, or None where it does not lie on that grid."""
        weight = self.dense(name)
        return fitted(weight.t().contiguous() if name in self.transposed else weight, scheme)

    def dense(self, name: str) -> Tensor:
        """The weight as the model's own module keeps it."""
        stored = {own: stored for stored, own in self._renamed.items()}
        return self.checkpoint.tensor(stored.get(f"{name}.weight", f"{name}.weight"))

    def plain(self, modules: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not part of the weights of `modules`."""
        for stored in self.checkpoint.names():
            name = self._renamed.get(stored, stored)
            module, _, key = name.rpartition(".")
            if module not in modules or key == "bias":
                yield name, self.checkpoint.tensor(stored)


def fitted(weight: Tensor, scheme: Scheme) -> QuantizedWeight | None:
    """A plain weight [O, I] on the grid that it had, or None where it does not lie on it."""
    fmt = make_format(scheme)
    return fit_grid(weight, fmt) if fmt.scaled else QuantizedWeight(weight)


def plain_names(folder: Path, modules: set[str]) -> list[str]:
    """Names of the tensors that the model of a folder keeps beside the weights of `modules`."""
    names = [name for name, _ in skeleton(folder).named_parameters()]
    return [name for name in names if name.rpartition(".")[0] not in modules or not name.endswith(".weight")]
