"""`sparse24_fp8`: 2:4 sparse e4m3 values: 4 bits a weight, 1 bit for positions, and the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors
from compressor.formats.fp8 import E4M3, LARGEST, checked_e4m3, round_to_e4m3
from compressor.formats.positions import check_positions, compress24, expand24
from compressor.formats.sparse24 import meta_spec


@dataclass(frozen=True)
class Sparse24Fp8(Format):
    """`weight_packed` [O, I / 2] float8_e4m3fn, `weight_meta`, `weight_scale` [O, G]."""

    name: ClassVar[str] = "sparse24_fp8"
    sparse: ClassVar[bool] = True
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = LARGEST

    def rounded(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values)

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features // 2), E4M3),
            **meta_spec(out_features, in_features),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        kept, meta = compress24(checked_e4m3(weight.values))
        scale = self.checked_scale(weight)
        return {"weight_packed": kept.to(E4M3), "weight_meta": meta, "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        values = expand24(tensors["weight_packed"].float(), tensors["weight_meta"])
        return QuantizedWeight(values, tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, half = tensors["weight_packed"].shape
        return out_features, 2 * half

    def validate(self, tensors: Tensors) -> None:
        super().validate(tensors)
        check_positions(tensors["weight_meta"])
