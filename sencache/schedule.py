"""The best schedule of a given length, every gap taken alone: a shortest path over pairs of evaluations.

What a gap between two evaluations leaves in the final state depends on its two ends and, where outputs are continued,
on the evaluation before; `plan.py` says what it is made of. Until the evaluation at its end repays it, the state owes
what was left, and in that state the output there is off by about ||J_x|| times as much: an echo, of which the direction
is not known, so that its square is added. Where a gap is long beside 1 / ||J_x||, echoes can grow from gap to gap.
Shapes: T query times of the grid; S calibration samples. Arrays are NumPy's, quick where there are few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from sencache.batch import Array
from sencache.correct import owed
from sencache.reuse import REUSES, VARIABLES

HEARD = 0.5  # of echoes, in the search, which knows only a part of what they weigh; a whole schedule's are all counted

# The longest gaps, in units of 1 / ||J_x||: nine tenths of where dx/dt = -||J_x|| x is no longer damped when lines are
# continued (Adams-Bashforth of order 2: 1) or outputs held (Euler: 2). Repaid lines bear .54 on that equation, beyond
# which nothing is made longer, and more on trained fields, where echoes have no direction.
STABLE = {"linear": 0.9, "hold": 1.8}
DAMPED = {"linear": 0.54, "hold": 1.8}


def _none() -> Array:
    return np.zeros(1, dtype=np.int64)


def _as_it_is() -> Array:
    return np.ones(1)


@dataclass(frozen=True, eq=False)
class Problem:
    """What the error of a schedule is made of: one grid, one stepper, one way to reuse."""

    times: Array  # (T,) float64
    gain: Array  # (T,) dx_K / dv_j
    gram: Array  # (S, T, T)
    reuse: str
    variable: str
    correct: bool
    part: Array = field(default_factory=_none)  # (T,) which network answers, counted along the grid; or 0
    alpha_x: Array = field(default_factory=_none)  # (T,) ||J_x||, how wrong an output is in a wrong state; or 0
    samples_x: Array | None = None  # (S, T) of each sample
    heard: float = HEARD  # what share of echoes the search counts
    carried: Array = field(default_factory=_as_it_is)  # (T,) times what an error of each output is made in the end
    states: Array | None = None  # (T, T) `Response.states`, where those weigh outputs otherwise than the end

    def __post_init__(self) -> None:
        for name in ("part", "alpha_x", "carried"):
            object.__setattr__(self, name, np.broadcast_to(getattr(self, name), self.times.shape))

    def together(self, one: Array, other: Array | int) -> Array:
        """Whether one network answers at the query times of both indices; nothing is reused or repaid across two.

        Of -1 and T, where nothing is evaluated, what is said means nothing.
        """
        return np.asarray(self._parts[one] == self._parts[other])

    @property
    def rates(self) -> Array:
        """||J_x|| of each sample, (S, T); (1, T) where only one for all is known."""
        return self.alpha_x[None] if self.samples_x is None else self.samples_x

    @cached_property
    def carry(self) -> Array:
        """What is made of what gaps ref -> end leave, (T, T + 1): the mean of `carried` along the gap; 1 of none."""
        until, j = _until(self.carried), np.arange(len(self.times) + 1)
        length = j - j[:-1, None]
        return np.where(length > 0, (until - until[:-1, None]) / np.maximum(length, 1), 1.0)

    @cached_property
    def _parts(self) -> Array:
        return np.append(self.part, self.part[-1])

    def residuals(self, before: Array, ref: Array, end: Array) -> tuple[Array, Array]:
        """The weights (n, T) of the outputs in what gaps ref -> end leave in the final state; `before` ended at ref.

        And in what the state at `end` owes just before it is repaid, as that one weighs outputs, in units of the end.
        Indices (n,) of query times: before = -1 where nothing was evaluated earlier, end = T where nothing will be.
        """
        size, s = len(self.times), VARIABLES[self.variable](self.times)
        j, two, k = np.arange(size), np.maximum(before, 0), np.minimum(end, size - 1)
        s_ref, s_before = s[ref], np.where((before >= 0) & self.together(before, ref), s[two], np.nan)
        reused, u = (j > ref[:, None]) & (j < end[:, None]), s - s_ref[:, None]
        phi = self.phi(s, s_ref[:, None], s_before[:, None])
        weight = self.gain * reused
        left, owes = (_less_used(each, phi, ref, two) for each in (weight, self.weighed[end] * reused))
        if self.correct:
            moments, nodes = np.stack([weight * u, weight * u**2, weight * phi], 1).sum(2), [s[k], s_ref, s_before]
            repaid = owed(moments, np.stack(nodes, 1)) * ((end < size) & self.together(end, ref))[:, None]
            for node, share in zip((k, ref, two), repaid.T, strict=True):
                left[np.arange(len(ref)), node] -= share
        return left, owes

    @cached_property
    def weighed(self) -> Array:
        """How the state of each query weighs every output, and the final one last, (T + 1, T)."""
        euler = np.tril(np.broadcast_to(self.gain, (len(self.gain), len(self.gain))), -1)
        return np.concatenate([euler if self.states is None else self.states, self.gain[None]])

    def phi(self, s: Array, s_ref: Array, s_before: Array) -> Array:
        """What a reuse adds of the difference of the last two evaluations."""
        return REUSES[self.reuse](s, s_ref, s_before)

    def instability(self, limits: Mapping[str, float] = STABLE) -> Array:
        """What gaps ref -> end beyond `limits` are taken to cost, (T, T + 1), in squares of all that is integrated.

        The square of how far they go beyond, at the reference's ||J_x||. A gap is as long as what its outputs weigh in
        the end: so long in t for Euler. The first is always held, and from the last nothing goes on.
        """
        reach, j = _until(abs(self.gain)), np.arange(len(self.times))
        stable = np.full((len(j), len(reach)), limits[self.reuse])
        stable[0] = stable[:, -1] = limits["hold"]
        beyond = np.maximum(self.alpha_x[:, None] * (reach - reach[:-1, None]) - (1 + 1e-9) * stable, 0)
        return np.asarray(beyond**2 * (np.arange(len(reach)) > j[:, None] + 1))

    def costs(self) -> Array:
        """Expected squared error (T + 1, T, T + 1) that each gap leaves, by `before` (-1 last), `ref` and `end`.

        With the echo of the gap in the output at its end, as far as that output weighs in repaying it and in its step,
        and with what an unstable gap is taken to cost.

        What a gap leaves is A = sum_j c_j (f_j - f_ref), less k (f_end - f_ref) and w (f_ref - f_before): its square
        needs no vector of T weights, because the products of A are differences of running sums of G.
        """
        size, mean, s = len(self.times), self.gram.mean(0), VARIABLES[self.variable](self.times)
        j, ends = np.arange(size), np.minimum(np.arange(size + 1), size - 1)
        weight, u = self.gain * (j > j[:, None]), s - s[:, None]  # (ref, j)
        total, first, second = _until(weight), _until(weight * u), _until(weight * u**2)  # (ref, end)
        until = _until((self.gain * mean).T, 0)  # (end, i), <sum_{j < end} c_j f_j, f_i>
        both = _until(_until(self.gain * self.gain[:, None] * mean), 0)  # (end, end)
        square, to_end = mean.diagonal(), mean[:, ends]
        with_ref = until.T - until[1:].diagonal()[:, None]  # <sum of the gap, f_ref>, (ref, end)
        with_end = until[np.arange(size + 1), ends] - until[1:, ends]
        within = both.diagonal() - 2 * both[1:] + both.diagonal()[1:, None]
        along = to_end - square[:, None]  # <f_end - f_ref, f_ref>
        a_ref = with_ref - total * square[:, None]  # <A, f_ref>
        a_a = within - total * (with_ref + a_ref)
        a_end = with_end - with_ref - total * along  # <A, f_end - f_ref>
        end_end = square[ends] - 2 * to_end + square[:, None]
        debts = Debts(self.weighed, mean)
        echo = self.heard * np.append(self.alpha_x, 0)  # nothing is evaluated at T
        own = np.append(abs(self.gain), 0)
        unstable = self.instability() * integrated(self, mean)
        cost = np.full((size + 1, size, size + 1), np.inf)
        for before in range(-1, size - 1):
            rows, after = slice(before + 1, None if before >= 0 else 1), slice(before + 2, None)  # refs and ends
            here, ref, end = (rows, after), j[rows, None], np.arange(size + 1)[after]
            s_before = np.where((before >= 0) & self.together(ref, before), s[before], np.nan)
            phi = self.phi(s, s[ref], s_before)
            used = _until(weight[rows] * phi)[:, after]
            k, w = 0 * used, used
            if self.correct:
                moments = np.stack([first[here], second[here], used], -1)
                nodes = np.stack(np.broadcast_arrays(s[ends[after]], s[ref], s_before), -1)
                evaluated = self.together(ref, end) & (end < size)
                k, _, b = np.moveaxis(owed(moments, nodes) * evaluated[..., None], -1, 0)
                w = used - b
            with_before, line = until[after, before] - until[1:][rows, before, None], mean[ref, before]
            a_line = a_ref[here] - with_before + total[here] * line  # <A, f_ref - f_before>; w is 0 without two
            line_line = square[ref] - 2 * line + square[before]
            end_line = along[here] - to_end[before, after] + line
            left = a_a[here] + k * (k * end_end[here] - 2 * a_end[here] + 2 * w * end_line)
            left = np.maximum(left + w * (w * line_line - 2 * a_line), 0)
            echoes = (echo[after] * (abs(k) + own[after])) ** 2 * debts.of(before, rows, after, phi)
            form = (left + echoes) * self.carry[here] ** 2 + unstable[here] * self.carry.max() ** 2
            real = (end > ref) & self.together(end - 1, ref)
            cost[before, rows, after] = np.where(real, form, np.inf)
        return cost


class Debts:
    """The squares of what states owe where gaps end, just before it is repaid, as each of them weighs the outputs.

    Of A = sum_j w_j (f_j - f_ref), and of it less the line continued; a state weighs no output that is asked for later,
    so the sums over a gap are those over all after `ref`. By `ref` and `end`.
    """

    def __init__(self, weighed: Array, mean: Array):
        j, w = np.arange(len(mean)), weighed.T  # (j, end)
        self.weighed, self.mean, self.square = torch.from_numpy(w.copy()), mean, mean.diagonal()[:, None]
        self.later = (j > j[:, None]).astype(float)  # (ref, j)
        self.total, with_ref = self._summed(self.later), self._summed(self.later * mean)
        more = w * (2 * with_ref + w * self.square)  # with one output more, in the square of sum_j w_j f_j
        within = more[::-1].cumsum(0)[::-1] - more
        self.a_ref = with_ref - self.total * self.square  # <A, f_ref>
        self.a_a = within - self.total * (with_ref + self.a_ref)

    def of(self, before: int, refs: slice, ends: slice, phi: Array) -> Array:
        """Of gaps after one that began at `before`, whose reuses are continued by `phi` (ref, j); -1 for the first."""
        line = self.mean[refs, before, None]
        used, with_before = (self._summed(self.later[refs] * terms)[:, ends] for terms in (phi, self.mean[before]))
        a_line = self.a_ref[refs, ends] - with_before + self.total[refs, ends] * line  # <A, f_ref - f_before>
        line_line = self.square[refs] - 2 * line + self.square[before]
        return np.asarray(np.maximum(self.a_a[refs, ends] + used * (used * line_line - 2 * a_line), 0))

    def _summed(self, terms: Array) -> Array:
        """Of terms (ref, j) the sums over j as every state weighs its outputs, (ref, end)."""
        return (torch.from_numpy(terms) @ self.weighed).numpy()


def _less_used(weight: Array, phi: Array, ref: Array, before: Array) -> Array:
    """True outputs of `weight` (n, T), less y_ref + phi (y_ref - y_before) in the place of each, as weights (n, T)."""
    found, rows, line = weight.copy(), np.arange(len(ref)), (weight * phi).sum(1)
    found[rows, ref] -= weight.sum(1) + line
    found[rows, before] += line
    return found


def _until(terms: Array, axis: int = -1) -> Array:
    """Running sums along `axis`, each without its own term: one longer, from 0 to the total."""
    return np.concatenate([np.zeros_like(terms.take([0], axis)), terms.cumsum(axis)], axis)


def schedules(problem: Problem, most: int) -> list[Array]:
    """The best schedules of 1, 2, ..., `most` evaluations, indices (N,), by dynamic programming."""
    cost, size = problem.costs(), len(problem.times)
    best = np.full((most, size, size + 1), np.inf)  # by length, its last evaluation
    choice = np.zeros(best.shape, dtype=np.int64)  # and the end of its gap: what it costs, and the one before
    best[:1, 0] = cost[-1, 0]
    for ref in range(1, size):
        gaps = best[:-1, :ref, ref, None] + cost[:ref, ref, ref + 1 :]  # (length, before, end)
        choice[1:, ref, ref + 1 :] = gaps.argmin(1)
        best[1:, ref, ref + 1 :] = gaps.min(1)
    found: list[Array] = []
    for n in range(most):
        nodes, end = [int(best[n, :, size].argmin())], size
        for k in range(n, 0, -1):
            nodes, end = [int(choice[k, nodes[0], end]), *nodes], nodes[0]
        found.append(np.array(nodes))
    return found


def integrated(problem: Problem, gram: Array) -> float:
    """The square of all that a sample of this Gram matrix (T, T) is moved by, as if it all went one way."""
    return float(abs(problem.gain).sum() ** 2 * gram.diagonal().mean())


def quadratic(weights: Array, gram: Array) -> Array:
    """w^T G w of each row of weights (n, T), (n,)."""
    along = (torch.from_numpy(weights) @ torch.from_numpy(gram)).numpy()
    return np.maximum((along * weights).sum(-1), 0)
