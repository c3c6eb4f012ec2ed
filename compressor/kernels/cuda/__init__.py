"""Which kernel multiplies a packed weight on an NVIDIA GPU, and the fallback where none does.

`choose` decides by format, compute capability and shape. What it does not know runs through `unpack`, slowly but
right. Layouts and results were proven in Triton's interpreter and against torch's own conversions; the Triton kernel
ran on an H100 too, right and slower than torch's bf16 (0.16 to 0.51 of its speed at 2560 x 2048). The others have not
been timed: `python -m benchmarks kernels --device cuda` does it.

path | formats | from capability
---|---|---
`triton` | sparse24_int4, groups of a multiple of 32 or one scale a row | 8.0
`semi_structured` | sparse24 in bf16 or fp16, sizes of a multiple of 32 and 64 | 8.0
`semi_structured` | sparse24_int8 with one scale a row, sizes of a multiple of 32 and 128 | 8.0
`semi_structured` | sparse24_fp8 with one scale a row, sizes of a multiple of 32 and 64, by cuSPARSELt | 8.9
`unpack` | everything else | any

Without cuSPARSELt, or where it refuses, `semi_structured` is CUTLASS, which torch has for 8.x alone.

Dense int4 has no path here: in vLLM its own kernels take it (`serve.vllm_plugin.int4`). Nor have the int8 of embeddings
and LM heads: the plugin unpacks such a head once, at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

AMPERE, ADA = (8, 0), (8, 9)
_EIGHT_BITS = {"sparse24_int8": (torch.int8, AMPERE), "sparse24_fp8": (torch.float8_e4m3fn, ADA)}
"""{format: (dtype of its values, capability from which they are multiplied)}."""


def choose(
    name: str, capability: tuple[int, int], out_features: int, in_features: int, group_size: int, dtype: torch.dtype
) -> str:
    """The path of a weight [O, I] in the format `name`."""
    if capability < AMPERE:
        return "unpack"
    if name == "sparse24_int4" and has_triton():
        takes = in_features % 4 == 0 and (group_size == -1 or group_size % 32 == 0)
        return "triton" if takes else "unpack"
    values, least = _EIGHT_BITS.get(name, (dtype, AMPERE))
    if name == "sparse24" or (name in _EIGHT_BITS and capability >= least and group_size in (-1, in_features)):
        from compressor.kernels.cuda import semi_structured

        supported = semi_structured.supports(out_features, in_features, values, capability)
        return "semi_structured" if supported else "unpack"
    return "unpack"


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch's CUDA builds bring it."""
    return find_spec("triton") is not None


def prepare(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], group_size: int) -> dict[str, Tensor]:
    """Stored tensors on a GPU in the layout of the path that is chosen for them."""
    packed = tensors.get("weight_packed")
    if packed is None:
        return dict(tensors)
    path = choose(name, torch.cuda.get_device_capability(packed.device), *shape, group_size, packed.dtype)
    if path != "semi_structured":
        return dict(tensors)
    from compressor.kernels.cuda import semi_structured

    return semi_structured.prepare(packed, tensors["weight_meta"], tensors.get("weight_scale")) or dict(tensors)


def unpacks(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], group_size: int) -> bool:
    """Whether each product with prepared tensors unpacks the whole weight on the GPU that they lie on."""
    packed = tensors.get("weight_packed")
    if packed is None or not packed.is_cuda:
        return False
    return choose(name, torch.cuda.get_device_capability(packed.device), *shape, group_size, torch.bfloat16) != "triton"


def linear(name: str, x: Tensor, tensors: Mapping[str, Tensor], group_size: int) -> Tensor | None:
    """[..., O] in x's dtype by the weight's path; None where that is `unpack`."""
    flat = x.flatten(0, -2)
    if "semi_packed" in tensors or "semi_compressed" in tensors:
        from compressor.kernels.cuda import semi_structured

        return semi_structured.linear(flat, tensors).unflatten(0, x.shape[:-1])
    packed = tensors.get("weight_packed")
    if packed is None or name != "sparse24_int4" or x.dtype not in (torch.bfloat16, torch.float16):
        return None  # without asking for libraries: vLLM compiles this whole, and that call cannot be
    capability = torch.cuda.get_device_capability(x.device)
    if choose(name, capability, packed.shape[0], x.shape[-1], group_size, x.dtype) != "triton":
        return None
    from compressor.kernels.cuda import sparse24_int4

    return sparse24_int4.linear(x, packed, tensors["weight_meta"], tensors["weight_scale"], group_size)
