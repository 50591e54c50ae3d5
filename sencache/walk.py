"""A plan carried out by a stepper: where a plan decides, all is known beforehand but the outputs.

When to evaluate, how to continue, and with what weights each gap is repaid are written down once, in a `Script`, and
`CachedField.integrate` follows it without asking a `Run` at every query. The sample and the report are those of `Run`,
`Planned` and `Repaying`, to the bit where norms are finite and the stepper asks at the grid's own times, and otherwise
to rounding (`tests/test_walk.py`); but a state that changes its dtype on the way, which a `Run` takes for the beginning
of another trajectory, is walked on. What the report needs is asked of the device once, at the end.

Shapes: T queries of the grid, B samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, apart, clock_of
from sencache.correct import Sums, due, observed, offset, shares
from sencache.criteria import Planned
from sencache.norms import Norm, difference
from sencache.plan import Plan
from sencache.report import Query, Report
from sencache.reuse import REUSES, VARIABLES
from sencache.trees import replace, tensors
from solvers import Stepper, VelocityField, Weights


class Debt(NamedTuple):
    """What a gap owes: so much of y_k - y_r, and of y_2 - y_r."""

    k: float
    two: float


@dataclass(frozen=True, eq=False)
class Script:
    """What a plan has a stepper do on its grid."""

    plan: Plan
    evaluated: Array  # (T,) bool
    before: Array  # (T,) the number of evaluations before each query
    phi: Array  # (T,) of a reuse; 0 at evaluations
    offsets: Array  # (T, 3) what it adds to the moments of its gap
    nodes: Array  # (T, 3) s_k, s_r, s_2, of its gap or the one it closes; NaN where there is none
    debts: list[list[Debt | None]]  # (T,) what they repay in dx and each part of the history


def script(stepper: Stepper, plan: Plan, repays: bool, ts: Tensor) -> Script | None:
    """What the plan has `stepper` do on ts (K + 1,), where what a gap owed is repaid or not.

    None where times are asked for twice or in another order, of which a plan knows less.
    """
    linear, ts, size = getattr(stepper, "linear", stepper), ts.cpu(), len(plan.times)
    steps = list(_queries(linear, ts))
    if sum(asked for asked, _ in steps) != size or not (plan.times.diff() * plan.direction > 0).all():
        return None
    evaluated = np.isin(np.arange(size), plan.nodes.numpy())
    before = evaluated.cumsum() - evaluated
    s, none = VARIABLES[plan.variable](plan.times.numpy()), [np.nan, np.nan]
    at = np.concatenate([none, s[evaluated], none])
    nodes = np.stack([at[before + 2], at[before + 1], at[before]], 1)
    phi = np.where(evaluated, 0.0, REUSES[plan.reuse](s, nodes[:, 1], nodes[:, 2]))
    offsets = np.where(evaluated[:, None], 0.0, offset(s - nodes[:, 1], phi))
    debts: list[list[Debt | None]] = []
    sums: list[Sums] = []
    for (asked, alone), (t, t_next) in zip(steps, pairwise(ts), strict=True):
        which = range(len(debts), len(debts) + asked)
        terms, closes = [[torch.from_numpy(offsets[j, None]) for j in which]], evaluated[which, None]
        ended, sums = due(linear, sums, terms, closes, alone, t, t_next) if repays else ([[]] * asked, [])
        for j, each in zip(which, ended, strict=True):
            owing = shares(each[0], nodes[j, None], evaluated[j, None]) if each else []
            some = [None if share is None or not share.any() else Debt(*share[0, [0, 2]].tolist()) for share in owing]
            debts.append(some if any(some) else [])
    return Script(plan, evaluated, before, phi, offsets, nodes, debts)


def _queries(linear: Stepper, ts: Tensor) -> Iterator[tuple[int, bool]]:
    """How often each step asks, and whether it leaves no history."""
    x, memory, asked = torch.zeros(1, 1, dtype=torch.float64, device="cpu"), None, 0

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return torch.zeros_like(x)

    for t, t_next in pairwise(ts):
        before = asked
        _, memory = linear.advance(nothing, x, t, t_next, memory)
        yield asked - before, memory is None


def is_constant(stepper: Stepper) -> bool:
    """Whether it will always do as it does now, being a frozen dataclass."""
    parameters = getattr(type(stepper), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


class Walk:
    """A stepper that asks the field only where the script says so, and repays each gap when it ends: one trajectory."""

    def __init__(self, field: VelocityField, stepper: Stepper, script: Script, norm: Norm):
        self.bare, self.stepper, self.script, self.norm = field, stepper, script, norm
        self.times: list[Array] = []  # (B,) of the queries so far
        self.outputs: tuple[Tensor, ...] = ()  # y_k, y_r, y_2, the last three evaluations
        self.apart: list[Tensor] = []  # of each, (2, B): the norms of y_k - y_r, and of y_k - y_2 where it ends a gap

    @property
    def order(self) -> float:
        return self.stepper.order

    @property
    def adaptive(self) -> bool:
        return self.stepper.adaptive

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return self.stepper.weights(t, t_next)

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """The field itself, whose evaluations count as soon as they are paid for."""
        y = self.bare(x, t)
        self._note(x, t)
        return y

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Any) -> tuple[Tensor, Any]:
        known, repaid = self.script, []

        def answer(x: Tensor, t: Tensor) -> Tensor:
            j = len(self.times)
            if j == len(known.evaluated):
                raise ValueError(f"{self.stepper} asks for more outputs on this grid than the {j} that were planned.")
            y = self._evaluated(field(x, t), j) if known.evaluated[j] else self._continued(x, t, j)
            if known.debts[j]:
                repaid.append((known.debts[j], self.outputs))
            return y

        dx, memory = self.stepper.advance(answer, x, t, t_next, memory)
        for debts, outputs in repaid:
            parts = [_repaid(*part, outputs) for part in zip(tensors((dx, memory)), debts, strict=True)]
            dx, memory = replace((dx, memory), parts)
        return dx, memory

    def _evaluated(self, y: Tensor, j: int) -> Tensor:
        kept = y.detach().clone()
        self.outputs = (kept, *(part.to(kept.dtype) for part in self.outputs[:2])) if j else (kept, kept, kept)
        moved = apart(kept, self.outputs[1], self.norm)
        across = moved if j == 0 or self.script.evaluated[j - 1] else apart(kept, self.outputs[2], self.norm)
        self.apart.append(torch.stack([moved, across]))
        return y

    def _continued(self, x: Tensor, t: Tensor, j: int) -> Tensor:
        self._note(x, t)
        last, before, _ = self.outputs
        phi = float(torch.tensor(self.script.phi[j], device="cpu").to(last.dtype))
        return (torch.lerp(last, before, -phi) if phi else last.clone()).to(x.dtype)

    def _note(self, x: Tensor, t: Tensor) -> None:
        self.times.append(clock_of(t, len(x))[:, 0])

    def tell(self, report: Report) -> None:
        """Enter the queries so far in the report."""
        if not self.times:
            return
        known, t = self.script, np.array(self.times)  # (n, B)
        reused, which = ~known.evaluated[: len(t)], known.before[: len(t)]  # of each, the evaluation that it waits for
        norms = torch.stack(self.apart, 1).cpu().numpy() if self.apart else np.zeros((2, 0, t.shape[1]))
        moved, across = norms  # (N, B) each
        moved[:1] = np.inf
        at, last = t[~reused, 0], which[reused] - 1
        predicted, found = np.full(t.shape, np.inf), np.full(t.shape, np.nan)
        predicted[reused] = Planned(known.plan).changes(at[last], t[reused, 0], moved[last].T).T
        seen = reused & (which < len(moved))
        k = which[seen]
        sides = np.stack([moved[k], moved[k - 1], across[k]], -1)  # (R, B, 3)
        found[seen] = observed(known.offsets[: len(t)][seen, None], known.nodes[: len(t)][seen, None], sides)

        decided = reused[:, None].repeat(t.shape[1], 1)
        rows = zip(*(torch.from_numpy(each).unbind() for each in (t, predicted, decided, ~decided, found)), strict=True)
        no = torch.zeros(t.shape[1], dtype=torch.bool, device="cpu")
        for times, change, reuse, computed, later in rows:
            report.add(Query(times, change, reuse, no, computed, 0, later, change), False)


def _repaid(state: Tensor, debt: Debt | None, outputs: tuple[Tensor, ...]) -> Tensor:
    """`correct.repaid` of a debt that is the same for all samples, in float32 or better."""
    if debt is None:
        return state
    y_k, y_r, y_2 = outputs
    wide = state.to(torch.promote_types(state.dtype, torch.float32))
    wide = wide + debt.k * difference(y_k, y_r) if debt.k else wide
    return (wide + debt.two * difference(y_2, y_r) if debt.two else wide).to(state.dtype)


@contextmanager
def walking(field: VelocityField, stepper: Stepper, script: Script, norm: Norm, report: Report) -> Iterator[Walk]:
    """A walk that is told at its end, come what may."""
    walk = Walk(field, stepper, script, norm)
    try:
        yield walk
    except BaseException:
        with suppress(Exception):  # what went wrong first is what is raised
            walk.tell(report)
        raise
    walk.tell(report)
