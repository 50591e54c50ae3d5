"""Reuse of a block stack under a fresh head: what is handed out, what is counted, and what a correction repays.

The oracle replays as in `test_correct`: every answer of a run is written down, those of closed gaps are replaced by the
polynomial through the true velocities around them, and the bare stepper is fed the list.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sencache import CachedField, SensitivityProfile, calibrate, rms
from sencache.correct import Notes, Repaying
from sencache.reuse import REUSES, VARIABLES
from sencache.run import Rule, Run
from solvers import Cosine, DPMSolverPP, Euler, Heun, Linear, TorchDiffEq, UniPC, integrate
from tests.flows import Nonlinear
from tests.test_correct import LINEAR_METHODS, PATTERN, K, Pattern, S, X, close, per_sample, repaid, replayed, to_data

METHODS = {**LINEAR_METHODS, "UniPC": lambda path, ts: UniPC(path), "UniPC-1": lambda path, ts: UniPC(path, 1)}
STAGED = {"Heun": Heun(), "midpoint": TorchDiffEq("midpoint"), "rk4": TorchDiffEq("rk4")}


class Stacked:
    """A nonlinear field of two tokens' worth of blocks under a head that is nonlinear too, and looks at x and t."""

    def __init__(self, speed=1.0):
        self.speed, self.stacks, self.heads = speed, [], []

    def stack(self, x, t):
        self.stacks.append(float(t))
        return {"tokens": Nonlinear()(self.speed * x, t), "text": [torch.sin(x).sum(1)]}

    def head(self, x, t, stack):
        self.heads.append(float(t))
        return torch.tanh(stack["tokens"]) * (1 + t) - 0.3 * x + 0.1 * stack["text"][0][:, None] ** 2

    def __call__(self, x, t):
        return self.head(x, t, self.stack(x, t))


def blocks_run(field, pattern, x, ts, stepper, reuse="linear", variable="t"):
    """The end of a corrected run, each query's (time, answer) and which it evaluated (Q, B)."""
    run = Run(
        field, Rule(Pattern(pattern), lambda t: 1.0, math.inf, REUSES[reuse], VARIABLES[variable], rms, "blocks"), None
    )
    run.ledger, answers = Notes(), []

    def seen(x, t):
        v = run(x, t)
        answers.append((float(t), v.clone()))
        return v

    end = integrate(seen, x, ts, Repaying(stepper, run.ledger))
    return end, answers, torch.stack([~(query.reused | query.duplicate) for query in run.report.trace])


# what is handed out


@pytest.mark.parametrize("reuse", REUSES)
def test_a_reuse_is_the_fresh_head_on_the_continued_stack(reuse):
    field, ts = Stacked(), to_data(Linear())
    wanted = dict(zip(ts.tolist(), [1, 1, 0, 0], strict=False))
    cached = CachedField(
        field, tolerance=lambda t: 0.0 if wanted[t] else math.inf, reuse=reuse, correct=False, payload="blocks"
    )
    states = [X + k * torch.cos(X) for k in range(4)]
    with cached.run():
        answers = [cached(x, t) for x, t in zip(states, ts, strict=False)]
    one, two = (field.stack(x, t) for x, t in zip(states[:2], ts, strict=False))
    for k in (2, 3):
        share = (ts[k] - ts[1]) / (ts[1] - ts[0]) if reuse == "linear" else 0.0
        tokens = two["tokens"] + share * (two["tokens"] - one["tokens"])
        text = two["text"][0] + share * (two["text"][0] - one["text"][0])
        close(answers[k], field.head(states[k], ts[k], {"tokens": tokens, "text": [text]}), 1e-12)
        assert (answers[k] - answers[k - 1]).abs().max() > 1e-3  # the state moved, and the head saw it


def test_an_evaluation_runs_the_stack_once_and_a_reuse_not_at_all():
    field, ts = Stacked(), to_data(Linear())
    wanted = dict(zip(ts.tolist(), [*PATTERN, 0], strict=True))
    cached = CachedField(field, tolerance=lambda t: 0.0 if wanted[t] else math.inf, payload="blocks")
    cached.integrate(X, ts)
    assert field.stacks == [t for t, one in wanted.items() if one]
    assert field.heads == ts[:-1].tolist()
    assert cached.report.evaluations.tolist() == [sum(PATTERN)] * 3


@pytest.mark.parametrize("method", [*METHODS, *STAGED])
def test_without_reuses_it_is_the_bare_field_to_the_bit(method):
    ts = to_data(Linear())
    stepper = STAGED.get(method) or METHODS[method](Linear(), ts)
    for options in ({"tolerance": 0.0}, {"tolerance": 1.0, "max_reuses": 0}):
        end = CachedField(Stacked(), payload="blocks", **options).integrate(X, ts, stepper)
        assert torch.equal(end, integrate(Stacked(), X, ts, stepper))


