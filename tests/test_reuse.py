"""What a reuse returns: the last evaluation, or the line through the last two, in s(t), guarded."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sencache import CachedField, SensitivityProfile, rms
from sencache.reuse import REACH, REUSES, VARIABLES, hold, linear
from sencache.run import Rule, Run
from solvers import grids, integrate
from tests.flows import Nonlinear

TS = grids.uniform(10, 0.95, 0.05)
S = {"t": np.asarray, "log t": np.log, "log(1 - t)": lambda t: np.log(1 - np.asarray(t))}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A, B = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PATTERN = [1, 1, 0, 0, 1, 0, 1, 0, 0, 0]
times = st.floats(-5, 5)


class Pattern:
    """A criterion that evaluates where it is told to: (K,) or (K, B), by query."""

    direction = 0

    def __init__(self, evaluated):
        self.evaluated = iter(torch.as_tensor(evaluated).bool())

    def predicted(self, seen):
        return torch.zeros_like(seen.t).masked_fill(next(self.evaluated), math.inf)


def run(field, pattern, reuse="linear", variable="t"):
    rule = Rule(Pattern(pattern), lambda t: 1.0, math.inf, REUSES[reuse], VARIABLES[variable], rms)
    return Run(field, rule, None)


def column(*values):
    return np.array(values)


def used(outputs, s, pattern, reuse):
    """By numpy: what is returned at each query, from the outputs evaluated there (K, ...)."""
    returned, known = [], []
    for k, evaluated in enumerate(pattern):
        if evaluated:
            known.append(k)
        r, b = known[-1], known[-2] if len(known) > 1 else None
        if b is None or reuse == "hold":
            returned.append(outputs[r])
        else:
            slope, ahead = (outputs[r] - outputs[b]) / (s[r] - s[b]), s[k] - s[r]
            returned.append(outputs[r] + slope * np.sign(ahead) * min(abs(ahead), REACH * abs(s[r] - s[b])))
    return np.stack(returned)


# hold


@given(times, times, times)
def test_holding_adds_nothing(s, r, b):
    assert hold(column(s), column(r), column(b)).item() == 0


def test_what_is_held_is_the_evaluation_to_the_bit():
    field = run(Nonlinear(), PATTERN, "hold")
    returned = [field(t * X, t) for t in TS[:-1]]
    for k, j in enumerate([0, 1, 1, 1, 4, 4, 6, 6, 6, 6]):
        assert torch.equal(returned[k], Nonlinear()(TS[j] * X, TS[j]))


# the line


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("rising", [False, True])
def test_outputs_affine_in_s_are_continued_exactly(variable, rising):
    def field(x, t):
        return A + B * float(S[variable](float(t)))

    ts = TS.flip(0) if rising else TS
    cached = run(field, [1, 1, 0, 0, 1, 0, 0, 1, 0, 1], "linear", variable)
    for t in ts[:-1]:
        torch.testing.assert_close(cached(X, t), field(X, t), rtol=1e-12, atol=1e-12)
    assert cached.report.evaluations.tolist() == [5, 5, 5]


@given(st.floats(0.1, 0.9), st.floats(0.05, 0.9), st.floats(0.0, 3.9))
def test_phi_is_the_slope_s_share_of_the_span(r, span, ahead):
    """y = s: y_r + phi (y_r - y_2) = s."""
    phi = linear(column(r + ahead * span), column(r), column(r - span))
    assert r + phi.item() * span == pytest.approx(r + ahead * span, abs=1e-12)


# its guard


@given(times, times, times)
def test_a_line_is_continued_no_further_than_its_reach(s, r, b):
    phi = linear(column(s), column(r), column(b))
    assert np.isfinite(phi)
    assert abs(phi) <= REACH


def test_past_its_reach_a_line_stays_where_it_ended():
    ahead = column(5.0, 6.0, 100.0, -100.0)
    assert linear(ahead, column(1.0), column(0.0)).tolist() == [4, 4, 4, -4]


def test_one_evaluation_makes_no_line():
    assert linear(column(2.0), column(1.0), column(math.nan)).item() == 0
    field = run(Nonlinear(), [1, 0, 0, 0])
    first = field(X, TS[0])
    for t in TS[1:4]:
        assert torch.equal(field(X * t, t), first)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_two_evaluations_at_one_time_make_no_line(s):
    assert linear(column(s), column(1.0), column(1.0)).item() == 0


def test_two_states_evaluated_at_one_time_are_held():
    field = run(Nonlinear(), [1, 1, 0])
    field(X, TS[0])
    last = field(X + 1, TS[0])
    assert torch.equal(field(X + 2, TS[1]), last)


def test_the_ends_of_time_have_a_finite_logarithm():
    ends = column(0.0, 1.0)
    for variable in VARIABLES.values():
        assert np.isfinite(variable(ends)).all()


def test_a_trajectory_begun_anew_is_not_continued_from_the_old_one():
    field = run(Nonlinear(), [1, 1, 1, 0])
    for t in (TS[0], TS[1], TS[0]):
        last = field(t * X, t)
    assert torch.equal(field(X, TS[1]), last)


# rows


def test_every_sample_is_continued_from_its_own_evaluations():
    patterns = torch.tensor([PATTERN, [1, 0, 1, 0, 0, 1, 1, 0, 0, 1], [1] * 10]).T  # (K, B)
    together = run(Nonlinear(), patterns)
    returned = torch.stack([together(t * X, t) for t in TS[:-1]])
    for b in range(3):
        alone = run(Nonlinear(), patterns[:, b : b + 1])
        assert torch.equal(returned[:, b : b + 1], torch.stack([alone(t * X[b : b + 1], t) for t in TS[:-1]]))


# a whole run


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.sampled_from(list(REUSES)), st.sampled_from(list(VARIABLES)))
def test_what_a_run_returns_is_computed_from_what_it_evaluated(rest, reuse, variable):
    pattern, outputs, returned, x = [True, *rest], [], [], X
    field = run(lambda x, t: outputs.append(Nonlinear()(x, t).clone()) or outputs[-1].clone(), pattern, reuse, variable)
    for t, t_next in pairwise(TS):
        returned.append(field(x, t))
        x = x + (t_next - t) * returned[-1]
    evaluated = iter(outputs)
    filled = [next(evaluated).numpy() if one else np.full(X.shape, np.nan) for one in pattern]
    expected = used(filled, S[variable](TS[:-1].numpy()), pattern, reuse)
    np.testing.assert_allclose(torch.stack(returned).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reuse", REUSES)
def test_a_cached_field_returns_the_same_when_its_tolerance_says_when(reuse):
    """The public way in: a tolerance of 0 or infinity, two evaluations first."""
    outputs, returned = {}, []

    def field(x, t):
        outputs[float(t)] = Nonlinear()(x, t)
        return outputs[float(t)].clone()

    wanted = {float(t): 0.0 if one else math.inf for t, one in zip(TS[:-1], PATTERN, strict=True)}
    cached = CachedField(field, tolerance=wanted.__getitem__, reuse=reuse, correct=False)

    def seen(x, t):
        returned.append(cached(x, t))
        return returned[-1]

    integrate(seen, X, TS)
    filled = [outputs.get(float(t), torch.full_like(X, math.nan)).numpy() for t in TS[:-1]]
    assert len(outputs) == sum(PATTERN)
    expected = used(filled, TS.numpy(), PATTERN, reuse)
    np.testing.assert_allclose(torch.stack(returned).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_continued_in_its_own_dtype(dtype):
    field, x = run(lambda x, t: (x * float(t)).to(dtype), [1, 1, 0, 0]), X.to(dtype)
    for t in TS[:4]:
        v = field(x, t)
        assert v.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(v.double(), x.double() * float(t), rtol=8 * eps, atol=8 * eps)


def test_an_unknown_reuse_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`reuse` must be one of hold, linear; got 'cubic'"):
        CachedField(Nonlinear(), tolerance=1, reuse="cubic")


def test_a_profile_s_rule_continues_too():
    profile = SensitivityProfile(TS, torch.zeros(11), torch.zeros(11))
    cached = CachedField(lambda x, t: A + B * t, profile, tolerance=1.0, max_reuses=1)
    for t in TS[:-1]:
        v = cached(X, t)
    assert cached.report.evaluations.tolist() == [5, 5, 5]
    torch.testing.assert_close(v, A + B * TS[-2], rtol=1e-12, atol=1e-12)
