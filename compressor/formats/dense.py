"""`dense`: the weight as it is, [O, I] in bf16 or fp16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_floats


@dataclass(frozen=True)
class Dense(Format):
    """`weight` [O, I]."""

    name: ClassVar[str] = "dense"

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {"weight": ((out_features, in_features), self.dtype)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"weight": checked_floats(weight.dequantized(), self.dtype)}

    def unpack(self, tensors: Tensors) -> Tensor:
        return tensors["weight"]

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, in_features = tensors["weight"].shape
        return out_features, in_features
