"""A correction leaves the state that would have been, had the reused outputs been interpolated between evaluations.

The oracle replays: every output that a run used is written down, those of closed gaps are replaced by the polynomial
through the evaluations around them, and the bare stepper is fed the list.
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sencache import CachedField, SensitivityProfile, rms
from sencache.correct import Notes, Repaying
from sencache.reuse import REUSES, VARIABLES
from sencache.run import Rule, Run
from solvers import (
    VP,
    BrownianPath,
    Cosine,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    TorchDiffEq,
    WhiteNoise,
    grids,
    integrate,
)
from tests.flows import GaussianFlow, Nonlinear, linear_flow

K = 12
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
S = {"t": lambda t: t, "log t": math.log, "log(1 - t)": lambda t: math.log(1 - t)}
PATTERN = [1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0]
LINEAR_METHODS = {
    "Euler": lambda path, ts: Euler(),
    "DDIM": lambda path, ts: DPMSolverPP(path, order=1),
    "DPM-Solver++ 2M": lambda path, ts: DPMSolverPP(path, order=2),
    "Euler-Maruyama": lambda path, ts: EulerMaruyama(path, BrownianPath(X, ts, torch.Generator().manual_seed(2))),
}
MULTISTAGE = {"Heun": Heun(), "midpoint": TorchDiffEq("midpoint"), "rk4": TorchDiffEq("rk4")}
PATHS = {f"{path.__name__}, data at {end:g}": path(data_at=end) for path in (Linear, Cosine, VP) for end in (0.0, 1.0)}


class Pattern:
    """A criterion that evaluates where it is told to: (Q,) or (Q, B), by query."""

    direction = 0

    def __init__(self, evaluated):
        self.evaluated = iter(torch.as_tensor(evaluated).bool())

    def predicted(self, seen):
        return torch.zeros_like(seen.t).masked_fill(next(self.evaluated), math.inf)


class Recorded:
    """A field that writes down every query of it, and copies of what it returned."""

    def __init__(self, field):
        self.field, self.asked, self.returned = field, [], []

    def __call__(self, x, t):
        v = self.field(x, t)
        self.asked.append((x.clone(), float(t)))
        self.returned.append(v.clone())
        return v


def to_data(path, steps=K):
    """A grid from the noise to the data, with finite log-SNR, uneven."""
    u = torch.linspace(0.97, 0.18, steps + 1, dtype=torch.float64) ** 1.5
    return u if path.data_at == 0 else 1 - u


def corrected(field, pattern, x, ts, stepper, reuse="linear", variable="t", evaluated=None):
    """The end of a corrected run with forced evaluations, its recorded field, and each query's (time, answer).

    evaluated: a list that is given what each query came to, for a duplicate is not evaluated, whatever the pattern.
    """
    recorded, answers = Recorded(field), []
    rule = Rule(Pattern(pattern), lambda t: 1.0, math.inf, REUSES[reuse], VARIABLES[variable], rms)
    run = Run(recorded, rule, None)
    run.ledger = notes = Notes()

    def seen(x, t):
        v = run(x, t)
        answers.append((float(t), v.clone()))
        return v

    end = integrate(seen, x, ts, Repaying(stepper, notes))
    if evaluated is not None:
        evaluated += [~(query.reused | query.duplicate) for query in run.report.trace]
    return end, recorded, answers


def repaid(answers, pattern, s, upto=None):
    """What the run would have used (Q, ...), of one sample: reused answers before its last evaluation interpolated.

    Newton's form through the evaluations around and the one before; those at one time count as none before.
    upto: only evaluations before this query are known.
    """
    upto = len(answers) if upto is None else upto
    outputs = [v for _, v in answers[:upto]]
    nodes = [q for q in range(upto) if pattern[q]]
    for i, (r, k) in enumerate(pairwise(nodes)):
        slope = (outputs[k] - outputs[r]) / (s[k] - s[r]) if s[k] != s[r] else 0 * outputs[k]
        bend = 0 * slope
        if i and s[nodes[i - 1]] != s[r]:
            two = nodes[i - 1]
            bend = (slope - (outputs[r] - outputs[two]) / (s[r] - s[two])) / (s[k] - s[two])
        for j in range(r + 1, k):
            outputs[j] = outputs[r] + (s[j] - s[r]) * (slope + (s[j] - s[k]) * bend)
    return outputs


def replayed(outputs, x, ts, stepper):
    """The bare stepper on a list of outputs, one a query."""
    given = iter(outputs)
    return integrate(lambda x, t: next(given), x, ts, stepper)


def per_sample(answers, patterns, s):
    """`repaid` of every sample by its own pattern: patterns (Q, B)."""
    rows = [
        repaid([(t, v[b : b + 1]) for t, v in answers], patterns[:, b].tolist(), s) for b in range(patterns.shape[1])
    ]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=atol, atol=atol)


# the oracle: the state that interpolated outputs would have left


@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reuse", REUSES)
def test_the_state_is_that_of_interpolated_outputs(method, path, reuse):
    path = PATHS[path]
    ts = to_data(path)
    stepper = LINEAR_METHODS[method](path, ts)
    end, _, answers = corrected(GaussianFlow(path), PATTERN, X, ts, stepper, reuse)
    close(end, replayed(repaid(answers, PATTERN, ts.tolist()), X, ts, stepper))
    assert (end - replayed([v for _, v in answers], X, ts, stepper)).abs().max() > 1e-6  # and something was owed


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=K - 1, max_size=K - 1),
    st.sampled_from(list(LINEAR_METHODS)),
    st.sampled_from(list(REUSES)),
    st.sampled_from(list(VARIABLES)),
    st.sampled_from([0.0, 1.0]),
)
def test_whatever_the_pattern_and_the_variable(rest, method, reuse, variable, data_at):
    path, pattern = Linear(data_at=data_at), [True, *rest]
    ts = to_data(path)
    stepper, s = LINEAR_METHODS[method](path, ts), [S[variable](t) for t in ts.tolist()]
    end, _, answers = corrected(Nonlinear(), pattern, X, ts, stepper, reuse, variable)
    close(end, replayed(repaid(answers, pattern, s), X, ts, stepper))


@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_every_evaluation_is_made_where_the_repaid_state_is(method):
    """The state is repaid in the step that closes a gap, not at the end; what is still open is not."""
    path = Cosine()
    ts = to_data(path)
    stepper = LINEAR_METHODS[method](path, ts)
    _, recorded, answers = corrected(Nonlinear(), PATTERN, X, ts, stepper)
    at = [k for k in range(K) if PATTERN[k]]
    assert [t for _, t in recorded.asked] == ts[at].tolist()
    for k, (x, _) in list(zip(at, recorded.asked, strict=True))[1:]:
        known = repaid(answers, PATTERN, ts.tolist(), upto=k)
        close(x, replayed(known, X, ts[: k + 1], stepper))


@settings(max_examples=25)
@given(st.data())
def test_every_sample_is_repaid_by_its_own_gap(data):
    rows = [[True, *data.draw(st.lists(st.booleans(), min_size=K - 1, max_size=K - 1))] for _ in X]
    patterns, path = torch.tensor(rows).T, Linear()
    ts = to_data(path)
    stepper = LINEAR_METHODS[data.draw(st.sampled_from(list(LINEAR_METHODS)))](path, ts)
    end, _, answers = corrected(Nonlinear(), patterns, X, ts, stepper)
    close(end, replayed(per_sample(answers, patterns, ts.tolist()), X, ts, stepper))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_samples_that_go_by_their_own_outputs_are_repaid_too(split, order):
    """The public way in, without a profile: faster samples evaluate more often, and each is owed its own."""
    speed = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)[:, None]

    class Field:
        def __init__(self, speed):
            self.speed = speed

        def __call__(self, x, t):
            return Nonlinear()(self.speed * x, t)

    if split:
        Field.select = lambda self, rows: Field(self.speed[rows])
    ts, answers = to_data(Linear(), 30), []
    stepper, cached = DPMSolverPP(Linear(), order), CachedField(Field(speed), tolerance=0.01, together=False)
    with cached._scope(ts, stepper) as run:
        run.ledger = notes = Notes()

        def seen(x, t):
            answers.append((float(t), run(x, t).clone()))
            return answers[-1][1].clone()

        end = integrate(seen, X, ts, Repaying(stepper, notes))
    patterns = torch.stack([~query.reused for query in cached.report.trace])
    assert len(set(patterns.sum(0).tolist())) == 3  # no two samples alike
    close(end, replayed(per_sample(answers, patterns, ts.tolist()), X, ts, stepper))
    close(end, cached.integrate(X, ts, stepper), 1e-15)


@pytest.mark.parametrize("method", MULTISTAGE)
@settings(max_examples=30)
@given(rest=st.lists(st.booleans(), min_size=19, max_size=19))
def test_methods_of_several_stages_are_repaid_query_by_query(method, rest):
    """All stages of a step are outputs like others; a stage may be reused while another of the same step is not."""
    staged([True, *rest], MULTISTAGE[method], 5)


def staged(pattern, stepper, steps):
    """Check a method of several stages, forced to evaluate query by query, against the replay."""
    ts, evaluated = to_data(Linear(), steps), []
    end, _, answers = corrected(Nonlinear(), pattern, X, ts, stepper, evaluated=evaluated)
    evaluated = torch.stack(evaluated)  # (Q, B): rounding decides of each sample whether it stands where it stood
    close(end, replayed(per_sample(answers, evaluated, [t for t, _ in answers]), X, ts, stepper))
    return evaluated.all(1).tolist()


def test_a_duplicate_of_a_reused_output_is_repaid_too():
    """Where both stages of a Heun step return one output, the next step begins where its second stage stood."""
    assert staged([1, 0, 0, 0, 0, 1], Heun(), 3) == [True, False, False, False, False, True]


def test_two_evaluations_at_one_time_leave_the_next_gap_its_line():
    """Heun evaluates the end of a step and the beginning of the next at one time: they span no line of their own."""
    assert staged([1, 1, 1, 0, 0, 1], Heun(), 3) == [True, True, True, False, False, True]


def test_two_gaps_that_close_in_one_step_are_repaid_each():
    """Of rk4's four stages."""
    assert staged([1, 1, 0, 1, 0, 1, 0, 1], MULTISTAGE["rk4"], 2) == [True, True, False, True, False, True, False, True]


