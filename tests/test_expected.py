"""Whole schedules: what is expected of them, and the moves that make them better.

The oracle runs the real cache on fields of time alone. What an evaluation weighs in a later state is seen by pushing
that one output, and the echoes are added up from there, one pair of evaluations after the other.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from sencache import CachedField, assumed, calibrate
from sencache.criteria import Scheduled
from sencache.expected import Errors
from sencache.influence import influence, response
from sencache.plan import expectation
from sencache.schedule import Problem, schedules
from solvers import BrownianPath, DPMSolverPP, Euler, EulerMaruyama, Linear, UniPC, grids, integrate
from tests.flows import rms

K, SAMPLES, SIZE = 14, 3, 7
TS = grids.uniform(K, 0.95, 0.05)
X = torch.zeros(SAMPLES, SIZE, dtype=torch.float64)
STEPPERS = {"Euler": Euler(), "DDIM": DPMSolverPP(Linear(), 1)}
MULTISTEP = {"DPM-Solver++ 2M": DPMSolverPP(Linear(), 2), "UniPC": UniPC(Linear())}
WAYS = [("hold", False), ("hold", True), ("linear", False), ("linear", True)]
WAY = pytest.mark.parametrize(("reuse", "correct"), WAYS, ids=[f"{reuse}, {correct}" for reuse, correct in WAYS])


def waves(seed=0):
    """Outputs of several frequencies, each sample its own."""
    generator = torch.Generator().manual_seed(seed)
    size, rate, phase = torch.rand(3, 4, SAMPLES, SIZE, generator=generator, dtype=torch.float64)
    return lambda x, t: (size * torch.cos(9 * rate * float(t) + 6 * phase)).sum(0)


def posed(field, reuse="linear", correct=True, alpha_x=0.0, stepper=STEPPERS["Euler"], variable="t", **more):
    times, gain, states, _ = response(stepper, TS)
    outputs = torch.stack([field(X, t) for t in times])
    gram = torch.einsum("isd,jsd->sij", outputs, outputs) / SIZE
    known = times.numpy(), gain.numpy(), gram.numpy(), reuse, variable, correct
    return Problem(*known, alpha_x=alpha_x, states=states.numpy(), **more)


def pushed(field, problem, stepper, nodes, k=None):
    """The states at all query times and the end, (T + 1, SAMPLES, SIZE), of a run whose k-th evaluation is off by 1."""
    states, calls = {}, []

    def seen(x, t):
        calls.append(t)
        return field(x, t) + (len(calls) - 1 == k)

    cached = CachedField(
        seen,
        criterion=Scheduled(torch.from_numpy(problem.times), torch.from_numpy(nodes)),
        reuse=problem.reuse,
        correct=problem.correct,
    )
    with cached.following(TS, stepper) as (run, repaying):
        asked = lambda x, t: states.setdefault(float(t), x) * 0 + run(x, t)  # noqa: E731
        end = integrate(asked, X, TS, repaying)
    return torch.stack([*(states[t] for t in problem.times.tolist()), end])


@pytest.mark.parametrize("method", [*STEPPERS, *MULTISTEP])
@pytest.mark.parametrize("nodes", [[0, 3, 5, 9, 12], [0, 1, 2, 8], [0, 4, 13]], ids=str)
@WAY
def test_an_error_is_what_gaps_leave_and_what_evaluations_in_wrong_states_do(method, nodes, reuse, correct):
    """Exactly; of multistep solvers but for what gaps that were repaid last still weigh otherwise in the next state."""
    field, stepper, at = waves(), {**STEPPERS, **MULTISTEP}[method], np.array(nodes)
    alpha_x = np.linspace(0.3, 1.2, K)
    problem = posed(field, reuse, correct, alpha_x, stepper)
    true = torch.stack(full_states(field, stepper))
    run = pushed(field, problem, stepper, at)
    off = rms((run - true).flatten(0, 1)).unflatten(0, (K + 1, SAMPLES)).square()  # of the states, outputs being right
    weigh = torch.stack([(pushed(field, problem, stepper, at, k) - run)[:, 0, 0] for k in range(len(nodes))])
    expected = off[K].clone()
    for late in range(1, len(nodes)):
        state = off[nodes[late]].clone()
        for early in range(1, late):
            state += min(1, float(alpha_x[nodes[early]] * weigh[early, nodes[late]]) ** 2) * off[nodes[early]]
        expected += float(alpha_x[nodes[late]] * weigh[late, K]) ** 2 * state
    np.testing.assert_allclose(
        Errors(problem).of(at), expected.numpy(), rtol=1e-6 if method in STEPPERS else 0.01, atol=1e-14
    )


def full_states(field, stepper):
    """The states (T + 1) of the run without a cache."""
    found = []
    end = integrate(lambda x, t: found.append(x) or field(x, t), X, TS, stepper)
    return [*found, end]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [3, 6, 9])
@WAY
def test_no_evaluation_had_better_be_elsewhere_between_its_neighbours(n, seed, reuse, correct):
    alpha_x = np.linspace(0.1, 0.9, K)
    problem = posed(waves(seed), reuse, correct, alpha_x)
    errors, path = Errors(problem), schedules(problem, n)[-1]
    found = errors.polished(path)

    def typical(nodes):
        return float(expectation(problem, np.array(nodes), 1.0).error.log().mean())

    nodes, least = found.tolist(), typical(found.tolist())
    assert len(nodes) == n
    assert nodes == sorted(set(nodes))
    assert nodes[0] == 0
    assert least <= typical(path.tolist()) + 1e-9
    for i in range(1, n):
        last = nodes[i + 1] if i + 1 < n else K
        for j in range(nodes[i - 1] + 1, last):
            moved = [*nodes[:i], j, *nodes[i + 1 :]]
            longer = errors.undamped[moved, [*moved[1:], K]].sum() > errors.undamped[nodes, [*nodes[1:], K]].sum()
            assert longer or typical(moved) >= least - 1e-5


def test_what_is_polished_is_near_the_best_of_all_schedules():
    """Of every way to choose six of fourteen: nearer than the shortest path is, on most fields."""
    ours, paths = [], []
    for seed in range(8):
        problem = posed(waves(seed), alpha_x=np.full(K, 0.3))
        errors, path = Errors(problem), schedules(problem, 6)[-1]
        every = [np.log(errors.of(np.array([0, *rest]))).mean() for rest in combinations(range(1, K), 5)]
        ours.append(np.log(errors.of(errors.polished(path))).mean() - min(every))
        paths.append(np.log(errors.of(path)).mean() - min(every))
    assert min(ours) > -1e-6
    assert sorted(ours)[4] < 1.0  # 4 dB
    assert sum(ours) < 0.6 * sum(paths)


def test_runs_come_as_near_as_polished_plans_expect():
    """On fields that do not feel the state all is known beforehand, the plan's lead over the shortest path too."""
    leads = []
    for seed in range(5):
        field = waves(seed)
        profile = calibrate(
            field, X + torch.randn(X.shape, generator=torch.Generator().manual_seed(1)), TS, progress=False
        )
        cached = CachedField(field, profile, nfe=6)
        made = rms(cached.integrate(X, TS) - integrate(field, X, TS))
        torch.testing.assert_close(made, cached.plan(TS).error, rtol=1e-5, atol=1e-9)
        problem = posed(field)
        path = expectation(problem, schedules(problem, 6)[-1], 1.0)
        leads.append(float(path.error.log().mean() - made.log().mean()))
    assert sorted(leads)[2] > 0.2  # 1.7 dB


