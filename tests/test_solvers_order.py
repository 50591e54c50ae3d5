"""Every stepper converges at the order it states: the slope of log error against log step, by regression."""

from functools import cache

import numpy as np
import pytest
import torch

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
    grids,
    integrate,
)
from tests.flows import GaussianFlow, Nonlinear, linear_flow, rms

STDS = torch.linspace(0.3, 1.2, 6, dtype=torch.float64)  # of many sizes, so that no error changes its sign unseen
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PATHS = [Linear, Cosine, VP]

PROBLEMS = {
    "linear, rising": (linear_flow(), 0.0, 1.0),
    "linear, falling": (linear_flow(), 1.0, 0.0),
    "nonlinear, rising": (Nonlinear(), 0.0, 1.0),
    "nonlinear, falling": (Nonlinear(), 1.0, 0.0),
    "Gaussian, data at 0": (GaussianFlow(Cosine(0.0), 0.7, STDS), 0.95, 0.05),
    "Gaussian, data at 1": (GaussianFlow(Cosine(1.0), 0.7, STDS), 0.05, 0.95),
}
GRIDS = {
    "uniform": grids.uniform,
    "shifted": lambda steps, start, end: grids.shifted(steps, 2.0, start, end),
}


def uneven(steps, start, end):
    """Long and short steps in turn, 4 : 2, so that a method must mind the ratio of neighbours (steps even)."""
    ts = grids.uniform(steps, start, end)
    ts[1::2] += (ts[1] - ts[0]) / 3
    return ts


FIXED = [Euler(), Heun(), *(TorchDiffEq(method) for method in ("euler", "midpoint", "heun2", "heun3", "rk4"))]


@cache
def exact(problem, start, end):
    return PROBLEMS[problem][0].solution(X, start, end)


def observed_order(error, steps):
    """The regression's slope of log `error(k)` against log(1 / k)."""
    return -np.polyfit(np.log(steps), np.log([error(k) for k in steps]), 1)[0]


def distance(x, y):
    return rms(x - y).max().item()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("stepper", FIXED, ids=lambda s: getattr(s, "method", type(s).__name__))
def test_ode_steppers_converge_at_their_order(stepper, problem, grid):
    field, start, end = PROBLEMS[problem]

    def error(k):
        ts = GRIDS[grid](k, start, end)
        return distance(integrate(field, X, ts, stepper), exact(problem, ts[0].item(), ts[-1].item()))

    assert observed_order(error, [32, 64, 128]) == pytest.approx(stepper.order, abs=0.2)


@pytest.mark.parametrize("grid", [grids.uniform, uneven, grids.log_snr, grids.karras])
@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_converges_at_its_order(order, path, data_at, grid):
    path = path(data_at)
    field, stepper = GaussianFlow(path, 0.7, STDS), DPMSolverPP(path, order)
    noisy, clean = (0.95, 0.05) if data_at == 0 else (0.05, 0.95)
    end = field.solution(X, noisy, clean)

    def error(k):
        ends = (noisy, clean) if grid in (grids.uniform, uneven) else (path, noisy, clean)
        return distance(integrate(field, X, grid(k, *ends), stepper), end)

    assert observed_order(error, [32, 64, 128]) == pytest.approx(stepper.order, abs=0.2)


@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_2m_is_second_order_up_to_a_logarithm_from_pure_noise_to_pure_data(data_at):
    """Near noise log(1 / t) never gets fine: step j of K leaves 1 / (j K^2), together log K / K^2."""
    path = Linear(data_at)
    field, stepper = GaussianFlow(path, 0.7, STDS), DPMSolverPP(path)
    noisy, clean = 1 - data_at, data_at
    end = field.solution(X, noisy, clean)

    def error(k):
        return distance(integrate(field, X, grids.uniform(k, noisy, clean), stepper), end) / np.log(k)

    assert observed_order(error, [128, 256, 512]) == pytest.approx(stepper.order, abs=0.2)


@pytest.mark.parametrize("toward", ["data", "noise"])
@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_euler_maruyama_converges_strongly(data_at, toward):
    """Its strong order is 1/2 in general and 1 where, as here, the noise does not depend on the state."""
    path = Linear(data_at)
    noisy, clean = (0.9, 0.1) if data_at == 0 else (0.1, 0.9)
    fine = grids.uniform(1024, *((noisy, clean) if toward == "data" else (clean, noisy)))
    x = X[:1].expand(256, -1)
    stepper = EulerMaruyama(path, BrownianPath(x, fine, torch.Generator().manual_seed(1)))
    field = GaussianFlow(path, 0.7, STDS)
    end = integrate(field, x, fine, stepper)

    def error(k):
        return rms(integrate(field, x, fine[:: 1024 // k], stepper) - end).mean().item()

    observed = observed_order(error, [8, 16, 32, 64])
    assert observed >= stepper.order
    assert observed == pytest.approx(1, abs=0.15)
