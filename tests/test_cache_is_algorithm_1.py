"""CachedField against the literal transcription of Algorithm 1, one sample at a time, on whatever hypothesis draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sencache import CachedField, Report, SensitivityProfile, strict_start
from tests.algorithm_1 import algorithm_1
from tests.flows import Nonlinear, linear_flow

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter


class Problem(NamedTuple):
    field: Callable[[Tensor, Tensor | float], Tensor]
    profile: SensitivityProfile
    x: Tensor  # (B, d)
    ts: Tensor  # (K + 1,)
    tolerance: float | Callable[[float], float]
    max_reuses: float

    def cached(self) -> CachedField:
        return Paper(self.field, self.profile, tolerance=self.tolerance, max_reuses=self.max_reuses)

    def epsilon(self, t: float) -> float:
        return self.tolerance(t) if callable(self.tolerance) else self.tolerance

    def alpha(self, t: float) -> tuple[float, float]:
        """The sensitivities at t: those of the node, or on the line between its two neighbours."""
        p = self.profile
        nodes = list(zip(p.t.tolist(), p.alpha_x.tolist(), p.alpha_t.tolist(), strict=True))
        for at, ax, at_ in nodes:
            if at == t:
                return ax, at_
        for (a, *left), (b, *right) in pairwise(nodes):
            if min(a, b) < t < max(a, b):
                w = (t - a) / (b - a)
                return tuple((1 - w) * one + w * other for one, other in zip(left, right, strict=True))
        raise AssertionError(f"{t} is outside of the profile")


@st.composite
def problems(draw, dtype=torch.float64):
    d, batch, steps = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 14))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    places = [0.0, *accumulate(draw(st.lists(st.floats(0.02, 1), min_size=steps, max_size=steps)))]
    ts = torch.tensor(places, dtype=torch.float64) / places[-1]
    ts = ts if draw(st.booleans()) else 1 - ts
    nodes = ts[:-1] if draw(st.booleans()) else torch.linspace(ts[0], ts[-1], draw(st.integers(2, 9)), dtype=ts.dtype)
    alpha_x, alpha_t = 0.02 + 2 * torch.rand(2, len(nodes), generator=g, dtype=torch.float64)
    linear, nonlinear, size = linear_flow(d, int(g.initial_seed() % 97)), Nonlinear(), draw(st.floats(0.1, 2))
    a, b = draw(st.floats(0.01, 2)), draw(st.floats(0, 2))
    tolerance = draw(st.sampled_from([0, a, a + b, lambda t: a + b * math.sin(7 * t) ** 2, strict_start(ts, a + b, a)]))
    return Problem(
        lambda x, t: size * (linear(x, t) + nonlinear(x, t)),
        SensitivityProfile(nodes, alpha_x, alpha_t),
        torch.randn(batch, d, generator=g, dtype=torch.float64).to(dtype),
        ts,
        tolerance,
        draw(st.sampled_from([0, 1, 2, 3, 4, 5, math.inf])),
    )


def oracle(p: Problem, row: int, n: float, printed: bool = False) -> tuple[Tensor, list[bool], Tensor]:
    def f(x, t):
        return p.field(torch.tensor(x)[None].to(p.x), t)[0].double().numpy()

    x, reused, predicted = algorithm_1(f, p.x[row].double().numpy(), p.ts.tolist(), p.alpha, p.epsilon, n, printed)
    return torch.tensor(x), reused, torch.tensor(predicted, dtype=torch.float64)


def decisions(report: Report, row: int) -> list[bool]:
    return [bool(query.reused[row]) for query in report.trace]


def predictions(report: Report, row: int) -> Tensor:
    return torch.stack([query.predicted[row] for query in report.trace])


@settings(max_examples=250)
@given(problems())
def test_every_decision_and_the_state_are_those_of_algorithm_1(p):
    cached = p.cached()
    end = cached.integrate(p.x, p.ts)
    for row in range(len(p.x)):
        x, reused, predicted = oracle(p, row, p.max_reuses)
        assert decisions(cached.report, row) == reused
        torch.testing.assert_close(predictions(cached.report, row), predicted, rtol=1e-9, atol=0)
        torch.testing.assert_close(end[row], x, rtol=1e-9, atol=1e-12)


@settings(max_examples=50)
@given(problems())
def test_n_reuses_are_those_of_algorithm_1_as_printed_with_n_plus_1(p):
    cached = p.cached()
    cached.integrate(p.x, p.ts)
    for row in range(len(p.x)):
        assert decisions(cached.report, row) == oracle(p, row, p.max_reuses + 1, printed=True)[1]


@settings(max_examples=100)
@given(problems())
def test_a_loop_written_by_hand_gets_the_same_states_and_decisions(p):
    ours, theirs = p.cached(), p.cached()
    end, x = ours.integrate(p.x, p.ts), p.x
    for t, t_next in pairwise(p.ts):
        x = x + (t_next - t) * theirs(x, t)
    assert torch.equal(end, x)
    for a, b in zip(ours.report.trace, theirs.report.trace, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a[:5], b[:5], strict=True))


@settings(max_examples=100)
@given(problems(torch.float32))
def test_in_float32_the_decisions_are_the_same_unless_they_hang_by_a_hair(p):
    cached = p.cached()
    end = cached.integrate(p.x, p.ts)
    assert end.dtype == torch.float32
    for row in range(len(p.x)):
        x, reused, predicted = oracle(p, row, p.max_reuses)
        epsilon = [p.epsilon(t) for t in p.ts[:-1].tolist()]
        assume(all(abs(s - e) > 1e-3 * e or e == 0 for s, e in zip(predicted.tolist(), epsilon, strict=True)))
        assert decisions(cached.report, row) == reused
        torch.testing.assert_close(predictions(cached.report, row), predicted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(end[row].double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 3, math.inf])
def test_what_is_drawn_does_reuse(n):
    """A guard on the strategy: the claims above are not about runs in which nothing happens."""
    reuses = []

    @settings(max_examples=40)
    @given(problems())
    def count(p):
        cached = p._replace(max_reuses=n).cached()
        cached.integrate(p.x, p.ts)
        reuses.append(cached.report.reuses.sum().item() / cached.report.queries.sum().item())

    count()
    assert (max(reuses) > 0.3 and min(reuses) == 0) if n else max(reuses) == 0
