"""A sampler that only calls gets its corrections folded into the velocities it is handed."""

from itertools import pairwise

import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, calibrate, rms
from solvers import (
    VP,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    TorchDiffEq,
    UniPC,
    WhiteNoise,
    grids,
    integrate,
)

FILE = "benchmarks/fields/gmm.safetensors"
RK4 = TorchDiffEq("rk4")


def noise(samples, seed):
    return torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["data at 0", "data at 1"])
def case(request):
    path = Linear(data_at=request.param)
    field = GaussianMixture.load(FILE, path, torch.float64)
    ts = grids.uniform(24, 1 - request.param, request.param)
    return path, field, ts, calibrate(field, noise(4, 0), ts, progress=False)


@pytest.mark.parametrize("stepper", [lambda path: Euler(), lambda path: DPMSolverPP(path, 1)], ids=["Euler", "DDIM"])
def test_folding_is_correcting_where_a_step_has_one_output(case, stepper):
    path, field, ts, profile = case
    cached, method = CachedField(field, profile, nfe=9), stepper(path)
    corrected = cached.integrate(noise(3, 1), ts, method)
    with cached.run(ts, method) as run:
        folded = integrate(run, noise(3, 1), ts, method)
    assert torch.allclose(folded, corrected, rtol=0, atol=1e-12)


def test_folding_takes_the_noise_for_what_it_is():
    path, ts = VP(), grids.uniform(24, 0.999, 0.01)
    field = GaussianMixture.load(FILE, path, torch.float64)

    def stepper():
        return EulerMaruyama(path, WhiteNoise(torch.Generator().manual_seed(2)))

    cached = CachedField(field, calibrate(field, noise(4, 0), ts, stepper(), progress=False), nfe=9)
    corrected = cached.integrate(noise(3, 1), ts, stepper())
    with cached.run(ts, stepper()) as run:
        folded = integrate(run, noise(3, 1), ts, stepper())
    assert torch.allclose(folded, corrected, rtol=0, atol=1e-11)


def test_a_loop_of_ones_own_is_corrected_too(case):
    _, field, ts, profile = case
    cached = CachedField(field, profile, nfe=9)
    x = noise(3, 1)
    with cached.run(ts):
        for t, t_next in pairwise(ts):
            x = x + (t_next - t) * cached(x, t)
    assert torch.allclose(x, cached.integrate(noise(3, 1), ts), rtol=0, atol=1e-12)


def test_without_the_grid_nothing_is_corrected_and_that_shows(case):
    _, field, ts, profile = case
    full, cached = integrate(field, noise(3, 1), ts), CachedField(field, profile, nfe=9)
    with cached.run() as run:
        plain = integrate(run, noise(3, 1), ts)
    assert rms(plain - full).median() > rms(cached.integrate(noise(3, 1), ts) - full).median()


def test_a_query_off_the_grid_owes_nothing(case):
    _, field, ts, profile = case
    cached = CachedField(field, profile, tolerance=torch.inf, max_reuses=1)
    with cached.run(ts) as run:
        for t in ts[:4] + 0.3 * (ts[1] - ts[0]):
            v = run(noise(3, 1), t)
    assert v.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_time_that_was_rounded_is_the_grids_own(case, dtype):
    _, field, ts, profile = case
    full, cached = integrate(field, noise(3, 1), ts), CachedField(field, profile, nfe=9)
    x, exact = noise(3, 1), cached.integrate(noise(3, 1), ts)
    with cached.run(ts):
        for t, t_next in pairwise(ts):
            x = x + (t_next - t) * cached(x, t.to(dtype))
    rounded = integrate(lambda x, t: field(x, t.to(dtype)), noise(3, 1), ts)
    assert rms(x - rounded).median() < 1.5 * rms(exact - full).median()


def steered(x, t, c):
    return -x * (1 + c * t)


def steered_alone(c):
    return lambda x, t: steered(x, t, c)


