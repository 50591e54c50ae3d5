"""A sampler that only calls gets its corrections folded into the velocities it is handed."""

from itertools import pairwise

import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, calibrate, rms
from solvers import VP, DPMSolverPP, Euler, EulerMaruyama, Linear, WhiteNoise, grids, integrate

FILE = "benchmarks/fields/gmm.safetensors"


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
