"""Euler, Heun, and torchdiffeq's methods for reference solutions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchdiffeq import odeint

from solvers.field import VelocityField
from solvers.stepper import Weights

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # torchdiffeq's methods and their orders
ADAPTIVE = {"adaptive_heun": 2, "fehlberg2": 2, "bosh3": 3, "dopri5": 5, "dopri8": 8}


@dataclass(frozen=True)
class Euler:
    """x += v dt. On an epsilon- or data-predicting model this is not DDIM; that is `DPMSolverPP(path, order=1)`."""

    order = 1
    adaptive = False

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return Weights(torch.ones_like(t), t_next - t)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        return (t_next - t) * field(x, t), None


@dataclass(frozen=True)
class Heun:
    """The explicit trapezoidal rule: two evaluations a step, the second at the end that Euler would reach."""

    order = 2
    adaptive = False

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return Weights(torch.ones_like(t), t_next - t)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        dt = t_next - t
        v = field(x, t)
        return dt / 2 * (v + field(x + dt * v, t_next)), None


@dataclass(frozen=True)
class TorchDiffEq:
    """Any method of torchdiffeq (Chen 2018), each interval a call of its `odeint`: the library's reference solutions.

    method: torchdiffeq's name; rtol, atol: its tolerances, with which the default `dopri5` is adaptive. Times go
    through torchdiffeq in x's dtype: give x in float64 where a reference is to be trusted below 1e-6.
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-6
    order: int = field(init=False)
    adaptive: bool = field(init=False)

    def __post_init__(self) -> None:
        known = FIXED | ADAPTIVE
        if self.method not in known:
            raise ValueError(f"`method` must be one of {', '.join(known)}; got {self.method!r}.")
        object.__setattr__(self, "order", known[self.method])
        object.__setattr__(self, "adaptive", self.method in ADAPTIVE)

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return Weights(torch.ones_like(t), t_next - t)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        interval = torch.stack([t, t_next]).to(x)
        ends_here = {"step_t": interval[1:]} if self.adaptive else None  # else it steps past and interpolates back
        solution = odeint(
            lambda t, x: field(x, t),
            x,
            interval,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            options=ends_here,
        )
        return solution[-1] - x, None