def test_each_conditioning_is_repaid_its_own():
    ts = grids.uniform(20)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    profile = calibrate(steered_alone(1.0), x, ts, progress=False)

    def two(field_a, field_b):
        a = b = x
        for t, t_next in pairwise(ts):
            a, b = a + (t_next - t) * field_a(a, t), b + (t_next - t) * field_b(b, t)
        return a, b

    both, one, other = (
        CachedField(steered, profile, nfe=7),
        *(CachedField(steered_alone(c), profile, nfe=7) for c in (1.0, 3.0)),
    )
    with both.run(ts) as run, one.run(ts) as first, other.run(ts) as second:
        together = two(lambda x, t: run(x, t, 1.0), lambda x, t: run(x, t, 3.0))
        apart = two(first, second)
    for ours, theirs in zip(together, apart, strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_loop_owes_nothing_of_the_first(case):
    _, field, ts, profile = case
    cached = CachedField(field, profile, tolerance=torch.inf, max_reuses=3)

    def loop(run, steps):
        x = noise(3, 1)
        for t, t_next in list(pairwise(ts))[:steps]:
            x = x + (t_next - t) * run(x, t)
        return x

    for steps in (18, 24):
        with cached.run(ts) as run:
            loop(run, steps)
            again = loop(run, 24)
        with cached.run(ts) as run:
            assert torch.equal(again, loop(run, 24))


def test_what_is_asked_twice_is_answered_alike(case):
    _, field, ts, profile = case
    cached, x = CachedField(field, profile, nfe=9), noise(3, 1)
    with cached.run(ts) as run:
        for t, t_next in pairwise(ts):
            v = run(x, t)
            assert torch.equal(run(x, t), v)
            x = x + (t_next - t) * v
    assert torch.allclose(x, cached.integrate(noise(3, 1), ts), rtol=0, atol=1e-12)
    assert (cached.report.evaluations == 9).all()


@pytest.mark.parametrize("stepper", [Heun(), DPMSolverPP(Linear()), UniPC(Linear()), UniPC(Linear(), 1), RK4], ids=str)
def test_a_stepper_of_several_outputs_is_not_folded(stepper):
    field = GaussianMixture.load(FILE, Linear())
    ts = grids.uniform(8)
    cached = CachedField(field, calibrate(field, noise(2, 0).float(), ts, progress=False), nfe=4)
    with (
        pytest.raises(ValueError, match="folded into bare calls for steppers of one output a step"),
        cached.run(ts, stepper),
    ):
        pass


def test_containers_are_folded_part_by_part(case):
    _, field, ts, profile = case
    x = noise(3, 1)
    plain = CachedField(field, profile, nfe=9)
    pair = CachedField(lambda x, t: (field(x, t), -field(x, t)), profile, nfe=9)
    with plain.run(ts) as one, pair.run(ts) as two:
        for t, t_next in pairwise(ts):
            v, (a, b) = one(x, t), two(x, t)
            assert torch.equal(a, v)
            assert torch.equal(b, -v)
            x = x + (t_next - t) * v


@pytest.mark.parametrize("payload", ["output", "difference"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_one_trajectory_owed_is_not_owed_by_one_of_another_shape(payload, fails):
    """Not even if its first evaluation raises, as for lack of memory, and is asked again."""
    ts, wide = grids.uniform(12), torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    failed = []

    def field(x, t):
        if fails and x.shape[1] == 4 and not failed:
            failed.append(t)
            raise RuntimeError
        return torch.sin(3 * t) - x

    def walk(cached, x):
        for t, t_next in pairwise(ts):
            x = x + (t_next - t) * cached(x, t)
        return x

    cached = CachedField(field, tolerance=0.1, payload=payload)
    with cached.run(ts):
        for t in ts[:7]:
            cached(wide, t)
        assert cached.report.trace[-1].reused.any()  # a gap is open
        if fails:
            with pytest.raises(RuntimeError):
                cached(wide[:, :4], ts[0])
        second = walk(cached, wide[:, :4])
    with cached.run(ts):
        assert torch.equal(second, walk(cached, wide[:, :4]))
    assert cached.report.reuses.all()
