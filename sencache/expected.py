"""What a whole schedule is expected to do to the sample, and a schedule near it that is expected to do better.

A shortest path knows one gap at a time: it takes what different gaps leave as independent, and hears a part of their
echoes. Of a whole schedule all is known: what gaps leave adds up to one vector, and every evaluation is off by what the
state owes there, from however long ago. So the path is where a search begins that moves one evaluation at a time.

Shapes: T query times of the grid; S calibration samples; C schedules of N evaluations side by side, nodes (C, N).
Arrays are NumPy's; large products are torch's, which keep to the threads that a caller left to torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sencache.batch import Array
from sencache.schedule import DAMPED, Problem, integrated

GROWN = 1.1  # how many times larger an error may end under a schedule that is called stable


class Gaps(NamedTuple):
    """What the gaps of schedules leave in the final state, and what each owes just before it is repaid.

    As weights of outputs, and as vectors in a space of d dimensions, in which outputs have the Gram matrix measured.
    """

    left: Array  # (C, N, T)
    owed: Array  # (C, N, T)
    left_there: Array  # (C, N, S, d)
    owed_there: Array  # (C, N, S, d)


class Errors:
    """The squared errors of the final state that schedules are expected to make.

    What all gaps leave together; and beside it, as if each were independent of all else, its echoes. An evaluation is
    off by ||J_x|| times the state's error there: what the gaps so far have left, and what their echoes made of that.
    """

    def __init__(self, problem: Problem):
        values, vectors = torch.linalg.eigh(torch.from_numpy(problem.gram))
        self.outputs = (vectors * values.clamp(min=0).sqrt()[:, None]).transpose(0, 1).contiguous()  # (T, S, d)
        self.problem, self.size = problem, len(problem.times)
        self.scale = problem.carry.max() ** 2 * np.array([integrated(problem, gram) for gram in problem.gram])
        self.beyond, self.undamped = problem.instability(), problem.instability(DAMPED)

    def of(self, nodes: Array) -> Array:
        """The squared error (S,) of the schedule `nodes` (N,)."""
        return self._squares(nodes[None], self._gaps(nodes[None]))[0]

    def _squares(self, nodes: Array, gaps: Gaps) -> Array:
        """The squared errors (C, S) of schedules (C, N) and their gaps."""
        carry = self.problem.carry[nodes, self._around(nodes)[1]][..., None, None]
        left = (carry * gaps.left_there).cumsum(1)
        wrong = _squared(left + carry * (gaps.owed_there - gaps.left_there))  # (C, N, S), of the state where a gap ends
        heard = self._heard(nodes, gaps)
        again = np.minimum(np.tril(heard[:, :-1, 1:], -1), 1) @ wrong[:, :-1]  # in a stable run nothing grows
        echoes = (heard[:, -1, 1:, None] * (wrong[:, :-1] + again)).sum(1)
        return np.asarray(_squared(left[:, -1]) + echoes + self.instability(nodes)[:, None] * self.scale)

    def _heard(self, nodes: Array, gaps: Gaps) -> Array:
        """What the square of a state's error at evaluation i is worth in it at the end of gap k, (C, N, N) by k and i.

        ||J_x|| there times what the output has come to weigh by then, in its own step, in outputs continued from it and
        interpolated to it, and in what it repaid: gain less what is left of it. All squared.
        """
        own, owed = (np.take_along_axis(each, nodes[:, None], 2) for each in (gaps.left, gaps.owed))  # by k and i
        left = own.cumsum(1)
        still = left - own + owed  # in the end, with nothing repaid
        still[:, -1] = left[:, -1]
        weighs = self.problem.weighed[self._around(nodes)[1][..., None], nodes[:, None]] - still
        return np.asarray((self.problem.alpha_x[nodes][:, None] * weighs) ** 2)

    def rank(self, nodes: Array) -> tuple[bool, float, float]:
        """What to prefer among schedules, the least: whether errors can grow, how far, and what is expected of them.

        By up to a tenth, all in all, is not at all: where errors do grow from gap to gap, they multiply.
        """
        growth, gaps = self.growth(nodes), self._gaps(nodes[None])
        grows = bool(self.instability(nodes[None])) or growth > GROWN
        return grows, growth if grows else 1.0, float(self._typical(nodes[None], gaps)[0])

    def growth(self, nodes: Array) -> float:
        """How many times larger than it was an error can be in the end, 1 or more, on the test equation.

        That is dx/dt = -||J_x|| x (Dahlquist 1963) for each sample's ||J_x||, run by Euler's method as the schedule
        `nodes` (N,) would run it, and off by 1 at each of its evaluations in turn but the last, after which nothing
        goes on; beside what becomes of that in a run without reuses. What a state owes is weighed as that state does,
        and all else as the end does.
        """
        problem, gaps = self.problem, self._gaps(nodes[None])
        decay = -problem.rates * np.sign(problem.gain.sum())  # (S, T)
        kept = 1 + decay * problem.gain  # of an error, by a step of the full run
        x, due = np.zeros((len(decay), len(nodes))), np.zeros(self.size)
        y = np.zeros((len(decay), self.size, len(nodes)))
        with np.errstate(over="ignore", invalid="ignore"):
            for i, (r, left, owed) in enumerate(zip(nodes.tolist(), gaps.left[0], gaps.owed[0], strict=True)):
                x[:, i] = 1
                y[:, r] = decay[:, r, None] * x
                x = x + problem.gain[r] * y[:, r] + (due - owed) @ y  # the gap before is repaid, this one is on reuses
                due = owed - left
            bare = np.maximum(abs(kept[:, ::-1].cumprod(1)[:, ::-1][:, nodes]), 1)
            grown = abs(x) / bare
        return max([1.0, *np.where(np.isnan(grown), np.inf, grown)[:, :-1].max(0).tolist()])

    def instability(self, nodes: Array) -> Array:
        """How far the gaps of schedules (C, N) go beyond `STABLE`, (C,); 0 if none does."""
        return self._summed(self.beyond, nodes)

    def _summed(self, gaps: Array, nodes: Array) -> Array:
        return np.asarray(gaps[nodes, self._around(nodes)[1]].sum(1))

    def polished(self, path: Array) -> Array:
        """Of schedules like `path` (N,), one in which no evaluation had better be elsewhere between its neighbours.

        By the geometric mean over the samples. Gaps go no further beyond what repaid lines are damped in, all together,
        than they did. The path itself where its gaps are unstable, because of what errors come to then little is known,
        or where it would rank behind it.
        """
        if self.instability(path[None]):
            return path
        nodes, gaps, settled = path, self._gaps(path[None]), 0
        least = self._typical(nodes[None], gaps)[0]
        while settled < len(nodes) - 1:
            for i in range(1, len(nodes)):
                tried, theirs = self._moves(nodes, i, gaps)
                errors = self._typical(tried, theirs)
                errors[self._summed(self.undamped, tried) > self._summed(self.undamped, nodes[None])] = np.inf
                settled += 1  # in a row
                if len(tried) and errors.min() < least - 1e-6:
                    best, least, settled = errors.argmin(), errors.min(), 0
                    nodes, gaps = tried[best], Gaps(*(part[best, None] for part in theirs))
        return min(nodes, path, key=self.rank)

    def _typical(self, nodes: Array, gaps: Gaps) -> Array:
        """The mean logarithm (C,) of the squared errors of schedules, of those above rounding."""
        least = max(1e-16 * self.scale.mean(), np.finfo(float).tiny)
        return np.asarray(np.log(np.maximum(self._squares(nodes, gaps), least)).mean(1))

    def _moves(self, nodes: Array, i: int, gaps: Gaps) -> tuple[Array, Gaps]:
        """The schedules (C, N) in which evaluation i is elsewhere between its neighbours, and their gaps.

        Of `gaps`, those of `nodes` (N,), three change: the one it ends, the one it begins, and the one after that.
        """
        part = self.problem.part
        last = int(nodes[i + 1]) if i + 1 < len(nodes) else self.size
        free = np.array([j for j in range(int(nodes[i - 1]) + 1, last) if j != nodes[i]], dtype=np.int64)
        if part[nodes[i]] != part[nodes[i] - 1]:  # another network's first
            free = free[:0]
        tried = nodes[None].repeat(len(free), 0)
        tried[:, i] = free
        changed = slice(i - 1, i + 2)
        whole = Gaps(*(old.repeat(len(free), 0) for old in gaps))
        for every, some in zip(whole, self._gaps(tried, changed), strict=True):
            every[:, changed] = some
        return tried, whole

    def _gaps(self, nodes: Array, which: slice = slice(None)) -> Gaps:
        """The gaps `which`, a range of the N that schedules (C, N) have."""
        before, end = self._around(nodes)
        count = nodes[:, which].shape
        weights = self.problem.residuals(*(each[:, which].ravel() for each in (before, nodes, end)))
        vectors = [
            (torch.from_numpy(each) @ self.outputs.flatten(1)).numpy().reshape(*count, *self.outputs.shape[1:])
            for each in weights
        ]
        return Gaps(*(each.reshape(*count, self.size) for each in weights), *vectors)

    def _around(self, nodes: Array) -> tuple[Array, Array]:
        """The evaluation before each one, (C, N), and the one after it: -1 and T where there is none."""
        row = np.empty((len(nodes), nodes.shape[1] + 2), dtype=np.int64)
        row[:, 0], row[:, 1:-1], row[:, -1] = -1, nodes, self.size
        return row[:, :-2], row[:, 2:]


def _squared(vectors: Array) -> Array:
    """The squared lengths (...) of vectors (..., d)."""
    return np.asarray(np.einsum("...d,...d->...", vectors, vectors))
