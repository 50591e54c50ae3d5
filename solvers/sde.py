"""Euler-Maruyama for the SDEs that share a path's marginals, and the Brownian motion it is driven by.

For any w(t) >= 0 the SDE dx = v dt + (w / 2) score |dt| + sqrt(w) dW has the marginals of the ODE dx = v dt, in either
direction of time (Ma et al. 2024, Eq. 5; Song et al. 2021). Shapes: x, dW (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.loop import check_grid
from solvers.paths import Path
from solvers.stepper import Weights

Noise = Callable[[Tensor, Tensor, Tensor], Tensor]

DIFFUSIONS: dict[str, Callable[[Path, Tensor], Tensor]] = {  # w / 2 at norm 1, SiT's names and choices
    "constant": lambda path, u: torch.ones_like(u),
    "SBDM": lambda path, u: _sbdm(path, u),
    "sigma": lambda path, u: path._schedule(u)[1],
    "linear": lambda path, u: u,
    "decreasing": lambda path, u: (1 - torch.cos(math.pi * u)) ** 2 / 4,
    "increasing-decreasing": lambda path, u: torch.sin(math.pi * u) ** 2,
}


def _sbdm(path: Path, u: Tensor) -> Tensor:
    """Half the squared diffusion of the forward process itself: with it the sampler is the exact time reversal."""
    alpha, sigma, dalpha, dsigma = path._schedule(u)
    return sigma * dsigma - sigma**2 * dalpha / alpha


@dataclass(frozen=True)
class EulerMaruyama:
    """x += v dt + (w / 2) score |dt| + sqrt(w) dW, with SiT's choices of w = 2 norm * diffusion(t).

    path: turns the field's velocity into the score.
    noise: dW (B, ...) of an interval as a function of (x, t, t_next): `WhiteNoise(generator)`, for which the
        `torch.Generator` itself will do, or a `BrownianPath` that coarse and fine grids share.
    diffusion: "constant", "SBDM", "sigma", "linear", "decreasing" or "increasing-decreasing", each in the time that
        is 0 at the data. A grid may end at pure data or pure noise, but not start where something is infinite: the
        score at the data, "SBDM" at the noise.
    """

    path: Path
    noise: Noise = field(repr=False)
    diffusion: str = "sigma"
    norm: float = 1.0
    order = 0.5
    adaptive = False

    def __post_init__(self) -> None:
        if isinstance(self.noise, torch.Generator):
            object.__setattr__(self, "noise", WhiteNoise(self.noise))
        if self.diffusion not in DIFFUSIONS:
            raise ValueError(f"`diffusion` must be one of {', '.join(DIFFUSIONS)}; got {self.diffusion!r}.")
        if not self.norm >= 0:
            raise ValueError(f"`norm` scales a variance and cannot be negative; got {self.norm}.")

    @property
    def linear(self) -> EulerMaruyama:
        """The same step without its noise: what a change of the outputs does to the state."""
        return replace(self, noise=lambda x, t, t_next: torch.zeros_like(x))

    def w(self, t: Tensor) -> Tensor:
        """The squared diffusion coefficient at t, ()."""
        u = t if self.path.data_at == 0 else 1 - t
        return 2 * self.norm * DIFFUSIONS[self.diffusion](self.path, u)

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        c, dt = self.path.coefficients(t), t_next - t
        if c.sigma == 0 or not self.w(t).isfinite():
            what = "score is infinite at pure data" if c.sigma == 0 else f"{self.diffusion} diffusion is infinite"
            raise ValueError(f"The {what}, at t = {t:g}; start the grid a little off it.")
        score = self.w(t) / 2 * dt.abs() / (c.sigma * c.determinant)  # of score = (alpha' x - alpha v) / (sigma det)
        return Weights(1 + score * c.dalpha, dt - score * c.alpha)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        state, velocity = self.weights(t, t_next)
        return (state - 1) * x + velocity * field(x, t) + self.w(t).sqrt() * self.noise(x, t, t_next), None


@dataclass(frozen=True)
class WhiteNoise:
    """Fresh increments dW ~ N(0, |dt|) from an injected generator."""

    generator: torch.Generator

    def __call__(self, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        unit = torch.randn(x.shape, generator=self.generator, device=self.generator.device, dtype=x.dtype)
        return (t_next - t).abs().sqrt() * unit.to(x.device)


class BrownianPath:
    """One Brownian motion W on a fine grid, so that every coarsening of the grid is driven by the same path.

    Holds (K + 1) copies of a state. An increment over a coarse interval is the sum of the fine ones inside it.
    """

    def __init__(self, x: Tensor, ts: Tensor, generator: torch.Generator):
        """Draw W for states like x (B, ...) on ts (K + 1,)."""
        self.ts = check_grid(ts)
        fresh = WhiteNoise(generator)
        steps = [fresh(x, t, t_next) for t, t_next in pairwise(self.ts)]
        self.w = torch.cat([torch.zeros_like(x)[None], torch.stack(steps).cumsum(0)])  # (K + 1, B, ...)

    def __repr__(self) -> str:
        return f"BrownianPath({len(self.ts) - 1} steps)"

    def __call__(self, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        if x.shape != self.w.shape[1:]:
            came, held = tuple(x.shape), tuple(self.w.shape[1:])
            raise ValueError(
                f"This Brownian path was drawn for states of shape {held}; got {came}. Draw one for these."
            )
        return self.w[self._index(t_next)] - self.w[self._index(t)]

    def _index(self, t: Tensor) -> int:
        gap, k = (self.ts - t).abs().min(0)
        if gap > 1e-6 * (self.ts[-1] - self.ts[0]).abs():
            raise ValueError(f"t = {t:g} is not a time of the Brownian path; coarsen its own grid, e.g. path.ts[::10].")
        return int(k)
