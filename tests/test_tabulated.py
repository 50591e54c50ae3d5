"""The path of a discrete schedule goes through its table, smooth and monotone; its first-order solver is DDIM."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from solvers import DPMSolverPP, Heun, Linear, Tabulated, UniPC, grids, integrate

F64 = torch.float64
T = 200


def scaled_linear(shift=1.0, zero_snr=True, steps=T):
    """CogVideoX's schedules, written out: scaled-linear betas, an SNR shift, zero terminal SNR."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=F64) ** 2).cumprod(0)
    alphas = alphas / (shift + (1 - shift) * alphas)
    if zero_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


TABLES = {
    "zero SNR": scaled_linear(),
    "zero SNR, shift 3": scaled_linear(3.0),
    "noise never pure": scaled_linear(zero_snr=False),
    "linear betas": (1 - torch.linspace(1e-4, 0.02, T, dtype=F64)).cumprod(0),
    "jagged": torch.linspace(0.99, 0.01, T, dtype=F64) + 0.002 * torch.cos(torch.arange(T) * 2.5).double(),
}
over_tables = pytest.mark.parametrize("table", TABLES)
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)


@over_tables
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_the_path_goes_through_the_table(table, dtype, data_at):
    path = Tabulated(TABLES[table], data_at)
    u = ((torch.arange(T) + 1).to(dtype)) / T
    c = path.coefficients(u if data_at == 0 else 1 - u)
    assert c.alpha.dtype == dtype
    tolerance = 1e-12 if dtype == F64 else 3e-6
    torch.testing.assert_close(c.alpha.double(), TABLES[table].sqrt(), rtol=0, atol=tolerance)
    torch.testing.assert_close(c.sigma.double(), (1 - TABLES[table]).sqrt(), rtol=0, atol=tolerance)


def test_pure_noise_and_pure_data_are_exactly_that():
    path = Tabulated(TABLES["zero SNR"])
    noise, data = path.coefficients(1.0), path.coefficients(0.0)
    assert (noise.alpha, noise.sigma, data.alpha, data.sigma) == (0, 1, 1, 0)
    assert path.log_snr(1.0) == -torch.inf
    assert path.log_snr(0.0) == torch.inf


@over_tables
def test_between_timesteps_alpha_falls_and_its_rate_is_its_derivative(table):
    path = Tabulated(TABLES[table])
    u = torch.linspace(0, 1, 20 * T + 1, dtype=F64)
    c = path.coefficients(u)
    assert (c.alpha.diff() < 0).all()
    assert (c.determinant > 0).all()
    h = 1e-7
    inside = u[(u > h) & (u < 1 - h)]
    either = [path.coefficients(inside + side * h) for side in (1, -1)]
    for value, rate in (("alpha", "dalpha"), ("sigma", "dsigma")):
        slope = (getattr(either[0], value) - getattr(either[1], value)) / (2 * h)
        torch.testing.assert_close(slope, getattr(path.coefficients(inside), rate), rtol=1e-4, atol=1e-4)
    nodes = torch.arange(1, T, dtype=F64) / T  # and does not jump at a timestep
    before, after = (path.coefficients(nodes + side * 1e-10).determinant for side in (-1, 1))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@over_tables
def test_the_time_of_a_log_snr_is_found(table):
    path, u = Tabulated(TABLES[table]), torch.linspace(1e-3, 0.999, 77, dtype=F64)
    torch.testing.assert_close(path.time_of(path.log_snr(u)), u, rtol=0, atol=1e-9)


@over_tables
def test_v_prediction_times_the_determinant_is_the_velocity(table):
    path, t = Tabulated(TABLES[table]), 0.4321
    noise, data, c = X, X.flip(0), path.coefficients(t)
    velocity = c.determinant * (c.alpha * noise - c.sigma * data)
    torch.testing.assert_close(velocity, c.dalpha * data + c.dsigma * noise)
    x = path.sample(data, noise, t)
    torch.testing.assert_close(path.data_from_velocity(x, velocity, t), data)


