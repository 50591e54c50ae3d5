"""What holds on every run, whatever the field: bounds, counts, rows, and what a reuse is for the solver."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate, groupby, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sencache import CachedField, SensitivityProfile
from solvers import (
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    TorchDiffEq,
    WhiteNoise,
    grids,
    integrate,
    trajectory,
)
from tests.flows import GaussianFlow, Nonlinear, linear_flow, rms

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
PATH = Linear()
STEPPERS = {
    "Euler": Euler,
    "Heun": Heun,
    "DDIM": lambda: DPMSolverPP(PATH, 1),
    "DPM++2M": lambda: DPMSolverPP(PATH, 2),
    "Euler-Maruyama": lambda: EulerMaruyama(PATH, WhiteNoise(torch.Generator().manual_seed(0))),
    "RK4": lambda: TorchDiffEq("rk4"),
}
MODES = {"to the letter": {}, "linear and corrected": {"reuse": "linear", "correct": True}}
over_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Field:
    """v = A x + b t, plus a nonlinear part; counts the rows that go through it. Its samples may be told apart."""

    def __init__(self, seed: int = 0, d: int = 6, nonlinear: bool = True):
        self.linear, self.nonlinear, self.rows = linear_flow(d, seed), nonlinear, 0

    def __call__(self, x, t):
        self.rows += len(x)
        v = self.linear(x, t)
        return v + Nonlinear()(x, t) if self.nonlinear else v


class Split(Field):
    def select(self, rows):
        return self


def constant(ts, alpha_x, alpha_t):
    return SensitivityProfile(ts, torch.full_like(ts, alpha_x), torch.full_like(ts, alpha_t))


@st.composite
def walks(draw):
    """x (B, d), a grid that rises or falls, a seed."""
    steps, batch = draw(st.integers(2, 16)), draw(st.integers(1, 5))
    places = [0.0, *accumulate(draw(st.lists(st.floats(0.02, 1), min_size=steps, max_size=steps)))]
    ts, seed = torch.tensor(places, dtype=torch.float64) / places[-1], draw(st.integers(0, 99))
    x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, ts if draw(st.booleans()) else 1 - ts, seed


tolerances, limits = st.floats(0.05, 4), st.sampled_from([1, 2, 3, 5, math.inf])


@given(walks(), tolerances, limits)
def test_on_a_linear_flow_true_change_is_at_most_predicted_is_at_most_epsilon(walk, tolerance, n):
    x, ts, seed = walk
    field = linear_flow(6, seed)
    cached = Paper(field, constant(ts, field.alpha_x, field.alpha_t), tolerance=tolerance, max_reuses=n)
    for t, t_next in pairwise(ts):
        v = cached(x, t)
        query = cached.report.trace[-1]
        true = rms(v - field(x, t))
        assert (true <= query.predicted * (1 + 1e-12))[query.reused].all()
        assert (query.predicted <= tolerance)[query.reused].all()
        assert (true == 0)[~query.reused].all()
        x = x + (t_next - t) * v


@given(walks(), tolerances, limits)
def test_what_is_predicted_is_the_norm_of_the_summed_dx_and_dt_since_the_reference(walk, tolerance, n):
    x, ts, seed = walk
    cached = Paper(Field(seed), constant(ts, 0.7, 0.3), tolerance=tolerance, max_reuses=n)
    with cached.run() as run:
        steps = list(trajectory(run, x, ts))
    for row in range(len(x)):
        dx, dt = torch.zeros(6, dtype=torch.float64), 0.0
        for query, step in zip(cached.report.trace, steps, strict=True):
            if not query.reused[row]:
                dx, dt = torch.zeros(6, dtype=torch.float64), 0.0
            elif dt:
                s = 0.7 * rms(dx[None]).item() + 0.3 * abs(dt)
                assert query.predicted[row].item() == pytest.approx(s, rel=1e-9)
            dx, dt = dx + step.dx[row], dt + step.dt.item()


def test_the_drift_since_the_reference_is_not_summed_again_at_each_step():
    """MaxDiffusion adds the cumulative drift anew every time: 1, 3, 6, 10 steps' worth where 1, 2, 3, 4 were made."""
    ts = grids.uniform(10)
    cached = Paper(lambda x, t: torch.ones_like(x), constant(ts, 1, 1), tolerance=10, max_reuses=math.inf)
    cached.integrate(torch.zeros(1, 4, dtype=torch.float64), ts)
    predicted = torch.stack([query.predicted for query in cached.report.trace[1:]])
    torch.testing.assert_close(predicted[:, 0], 0.2 * torch.arange(1, 10, dtype=torch.float64))


NOTHING = ["tolerance 0", "no reuses", "epsilon(t) = 0"]


@pytest.mark.parametrize("nothing", [{"tolerance": 0}, {"max_reuses": 0}, {"tolerance": lambda t: 0.0}], ids=NOTHING)
@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over_modes
def test_with_nothing_to_reuse_the_result_is_the_bare_fields_bit_for_bit(stepper, nothing, dtype, mode):
    field, ts = GaussianFlow(PATH), grids.uniform(12, 0.95, 0.05)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    cached = Paper(field, constant(ts, 0, 0), **{"tolerance": 9, "max_reuses": 9, **nothing, **mode})
    assert torch.equal(cached.integrate(x, ts, STEPPERS[stepper]()), integrate(field, x, ts, STEPPERS[stepper]()))
    assert not cached.report.reuses.any()


