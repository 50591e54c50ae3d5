"""Full trajectories, kept: what every network output was, and what a rule would do on them at no evaluation.

Shapes: S samples, K steps; x (S, ...) the states, y (S, ...) the outputs, both in lists along the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.cases import Case
from sencache import CachedField
from solvers import Stepper, VelocityField, trajectory


@dataclass(frozen=True, eq=False)
class Recording:
    """A sampler's own run with all its evaluations."""

    ts: Tensor  # (K + 1,)
    x: list[Tensor]  # K + 1 states (S, ...), the noise first
    y: list[Tensor]  # K outputs (S, ...)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The output (S, ...) at the grid's time nearest to t, whatever x is: as a field, one that costs nothing."""
        return self.y[int((self.ts[:-1] - t).abs().argmin())]

    def select(self, rows: Tensor) -> Recording:
        """The samples `rows` (B,) alone."""
        return Recording(self.ts, [x[rows] for x in self.x], [y[rows] for y in self.y])


def record(field: VelocityField, x: Tensor, ts: Tensor, stepper: Stepper) -> Recording:
    """Run `stepper`, of one evaluation a step, from x (S, ...) over ts (K + 1,) and keep everything."""
    outputs: list[Tensor] = []

    def kept(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(field(x, t))
        return outputs[-1]

    states = [x, *(step.x for step in trajectory(kept, x, ts, stepper))]
    if len(outputs) != len(ts) - 1:
        raise ValueError(f"Expected one evaluation a step; {stepper} made {len(outputs)} in {len(ts) - 1} steps.")
    return Recording(ts, states, outputs)


def recorded(case: Case, samples: int, purpose: str) -> Recording:
    """The usual sampler's full runs of a set of seeds."""
    field, x, _ = case.samples(samples, purpose)
    return record(field, x, case.grid(), case.stepper)


def tolerance_for(nfe: float, rule: Callable[[float], CachedField], case: Case, recording: Recording) -> float:
    """The tolerance under which `rule(tolerance)`, of the field `recording`, spends about `nfe` evaluations a sample.

    Found on recorded outputs, which do not answer to what reuses do to x: the rule decides as in a run whose states
    drift as they do in a cached one, and whose outputs do not.
    """
    low, high = -9.0, 4.0  # of its logarithm
    found: list[tuple[float, float]] = []  # how far from `nfe`, with which
    for _ in range(14):
        middle = (low + high) / 2
        cached = rule(math.exp(middle))
        cached.integrate(recording.x[0], recording.ts, case.stepper)
        spent = float(cached.report.evaluations.double().mean())
        found.append((abs(spent - nfe), math.exp(middle)))
        low, high = (middle, high) if spent > nfe else (low, middle)
    return min(found)[1]
