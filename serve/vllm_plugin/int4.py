"""Dense int4 on a GPU by the kernels that vLLM brings: Marlin, or Machete from Hopper on.

Our stored nibbles, read as 32-bit words, are what these kernels take (compressed-tensors' order: value + 8, the first
in the lowest bits), so nothing is repacked on the way to them. On a CPU vLLM has such a kernel too: ours is faster, but
the tests prove the layout by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import (
    CPUWNA16LinearKernel,
    MacheteLinearKernel,
    MarlinLinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from compressor.scheme import Scheme

_WORD = 8
"""Values in a 32-bit word."""
_KERNELS = (MacheteLinearKernel, MarlinLinearKernel, CPUWNA16LinearKernel)
"""Those that take this layout, by preference. vLLM itself may choose Humming, which reads more of a layer of vLLM's."""


def takes(scheme: Scheme, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether a part that lies on a GPU is for vLLM's kernels: dense int4 without a low-rank branch, in whole words."""
    plain = scheme.format == "int4" and scheme.low_rank is None and dtype in (torch.bfloat16, torch.float16)
    return plain and tensors["weight_packed"].is_cuda and tensors["weight_packed"].shape[1] % (_WORD // 2) == 0


def choose(config: MPLinearLayerConfig) -> type[MPLinearKernel]:
    """The kernel of a weight; ValueError where none takes it."""
    for kernel in _KERNELS:
        if kernel.can_implement(config)[0]:
            return kernel
    raise ValueError(f"neither Machete nor Marlin takes int4 in groups of {config.group_size} on this device")


class StockInt4(nn.Module):
    """`y = x W^T` by the first of the kernels that takes the shape on this device.

    Args:
        tensors: `weight_packed` [O, I / 2] and `weight_scale` [O, G] of the format int4.
        group_size: inputs that share a scale; -1 for the whole row.
        dtype: of the activations.

    Raises:
        ValueError: where none takes them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], group_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        words = tensors["weight_packed"].contiguous().view(torch.int32)
        shape = (_WORD * words.shape[1], words.shape[0])
        config = MPLinearLayerConfig(
            full_weight_shape=shape,
            partition_weight_shape=shape,
            weight_type=scalar_types.uint4b8,
            act_type=dtype,
            group_size=group_size,
            zero_points=False,
        )
        kernel = choose(config)
        sides = {"input_dim": 1, "output_dim": 0, "weight_loader": _loaded}
        self.bias = None
        self.weight_packed = PackedvLLMParameter(data=words, packed_dim=1, packed_factor=_WORD, **sides)
        self.weight_scale = GroupQuantScaleParameter(data=tensors["weight_scale"].to(dtype), **sides)
        self.kernel = kernel(config, "weight_packed", "weight_scale", "weight_zero_point")
        self.kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] in x's dtype; whoever has a bias adds it, because Marlin would want it in an order of its own."""
        out: Tensor = self.kernel.apply_weights(self, x, None)
        return out


def _loaded(*_: object) -> None:
    raise AssertionError("the tensors are there already")
