"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): the linear part of the flow integrated exactly in log-SNR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.paths import Path
from solvers.stepper import Weights


class Previous(NamedTuple):
    """What the second-order method remembers of the step before."""

    data: Tensor  # (B, ...) the data prediction at its start
    h: Tensor  # () its length in log-SNR


def exponential_step(path: Path, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """state, data, h of x_next = state * x + data * D, Eq. 9 with alpha_t (1 - e^-h) written without infinities."""
    now, after = path.coefficients(t), path.coefficients(t_next)
    if now.sigma == 0:
        raise ValueError(f"Log-SNR solvers cannot start at pure data (sigma = 0 at t = {t:g}); start a little off it.")
    state = after.sigma / now.sigma
    return state, after.alpha - state * now.alpha, after.log_snr - now.log_snr


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++ on a field of velocities along `path`, toward the data; order 1 is DDIM, order 2 the multistep 2M.

    The field's velocity becomes the data prediction D = E[data | x_t]. A step that begins at pure noise or ends at
    pure data is infinitely long in log-SNR, where no extrapolation has a meaning: it, and the step after the first,
    is taken at order 1, as the authors do.
    """

    path: Path
    order: int = 2
    adaptive = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"`order` must be 1 (DDIM) or 2 (2M); got {self.order}.")

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        """Of the present output; at order 2 the outputs of two steps carry the `field` weight together."""
        state, data, _ = exponential_step(self.path, t, t_next)
        c = self.path.coefficients(t)
        return Weights(state + data * c.dsigma / c.determinant, -data * c.sigma / c.determinant)

    def advance(
        self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Previous | None
    ) -> tuple[Tensor, Previous | None]:
        state, data, h = exponential_step(self.path, t, t_next)
        prediction = self.path.data_from_velocity(x, field(x, t), t)
        slope = torch.zeros_like(h)
        if memory is not None and memory.h.isfinite() and h.isfinite():
            slope = h / (2 * memory.h)  # 1 / (2 r) with r = h_previous / h, Algorithm 2
        used = prediction + slope * (prediction - memory.data) if memory is not None and slope != 0 else prediction
        return (state - 1) * x + data * used, Previous(prediction, h) if self.order == 2 else None
