"""A plan carried out by a stepper leaves the sample and the report of Algorithm 1 under that plan, to the bit."""

import math
import pickle
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sencache import CachedField, calibrate, rms
from sencache.correct import Notes, Repaying
from sencache.criteria import Planned
from sencache.report import Report
from sencache.reuse import REUSES, VARIABLES
from sencache.run import Rule, Run
from sencache.walk import script, walking
from solvers import (
    BrownianPath,
    Cosine,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    TorchDiffEq,
    UniPC,
    grids,
    integrate,
)
from tests.flows import GaussianFlow, Nonlinear

K, FIELD = 12, Nonlinear()
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TS = torch.linspace(0.97, 0.18, K + 1, dtype=torch.float64) ** 1.5
PATHS = {"linear": Linear(), "cosine": Cosine()}
STEPPERS = {
    "Euler": lambda path: Euler(),
    "DDIM": lambda path: DPMSolverPP(path, order=1),
    "DPM-Solver++ 2M": lambda path: DPMSolverPP(path, order=2),
    "UniPC": lambda path: UniPC(path),
    "Euler-Maruyama": lambda path: EulerMaruyama(path, BrownianPath(X, TS, torch.Generator().manual_seed(2))),
}


@pytest.fixture(autouse=True)
def sampling():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def profile():
    return calibrate(FIELD, X, TS, progress=False)


def identical(one, other):
    """Whether two tensors or numbers are the same, NaN being NaN."""
    if not isinstance(one, torch.Tensor):
        return one == other or (one != one and other != other)
    return one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan()) and torch.equal(*filled(one, other))


def filled(*parts):
    return [part.nan_to_num(nan=7.0) for part in parts]


def same_report(one, other):
    assert len(one.trace) == len(other.trace)
    for mine, theirs in zip(one.trace, other.trace, strict=True):
        for name, a, b in zip(mine._fields, mine, theirs, strict=True):
            assert identical(a, b), name
    rest = [vars(report) | {"trace": []} for report in (one, other)]
    assert all(identical(rest[0][name], rest[1][name]) for name in rest[0])


def walked(field, plan, x, ts, stepper, norm=rms):
    """The end and the report of a plan that is walked."""
    report = Report()
    with walking(field, stepper, script(stepper, plan, plan.correct, ts), norm, report) as walk:
        return integrate(walk.field, x, ts, walk), report


def decided(field, plan, x, ts, stepper, norm=rms):
    """And of one under which every query is decided anew."""
    rule = Rule(Planned(plan), lambda t: math.inf, math.inf, REUSES[plan.reuse], VARIABLES[plan.variable], norm)
    run = Run(field, rule, None)
    if plan.correct:
        run.ledger = notes = Notes()
        stepper = Repaying(stepper, notes)
    return integrate(run, x, ts, stepper), run.report


