"""What the field makes of errors on their way: measured beside a full run, and weighed by plans once rehearsed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, SensitivityProfile, calibrate, rehearse, rms
from sencache.amplification import carried, run_amplified
from sencache.expected import Errors
from sencache.influence import influence
from sencache.plan import expectation, sampler_name
from sencache.schedule import Problem, schedules
from solvers import VP, BrownianPath, DPMSolverPP, Euler, EulerMaruyama, Linear, UniPC, grids, integrate
from tests.flows import rms as rms_64

K = 16
TS = grids.uniform(K, 0.95, 0.05)
X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEPPERS = [Euler(), DPMSolverPP(VP(), 1), DPMSolverPP(VP(), 2), UniPC(Linear())]
over_steppers = pytest.mark.parametrize("stepper", STEPPERS, ids=str)


def pushed_at(field, x, ts, k, size=1e-6):
    """How many times larger a small error along the outputs' bend, made in step k of Euler's method, is in the end."""
    states, outputs = [x], []
    for t, t_next in pairwise(ts):
        outputs.append(field(states[-1], t))
        states.append(states[-1] + (t_next - t) * outputs[-1])
    bend = outputs[k] - 2 * outputs[k - 1] + outputs[k - 2]
    bend = size * bend / rms_64(bend).reshape(-1, *[1] * (x.ndim - 1))
    end = integrate(field, states[k + 1] + bend, ts[k + 1 :]) if k + 1 < len(ts) - 1 else states[-1] + bend
    return rms_64(end - states[-1]) / size


@pytest.mark.parametrize("rate", [-2.0, 0.5, 3.0])
def test_where_all_errors_grow_alike_it_is_by_how_much(rate):
    """dx/dt = a x, each sample with its own a: by 1 + a h in every later step."""
    a = rate * torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[:, None]
    _, found = run_amplified(lambda x, t: a * x, X, TS, Euler())
    step = 1 + a * TS.diff()
    later = torch.cat([step[:, 1:].flip(1).cumprod(1).flip(1), torch.ones_like(a)], 1)
    np.testing.assert_allclose(found[:, 2:], later[:, 2:], rtol=1e-9)
    np.testing.assert_allclose(found[:, :3], found[:, 2:3].expand(-1, 3), rtol=1e-12)  # before outputs bend


@over_steppers
def test_what_the_stepper_makes_of_an_error_is_not_counted(stepper):
    """An error in a field of time alone goes on as the stepper carries states on, which its weights say."""
    _, found = run_amplified(lambda x, t: torch.cos(9 * t) + 0 * x, X, TS, stepper)
    np.testing.assert_allclose(found, 1, rtol=1e-12)


@over_steppers
def test_the_full_run_is_the_full_run(stepper):
    field = lambda x, t: torch.sin(3 * x + t)  # noqa: E731
    assert torch.equal(run_amplified(field, X, TS, stepper)[0], integrate(field, X, TS, stepper))


def test_noise_is_the_same_beside():
    stepper = EulerMaruyama(Linear(), BrownianPath(X, TS, torch.Generator().manual_seed(0)))
    field = lambda x, t: -2 * x + torch.cos(9 * t)  # noqa: E731
    end, found = run_amplified(field, X, TS, stepper)
    assert torch.equal(end, integrate(field, X, TS, stepper))
    np.testing.assert_allclose(found, run_amplified(field, X, TS, stepper.linear)[1], rtol=1e-6)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=str)
def test_on_a_mixture_it_is_within_a_factor_of_what_single_errors_become(path):
    """Of errors made in the first third, which differ tenfold between samples; ranks of samples agree."""
    field = GaussianMixture.load("benchmarks/fields/gmm.safetensors", path)
    ts = grids.uniform(40, 1.0, 0.01)
    x = torch.randn(48, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, found = run_amplified(field, x, ts, Euler())
        alone = torch.stack([pushed_at(field, x, ts, k, size=1e-3) for k in (5, 9, 13)], 1)
    ratio = (found[:, [5, 9, 13]] / alone).log()
    assert ratio.median().abs() < np.log(3)
    assert torch.corrcoef(torch.stack([found[:, 9].log(), alone[:, 1].log()]))[0, 1] > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_told_in_low_precision(dtype):
    _, found = run_amplified(lambda x, t: (-2 * x.double() * (1 + t)).to(x), X.to(dtype), TS, Euler())
    _, exact = run_amplified(lambda x, t: -2 * x * (1 + t), X, TS, Euler())
    np.testing.assert_allclose(found, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_what_cannot_be_measured_carries_nothing_more():
    _, still = run_amplified(lambda x, t: 0 * x, X, TS, Euler())
    assert torch.equal(still, torch.ones(5, K, dtype=torch.float64))
    asked = []

    def breaking(x, t):  # beside the full run: the seventh call, of the fifth step, and one sample
        asked.append(x)
        broken = torch.ones(5, 1, dtype=torch.float64)
        broken[2] = 0 if len(asked) == 7 else 1
        return -2 * x / broken

    end, lost = run_amplified(breaking, X, TS, Euler())
    assert torch.equal(end, integrate(lambda x, t: -2 * x, X, TS))
    step = 1 + 2 / K * float(TS[0] - TS[-1])
    np.testing.assert_allclose(lost[1, 2:], step ** np.arange(K - 3, -1, -1), rtol=1e-9)
    np.testing.assert_allclose(lost[2, 2:4], lost[1, 2:4] / step, rtol=1e-9)
    np.testing.assert_allclose(lost[2, 4:], lost[1, 4:], rtol=1e-9)


# what plans make of it


def posed(carried=1.0, seed=0, n=11, **more):
    generator = torch.Generator().manual_seed(seed)
    size, rate, phase = torch.rand(3, 4, 3, 7, generator=generator, dtype=torch.float64)
    times, gain = influence(Euler(), TS[: n + 1])
    outputs = torch.stack([(size * torch.cos(9 * rate * float(t) + 6 * phase)).sum(0) for t in times])
    gram = torch.einsum("isd,jsd->sij", outputs, outputs) / 7
    return Problem(times.numpy(), gain.numpy(), gram.numpy(), "linear", "t", True, carried=carried, **more)


def test_a_gap_leaves_as_many_times_more_as_its_errors_are_made_of_on_average():
    weights = np.linspace(5, 0.5, 11)
    plain, weighed = posed(), posed(weights)
    for before, ref, end in ((-1, 0, 4), (0, 3, 5), (2, 6, 11)):
        mean = weights[ref:end].mean()
        np.testing.assert_allclose(weighed.costs()[before, ref, end], mean**2 * plain.costs()[before, ref, end])


@pytest.mark.parametrize("alpha_x", [0.0, 1.5])
def test_weighed_paths_are_the_shortest_of_all_schedules(alpha_x):
    problem = posed(np.linspace(5, 0.5, 11) ** 2, alpha_x=alpha_x)
    cost, size = problem.costs(), len(problem.times)

    def total(nodes):
        return sum(cost[gap] for gap in zip([-1, *nodes[:-1]], nodes, [*nodes[1:], size], strict=True))

    for n, nodes in enumerate(schedules(problem, 7), 1):
        assert total(nodes.tolist()) == pytest.approx(min(total([0, *r]) for r in combinations(range(1, size), n - 1)))


def test_equal_weights_change_no_plan_and_all_errors_alike():
    for seed in range(4):
        plain, weighed = Errors(posed(seed=seed, alpha_x=0.8)), Errors(posed(3.0, seed=seed, alpha_x=0.8))
        nodes = schedules(plain.problem, 5)[-1]
        assert np.array_equal(nodes, schedules(weighed.problem, 5)[-1])
        np.testing.assert_allclose(weighed.of(nodes), 9 * plain.of(nodes))
        assert np.array_equal(plain.polished(nodes), weighed.polished(nodes))
        assert plain.growth(nodes) == weighed.growth(nodes)


def test_where_early_errors_become_larger_more_is_evaluated_early_and_no_other_error_expected():
    field = lambda x, t: torch.sin(4 * x + 7 * t)  # noqa: E731
    profile = calibrate(field, X, TS, progress=False)
    facts = {**profile.facts, "rehearsed": sampler_name(Euler(), TS)}
    early = replace(profile, amplified=torch.exp(6 * TS[:-1]).expand(3, K), facts=facts)
    late = replace(profile, amplified=torch.exp(6 * (1 - TS[:-1])).expand(3, K), facts=facts)
    plans = [CachedField(field, one, nfe=6).plan(TS) for one in (early, profile, late)]
    middle = [float(plan.nodes.double().mean()) for plan in plans]
    assert middle[0] < middle[1] < middle[2]
    for plan in plans:
        times, gain = influence(Euler(), TS)
        felt = {"alpha_x": profile.alpha_x.numpy(), "samples_x": profile.samples_x.numpy()}
        bare = Problem(times.numpy(), gain.numpy(), profile.gram.numpy(), plan.reuse, plan.variable, True, **felt)
        expected = expectation(bare, plan.nodes.numpy(), float(profile.size.median()))
        assert plan.relative_error == pytest.approx(expected.relative_error)


def test_what_one_sample_in_twenty_exceeds_counts():
    drawn = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    amplified = torch.exp(torch.tensor([1.0, 2.0]) + torch.tensor([0.3, 0.8]) * drawn)
    known = amplified.quantile(0.95, dim=0)
    np.testing.assert_allclose(carried(amplified), known, rtol=0.05)
    few = np.log([carried(part) for part in amplified.split(8)])
    np.testing.assert_allclose(np.exp(few.mean(0)), known, rtol=0.1)


def test_one_sample_counts_as_it_is():
    np.testing.assert_allclose(carried(torch.tensor([[4.0, 0.25, 1e9, 0.0, torch.inf]])), [4, 1, 1e4, 1, 1e4])
    assert carried(torch.tensor([[1e4], [1.0]])).max() == 1e4


def test_samples_that_make_errors_smaller_make_no_weight():
    """However much smaller: what is asked is how much larger they can become in others."""
    np.testing.assert_allclose(carried(torch.tensor([[1.0], [1.0], [1.0], [1e-4]])), 1)
    np.testing.assert_allclose(
        carried(torch.tensor([[2.0], [2.0], [1.0]])), carried(torch.tensor([[2.0], [2.0], [1e-3]]))
    )


def test_weights_are_of_the_grid_and_the_stepper_that_were_rehearsed():
    field = lambda x, t: torch.sin(4 * x + 7 * t)  # noqa: E731
    profile = calibrate(field, X, TS, progress=False)
    facts = {**profile.facts, "rehearsed": sampler_name(Euler(), TS), "rehearsed_ts": TS.tolist()}
    known = replace(profile, amplified=torch.exp(6 * TS[:-1]).expand(3, K), facts=facts)
    for ts, stepper, weighed in ((TS, Euler(), True), (TS.float(), Euler(), True), (TS[:-2], Euler(), False)):
        plans = [CachedField(field, one, nfe=6).plan(ts, stepper).nodes for one in (profile, known)]
        assert torch.equal(*plans) != weighed
    plans = [CachedField(field, one, nfe=6).plan(TS, UniPC(Linear())).nodes for one in (profile, known)]
    assert torch.equal(*plans)


def test_what_cannot_be_planned_is_refused_before_anything_is_paid():
    def costly(x, t):
        raise AssertionError

    profile = replace(calibrate(lambda x, t: -x, X, TS, progress=False), gram=None)
    with pytest.raises(ValueError, match="no Gram matrix"):
        rehearse(costly, profile, X, TS)


def test_a_rehearsal_measures_it_and_keeps_it(tmp_path):
    field = lambda x, t: torch.sin(4 * x + 7 * t)  # noqa: E731
    profile = calibrate(field, X, TS, progress=False)
    known = rehearse(field, profile, X + 0.1, TS, budgets=(4, 8))
    assert torch.equal(known.amplified, run_amplified(field, X + 0.1, TS, Euler())[1][:1])
    assert known.factors.shape == (2, 4)
    assert known.ratios.shape == (2, 4, K)
    known.save(tmp_path / "p.safetensors")
    again = SensitivityProfile.load(tmp_path / "p.safetensors")
    assert torch.equal(again.amplified, known.amplified)
    plans = [CachedField(field, one, nfe=4).plan(TS).nodes for one in (known, again)]
    assert torch.equal(*plans)
    assert rehearse(field, known, X[:3], TS, budgets=(4,)).amplified is None


def test_where_errors_become_smaller_plans_stay_as_they_are():
    stiff = lambda x, t: 8 * (x - torch.cos(5 * t))  # noqa: E731
    profile = calibrate(stiff, X, TS, progress=False)
    known = rehearse(stiff, profile, X + 0.1, TS, budgets=(6, 8, 10))
    assert known.amplified.amax() == 1
    assert known.amplified.amin() < 0.1
    for nfe in (6, 8, 10):
        plans = [CachedField(stiff, one, nfe=nfe).plan(TS).nodes for one in (profile, known)]
        assert torch.equal(*plans)


def test_where_weights_lead_to_unstable_gaps_plans_do_without():
    """Some elements carry early errors on, others are stiff: the plan that weighs early errors holds, and errs more."""

    def mixed(x, t):
        carrying, stiff = x[:, :2], x[:, 2:]
        early = -8 * carrying * (torch.as_tensor(t) > 0.5) + torch.cos(20 * t + carrying)
        return torch.cat([early, 12 * (stiff - torch.cos(5 * t))], 1)

    ts = grids.uniform(40, 0.95, 0.05)
    start = [torch.randn(n, 7, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (8, 32, 64)]
    profile = calibrate(mixed, start[0], ts, progress=False)
    known = rehearse(mixed, profile, start[1], ts, budgets=(17, 18, 24))
    assert known.amplified.amax() > 3
    full = integrate(mixed, start[2], ts)
    for nfe in (17, 18, 24):
        bare, weighed = (CachedField(mixed, one, nfe=nfe) for one in (profile, known))
        assert weighed.plan(ts).reuse == bare.plan(ts).reuse == "linear"
        errors = [rms(one.integrate(start[2], ts) - full).quantile(0.9) for one in (bare, weighed)]
        assert errors[1] < 1.3 * errors[0]


def test_errors_that_grow_beyond_all_numbers_still_leave_plans():
    field = lambda x, t: 1e3 * torch.sin(x + 7 * t)  # noqa: E731
    profile = calibrate(field, X, TS, progress=False)
    facts = {**profile.facts, "rehearsed": sampler_name(Euler(), TS)}
    for known in (torch.full((3, K), torch.inf), torch.logspace(400, 0, K, dtype=torch.float64).expand(3, K)):
        plan = CachedField(field, replace(profile, amplified=known, facts=facts), nfe=6).plan(TS)
        assert len(set(plan.nodes.tolist())) == 6
    equal = CachedField(field, replace(profile, amplified=torch.full((3, K), torch.inf), facts=facts), nfe=6)
    assert torch.equal(equal.plan(TS).nodes, CachedField(field, profile, nfe=6).plan(TS).nodes)


@pytest.mark.parametrize(("samples", "teachers"), [(3, 0), (4, 1), (30, 7), (40, 8), (70, 8), (100, 12)])
def test_a_quarter_teaches_up_to_eight_or_an_eighth_of_many(samples, teachers):
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = lambda x, t: torch.sin(4 * x + 7 * t)  # noqa: E731
    known = rehearse(field, calibrate(field, X[:, :2], TS, progress=False), x, TS, budgets=(8,))
    assert teachers == (0 if known.amplified is None else len(known.amplified))
    assert known.factors.shape == (1, samples - teachers)


def test_who_teaches_plans_promises_nothing():
    """Of 40 samples the first eight are kept for weights, and the factors are of the other 32 alone."""
    field = lambda x, t: torch.sin(4 * x + 7 * t)  # noqa: E731
    profile = calibrate(field, X, TS, progress=False)
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    known = rehearse(field, profile, x, TS, budgets=(5, 8))
    assert known.amplified.shape == (8, K)
    full = integrate(field, x[8:], TS)
    for n, factors in zip((5, 8), known.factors, strict=True):
        cached = CachedField(field, known, nfe=n)
        error = rms(cached.integrate(x[8:], TS) - full) / rms(full)
        torch.testing.assert_close(factors, error / cached.plan(TS).relative_error)
