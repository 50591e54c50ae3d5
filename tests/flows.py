"""Fields whose solutions, sensitivities and marginals are known: the problems of the whole suite.

Shapes: x, v (B, ...); t float, () or (B,). A sample never meets another one, and x is touched by +, -, * and / alone,
in a fixed order: a row is the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from solvers.paths import Path

Time = Tensor | float


def rms(x: Tensor) -> Tensor:
    """The RMS of each sample, (B,)."""
    return x.flatten(1).square().mean(1).sqrt()


def beside(x: Tensor, t: Time) -> Tensor:
    """t in x's dtype, () or shaped (B, 1, ...) to multiply x."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def by_scipy(field: Callable[[Tensor, Time], Tensor], x0: Tensor, t0: float, t1: float) -> Tensor:
    """The state at t1 of dx/dt = field(x, t) from x0 at t0, by DOP853 at 1e-12, in float64."""

    def rate(t, x):
        return field(torch.tensor(x).reshape(x0.shape), t).flatten().numpy()

    end = solve_ivp(rate, (t0, t1), x0.double().flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.tensor(end).reshape(x0.shape)


@dataclass(frozen=True, eq=False)
class LinearFlow:
    """v = A x + b t. J_x = A and J_t = b everywhere, so that the first-order bound is one:

    |v(x + dx, t + dt) - v(x, t)| <= alpha_x |dx| + alpha_t |dt| in RMS, with equality possible.
    """

    A: Tensor  # (d, d), d the elements of a sample
    b: Tensor  # (d,)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        flat = x.flatten(1)
        v = beside(flat, t) * self.b.to(x)
        for column, xj in zip(self.A.to(x).T, flat.T, strict=True):
            v = v + column * xj[:, None]
        return v.expand_as(flat).reshape(x.shape)

    @property
    def alpha_x(self) -> float:
        return torch.linalg.matrix_norm(self.A.double(), 2).item()

    @property
    def alpha_t(self) -> float:
        return rms(self.b.double()[None]).item()

    def solution(self, x0: Tensor, t0: float, t1: float) -> Tensor:
        """The state at t1, exact: (x, t, 1) obeys a linear equation with constant coefficients."""
        d = len(self.b)
        M = torch.zeros(d + 2, d + 2, dtype=torch.float64)
        M[:d, :d], M[:d, d], M[d, d + 1] = self.A, self.b, 1
        flat = x0.double().flatten(1)
        lifted = torch.cat([flat, torch.full_like(flat[:, :1], t0), torch.ones_like(flat[:, :1])], 1)
        return (lifted @ torch.linalg.matrix_exp(M * (t1 - t0)).T)[:, :d].reshape(x0.shape).to(x0)


def linear_flow(d: int = 6, seed: int = 0) -> LinearFlow:
    """A LinearFlow of random coefficients of order one, float64."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    return LinearFlow(A, torch.randn(d, generator=g, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class GaussianFlow:
    """The velocity whose marginals are those of alpha(t) data + sigma(t) noise, for data ~ N(mean, std^2 I).

    Everything a network could predict of it is in closed form. std = 0 is the flow to a single point, on which the
    data prediction is constant.
    """

    path: Path
    mean: float | Tensor = 0.7  # broadcast against x
    std: float | Tensor = 0.5

    def moments(self, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        alpha, sigma, _, _ = self.path.coefficients(t)
        return alpha * self.mean, (alpha**2 * self.std**2 + sigma**2) ** 0.5

    def _parts(self, x: Tensor, t: Time) -> tuple[Tensor, ...]:
        """The path's coefficients, x less its mean over its variance, and the variance."""
        c = self.path.coefficients(t, x)
        variance = c.alpha**2 * self.std**2 + c.sigma**2
        return (*c, (x - c.alpha * self.mean) / variance, variance)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        alpha, sigma, dalpha, dsigma, whitened, _ = self._parts(x, t)
        return dalpha * self.mean + (alpha * dalpha * self.std**2 + sigma * dsigma) * whitened

    def data(self, x: Tensor, t: Time) -> Tensor:
        """E[data | x_t = x]."""
        alpha, _, _, _, whitened, _ = self._parts(x, t)
        return self.mean + alpha * self.std**2 * whitened

    def noise(self, x: Tensor, t: Time) -> Tensor:
        """E[noise | x_t = x]."""
        _, sigma, _, _, whitened, _ = self._parts(x, t)
        return sigma * whitened

    def score(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x)."""
        return -self._parts(x, t)[4]

    def alpha_x(self, x: Tensor, t: Time) -> Tensor:
        """The spectral norm of J_x, (B,): the same for every x."""
        alpha, sigma, dalpha, dsigma, _, variance = self._parts(x, t)
        rate = (alpha * dalpha * self.std**2 + sigma * dsigma) / variance
        return (rate + torch.zeros_like(x)).abs().flatten(1).amax(1)

    def solution(self, x0: Tensor, t0: float, t1: float) -> Tensor:
        """The state at t1: a sample keeps its place in units of the standard deviation."""
        (m0, s0), (m1, s1) = self.moments(t0), self.moments(t1)
        return m1 + s1 / s0 * (x0 - m0)


@dataclass(frozen=True)
class Nonlinear:
    """v = (1 + 2 t) x / (1 + x^2) - t^2 x, element by element: smooth, and with a diagonal Jacobian."""

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        t = beside(x, t)
        return (1 + 2 * t) * x / (1 + x * x) - t * t * x

    def alpha_x(self, x: Tensor, t: Time) -> Tensor:
        """The spectral norm of J_x at (x, t), (B,)."""
        t, square = beside(x, t), x * x
        return ((1 + 2 * t) * (1 - square) / (1 + square) ** 2 - t * t).abs().flatten(1).amax(1)

    def alpha_t(self, x: Tensor, t: Time) -> Tensor:
        """The RMS of dv/dt at (x, t), (B,)."""
        return rms(2 * x / (1 + x * x) - 2 * beside(x, t) * x)

    def solution(self, x0: Tensor, t0: float, t1: float) -> Tensor:
        """The state at t1, to about 1e-11."""
        return by_scipy(self, x0, t0, t1).to(x0)
