"""A tolerance in units of the sample: each change weighed by what the stepper makes of it in the end, and added up."""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, SensitivityProfile, calibrate, planned_tolerance, rms
from sencache.reuse import VARIABLES
from solvers import DPMSolverPP, Euler, Heun, Linear, grids, integrate
from tests.flows import Nonlinear, linear_flow

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROFILE = SensitivityProfile(torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.7]), torch.tensor([1.3, 1.3]))
GMM = GaussianMixture.load("benchmarks/fields/gmm.safetensors", Linear())
GRIDS = {"uniform": grids.uniform(30, 0.98, 0.02), "shifted": grids.shifted(30, 5.0, 0.98, 0.02)}
STEPPERS = {"Euler": Euler(), "DDIM": DPMSolverPP(Linear(), 1)}


def carried(stepper, ts):
    """|dx_K / dv_k| of a one-output stepper: its own weight, carried on by the state's weight in every later step."""
    steps = [stepper.weights(*step) for step in pairwise(ts.double())]
    later = [math.prod(float(w.state) for w in steps[k + 1 :]) for k in range(len(steps))]
    return [abs(float(w.field) * rest) for w, rest in zip(steps, later, strict=True)]


def literally(field, x, ts, stepper, tolerance, alpha_x, alpha_t):
    """Which queries of one sample x (1, d) are reused, by hand: hold, no correction, accumulate gain times S."""
    reused, spent, gains = [], 0.0, carried(stepper, ts)
    x_ref = t_ref = y = None
    for k, (t, t_next) in enumerate(pairwise(ts)):
        if y is None:
            total = math.inf
        else:
            total = spent + gains[k] * (alpha_x * float(rms(x - x_ref)) + alpha_t * abs(float(t - t_ref)))
        reused.append(total <= tolerance)
        if not reused[-1]:
            x_ref, t_ref, y, total = x, t, field(x, t), 0.0
        spent = total
        state, weight = stepper.weights(t, t_next)
        x = state * x + weight * y
    return reused


@pytest.mark.parametrize("method", STEPPERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.1])
def test_changes_are_weighed_by_what_becomes_of_them_and_added_up(method, grid, tolerance):
    ts, stepper = GRIDS[grid], STEPPERS[method]
    cached = CachedField(Nonlinear(), PROFILE, tolerance=tolerance, unit="sample", reuse="hold")
    cached.integrate(X, ts, stepper)
    found = torch.stack([query.reused for query in cached.report.trace])
    for row in range(len(X)):
        expected = literally(Nonlinear(), X[row : row + 1], ts, stepper, tolerance, 0.7, 1.3)
        assert found[:, row].tolist() == expected
    assert found.any()
    assert found.all(1).sum() < len(found) - 1


def test_heun_is_charged_for_each_of_its_two_outputs_at_one_time():
    """On an even grid: half a step for each query, two at every time but the ends. An exact repetition is free."""
    ts = grids.uniform(10, 0.9, 0.1)
    cached = CachedField(linear_flow(), PROFILE, tolerance=1e9, unit="sample", reuse="hold")
    cached.integrate(X, ts, Heun())
    spent, each = torch.zeros(3, dtype=torch.float64), 0.08 / 2
    for k, query in enumerate(cached.report.trace):
        if not k or query.duplicate.any():
            continue
        spent = spent + each * query.predicted
        torch.testing.assert_close(query.spent, spent)


@pytest.mark.parametrize("profile", [None, "calibrated"])
def test_a_tolerance_leads_to_the_same_error_on_every_grid(profile):
    """On grids of 40 to 160 steps, even or not: within a factor of 4. Of the output it is not: 100 and more."""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(5))

    def spread(**options):
        errors = []
        for ts in (grids.uniform(40), grids.uniform(160), grids.shifted(80, 5.0)):
            known = calibrate(GMM, x[:4], ts, progress=False) if profile else None
            cached = CachedField(GMM, known, max_reuses=math.inf, **options)
            end = cached.integrate(x, ts)
            assert cached.report.reuses.min() > len(ts) / 4
            errors.append(float(rms(end - integrate(GMM, x, ts)).median()))
        return max(errors) / min(errors)

    assert spread(tolerance=0.01, unit="sample", reuse="hold") < 4


def test_in_units_of_the_sample_reuses_in_a_row_are_not_counted():
    cached = CachedField(Nonlinear(), PROFILE, tolerance=1e9, unit="sample")
    cached.integrate(X, GRIDS["uniform"])
    assert cached.report.evaluations.tolist() == [1, 1, 1]


