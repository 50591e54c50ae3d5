"""A plan carried out by a stepper: where a plan decides, all is known beforehand but the outputs.

When to evaluate, how to continue, and with what weights each gap is repaid are written down once, in a `Script`, and
`CachedField.integrate` follows it without asking a `Run` at every query. The sample and the report are those of `Run`,
`Planned` and `Repaying`, to the bit (`tests/test_walk.py`); what is saved is most of the time between evaluations. What
the report needs is asked of the device once, at the end.

Shapes: T queries of the grid, B samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, apart, copy
from sencache.correct import Sums, due, observed, offset, paid, shares
from sencache.criteria import Planned
from sencache.norms import Norm
from sencache.plan import Plan
from sencache.report import Query, Report
from sencache.reuse import REUSES, VARIABLES, continued
from solvers import Stepper, VelocityField


@dataclass(frozen=True, eq=False)
class Script:
    """What a plan has a stepper do on its grid."""

    plan: Plan
    evaluated: Array  # (T,) bool
    before: Array  # (T,) the number of evaluations before each query
    phi: Array  # (T,) of a reuse; 0 at evaluations
    offsets: Array  # (T, 3) what it adds to the moments of its gap
    nodes: Array  # (T, 3) s_k, s_r, s_2, of its gap or the one it closes; NaN where there is none
    repays: list[list[Array | None]]  # (T,) the weights (1, 3) of its outputs in dx and history; none if none are owed


def script(plan: Plan, stepper: Stepper, ts: Tensor) -> Script | None:
    """What the plan has `stepper` do on ts (K + 1,); None where a time is asked for twice, of which plans know less."""
    linear, ts, size = getattr(stepper, "linear", stepper), ts.cpu(), len(plan.times)
    steps = list(_queries(linear, ts))
    if sum(asked for asked, _ in steps) != size:
        return None
    evaluated = np.isin(np.arange(size), plan.nodes.numpy())
    before = evaluated.cumsum() - evaluated
    s, none = VARIABLES[plan.variable](plan.times), torch.full((2,), torch.nan, dtype=torch.float64)
    at = torch.cat([none, s[plan.nodes], none])
    nodes = torch.stack([at[before + 2], at[before + 1], at[before]], 1)
    phi = np.where(evaluated, 0.0, REUSES[plan.reuse](s, nodes[:, 1], nodes[:, 2]).numpy())
    offsets = np.where(evaluated[:, None], 0.0, offset((s - nodes[:, 1]).numpy(), phi))
    repays: list[list[Array | None]] = []
    sums: list[Sums] = []
    for (asked, alone), (t, t_next) in zip(steps, pairwise(ts), strict=True):
        which = range(len(repays), len(repays) + asked)
        terms, closes = [[torch.from_numpy(offsets[j, None]) for j in which]], evaluated[which, None]
        ended, sums = due(linear, sums, terms, closes, alone, t, t_next) if plan.correct else ([[]] * asked, [])
        for j, each in zip(which, ended, strict=True):
            owing = shares(each[0], nodes[j, None].numpy(), evaluated[j, None]) if each else []
            repays.append([None if share is None or not share.any() else share for share in owing])
    return Script(plan, evaluated, before, phi, offsets, nodes.numpy(), repays)


def _queries(linear: Stepper, ts: Tensor) -> Iterator[tuple[int, bool]]:
    """How often each step asks, and whether it leaves no history."""
    x, memory, asked = torch.zeros(1, 1, dtype=torch.float64), None, 0

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return torch.zeros_like(x)

    for t, t_next in pairwise(ts):
        before = asked
        _, memory = linear.advance(nothing, x, t, t_next, memory)
        yield asked - before, memory is None


class Walk:
    """A stepper that asks the field only where the script says so, and repays each gap when it ends: one trajectory."""

    def __init__(self, stepper: Stepper, script: Script, norm: Norm):
        self.stepper, self.script, self.norm = stepper, script, norm
        self.order, self.adaptive, self.weights = stepper.order, stepper.adaptive, stepper.weights
        self.times: list[float] = []  # of the queries so far
        self.outputs: tuple[Any, ...] = ()  # y_k, y_r, y_2, the last three evaluations
        self.apart: list[Tensor] = []  # of each, (2, B): the norms of y_k - y_r, and of y_k - y_2 where it ends a gap

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Any) -> tuple[Tensor, Any]:
        repaid = []

        def answer(x: Tensor, t: Tensor) -> Tensor:
            j = len(self.times)
            y = self._evaluated(field(x, t), j) if self.script.evaluated[j] else self._continued(len(x), j)
            self.times.append(float(t))
            if self.script.repays[j]:
                repaid.append((self.script.repays[j], self.outputs))
            return y

        dx, memory = self.stepper.advance(answer, x, t, t_next, memory)
        for weights, outputs in repaid:
            each = [None if share is None else share.repeat(len(x), 0) for share in weights]
            dx, memory = paid((dx, memory), each, outputs)
        return dx, memory

    def _evaluated(self, y: Tensor, j: int) -> Tensor:
        kept = copy(y)
        self.outputs = (kept, *self.outputs[:2]) if self.outputs else (kept, kept, kept)
        moved = apart(kept, self.outputs[1], self.norm)
        across = moved if j == 0 or self.script.evaluated[j - 1] else apart(kept, self.outputs[2], self.norm)
        self.apart.append(torch.stack([moved, across]))
        return y

    def _continued(self, batch: int, j: int) -> Tensor:
        last, before, _ = self.outputs
        return continued(last, before, self.script.phi[j].repeat(batch))

    def tell(self, report: Report) -> None:
        """Enter the queries so far in the report."""
        if not self.apart:
            return
        known, t = self.script, np.array(self.times)
        n = len(t)
        reused, which = ~known.evaluated[:n], known.before[:n]  # of each query, the evaluation that it waits for
        moved, across = torch.stack(self.apart, 1).cpu().numpy()  # (N, B) each
        moved[0] = np.inf
        at = t[known.evaluated[:n]]
        last = np.maximum(which - 1, 0)
        predicted = np.full((n, moved.shape[1]), np.inf)
        predicted[reused] = Planned(known.plan).changes(at[last], t, moved[last].T).T[reused]
        found = np.full_like(predicted, np.nan)
        seen = reused & (which < len(moved))
        k = which[seen]
        norms = np.stack([moved[k], moved[k - 1], across[k]], -1)  # (R, B, 3)
        found[seen] = observed(known.offsets[:n][seen, None], known.nodes[:n][seen, None], norms)

        change, later = torch.from_numpy(predicted), torch.from_numpy(found)
        decided = torch.from_numpy(reused)[:, None].expand(later.shape).clone()
        times, no = torch.from_numpy(t)[:, None].expand(later.shape).clone(), torch.zeros_like(decided[0])
        for j in range(n):
            report.add(Query(times[j], change[j], decided[j], no, ~decided[j], 0, later[j], change[j]), False)
