"""Where to evaluate: the best schedule of a given length, a shortest path over the Gram matrix of the outputs.

What a schedule will do to the sample is known before it is run. The outputs f_j along a few full trajectories were
kept as their inner products G_ij = <f_i, f_j> / d; a reuse, a correction and a step are all linear in outputs; so the
error that a schedule leaves in the final state is a vector w of weights of the f_j, and its size is sqrt(w^T G w).
It falls apart into one term a gap, which depends on the gap's two ends and, where outputs are extrapolated, on the
evaluation before: a shortest path over pairs of evaluations finds the best schedule.

Left out is what the errors do to later outputs; the theory page has what that costs.

Shapes: T query times of the grid; S calibration samples; gram (S, T, T); N evaluations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sencache.correct import owed
from sencache.profile import SensitivityProfile
from sencache.reuse import REUSES, VARIABLES
from solvers import Stepper, VelocityField


@dataclass(frozen=True, eq=False)
class Plan:
    """The times at which to evaluate, and what is expected of the rest."""

    times: Tensor  # (T,) float64, all query times of the grid, in order
    nodes: Tensor  # (N,) int64, which of them are evaluated
    reuse: str
    variable: str  # in which outputs are continued and interpolated
    correct: bool
    change: Tensor  # (T,) expected RMS error of each reused output; 0 at the nodes
    error: Tensor  # (S,) expected RMS error of the final state, of each calibration sample
    relative_error: float  # its median, over the RMS of that state

    @property
    def direction(self) -> int:
        """The sign of dt along the grid."""
        return 1 if self.times[-1] > self.times[0] else -1

    def predicted(self, t_ref: Tensor, t: Tensor) -> Tensor:
        """The expected error (B,) of a reuse at t of what was evaluated at t_ref; infinite if a node lies between."""
        nodes = self.times[self.nodes] * self.direction
        slack = self.times.diff().abs().min() / 2 if len(self.times) > 1 else 0.0
        passed, before = (torch.searchsorted(nodes, at * self.direction + slack, right=True) for at in (t, t_ref))
        nearest = (self.times[None] - t[:, None]).abs().argmin(1)
        outside = (t < self.times.min() - slack) | (t > self.times.max() + slack)
        return torch.where((passed > before) | outside, torch.inf, self.change[nearest])


def influence(stepper: Stepper, ts: Tensor) -> tuple[Tensor, Tensor]:
    """The query times (T,) of a stepper on ts (K + 1,), and dx_K / dv_j (T,): how it weighs each output in the end.

    A stepper is linear in the outputs it is given, so it is run on outputs that are unit vectors. Several queries at
    one time count as one output.
    """
    linear, ts = getattr(stepper, "linear", stepper), ts.double().cpu()
    asked: list[float] = []

    def count(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.zeros_like(x)

    _linear_end(linear, count, ts, 1)
    times = list(dict.fromkeys(asked))
    unit = torch.eye(len(times), dtype=torch.float64)
    answers = iter([unit[times.index(t)] for t in asked])
    end = _linear_end(linear, lambda x, t: next(answers).expand_as(x), ts, len(times))
    return torch.tensor(times, dtype=torch.float64), end[0]


def _linear_end(stepper: Stepper, field: VelocityField, ts: Tensor, columns: int) -> Tensor:
    x, memory = torch.zeros(1, columns, dtype=torch.float64), None
    for t, t_next in pairwise(ts):
        dx, memory = stepper.advance(field, x, t, t_next, memory)
        x = x + dx
    return x


@dataclass(frozen=True, eq=False)
class Problem:
    """What the error of a schedule is made of: one grid, one stepper, one way to reuse."""

    times: Tensor  # (T,) float64
    gain: Tensor  # (T,) dx_K / dv_j
    gram: Tensor  # (S, T, T)
    reuse: str
    variable: str
    correct: bool

    def residual(self, before: Tensor, ref: Tensor, end: Tensor) -> Tensor:
        """The weights (n, T) of the outputs in what gaps ref -> end leave in the final state; `before` ended at ref.

        Indices (n,) of query times: before = -1 where nothing was evaluated earlier, end = T where nothing will be.
        """
        size = len(self.times)
        s, j = VARIABLES[self.variable](self.times), torch.arange(size)
        s_ref, s_before = s[ref], torch.where(before >= 0, s[before], torch.nan)
        inside = (j > ref[:, None]) & (j < end[:, None])
        phi = REUSES[self.reuse](s.expand(len(ref), -1), s_ref[:, None], s_before[:, None])
        weight = self.gain * inside
        rows = torch.arange(len(ref))
        left = weight.clone()  # true outputs, less what was used
        left[rows, ref] -= (weight * (1 + phi)).sum(1)
        left[rows, before.clamp(min=0)] += (weight * phi).sum(1)
        if self.correct:
            later = end < size
            u = s - s_ref[:, None]
            moments = torch.stack([(weight * part).sum(1) for part in (u, u**2, phi)], 1)
            nodes = torch.stack([s[end.clamp(max=size - 1)], s_ref, s_before], 1)
            repaid = owed(moments, nodes) * later[:, None]
            for node, share in zip((end.clamp(max=size - 1), ref, before.clamp(min=0)), repaid.unbind(1), strict=True):
                left[rows, node] -= share
        return left

    def costs(self) -> Tensor:
        """Expected squared error (T + 1, T, T + 1) that each gap leaves, by `before` (-1 last), `ref` and `end`."""
        size, mean = len(self.times), self.gram.mean(0)
        before, ref, end = torch.meshgrid(
            torch.arange(-1, size), torch.arange(size), torch.arange(size + 1), indexing="ij"
        )
        real = ((before < ref) & (ref < end) & ((before >= 0) | (ref == 0))).nonzero()
        cost = torch.full((size + 1, size, size + 1), torch.inf, dtype=torch.float64)
        for some in real.split(1 << 15):
            left = self.residual(some[:, 0] - 1, some[:, 1], some[:, 2])
            cost[some[:, 0] - 1, some[:, 1], some[:, 2]] = _form(left, mean)
        return cost


def schedules(problem: Problem, most: int) -> list[Tensor]:
    """The best schedules of 1, 2, ..., `most` evaluations, index tensors (N,), by dynamic programming."""
    cost, size = problem.costs(), len(problem.times)
    best = torch.full((size, size + 1), torch.inf, dtype=torch.float64)  # by last evaluation and the end of its gap
    best[0] = cost[-1, 0]
    choices, found = [], []
    for n in range(1, most + 1):
        if n > 1:
            reached = best[:, :size, None] + cost[:size]  # (before, ref, end)
            best, choice = reached.min(0)
            choices.append(choice)
        nodes = [int(best[:, size].argmin())]
        end = size
        for choice in reversed(choices):
            nodes, end = [int(choice[nodes[0], end]), *nodes], nodes[0]
        found.append(torch.tensor(nodes))
    return found


def expectation(problem: Problem, nodes: Tensor, size: Tensor) -> Plan:
    """What is to be expected of evaluating at the query times `nodes` (N,), for a final state of RMS `size`."""
    before = torch.cat([torch.tensor([-1]), nodes[:-1]])
    end = torch.cat([nodes[1:], torch.tensor([len(problem.times)])])
    total = problem.residual(before, nodes, end).sum(0, keepdim=True)
    error = torch.cat([_form(total, gram) for gram in problem.gram]).sqrt()
    relative, change = float(error.median() / size), _changes(problem, nodes)
    return Plan(problem.times, nodes, problem.reuse, problem.variable, problem.correct, change, error, relative)


def _changes(problem: Problem, nodes: Tensor) -> Tensor:
    """The expected RMS error (T,) of each reused output."""
    s, mean = VARIABLES[problem.variable](problem.times), problem.gram.mean(0)
    j = torch.arange(len(problem.times))
    which = torch.searchsorted(nodes, j, right=True) - 1
    ref, before = nodes[which], torch.where(which > 0, nodes[(which - 1).clamp(min=0)], -1)
    phi = REUSES[problem.reuse](s, s[ref], torch.where(before >= 0, s[before], torch.nan))
    weights = torch.zeros(len(j), len(j), dtype=torch.float64)
    weights[j, j] += 1
    weights[j, ref] -= 1 + phi
    weights[j, before.clamp(min=0)] += phi
    return _form(weights, mean).sqrt()


def _form(weights: Tensor, gram: Tensor) -> Tensor:
    """w^T G w of each row of weights (n, T), (n,)."""
    return ((weights @ gram) * weights).sum(1).clamp(min=0)


def sampler_name(stepper: Stepper, ts: Tensor) -> str:
    """Tells samplers apart: the stepper, and the grid in words and by its digest."""
    digest = hashlib.sha256(ts.double().cpu().numpy().tobytes()).hexdigest()[:8]
    return f"{stepper}, {len(ts) - 1} steps from {ts[0]:g} to {ts[-1]:g} ({digest})"


def plan_for(
    profile: SensitivityProfile,
    ts: Tensor,
    stepper: Stepper,
    reuse: str,
    correct: bool,
    nfe: int | None = None,
    rtol: float | None = None,
) -> Plan:
    """The best plan of `nfe` evaluations on ts (K + 1,), by default half of them, or the cheapest that meets `rtol`.

    Of the several outputs that Heun and its like ask for at one time, a plan evaluates the first and reuses it for the
    others; and the output at the grid's end, which only they ask for, it takes for the last one that was calibrated.
    The variable in which outputs are continued is the one in which the plan is expected to do better.
    """
    times, gain = influence(stepper, ts)
    if nfe is not None and nfe > len(times):
        raise ValueError(f"`nfe` is {nfe}, and {stepper} asks for only {len(times)} outputs on this grid.")
    return best_plan(profile, times, gain, sampler_name(stepper, ts), reuse, correct, nfe, rtol)


def best_plan(
    profile: SensitivityProfile,
    times: Tensor,
    gain: Tensor,
    sampler: str,
    reuse: str,
    correct: bool,
    nfe: int | None,
    rtol: float | None,
    problem: Callable[..., Problem] = Problem,
) -> Plan:
    """`plan_for` a sampler known by its query times (T,), dx_K / dv_j (T,) and name; `problem` makes its problem."""
    logarithm = "log t" if profile.direction < 0 else "log(1 - t)"
    problems = [problem(times, gain, profile.gram_at(times), reuse, name, correct) for name in ("t", logarithm)]
    most = len(times) if rtol is not None else nfe or -(-len(times) // 2)
    found = [schedules(one, most) for one in problems]
    size = profile.size.median() if profile.size is not None else torch.tensor(torch.nan)

    def best(n: int) -> Plan:
        plans = [expectation(one, nodes[n - 1], size) for one, nodes in zip(problems, found, strict=True)]
        return min(plans, key=lambda plan: float(plan.error.median()))

    if rtol is None:
        return best(most)
    rehearsed = profile.facts.get("rehearsed")
    if rehearsed != sampler:
        raise ValueError(f"`rtol` was rehearsed with {rehearsed}; got {sampler}. Rehearse that, or use `nfe`.")
    promised = (best(n) for n in range(1, most + 1) if profile.factor(n) < torch.inf)
    keeps = (plan for plan in promised if plan.relative_error * profile.factor(len(plan.nodes)) <= rtol)
    return next(keeps, best(most))