# what follows from it


@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("rising", [False, True])
def test_outputs_quadratic_in_t_are_integrated_as_if_never_reused(method, reuse, rising):
    a, b, c = torch.randn(3, *X.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def parabola(x, t):
        return a + b * t + c * t**2

    path = Linear(data_at=float(rising))
    ts = to_data(path)
    stepper = LINEAR_METHODS[method](path, ts)
    pattern = [1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]  # the first gap is empty, and the last query evaluated
    end, _, _ = corrected(parabola, pattern, X, ts, stepper, reuse)
    close(end, integrate(parabola, X, ts, stepper), 1e-12)


def test_the_first_gap_is_repaid_by_its_line():
    """Nothing was evaluated before: outputs affine in t are exact, a parabola is not."""
    ts, pattern = to_data(Linear()), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    for power, exact in ((1, True), (2, False)):
        end, _, _ = corrected(lambda x, t, power=power: X * t**power, pattern, X, ts, Euler(), "hold")
        full = integrate(lambda x, t, power=power: X * t**power, X, ts)
        assert bool((end - full).abs().max() < 1e-12) == exact


def test_what_is_open_at_the_end_stays_owed():
    ts, pattern = to_data(Linear()), [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    end, _, answers = corrected(Nonlinear(), pattern, X, ts, Euler())
    assert torch.equal(end, replayed([v for _, v in answers], X, ts, Euler()))


EVERY = {**{name: make(Linear(), to_data(Linear())) for name, make in LINEAR_METHODS.items()}, **MULTISTAGE}


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_without_reuses_is_the_bare_one_to_the_bit(method, dtype):
    ts, x, stepper = to_data(Linear()), X.to(dtype), EVERY[method]
    if method == "Euler-Maruyama":
        stepper = replace(stepper, noise=BrownianPath(x, ts, torch.Generator().manual_seed(2)))
    cached = CachedField(Nonlinear(), tolerance=0.0, correct=True)
    assert torch.equal(cached.integrate(x, ts, stepper), integrate(Nonlinear(), x, ts, stepper))
    assert not cached.report.reuses.any()


@pytest.mark.parametrize("method", EVERY)
def test_a_correction_evaluates_nothing(method):
    counts = {}
    for correct in (True, False):
        recorded, ts = Recorded(linear_flow()), to_data(Linear())
        wanted = {t: 0.0 if one else math.inf for t, one in zip(ts.tolist(), [*PATTERN, 0], strict=True)}
        cached = CachedField(recorded, tolerance=lambda t, wanted=wanted: wanted.get(t, math.inf), correct=correct)
        cached.integrate(X, ts, EVERY[method])
        counts[correct] = [t for _, t in recorded.asked]
        assert cached.report.evaluations.tolist() == [len(recorded.asked)] * 3
    assert counts[True] == counts[False]


def test_a_correction_draws_no_noise():
    states = []
    for tolerance in (0.0, 0.1):
        generator = torch.Generator().manual_seed(5)
        before = torch.get_rng_state()
        cached = CachedField(Nonlinear(), tolerance=tolerance)
        cached.integrate(X, to_data(Linear()), EulerMaruyama(Linear(), WhiteNoise(generator)))
        states.append(generator.get_state())
        assert torch.equal(torch.get_rng_state(), before)
    assert (cached.report.reuses > 0).all()
    assert torch.equal(*states)


@pytest.mark.parametrize("method", ["Euler", "DPM-Solver++ 2M", "Heun"])
def test_what_is_held_does_not_grow_with_the_steps(method):
    ts, counted = to_data(Linear(), 80), {}
    x = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0))  # shapes of no other test
    patient = {t: 0.0 if k % 5 in (0, 1) else math.inf for k, t in enumerate(ts.tolist())}

    def field(x, t):
        k = ts.tolist().index(float(t))
        if k in (10, 75):
            gc.collect()
            counted[k] = sum(
                type(o) is torch.Tensor and o.shape in {(5, 7, 11), (5, 6), (5, 3)} for o in gc.get_objects()
            )
        return -x * t

    CachedField(field, tolerance=patient.__getitem__).integrate(x, ts, EVERY[method])
    assert counted[10] == counted[75]