@pytest.mark.parametrize("stepper", STEPPERS)
@over_modes
def test_every_stepper_reuses_and_stays_near_the_bare_field(stepper, mode):
    field, ts = GaussianFlow(PATH), grids.uniform(40, 0.95, 0.05)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cached = Paper(field, constant(ts, 0.2, 0), tolerance=0.1, **mode)
    end = cached.integrate(x, ts, STEPPERS[stepper]())
    assert (cached.report.reuses > 0).all()
    assert (rms(end - integrate(field, x, ts, STEPPERS[stepper]())) < 0.1).all()


@given(walks(), tolerances, st.integers(0, 5))
def test_reuses_in_a_row_never_exceed_max_reuses(walk, tolerance, n):
    x, ts, seed = walk
    cached = Paper(Field(seed), constant(ts, 0.5, 0.5), tolerance=tolerance, max_reuses=n)
    cached.integrate(x, ts)
    assert max(runs(cached.report), default=0) <= n


@pytest.mark.parametrize("n", [0, 1, 2, 5, math.inf])
def test_where_nothing_else_stops_it_max_reuses_alone_is_the_schedule(n):
    ts = grids.uniform(20)
    cached = Paper(Field(), constant(ts, 0, 0), tolerance=1, max_reuses=n)
    cached.integrate(torch.zeros(2, 6, dtype=torch.float64), ts)
    assert [bool(query.reused[0]) for query in cached.report.trace] == [k % (n + 1) != 0 for k in range(20)]


def runs(report):
    """The lengths of all runs of reuses."""
    for row in range(len(report.queries)):
        for reused, run in groupby(bool(query.reused[row]) for query in report.trace):
            if reused:
                yield len(list(run))


@pytest.mark.parametrize("stepper", [Euler(), Heun(), DPMSolverPP(PATH, 2)], ids=lambda s: type(s).__name__)
@over_modes
@settings(max_examples=20)
@given(walk=walks(), tolerance=tolerances, n=limits)
def test_a_sample_does_not_feel_its_batch(stepper, mode, walk, tolerance, n):
    x, ts, seed = walk
    ts = 0.05 + 0.9 * ts.sort(descending=True).values if isinstance(stepper, DPMSolverPP) else ts
    profile = constant(ts, 0.7, 0.3)
    for kind in (Split, Field):
        together = Paper(kind(seed), profile, tolerance=tolerance, max_reuses=n, **mode)
        end, report = together.integrate(x, ts, stepper), together.report
        for row in range(len(x)):
            alone = Paper(kind(seed), profile, tolerance=tolerance, max_reuses=n, **mode)
            assert torch.equal(end[row : row + 1], alone.integrate(x[row : row + 1], ts, stepper))
            for one, all_ in zip(alone.report.trace, report.trace, strict=True):
                for name in ("t", "predicted", "reused", "duplicate"):
                    assert torch.equal(getattr(one, name)[0], getattr(all_, name)[row])
                assert kind is Field or torch.equal(one.computed[0], all_.computed[row])
            if kind is Split:
                for count in ("queries", "evaluations", "reuses", "duplicates", "cache_ratio"):
                    assert torch.equal(getattr(alone.report, count)[0], getattr(report, count)[row])


@pytest.mark.parametrize("kind", [Split, Field])
@given(data=st.data(), tolerance=tolerances, n=st.sampled_from([0, 1, 2, math.inf]))
def test_queries_are_evaluations_and_reuses_and_duplicates_and_every_row_computed_is_counted(kind, data, tolerance, n):
    """Whatever is called: steps, double calls, other starts, batches that grow and shrink."""
    ts, field = grids.uniform(10), kind()
    cached = Paper(field, constant(ts, 0.5, 0.5), tolerance=tolerance, max_reuses=n)
    x, k, rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 0, 0
    acts = st.sampled_from(["step"] * 4 + ["again", "one again", "back", "batch"])
    for act in ["again", *data.draw(st.lists(acts, max_size=20))]:
        if act == "step" and k < 10:
            x, k = x * torch.tensor([[0.99], [0.9], [0.7], [1.2]])[: len(x)].double(), k + 1
        elif act == "one again":
            x = torch.cat([x[:1], x[1:] * 0.9])
        elif act == "back":
            k = 0
        elif act == "batch":
            x, k = x[:2] if len(x) > 2 else torch.cat([x, x + 1]), 0
        cached(x, ts[k])
        rows += len(x)
        report = cached.report
        assert torch.equal(report.queries, report.evaluations + report.reuses + report.duplicates)
        assert report.evaluations.sum() == field.rows
        assert report.queries.sum() == rows
        assert (report.unused == 0).all() or kind is Field


@given(walks(), tolerances, limits)
def test_holding_under_euler_is_a_coarser_euler(walk, tolerance, n):
    x, ts, seed = walk
    field = Field(seed)
    cached = Paper(field, constant(ts, 0.7, 0.3), tolerance=tolerance, max_reuses=n)
    end = cached.integrate(x, ts)
    for row in range(len(x)):
        kept = [k for k, query in enumerate(cached.report.trace) if not query.reused[row]]
        coarse = integrate(field, x[row : row + 1], ts[[*kept, len(ts) - 1]])
        torch.testing.assert_close(end[row : row + 1], coarse, rtol=1e-12, atol=1e-12)