def test_the_first_output_of_every_network_stays_evaluated():
    part = np.array([0] * 5 + [1] * 4 + [2] * 5)
    problem = posed(waves(), part=part, alpha_x=np.full(K, 0.5))
    for n in (3, 5, 8):
        nodes = Errors(problem).polished(schedules(problem, n)[-1]).tolist()
        assert len(nodes) == n
        assert {0, 5, 9} <= set(nodes)


def ends(ts, rate, nodes, reuse, correct):
    """Where dx/dt = -rate x ends, by the cache and by all evaluations, from an error of 1 made at each of N nodes."""
    sign = 1 if ts[-1] < ts[0] else -1
    decay = lambda x, t: sign * rate * x  # noqa: E731
    cached = CachedField(decay, criterion=Scheduled(ts[:-1], torch.tensor(nodes)), reuse=reuse, correct=correct)
    found = []
    for node in nodes:
        x = bare = torch.zeros(1, 1, dtype=torch.float64)
        with cached.following(ts, Euler()) as (run, stepper):
            memory = None
            for k, (t, t_next) in enumerate(pairwise(ts)):
                x, bare = x + (k == node), bare + (k == node)
                dx, memory = stepper.advance(run, x, t, t_next, memory)
                x, bare = x + dx, bare + (t_next - t) * decay(bare, t)
        found.append((abs(float(x)), abs(float(bare))))
    return found


