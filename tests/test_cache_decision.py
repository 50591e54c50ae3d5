"""When an output is reused: requirements 7 to 13 of the cache, and 19 and 21, what a decision leaves behind."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from sencache import CachedField, SensitivityProfile, rms
from sencache.criteria import Sensitivities
from solvers import Heun, Linear, TorchDiffEq, grids, integrate
from solvers.ode import ADAPTIVE
from tests.flows import GaussianFlow, Nonlinear, linear_flow

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
TS = grids.uniform(10)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def profile(alpha_x=1.0, alpha_t=1.0, ts=TS):
    return SensitivityProfile(ts, torch.full_like(ts, alpha_x), torch.full_like(ts, alpha_t))


class Split:
    def __call__(self, x, t):
        return -x

    def select(self, rows):
        return self


def decay(x, t):
    return -x


def cached(field=decay, **options):
    return Paper(field, **{"profile": profile(), "tolerance": 0.5, **options})


# requirement 7: a score that is no number is a miss, and outputs that are none are never kept


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_miss(alpha):
    field = cached(profile=profile(alpha, 0.0), tolerance=math.inf)
    field(X, 1.0)
    field(X, 0.9)  # infinity times no distance at all
    field(X + 1, 0.8)
    assert not field.report.reuses.any()


def test_a_norm_that_is_no_number_is_a_miss():
    field = cached(tolerance=math.inf, norm=lambda d: d.flatten(1).sum(1) * math.nan)
    for t in TS:
        assert torch.equal(field(t * X, t), -t * X)


def test_where_nothing_is_known_nothing_is_reused_whatever_a_criterion_says():
    class Sure:
        direction = 0

        def predicted(self, seen):
            return torch.zeros_like(seen.t)

    def fails_once(x, t):
        return torch.where((t == 1) & (torch.arange(len(x)) == 1)[:, None], math.nan, -x)

    field = CachedField(fails_once, criterion=Sure(), tolerance=1.0)
    for t in TS:
        field(X, t)
    assert field.report.queries.tolist() == [11, 11, 11]
    assert [query.reused.tolist() for query in field.report.trace[:3]] == [[False] * 3, [True, False, True], [True] * 3]


def test_a_plan_does_not_measure_the_state():
    """By time it is known what to do: nothing is asked of the device but of evaluations."""
    measured = []

    def norm(d):
        measured.append(len(d))
        return rms(d)

    plan = SensitivityProfile(TS[:-1], *2 * [torch.ones(10)], gram=torch.eye(10)[None], size=torch.ones(1), end=TS[-1])
    field = CachedField(decay, plan, nfe=4, norm=norm)
    with field.run(TS):
        for t in TS[:-1]:
            asked = len(measured)
            field(X, t)
            assert len(measured) == asked or not field.report.trace[-1].reused.any()
    assert len(measured) >= 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", [True, False])
def test_an_output_that_is_no_number_is_handed_out_and_never_kept(bad, split):
    class Fails:
        rows = torch.tensor([1])

        def __call__(self, x, t):
            v = -x
            if t == 1:
                v[self.rows] = bad
            return v

    if split:
        Fails.select = lambda self, rows: decay
    field = cached(Fails(), tolerance=10, max_reuses=9)
    assert not field(X, 1.0)[1].isfinite().any()
    v = field(X, 0.9)
    assert torch.equal(v, -X)
    assert field.report.trace[-1].reused.tolist() == [True, False, True]
    again = field(X, 1.0)  # the clock runs back: all anew
    assert not again[1].isfinite().any()
    field(X, 1.0)  # the same again: what failed is asked again, what did not is not
    assert field.report.trace[-1].duplicate.tolist() == [True, False, True]


def test_a_sample_of_states_that_are_no_numbers_is_evaluated():
    field, x = cached(tolerance=10), X.clone()
    x[1] = math.nan
    for _ in range(2):
        assert torch.equal(field(x, 1.0).isfinite().all(1), torch.tensor([True, False, True]))
    assert field.report.trace[-1].duplicate.tolist() == [True, False, True]


# requirement 8: with epsilon = 0 or n = 0 it is the bare field (every stepper: test_cache_invariants.py)


@pytest.mark.parametrize("nothing", [{"tolerance": 0}, {"max_reuses": 0}])
def test_with_nothing_to_reuse_every_call_is_the_bare_fields(nothing):
    field = cached(Nonlinear(), profile=profile(0.0, 0.0), **nothing)
    for t in TS:
        assert torch.equal(field(t * X, t), Nonlinear()(t * X, t))
    assert (field.report.cache_ratio == 0).all()


# requirement 9: an exact duplicate is free, and counted apart


def test_two_calls_a_step_cost_what_one_does():
    """SiT's SDE sampler asks for the drift and for the score at the same (x, t)."""
    twice, once, x = cached(Nonlinear()), cached(Nonlinear()), X
    for t, t_next in pairwise(TS):
        v = twice(x, t)
        assert torch.equal(twice(x, t), v)
        assert torch.equal(once(x, t), v)
        x = x + (t_next - t) * v
    assert (twice.report.reuses > 0).all()
    assert torch.equal(twice.report.evaluations, once.report.evaluations)
    assert torch.equal(twice.report.reuses, once.report.reuses)
    assert twice.report.duplicates.tolist() == [10, 10, 10]