def test_a_head_that_ignores_x_and_is_linear_makes_it_output_reuse():
    class Plain(Stacked):
        def stack(self, x, t):
            return Nonlinear()(x, t)

        def head(self, x, t, stack):
            return 2 * stack

    ts = to_data(Linear(), 30)
    wanted = dict(zip(ts.tolist(), [*PATTERN * 2, *PATTERN][:31], strict=True))
    ends = [
        CachedField(Plain(), tolerance=lambda t: 0.0 if wanted[t] else math.inf, payload=payload).integrate(
            X, ts, stepper
        )
        for stepper in (DPMSolverPP(Linear()), UniPC(Linear()))
        for payload in ("output", "blocks")
    ]
    close(ends[0], ends[1])
    close(ends[2], ends[3])


def test_samples_are_evaluated_alone_and_do_not_feel_their_batch():
    class Split(Stacked):
        def __init__(self, speed):
            super().__init__(speed)

        def select(self, rows):
            return Split(self.speed[rows])

    speed, ts = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)[:, None], to_data(Linear(), 30)
    for stepper in (Euler(), DPMSolverPP(Linear())):
        cached = CachedField(Split(speed), tolerance=0.01, payload="blocks")
        end = cached.integrate(X, ts, stepper)
        assert len(set(cached.report.evaluations.tolist())) == 3
        assert not cached.report.unused.any()
        for b in range(3):
            alone = CachedField(Split(speed[[b]]), tolerance=0.01, payload="blocks")
            close(alone.integrate(X[[b]], ts, stepper), end[[b]], 1e-12)


def test_a_plan_is_kept_in_its_budget():
    ts, field = to_data(Linear(), 24), Stacked()
    profile = calibrate(field, X, ts, progress=False)
    cached = CachedField(field, profile, nfe=9, payload="blocks")
    cached.integrate(X, ts)
    assert cached.report.evaluations.tolist() == [9, 9, 9]


# what a correction repays


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=K - 1, max_size=K - 1),
    st.sampled_from(list(METHODS)),
    st.sampled_from(list(REUSES)),
    st.sampled_from(list(VARIABLES)),
    st.sampled_from([0.0, 1.0]),
)
def test_the_state_is_that_of_interpolated_velocities(rest, method, reuse, variable, data_at):
    path, pattern = Linear(data_at=data_at), [True, *rest]
    ts = to_data(path)
    stepper, s = METHODS[method](path, ts), [S[variable](t) for t in ts.tolist()]
    end, answers, _ = blocks_run(Stacked(), pattern, X, ts, stepper, reuse, variable)
    close(end, replayed(repaid(answers, pattern, s), X, ts, stepper))


@pytest.mark.parametrize("method", METHODS)
def test_something_was_owed(method):
    """A guard on the test above: without the correction the end is another."""
    path = Cosine()
    ts = to_data(path)
    stepper = METHODS[method](path, ts)
    end, answers, _ = blocks_run(Stacked(), PATTERN, X, ts, stepper)
    close(end, replayed(repaid(answers, PATTERN, ts.tolist()), X, ts, stepper))
    assert (end - replayed([v for _, v in answers], X, ts, stepper)).abs().max() > 1e-5


@pytest.mark.parametrize("method", STAGED)
@settings(max_examples=12)
@given(rest=st.lists(st.booleans(), min_size=19, max_size=19))
def test_every_stage_of_a_step_is_repaid(method, rest):
    """Where two queries stand at one time in two states, the head gives two answers, and both are repaid."""
    ts = to_data(Linear(), 5)
    end, answers, evaluated = blocks_run(Stacked(), [True, *rest], X, ts, STAGED[method])
    s = [t for t, _ in answers]
    close(end, replayed(per_sample(answers, evaluated, s), X, ts, STAGED[method]))


@settings(max_examples=15)
@given(st.data())
def test_every_sample_is_repaid_by_its_own_gap(data):
    rows = [[True, *data.draw(st.lists(st.booleans(), min_size=K - 1, max_size=K - 1))] for _ in X]
    patterns, path = torch.tensor(rows).T, Linear()
    ts = to_data(path)
    stepper = METHODS[data.draw(st.sampled_from(list(METHODS)))](path, ts)
    end, answers, _ = blocks_run(Stacked(), patterns, X, ts, stepper)
    close(end, replayed(per_sample(answers, patterns, ts.tolist()), X, ts, stepper))


@pytest.mark.parametrize("method", ["Euler", "DDIM", "Euler-Maruyama"])
@pytest.mark.parametrize("reuse", REUSES)
def test_a_loop_of_bare_calls_ends_where_integrate_does(method, reuse):
    path = Linear()
    ts = to_data(path)
    stepper, wanted = METHODS[method](path, ts), dict(zip(ts.tolist(), PATTERN, strict=False))
    cached = CachedField(
        Stacked(), tolerance=lambda t: 0.0 if wanted[t] else math.inf, reuse=reuse, correct=True, payload="blocks"
    )
    end = cached.integrate(X, ts, stepper)
    assert (end - integrate(Stacked(), X, ts, stepper)).abs().max() > 1e-5
    with cached.run(ts, stepper):
        close(integrate(cached, X, ts, stepper), end, 1e-12)
    with cached.run(ts, stepper):  # asked twice a step, owed once
        close(integrate(lambda x, t: (cached(x, t), cached(x, t))[1], X, ts, stepper), end, 1e-12)