@pytest.mark.parametrize("rate", [2.0, 8.0, 14.0, 40.0])
@pytest.mark.parametrize("way", [("linear", True), ("linear", False), ("hold", False)], ids=str)
def test_growth_is_what_the_cache_makes_of_errors_on_the_test_equation(rate, way):
    """Forward and backward in time; beyond what the full run makes of them itself, as it does at 40."""
    told = set()
    for ts in (TS, 1 - TS):
        times, gain = influence(Euler(), ts)
        known = times.numpy(), gain.numpy(), np.eye(K)[None]
        errors = Errors(Problem(*known, way[0], "t", way[1], alpha_x=np.full(K, rate)))
        for nodes in (list(range(K)), [0, 3, 5, 9, 12], [0, 1, 2, 8], [0, 4, 13], [0, 1, 3, 5, 7, 9, 11, 13], [0, 7]):
            expected = max(1.0, *(end / max(bare, 1) for end, bare in ends(ts, rate, nodes, *way)[:-1]))
            assert errors.growth(np.array(nodes)) == pytest.approx(expected, rel=1e-6)
            told.add(expected > 1.01)
        assert errors.growth(np.arange(K)) == pytest.approx(1)
    assert False in told
    assert True in told or rate < 8


def test_a_plan_of_all_evaluations_is_stable_however_strong_the_field():
    field = lambda x, t: 60 * (x - torch.cos(5 * torch.as_tensor(t)))  # noqa: E731
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    profile = calibrate(field, x, TS, progress=False)
    assert CachedField(field, profile, nfe=K).plan(TS).stable


@pytest.mark.parametrize(("rate", "nfe"), [(7.0, 8), (7.0, 9), (9.0, 10), (9.0, 11), (11.0, 14), (13.0, 16), (4.0, 9)])
def test_stiff_fields_do_not_collapse_where_errors_made_late_grow(rate, nfe):
    """Gaps of exactly the limit among them, where rounding decides."""
    field = lambda x, t: rate * (x - torch.cos(5 * t))  # noqa: E731
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ts = grids.uniform(50)
    cached = CachedField(field, calibrate(field, x[:8], ts, progress=False), nfe=nfe)
    full = integrate(field, x[8:], ts)
    ours, fewer = (
        rms(end - full).median() for end in (cached.integrate(x[8:], ts), integrate(field, x[8:], grids.uniform(nfe)))
    )
    assert ours < 2.5 * fewer


class OfTwoKinds:
    """dx/dt = rate (x - cos 5t), the rate of every tenth sample being a high one."""

    def __init__(self, samples, high):
        self.rate = torch.full((samples, 1), 2.0, dtype=torch.float64)
        self.rate[::10] = high

    def __call__(self, x, t):
        return self.rate * (x - torch.cos(5 * t))


