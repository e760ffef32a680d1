"""The Hessian of a layer's squared output error, as the solvers of GPTQ and SparseGPT use it."""

import torch
from torch import Tensor

from compress.errors import BrokenPromise


def inverse_factor(moments: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor of the damped inverse; damping is raised tenfold until it exists. Works in `moments`."""
    diagonal = moments.diagonal().clone()
    diagonal[diagonal == 0] = 1  # an input that is always zero: any integer will do, the nearest is kept
    while damping <= 1:
        moments.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed and torch.isfinite(factor).all():
            return factor  # type: ignore
        damping *= 10
    raise BrokenPromise(f"{name}: its Hessian is not positive definite even with damping 1; more or other calibration data is needed")
