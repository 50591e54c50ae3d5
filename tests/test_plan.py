"""Plans: the cheapest schedules there are, with the error that they will have.

The oracle runs the bare stepper on explicit outputs, those of a schedule's reuses replaced by what they would be, and
looks at the difference in the end; the best schedule is looked for among all.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import echoes
from benchmarks.cases import cases
from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, SensitivityProfile, calibrate, rehearse
from sencache.criteria import Scheduled
from sencache.expected import Errors
from sencache.influence import Response, influence, response
from sencache.plan import expectation, sampler_name
from sencache.schedule import HEARD, STABLE, Problem, quadratic, schedules
from solvers import (
    VP,
    BrownianPath,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    TorchDiffEq,
    UniPC,
    grids,
    integrate,
    trajectory,
)
from tests.flows import GaussianFlow, linear_flow, rms

SIZE, SAMPLES = 5, 3
S = {"t": lambda t: t, "log t": torch.log, "log(1 - t)": lambda t: torch.log(1 - t)}
STEPPERS = {
    "Euler": Euler(),
    "DDIM": DPMSolverPP(Linear(), 1),
    "DPM-Solver++ 2M": DPMSolverPP(Linear(), 2),
    "Heun": Heun(),
}
BACKWARD = {
    "Euler": Euler(),
    "DDIM": DPMSolverPP(Linear(data_at=1.0), 1),
    "DPM-Solver++ 2M": DPMSolverPP(Linear(data_at=1.0), 2),
    "Heun": Heun(),
}
KINDS = ["smooth", "rough"]
WAYS = [("hold", False), ("hold", True), ("linear", False), ("linear", True)]
IDS = [f"{reuse}, {'repaid' if correct else 'owed'}" for reuse, correct in WAYS]
WAY = pytest.mark.parametrize(("reuse", "correct"), WAYS, ids=IDS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def grid(steps=10):
    """From the noise to the data, uneven, with finite log-SNR and logarithms."""
    return torch.linspace(0.98, 0.2, steps + 1, dtype=torch.float64) ** 1.5


def query_times(stepper, ts):
    """The distinct times at which a stepper asks, in order."""
    asked = []
    integrate(lambda x, t: asked.append(float(t)) or 0 * x, torch.zeros(1, 1, dtype=torch.float64), ts, stepper)
    return list(dict.fromkeys(asked))


def sequences(kind, times, seed=0):
    """Random outputs (T, SAMPLES, SIZE): cosines of a few frequencies, or noise."""
    t = torch.tensor(times, dtype=torch.float64)[:, None, None]
    shape = (SAMPLES, SIZE)
    if kind == "rough":
        return torch.randn(len(times), *shape, generator=seeded(seed), dtype=torch.float64)
    size, rate, phase = torch.rand(3, 3, *shape, generator=seeded(seed), dtype=torch.float64)
    return sum(2 * a * torch.cos(6 * b * t + 6 * c) for a, b, c in zip(size, rate, phase, strict=True))


def gram_of(outputs):
    """(S, T, T) from (T, S, d)."""
    return torch.einsum("isd,jsd->sij", outputs, outputs) / outputs.shape[2]


def posed(stepper, ts, outputs, reuse, correct, variable="t"):
    times, gain = influence(stepper, ts)
    return Problem(times.numpy(), gain.numpy(), gram_of(outputs).numpy(), reuse, variable, correct)


def end_state(outputs, stepper, ts, times):
    """The bare stepper's end (N, ...) on outputs (T, N, ...), the same at every query of one time."""
    x = torch.zeros_like(outputs[0])
    return integrate(lambda x, t: outputs[times.index(float(t))], x, ts, stepper)


def substituted(outputs, before, ref, end, s, reuse, correct):
    """outputs (T, ...) as a run of frozen outputs ends up using them in the gap ref -> end."""
    changed, last = outputs.clone(), len(outputs)
    for j in range(ref + 1, end):
        u = s[j] - s[ref]
        if correct and end < last:  # Newton's form through before, ref, end
            slope = (outputs[end] - outputs[ref]) / (s[end] - s[ref])
            changed[j] = outputs[ref] + u * slope
            if before >= 0:
                earlier = (outputs[ref] - outputs[before]) / (s[ref] - s[before])
                changed[j] += u * (s[j] - s[end]) * (slope - earlier) / (s[end] - s[before])
        elif reuse == "linear" and before >= 0:
            span = s[ref] - s[before]
            share = max(-4.0, min(4.0, float(u / span)))
            changed[j] = outputs[ref] + share * (outputs[ref] - outputs[before])
        else:
            changed[j] = outputs[ref]
    return changed


def plan(problem, nodes):
    return expectation(problem, np.asarray(nodes), 1.0)


def gaps(nodes, size):
    """(before, ref, end) of every gap of a schedule."""
    ends = [*nodes[1:], size]
    return list(zip([-1, *nodes[:-1]], nodes, ends, strict=True))


def costs(outputs, stepper, ts, times, s, reuse, correct):
    """What each possible gap, alone, does to the end: its mean square over samples and elements."""
    size = len(times)
    every = [(-1, 0, e) for e in range(1, size + 1)]
    every += [(b, r, e) for b in range(size) for r in range(b + 1, size) for e in range(r + 1, size + 1)]
    changed = torch.stack([substituted(outputs, *gap, s, reuse, correct).flatten(1) for gap in every], 1)  # (T, N, S d)
    full = end_state(outputs.flatten(1)[:, None], stepper, ts, times)
    squares = (end_state(changed, stepper, ts, times) - full).square().mean(1)
    return dict(zip(every, squares.tolist(), strict=True))


def simulated(outputs, nodes, stepper, ts, times, s, reuse, correct):
    """The RMS difference (S,) in the end of a run with frozen outputs."""
    changed = outputs.clone()
    for before, ref, end in gaps(nodes, len(times)):
        changed[ref + 1 : end] = substituted(outputs, before, ref, end, s, reuse, correct)[ref + 1 : end]
    return rms(end_state(changed, stepper, ts, times) - end_state(outputs, stepper, ts, times))