@pytest.mark.parametrize(("high", "nfe"), [(8, 12), (8, 10), (8, 8), (12, 20), (12, 15), (20, 25)])
def test_a_few_stiff_samples_do_not_collapse_among_many_that_are_not(high, nfe):
    x = torch.randn(120, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ts, field = grids.uniform(50), OfTwoKinds(100, high)
    cached = CachedField(field, calibrate(OfTwoKinds(20, high), x[:20], ts, progress=False), nfe=nfe)
    full, fewer = integrate(field, x[20:], ts), integrate(field, x[20:], grids.uniform(nfe))
    off = [rms(end - full) for end in (cached.integrate(x[20:], ts), fewer)]
    assert off[0][::10].median() < 3 * off[1][::10].median()
    assert off[0].median() < 1.5 * off[1].median()


def test_growth_is_that_of_the_sample_it_is_largest_for():
    known = posed(waves(), alpha_x=np.full(K, 5.0))
    each = np.random.default_rng(0).uniform(3, 18, (4, K))
    nodes = np.array([0, 2, 5, 8, 11])
    alone = [Errors(replace(known, alpha_x=one)).growth(nodes) for one in each]
    assert Errors(replace(known, samples_x=each)).growth(nodes) == pytest.approx(max(alone))
    assert max(alone) > 1.5 * min(alone)


def test_a_gram_matrix_that_is_not_finite_is_refused_in_words():
    field, x = waves(), torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    profile = calibrate(field, x, TS, progress=False)
    gram = profile.gram.clone()
    gram[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"Gram matrix .* not finite.*[Cc]alibrate"):
        CachedField(field, replace(profile, gram=gram), nfe=6).integrate(X, TS)


def test_a_sample_of_which_nothing_is_known_does_not_decide():
    field, x = waves(), torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    profile = calibrate(field, x, TS, progress=False)
    still = replace(profile, gram=torch.cat([profile.gram, 0 * profile.gram[:1]]))
    plans = [CachedField(field, each, nfe=6).plan(TS) for each in (profile, still)]
    assert torch.equal(plans[0].nodes, plans[1].nodes)


def test_where_gaps_are_unstable_nothing_is_moved():
    problem = posed(waves(), alpha_x=np.full(K, 12.0))
    errors, nodes = Errors(problem), np.array([0, 4, 6, 11])
    assert errors.instability(nodes[None]) > 0
    assert np.array_equal(errors.polished(nodes), nodes)


@pytest.mark.parametrize("n", [4, 5, 6])
def test_gaps_go_no_further_beyond_what_repaid_lines_are_damped_in(n):
    alpha_x = np.full(K, 3.5)
    for seed in range(4):
        problem = posed(waves(seed), alpha_x=alpha_x)
        errors, path = Errors(problem), schedules(problem, n)[-1]
        found = errors.polished(path)

        def beyond(nodes):
            ends = [*nodes.tolist()[1:], K]
            gaps = [
                3.5 * float(TS[i] - TS[j]) - 0.54
                for i, j in zip(nodes.tolist(), ends, strict=True)
                if j > i + 1 and i and j < K
            ]
            return sum(max(0.0, gap) ** 2 for gap in gaps)

        assert beyond(found) <= beyond(path) + 1e-9


def test_where_every_step_adds_noise_plans_are_shortest_paths_and_echoes_are_expected():
    field, x = waves(), torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = EulerMaruyama(Linear(), BrownianPath(X, TS, torch.Generator().manual_seed(0)))
    profile = calibrate(field, x, TS, noisy, progress=False)
    profile = replace(profile, alpha_x=0 * profile.alpha_x + 0.5)
    made = CachedField(field, profile, nfe=6).plan(TS, noisy)
    times, gain = influence(noisy, TS)
    known, hears = (times.numpy(), gain.numpy(), profile.gram.numpy()), np.full(K, 0.5)
    problem = Problem(*known, "linear", made.variable, True, alpha_x=hears, heard=0.0)
    nodes, error = made.nodes.numpy(), made.error.numpy()
    assert np.array_equal(nodes, schedules(problem, 6)[-1])
    np.testing.assert_allclose(error**2, Errors(problem).of(nodes), rtol=1e-7)
    assert (error**2 > Errors(replace(problem, alpha_x=0 * hears)).of(nodes)).all()


def test_what_is_assumed_is_not_polished():
    """Of Gaussians errors cancel in ways of their own. The search knows a gap's echo alone, and counts all of it."""
    ts = grids.uniform(50)
    profile = assumed(Linear(), ts)
    known = [each.numpy() for each in (*influence(Euler(), ts), profile.gram, profile.lookup(ts[:-1])[0])]
    full, half = (Problem(*known[:3], "linear", "t", True, alpha_x=known[3], heard=heard) for heard in (1.0, 0.5))
    if_in_log_t, others = replace(full, variable="log t"), 0
    for n in (6, 10, 15, 20, 25):
        made = CachedField(waves(), profile, nfe=n).plan(ts)
        path = schedules(full if made.variable == "t" else if_in_log_t, n)[-1]
        assert np.array_equal(made.nodes, path)
        assert not np.array_equal(Errors(full).polished(path), path)
        others += not np.array_equal(path, schedules(replace(half, variable=made.variable), n)[-1])
    assert others > 2


@pytest.mark.parametrize("stepper", [UniPC(Linear()), DPMSolverPP(Linear(), 2)], ids=str)
def test_multistep_solvers_are_polished_too(stepper):
    field = waves()
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cached = CachedField(field, calibrate(field, x, TS, stepper, progress=False), nfe=6)
    made = rms(cached.integrate(X, TS, stepper) - integrate(field, X, TS, stepper))
    torch.testing.assert_close(made, cached.plan(TS, stepper).error, rtol=1e-5, atol=1e-9)