@over_tables
@pytest.mark.parametrize("grid", [F64, torch.float32])
def test_dpm_solver_of_order_one_is_ddim_on_the_timesteps(table, grid):
    """Against DDIM's update of a v-prediction, written out (Song et al. 2021, Eq. 12; Salimans and Ho 2022)."""
    path, alphas = Tabulated(TABLES[table]), torch.cat([torch.ones(1, dtype=F64), TABLES[table]])

    def v(x, n):
        return torch.sin(2 * x) + 0.001 * n

    x = X
    for n, n_next in pairwise(range(T, -1, -20)):
        alpha, sigma, later = alphas[n].sqrt(), (1 - alphas[n]).sqrt(), alphas[n_next]
        out = v(x, n)
        data, noise = alpha * x - sigma * out, sigma * x + alpha * out
        x = later.sqrt() * data + (1 - later).sqrt() * noise
    ts = grids.uniform(T // 20).to(grid)
    ours = integrate(
        lambda x, t: path.coefficients(t).determinant * v(x, round(float(t) * T)), X, ts, DPMSolverPP(path, order=1)
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10 if grid == F64 else 1e-4)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", [DPMSolverPP, UniPC])
def test_second_order_methods_start_at_pure_noise_and_end_at_pure_data(kind, order):
    path = Tabulated(TABLES["zero SNR"])
    ends = [
        integrate(lambda x, t: path.velocity_from_data(x, torch.tanh(x), t), X, grids.uniform(k), kind(path, order))
        for k in (20, 40, 200)
    ]
    assert all(end.isfinite().all() for end in ends)
    near, far = ((end - ends[2]).abs().max() for end in (ends[1], ends[0]))
    assert near < far


def test_the_flow_of_the_velocity_is_the_limit_of_ddim():
    path, ends = Tabulated(TABLES["noise never pure"]), torch.linspace(1, 0.05, 401, dtype=F64)

    def field(x, t):
        return path.velocity_from_data(x, torch.tanh(x), t)

    coarse, fine = (integrate(field, X, ends[::step], DPMSolverPP(path, order=1)) for step in (4, 2))
    flow = integrate(field, X, ends, Heun())
    assert (fine - flow).abs().max() < 0.6 * (coarse - flow).abs().max() < 0.01


def test_paths_of_two_tables_are_two_and_of_one_are_one():
    one, same, other = (Tabulated(TABLES[name]) for name in ("zero SNR", "zero SNR", "linear betas"))
    assert one == same != other
    assert len({one, same, other, Tabulated(TABLES["zero SNR"], 1.0), Linear()}) == 4
    assert len({str(path) for path in (one, same, other)}) == 2
    assert str(DPMSolverPP(one)) != str(DPMSolverPP(other))
    assert len({str(Tabulated(table)) for table in TABLES.values()}) == len(TABLES)


@over_tables
def test_a_table_has_the_same_name_on_machines_that_round_otherwise(table):
    factors = torch.cat([torch.ones(1, dtype=F64), TABLES[table]])
    factors = (factors[1:] / factors[:-1]).float()
    rounded = [factors.cumprod(0), factors.numpy().cumprod(), factors.double().cumprod(0).float()]
    assert any(not torch.equal(torch.as_tensor(one), rounded[2]) for one in rounded[:2])
    assert {repr(Tabulated(torch.as_tensor(one))) for one in rounded} == {repr(Tabulated(TABLES[table]))}


@pytest.mark.parametrize("kind", ["float32", "a list of two axes", "rising", "above one", "one entry"])
def test_a_table_that_is_none_is_named(kind):
    table = {
        "a list of two axes": TABLES["zero SNR"][None],
        "rising": TABLES["zero SNR"].flip(0),
        "above one": torch.tensor([1.0, 0.5]),
        "one entry": torch.tensor([0.5]),
        "float32": TABLES["zero SNR"].float(),
    }[kind]
    if kind == "float32":
        Tabulated(table)
        return
    with pytest.raises(ValueError, match=r"must fall strictly.*scheduler's own table"):
        Tabulated(table)
