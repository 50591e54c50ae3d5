"""The exact norms of a field's Jacobians, by forward- and reverse-mode products: what the secants stand in for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sencache.norms import rms
from solvers import VelocityField


class JacobianNorms(NamedTuple):
    """Norms of J_x = dv/dx and J_t = dv/dt at a point, per sample."""

    spectral: Tensor  # (B,) largest singular value of J_x: the most that an RMS change of x can change v
    frobenius: Tensor  # (B,) ||J_x||_F; divided by sqrt(d), the expected RMS gain of a random direction
    time: Tensor  # (B,) RMS of J_t


def jacobian_norms(
    field: VelocityField,
    x: Tensor,
    t: Tensor | float,
    *,
    iterations: int = 30,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> JacobianNorms:
    """||J_x|| and ||J_t|| of `field` at x (B, ...) and t, one time for all samples (Section 4.2, Fig. 3a).

    The spectral norm is found from below by `iterations` of the power method on J^T J, a jvp and a vjp each; the
    Frobenius norm is a mean over `probes` Gaussian probes, with relative standard error about
    sqrt(1 / (2 * probes * stable rank)). Random starts come from `generator`, by default seeded with 0.

    The field must be differentiable and its samples must not mix. Attention is run with its plain kernel, the only one
    that has a forward-mode derivative.
    """
    if iterations < 1 or probes < 1:
        raise ValueError(f"`iterations` and `probes` must be at least 1; got {iterations} and {probes}.")
    generator = generator or torch.Generator().manual_seed(0)
    at = torch.as_tensor(t, dtype=x.dtype, device=x.device)

    def of_x(x: Tensor) -> Tensor:
        return field(x, at)

    def random() -> Tensor:
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x)

    with sdpa_kernel(SDPBackend.MATH):
        time = rms(jvp(lambda t: field(x, t), (at,), (torch.ones_like(at),))[1])
        size = x[0].numel() ** 0.5
        squares = [rms(jvp(of_x, (x,), (random(),))[1]).square() for _ in range(probes)]
        frobenius = torch.stack(squares).mean(0).sqrt() * size
        u = random()
        for _ in range(iterations):
            u = u / _column(rms(u), u)
            forward = jvp(of_x, (x,), (u,))[1]
            spectral = rms(forward)
            u = vjp(of_x, x)[1](forward)[0]
            if not rms(u).all():  # a sample whose Jacobian is zero keeps its start
                u = torch.where(_column(rms(u), u) == 0, random(), u)
    return JacobianNorms(spectral.detach(), frobenius.detach(), time.detach())


def _column(norms: Tensor, x: Tensor) -> Tensor:
    return norms.reshape(-1, *[1] * (x.ndim - 1)).to(x)