def oracle(kind, stepper, ts, variable):
    times = query_times(stepper, ts)
    return times, sequences(kind, times), S[variable](torch.tensor(times, dtype=torch.float64))


# the shortest path is the shortest


@pytest.mark.parametrize("method", STEPPERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", ["t", "log t"])
@WAY
def test_costs_are_the_squares_of_the_residuals(method, kind, variable, reuse, correct):
    ts, stepper = grid(), STEPPERS[method]
    _, outputs, _ = oracle(kind, stepper, ts, variable)
    problem = posed(stepper, ts, outputs, reuse, correct, variable)
    size = len(problem.times)
    every = [(-1, 0, e) for e in range(1, size + 1)]
    every += [(b, r, e) for b in range(size) for r in range(b + 1, size) for e in range(r + 1, size + 1)]
    before, ref, end = np.array(every).T
    cost = problem.costs()
    assert int(np.isfinite(cost).sum()) == len(every)
    expected = quadratic(problem.residuals(before, ref, end)[0], problem.gram.mean(0))
    np.testing.assert_allclose(cost[before, ref, end], expected, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("method", STEPPERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", ["t", "log t"])
@WAY
def test_no_schedule_of_its_length_costs_less(method, kind, variable, reuse, correct):
    ts, stepper = grid(), STEPPERS[method]
    times, outputs, s = oracle(kind, stepper, ts, variable)
    cost, size = costs(outputs, stepper, ts, times, s, reuse, correct), len(times)

    def total(nodes):
        return sum(cost[gap] for gap in gaps(nodes, size))

    found = schedules(posed(stepper, ts, outputs, reuse, correct, variable), size)
    for n, nodes in enumerate(found, 1):
        assert nodes[0] == 0
        assert len(set(nodes.tolist())) == n
        least = min(total((0, *rest)) for rest in combinations(range(1, size), n - 1))
        assert total(nodes.tolist()) == pytest.approx(least, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("stepper", [Euler(), UniPC(Linear())], ids=str)
@WAY
def test_costs_count_the_echo_of_what_a_gap_owes_at_its_end(reuse, correct, stepper, monkeypatch):
    """As the state there weighs outputs: of a solver with a history not as the end does."""
    for each in STABLE:
        monkeypatch.setitem(STABLE, each, math.inf)
    ts = grid()
    _, outputs, _ = oracle("smooth", stepper, ts, "t")
    states = None if stepper == Euler() else response(stepper, ts).states.numpy()
    still = replace(posed(stepper, ts, outputs, reuse, correct), states=states)
    alpha_x = np.linspace(1, 4, 10)
    size, felt = len(still.times), replace(still, alpha_x=alpha_x)
    every = [(b, r, e) for b in range(size) for r in range(b + 1, size) for e in range(r + 1, size)]
    before, ref, end = np.array(every).T
    left, owes = still.residuals(before, ref, end)
    open_gap = replace(still, correct=False).residuals(before, ref, end)[0]
    assert np.array_equal(open_gap, owes) == (states is None)
    share = (open_gap - left)[range(len(end)), end]  # of the output at the end in repaying
    weight = HEARD * alpha_x[end] * (abs(share) + abs(still.gain[end]))
    echo = weight**2 * quadratic(owes, still.gram.mean(0))
    np.testing.assert_allclose(
        felt.costs()[before, ref, end], still.costs()[before, ref, end] + echo, rtol=1e-8, atol=1e-13
    )
    assert np.array_equal(felt.costs()[..., size], still.costs()[..., size])  # after the last evaluation none is wrong


@WAY
def test_a_gap_beyond_what_is_stable_costs_what_it_goes_beyond(reuse, correct, monkeypatch):
    ts, alpha_x = grid(), np.linspace(5, 20, 10)
    _, outputs, _ = oracle("smooth", Euler(), ts, "t")
    problem = replace(posed(Euler(), ts, outputs, reuse, correct), alpha_x=alpha_x)
    cost, size = problem.costs(), len(problem.times)
    limit, first = STABLE[reuse], STABLE["hold"]
    monkeypatch.setitem(STABLE, "linear", math.inf)
    monkeypatch.setitem(STABLE, "hold", math.inf)
    gentle = problem.costs()
    scale = abs(problem.gain).sum() ** 2 * problem.gram.diagonal(axis1=1, axis2=2).mean()
    for ref, end in combinations(range(size + 1), 2):
        if ref == size or (ref == 0 and end == 0):
            continue
        length = float(alpha_x[ref] * (ts[ref] - ts[end]))
        bound = limit if ref and end < size else first
        beyond = max(0.0, length - bound) if end > ref + 1 else 0.0
        here = range(ref) if ref else [-1], ref, end
        more = cost[here] - gentle[here]
        np.testing.assert_allclose(more, scale * beyond**2, rtol=1e-6, atol=1e-9)
    nodes = np.array([0, 2, 9])
    carefree = plan(problem, nodes)
    assert not Errors(problem).instability(nodes[None])
    monkeypatch.setitem(STABLE, "hold", first)
    monkeypatch.setitem(STABLE, reuse, limit)
    stiff = plan(problem, nodes)
    assert Errors(problem).instability(nodes[None])
    assert not stiff.stable
    assert (stiff.error > carefree.error).all()


def test_how_long_a_gap_is_does_not_depend_on_the_unit_of_time():
    """A scheduler's steps weigh outputs by its sigmas, whatever its timesteps count."""
    problem = replace(posed(Euler(), grid(), sequences("smooth", grid()[:-1].tolist()), "linear", True), heard=0.0)
    problem = replace(problem, alpha_x=np.linspace(1, 9, 10))
    assert problem.instability().any()
    np.testing.assert_allclose(replace(problem, times=1000 * problem.times).costs(), problem.costs(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("reuse", "correct", "most", "gaps", "more"),
    [("linear", True, 0.545, 60, 1.1), ("linear", False, 1.0, 30, 1.07), ("hold", False, 2.0, 30, 1.07)],
)
def test_gaps_are_stable_up_to_where_the_methods_of_adams_are(reuse, correct, most, gaps, more):
    """On dx/dt = x downward in time, a decay, in gaps of forty small steps each; repaid lines grow slowest."""
    assert correct or STABLE[reuse] == pytest.approx(0.9 * most)
    for length, damped in ((0.93 * most, True), (more * most, False)):
        ts = torch.linspace(gaps * length, 0, gaps * 40 + 1, dtype=torch.float64)
        evaluated = Scheduled(ts[:-1], torch.arange(0, len(ts) - 1, 40))
        cached = CachedField(lambda x, t: x, criterion=evaluated, reuse=reuse, correct=correct)
        end = cached.integrate(torch.ones(1, 1, dtype=torch.float64), ts).abs()
        assert (end < 0.2) if damped else (end > 2)


STIFF = [(8.0, 10), (10.0, 10), (10.0, 15), (12.0, 15), (14.0, 15), (20.0, 15), (20.0, 20), (20.0, 25), (30.0, 20)]


@pytest.mark.parametrize(("rate", "nfe"), STIFF)
def test_on_a_stiff_field_a_plan_errs_at_most_twice_as_much_as_fewer_steps_and_expects_it(rate, nfe):
    def stiff(x, t):
        return rate * (x - torch.cos(5 * t))

    x, ts = torch.randn(40, 4, generator=seeded(3), dtype=torch.float64), grids.uniform(50)
    profile = calibrate(stiff, x[:8], ts, progress=False)
    cached = CachedField(stiff, profile, nfe=nfe)
    full = integrate(stiff, x[8:], ts)
    fewer, ours = integrate(stiff, x[8:], grids.uniform(nfe)), cached.integrate(x[8:], ts)
    made = (rms(ours - full) / rms(full)).median()
    assert made < 2 * (rms(fewer - full) / rms(full)).median()
    assert made < 1.5 * cached.report.expected
    assert (cached.report.evaluations == nfe).all()


@pytest.mark.parametrize("name", list(cases()))
def test_plans_of_trained_fields_have_no_unstable_gaps(name):
    case = cases()[name]
    for nfe in (5, 10, 25):
        plan = CachedField(free_field(), case.profile, nfe=nfe).plan(case.grid(), case.stepper)
        assert plan.stable
        assert (plan.reuse, plan.correct) == ("linear", True)


def test_a_plan_with_room_for_short_gaps_continues_lines_and_another_holds():
    def stiff(x, t):
        return 20 * (x - torch.cos(5 * t))

    x, ts = torch.randn(8, 4, generator=seeded(3), dtype=torch.float64), grids.uniform(50)
    profile = calibrate(stiff, x, ts, progress=False)
    roomy, tight = (CachedField(stiff, profile, nfe=nfe).plan(ts) for nfe in (30, 15))
    assert (roomy.reuse, roomy.correct, roomy.stable) == ("linear", True, True)
    assert (tight.reuse, tight.correct, tight.variable) == ("hold", False, "t")
    for nfe, unsafe in ((30, False), (10, True)):
        cached = CachedField(stiff, profile, nfe=nfe)
        cached.integrate(x, ts)
        assert ("errors can grow" in str(cached.report)) == unsafe
    trained = CachedField(free_field(), calibrated(free_field()), nfe=4).plan()
    assert (trained.reuse, trained.correct, trained.stable) == ("linear", True, True)


@pytest.mark.parametrize("ts", [grids.uniform(30, 0.75, 0.3), grids.uniform(30, 0.7, 0.2)], ids=["start", "end"])
def test_a_grid_of_which_the_profile_knows_a_part_is_not_planned_on(ts):
    known = grids.uniform(30, 0.7, 0.3)
    profile = calibrate(free_field(), X, known, progress=False)
    CachedField(free_field(), profile, nfe=5).plan(grids.uniform(60, 0.7, 0.3))
    with pytest.raises(
        ValueError, match=r"measured from t = 0.7 to 0.31\d*, and \d+ outputs .* Calibrate on this grid"
    ):
        CachedField(free_field(), profile, nfe=5).integrate(X, ts)


def test_fewer_schedules_are_the_same_as_the_first_of_more():
    ts = grid()
    problem = posed(Euler(), ts, sequences("smooth", ts[:-1].tolist()), "linear", True)
    for few, more in zip(schedules(problem, 4), schedules(problem, 10), strict=False):
        assert np.array_equal(few, more)


# what is expected of one


@settings(max_examples=60)
@given(
    st.sets(st.integers(1, 9)),
    st.sampled_from(list(STEPPERS)),
    st.sampled_from(KINDS),
    st.sampled_from(WAYS),
    st.sampled_from(["t", "log t", "log(1 - t)"]),
)
def test_its_error_is_that_of_a_run_with_frozen_outputs(rest, method, kind, way, variable):
    rising = variable == "log(1 - t)"
    ts, stepper = (1 - grid(), BACKWARD[method]) if rising else (grid(), STEPPERS[method])
    times, outputs, s = oracle(kind, stepper, ts, variable)
    nodes = [0, *sorted(rest)]
    expected = plan(posed(stepper, ts, outputs, *way, variable), nodes).error
    torch.testing.assert_close(expected, simulated(outputs, nodes, stepper, ts, times, s, *way), rtol=1e-7, atol=1e-10)


@settings(max_examples=40)
@given(st.sets(st.integers(1, 9)), st.sampled_from(KINDS), st.sampled_from(WAYS), st.sampled_from(["t", "log t"]))
def test_its_change_is_the_median_error_of_each_reused_output(rest, kind, way, variable):
    ts, nodes = grid(), [0, *sorted(rest)]
    times, outputs, s = oracle(kind, Euler(), ts, variable)
    changed = outputs.clone()
    for before, ref, end in gaps(nodes, len(times)):
        changed[ref + 1 : end] = substituted(outputs, before, ref, end, s, way[0], False)[ref + 1 : end]
    expected = (changed - outputs).square().mean(2).sqrt().median(1).values
    change = plan(posed(Euler(), ts, outputs, *way, variable), nodes).change
    torch.testing.assert_close(change, expected, rtol=1e-7, atol=1e-7)
    assert (change[nodes] == 0).all()


@pytest.mark.parametrize("method", [*STEPPERS, "midpoint", "rk4", "Euler-Maruyama"])
def test_influence_is_how_far_the_end_moves_with_an_output(method):
    ts, x = grid(6), torch.randn(2, 3, generator=seeded(1), dtype=torch.float64)
    noise = BrownianPath(x, ts, seeded(2))
    more = {
        "midpoint": TorchDiffEq("midpoint"),
        "rk4": TorchDiffEq("rk4"),
        "Euler-Maruyama": EulerMaruyama(Linear(), noise),
    }
    stepper = (STEPPERS | more)[method]
    times, gain = influence(stepper, ts)
    asked = query_times(Euler() if method == "Euler-Maruyama" else stepper, ts)
    assert times.tolist() == asked
    outputs = torch.randn(len(asked), *x.shape, generator=seeded(3), dtype=torch.float64)

    def end(outputs):
        return integrate(lambda x, t: outputs[asked.index(float(t))], x, ts, stepper)

    for j in range(len(asked)):
        moved = outputs.clone()
        moved[j] += 1
        torch.testing.assert_close(end(moved) - end(outputs), gain[j].expand_as(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=str)
@pytest.mark.parametrize("method", [Euler, Heun, DPMSolverPP, UniPC])
def test_states_are_how_far_those_on_the_way_move_with_an_output(method, path):
    """In units of the end: times how far that moves with them. Of Euler's method they are the gain, of others not."""
    ts, stepper = grid(8), method() if method in (Euler, Heun) else method(path)
    found = response(stepper, ts)
    asked, size = found.times.tolist(), len(found.times)
    outputs = torch.randn(size, 1, 3, generator=seeded(3), dtype=torch.float64)

    def states(outputs, x):
        seen = {}
        end = integrate(lambda x, t: seen.setdefault(float(t), x) * 0 + outputs[asked.index(float(t))], x, ts, stepper)
        return torch.stack([*seen.values(), end])

    x = torch.randn(1, 3, generator=seeded(1), dtype=torch.float64)
    bare = states(outputs, x)
    still = (states(outputs, x + 1) - bare)[:, 0, 0]
    for j in range(size):
        moved = outputs.clone()
        moved[j] += 1
        off = (states(moved, x) - bare)[:-1, 0, 0] * still[-1] / still[:-1]
        torch.testing.assert_close(off, found.states[:, j], rtol=1e-8, atol=1e-10)
    assert found.mixed == (method is not Euler)


def test_plans_for_a_solver_with_a_history_know_what_it_makes_of_outputs_on_the_way(monkeypatch):
    """Of Gaussian data to its very end, where UniPC's last steps weigh outputs by many times what is left of them."""
    ts, path, scale = grids.uniform(50, 1.0, 1e-3), VP(), 0.2 * torch.randn(64, generator=seeded(0)).double().exp()

    def field(x, t):
        alpha, sigma, dalpha, dsigma = (part.double() for part in path.coefficients(t))
        return (alpha * dalpha * scale**2 + sigma * dsigma) / (alpha**2 * scale**2 + sigma**2) * x

    x, stepper = torch.randn(32, 64, generator=seeded(1), dtype=torch.float64), UniPC(path)
    profile, full = calibrate(field, x[:8], ts, stepper, progress=False), integrate(field, x[8:], ts, stepper)

    def errors():
        ends = [CachedField(field, profile, nfe=nfe).integrate(x[8:], ts, stepper) for nfe in (8, 10, 12, 15, 18, 22)]
        return torch.stack([rms(end - full).median() for end in ends])

    knowing = errors()
    monkeypatch.setattr(Response, "mixed", False)
    gained = (errors() / knowing).log10() * 20
    assert gained.mean() > 4  # dB
    assert gained.min() > -2


# from calibration to the sample: fields that do not feel x, of which everything is known beforehand


def free_field(batch=4, size=6, seed=0):
    """v(t) of each row of the batch, smooth, whatever x."""
    a, b, c = torch.randn(3, batch, size, generator=seeded(seed), dtype=torch.float64)
    return lambda x, t: a[: len(x)] * torch.sin(3 * t) + b[: len(x)] * t + c[: len(x)] * torch.exp(-2 * t)


X = torch.randn(4, 6, generator=seeded(7), dtype=torch.float64)
TS = grids.uniform(12, 0.95, 0.05)
ENDED = {
    **STEPPERS,  # of which Heun asks at the grid's end too
    "Euler-Maruyama": EulerMaruyama(Linear(), BrownianPath(X, TS, seeded(2))),
    "midpoint": TorchDiffEq("midpoint"),
}


@pytest.mark.parametrize("method", [name for name in ENDED if name != "midpoint"])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 11])
@WAY
def test_the_error_of_a_sample_is_the_one_that_was_expected(method, n, reuse, correct):
    field, stepper = free_field(), ENDED[method]
    profile = calibrate(field, X, TS, stepper, progress=False)
    cached = CachedField(field, profile, nfe=n, reuse=reuse, correct=correct)
    actual = rms(cached.integrate(X, TS, stepper) - integrate(field, X, TS, stepper))
    torch.testing.assert_close(actual, cached.plan(TS, stepper).error, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11])
@WAY
@pytest.mark.parametrize("calibrated", [Heun(), Euler()], ids=str)
def test_the_error_of_heuns_is_the_one_that_was_expected_down_to_zero(n, reuse, correct, calibrated):
    """Of the output at the end Euler says nothing: then it is taken for the last one, which here it is."""
    ts, field = grids.uniform(12, 0.95, 0.0), free_field()
    flat = ts[-2]
    steady = lambda x, t: field(x, max(torch.as_tensor(t), flat))  # noqa: E731, the last output is the one before
    profile = calibrate(steady, X, ts, calibrated, progress=False)
    cached = CachedField(steady, profile, nfe=n, reuse=reuse, correct=correct)
    actual = rms(cached.integrate(X, ts, Heun()) - integrate(steady, X, ts, Heun()))
    torch.testing.assert_close(actual, cached.plan(ts, Heun()).error, rtol=1e-5, atol=1e-8)


def test_an_echo_is_measured_as_what_the_field_makes_of_a_debt():
    """v = -x turns a debt round, and has ||J_x|| = 1."""
    sizes, cosines = echoes.angles(next(echoes.fields(4)), nfe=12)
    assert sizes.shape == cosines.shape == (len(sizes), 4)
    assert len(sizes) >= 8
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=1e-6, atol=0)
    torch.testing.assert_close(cosines, -torch.ones_like(sizes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [6, 9])
@WAY
def test_an_output_wrong_in_a_wrong_state_is_expected_to_be(n, reuse, correct):
    """Off by alpha_x times the state's error, each time in a new direction: in many dimensions, at right angles."""
    steps, d = 20, 20_000
    ts, generator = grids.uniform(steps, 0.95, 0.05), seeded(3)
    x, a, b = torch.randn(3, 2, d, generator=generator, dtype=torch.float64)
    free = lambda x, t: a * torch.sin(3 * t) + b * torch.exp(-2 * t)  # noqa: E731
    alpha_x, at = torch.linspace(0.5, 1.5, steps, dtype=torch.float64), {float(t): k for k, t in enumerate(ts)}
    states = {float(ts[0]): x} | {float(step.t): step.x for step in trajectory(free, x, ts)}

    def field(x, t):
        turned = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        wrong = alpha_x[at[float(t)]] * rms(x - states[float(t)])
        return free(x, t) + wrong[:, None] * turned

    profile = replace(calibrate(free, x, ts, progress=False), alpha_x=alpha_x)
    cached = CachedField(field, profile, nfe=n, reuse=reuse, correct=correct)
    actual = rms(cached.integrate(x, ts) - integrate(free, x, ts))
    expected = cached.plan(ts).error
    frozen = CachedField(field, replace(profile, alpha_x=0 * alpha_x), nfe=n, reuse=reuse, correct=correct).plan(ts)
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=1e-8)
    assert (expected > frozen.error).all()


ALIKE = [lambda x, t: -x, GaussianFlow(Linear())]


@pytest.mark.parametrize("field", ALIKE, ids=["v = -x", "Gaussian"])
@pytest.mark.parametrize("n", [10, 15, 20])
def test_errors_are_not_expected_to_cancel_where_outputs_are_all_alike(field, n):
    ts = grids.uniform(60)
    profile = calibrate(field, X, ts, progress=False)
    cached = CachedField(field, profile, nfe=n)
    end, full = cached.integrate(X, ts), integrate(field, X, ts)
    made = float((rms(end - full) / rms(full)).median())
    assert made < 2e-3
    lucky = 0.05 if (n, field) == (10, ALIKE[1]) else 0.1  # in ten evaluations errors cancel better than is expected
    assert lucky < made / cached.plan(ts).relative_error < 10


# budgets


@pytest.mark.parametrize("method", [name for name in ENDED if name != "midpoint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_budget_is_spent_exactly(method, dtype):
    flow, ts = GaussianFlow(Linear()), TS.to(dtype)
    stepper = ENDED[method]
    profile = calibrate(flow, X, ts, stepper, progress=False)
    size = len(query_times(Heun() if method == "Heun" else Euler(), ts))
    for n in range(1, size + 1):
        calls = []
        cached = CachedField(lambda x, t, calls=calls: calls.append(float(t)) or flow(x, t), profile, nfe=n)
        cached.integrate(X, ts, stepper)
        nodes = cached.plan(ts, stepper)
        assert calls == nodes.times[nodes.nodes].tolist()
        assert cached.report.evaluations.tolist() == [n] * 4


@pytest.mark.parametrize("end", [1e-3, 1e-5, 1e-7])
def test_a_budget_is_spent_exactly_on_grids_of_tiny_last_steps(end):
    ts = grids.logarithmic(50, 1.0, end)
    profile = calibrate(linear_flow(), X, ts, progress=False)
    for n in (10, 50):
        cached = CachedField(linear_flow(), profile, nfe=n)
        cached.integrate(X, ts)
        assert cached.report.evaluations.tolist() == [n] * 4


@pytest.mark.parametrize("method", [name for name in ENDED if name not in ("midpoint", "Heun")])
def test_a_budget_for_everything_is_the_bare_run_to_the_bit(method):
    flow, stepper = GaussianFlow(Linear()), ENDED[method]
    profile = calibrate(flow, X, TS, stepper, progress=False)
    cached = CachedField(flow, profile, nfe=12)
    assert torch.equal(cached.integrate(X, TS, stepper), integrate(flow, X, TS, stepper))
    assert (cached.plan(TS, stepper).error < 1e-9).all()


def test_heun_asks_twice_a_time_and_pays_once():
    """Of n distinct times; the largest budget is its form with one evaluation a step, still of the second order."""
    flow, errors = GaussianFlow(Linear()), []
    for steps in (8, 16, 32):
        ts = grids.uniform(steps, 0.95, 0.05)
        cached = CachedField(flow, calibrate(flow, X, ts, Heun(), progress=False), nfe=steps + 1)
        end = cached.integrate(X, ts, Heun())
        assert cached.report.queries.tolist() == [2 * steps] * 4
        assert cached.report.evaluations.tolist() == [steps + 1] * 4
        errors.append(rms(end - flow.solution(X, 0.95, 0.05)).max().item())
    assert math.log2(errors[1] / errors[2]) > 1.7


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_that_grow_by_a_little_are_no_reason_to_hold(seed):
    """Heun on eight modes in 16 dimensions: a plan that held was 17 dB behind fewer steps, its neighbours ahead."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    mixture = (torch.full((8,), 1 / 8), mean, torch.zeros(8, 16, 0), torch.zeros(8, 0), torch.full((8,), 0.25))
    field = GaussianMixture(*(each.double() for each in mixture))
    x, ts = torch.randn(40, 16, generator=generator, dtype=torch.float64), grids.uniform(25, 1.0, 0.01)
    profile = calibrate(field, x[:8], ts, Heun(), progress=False)
    full = integrate(field, x[8:], ts, Heun())
    for nfe in (8, 9, 10, 11, 12, 14, 16, 20):
        off = rms(CachedField(field, profile, nfe=nfe).integrate(x[8:], ts, Heun()) - full).median()
        assert off < rms(integrate(field, x[8:], grids.uniform(nfe // 2, 1.0, 0.01), Heun()) - full).median()


# targets


def calibrated(field, ts=TS, x=X, stepper=None):
    return calibrate(field, x, ts, stepper or Euler(), progress=False)


def rehearsed(field, ts=TS, x=X, stepper=None, fresh=X):
    return rehearse(field, calibrated(field, ts, x, stepper), fresh, ts, stepper or Euler())


@pytest.mark.parametrize("rtol", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("method", ["Euler", "DPM-Solver++ 2M"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_relative_error_is_kept_on_linear_flows(rtol, method, strength):
    """Outputs that feel the state, of which a plan knows nothing and a rehearsal does: 16 samples for it, 16 others."""
    flow, stepper, ts = linear_flow(), STEPPERS[method], grids.uniform(40, 0.95, 0.05)
    field = lambda x, t: flow(strength * x, t)  # noqa: E731
    fresh, unseen = torch.randn(2, 16, 6, generator=seeded(8), dtype=torch.float64)
    cached = CachedField(field, rehearsed(field, ts, X, stepper, fresh), rtol=rtol)
    end, full = cached.integrate(unseen, ts, stepper), integrate(field, unseen, ts, stepper)
    kept = rms(end - full) <= rtol * rms(full)
    assert kept.sum() >= 13  # 16/17 of them are expected to be
    assert cached.report.evaluations.max() < 40


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_error_never_costs_less(seed):
    field = free_field(seed=seed)
    profile = rehearsed(field)
    spent = [len(CachedField(field, profile, rtol=10**-power).plan(TS).nodes) for power in torch.arange(0, 6, 0.25)]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1] <= 12


def test_an_error_that_cannot_be_had_for_less_costs_everything():
    rough = lambda x, t: torch.randn(x.shape, generator=seeded(int(1e6 * t)), dtype=x.dtype)  # noqa: E731
    cached = CachedField(rough, rehearsed(rough), rtol=1e-9)
    assert torch.equal(cached.integrate(X, TS), integrate(rough, X, TS))
    assert cached.report.evaluations.tolist() == [12] * 4


def test_an_error_asked_for_on_a_grid_shorter_than_every_rehearsal_is_paid_in_full_or_refused_in_words():
    field, short = free_field(), grids.uniform(2, 0.95, 0.05)
    profile = rehearse(field, calibrated(field), X, TS, budgets=(4, 6))
    try:
        made = CachedField(field, profile, rtol=0.1).plan(short)
    except ValueError as error:
        assert "rehearse" in str(error)  # noqa: PT017
    else:
        assert len(made.nodes) == 2


@pytest.mark.parametrize("ends", [(1.0, -1.0), (0.0, 2.0)])
def test_a_grid_that_passes_the_data_is_planned_in_t(ends):
    """There a logarithm of the distance to the data comes to the same value twice."""
    ts, field = torch.linspace(*ends, 21, dtype=torch.float64), free_field()
    plan = CachedField(field, calibrated(field, ts), nfe=10).plan(ts)
    assert plan.variable == "t"
    assert math.isfinite(plan.relative_error)


def test_factors_are_of_the_reuse_that_was_rehearsed():
    """What was rehearsed with lines and corrections says nothing of holding without them, nor of another sampler."""
    flow = GaussianFlow(Linear())
    for other in ({"reuse": "hold"}, {"correct": False}):
        with pytest.raises(ValueError, match=r"`rtol` is rehearsed with linear reuse and correction"):
            CachedField(flow, rehearsed(flow), rtol=0.1, **other)
    with pytest.raises(ValueError, match=r"`rtol` was rehearsed with Euler\(\).*; got Heun\(\).*Rehearse that"):
        CachedField(flow, rehearsed(flow), rtol=0.1).plan(TS, Heun())


@given(part=st.floats(-0.9, 0.9), seed=st.integers(0, 20), grid=st.sampled_from(["uniform", "shifted", "logarithmic"]))
@settings(max_examples=30)
def test_the_grid_that_was_rehearsed_is_known_in_any_precision(part, seed, grid):
    """Every time off by up to a thousandth of its shorter step, as in another precision or on another machine."""
    ts = {"uniform": TS, "shifted": grids.shifted(12, 5.0), "logarithmic": grids.logarithmic(12, 1.0, 1e-6)}[grid]
    field, steps = free_field(), ts.double().diff().abs()
    profile = rehearse(field, calibrated(field, ts), X, ts, budgets=(4, 6, 8))
    off = torch.minimum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    off = off * (torch.randint(0, 2, off.shape, generator=seeded(seed)) * 2 - 1)
    cached = CachedField(field, profile, nfe=6)
    known = cached.plan(ts)
    assert known.promised < math.inf
    for same in (ts.float(), ts.double() + 1e-3 * part * off):
        assert cached.plan(same).nodes.tolist() == known.nodes.tolist()
        assert cached.plan(same).promised == known.promised
        for each in (cached, CachedField(field, profile, rtol=0.5)):
            each.integrate(X, same)
            assert (each.report.evaluations == len(each.plan(same).nodes)).all()
    other = ts.double() + 2e-3 * off
    assert cached.plan(other).promised == math.inf
    with pytest.raises(ValueError, match=r"`rtol` was rehearsed with Euler\(\).*; got Euler\(\).*Rehearse that"):
        CachedField(field, profile, rtol=0.5).plan(other)


def test_without_a_word_half_of_the_evaluations_are_spent():
    field = free_field()
    assert len(CachedField(field, calibrated(field)).plan().nodes) == 6


def test_an_error_needs_a_rehearsal():
    with pytest.raises(ValueError, match=r"`rtol` needs a profile whose plans were rehearsed"):
        CachedField(free_field(), calibrated(free_field()), rtol=0.1)


# other grids, other loops


def borrowed(steps, measured, n, seed):
    """A plan for so many steps from a profile of others, its error in truth, and the plan that is calibrated there."""
    field, ts = free_field(seed=seed), grids.uniform(steps, 0.95, 0.05)
    elsewhere, there = (
        CachedField(field, calibrated(field, on), nfe=n).plan(ts) for on in (grids.uniform(measured, 0.95, 0.05), ts)
    )
    times, gain = influence(Euler(), ts)
    gram = calibrated(field, ts).gram.numpy()
    problem = Problem(times.numpy(), gain.numpy(), gram, "linear", elsewhere.variable, True)
    return elsewhere, plan(problem, elsewhere.nodes).error.median(), there, problem


@pytest.mark.parametrize(("steps", "measured"), [(20, 40), (30, 40), (80, 90), (80, 160)])
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_for_another_grid_is_the_one_calibrated_there(steps, measured, n, seed):
    made, truth, there, _ = borrowed(steps, measured, n, seed)
    assert truth <= 1.05 * there.error.median()
    assert made.error.median() == pytest.approx(truth.item(), rel=0.05)


@pytest.mark.parametrize("steps", [60, 80, 120])
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_for_a_grid_that_ends_later_is_better_than_an_even_one(steps, n, seed):
    """Past the last calibrated output nothing was measured but that one."""
    made, truth, _, problem = borrowed(steps, 40, n, seed)
    even = plan(problem, torch.linspace(0, steps * (1 - 1 / n), n).round().long())
    assert truth < 0.3 * even.error.median()
    assert truth / 4 < made.error.median() < 4 * truth


def test_times_between_calibrated_ones_take_the_gram_matrix_of_smooth_outputs():
    field, fine = free_field(), grids.uniform(95, 0.95, 0.05)[:-1]
    inside = fine[fine >= TS[-2]]
    outputs = torch.stack([field(X, t) for t in inside])
    torch.testing.assert_close(calibrated(field).gram_at(inside), gram_of(outputs), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("options", [{"nfe": 5}, {"rtol": 0.01}], ids=["nfe", "rtol"])
def test_a_loop_of_bare_calls_decides_as_integrate_does(way, options):
    if "rtol" in options and way != ("linear", True):
        pytest.skip("an error is asked for with lines and corrections only")
    flow = GaussianFlow(Linear())
    cached = CachedField(flow, rehearsed(flow), reuse=way[0], correct=way[1], **options)
    end = cached.integrate(X, TS)
    expected = torch.stack([query.reused for query in cached.report.trace])
    for ts in (TS, None):  # by default the calibrated grid
        with cached.run(ts):
            x = X
            for t, t_next in pairwise(TS):
                x = x + (t_next - t) * cached(x, t)
        assert torch.equal(torch.stack([query.reused for query in cached.report.trace]), expected)
        if ts is not None:
            torch.testing.assert_close(x, end, rtol=1e-10, atol=1e-10)  # corrections are folded into the outputs


def test_a_plan_that_is_run_says_what_it_expected_of_each_reuse_by_the_samples_own_outputs():
    flow, computed = GaussianFlow(Linear()), []

    def field(x, t):
        computed.append(flow(x, t))
        return computed[-1]

    cached = CachedField(field, calibrated(flow), nfe=5)
    cached.integrate(X, TS)
    made = cached.plan(TS)
    told = torch.stack([query.predicted for query in cached.report.trace])
    nodes = made.nodes.tolist()
    for k in range(12):
        before = [node for node in nodes if node <= k]
        expected = torch.full((4,), float(made.change[k]), dtype=torch.float64)
        if k in nodes:
            expected[:] = torch.inf
        elif len(before) > 1:
            own = rms(computed[len(before) - 1] - computed[len(before) - 2])
            mean = full_run_difference(flow, before[-2], before[-1])
            expected *= (own / mean).sqrt()
        torch.testing.assert_close(told[k], expected)


def full_run_difference(flow, i, j):
    """The median difference of outputs i and j along the calibrated trajectories, from the Gram matrix."""
    gram = calibrated(flow).gram
    return (gram[:, i, i] + gram[:, j, j] - 2 * gram[:, i, j]).sqrt().median()


def test_a_plans_nodes_are_a_grid_for_a_plain_solver():
    flow = GaussianFlow(Linear())
    plan = CachedField(flow, calibrated(flow), nfe=5).plan(TS)
    nodes = grids.through(plan.times[plan.nodes], TS[-1])
    assert torch.equal(nodes, TS[[*plan.nodes.tolist(), len(TS) - 1]].double())
    with pytest.raises(ValueError, match="strictly monotone"):
        grids.through(plan.times[plan.nodes], float(TS[0]))


def test_two_grids_and_two_steppers_have_plans_of_their_own():
    flow = GaussianFlow(Linear())
    cached = CachedField(flow, calibrated(flow), nfe=4)
    for ts, stepper in ((TS, Euler()), (TS, DPMSolverPP(Linear())), (grid(), Euler()), (TS, Euler())):
        made, fresh = cached.plan(ts, stepper), CachedField(flow, cached.profile, nfe=4).plan(ts, stepper)
        assert torch.equal(made.nodes, fresh.nodes)
        assert torch.equal(made.times, ts[:-1])


def test_steppers_without_a_name_have_plans_of_their_own():
    """One that is freed leaves its address, which is all that its name tells, to the next."""

    class Weighted:
        order, adaptive = 1, False

        def __init__(self, power):
            self.power = power

        def weights(self, t, t_next):
            return Euler().weights(t, t_next)

        def advance(self, field, x, t, t_next, memory):
            return t**self.power * (t_next - t) * field(x, t), None

    flow = GaussianFlow(Linear())
    cached = CachedField(flow, calibrated(flow), nfe=4)
    for power in (0, 9, 0, 9, 0, 9):
        fresh = CachedField(flow, cached.profile, nfe=4).plan(TS, Weighted(power))
        assert torch.equal(cached.plan(TS, Weighted(power)).nodes, fresh.nodes)


def test_no_error_is_told_where_one_output_answers_for_several():
    flow = GaussianFlow(Linear())
    profile = calibrate(flow, X, TS, Heun(), progress=False)
    for nfe in (4, 13):
        cached = CachedField(flow, profile, nfe=nfe)
        cached.integrate(X, TS, Heun())
        assert math.isnan(cached.plan(TS, Heun()).relative_error)
        assert "expected" not in str(cached.report)


# errors


def test_more_evaluations_than_there_are_queries_are_refused():
    field = free_field()
    cached = CachedField(field, calibrated(field), nfe=13)
    with pytest.raises(ValueError, match=r"`nfe` is 13, and Euler\(\) asks for only 12 outputs on this grid"):
        cached.integrate(X, TS)


def test_a_whole_number_of_evaluations_may_be_a_float():
    field = free_field()
    assert len(CachedField(field, calibrated(field), nfe=5.0).plan().nodes) == 5


@pytest.mark.parametrize("nfe", [0, -1, 2.5, True])
def test_a_budget_that_is_no_count_is_refused(nfe):
    with pytest.raises(ValueError, match=r"`nfe` counts evaluations, 1, 2, \.\.\.; got"):
        CachedField(free_field(), calibrated(free_field()), nfe=nfe)


@pytest.mark.parametrize("rtol", [0.0, -0.1, math.nan])
def test_an_error_that_is_none_is_refused(rtol):
    with pytest.raises(ValueError, match="`rtol` is a relative error and must be positive"):
        CachedField(free_field(), rehearsed(free_field()), rtol=rtol)


@pytest.mark.parametrize("options", [{"nfe": 5}, {"rtol": 0.1}, {}], ids=["nfe", "rtol", "neither"])
def test_without_a_profile_nothing_can_be_planned(options):
    with pytest.raises(ValueError, match=r"Without a profile give `tolerance`; for `nfe` or `rtol` calibrate first"):
        CachedField(free_field(), **options)


@pytest.mark.parametrize("options", [{"nfe": 5}, {"rtol": 0.1}], ids=["nfe", "rtol"])
def test_without_a_gram_matrix_nothing_can_be_planned(options):
    known = {"budgets": torch.tensor([3]), "expected": torch.ones(1), "factors": torch.ones(1, 4)}
    profile = SensitivityProfile(TS, torch.ones(13), torch.ones(13), **known)
    with pytest.raises(ValueError, match=r"has no Gram matrix.*`calibrate`"):
        CachedField(free_field(), profile, **options).integrate(X, TS)


def test_without_an_end_the_calibrated_grid_is_not_known():
    profile = SensitivityProfile(TS, torch.ones(13), torch.ones(13), gram=torch.eye(13, dtype=torch.float64)[None])
    with pytest.raises(ValueError, match="does not know where its grid ended"):
        CachedField(free_field(), profile, nfe=5).plan()


@pytest.mark.parametrize(
    "both", list(chain(combinations(["nfe", "rtol", "tolerance"], 2), [("nfe", "rtol", "tolerance")])), ids="+".join
)
def test_one_way_to_say_how_much_to_pay(both):
    values = {"nfe": 5, "rtol": 0.1, "tolerance": 0.1}
    with pytest.raises(ValueError, match=f"in one way, `nfe`, `rtol` or `tolerance`; got {', '.join(both)}"):
        CachedField(free_field(), rehearsed(free_field()), **{name: values[name] for name in both})


def test_under_a_tolerance_there_is_no_plan():
    with pytest.raises(ValueError, match="A plan needs a profile and `nfe` or `rtol`"):
        CachedField(free_field(), calibrated(free_field()), tolerance=0.1).plan()


# its price


@pytest.mark.parametrize(
    ("steps", "options", "seconds"),
    [
        (50, {"nfe": 20}, 0.5),
        (50, {"rtol": 0.02}, 0.5),
        (100, {"nfe": 20}, 2),
        (100, {"rtol": 0.02}, 2),
        (250, {"nfe": 25}, 20),
    ],
    ids=["50", "50 rtol", "100", "100 rtol", "250"],
)
def test_a_plan_is_made_while_a_person_waits(steps, options, seconds):
    assert min(spent(steps, options)[0] for _ in range(2)) < seconds


def test_a_plan_keeps_to_the_threads_that_torch_was_left():
    """NumPy's BLAS takes one a core; where others use the cores these wait for each other: 20 times the seconds."""
    everything, own = zip(*(spent(100, {"nfe": 20}) for _ in range(3)), strict=True)  # the suite leaves torch one
    assert min(everything) < 1.3 * min(own)


def spent(steps, options):
    """The CPU seconds of a plan on outputs without order, and what of them this thread took."""
    ts = grids.uniform(steps)
    outputs = sequences("rough", ts[:-1].tolist())
    ones = torch.ones(steps)
    profile = SensitivityProfile(ts[:-1], ones, ones, gram=gram_of(outputs), size=torch.ones(SAMPLES), end=ts[-1])
    facts = {"rehearsed": sampler_name(Euler(), ts)}
    known = {"budgets": torch.tensor([steps]), "expected": torch.zeros(1), "factors": torch.ones(1, SAMPLES)}
    cached = CachedField(free_field(), replace(profile, **known, facts=facts), **options)
    begun = time.process_time(), time.thread_time()
    cached.plan(ts)
    return time.process_time() - begun[0], time.thread_time() - begun[1]
