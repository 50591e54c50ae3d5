"""The best schedule of a given length, every gap taken alone: a shortest path over pairs of evaluations.

What a gap between two evaluations leaves in the final state depends on its two ends and, where outputs are continued,
on the evaluation before; `plan.py` says what it is made of. Until the evaluation at its end repays it, the state owes
what was left, and in that state the output there is off by about ||J_x|| times as much: an echo, of which the direction
is not known, so that its square is added. Where a gap is long beside 1 / ||J_x||, echoes can grow from gap to gap.
Shapes: T query times of the grid; S calibration samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sencache.correct import owed
from sencache.reuse import REUSES, VARIABLES

HEARD = 0.5  # of echoes, in the search, which knows only a part of what they weigh; a whole schedule's are all counted

# The longest gaps, in units of 1 / ||J_x||: nine tenths of where dx/dt = -||J_x|| x is no longer damped when lines are
# continued (Adams-Bashforth of order 2: 1) or outputs held (Euler: 2). Repaid lines bear .54 on that equation, beyond
# which nothing is made longer, and more on trained fields, where echoes have no direction.
STABLE = {"linear": 0.9, "hold": 1.8}
DAMPED = {"linear": 0.54, "hold": 1.8}


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
    alpha_x: Tensor | None = None  # (T,) ||J_x||, how wrong an output is in a wrong state; by default not at all
    heard: float = HEARD  # what share of echoes the search counts

    def __post_init__(self) -> None:
        if self.part is None:
            object.__setattr__(self, "part", torch.zeros(len(self.times), dtype=torch.int64))
        if self.alpha_x is None:
            object.__setattr__(self, "alpha_x", torch.zeros_like(self.times))

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
            repaid = torch.from_numpy(owed(moments.numpy(), nodes.numpy())) * later[:, None]
            for node, share in zip((end.clamp(max=size - 1), ref, before.clamp(min=0)), repaid.unbind(1), strict=True):
                left[rows, node] -= share
        return left

    def instability(self, limits: Mapping[str, float] = STABLE) -> Tensor:
        """What gaps ref -> end beyond `limits` are taken to cost, (T, T + 1), in squares of all that is integrated.

        The square of how far they go beyond, at the reference's ||J_x||. A gap is as long as what its outputs weigh in
        the end: so long in t for Euler. The first is always held, and from the last nothing goes on.
        """
        assert self.alpha_x is not None
        reach, j = _until(self.gain.abs()), torch.arange(len(self.times))
        stable = torch.full((len(j), len(reach)), limits[self.reuse], dtype=reach.dtype)
        stable[0] = stable[:, -1] = limits["hold"]
        beyond = (self.alpha_x[:, None] * (reach - reach[:-1, None]) - (1 + 1e-9) * stable).clamp(min=0)
        return beyond.square() * (torch.arange(len(reach)) > j[:, None] + 1)

    def costs(self) -> Tensor:
        """Expected squared error (T + 1, T, T + 1) that each gap leaves, by `before` (-1 last), `ref` and `end`.

        With the echo of the gap in the output at its end, as far as that output weighs in repaying it and in its step,
        and with what an unstable gap is taken to cost.

        What `residual` leaves is A = sum_j c_j f_j over the gap and three outputs, so its square needs no vector of T
        weights: the products of A with outputs and with itself are differences of running sums of G.
        """
        size, mean, s = len(self.times), self.gram.mean(0), VARIABLES[self.variable](self.times)
        j, ends = torch.arange(size), torch.arange(size + 1).clamp(max=size - 1)
        weight, u = self.gain * (j > j[:, None]), s - s[:, None]  # (ref, j)
        total, first, second = _until(weight), _until(weight * u), _until(weight * u**2)  # (ref, end)
        until = _until((self.gain * mean).T, 0)  # (end, i), <sum_{j < end} c_j f_j, f_i>
        both = _until(_until(self.gain * self.gain[:, None] * mean), 0)  # (end, end)
        by_ref, by_end = until[1:], until[range(size + 1), ends]
        within = both.diagonal() - both[1:] - both[1:] + both.diagonal()[1:, None]  # <A, A>, (ref, end)
        with_ref = until.T - by_ref.diagonal()[:, None]  # <A, f_ref>
        with_end = by_end - by_ref[:, ends]  # <A, f_end>
        assert self.alpha_x is not None
        echo = self.heard * torch.cat([self.alpha_x, self.alpha_x.new_zeros(1)])  # nothing is evaluated at T
        own = torch.cat([self.gain, self.gain.new_zeros(1)]).abs()
        unstable = self.instability() * integrated(self, mean)
        cost = torch.full((size + 1, size, size + 1), torch.inf, dtype=torch.float64)
        for before in range(-1, size - 1):
            rows, after = slice(before + 1, None if before >= 0 else 1), slice(before + 2, None)  # refs and ends
            here, ref, end = (rows, after), j[rows], torch.arange(size + 1)[after]
            known = self.together(ref, ref.new_tensor(before)) & (before >= 0)
            s_before = torch.where(known, s[before], torch.nan)[:, None]
            used = _until(weight[rows] * REUSES[self.reuse](s.expand(len(ref), -1), s[ref, None], s_before))[:, after]
            repaid = torch.zeros(*used.shape, 3, dtype=torch.float64)
            if self.correct:
                moments = torch.stack([first[here], second[here], used], -1)
                nodes = torch.stack(torch.broadcast_tensors(s[ends[after]], s[ref, None], s_before), -1)
                evaluated = self.together(ref[:, None], end) & (end < size)
                repaid = torch.from_numpy(owed(moments.numpy(), nodes.numpy())) * evaluated[..., None]
            k, r, b = repaid.unbind(-1)
            three = ends[after], ref[:, None], before  # their weights are 0 where they are none
            products = with_end[here], with_ref[here], until[after, before] - by_ref[rows, before, None]  # <A, f_i>
            among = [[mean[one, other] for other in three] for one in three]
            debt = _squared(within[here], (0 * used, -total[here] - used, used), products, among)  # until it is repaid
            left = _squared(within[here], (-k, -total[here] - used - r, used - b), products, among)
            form = left + unstable[here] + (echo[after] * (k.abs() + own[after])) ** 2 * debt
            real = (end > ref[:, None]) & self.together(end - 1, ref[:, None])
            cost[before, rows, after] = torch.where(real, form, torch.inf)
        return cost


def _squared(
    within: Tensor, weights: Sequence[Tensor], products: Sequence[Tensor], among: Sequence[Sequence[Tensor]]
) -> Tensor:
    """The square of A + sum_i w_i f_i, from <A, A>, <A, f_i> and <f_i, f_j>."""
    total = within
    for weight, product, row in zip(weights, products, among, strict=True):
        total = total + weight * (2 * product + sum(g * other for g, other in zip(row, weights, strict=True)))
    return total.clamp(min=0)


def _until(terms: Tensor, dim: int = -1) -> Tensor:
    """Running sums along `dim`, each without its own term: one longer, from 0 to the total."""
    return torch.cat([torch.zeros_like(terms.narrow(dim, 0, 1)), terms.cumsum(dim)], dim)


def schedules(problem: Problem, most: int) -> list[Tensor]:
    """The best schedules of 1, 2, ..., `most` evaluations, index tensors (N,), by dynamic programming."""
    cost, size = problem.costs(), len(problem.times)
    best = torch.full((most, size, size + 1), torch.inf, dtype=torch.float64)  # by length, its last evaluation
    choice = torch.zeros(best.shape, dtype=torch.int64)  # and the end of its gap: what it costs, and the one before
    best[:1, 0] = cost[-1, 0]
    for ref in range(1, size):
        gaps = best[:-1, :ref, ref, None] + cost[:ref, ref, ref + 1 :]  # (length, before, end)
        best[1:, ref, ref + 1 :], choice[1:, ref, ref + 1 :] = gaps.min(1)
    found: list[Tensor] = []
    for n in range(most):
        nodes, end = [int(best[n, :, size].argmin())], size
        for k in range(n, 0, -1):
            nodes, end = [int(choice[k, nodes[0], end]), *nodes], nodes[0]
        found.append(torch.tensor(nodes))
    return found


def integrated(problem: Problem, gram: Tensor) -> Tensor:
    """The square, (), of all that a sample of this Gram matrix (T, T) is moved by, as if it all went one way."""
    return problem.gain.abs().sum() ** 2 * gram.diagonal().mean()


def quadratic(weights: Tensor, gram: Tensor) -> Tensor:
    """w^T G w of each row of weights (n, T), (n,)."""
    return ((weights @ gram) * weights).sum(1).clamp(min=0)
