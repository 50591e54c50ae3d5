"""A field of two networks that take turns in t: nothing is reused, continued or repaid across the change."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sencache import CachedField, calibrate
from sencache.schedule import Problem, quadratic, schedules
from solvers import DPMSolverPP, Euler, Heun, Linear, grids, integrate
from tests.flows import Nonlinear
from tests.test_correct import X, close

TS, BOUNDARY = grids.uniform(16, 1.0, 0.1), 0.6
K = int((TS >= BOUNDARY).sum())  # the index of the first time on the other side
STEPPERS = {"Euler": Euler(), "DDIM": DPMSolverPP(Linear(), 1), "Heun": Heun()}


class One:
    """One network of the two: a stack, and a head on top."""

    def __init__(self, sign):
        self.sign = sign

    def stack(self, x, t):
        return Nonlinear()(x, t)

    def head(self, x, t, stack):
        return self.sign * torch.tanh(stack) * (1 + t) - 0.1 * x

    def __call__(self, x, t):
        return self.head(x, t, self.stack(x, t))


class Two:
    """High noise, then low noise; samples never stand on both sides here. Writes down what is evaluated."""

    def __init__(self):
        self.evaluated = []

    def regime(self, t):
        return t >= BOUNDARY

    def one(self, t):
        return One(1.0 if t >= BOUNDARY else -3.0)

    def stack(self, x, t):
        self.evaluated.append(float(t))
        return self.one(t).stack(x, t)

    def head(self, x, t, stack):
        return self.one(t).head(x, t, stack)

    def __call__(self, x, t):
        return self.head(x, t, self.stack(x, t))


PROFILE = calibrate(Two(), X, TS, progress=False)
RULES = {
    "a tolerance": {"profile": PROFILE, "tolerance": math.inf, "max_reuses": math.inf},
    "differences": {"tolerance": 1e9},
    "a plan": {"profile": PROFILE, "nfe": 5},
}


@pytest.mark.parametrize("payload", ["output", "blocks"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_query_of_the_other_network_is_evaluated(rule, payload):
    field = Two()
    cached = CachedField(field, **RULES[rule], payload=payload)
    cached.integrate(X, TS)
    assert float(TS[K]) in field.evaluated
    assert len(field.evaluated) < 10
    if rule == "a plan":
        assert len(field.evaluated) == 5  # the change is within the budget
        assert K in cached.plan(TS).nodes.tolist()
    assert cached.report.resets == 0  # it is the same trajectory


@pytest.mark.parametrize("payload", ["output", "blocks"])
@pytest.mark.parametrize("reuse", ["linear", "hold"])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("stepper", ["Euler", "DDIM"])
def test_the_run_is_two_runs_each_of_its_own_network(stepper, correct, reuse, payload):
    """A gap open at the change stays owed, as one at the end does; the first gap after it is repaid by its own line."""
    options = {"tolerance": math.inf, "max_reuses": 2, "reuse": reuse, "correct": correct, "payload": payload}
    method = STEPPERS[stepper]
    profile = replace(PROFILE, gram=None)  # or each grid would have its own best variable
    half = CachedField(One(1.0), profile, **options).integrate(X, TS[: K + 1], method)
    end = CachedField(One(-3.0), profile, **options).integrate(half, TS[K:], method)
    cached = CachedField(Two(), profile, **options)
    close(cached.integrate(X, TS, method), end, 1e-12)
    with cached.run(TS, method):
        close(integrate(cached, X, TS, method), end, 1e-12)
    assert (end - integrate(Two(), X, TS, method)).abs().max() > 1e-4


def test_samples_of_one_batch_may_stand_on_both_sides():
    """Each by its own clock: the one that crossed is evaluated, the other goes on reusing."""
    asked = []

    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def regime(self, t):
            return t >= BOUNDARY

        def select(self, rows):
            return Rows(self.rows[rows])

        def __call__(self, x, t):
            asked.append((self.rows.tolist(), t.tolist()))
            return -x * t[:, None]

    cached = CachedField(Rows(torch.arange(3)), PROFILE, tolerance=math.inf, max_reuses=math.inf)
    for t in ([0.9, 0.8, 0.7], [0.8, 0.7, 0.5], [0.7, 0.5, 0.4]):
        cached(X, torch.tensor(t, dtype=torch.float64))
    assert asked == [([0, 1, 2], [0.9, 0.8, 0.7]), ([2], [0.5]), ([1], [0.5])]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("reuse", ["linear", "hold"])
def test_a_plan_counts_on_nothing_across_the_change(reuse, correct):
    """Its costs are those of the weights it names, which never reach past the change, however the outputs look."""
    size, change = 9, 4
    g = torch.Generator().manual_seed(0)
    times, gain = np.linspace(1, 0.2, size), torch.randn(size, generator=g).double().numpy()
    y = torch.randn(2, size, 30, generator=g).double()
    part = np.arange(size) >= change
    problem = Problem(times, gain, (y @ y.mT / 30).numpy(), reuse, "t", correct, part)
    cost = problem.costs()
    for before in range(-1, size):
        for ref in range(before + 1, size) if before >= 0 else [0]:
            for end in range(ref + 1, size + 1):
                if ref < change < end:
                    assert cost[before, ref, end] == math.inf
                    continue
                left, _ = problem.residuals(*np.array([[before], [ref], [end]]))
                assert cost[before, ref, end] == pytest.approx(quadratic(left, problem.gram.mean(0))[0], rel=1e-9)
                assert not left[0, part != part[ref]].any()
    for nodes in schedules(problem, size)[1:]:
        assert change in nodes.tolist()


def test_fewer_evaluations_than_networks_are_refused():
    with pytest.raises(ValueError, match="`nfe` is 1, and 2 networks take turns on this grid"):
        CachedField(Two(), PROFILE, nfe=1).integrate(X, TS)


def test_a_plan_s_error_is_the_one_met_where_outputs_do_not_depend_on_the_state():
    a, b = torch.randn(2, *X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class Given(Two):
        def __call__(self, x, t):
            return a * torch.sin(5 * t) + b * t**3 if t >= BOUNDARY else 4 * b * torch.cos(7 * t)

    ts = TS
    profile = calibrate(Given(), X, ts, progress=False)
    for correct in (True, False):
        cached = CachedField(Given(), profile, nfe=7, correct=correct)
        met = (cached.integrate(X, ts) - integrate(Given(), X, ts)).square().mean(1).sqrt()
        close(cached.plan(ts).error, met, 1e-9)


def test_the_whole_run_reuses_on_both_sides():
    """A guard: the first network is reused before the change, and the second after it."""
    field = Two()
    CachedField(field, PROFILE, nfe=5).integrate(X, TS)
    sides = [sum(t >= BOUNDARY for t in field.evaluated), sum(t < BOUNDARY for t in field.evaluated)]
    assert min(sides) >= 1
    assert sides[0] < K
    assert all(t > t_next for t, t_next in pairwise(field.evaluated))