# where only calls are seen


@pytest.mark.parametrize("method", ["Euler", "DDIM", "Euler-Maruyama"])
@pytest.mark.parametrize("reuse", REUSES)
def test_a_loop_of_bare_calls_ends_where_integrate_does(method, reuse):
    """A method of one output a step: what is owed to the state is handed out with the evaluation."""
    path = Linear()
    ts = to_data(path)
    stepper, wanted = LINEAR_METHODS[method](path, ts), dict(zip(ts.tolist(), PATTERN, strict=False))
    cached = CachedField(Nonlinear(), tolerance=lambda t: 0.0 if wanted[t] else math.inf, reuse=reuse, correct=True)
    end = cached.integrate(X, ts, stepper)
    with cached.run(ts, stepper):
        close(integrate(cached, X, ts, stepper), end, 1e-12)
    assert cached.report.evaluations.tolist() == [sum(PATTERN)] * 3


def test_a_duplicate_of_an_evaluation_is_answered_alike():
    """Samplers that ask twice a step get one answer, with what was owed, and owe nothing more for it."""
    ts, wanted = to_data(Linear()), dict(zip(to_data(Linear()).tolist(), PATTERN, strict=False))
    ends = []
    for asks in (1, 2):
        cached, x = CachedField(Nonlinear(), tolerance=lambda t: 0.0 if wanted[t] else math.inf), X
        with cached.run(ts):
            for t, t_next in pairwise(ts):
                answers = [cached(x, t) for _ in range(asks)]
                assert torch.equal(answers[0], answers[-1])
                x = x + (t_next - t) * answers[-1]
        ends.append(x)
    assert torch.equal(*ends)