@given(
    data=st.data(),
    method=st.sampled_from(list(STEPPERS)),
    path=st.sampled_from(list(PATHS)),
    reuse=st.sampled_from(list(REUSES)),
    variable=st.sampled_from(["t", "log t"]),
    correct=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_plan_is_carried_out_as_it_would_be_decided(profile, data, method, path, reuse, variable, correct, dtype):
    with torch.no_grad():
        some = data.draw(st.sets(st.integers(1, K - 1)))
        nodes = torch.tensor(sorted({0, *some}))
        plan = replace(
            CachedField(FIELD, profile, nfe=6).plan(), nodes=nodes, reuse=reuse, variable=variable, correct=correct
        )
        stepper, x = STEPPERS[method](PATHS[path]), X.to(dtype)
        if method == "Euler-Maruyama":
            x = X  # the path was drawn for these
        ends, reports = zip(*(way(FIELD, plan, x, TS, stepper) for way in (walked, decided)), strict=True)
    assert torch.equal(*ends)
    same_report(*reports)
    assert (reports[0].evaluations == len(nodes)).all()


@pytest.mark.parametrize("method", STEPPERS)
@pytest.mark.parametrize("ts", [TS.float(), grids.uniform(K, 0.95, 0.05), 1 - TS])
def test_integrate_is_what_following_the_run_is(method, ts):
    path = Linear(data_at=0.0 if ts[0] > ts[-1] else 1.0)
    stepper, field = STEPPERS[method](path), GaussianFlow(path)
    if method == "Euler-Maruyama":
        stepper = replace(stepper, noise=BrownianPath(X, ts, torch.Generator().manual_seed(2)))
    cached = CachedField(field, calibrate(field, X, ts, stepper, progress=False), nfe=5)
    end, report = cached.integrate(X, ts, stepper), cached.report
    with cached.following(ts, stepper) as (run, repaying):
        other = integrate(run, X, ts, repaying)
    assert torch.equal(end, other)
    same_report(report, cached.report)


def test_a_norm_of_ones_own_is_asked_for(profile):
    plan = CachedField(FIELD, profile, nfe=5).plan()
    masked = partial(rms, mask=torch.tensor([1.0, 1, 0, 0, 1, 1]))
    one, other = (way(FIELD, plan, X, TS, Euler(), masked)[1] for way in (walked, decided))
    same_report(one, other)
    usual = walked(FIELD, plan, X, TS, Euler())[1]
    assert not torch.equal(one.trace[-1].predicted, usual.trace[-1].predicted)


def test_a_norm_that_writes_into_what_it_is_given_or_answers_in_one_buffer_is_not_confused(profile):
    plan, buffer = CachedField(FIELD, profile, nfe=5).plan(), torch.zeros(len(X), dtype=torch.float64)
    for norm in (lambda d: d.abs_().flatten(1).amax(1), lambda d: buffer.copy_(rms(d))):
        (end, report), (other, decisions) = (way(FIELD, plan, X, TS, Euler(), norm) for way in (walked, decided))
        assert torch.equal(end, other)
        assert all(map(identical, *([query.predicted for query in each.trace] for each in (report, decisions))))


class Counted:
    """A field that counts its calls, and gives every answer in the same memory."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at, self.answer = 0, fails_at, torch.zeros_like(X)

    def __call__(self, x, t):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the machine is gone")
        return self.answer.copy_(FIELD(x, t))


def test_a_field_that_writes_its_answers_into_one_buffer_is_not_confused(profile):
    field, cached = Counted(), CachedField(FIELD, profile, nfe=5)
    assert torch.equal(CachedField(field, profile, nfe=5).integrate(X, TS), cached.integrate(X, TS))
    assert field.calls == 5


def test_what_was_paid_before_a_failure_is_in_the_report(profile):
    cached = CachedField(Counted(fails_at=4), profile, nfe=5)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        cached.integrate(X, TS)
    assert cached.report.evaluations.tolist() == [3] * 3
    fourth = int(cached.plan().nodes[3])
    assert cached.report.queries.tolist() == [fourth] * 3
    seen = torch.stack([query.observed for query in cached.report.trace])
    third = int(cached.plan().nodes[2])
    assert seen[third:].isnan().all()  # of what comes after the last evaluation nothing is known
    reused = torch.stack([query.reused for query in cached.report.trace])
    assert seen[:third][reused[:third]].isfinite().all()


def test_outputs_that_are_no_numbers_are_named_with_their_time(profile):
    cached = CachedField(lambda x, t: FIELD(x, t) / (t > 0.5), profile, nfe=6)
    with pytest.raises(FloatingPointError, match=r"NaN or infinity at t = 0\.\d+ in samples \[0, 1, 2\]"):
        cached.integrate(X, TS)


@pytest.mark.filterwarnings("ignore:Gradients are being recorded")
def test_gradients_are_still_recorded(profile):
    cached, x = CachedField(FIELD, profile, nfe=5), X.clone().requires_grad_()
    with torch.enable_grad():
        end = cached.integrate(x, TS)
        full = integrate(FIELD, x, TS)
        assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (end, full)))
    assert cached.report.bypasses == K


def test_methods_that_ask_twice_at_one_time_have_no_script(profile):
    plan = CachedField(FIELD, profile, nfe=5).plan(TS, Heun())
    assert script(Heun(), plan, True, TS) is None
    end = CachedField(FIELD, profile, nfe=5).integrate(X, TS, Heun())
    assert end.isfinite().all()


def test_a_cached_field_that_has_sampled_is_pickled_and_samples_again(profile):
    cached = CachedField(FIELD, profile, nfe=5)
    end = cached.integrate(X, TS)
    assert torch.equal(pickle.loads(pickle.dumps(cached)).integrate(X, TS), end)


def test_one_script_serves_states_of_every_size(profile):
    cached = CachedField(FIELD, profile, nfe=5)
    assert torch.equal(cached.integrate(X, TS)[:1], cached.integrate(X[:1], TS))
    assert cached.report.evaluations.tolist() == [5]


def test_grids_of_the_same_times_in_other_precision_have_scripts_of_their_own(profile):
    cached, half = CachedField(FIELD, profile, nfe=5), TS.float()
    cached.integrate(X, half.double())
    end = cached.integrate(X, half)
    assert torch.equal(end, CachedField(FIELD, profile, nfe=5).integrate(X, half))


class Plain:
    """Euler's method as somebody writes it who needs no dataclass."""

    order, adaptive = 1, False

    def weights(self, t, t_next):
        return Euler().weights(t, t_next)

    def advance(self, field, x, t, t_next, memory):
        return (t_next - t) * field(x, t), None


class PerSample(Plain):
    def advance(self, field, x, t, t_next, memory):
        return (t_next - t) * field(x, t.expand(len(x))), None


class Widening(Plain):
    def advance(self, field, x, t, t_next, memory):
        return (t_next - t) * field(x, t).double(), None


class Leaning(Plain):
    """A method of two outputs that can be changed after it was made."""

    lean = 0.5

    def advance(self, field, x, t, t_next, memory):
        y = field(x, t)
        return (t_next - t) * (y if memory is None else (1 + self.lean) * y - self.lean * memory), y


class Backward(Plain):
    """Asks late before early."""

    def advance(self, field, x, t, t_next, memory):
        h = t_next - t
        return h / 2 * (field(x, t + 0.75 * h) + field(x, t + 0.25 * h)), None


class Remembering(Plain):
    """Keeps the lengths of its last steps in a tensor beside its outputs."""

    def advance(self, field, x, t, t_next, memory):
        y, h = field(x, t), t_next - t
        steps = h.repeat(4) if memory is None else torch.cat([h[None], memory[1][:3]])
        return h * (y if memory is None else 1.2 * y - 0.2 * memory[0]), (y, steps)


class Hungry(Plain):
    """Asks twice where there are several samples."""

    def advance(self, field, x, t, t_next, memory):
        return (t_next - t) * (field(x, t) if len(x) == 1 else field(x, t) / 2 + field(x, (t + t_next) / 2) / 2), None


def follows(cached, stepper, x=X):
    """The ends of `integrate` and of a run that decides at every query."""
    end = cached.integrate(x, TS, stepper)
    with cached.following(TS, stepper) as (run, repaying):
        return end, integrate(run, x, TS, repaying)


@pytest.mark.parametrize("stepper", [Plain(), PerSample(), Leaning(), Remembering()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("payload", ["output", "difference"])
def test_steppers_of_ones_own_are_carried_out_too(profile, stepper, payload):
    assert torch.equal(*follows(CachedField(FIELD, profile, nfe=5, payload=payload), stepper))


def test_a_state_that_gains_precision_on_the_way_is_sampled(profile):
    cached = CachedField(FIELD, profile, nfe=5)
    end = cached.integrate(X.float(), TS, Widening())
    assert end.dtype == torch.float64
    torch.testing.assert_close(end, cached.integrate(X, TS, Widening()), rtol=0, atol=1e-5)


def test_a_stepper_that_was_changed_is_carried_out_as_it_is_now(profile):
    stepper, cached = Leaning(), CachedField(FIELD, profile, nfe=5)
    cached.integrate(X, TS, stepper)
    stepper.lean = -0.9
    assert torch.equal(*follows(cached, stepper))
    cached.correct = False
    assert torch.equal(*follows(cached, stepper))


def test_plans_that_were_changed_are_carried_out_as_they_are_now(profile):
    cached, other = CachedField(FIELD, profile, nfe=5), CachedField(FIELD, profile, nfe=7)
    cached.integrate(X, TS)
    other.plan(TS)
    cached._plans = other._plans
    cached.integrate(X, TS)
    assert cached.report.evaluations.tolist() == [7] * 3


def test_steppers_that_ask_in_another_order_than_time_has_are_still_refused(profile):
    with pytest.raises(ValueError, match=r"measured with t falling, and here t is rising"):
        CachedField(FIELD, profile, nfe=8).integrate(X, TS, Backward())


def test_a_stepper_that_asks_for_more_than_was_planned_is_told(profile):
    with pytest.raises(ValueError, match=f"asks for more outputs on this grid than the {K} that were planned"):
        CachedField(FIELD, profile, nfe=5).integrate(X, TS, Hungry())


def test_adaptive_steppers_are_refused_in_words(profile):
    for use in ("integrate", "plan"):
        cached = CachedField(FIELD, profile, nfe=5)
        with pytest.raises(ValueError, match="chooses its steps by comparing outputs"):
            cached.integrate(X, TS, TorchDiffEq()) if use == "integrate" else cached.plan(TS, TorchDiffEq())


def test_what_was_paid_for_an_output_that_is_refused_is_in_the_report(profile):
    field = Counted()
    cached = CachedField(lambda x, t: field(x, t) / (field.calls != 3), profile, nfe=6)
    with pytest.raises(FloatingPointError, match="NaN or infinity at t"):
        cached.integrate(X, TS)
    assert cached.report.evaluations.tolist() == [3] * 3
    cached.field = lambda x, t: FIELD(x, t).float()
    with pytest.raises(TypeError, match="must return a velocity like x"):
        cached.integrate(X, TS)
    assert cached.report.evaluations.tolist() == [1] * 3


def test_a_norm_of_another_shape_is_refused_at_the_first_output(profile):
    field = Counted()
    with pytest.raises(ValueError, match=r"`norm` must give a number a sample, shape \(3,\); got \(\)"):
        CachedField(field, profile, nfe=5, norm=lambda x: x.norm()).integrate(X, TS)
    assert field.calls == 1


def test_two_thirds_of_the_calls_between_evaluations_are_left_out(profile):
    def calls(run):
        found = [0]

        def count(frame, event, what):
            found[0] += event in ("call", "c_call")

        run()  # plans and scripts are made once
        sys.setprofile(count)
        try:
            run()
        finally:
            sys.setprofile(None)
        return found[0]

    ts = grids.uniform(50)
    cached = CachedField(FIELD, calibrate(FIELD, X, ts, progress=False), nfe=20)

    def following():
        with cached.following(ts) as (run, repaying):
            integrate(run, X, ts, repaying)

    assert calls(lambda: cached.integrate(X, ts)) < calls(following) / 3
