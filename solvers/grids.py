"""Time grids: strictly monotone float64 tensors ts (K + 1,) from `start` to `end`, for K steps.

Time is the path's own, in [0, 1]; give `start` < `end` where the data are at t = 1. Infinite log-SNR (pure noise, pure
data) has no place on a grid that is uniform in it, so `log_snr` and `karras` take ends inside (0, 1). Grids are on the
CPU, whatever torch's default device: their numbers are read at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.loop import check_grid
from solvers.paths import Path


def uniform(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Equal steps in t."""
    return _spaced(steps, start, end)


def shifted(steps: int, shift: float, start: float = 1.0, end: float = 0.0) -> Tensor:
    """t -> shift t / (1 + (shift - 1) t), noise at t = 1: more steps at high noise (Esser et al. 2024, Eq. 23).

    `start` and `end` are shifted too; 0 and 1 stay where they are.
    """
    if not shift > 0:
        raise ValueError(f"`shift` must be positive (1 is uniform, Wan uses 3 to 8); got {shift}.")
    t = _spaced(steps, start, end)
    return shift * t / (1 + (shift - 1) * t)


def logarithmic(steps: int, start: float = 1.0, end: float = 1e-3) -> Tensor:
    """Equal ratios of t."""
    if not (start > 0 and end > 0):
        raise ValueError(f"A logarithmic grid needs positive ends; got {start} and {end}. Move the zero to 1e-3, say.")
    return torch.exp(_spaced(steps, *torch.tensor([start, end], dtype=torch.float64, device="cpu").log().tolist()))


def log_snr(steps: int, path: Path, start: float = 0.999, end: float = 0.001) -> Tensor:
    """Equal steps of lambda = log(alpha / sigma), the natural grid of exponential integrators (Lu et al. 2022)."""
    first, last = (path.log_snr(t).item() for t in _inside(start, end))
    return path.time_of(_spaced(steps, first, last))


def karras(steps: int, path: Path, start: float = 0.999, end: float = 0.001, rho: float = 7.0) -> Tensor:
    """Equal steps of (sigma / alpha)^(1 / rho) (Karras et al. 2022, Eq. 5)."""
    first, last = (torch.exp(-path.log_snr(t) / rho).item() for t in _inside(start, end))
    return path.time_of(-rho * torch.log(_spaced(steps, first, last)))


def through(times: Tensor, end: float | Tensor) -> Tensor:
    """The grid of given times (K,), such as a plan's nodes ``plan.times[plan.nodes]``, and its end: (K + 1,)."""
    known = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    return check_grid(torch.cat([known, known.new_tensor([float(end)])]))


def _inside(start: float, end: float) -> tuple[float, float]:
    if not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"Log-SNR is infinite at 0 and 1: both ends must lie inside (0, 1); got {start} and {end}.")
    return start, end


def _spaced(steps: int, start: float, end: float) -> Tensor:
    if steps < 1 or start == end:
        raise ValueError(f"A grid needs a step or more between two different ends; got {steps} from {start} to {end}.")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64, device="cpu")