def test_the_same_state_at_another_time_is_no_duplicate_and_neither_is_another_state_at_the_same_time():
    field = cached(tolerance=0)
    for x, t in ((X, 1.0), (X, 0.9), (X + 1, 0.9), (X, 0.9)):
        assert torch.equal(field(x, t), -x)
    assert field.report.evaluations.tolist() == [4, 4, 4]


def test_a_duplicate_of_some_samples_is_free_for_these():
    field = cached(tolerance=0)
    field(X, 1.0)
    x = torch.cat([X[:1], 2 * X[1:]])
    assert torch.equal(field(x, 1.0), -x)
    assert field.report.trace[-1].duplicate.tolist() == [True, False, False]


def test_duplicates_use_up_no_reuses():
    field = cached(max_reuses=1, tolerance=9)
    for t in (1.0, 0.9, 0.9, 0.9, 0.8):
        field(X, t)
    assert [bool(query.reused[0]) for query in field.report.trace] == [False, True, False, False, False]
    assert field.report.duplicates.tolist() == [2, 2, 2]


# requirement 10: t in every form, in the field's own unit and direction, compared in float64

FORMS = {
    "float": float,
    "0-dim float64": lambda t: torch.tensor(t, dtype=torch.float64),
    "(B,)": lambda t: torch.full((3,), t, dtype=torch.float64),
    "(1,)": lambda t: torch.full((1,), t, dtype=torch.float64),
    "(B, 1)": lambda t: torch.full((3, 1), t, dtype=torch.float64),
    "(B, tokens)": lambda t: torch.full((3, 5), t, dtype=torch.float64),
    "(B, tokens), some clean": lambda t: torch.tensor([[0.0, t, t]] * 3, dtype=torch.float64),
}


def decide(form, ts=TS, scale=1.0, **options):
    field = Paper(decay, **{"profile": profile(), "tolerance": 0.3, **options})
    outputs, x = [], X
    for t, t_next in pairwise(ts.tolist()):
        outputs.append(field(x, form(t)))
        x = x + (t_next - t) / scale * outputs[-1]
    return torch.stack(outputs), torch.stack([query.reused for query in field.report.trace])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_t_decides_alike(form):
    outputs, reused = decide(form)
    expected, decisions = decide(float)
    assert decisions.any()
    assert torch.equal(reused, decisions)
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("form", [lambda t: torch.tensor(int(t)), lambda t: torch.full((3,), int(t)), int])
def test_integer_times_decide_as_the_numbers_that_they_are(form):
    ts = grids.uniform(10, 1000, 0)
    options = {"profile": profile(1.0, 1e-3, ts)}
    outputs, reused = decide(form, ts, 1000, **options)
    expected, decisions = decide(float, ts, 1000, **options)
    assert decisions.any()
    assert torch.equal(reused, decisions)
    assert torch.equal(outputs, expected)