@pytest.mark.parametrize("method", ["Euler", "UniPC"])
@pytest.mark.parametrize("shape", [(3, 2, 1, 3), (3, 6), (18,)], ids=str)
def test_states_of_any_shape_are_repaid(method, shape):
    class Shaped(Stacked):
        def head(self, x, t, stack):
            return torch.tanh(stack) * (1 + t) - 0.3 * x

        def stack(self, x, t):
            return torch.sin(3 * x) * t

    ts = to_data(Linear())
    stepper = METHODS[method](Linear(), ts)
    ends = [blocks_run(Shaped(), PATTERN, X.reshape(one), ts, stepper)[0] for one in (shape, (3, 6))]
    close(ends[0].flatten(), ends[1].flatten())


def test_states_in_several_parts_are_repaid_in_a_loop_of_bare_calls():
    class Parts(Stacked):
        def stack(self, x, t):
            return [torch.sin(3 * part) * t for part in x]

        def head(self, x, t, stack):
            return [torch.tanh(one) * (1 + t) - 0.3 * part for one, part in zip(stack, x, strict=True)]

    class Whole(Stacked):
        def stack(self, x, t):
            return torch.sin(3 * x) * t

        def head(self, x, t, stack):
            return torch.tanh(stack) * (1 + t) - 0.3 * x

    ts, wanted = to_data(Linear()), dict(zip(to_data(Linear()).tolist(), PATTERN, strict=False))
    how = {"tolerance": lambda t: 0.0 if wanted[t] else math.inf, "payload": "blocks"}
    parts, whole = CachedField(Parts(), **how), CachedField(Whole(), **how)
    x = [X[:, :2], X[:, 2:]]
    with parts.run(ts) as run:
        for t, t_next in pairwise(ts):
            x = [part + (t_next - t) * v for part, v in zip(x, run(x, t), strict=True)]
    close(torch.cat(x, 1), whole.integrate(X, ts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_repaid_to_its_own_rounding(dtype):
    ts, pattern = to_data(Linear(), 40), [k % 4 in (0, 1) for k in range(40)]
    end = blocks_run(Stacked(), pattern, X, ts, DPMSolverPP(Linear()))[0]
    low = blocks_run(Stacked(), pattern, X.to(dtype), ts, DPMSolverPP(Linear()))[0]
    assert low.dtype == dtype
    assert (low.double() - end).abs().max() < 80 * torch.finfo(dtype).eps


def test_gradients_pass_through_and_nothing_is_kept():
    x, cached = X.clone().requires_grad_(), CachedField(Stacked(), tolerance=1.0, payload="blocks")
    with pytest.warns(UserWarning, match="Gradients"):
        end = cached.integrate(x, to_data(Linear()))
    torch.testing.assert_close(
        torch.autograd.grad(end.sum(), x), torch.autograd.grad(integrate(Stacked(), x, to_data(Linear())).sum(), x)
    )
    assert not cached.report.reuses.any()


# what is said


class NoHead:
    def __call__(self, x, t):
        return x

    def stack(self, x, t):
        return x


ERRORS = {
    "no stack": (lambda: CachedField(lambda x, t: x, tolerance=1.0, payload="blocks"), "no stack and no head"),
    "no head": (lambda: CachedField(NoHead(), tolerance=1.0, payload="blocks"), "NoHead has no head. The adapters"),
    "what": (
        lambda: CachedField(Stacked(), tolerance=1.0, payload="tokens"),
        "output, blocks or difference; got 'tokens'",
    ),
}


@pytest.mark.parametrize(("wrong", "words"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


# what is not a number


@pytest.mark.parametrize("failing", [1, 4, 6])
@pytest.mark.parametrize("payload", ["output", "blocks"])
def test_an_output_that_is_not_finite_is_repaid_from_and_into_nothing(payload, failing):
    """In a loop of bare calls, of one sample, while another one is repaid: later answers are finite again."""
    ts, wanted = to_data(Linear()), dict(zip(to_data(Linear()).tolist(), PATTERN, strict=False))
    bad = float(ts[failing])

    class Failing(Stacked):
        def head(self, x, t, stack):
            v = super().head(x, t, stack)
            return torch.where((torch.arange(3) == 1)[:, None] & (float(t) == bad), torch.nan, v)

    profile = SensitivityProfile(ts, torch.zeros(K + 1), torch.zeros(K + 1))
    how = {"max_reuses": math.inf, "reuse": "hold", "correct": True, "payload": payload}
    cached = CachedField(Failing(), profile, tolerance=lambda t: 0.0 if wanted[t] else math.inf, **how)
    with cached.run(ts):
        answers = [cached(X, t) for t in ts[:-1]]
    for k, answer in enumerate(answers):
        assert answer[[0, 2]].isfinite().all()
        assert answer[1].isfinite().all() == (k != failing)
