"""A full run's own distance from the ODE's solution is told within a factor of 2, and the advice made of it holds."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from benchmarks.shipped import FIELDS
from sencache import CachedField, calibrate
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
)
from tests.flows import GaussianFlow, Nonlinear, linear_flow, rms

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FLOWS = {
    "Gaussian": (GaussianFlow(Linear()), 1.0, 0.0),
    "Gaussian from the data's side": (GaussianFlow(Linear(data_at=1.0)), 0.0, 1.0),
    "linear": (linear_flow(16, 1), 0.0, 1.0),
    "nonlinear": (Nonlinear(), 0.0, 1.0),
}


class Decay:
    def __call__(self, x, t):
        return -x

    def solution(self, x0, t0, t1):
        return math.exp(t0 - t1) * x0


FLOWS["v = -x"] = (Decay(), 0.0, 1.0)


def told(field, ts, stepper, x=X, nfe=3):
    profile = calibrate(field, x, ts, stepper, secants=False, progress=False)
    return CachedField(field, profile, nfe=nfe).plan(ts, stepper).discretisation


def off(end, truth):
    return float((rms(end - truth) / rms(truth)).median())


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("steps", [10, 25, 60])
@pytest.mark.parametrize("method", ["Euler", "DDIM", "torchdiffeq"])
def test_the_error_of_the_full_run_is_told_within_a_factor_of_two(name, steps, method):
    flow, start, end = FLOWS[name]
    ddim = DPMSolverPP(Linear(data_at=end), 1)  # which runs toward the data
    stepper = {"Euler": Euler(), "DDIM": ddim, "torchdiffeq": TorchDiffEq("euler")}[method]
    ts = grids.uniform(steps, start, end)
    true = off(integrate(flow, X, ts, stepper), flow.solution(X, start, end))
    assert true / 2 < told(flow, ts, stepper) < 2 * true


@pytest.fixture(scope="module")
def mixture():
    """The mixture of Gaussians, its initial states, a grid, a profile on other states, and the solution."""
    field, ts = GaussianMixture.load(FIELDS / "gmm.safetensors", Linear()), grids.uniform(50)
    x = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    profile = calibrate(field, x[:8], ts, progress=False)
    return field, x[8:], ts, profile, integrate(field, x[8:], ts[[0, -1]], TorchDiffEq(rtol=1e-5, atol=1e-5))


def test_the_error_of_the_full_run_is_told_on_the_mixture(mixture):
    field, x, ts, profile, truth = mixture
    true = off(integrate(field, x, ts), truth)
    assert true / 2 < CachedField(field, profile, nfe=20).plan(ts).discretisation < 2 * true


@pytest.mark.parametrize("nfe", [25, 15, 10])
def test_where_it_is_advised_a_second_order_stepper_comes_nearer_to_the_solution(mixture, nfe):
    field, x, ts, profile, truth = mixture
    cached = CachedField(field, profile, nfe=nfe)
    euler = off(cached.integrate(x, ts), truth)
    assert "give `integrate` a second-order stepper" in str(cached.report)
    assert off(cached.integrate(x, ts, UniPC(Linear())), truth) < euler / 2
    assert "second-order" not in str(cached.report)  # it is one


def test_nothing_is_advised_where_reuse_is_what_keeps_a_sample_from_the_solution(mixture):
    field, x, ts, profile, _ = mixture
    cached = CachedField(field, profile, nfe=4)
    cached.integrate(x[:1], ts)
    assert cached.report.expected > cached.report.discretisation / 3
    assert "second-order" not in str(cached.report)


UNKNOWN = {
    "Heun": (Heun(), Linear()),
    "UniPC": (UniPC(Linear()), Linear()),
    "DDIM on the VP path": (DPMSolverPP(VP(), 1), VP()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_other_steppers_it_is_not_known(name):
    stepper, path = UNKNOWN[name]
    assert math.isnan(told(GaussianFlow(path), grids.uniform(12, 0.95, 0.05), stepper))


def test_of_a_run_with_noise_it_is_not_known():
    ts = grids.uniform(12, 0.95, 0.05)
    stepper = EulerMaruyama(Linear(), BrownianPath(X, ts, torch.Generator().manual_seed(2)))
    assert math.isnan(told(GaussianFlow(Linear()), ts, stepper))


def test_of_two_networks_it_is_not_known():
    class Two:
        def __call__(self, x, t):
            return -x if t > 0.5 else x

        def regime(self, t):
            return t > 0.5

    assert math.isnan(told(Two(), grids.uniform(12), Euler()))
