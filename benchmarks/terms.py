"""What each predictor sees of the true change of a reuse (Section 4.4 of the paper, made measurable).

Along full runs y_r is asked to stand in for y_j, `gap` queries later, the evaluation before r having been `gap` queries
earlier. Shapes: S samples; R reuses of one gap, ordered by r; values of gaps 1..4 stand side by side, (S, N).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.recorded import Recording
from sencache import CachedField, SensitivityProfile, rms
from sencache.influence import influence
from sencache.plan import expectation
from sencache.reuse import VARIABLES, continued, linear
from sencache.schedule import Problem

GAPS = (1, 2, 3, 4)
THIRDS = ("first third", "middle third", "last third")
PREDICTORS = {
    "time term": r"$\|J_t\|\,|\Delta t|$",
    "latent term": r"$\|J_x\|\,\|\Delta x\|$",
    "S, their sum": "S, their sum",
    "own difference": "own last difference",
    "plan, holding": "our plan, holding",
    "plan, on a line": "our plan, of its own reuse",
}


class Changes(NamedTuple):
    """Reuses of one field: (S, N) each, or (N,) where all samples share it."""

    true: dict[str, Tensor]  # "hold" and "linear": RMS error of what either reuse returns
    predicted: dict[str, Tensor]  # by predictor; the last is of a linear reuse, all others of holding
    step: Tensor  # (N,) j, the query that reuses
    gap: Tensor  # (N,)

    def truth(self, predictor: str) -> Tensor:
        """What `predictor` is a prediction of, (S, N)."""
        return self.true["linear" if predictor == "plan, on a line" else "hold"]

    def third(self, steps: int) -> Tensor:
        """Which third of a trajectory of `steps` queries each reuse lies in, (N,)."""
        return self.step * 3 // steps


def changes(recording: Recording, profile: SensitivityProfile, case: Case) -> Changes:
    """Every reuse over gaps 1..4 that a full run shows, and what was predicted of it."""
    plans = {reuse: _Expected(profile, case, recording.ts, reuse) for reuse in ("hold", "linear")}
    parts = [_change(recording, profile, plans, r, gap) for gap in GAPS for r in range(gap, len(recording.y) - gap)]
    true = {name: torch.stack([part[0][name] for part in parts], 1) for name in parts[0][0]}
    predicted = {name: torch.stack([part[1][name] for part in parts], 1) for name in parts[0][1]}
    steps = [(r + gap, gap) for gap in GAPS for r in range(gap, len(recording.y) - gap)]
    return Changes(true, predicted, *torch.tensor(steps).T)


class _Expected:
    """What a plan that evaluates at two neighbouring nodes and then reuses would expect."""

    def __init__(self, profile: SensitivityProfile, case: Case, ts: Tensor, reuse: str):
        # The bare plan: with the profile alone, whatever field it is of.
        plan = CachedField(lambda x, t: x, profile, reuse=reuse).plan(ts, case.stepper)
        times, gain = influence(case.stepper, ts)
        gram = profile.gram_at(times).numpy()
        self.variable = VARIABLES[plan.variable]
        self.problem = Problem(times.numpy(), gain.numpy(), gram, reuse, plan.variable, plan.correct)

    def at(self, before: int, r: int, j: int) -> tuple[Tensor, Tensor]:
        """The expected error of a reuse at j, and the expected difference of the outputs at `before` and r."""
        plan = expectation(self.problem, np.array([before, r]), 1.0)
        return plan.change[j], plan.difference[j]


def _change(
    recording: Recording, profile: SensitivityProfile, plans: dict[str, _Expected], r: int, gap: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """True and predicted changes (S,) of the reuse of y_r at r + gap."""
    ts, before, j = recording.ts.double(), r - gap, r + gap
    y_2, y_r, y_j = (recording.y[k] for k in (before, r, j))
    difference, elapsed = rms(y_r - y_2).double().cpu(), (ts[j] - ts[r]).abs()
    alpha_x, alpha_t = profile.lookup(ts[r : r + 1])
    latent, time = alpha_x * rms(recording.x[j] - recording.x[r]).double().cpu(), alpha_t * elapsed  # Eq. 9
    s = plans["linear"].variable(ts[[j, r, before]].numpy())
    phi = linear(*s[:, None].repeat(len(y_r), 1))

    def planned(reuse: str) -> Tensor:  # as `Planned` does
        change, expected = plans[reuse].at(before, r, j)
        return change * (difference / expected).sqrt()

    true = {"hold": rms(y_j - y_r), "linear": rms(y_j - continued(y_r, y_2, phi))}
    predicted = {
        "time term": time.expand_as(difference),
        "latent term": latent,
        "S, their sum": latent + time,
        "own difference": difference * elapsed / (ts[r] - ts[before]).abs(),
        "plan, holding": planned("hold"),
        "plan, on a line": planned("linear"),
    }
    return {name: value.double().cpu() for name, value in true.items()}, predicted


class Agreement(NamedTuple):
    """How good a prediction is, with bootstrap standard errors over samples."""

    rank: float  # Spearman's correlation over all samples, steps and gaps
    rank_se: float
    within: float  # across the samples of one step and gap, median over those: whether samples are told apart
    within_se: float
    ratio: float  # median of predicted over true
    ratio_se: float
    low: float  # its deciles
    high: float
    under: float  # the share predicted below the truth


def agreement(predicted: Tensor, true: Tensor, resamplings: int = 100) -> Agreement:
    """Predicted beside true changes (S, N)."""
    p, q = np.broadcast_arrays(predicted.numpy(), true.numpy())
    ratio, drawn = p / q, np.random.default_rng(0).integers(len(p), size=(resamplings, len(p)))

    def statistics(rows: np.ndarray) -> tuple[float, float, float]:
        told = _spearman(p[rows], q[rows])
        pooled = _spearman(p[rows].reshape(-1, 1), q[rows].reshape(-1, 1))
        return float(pooled[0]), float(np.median(told)), float(np.median(ratio[rows]))

    rank, within, middle = statistics(np.arange(len(p)))
    errors = np.std([statistics(rows) for rows in drawn], 0)
    low, high = np.quantile(ratio, [0.1, 0.9])
    under = float((ratio < 1).mean())
    return Agreement(rank, float(errors[0]), within, float(errors[1]), middle, float(errors[2]), low, high, under)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The correlation of ranks down every column of a and b (S, N), (N,); 0 where either is constant."""
    one, other = (rankdata(values, axis=0) for values in (a, b))
    one, other = one - one.mean(0), other - other.mean(0)
    size = np.sqrt((one**2).sum(0) * (other**2).sum(0))
    return (one * other).sum(0) / np.where(size > 0, size, 1)
