"""What a whole schedule is expected to do to the sample, and a schedule near it that is expected to do better.

A shortest path knows one gap at a time: it takes what different gaps leave as independent, and hears a part of their
echoes. Of a whole schedule all is known: what gaps leave adds up to one vector, and every evaluation is off by what the
state owes there, from however long ago. So the path is where a search begins that moves one evaluation at a time.

Shapes: T query times of the grid; S calibration samples; C schedules of N evaluations side by side, nodes (C, N).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sencache.schedule import DAMPED, Problem, integrated


class Gaps(NamedTuple):
    """What the gaps of schedules leave in the final state, and what each owes just before it is repaid.

    As weights of outputs, and as vectors in a space of d dimensions, in which outputs have the Gram matrix measured.
    """

    left: Tensor  # (C, N, T)
    owed: Tensor  # (C, N, T)
    left_there: Tensor  # (C, N, S, d)
    owed_there: Tensor  # (C, N, S, d)


class Errors:
    """The squared errors of the final state that schedules are expected to make.

    What all gaps leave together; and beside it, as if each were independent of all else, its echoes. An evaluation is
    off by ||J_x|| times the state's error there: what the gaps so far have left, and what their echoes made of that.
    """

    def __init__(self, problem: Problem):
        values, vectors = torch.linalg.eigh(problem.gram)
        self.outputs = vectors * values.clamp(min=0).sqrt()[:, None]  # (S, T, d)
        self.problem, self.unrepaid = problem, replace(problem, correct=False)
        self.scale = torch.stack([integrated(problem, gram) for gram in problem.gram])
        self.beyond, self.undamped = problem.instability(), problem.instability(DAMPED)

    def of(self, nodes: Tensor) -> Tensor:
        """The squared error (S,) of the schedule `nodes` (N,)."""
        return self._squares(nodes[None], self._gaps(nodes[None]))[0]

    def _squares(self, nodes: Tensor, gaps: Gaps) -> Tensor:
        """The squared errors (C, S) of schedules (C, N) and their gaps."""
        left = gaps.left_there.cumsum(1)
        wrong = (left - gaps.left_there + gaps.owed_there).square().sum(-1)  # (C, N, S), of the state where a gap ends
        heard = self._heard(nodes, gaps)
        again = heard[:, :-1, 1:].tril(-1).clamp(max=1) @ wrong[:, :-1]  # in a stable run nothing grows
        echoes = (heard[:, -1, 1:, None] * (wrong[:, :-1] + again)).sum(1)
        return left[:, -1].square().sum(-1) + echoes + self.instability(nodes)[:, None] * self.scale

    def _heard(self, nodes: Tensor, gaps: Gaps) -> Tensor:
        """What the square of a state's error at evaluation i is worth in it at the end of gap k, (C, N, N) by k and i.

        ||J_x|| there times what the output has come to weigh by then, in its own step, in outputs continued from it and
        interpolated to it, and in what it repaid: gain less what is left of it. All squared.
        """
        assert self.problem.alpha_x is not None
        left, end = gaps.left.cumsum(1), self._around(nodes)[1]
        taken = torch.arange(len(self.problem.times)) < end[..., None]
        still = torch.cat([(left - gaps.left + gaps.owed)[:, :-1], left[:, -1:]], 1)  # in the end, with nothing repaid
        used = self.problem.alpha_x * (self.problem.gain * taken - still)
        return used.gather(2, nodes[:, None].expand(-1, nodes.shape[1], -1)).square()

    def rank(self, nodes: Tensor) -> tuple[bool, float, float]:
        """What to prefer among schedules, the least: whether errors can grow, how far, and what is expected of them."""
        growth = self.growth(nodes)
        grows = bool(self.instability(nodes[None])) or growth > 1 + 1e-9
        return grows, growth, float(self._typical(nodes[None], self._gaps(nodes[None])))

    def growth(self, nodes: Tensor) -> float:
        """How many times larger than it was an error can be in the end, 1 or more, on the test equation.

        That is dx/dt = -||J_x|| x (Dahlquist 1963), run by Euler's method as the schedule `nodes` (N,) would run it,
        and off by 1 at each of its evaluations in turn but the last, after which nothing goes on; beside what becomes
        of that in a run without reuses.
        """
        problem, gaps = self.problem, self._gaps(nodes[None])
        assert problem.alpha_x is not None
        decay = -problem.alpha_x * problem.gain.sum().sign()
        kept = 1 + decay * problem.gain  # of an error, by a step of the full run
        x, y = decay.new_zeros(len(nodes)), decay.new_zeros(len(decay), len(nodes))
        due = torch.zeros_like(decay)
        for i, (r, left, owed) in enumerate(zip(nodes.tolist(), gaps.left[0], gaps.owed[0], strict=True)):
            x[i] = 1
            y[r] = decay[r] * x
            x = x + due @ y + problem.gain[r] * y[r] - owed @ y  # the gap before is repaid, this one walked on reuses
            due = owed - left
        bare = kept.flip(0).cumprod(0).flip(0)[nodes].abs().clamp(min=1)
        return max([1.0, *(x.abs() / bare).nan_to_num(nan=torch.inf)[:-1].tolist()])

    def instability(self, nodes: Tensor) -> Tensor:
        """How far the gaps of schedules go beyond `STABLE`, (C,); 0 if none does."""
        return self._summed(self.beyond, nodes)

    def _summed(self, gaps: Tensor, nodes: Tensor) -> Tensor:
        return gaps[nodes, self._around(nodes)[1]].sum(1)

    def polished(self, path: Tensor) -> Tensor:
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
                errors[self._summed(self.undamped, tried) > self._summed(self.undamped, nodes[None])] = torch.inf
                settled += 1  # in a row
                if len(tried) and errors.min() < least - 1e-6:
                    best, least, settled = errors.argmin(), errors.min(), 0
                    nodes, gaps = tried[best], Gaps(*(part[best, None] for part in theirs))
        return min(nodes, path, key=self.rank)

    def _typical(self, nodes: Tensor, gaps: Gaps) -> Tensor:
        """The mean logarithm (C,) of the squared errors of schedules, of those above rounding."""
        return self._squares(nodes, gaps).clamp(min=1e-16 * float(self.scale.mean())).log().mean(1)

    def _moves(self, nodes: Tensor, i: int, gaps: Gaps) -> tuple[Tensor, Gaps]:
        """The schedules (C, N) in which evaluation i is elsewhere between its neighbours, and their gaps.

        Of `gaps`, those of `nodes` (N,), three change: the one it ends, the one it begins, and the one after that.
        """
        part, size = self.problem.part, len(self.problem.times)
        assert part is not None
        last = int(nodes[i + 1]) if i + 1 < len(nodes) else size
        free = torch.tensor([j for j in range(int(nodes[i - 1]) + 1, last) if j != nodes[i]], dtype=torch.int64)
        if part[nodes[i]] != part[nodes[i] - 1]:  # another network's first
            free = free[:0]
        tried = nodes.repeat(len(free), 1)
        tried[:, i] = free
        changed = slice(i - 1, i + 2)
        new = self._gaps(tried, changed)
        whole = [old.repeat(len(free), *[1] * (old.ndim - 1)) for old in gaps]
        for every, some in zip(whole, new, strict=True):
            every[:, changed] = some
        return tried, Gaps(*whole)

    def _gaps(self, nodes: Tensor, which: slice = slice(None)) -> Gaps:
        """The gaps `which`, a range of the N that schedules (C, N) have."""
        before, end = self._around(nodes)
        ends = [each[:, which].flatten() for each in (before, nodes, end)]
        count = nodes[:, which].shape
        left, owed = (problem.residual(*ends) for problem in (self.problem, self.unrepaid))
        vectors = [torch.einsum("nt,std->nsd", weights, self.outputs) for weights in (left, owed)]
        return Gaps(*(each.unflatten(0, count) for each in (left, owed, *vectors)))

    def _around(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The evaluation before each one, (C, N), and the one after it: -1 and T where there is none."""
        aside = nodes.new_full((len(nodes), 1), -1)
        return torch.cat([aside, nodes[:, :-1]], 1), torch.cat([nodes[:, 1:], 0 * aside + len(self.problem.times)], 1)
