"""The baselines are their authors' rules: every one is held against its formula, written out as a plain loop.

The loops are for one sample in NumPy float64 and know nothing of the library.
"""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.metrics import psnr
from benchmarks.shipped import GRID, noise, sit_field
from sencache import CachedField
from sencache.baselines import (
    EasyCache,
    MagCache,
    TeaCache,
    every,
    lemica,
    magnitude_ratios,
    minimax_path,
    segment_errors,
    teacache_coefficients,
    uniform,
)
from solvers import DPMSolverPP, Euler, Heun, Linear, TorchDiffEq, UniPC, integrate
from tests.test_blocks import Stacked

K = 20
TS = torch.linspace(0.97, 0.18, K + 1, dtype=torch.float64) ** 1.5  # uneven, from noise to data
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SPEED = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)[:, None]
COEFFICIENTS = [3.0, -2.0, 0.5, 1.2, 0.01]
RATIOS = [1.0, *(1 + 0.15 * np.sin(3.0 * np.arange(1, K))).tolist()]


class Split(Stacked):
    """Three samples that differ in speed, each evaluated alone, and what of them a timestep modulates."""

    def __init__(self, speed=SPEED):
        super().__init__(speed)

    def modulated(self, x, t, **given):
        return [torch.sin(3 * self.speed * t) + 0.3 * x, torch.cos(self.speed * x)[:, :2]]

    def select(self, rows):
        return Split(self.speed[rows])


class Fused(Split):
    """The same, which can only be evaluated as a whole."""

    select = property()  # hasattr is False


def of_sample(b):
    """f, stack, head and modulated input of one sample, as NumPy functions of (x, t)."""
    field = Split(SPEED[[b]])

    def numpy(method, *given):
        return method(torch.tensor(given[0])[None], given[1], *given[2:])

    return (
        lambda x, t: numpy(field, x, t)[0].numpy(),
        lambda x, t: numpy(field.stack, x, t),
        lambda x, t, stack: numpy(field.head, x, t, stack)[0].numpy(),
        lambda x, t: np.concatenate([part[0].numpy() for part in numpy(field.modulated, x, t)]),
    )


# the authors' rules


def teacache_loop(b, x, ts, coefficients, threshold, first, last):
    """x_0 and the steps at which the blocks ran."""
    _, stack, head, modulated = of_sample(b)
    rescale, accumulated, previous, residual, ran = np.poly1d(coefficients), 0.0, None, None, []
    steps = len(ts) - 1
    for cnt in range(steps):
        m = modulated(x, ts[cnt])
        if cnt < first or cnt >= steps - last:
            should_calc, accumulated = True, 0.0
        else:
            accumulated += rescale(np.abs(m - previous).mean() / np.abs(previous).mean())
            should_calc = not accumulated < threshold
            accumulated = 0.0 if should_calc else accumulated
        previous = m
        if should_calc:
            residual = stack(x, ts[cnt])
            ran.append(cnt)
        x = x + (ts[cnt + 1] - ts[cnt]) * head(x, ts[cnt], residual)
    return x, ran


def magcache_loop(b, x, ts, mag_ratios, threshold, most, retention):
    """x_0 and the steps at which the blocks ran."""
    _, stack, head, _ = of_sample(b)
    ratio, err, skipped, residual, ran = 1.0, 0.0, 0, None, []
    steps = len(ts) - 1
    for cnt in range(steps):
        skip = False
        if cnt >= int(steps * retention):
            ratio *= mag_ratios[cnt]
            skipped += 1
            err += abs(1 - ratio)
            if err < threshold and skipped <= most:
                skip = True
            else:
                ratio, err, skipped = 1.0, 0.0, 0
        if not skip:
            residual = stack(x, ts[cnt])
            ran.append(cnt)
        x = x + (ts[cnt + 1] - ts[cnt]) * head(x, ts[cnt], residual)
    return x, ran


