"""Gaussian probability paths x_t = alpha(t) x_data + sigma(t) noise, and what a network can predict on them.

On such a path velocity, data, noise and score carry the same information at a given (x, t): with alpha', sigma' the
time derivatives, v = alpha' data + sigma' noise and x = alpha data + sigma noise are two equations in two unknowns
(Lipman et al. 2023, Theorem 3; Ma et al. 2024, Eqs. 4-9), and score = -noise / sigma.

Time runs over [0, 1] and `data_at` says at which end the data are: 0 in diffusers and the papers, 1 in SiT's code.
Shapes: x, v, data, noise, score (B, ...); t float, () or (B,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Time = Tensor | float


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives, shaped to multiply x (B, ...), each of t's own precision."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor

    @property
    def determinant(self) -> Tensor:
        """alpha sigma' - alpha' sigma, by which the two equations above are solved; never zero on a path."""
        return self.alpha * self.dsigma - self.dalpha * self.sigma

    @property
    def log_snr(self) -> Tensor:
        """lambda = log(alpha / sigma): infinite at the data, minus infinity at pure noise."""
        return self.alpha.log() - self.sigma.log()


@dataclass(frozen=True)
class Path(ABC):
    """A path written in the time u that is 0 at the data and 1 at the noise; `data_at` maps t to u."""

    data_at: float = 0.0

    def __post_init__(self) -> None:
        if self.data_at not in (0.0, 1.0):
            raise ValueError(f"`data_at` is the time at which the data are, 0 or 1; got {self.data_at}.")
        object.__setattr__(self, "data_at", float(self.data_at))  # 0 and 0.0 are one path, in words too

    @abstractmethod
    def _schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, d alpha / du, d sigma / du at u."""

    @abstractmethod
    def _u_of(self, log_snr: Tensor) -> Tensor:
        """The u at which log(alpha / sigma) has this value."""

    def coefficients(self, t: Time, x: Tensor | None = None) -> Coefficients:
        """The schedule at t; for t (B,) shaped (B, 1, ...) and in the dtype of x, which a () tensor does not need."""
        t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
        u, direction = (t, 1) if self.data_at == 0 else (1 - t, -1)
        alpha, sigma, dalpha, dsigma = self._schedule(u if u.is_floating_point() else u.double())
        parts = [alpha, sigma, direction * dalpha, direction * dsigma]
        if t.ndim and x is not None:
            parts = [part.reshape(-1, *[1] * (x.ndim - 1)).to(x) for part in parts]
        return Coefficients(*parts)

    def log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha / sigma), of `coefficients`."""
        return self.coefficients(t).log_snr

    def time_of(self, log_snr: Time) -> Tensor:
        """The inverse of `log_snr`."""
        exact = log_snr if isinstance(log_snr, Tensor) else torch.tensor(log_snr, dtype=torch.float64, device="cpu")
        u = self._u_of(exact.double())
        return u if self.data_at == 0 else 1 - u

    def sample(self, data: Tensor, noise: Tensor, t: Time) -> Tensor:
        """The point x_t = alpha data + sigma noise."""
        c = self.coefficients(t, data)
        return c.alpha * data + c.sigma * noise

    def data_from_velocity(self, x: Tensor, v: Tensor, t: Time) -> Tensor:
        c = self.coefficients(t, x)
        return (c.dsigma * x - c.sigma * v) / c.determinant

    def noise_from_velocity(self, x: Tensor, v: Tensor, t: Time) -> Tensor:
        c = self.coefficients(t, x)
        return (c.alpha * v - c.dalpha * x) / c.determinant

    def score_from_velocity(self, x: Tensor, v: Tensor, t: Time) -> Tensor:
        """grad log p_t(x); infinite at the data, where sigma = 0."""
        return -self.noise_from_velocity(x, v, t) / self.coefficients(t, x).sigma

    def velocity_from_data(self, x: Tensor, data: Tensor, t: Time) -> Tensor:
        c = self.coefficients(t, x)
        return (c.dsigma * x - c.determinant * data) / c.sigma

    def velocity_from_noise(self, x: Tensor, noise: Tensor, t: Time) -> Tensor:
        c = self.coefficients(t, x)
        return (c.dalpha * x + c.determinant * noise) / c.alpha

    def velocity_from_score(self, x: Tensor, score: Tensor, t: Time) -> Tensor:
        return self.velocity_from_noise(x, -self.coefficients(t, x).sigma * score, t)


@dataclass(frozen=True)
class Linear(Path):
    """alpha = 1 - u, sigma = u: rectified flow, SiT, Wan, LTX (Liu et al. 2023)."""

    def _schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - u, u, -torch.ones_like(u), torch.ones_like(u)

    def _u_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = cos(pi u / 2), sigma = sin(pi u / 2): SiT's generalised variance-preserving path (Ma et al. 2024)."""

    def _schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rate = math.pi / 2
        alpha, sigma = torch.cos(rate * u), torch.sin(rate * u)
        return alpha, sigma, -rate * sigma, rate * alpha

    def _u_of(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr)) / (math.pi / 2)


@dataclass(frozen=True)
class VP(Path):
    """The variance-preserving diffusion, d log alpha / du = -beta(u) / 2 with beta linear (Song et al. 2021, Eq. 33).

    sigma' is infinite at the data: end the grid a little before (1e-3 is customary).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        beta = self.beta_min + u * (self.beta_max - self.beta_min)
        log_alpha = -0.25 * u * (self.beta_min + beta)
        alpha, sigma = log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))
        return alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma

    def _u_of(self, log_snr: Tensor) -> Tensor:
        span = self.beta_max - self.beta_min
        minus_log_alpha = 0.5 * torch.nn.functional.softplus(-2 * log_snr)
        return (torch.sqrt(self.beta_min**2 + 4 * span * minus_log_alpha) - self.beta_min) / span