def test_without_a_grid_the_last_step_is_the_weight():
    """Euler's own gain: a bare loop decides as `integrate` does."""
    ts = GRIDS["shifted"]
    options = {"tolerance": 0.02, "unit": "sample", "reuse": "hold"}
    known, bare = CachedField(Nonlinear(), PROFILE, **options), CachedField(Nonlinear(), PROFILE, **options)
    known.integrate(X, ts)
    x = X
    for t, t_next in pairwise(ts):
        x = x + (t_next - t) * bare(x, t)
    late = sum(not torch.equal(a.reused, b.reused) for a, b in zip(known.report.trace, bare.report.trace, strict=True))
    assert late <= 12  # the weight is of the step before, and the grid is uneven
    even = GRIDS["uniform"]
    known.integrate(X, even)
    x = X
    with bare.run():
        for t, t_next in pairwise(even):
            x = x + (t_next - t) * bare(x, t)
    assert all(torch.equal(a.reused, b.reused) for a, b in zip(known.report.trace, bare.report.trace, strict=True))


@pytest.mark.parametrize("wrong", ["velocity", 1])
def test_a_unit_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="must be output or sample"):
        CachedField(Nonlinear(), PROFILE, tolerance=0.1, unit=wrong)


def test_a_unit_goes_with_a_tolerance():
    with pytest.raises(ValueError, match="goes with it; got unit='sample' alone"):
        CachedField(Nonlinear(), PROFILE, nfe=3, unit="sample")


# a plan as epsilon(t)


@pytest.mark.parametrize("nfe", [4, 9, 20])
@pytest.mark.parametrize("upward", [False, True])
def test_the_rule_under_a_plans_tolerance_evaluates_where_the_plan_does(nfe, upward):
    """One sample, calibrated on itself: S along its trajectory is what the plan was made from."""
    flow, x = linear_flow(), X[:1]
    ts = GRIDS["uniform"].flip(0) if upward else GRIDS["uniform"]
    profile = calibrate(flow, x, ts, secants=True, progress=False)
    plan = CachedField(flow, profile, nfe=nfe).plan(ts)
    epsilon = planned_tolerance(plan, profile)
    cached = CachedField(flow, profile, tolerance=epsilon, max_reuses=math.inf, reuse="linear")
    cached.integrate(x, ts)
    evaluated = [k for k, query in enumerate(cached.report.trace) if not query.reused.all()]
    assert evaluated == plan.nodes.tolist()


def test_quick_samples_are_evaluated_sooner_under_a_plans_tolerance():
    x = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(6))
    ts = grids.uniform(40)
    profile = calibrate(GMM, x[:8], ts, progress=False)
    plan = CachedField(GMM, profile, nfe=6).plan(ts)
    cached = CachedField(GMM, profile, tolerance=planned_tolerance(plan, profile), max_reuses=math.inf)
    cached.integrate(x[8:], ts)
    assert abs(float(cached.report.evaluations.double().median()) - 6) <= 2
    patterns = torch.stack([query.reused for query in cached.report.trace], 1)
    assert len(patterns.unique(dim=0)) > 1


@pytest.mark.parametrize("variable", ["t", "log t"])
def test_the_rule_continues_outputs_in_the_plans_variable(variable):
    profile = calibrate(linear_flow(), X, GRIDS["uniform"], progress=False)
    plan = replace(CachedField(linear_flow(), profile, nfe=9).plan(), variable=variable)
    epsilon = pickle.loads(pickle.dumps(planned_tolerance(plan, profile)))
    cached = CachedField(linear_flow(), profile, tolerance=epsilon, max_reuses=math.inf)
    with cached.run(GRIDS["uniform"]) as run:
        assert run.rule.variable is VARIABLES[variable]
    assert CachedField(linear_flow(), profile, tolerance=0.1)._rule(None, Euler()).variable is VARIABLES["t"]


def test_a_plan_of_unmeasured_sensitivities_makes_no_tolerance():
    profile = calibrate(linear_flow(), X, GRIDS["uniform"], secants=False, progress=False)
    plan = CachedField(linear_flow(), profile, nfe=9).plan()
    with pytest.raises(ValueError, match="secants"):
        planned_tolerance(plan, profile)


# what a reuse turned out to have been off by


