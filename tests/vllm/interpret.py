"""Runs in a Python that has Triton, which then interprets the GPU kernel on the CPU: prints the largest error found."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from compressor.formats import make_format
from compressor.kernels.cuda import sparse24_int4
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import Scheme

# In fp16: the interpreter's bf16 product is wrong. (rows, columns, group size): tails in rows, columns and groups.
SHAPES = [(64, 128, 32), (40, 256, 64), (96, 384, 128), (33, 100, -1), (48, 192, 96), (16, 36, -1), (7, 64, 64)]
TOKENS = (1, 5, 17, 70)


def error(rows: int, columns: int, group: int, tokens: int, setting: dict[str, int]) -> float:
    """Distance from the product in float64, relative to it."""
    scheme = Scheme("sparse24_int4", group, "float16")
    fmt = make_format(scheme)
    weight = torch.randn(rows, columns)
    stored = fmt.pack(rtn(weight * n_m_mask(weight.abs()), None, scheme))
    x = torch.randn(tokens, columns).half()
    parts = (stored["weight_packed"], stored["weight_meta"], stored["weight_scale"])
    sparse24_int4.tuned = lambda key, settings, run: run(setting)
    exact = x.double() @ fmt.unpack_quantized(stored).dequantized().double().T
    found = sparse24_int4.linear(x, *parts, group)
    assert found.is_contiguous()
    return float((found.double() - exact).norm() / exact.norm())


def main(every: bool) -> None:
    """A few settings of each shape, or all block sizes and splits."""
    torch.manual_seed(0)
    worst = 0.0
    for rows, columns, group in SHAPES:
        for tokens in TOKENS:
            settings = [one for one in sparse24_int4.candidates(group, tokens) if one["num_warps"] == 4]
            chosen = settings if every else [settings[-1]]
            worst = max(worst, *(error(rows, columns, group, tokens, one) for one in chosen))
    print(worst)


if __name__ == "__main__":
    main(sys.argv[1:] == ["every"])
