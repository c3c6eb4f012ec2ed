"""The inverse of a layer's Hessian X^T X, as column-by-column solvers need it (arXiv 2210.17323, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor U of H^-1 = U^T U; damping grows until the factorisation succeeds."""
    h = hessian.to(torch.float32).clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0
    for attempt in range(6):
        diagonal.add_(_DAMPING * (mean or 1.0) * 10.0 ** (attempt - 1 if attempt else 0))
        factor, failed = torch.linalg.cholesky_ex(h)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed):
                assert isinstance(upper, Tensor)
                return upper
    raise ValueError("the Hessian is not positive definite even with damping; calibrate on more text")