def taylorseer_loop(b, x, ts, ran):
    """x_0 when the blocks run at the steps `ran`; in between each of their outputs is a Taylor series of order 1."""
    _, stack, head, _ = of_sample(b)
    factors, updated = [], None

    def derivative(now, before, steps):
        return {
            "tokens": (now["tokens"] - before["tokens"]) / steps,
            "text": [(now["text"][0] - before["text"][0]) / steps],
        }

    for cnt in range(len(ts) - 1):
        if cnt in ran:
            now = stack(x, ts[cnt])
            factors, updated = [now, *([derivative(now, factors[0], cnt - updated)] if factors else [])], cnt
        tokens, text = (
            sum(part * (cnt - updated) ** order for order, part in enumerate(parts))
            for parts in ([factor["tokens"] for factor in factors], [factor["text"][0] for factor in factors])
        )
        x = x + (ts[cnt + 1] - ts[cnt]) * head(x, ts[cnt], {"tokens": tokens, "text": [text]})
    return x


def easycache_loop(b, x, ts, threshold, warmup, last):
    """x_0 and the steps at which the network ran."""
    f = of_sample(b)[0]
    previous_x = previous_v = x_at_evaluation = cached = k = None
    accumulated, ran, steps = 0.0, [], len(ts) - 1
    for cnt in range(steps):
        should_calc = True
        if cnt < warmup or cnt >= steps - last:
            accumulated = 0.0
        elif k is not None:
            accumulated += k * (np.abs(x - previous_x).mean() / np.abs(previous_v).mean())
            should_calc = not accumulated < threshold
            accumulated = 0.0 if should_calc else accumulated
        previous_x = x
        if should_calc:
            v = f(x, ts[cnt])
            if previous_v is not None:
                k = np.abs(v - previous_v).mean() / np.abs(x - x_at_evaluation).mean()
            x_at_evaluation, previous_v, cached = x, v, v - x
            ran.append(cnt)
        else:
            v = x + cached
        x = x + (ts[cnt + 1] - ts[cnt]) * v
    return x, ran


HELD = {"reuse": "hold"}
TEACACHE = {"payload": "blocks", **HELD}
RULES = {  # by name: the loop, the criterion for a grid and the options of the cache, and settings that differ
    "TeaCache": (
        lambda b, x, ts, tolerance: teacache_loop(b, x, ts, COEFFICIENTS, tolerance, 1, 1),
        lambda field, ts: {"criterion": TeaCache(field.modulated, COEFFICIENTS, ts), **TEACACHE},
        (0.1, 0.4, 1.0),
    ),
    "TeaCache, 5 and 0": (
        lambda b, x, ts, tolerance: teacache_loop(b, x, ts, COEFFICIENTS, tolerance, 5, 0),
        lambda field, ts: {"criterion": TeaCache(field.modulated, COEFFICIENTS, ts, first=5, last=0), **TEACACHE},
        (0.4,),
    ),
    "MagCache": (
        lambda b, x, ts, tolerance: magcache_loop(b, x, ts, RATIOS, tolerance, 2, 0.2),
        lambda field, ts: {"criterion": MagCache(RATIOS, ts), "max_reuses": 2, **TEACACHE},
        (0.12, 0.25, 3.0),
    ),
    "MagCache, K = 4": (
        lambda b, x, ts, tolerance: magcache_loop(b, x, ts, RATIOS, tolerance, 4, 0.13),
        lambda field, ts: {"criterion": MagCache(RATIOS, ts, retention=0.13), "max_reuses": 4, **TEACACHE},
        (0.4,),
    ),
    "EasyCache": (
        lambda b, x, ts, tolerance: easycache_loop(b, x, ts, tolerance, 3, 1),
        lambda field, ts: {"criterion": EasyCache(ts, warmup=3), "payload": "difference", **HELD},
        (0.05, 0.3, 1.0),
    ),
    "EasyCache, no warm-up": (
        lambda b, x, ts, tolerance: easycache_loop(b, x, ts, tolerance, 0, 1),
        lambda field, ts: {"criterion": EasyCache(ts, warmup=0), "payload": "difference", **HELD},
        (0.3,),
    ),
}
CASES = [(name, tolerance) for name, (_, _, tolerances) in RULES.items() for tolerance in tolerances]
KINDS = ("TeaCache", "MagCache", "EasyCache")


def cached_by(name, field, tolerance, ts=TS, **more):
    return CachedField(field, **{**RULES[name][1](field, ts), **more}, tolerance=tolerance)


