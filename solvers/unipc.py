"""UniPC (Zhao et al. 2023, arXiv 2302.04867): DPM-Solver++ whose every evaluation also corrects the step before it.

Data prediction, B(h) = e^h - 1 ("bh2" in diffusers), multistep. The predictor UniP-p is then DPM-Solver++ of order p,
DDIM or 2M. The corrector UniC-p integrates the polynomial through the predictor's predictions and one more, at the
step's end: evaluated where the predictor led, as the authors and diffusers do, it is the evaluation with which the next
step begins anyway. That step first moves the state and then goes on; so a step costs one evaluation, and the last step
is not corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.dpm import DPMSolverPP, exponential_step
from solvers.field import VelocityField
from solvers.paths import Path
from solvers.stepper import Weights


class Previous(NamedTuple):
    """What is remembered of the step before."""

    data: Tensor  # (B, ...) the data prediction at its start
    change: Tensor  # (B, ...) by how much that was expected to change until its end
    h: Tensor  # () its length in log-SNR
    seen: Tensor  # () weight in the correction of the change that is seen at its end
    expected: Tensor  # () weight in the correction of `change`


@dataclass(frozen=True)
class UniPC:
    """UniPC on a field of velocities along `path`, toward the data; order p is UniP-p corrected by UniC-p.

    The corrector lifts the order of convergence to p + 1 (Theorem 3.1) on grids that are smooth in log-SNR. The states
    between steps are the predictor's, at which the field is evaluated; dx includes the correction of the step before.
    A step that is infinite in log-SNR (from pure noise, to pure data) and the one after it are taken at order 1, and an
    infinite step is not corrected.
    """

    path: Path
    order: int = 2
    adaptive = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"`order` must be 1 or 2, of UniP and UniC alike; got {self.order}.")

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        """The predictor's; all outputs carry the `field` weight together, and a correction's weights add up to 0."""
        return DPMSolverPP(self.path).weights(t, t_next)

    def advance(
        self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Previous | None
    ) -> tuple[Tensor, Previous]:
        state, data, h = exponential_step(self.path, t, t_next)
        prediction = self.path.data_from_velocity(x, field(x, t), t)
        correction = change = torch.zeros_like(prediction)
        h_before = torch.full_like(h, torch.inf)
        if memory is not None:
            moved = prediction - memory.data
            correction = memory.seen * moved + memory.expected * memory.change
            if self.order == 2 and h.isfinite():
                change, h_before = h / memory.h * moved, memory.h  # nothing, after an infinite step
        seen, expected = _unic(h, h_before)
        dx = (state - 1) * x + state * correction + data * (prediction + change / 2)
        return dx, Previous(prediction, change, h, data * seen, data * expected)


def _unic(h: Tensor, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the seen change d and the expected one e in what UniC moves the state by, per unit of D's weight.

    With u in [0, 1] along the step, D(u) = D(0) + d u + (d - e) u (u - 1) / (1 + r) goes through the three predictions,
    r = h_before / h. The exact step averages it with the density ~ e^(h u), where the predictor took D(0) + e / 2. With
    no prediction before, an infinite `h_before`, UniC-1 has the weight 1/2 whatever B(h) is.
    """
    if not h.isfinite():
        return torch.zeros_like(h), torch.zeros_like(h)
    if not h_before.isfinite():
        return torch.full_like(h, 0.5), torch.zeros_like(h)
    end = -1 / torch.expm1(-h)  # the density at u = 1, over h
    mean = end - 1 / h  # of u; the cancellation here and below is of the order of d's own rounding
    square = end - 2 / h * mean  # of u^2
    bend = (square - mean) / (1 + h_before / h)
    return mean + bend, -bend - 0.5
