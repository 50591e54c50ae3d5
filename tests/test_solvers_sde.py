"""Euler-Maruyama keeps the path's marginals whatever the diffusion, and Brownian motion is one motion on every grid."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from solvers import VP, BrownianPath, Cosine, Euler, EulerMaruyama, Linear, WhiteNoise, grids, integrate, trajectory
from tests.flows import GaussianFlow, Nonlinear, rms

F64 = torch.float64
DIFFUSIONS = ["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
ALPHA = 1e-3 / 200  # one in a thousand over fewer than two hundred z-tests


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def times(data_at, *u):
    """Times of the path whose clock is 0 at the data."""
    return [abs(data_at - v) for v in u]


def assert_standard_normal(z):
    """z is one draw of N(0, 1)."""
    assert abs(float(z)) < stats.norm.isf(ALPHA / 2)


def assert_gaussian(x, mean, std):
    """The sample mean and variance of independent x are those of N(mean, std^2)."""
    assert_standard_normal((x.mean() - mean) / std * x.numel() ** 0.5)
    assert_standard_normal((((x - mean) / std).square().mean() - 1) * (x.numel() / 2) ** 0.5)


def sample(flow, t, count, g):
    mean, std = flow.moments(t)
    return mean + std * torch.randn(count, 1, generator=g, dtype=F64)


@pytest.mark.parametrize("toward", ["data", "noise"])
@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_marginals_do_not_depend_on_the_diffusion(diffusion, data_at, toward):
    flow, g = GaussianFlow(Linear(data_at)), generator(1)
    start, end = times(data_at, *((0.9, 0.05) if toward == "data" else (0.05, 0.9)))
    stepper = EulerMaruyama(flow.path, WhiteNoise(g), diffusion)
    x = integrate(flow, sample(flow, start, 8000, g), grids.uniform(300, start, end), stepper)
    assert_gaussian(x, *flow.moments(end))


@pytest.mark.parametrize("norm", [0.3, 2.0])
@pytest.mark.parametrize("path", [Cosine, VP])
def test_marginals_depend_neither_on_the_path_nor_on_the_norm(path, norm):
    flow, g = GaussianFlow(path()), generator(2)
    x = sample(flow, 0.9, 8000, g)
    x = integrate(flow, x, grids.uniform(300, 0.9, 0.05), EulerMaruyama(flow.path, WhiteNoise(g), norm=norm))
    assert_gaussian(x, *flow.moments(0.05))


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", [Linear, Cosine, VP])
def test_sbdm_is_the_exact_time_reversal(path, data_at):
    """Start and end are correlated as the forward process has them: x_s = (alpha_s / alpha_t) x_t + fresh noise."""
    flow, g = GaussianFlow(path(data_at)), generator(3)
    start, end = times(data_at, 0.6, 0.2)
    x = sample(flow, start, 8000, g)
    y = integrate(flow, x, grids.uniform(300, start, end), EulerMaruyama(flow.path, WhiteNoise(g), "SBDM"))
    alpha = [flow.path.coefficients(t).alpha for t in (start, end)]
    std = [flow.moments(t)[1] for t in (start, end)]
    expected = alpha[0] / alpha[1] * std[1] / std[0]
    observed = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]
    assert_standard_normal((observed.atanh() - expected.atanh()) * (len(x) - 3) ** 0.5)  # Fisher's z


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_diffusions_are_sits_table(t, data_at):
    """SiT's diffusions on its linear path, in its clock: data at 1, alpha = t, sigma = 1 - t; w is 2 norm of them."""
    table = {
        "constant": 1,
        "SBDM": (1 - t) ** 2 / t + (1 - t),
        "sigma": 1 - t,
        "linear": 1 - t,
        "decreasing": 0.25 * (math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": math.sin(math.pi * t) ** 2,
    }
    clock = torch.tensor(abs(1 - data_at - t), dtype=F64)
    for diffusion in DIFFUSIONS:
        stepper = EulerMaruyama(Linear(data_at), WhiteNoise(generator()), diffusion, norm=1.5)
        assert stepper.w(clock).item() == pytest.approx(3 * table[diffusion])


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_without_diffusion_it_is_euler(diffusion, data_at):
    path, x = Cosine(data_at), torch.randn(4, 6, generator=generator(), dtype=F64)
    ts = grids.uniform(20, *times(data_at, 0.95, 0.05))
    stepper = EulerMaruyama(path, WhiteNoise(generator()), diffusion, norm=0.0)
    for ours, euler in zip(
        trajectory(GaussianFlow(path), x, ts, stepper), trajectory(GaussianFlow(path), x, ts, Euler()), strict=True
    ):
        assert torch.equal(ours.x, euler.x)
        assert ours.weights == euler.weights


def test_a_run_is_reproduced_from_its_generator():
    path, ts = Linear(), grids.uniform(20, 0.95, 0.05)
    x = torch.randn(4, 6, generator=generator(), dtype=F64)

    def run(seed):
        return integrate(Nonlinear(), x, ts, EulerMaruyama(path, WhiteNoise(generator(seed))))

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise = WhiteNoise(generator())
    BrownianPath(torch.zeros(2, 3), grids.uniform(5), generator())
    integrate(Nonlinear(), torch.zeros(2, 3), grids.uniform(5, 0.9, 0.1), EulerMaruyama(Linear(), noise))
    assert torch.equal(torch.get_rng_state(), before)


@given(
    fine=st.lists(st.floats(0, 1), min_size=4, max_size=30, unique_by=lambda t: round(t, 3)),
    falling=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_a_coarse_increment_is_the_sum_of_the_fine_ones_inside(fine, falling, data):
    ts = torch.tensor(sorted(fine, reverse=falling), dtype=F64)
    x = torch.zeros(2, 3, dtype=F64)
    brownian = BrownianPath(x, ts, generator())
    inner = data.draw(st.sets(st.integers(1, len(ts) - 2)))
    nodes = [0, *sorted(inner), len(ts) - 1]
    for i, j in pairwise(nodes):
        parts = sum(brownian(x, a, b) for a, b in pairwise(ts[i : j + 1]))
        torch.testing.assert_close(brownian(x, ts[i], ts[j]), parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 5, 25])
@pytest.mark.parametrize(
    "ts", [grids.uniform(50), grids.uniform(50, 0.0, 1.0), grids.logarithmic(50)], ids=["falling", "rising", "log"]
)
def test_increments_are_independent_with_the_variance_of_their_length(ts, stride):
    x = torch.zeros(2000, 3, dtype=F64)
    brownian, coarse = BrownianPath(x, ts, generator(7)), ts[::stride]
    units = torch.stack([brownian(x, a, b) / (b - a).abs().sqrt() for a, b in pairwise(coarse)])  # (K / stride, B, d)
    assert_gaussian(units, 0.0, 1.0)
    products = units[1:] * units[:-1]
    assert_standard_normal(products.mean() * products.numel() ** 0.5)
    samples = units[:, 1:] * units[:, :-1]
    assert_standard_normal(samples.mean() * samples.numel() ** 0.5)


def test_white_noise_has_the_variance_of_its_interval():
    x = torch.zeros(20_000, 2, dtype=F64)
    for t, t_next in ((0.7, 0.3), (0.3, 0.7)):
        t, t_next = torch.tensor([t, t_next], dtype=F64)
        assert_gaussian(WhiteNoise(generator(8))(x, t, t_next), 0.0, 0.4**0.5)


@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_one_brownian_path_brings_25_and_250_steps_together_and_two_do_not(data_at):
    path = Linear(data_at)
    flow, fine = GaussianFlow(path), grids.uniform(250, *times(data_at, 0.95, 0.05))
    x = sample(flow, fine[0], 500, generator(9))
    shared, other = (BrownianPath(x, fine, generator(seed)) for seed in (10, 11))
    end = integrate(flow, x, fine, EulerMaruyama(path, shared))

    def gap(stride, noise):
        return rms(integrate(flow, x, fine[::stride], EulerMaruyama(path, noise)) - end).mean()

    together, apart = ([gap(stride, noise) for stride in (10, 5, 2)] for noise in (shared, other))
    assert together[0] > 1.5 * together[1] > 3 * together[2]  # 25, 50 and 125 steps converge on 250
    assert together[0] < apart[0] / 5
    assert min(apart) > 0.8 * max(apart)


def test_a_generator_will_do_for_white_noise():
    ts, x = grids.uniform(8, 0.9, 0.1), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ends = [
        integrate(lambda x, t: -x, x, ts, EulerMaruyama(Linear(), noise))
        for noise in (torch.Generator().manual_seed(1), WhiteNoise(torch.Generator().manual_seed(1)))
    ]
    assert torch.equal(*ends)