def test_the_unit_and_the_direction_of_time_change_nothing():
    expected, decisions = decide(float)
    for scale, shift in ((1000, 0), (-1, 1), (-1000, 1000)):
        ts = scale * TS + shift
        outputs, reused = decide(float, ts, scale, profile=profile(1.0, 1 / abs(scale), ts))
        assert torch.equal(reused, decisions)
        torch.testing.assert_close(outputs, expected)


def test_tokens_whose_time_stands_still_do_not_hide_those_that_move():
    """The first query of an image-to-video run is at the clean token's time, far outside of what was calibrated."""
    field = cached(profile=profile(0.0, 1.0, grids.uniform(10, 1.0, 0.1)), tolerance=0.25, max_reuses=9)
    for t in (1.0, 0.9, 0.8, 0.7):
        field(X, torch.tensor([[0.0, t]]).expand(3, 2))
    assert [bool(query.reused[0]) for query in field.report.trace] == [False, True, True, False]


def test_samples_at_different_times_decide_each_for_itself():
    field = cached(profile=profile(0.0, 1.0), tolerance=0.25)
    for t in ([1.0, 1.0, 0.9], [0.9, 0.7, 0.8], [0.8, 0.6, 0.6]):
        field(X, torch.tensor(t))
    assert [query.reused.tolist() for query in field.report.trace[1:]] == [[True, False, True], [True, True, False]]


def test_each_sample_is_evaluated_at_its_own_time():
    class Split:
        def __call__(self, x, t):
            return -x * t[:, None]

        def select(self, rows):
            return self

    field, t = cached(Split(), profile=profile(0.0, 1.0), tolerance=0.15), torch.tensor([1.0, 1.0, 0.9])
    field(X, t)
    later = torch.tensor([0.9, 0.6, 0.5])
    expected = -X * torch.tensor([1.0, 0.6, 0.5])[:, None]
    torch.testing.assert_close(field(X, later), expected, rtol=1e-12, atol=0)


def test_times_are_compared_in_float64():
    field = cached(profile=profile(0.0, 1e9), tolerance=1.5)
    for t in (1.0, 1 - 1e-9, 1 - 2e-9):  # one and the same in float32
        field(X, torch.tensor(t, dtype=torch.float64))
    assert field.report.duplicates.tolist() == [0, 0, 0]
    assert [bool(query.reused[0]) for query in field.report.trace] == [False, True, False]


# requirement 11: outside of the calibrated times everything is evaluated (lookups: test_profile.py)


def test_outside_of_the_calibrated_times_everything_is_evaluated():
    field = cached(profile=profile(0.0, 0.0, grids.uniform(5, 0.8, 0.3)), tolerance=math.inf, max_reuses=math.inf)
    for t in TS:
        field(X, t)
    times = [round(query.t[0].item(), 1) for query in field.report.trace if query.reused[0]]
    assert times == [0.7, 0.6, 0.5, 0.4, 0.3]


# requirement 12: static channels and masked tokens can be left out of the norm


def test_masked_elements_do_not_count():
    mask = torch.tensor([0.0, 0, 0, 1, 1, 1])
    field, moving = cached(norm=partial(rms, mask=mask)), cached()
    x = X
    for t in TS:
        field(x, t)
        moving(x[:, 3:], t)
        x = x + torch.tensor([9.0, 9, 9, 0.07, 0.05, 0.01])
    assert field.report.reuses.any()
    for a, b in zip(field.report.trace, moving.report.trace, strict=True):
        torch.testing.assert_close(a.predicted, b.predicted)
        assert torch.equal(a.reused, b.reused)


def test_static_channels_do_not_dilute_a_masked_norm():
    d = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([d, torch.zeros(2, 12, 3, 3)], 1)
    mask = (torch.arange(16) < 4).reshape(16, 1, 1)
    torch.testing.assert_close(rms(padded, mask), rms(d))
    torch.testing.assert_close(rms(padded), rms(d) / 2)


def test_a_sample_with_every_element_masked_is_evaluated():
    mask = torch.tensor([[1.0], [0.0], [1.0]])
    field = cached(norm=partial(rms, mask=mask), tolerance=9)
    field(X, 1.0)
    field(X + 0.01, 0.9)
    assert field.report.trace[-1].reused.tolist() == [True, False, True]


