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
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sencache.correct import owed
from sencache.memory import Regime, one_network
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
    difference: Tensor  # (T,) expected RMS difference of the last two evaluations before each output; NaN without two
    error: Tensor  # (S,) expected RMS error of the final state, of each calibration sample
    relative_error: float  # its median, over the RMS of that state
    promised: float = torch.inf  # the relative error that 90 % of samples keep, once plans were rehearsed

    @property
    def direction(self) -> int:
        """The sign of dt along the grid."""
        return 1 if self.times[-1] > self.times[0] else -1

    def predicted(self, t_ref: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The expected error (B,) of a reuse at t of what was evaluated at t_ref, infinite if a node lies between.

        And the difference (B,) of the two evaluations before it that goes with this expectation.
        """
        nodes = self.times[self.nodes] * self.direction
        slack = self.times.diff().abs().min() / 2 if len(self.times) > 1 else 0.0
        passed, before = (torch.searchsorted(nodes, at * self.direction + slack, right=True) for at in (t, t_ref))
        nearest = (self.times[None] - t[:, None]).abs().argmin(1)
        outside = (t < self.times.min() - slack) | (t > self.times.max() + slack)
        return torch.where((passed > before) | outside, torch.inf, self.change[nearest]), self.difference[nearest]


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
    part: Tensor | None = None  # (T,) which network answers, counted along the grid; by default one throughout

    def __post_init__(self) -> None:
        if self.part is None:
            object.__setattr__(self, "part", torch.zeros(len(self.times), dtype=torch.int64))

    def together(self, one: Tensor, other: Tensor) -> Tensor:
        """Whether one network answers at the query times of both indices; nothing is reused or repaid across two.

        Of -1 and T, where nothing is evaluated, what is said means nothing.
        """
        assert self.part is not None
        last = len(self.times) - 1
        return self.part[one.clamp(0, last)] == self.part[other.clamp(0, last)]

    def residual(self, before: Tensor, ref: Tensor, end: Tensor) -> Tensor:
        """The weights (n, T) of the outputs in what gaps ref -> end leave in the final state; `before` ended at ref.

        Indices (n,) of query times: before = -1 where nothing was evaluated earlier, end = T where nothing will be.
        """
        size = len(self.times)
        s, j = VARIABLES[self.variable](self.times), torch.arange(size)
        s_ref, s_before = s[ref], torch.where((before >= 0) & self.together(before, ref), s[before], torch.nan)
        inside = (j > ref[:, None]) & (j < end[:, None])
        phi = REUSES[self.reuse](s.expand(len(ref), -1), s_ref[:, None], s_before[:, None])
        weight = self.gain * inside
        rows = torch.arange(len(ref))
        left = weight.clone()  # true outputs, less what was used
        left[rows, ref] -= (weight * (1 + phi)).sum(1)
        left[rows, before.clamp(min=0)] += (weight * phi).sum(1)
        if self.correct:
            later = (end < size) & self.together(end, ref)
            u = s - s_ref[:, None]
            moments = torch.stack([(weight * part).sum(1) for part in (u, u**2, phi)], 1)
            nodes = torch.stack([s[end.clamp(max=size - 1)], s_ref, s_before], 1)
            repaid = owed(moments, nodes) * later[:, None]
            for node, share in zip((end.clamp(max=size - 1), ref, before.clamp(min=0)), repaid.unbind(1), strict=True):
                left[rows, node] -= share
        return left

    def costs(self) -> Tensor:
        """Expected squared error (T + 1, T, T + 1) that each gap leaves, by `before` (-1 last), `ref` and `end`.

        What `residual` leaves is A = sum_j c_j f_j over the gap and three outputs, so its square needs no vector of T
        weights: the products of A with outputs and with itself are differences of running sums of G.
        """
        size, mean, s = len(self.times), self.gram.mean(0), VARIABLES[self.variable](self.times)
        j, ends = torch.arange(size), torch.arange(size + 1).clamp(max=size - 1)
        weight, u = self.gain * (j > j[:, None]), s - s[:, None]  # (ref, j)
        total, first, second = _until(weight), _until(weight * u), _until(weight * u**2)  # (ref, end)
        until = _until((self.gain * mean).T, 0)  # (end, i), <sum_{j < end} c_j f_j, f_i>
        square = _until(_until(self.gain * self.gain[:, None] * mean), 0)  # (end, end)
        by_ref, by_end = until[1:], until[range(size + 1), ends]
        within = square.diagonal() - square[1:] - square[1:] + square.diagonal()[1:, None]  # <A, A>, (ref, end)
        with_ref = until.T - by_ref.diagonal()[:, None]  # <A, f_ref>
        with_end = by_end - by_ref[:, ends]  # <A, f_end>
        cost = torch.full((size + 1, size, size + 1), torch.inf, dtype=torch.float64)
        for before in range(-1, size - 1):
            ref = j[before + 1 :] if before >= 0 else j[:1]
            known = self.together(ref, ref.new_tensor(before)) & (before >= 0)
            s_before = torch.where(known, s[before], torch.nan)[:, None]
            used = _until(weight[ref] * REUSES[self.reuse](s.expand(len(ref), -1), s[ref, None], s_before))
            repaid = torch.zeros(len(ref), size + 1, 3, dtype=torch.float64)
            if self.correct:
                moments = torch.stack([first[ref], second[ref], used], -1)[:, :size]
                nodes = torch.stack(torch.broadcast_tensors(s, s[ref, None], s_before), -1)
                repaid[:, :size] = owed(moments.reshape(-1, 3), nodes.reshape(-1, 3)).reshape(moments.shape)
                repaid[:, :size] *= self.together(ref[:, None], j)[..., None]
            parts = torch.stack([-repaid[..., 0], -total[ref] - used - repaid[..., 1], used - repaid[..., 2]], -1)
            with_before = until[:, before] - by_ref[ref, before, None]  # <A, f_before>
            products = torch.stack([with_end[ref], with_ref[ref], with_before], -1)
            three = torch.stack(torch.broadcast_tensors(ends, ref[:, None], torch.tensor(max(before, 0))), -1)
            among = mean[three[..., :, None], three[..., None, :]]  # (ref, end, 3, 3)
            form = within[ref] + 2 * (parts * products).sum(-1) + torch.einsum("...i,...ij,...j", parts, among, parts)
            end = torch.arange(size + 1)
            real = (end > ref[:, None]) & self.together(end - 1, ref[:, None])
            cost[before, ref] = torch.where(real, form.clamp(min=0), torch.inf)
        return cost


def _until(terms: Tensor, dim: int = -1) -> Tensor:
    """Running sums along `dim`, each without its own term: one longer, from 0 to the total."""
    return torch.cat([torch.zeros_like(terms.narrow(dim, 0, 1)), terms.cumsum(dim)], dim)


def schedules(problem: Problem, most: int) -> list[Tensor]:
    """The best schedules of 1, 2, ..., `most` evaluations, index tensors (N,), by dynamic programming."""
    cost, size = problem.costs(), len(problem.times)
    best = torch.full((size, size + 1), torch.inf, dtype=torch.float64)  # by last evaluation and the end of its gap
    best[0] = cost[-1, 0]
    choices: list[Tensor] = []
    found: list[Tensor] = []
    for n in range(1, most + 1):
        if n > 1:
            reached, choice = torch.full_like(best, torch.inf), torch.zeros(best.shape, dtype=torch.int64)
            for ref in range(n - 1, size):
                gaps = best[n - 2 : ref, ref, None] + cost[n - 2 : ref, ref, ref + 1 :]  # (before, end)
                reached[ref, ref + 1 :], choice[ref, ref + 1 :] = gaps.min(0)
            best, choices = reached, [*choices, choice + n - 2]
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
    relative = float(error.median() / size)
    kind = problem.reuse, problem.variable, problem.correct
    return Plan(problem.times, nodes, *kind, *_changes(problem, nodes), error, relative)


def _changes(problem: Problem, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The expected RMS error (T,) of each reused output, and RMS difference (T,) of the two evaluations before it.

    Medians over the calibration samples, as a prediction of one should be.
    """
    s, j = VARIABLES[problem.variable](problem.times), torch.arange(len(problem.times))
    which = torch.searchsorted(nodes, j, right=True) - 1
    ref, before = nodes[which], torch.where(which > 0, nodes[(which - 1).clamp(min=0)], -1)
    known = (before >= 0) & problem.together(before, ref)
    phi = REUSES[problem.reuse](s, s[ref], torch.where(known, s[before], torch.nan))
    error, apart = torch.zeros(2, len(j), len(j), dtype=torch.float64)
    error[j, j] += 1
    error[j, ref] -= 1 + phi
    error[j, before.clamp(min=0)] += phi
    apart[j, ref] += 1
    apart[j, before.clamp(min=0)] -= 1
    change, difference = (
        torch.stack([_form(weights, gram).sqrt() for gram in problem.gram]).median(0).values
        for weights in (error, apart)
    )
    return change, torch.where(known, difference, torch.nan)


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
    regime: Regime = one_network,
) -> Plan:
    """The best plan of `nfe` evaluations on ts (K + 1,), by default half of them, or the cheapest that meets `rtol`.

    Of the several outputs that Heun and its like ask for at one time, a plan evaluates the first and reuses it for the
    others; and the output at the grid's end, which only they ask for, it takes for the last one that was calibrated.
    Where `regime` changes, another network takes over: its first time is evaluated, and nothing is carried across.
    The variable in which outputs are continued is the one in which the plan is expected to do better.
    """
    times, gain = influence(stepper, ts)
    if nfe is not None and nfe > len(times):
        raise ValueError(f"`nfe` is {nfe}, and {stepper} asks for only {len(times)} outputs on this grid.")
    logarithm = "log t" if profile.direction < 0 else "log(1 - t)"
    answers = regime(times)
    part = torch.cat([torch.zeros(1, dtype=torch.int64), (answers[1:] != answers[:-1]).cumsum(0)])
    networks = int(part[-1]) + 1
    if nfe is not None and nfe < networks:
        raise ValueError(
            f"`nfe` is {nfe}, and {networks} networks take turns on this grid, each evaluated once or more."
        )
    gram = profile.gram_at(times)
    problems = [Problem(times, gain, gram, reuse, name, correct, part) for name in ("t", logarithm)]
    rehearsed, here = profile.facts.get("rehearsed"), sampler_name(stepper, ts)
    if rtol is not None and rehearsed != here:
        raise ValueError(f"`rtol` was rehearsed with {rehearsed}; got {here}. Rehearse that, or use `nfe`.")
    known = rehearsed == here and reuse == "linear" and correct
    most = nfe or -(-len(times) // 2)
    if rtol is not None:
        most = 0 if profile.budgets is None else min(len(times), int(profile.budgets.max()))
    found = [schedules(problem, most) for problem in problems]
    size = profile.size.median() if profile.size is not None else torch.tensor(torch.nan)

    def best(nodes: list[Tensor]) -> Plan:
        plans = [expectation(problem, each, size) for problem, each in zip(problems, nodes, strict=True)]
        plan, n = min(plans, key=lambda plan: float(plan.error.median())), len(nodes[0])
        if not known:
            return plan
        return replace(plan, change=plan.change * profile.typical(n), promised=plan.relative_error * profile.factor(n))

    if rtol is None:
        return best([each[-1] for each in found])
    cheaper = (best(list(nodes)) for nodes in list(zip(*found, strict=True))[networks - 1 :])
    return next((plan for plan in cheaper if plan.promised <= rtol), best(2 * [torch.arange(len(times))]))