def ran(report):
    """The steps at which each sample was evaluated by its own decision."""
    kept = torch.stack([~(query.reused | query.duplicate) for query in report.trace], 1)
    return [row.nonzero()[:, 0].tolist() for row in kept]


@pytest.mark.parametrize("kind", [Split, Fused])
@pytest.mark.parametrize(("name", "tolerance"), CASES)
def test_it_evaluates_where_its_authors_rule_does_and_ends_there(name, tolerance, kind):
    cached = cached_by(name, kind(), tolerance)
    end = cached.integrate(X, TS)
    for b in range(3):
        x_0, steps = RULES[name][0](b, X[b].numpy(), TS.tolist(), tolerance)
        assert ran(cached.report)[b] == steps
        np.testing.assert_allclose(end[b].numpy(), x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_its_samples_decide_differently_and_thresholds_matter(name):
    """A guard on the test above: otherwise it could compare constants."""
    by_tolerance = []
    for tolerance in RULES[name][2]:
        cached = cached_by(name, Split(), tolerance)
        cached.integrate(X, TS)
        by_tolerance.append(ran(cached.report))
    counts = [sum(map(len, steps)) for steps in by_tolerance]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert 3 * K > counts[1] > 12
    if name != "MagCache":  # whose ratios are those of any sample
        assert any(steps[0] != steps[2] for steps in by_tolerance)


@pytest.mark.parametrize("nfe", [3, 8, 13])
def test_taylorseer_is_a_schedule_whose_blocks_are_continued(nfe):
    ts = torch.linspace(0.97, 0.18, K + 1, dtype=torch.float64)
    rule = dict(criterion=uniform(ts, nfe), reuse="linear", correct=False, payload="blocks")
    end = CachedField(Split(), **rule).integrate(X, ts)
    ran = set(np.linspace(0, K, nfe + 1)[:-1].round().astype(int))
    for b in range(3):
        expected = taylorseer_loop(b, X[[b]].numpy()[0], ts.numpy(), ran)
        np.testing.assert_allclose(end[b], expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_teacache_decides_by_hand_made_inputs(seed):
    """Inputs that are given, one row a step and a column a sample; the polynomial may be negative."""
    g = np.random.default_rng(seed)
    inputs, coefficients = g.normal(2, 1, (K, 3, 5)), g.normal(0, 0.3, 5)
    step = {t: k for k, t in enumerate(TS.tolist())}

    def watch(x, t):
        return torch.tensor(inputs[step[float(t)]])

    cached = CachedField(Split(), criterion=TeaCache(watch, coefficients, TS), tolerance=0.3, **HELD)
    cached.integrate(X, TS)
    for b in range(3):
        accumulated, steps = 0.0, [0]
        for k in range(1, K):
            l1 = np.abs(inputs[k, b] - inputs[k - 1, b]).mean() / np.abs(inputs[k - 1, b]).mean()
            accumulated += np.polyval(coefficients, l1)
            if k == K - 1 or not accumulated < 0.3:
                accumulated = 0.0
                steps.append(k)
        assert ran(cached.report)[b] == steps


def test_magcache_by_hand():
    """Ratios .9, .9, ... after a fifth of ten steps: errors .1, .1 + .19 = .29, then .1 again after an evaluation."""
    ts = torch.linspace(1, 0, 11, dtype=torch.float64)
    cached = CachedField(
        Split(), criterion=MagCache([1.0] + 9 * [0.9], ts), tolerance=0.3, max_reuses=3, payload="blocks", reuse="hold"
    )
    cached.integrate(X, ts)
    assert ran(cached.report) == 3 * [[0, 1, 4, 7]]
    assert [round(query.predicted[0].item(), 6) for query in cached.report.trace[2:6]] == [0.1, 0.29, 0.561, 0.1]


def test_ratios_of_another_number_of_steps_are_those_of_the_nearest_place():
    def nearest(ratios, steps):  # as the authors interpolate
        scale = (len(ratios) - 1) / (steps - 1)
        return np.array(ratios)[np.round(np.arange(steps) * scale).astype(int)]

    for steps in (7, 13, 40):
        ts = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        torch.testing.assert_close(MagCache(RATIOS, ts).product, torch.tensor(nearest(RATIOS, steps).cumprod()))


# what it is measured by


def test_coefficients_are_the_least_squares_fit_of_output_changes_to_input_changes():
    found = teacache_coefficients(Split(), X, TS)
    inputs, outputs = [], []
    for b in range(3):
        f, _, _, modulated = of_sample(b)
        x, before = X[b].numpy(), None
        for t, t_next in itertools.pairwise(TS.tolist()):
            now = modulated(x, t), f(x, t)
            if before:
                l1 = [np.abs(one - other).mean() / np.abs(other).mean() for one, other in zip(now, before, strict=True)]
                inputs.append(l1[0])
                outputs.append(l1[1])
            x, before = x + (t_next - t) * now[1], now
    at = np.linspace(min(inputs), max(inputs), 9)
    np.testing.assert_allclose(np.polyval(found, at), np.polyval(np.polyfit(inputs, outputs, 4), at), rtol=1e-5)
    assert json.loads(json.dumps(found)) == found
    assert len(found) == 5


def test_ratios_are_means_over_tokens_and_samples():
    class Tokens(Split):
        """A stack of two sides, of 4 and 2 tokens."""

        def stack(self, x, t):
            wide = torch.tanh(self.speed * x + t)
            return (torch.stack([wide, 2 * t * wide, x, x * x], 1), torch.stack([wide * wide, x - t], 1))

        def head(self, x, t, stack):
            return stack[0][:, 0] - stack[1][:, 1]

    field, x, norms = Tokens(), X, []
    for t, t_next in itertools.pairwise(TS):
        stack = field.stack(x, t)
        norms.append([[side[b, n].norm().item() for side in stack for n in range(side.shape[1])] for b in range(3)])
        x = x + (t_next - t) * field(x, t)
    ratios = [1.0] + [float((np.array(now) / np.array(last)).mean()) for last, now in itertools.pairwise(norms)]
    np.testing.assert_allclose(magnitude_ratios(Tokens(), X, TS), ratios, rtol=1e-12)

    x, sizes = X, []
    for t, t_next in itertools.pairwise(TS):
        v = field(x, t)
        sizes.append(v.norm(dim=1))
        x = x + (t_next - t) * v
    ratios = [1.0] + [float((now / last).mean()) for last, now in itertools.pairwise(sizes)]
    np.testing.assert_allclose(magnitude_ratios(Tokens(), X, TS, payload="output"), ratios, rtol=1e-12)


@pytest.mark.parametrize("payload", ["output", "blocks"])
@pytest.mark.parametrize("stepper", [Euler(), DPMSolverPP(Linear())], ids=str)
def test_a_segment_weighs_what_skipping_it_does_to_the_sample(payload, stepper):
    ts = TS[::2]
    errors = segment_errors(Split(), X, ts, stepper, longest=4, payload=payload, progress=False)
    full = integrate(Split(), X, ts, stepper)
    assert [len(row) for row in errors] == [4, 4, 4, 4, 4, 4, 3, 2, 1, 0]
    assert all(row[0] == 0 for row in errors[:-1])
    for i, j in [(0, 2), (0, 4), (3, 6), (5, 9), (7, 9)]:
        field, held, inside = Split(), {}, ts[i + 1 : j].tolist()

        def skipping(x, t, field=field, held=held, inside=inside):
            if float(t) not in inside:
                held["y"] = field.stack(x, t) if payload == "blocks" else field(x, t)
            return field.head(x, t, held["y"]) if payload == "blocks" else held["y"]

        end = integrate(skipping, X, ts, stepper)
        assert errors[i][j - i - 1] == pytest.approx((end - full).abs().mean().item(), rel=1e-9)


def test_no_segment_spans_two_networks():
    """Where another network takes over, its first output is evaluated, inside a segment too."""
    ts = TS[::2]

    class Two(Split):
        def regime(self, t):
            return t > float(ts[4]) + 1e-6

    errors = segment_errors(Two(), X, ts, longest=4, payload="output", progress=False)
    apart = segment_errors(Split(), X, ts, longest=4, payload="output", progress=False)
    held, full = {}, integrate(Split(), X, ts)

    def skipping(x, t):
        if float(t) not in (float(ts[3]), float(ts[5])):  # of the segment 2 -> 6, in which 4 is another network
            held["y"] = Split()(x, t)
        return held["y"]

    assert errors[2][3] == pytest.approx((integrate(skipping, X, ts) - full).abs().mean().item(), rel=1e-9)
    assert errors[2][3] < apart[2][3]
    assert errors[0] == apart[0]


def test_segments_cost_what_they_are_said_to():
    field = Split()
    segment_errors(field, X, TS, longest=3, progress=False)
    assert len(field.stacks) == K + sum(K - j for i in range(K) for j in (i + 2, i + 3) if j < K)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rounded", [False, True])
def test_the_path_is_the_best_of_all(seed, rounded):
    """By the largest weight, then the second largest, ..., also where many are equal."""
    g, steps, longest = np.random.default_rng(seed), 9, 4
    errors = [[0.0, *g.random(min(longest, steps - 1 - i) - 1).tolist()] for i in range(steps - 1)] + [[]]
    errors = [[round(w, 1) if rounded else w for w in row] for row in errors]

    def weights(path):
        return sorted((errors[i][j - i - 1] for i, j in itertools.pairwise(path)), reverse=True)

    for nfe in range(3, steps + 1):
        paths = [(0, *middle, steps - 1) for middle in itertools.combinations(range(1, steps - 1), nfe - 2)]
        paths = [path for path in paths if all(j - i <= longest for i, j in itertools.pairwise(path))]
        assert weights(minimax_path(errors, nfe)) == min(map(weights, paths))
    with pytest.raises(ValueError, match="No path of 2 evaluations: with these segments 3 to 9"):
        minimax_path(errors, 2)


# schedules


def test_schedules_evaluate_where_they_say():
    errors = segment_errors(Split(), X, TS, longest=6, progress=False)
    for criterion, steps in [
        (uniform(TS, 7), [0, 3, 6, 9, 11, 14, 17]),
        (uniform(TS, 7, last=True), [0, 3, 6, 10, 13, 16, 19]),
        (uniform(TS, K, last=True), list(range(K))),
        (uniform(TS, K), list(range(K))),
        (every(TS, 6), [0, 6, 12, 18]),
        (lemica(errors, TS, 8), minimax_path(errors, 8)),
    ]:
        cached = CachedField(Split(), criterion=criterion, reuse="hold", payload="blocks")
        cached.integrate(X, TS)
        assert ran(cached.report) == 3 * [steps]
        assert cached.report.evaluations.tolist() == 3 * [len(steps)]
    assert minimax_path(errors, 8)[-1] == K - 1


def test_a_schedule_of_all_queries_of_a_multistage_method():
    criterion = uniform(TS, 11, Heun())
    cached = CachedField(Split(), criterion=criterion, reuse="hold")
    cached.integrate(X, TS, Heun())
    assert cached.report.evaluations.tolist() == [11, 11, 11]


# what it keeps


@pytest.mark.parametrize("kind", [Split, Fused])
@pytest.mark.parametrize("name", KINDS)
def test_a_sample_does_not_feel_its_batch(name, kind):
    cached = cached_by(name, kind(), RULES[name][2][1])
    end = cached.integrate(X, TS)
    for b in range(3):
        alone = cached_by(name, kind(SPEED[[b]]), RULES[name][2][1])
        torch.testing.assert_close(alone.integrate(X[[b]], TS), end[[b]], rtol=0, atol=1e-14)
        assert ran(alone.report) == [ran(cached.report)[b]]


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("name", KINDS)
def test_without_tolerance_it_is_the_bare_field_to_the_bit(name, reuse):
    for stepper in (Euler(), DPMSolverPP(Linear())):
        end = cached_by(name, Split(), 0.0, reuse=reuse).integrate(X, TS, stepper)
        assert torch.equal(end, integrate(Split(), X, TS, stepper))


@pytest.mark.parametrize("name", KINDS)
def test_a_query_asked_twice_changes_nothing(name):
    once, twice = (cached_by(name, Split(), RULES[name][2][1]) for _ in range(2))
    end = once.integrate(X, TS)
    with twice.run(TS):
        torch.testing.assert_close(integrate(lambda x, t: (twice(x, t), twice(x, t))[1], X, TS), end)
    assert torch.equal(twice.report.evaluations, once.report.evaluations)
    assert (twice.report.duplicates == K).all()


@pytest.mark.parametrize("name", [*KINDS, "EasyCache, no warm-up"])
def test_a_trajectory_begun_anew_remembers_nothing_of_the_last(name):
    cached, ends = cached_by(name, Split(), RULES[name][2][-1]), []
    with cached.run():
        for _ in range(2):
            ends.append(integrate(cached, X, TS))
    assert torch.equal(*ends)
    kept = torch.stack([query.reused for query in cached.report.trace])
    assert torch.equal(kept[:K], kept[K:])
    assert kept.any()


@pytest.mark.parametrize("name", KINDS)
def test_nor_does_one_of_another_shape(name):
    class Shapeless(Split):
        def modulated(self, x, t):
            return torch.sin(3 * t + x)

    tolerance, field = RULES[name][2][1], Stacked()
    how = {**RULES[name][1](Shapeless(), TS), "payload": "output"}
    cached = CachedField(field, **how, tolerance=tolerance)
    for x in (X, X[:2, :4]):
        alone = cached.integrate(x, TS)
        with cached.run():
            integrate(cached, X, TS)
            assert torch.equal(integrate(cached, x, TS), alone)


@pytest.mark.parametrize("name", KINDS)
def test_interleaved_runs_and_conditionings_do_not_mix(name):
    how = RULES[name][1](Split(), TS)
    cached = CachedField(lambda x, t, kind="a": Split()(x if kind == "a" else -x, t), **{**how, "payload": "output"},
                         tolerance=RULES[name][2][1])  # fmt: skip
    starts, kinds = (X, -2 * X, X), ("a", "b", "b")

    def walk(run, x, kind):
        for t, t_next in itertools.pairwise(TS):
            x = x + (t_next - t) * run(x, t, kind=kind)
            yield x

    alone = []
    for x, kind in zip(starts, kinds, strict=True):
        with cached.run() as run:
            alone.append(list(walk(run, x, kind))[-1])
    with cached.run() as one, cached.run() as two:
        walks = [walk(run, x, kind) for run, x, kind in zip((one, one, two), starts, kinds, strict=True)]
        *_, ends = zip(*walks, strict=True)
    for end, by_itself in zip(ends, alone, strict=True):
        assert torch.equal(end, by_itself)


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_that_fails_can_be_asked_for_again(name):
    class Failing(Split):
        fails = False

        def stack(self, x, t):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().stack(x, t)

        def select(self, rows):
            few = Failing(self.speed[rows])
            few.fails = self.fails
            return few

    def walk(cached, field, failing):
        x = X
        with cached.run() as run:
            for k, (t, t_next) in enumerate(itertools.pairwise(TS)):
                field.fails = k in failing
                if field.fails:
                    with pytest.raises(RuntimeError, match="memory"):
                        run(x, t)
                    field.fails = False
                x = x + (t_next - t) * run(x, t)
        return x

    tolerance, evaluated = RULES[name][2][0], cached_by(name, Split(), RULES[name][2][0])
    evaluated.integrate(X, TS)
    steps, ends = ran(evaluated.report)[1], []
    for failing in ((), (steps[1], steps[-1])):
        field = Failing()
        ends.append(walk(cached_by(name, field, tolerance), field, failing))
    assert torch.equal(*ends)


def test_an_output_that_is_not_finite_is_not_reused():
    """Of one sample in three, at step 3, which is evaluated; the other two go on with what they have."""

    def field(x, t):
        return torch.where((torch.arange(3) == 1)[:, None] & (float(t) == float(TS[3])), torch.nan, Split()(x, t))

    for name in KINDS:
        how = {**RULES[name][1](Split(), TS), "payload": "output"}
        cached = CachedField(field, **how, tolerance=lambda t: 0.0 if t == float(TS[3]) else 1e6)
        with cached.run():
            for k, t in enumerate(TS[:-1]):
                cached(X + 0.1 * k, t)
        assert [4 in steps for steps in ran(cached.report)] == [False, True, False]


def test_nothing_is_held_after_a_run():
    held = []

    class Watched(Split):
        def modulated(self, x, t):
            now = torch.sin(t * x)
            held.append(weakref.ref(now))
            return now

    field = Watched()
    cached = cached_by("TeaCache", field, 0.1)
    with cached.run(TS) as run:
        integrate(run, X, TS)
        noted = [weakref.ref(branch.noted) for _, branch in run.branches.known]
        assert noted[0]() is not None
    gc.collect()
    assert not any(ref() is not None for ref in [*held, *noted])


# with what it goes


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("stepper", [Euler(), DPMSolverPP(Linear()), UniPC(Linear())], ids=str)
def test_a_difference_is_a_stack_under_a_head_that_adds_the_state(reuse, correct, stepper):
    class AsStack(Split):
        def stack(self, x, t):
            return Split(self.speed)(x, t) - x

        def head(self, x, t, stack):
            return stack + x

        def select(self, rows):
            return AsStack(self.speed[rows])

    ends = []
    for field, payload in ((Split(), "difference"), (AsStack(), "blocks")):
        cached = cached_by("EasyCache", field, 0.3, payload=payload, reuse=reuse, correct=correct)
        ends.append(cached.integrate(X, TS, stepper))
        assert cached.report.reuses.any()
    torch.testing.assert_close(*ends, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_a_line_and_a_correction_make_any_of_them_better(name):
    """Of a smooth field, with the very steps that the criterion chooses for it."""
    full, error = integrate(Split(), X, TS), {}
    for how in ({"reuse": "hold"}, {"reuse": "linear"}, {"reuse": "hold", "correct": True}):
        cached = cached_by(name, Split(), RULES[name][2][1], **how, payload="output")
        error[str(how)] = (cached.integrate(X, TS) - full).square().mean().sqrt().item()
        assert cached.report.reuses.any()
    held, line, corrected = error.values()
    assert line < held / 2
    assert corrected < held / 2


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_with_stages_and_with_low_precision(name):
    for stepper in (Heun(), TorchDiffEq("midpoint")):
        cached = cached_by(name, Split(), RULES[name][2][1], reuse="linear", correct=True)
        assert cached.integrate(X, TS, stepper).isfinite().all()
        assert cached.report.reuses.any()
    end = cached_by(name, Split(SPEED.bfloat16()), RULES[name][2][1]).integrate(X.bfloat16(), TS)
    assert end.dtype == torch.bfloat16
    assert end.isfinite().all()


# the adapters


def captured(module, field, x, t, what):
    """What a hook on a module sees while the field is evaluated."""
    seen = []

    def hook(module, args, kwargs, out):
        seen.append(what(args, kwargs, out))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    field(x, t)
    handle.remove()
    return seen[0]


def adapters():
    from tests import test_adapters as a

    return {
        "WanField": (a.wan, a.drawn(a.B, 4, 3, 4, 4, seed=3), lambda m: m.condition_embedder, lambda a, k, o: o[1]),
        "LTXField": (
            partial(a.ltx, batched=False),
            a.drawn(a.B, 12, 8, seed=3),
            lambda m: m.transformer_blocks[0].attn1,
            lambda a, k, o: k["hidden_states"],
        ),
        "CogVideoXField": (
            partial(a.cogvideox, batched=False),
            a.drawn(a.B, 3, 4, 8, 8, seed=3),
            lambda m: m.time_embedding,
            lambda a, k, o: o,
        ),
        "SiTField": (
            partial(a.sit, guidance=1.0),
            a.drawn(a.B, 1, 8, 8, seed=3),
            lambda m: m.blocks[0].qkv,
            lambda a, k, o: a[0],
        ),
    }


@pytest.mark.parametrize("family", ["WanField", "LTXField", "CogVideoXField", "SiTField"])
def test_an_adapter_s_modulated_input_is_the_one_inside_the_network(family):
    make, x, module, what = adapters()[family]
    field = make()
    for t in (0.8, 0.3):
        found = field.modulated(x, t)
        inside = captured(module(field.model), field, x, t, what)
        torch.testing.assert_close(found.flatten(), inside.flatten(), rtol=1e-5, atol=1e-5)
        assert len(found) == len(x)
    assert (field.modulated(x, 0.8) - found).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["WanField", "LTXField", "CogVideoXField", "SiTField"])
def test_every_rule_runs_on_an_adapter(family):
    make, x, _, _ = adapters()[family]
    field, ts = make(), torch.linspace(1, 0.1, 11)
    full = integrate(field, x, ts)
    coefficients = teacache_coefficients(field, x, ts, degree=2)
    ratios = magnitude_ratios(field, x, ts)
    for criterion, tolerance, payload in [
        (TeaCache(field.modulated, coefficients, ts), 1.0, "blocks"),
        (MagCache(ratios, ts), 0.5, "blocks"),
        (EasyCache(ts, warmup=2), 1.0, "difference"),
        (lemica(segment_errors(field, x, ts, longest=2, progress=False), ts, 8), 1.0, "blocks"),
    ]:
        cached = CachedField(field, criterion=criterion, tolerance=tolerance, reuse="hold", payload=payload)
        assert cached.integrate(x, ts).isfinite().all()
        assert cached.report.reuses.any()
        bare = CachedField(field, criterion=criterion, tolerance=0.0, reuse="hold", payload=payload)
        torch.testing.assert_close(bare.integrate(x, ts), full, rtol=1e-5, atol=1e-5)


def test_experts_and_the_official_wan_have_modulated_inputs():
    from tests import test_adapters as a

    field, x = a.experts(), a.drawn(a.B, 4, 3, 4, 4, seed=3)
    assert torch.equal(field.modulated(x, 0.9), field.high.modulated(x, 0.9))
    assert torch.equal(field.modulated(x, 0.1), field.low.modulated(x, 0.1))
    assert a.wan_list().modulated(x, 0.4).shape == (a.B, 8)


# on a trained network


def test_on_the_shipped_sit_they_are_as_good_as_they_should_be():
    """Half of 50 evaluations, outputs held: between 40 and 47 dB to the full run, as the theory's prototypes were."""
    x, field = noise(4, "choosing"), sit_field(4)
    full = integrate(field, x, GRID)
    calibrating, x_c = sit_field(2), noise(2, "calibration")
    coefficients = teacache_coefficients(calibrating, x_c, GRID)
    ratios = magnitude_ratios(calibrating, x_c, GRID)
    for criterion, tolerance in ((TeaCache(field.modulated, coefficients, GRID), 0.03), (MagCache(ratios, GRID), 0.03)):
        cached = CachedField(field, criterion=criterion, tolerance=tolerance, reuse="hold")
        end = cached.integrate(x, GRID)
        assert 20 <= cached.report.evaluations.double().mean() <= 30
        assert 40 < psnr(end, full).median() < 47


# what is said


def test_wrong_arguments_are_named():
    for wrong, words in [
        (lambda: CachedField(Split(), criterion=EasyCache(TS)), "EasyCache says how far outputs move; give the `tol"),
        (lambda: CachedField(Split(), criterion=EasyCache(TS), nfe=3), "in its own unit"),
        (lambda: CachedField(Split(), criterion=EasyCache(TS), tolerance=1.0, unit="sample"), "in its own unit"),
        (lambda: MagCache([1.0, -0.5], TS), "`ratios` must be positive"),
        (lambda: MagCache(RATIOS, TS, retention=2), "`retention` is a share"),
        (lambda: uniform(TS, 30), "`nfe` must be 1 to 20"),
        (lambda: every(TS, 0), "`k` counts"),
        (lambda: teacache_coefficients(lambda x, t: x, X, TS), "say with `watch`"),
        (lambda: teacache_coefficients(Split(SPEED[:1]), X[:1], TS[:4]), "needs more than 4 different changes"),
        (lambda: magnitude_ratios(lambda x, t: x, X, TS), "has no `stack"),
        (lambda: segment_errors(Split(), X, TS, Heun(), progress=False), "one output"),
        (lambda: lemica([[0.0], []], TS, 2), "measure them on it"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()
    cached = CachedField(Split(), criterion=MagCache(RATIOS, TS), tolerance=1.0)
    with pytest.raises(ValueError, match="another time convention"):
        cached.integrate(X, TS.flip(0))