# precision


@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [torch.float64, torch.float32])
def test_low_precision_is_repaid_to_its_own_rounding(method, dtype, grid):
    path = Linear()
    ts = to_data(path, 40)
    pattern = [k % 4 in (0, 1) for k in range(40)]

    noise = BrownianPath(X, ts, torch.Generator().manual_seed(2))

    def end(x, ts):
        stepper = LINEAR_METHODS[method](path, ts)
        if method == "Euler-Maruyama":
            stepper = replace(stepper, noise=lambda x, t, t_next: noise(X, t, t_next).to(x))
        return corrected(GaussianFlow(path), pattern, x, ts, stepper)[0]

    low = end(X.to(dtype), ts.to(grid))
    assert low.dtype == dtype
    assert (low.double() - end(X, ts)).abs().max() < 40 * torch.finfo(dtype).eps  # one rounding a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_that_hardly_change_owe_hardly_anything(dtype):
    """The weights of what is owed sum to nothing: an output of 1000 that stays is not rounded into a debt."""
    ts, large = to_data(Linear(), 40), torch.full((2, 6), 1000.0, dtype=dtype)
    pattern = [k % 8 in (0, 1) for k in range(40)]
    zero = torch.zeros_like(large)
    end = corrected(lambda x, t: large, pattern, zero, ts, Euler(), "hold")[0]
    plain = integrate(lambda x, t: large, zero, ts)
    torch.testing.assert_close(end, plain, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("grid", [torch.float64, torch.float32])
def test_a_profile_s_rule_repays_from_the_first_gap_on(grid):
    ts = grids.uniform(10).to(grid)
    profile = SensitivityProfile(ts, torch.zeros(11), torch.zeros(11))
    cached = CachedField(lambda x, t: X * t, profile, tolerance=1.0, max_reuses=8, reuse="hold", correct=True)
    end = cached.integrate(X, ts)
    assert cached.report.evaluations.tolist() == [2, 2, 2]
    close(end, integrate(lambda x, t: X * t, X, ts), 1e-6 if grid == torch.float32 else 1e-12)


@pytest.mark.gpu
def test_states_and_grids_on_a_device_are_repaid():
    ts = to_data(Linear())
    end = CachedField(Nonlinear(), tolerance=0.05).integrate(X, ts, DPMSolverPP(Linear()))
    there = CachedField(Nonlinear(), tolerance=0.05).integrate(X.cuda(), ts.cuda(), DPMSolverPP(Linear()))
    close(there.cpu(), end, 1e-9)