# requirement 13: adaptive and implicit solvers are refused


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_solver_that_chooses_its_own_steps_is_refused(method):
    calls = []
    field = cached(lambda x, t: calls.append(t) or -x)
    with pytest.raises(ValueError, match=f"{method}.*chooses its steps.*bare field.*Euler, Heun, DPMSolverPP"):
        field.integrate(X, TS, TorchDiffEq(method))
    assert not calls


# requirement 19: no random numbers are consumed


def test_no_random_numbers_are_consumed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    cached(linear_flow()).integrate(X, TS)
    assert torch.equal(torch.get_rng_state(), before)


# requirement 21: its own counts


def test_calls_evaluations_reuses_duplicates_and_bypasses_are_counted():
    paid = []
    field = cached(lambda x, t: paid.append(len(x)) or -x)
    for t in (1.0, 0.95, 0.95, 0.4):
        field(X, t)
    with pytest.warns(UserWarning, match="Gradients"):
        field(X.clone().requires_grad_(), 0.3)
    report = field.report
    assert len(report.trace) == 5
    assert report.queries.tolist() == [5, 5, 5]
    assert report.evaluations.tolist() == [len(paid)] * 3 == [3, 3, 3]
    assert report.reuses.tolist() == report.duplicates.tolist() == [1, 1, 1]
    assert (report.bypasses, report.resets) == (1, 0)
    assert report.cache_ratio.tolist() == pytest.approx([0.4] * 3)


def test_rows_that_a_fused_batch_computes_in_vain_are_counted_as_paid():
    field = cached(profile=profile(1.0, 0.0), tolerance=0.5)
    field(X, 1.0)
    field(X + torch.tensor([[0.1], [0.9], [0.1]]), 0.9)
    assert field.report.trace[-1].reused.tolist() == [True, False, True]
    assert field.report.evaluations.tolist() == [2, 2, 2]
    assert field.report.unused.tolist() == [1, 0, 1]
    assert "give the field a `select(rows)`" in str(field.report)


def test_samples_that_decide_together_use_all_that_is_computed():
    """What one of them needs, all of them have, and a sample alone decides as it always does."""
    apart, together = (cached(profile=profile(1.0, 0.0), tolerance=0.5, together=each) for each in (False, True))
    moved = [X, X + torch.tensor([[0.1], [0.9], [0.1]]), X + torch.tensor([[0.2], [1.0], [0.2]])]
    for x, t in zip(moved, (1.0, 0.9, 0.8), strict=True):
        answers = apart(x, t), together(x, t)
        if t == 0.9:
            assert torch.equal(answers[1], -x)
            assert torch.equal(answers[0][1], -x[1])
            assert not torch.equal(answers[0], answers[1])
    assert [query.reused.tolist() for query in together.report.trace] == [[False] * 3] * 2 + [[True] * 3]
    assert together.report.evaluations.tolist() == [2, 2, 2]
    assert not together.report.unused.any()
    alone = [cached(profile=profile(1.0, 0.0), tolerance=0.5, together=each) for each in (False, True)]
    assert torch.equal(*(each.integrate(X[:1], TS) for each in alone))
    assert torch.equal(alone[0].report.evaluations, alone[1].report.evaluations)


def test_what_cannot_be_split_decides_together_where_nothing_was_calibrated():
    """The paper's rule is each sample's own, whatever the field, and what can be split never needs company."""
    whole, split = (lambda x, t: -x), Split()
    for field, given, default in ((whole, {}, True), (split, {}, False), (whole, {"profile": profile()}, False)):
        assert CachedField(field, tolerance=0.1, **given).together is default
        for told in (True, False):
            assert CachedField(field, tolerance=0.1, together=told, **given).together is told
    assert CachedField(whole, criterion=Sensitivities(profile()), tolerance=0.1).together is False