def through(nodes, values, at):
    """Lagrange's polynomial through the nodes, at another time."""
    total = torch.zeros_like(values[0])
    for i, value in enumerate(values):
        others = [node for j, node in enumerate(nodes) if j != i]
        total += value * math.prod((at - node) / (nodes[i] - node) for node in others)
    return total


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("method", ["Euler", "DDIM", "Heun"])
@pytest.mark.parametrize("correct", [True, False])
def test_what_is_observed_is_the_distance_to_the_polynomial_through_the_evaluations(reuse, method, correct):
    stepper, ts = {**STEPPERS, "Heun": Heun()}[method], GRIDS["shifted"]
    used, computed = [], {}

    class Field:
        def __call__(self, x, t):
            return Nonlinear()(x, t)

        def select(self, rows):
            return self

    cached = CachedField(Field(), tolerance=0.02, reuse=reuse, correct=correct)
    with cached.following(ts, stepper) as (run, carrier):

        def noted(x, t):
            used.append((float(t), run(x, t).clone()))
            for row in (~run.report.trace[-1].reused & ~run.report.trace[-1].duplicate).nonzero()[:, 0].tolist():
                computed.setdefault(row, []).append((len(used) - 1, *used[-1]))
            return used[-1][1].clone()

        integrate(noted, X, ts, carrier)
    trace, seen = cached.report.trace, 0
    for row in range(len(X)):
        for k, query in enumerate(trace):
            before = [each for each in computed[row] if each[0] < k]
            after = [each for each in computed[row] if each[0] > k]
            if not query.reused[row] or not after:
                assert query.observed[row].isnan()
                continue
            known = {t: y[row] for _, t, y in (*before[-2:], after[0])}
            if len({t for _, t, _ in (before[-1], after[0])}) < 2:
                continue  # evaluated twice at one time
            true = through(list(known), list(known.values()), used[k][0])
            error = float((true - used[k][1][row]).square().mean().sqrt())
            assert float(query.observed[row]) == pytest.approx(error, rel=1e-6, abs=1e-9)
            seen += 1
    assert seen > 10
    patterns = torch.stack([query.reused for query in trace], 1)
    assert len(patterns.unique(dim=0)) > 1  # samples decide for themselves


def test_what_was_reused_before_another_trajectory_stays_unobserved():
    """Its gap never ended; the evaluations of the next trajectory say nothing of it."""
    cached, ts = CachedField(Nonlinear(), tolerance=1e9, max_reuses=4, reuse="hold"), GRIDS["uniform"]
    for _ in range(2):
        x = X
        for t, t_next in pairwise(ts):
            x = x + (t_next - t) * cached(x, t)
    first = cached.report.trace[: len(ts) - 1]
    last = max(k for k, query in enumerate(first) if not query.reused.any())
    assert last < len(ts) - 2
    assert all(query.observed.isnan().all() for query in first[last + 1 :])
    assert all(query.observed.isfinite().all() for query in first[:last] if query.reused.all())
    assert not any(query.observed.isinf().any() for query in cached.report.trace)


def test_a_sample_that_is_never_evaluated_again_does_not_slow_the_others():
    class Field:
        def __call__(self, x, t):
            return -x

        def select(self, rows):
            return self

    def seconds(steps):
        x, ts = torch.tensor([[0.0], [1.0]]), torch.linspace(1, 0, steps + 1)
        begun = time.process_time()
        CachedField(Field(), tolerance=1e-9).integrate(x, ts)
        return time.process_time() - begun

    seconds(50)
    assert seconds(800) < 4 * 3 * seconds(200)


def starts_late(x, t):
    """Still at first, and then it moves."""
    return torch.where(t > 0.9, torch.ones_like(x), torch.sin(2 * x + 3 * t) - x)


def starts_at_zero(x, t):
    return torch.where(t > 0.9, torch.zeros_like(x), torch.sin(2 * x + 3 * t) - x)


@pytest.mark.parametrize("field", [starts_late, starts_at_zero])
def test_two_outputs_that_are_alike_do_not_stand_for_the_rest(field):
    ts = grids.uniform(50)
    cached = CachedField(field, tolerance=0.003)
    end, full = cached.integrate(X, ts), integrate(field, X, ts)
    assert (rms(end - full) < 0.02 * rms(full)).all()
    assert cached.report.reuses.min() >= 10


def test_a_field_that_never_moves_is_asked_ever_less_often():
    cached = CachedField(lambda x, t: torch.ones_like(x), tolerance=0.003)
    cached.integrate(X, grids.uniform(200))
    asked = [k for k, query in enumerate(cached.report.trace) if query.computed.any()]
    assert asked == [0, 1, 6, 27, 112]  # beyond four times 1, 5, 21, 85 steps