@pytest.mark.parametrize("rough", [False, True])
def test_going_by_own_differences_is_ahead_of_fewer_steps_where_a_field_cannot_be_split(rough):
    """On samples of different speeds, of a field that computes all of them for one; apart they pay more for less."""
    rate = torch.linspace(0.5, 4, 24)[:, None]
    field = lambda x, t: rate * x.sin() + (rough and (3 * rate * t).cos())  # noqa: E731
    x, ts = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), grids.uniform(40)
    full = integrate(field, x, ts)

    def off(end):
        return rms(end - full).median()

    for tolerance in (0.1, 0.05, 0.01):
        default = CachedField(field, tolerance=tolerance)
        near, spent = off(default.integrate(x, ts)), int(default.report.evaluations.max())
        assert spent < 25
        assert not default.report.unused.any()
        assert near < off(integrate(field, x, grids.uniform(spent))) / 2
        apart = CachedField(field, tolerance=tolerance, together=False)
        assert off(apart.integrate(x, ts)) > near
        assert apart.report.evaluations.max() >= spent


def test_only_what_company_would_have_used_is_said_to_be_of_use_in_company():
    """Under Heun a sample at rest asks twice for the same: its row is computed with the others', and not used."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] = 0
    rest = CachedField(lambda x, t: torch.sin(3 * x) * (1 + t), tolerance=0.01)
    rest.integrate(x, grids.uniform(40, 1.0, 0.01), Heun())
    assert rest.report.unused[0] > 0 == rest.report.unused[1:].sum()
    assert "`select(rows)`." in str(rest.report)


def test_conditionings_asked_at_one_time_are_evaluated_at_the_same_times():
    """So that what guidance makes of them has no errors in it that one of them alone has made."""
    rate = {"with": torch.tensor([1.0, 1.5]), "without": torch.tensor([0.7, 1.2])}

    def field(x, t, prompt):
        return (rate[prompt] * x).sin() * (1 + t)

    def guided(call, ts):
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        for t, t_next in pairwise(ts):
            without, given = call(x, t, "without"), call(x, t, "with")
            x = x + (t_next - t) * (without + 5 * (given - without))
        return x

    ts = grids.uniform(40)
    full = guided(field, ts)
    for tolerance in (0.02, 0.01, 0.003):
        cached = CachedField(field, tolerance=tolerance)
        with cached.run(ts):
            end = guided(cached, ts)
        trace, spent = cached.report.trace, int(cached.report.evaluations.max()) // 2
        assert all(torch.equal(one.reused, other.reused) for one, other in zip(trace[::2], trace[1::2], strict=True))
        assert spent < 25
        assert rms(end - full).median() < rms(guided(field, grids.uniform(spent)) - full).median() / 3


def test_a_conditioning_of_which_nothing_is_known_is_evaluated_whatever_was_said_of_another():
    field = CachedField(lambda x, t, c: c * x, tolerance=9.0)
    with field.run(TS):
        for t in TS[:4]:
            field(X, t, 1.0)
        assert field.report.trace[-1].reused.all()
        for t in TS[4:6]:
            field(X, t, 1.0)
            assert torch.equal(field(X, t, 2.0), 2 * X)
            assert [bool(query.reused.all()) for query in field.report.trace[-2:]] == [True, False]


def test_a_report_says_what_happened_in_words():
    field = cached()
    assert str(field.report) == "no queries yet"
    field.integrate(X, TS)
    text = str(field.report)
    assert all(name in text for name in ("queries", "evaluations", "reuses", "duplicates", "cache ratio"))


def test_a_cached_gaussian_flow_ends_near_its_exact_solution():
    """The whole of it once, against a closed form: a third fewer evaluations, and the error of Euler's method."""
    path_flow, ts = GaussianFlow(Linear()), grids.uniform(50, 0.95, 0.05)
    alpha_x = torch.stack([path_flow.alpha_x(X[:1], t)[0] for t in ts])
    field = Paper(path_flow, SensitivityProfile(ts, alpha_x, torch.full_like(ts, 0.5)), tolerance=0.1)
    end, exact = field.integrate(X, ts), path_flow.solution(X, 0.95, 0.05)
    assert (field.report.cache_ratio > 0.3).all()
    assert (rms(end - exact) < 0.1).all()
    assert (rms(integrate(path_flow, X, ts) - exact) < 0.05).all()
