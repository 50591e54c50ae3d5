"""What cannot be integrated is refused at the entry, in words: what was expected, what came, the next move."""

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
    WhiteNoise,
    grids,
    integrate,
    trajectory,
)
from solvers.loop import check_grid, check_state
from tests.flows import Nonlinear

F64 = torch.float64
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
TS = grids.uniform(4)
NOISE = WhiteNoise(torch.Generator().manual_seed(0))


def refuses(error, call, *words):
    """`call` raises `error`, and the message holds all the words."""
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


# Grids handed to the loop


@pytest.mark.parametrize(
    ("ts", "words"),
    [
        (torch.tensor(0.5), ["at least two times", "shape (K + 1,)", "got shape ()"]),
        (torch.tensor([1.0]), ["at least two times", "got shape (1,)"]),
        (torch.ones(3, 2), ["shape (K + 1,)", "got shape (3, 2)"]),
        (torch.tensor([1.0, torch.nan, 0.0]), ["must be finite", "nan"]),
        (torch.tensor([torch.inf, 1.0, 0.0]), ["must be finite", "inf"]),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), ["strictly monotone", "ts[1] == ts[2]", "0.5, 0.5"]),
        (torch.tensor([0.25, 0.25, 0.0]), ["strictly monotone", "ts[0] == ts[1]", "0.25, 0.25"]),
        (torch.tensor([1.0, 0.5, 0.75, 0.0]), ["strictly monotone", "ts[1] < ts[2]", "0.5, 0.75"]),
        (torch.tensor([0.0, 0.5, 1.0, 0.9]), ["strictly monotone", "ts[2] > ts[3]", "1, 0.9"]),
    ],
)
def test_a_grid_must_be_finite_and_strictly_monotone(ts, words):
    refuses(ValueError, lambda: check_grid(ts), "`ts` must be", *words)
    refuses(ValueError, lambda: trajectory(Nonlinear(), X, ts), "`ts` must be", *words)  # before the first `next`
    refuses(ValueError, lambda: BrownianPath(X, ts, torch.Generator()), "`ts` must be", *words)


def test_grids_of_integers_and_of_numpy_are_welcome():
    assert check_grid(torch.tensor([1000, 500, 0])).dtype == F64
    assert check_grid(np.linspace(0, 1, 5)).dtype == F64
    assert check_grid(torch.tensor([1.0, 0.0], dtype=torch.float32)).dtype == torch.float32


# States


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0, 2.0], TypeError, ["floating-point tensor of shape (B, ...)", "got list"]),
        (np.ones((2, 3)), TypeError, ["floating-point tensor of shape (B, ...)", "got ndarray"]),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, ["floating-point tensor", "got torch.int64"]),
        (torch.tensor(1.0), ValueError, ["at least one sample", "B >= 1", "got shape ()"]),
        (torch.ones(0, 3), ValueError, ["at least one sample", "got shape (0, 3)"]),
        (torch.ones(2, 0), ValueError, ["at least one sample", "got shape (2, 0)"]),
        (torch.tensor([[1.0, torch.nan]]), ValueError, ["NaN or infinity before the first step", "check where"]),
        (torch.tensor([[1.0, torch.inf]]), ValueError, ["NaN or infinity before the first step", "check where"]),
    ],
)
def test_a_state_must_be_a_batch_of_finite_numbers(x, error, words):
    refuses(error, lambda: check_state(x), *words)
    refuses(error, lambda: trajectory(Nonlinear(), x, TS), *words)


# What the field returns


@pytest.mark.parametrize(
    "stepper", [Euler(), Heun(), DPMSolverPP(Linear()), EulerMaruyama(Linear(), NOISE), TorchDiffEq()]
)
@pytest.mark.parametrize(
    ("field", "words"),
    [
        (lambda x, t: x[:, :1], ["(4, 6) torch.float64", "got (4, 1) torch.float64"]),
        (lambda x, t: x.float(), ["(4, 6) torch.float64", "got (4, 6) torch.float32"]),
        (lambda x, t: (x,), ["(4, 6) torch.float64", "got tuple"]),
        (lambda x, t: None, ["(4, 6) torch.float64", "got NoneType"]),
    ],
)
def test_a_field_must_return_a_velocity_like_its_state(field, words, stepper):
    refuses(TypeError, lambda: integrate(field, X, TS, stepper), "must return a velocity like x", *words, "at t = 1")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
@pytest.mark.parametrize("stepper", [Euler(), Heun(), TorchDiffEq("rk4")])
def test_an_infinite_velocity_names_its_time_and_its_samples(stepper, shape, bad):
    def field(x, t):
        v = x.clone()
        if float(t) == 0.5:
            v[1], v[3] = bad, bad
        return v

    words = ["NaN or infinity", "at t = 0.5", "in samples [1, 3]", "end the grid before a singular time"]
    refuses(FloatingPointError, lambda: integrate(field, torch.ones(shape, dtype=F64), TS, stepper), *words)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4)])
def test_a_large_velocity_is_a_finite_one(dtype, large):
    x = torch.zeros(4, 6, dtype=dtype)
    end = integrate(lambda x, t: torch.full_like(x, large), x, torch.tensor([1.0, 0.5], dtype=dtype))
    torch.testing.assert_close(end, torch.full_like(x, -large / 2))


def test_the_steps_before_an_error_are_kept():
    steps, done = trajectory(lambda x, t: x / (t > 0.3), X, TS), []
    with pytest.raises(FloatingPointError, match=r"at t = 0\.25 in samples \[0, 1, 2, 3\]"):
        done.extend(steps)
    assert [step.t.item() for step in done] == [0.75, 0.5, 0.25]


# Options


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Linear(0.5), ["`data_at`", "0 or 1", "got 0.5"]),
        (lambda: Cosine(-1.0), ["`data_at`", "0 or 1", "got -1.0"]),
        (lambda: VP(data_at=2.0), ["`data_at`", "0 or 1", "got 2.0"]),
        (lambda: DPMSolverPP(Linear(), 3), ["`order` must be 1 (DDIM) or 2 (2M)", "got 3"]),
        (lambda: TorchDiffEq("rk45"), ["`method` must be one of", "dopri5", "rk4", "got 'rk45'"]),
        (lambda: EulerMaruyama(Linear(), NOISE, "sbdm"), ["`diffusion` must be one of", "SBDM", "sigma", "got 'sbdm'"]),
        (lambda: EulerMaruyama(Linear(), NOISE, norm=-1.0), ["`norm`", "cannot be negative", "got -1.0"]),
        (lambda: EulerMaruyama(Linear(), NOISE, norm=float("nan")), ["`norm`", "got nan"]),
        (lambda: grids.uniform(0), ["a step or more between two different ends", "got 0 from 1.0 to 0.0"]),
        (lambda: grids.log_snr(-1, Linear()), ["a step or more", "got -1"]),
        (lambda: grids.uniform(5, 0.3, 0.3), ["two different ends", "from 0.3 to 0.3"]),
        (lambda: grids.karras(5, Cosine(), 0.3, 0.3), ["two different ends"]),
        (lambda: grids.shifted(5, 0.0), ["`shift` must be positive", "1 is uniform", "got 0.0"]),
        (lambda: grids.shifted(5, float("nan")), ["`shift` must be positive", "got nan"]),
        (lambda: grids.logarithmic(5, 1.0, 0.0), ["positive ends", "1.0 and 0.0", "Move the zero to 1e-3"]),
    ],
)
def test_options_are_checked_where_they_are_given(call, words):
    refuses(ValueError, call, *words)


# Places where a method has no meaning


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("path", [Linear, Cosine, VP])
def test_dpm_solver_cannot_start_at_pure_data(path, order):
    for data_at in (0.0, 1.0):
        ts = grids.uniform(4, data_at, 1 - data_at)
        words = ["cannot start at pure data", f"sigma = 0 at t = {data_at:g}", "start a little off it"]
        refuses(
            ValueError, lambda ts=ts, at=data_at: integrate(Nonlinear(), X, ts, DPMSolverPP(path(at), order)), *words
        )


@pytest.mark.parametrize("path", [Linear, Cosine])
def test_euler_maruyama_cannot_start_where_the_score_is_infinite(path):
    for data_at in (0.0, 1.0):
        ts = grids.uniform(4, data_at, 1 - data_at)
        words = ["score is infinite at pure data", f"t = {data_at:g}", "start the grid a little off it"]
        refuses(
            ValueError, lambda ts=ts, at=data_at: integrate(Nonlinear(), X, ts, EulerMaruyama(path(at), NOISE)), *words
        )


def test_a_brownian_path_knows_its_own_times_only():
    brownian = BrownianPath(X, TS, torch.Generator().manual_seed(0))
    other = EulerMaruyama(Linear(), brownian)
    words = ["t = 0.9 is not a time of the Brownian path", "coarsen its own grid", "path.ts[::10]"]
    refuses(ValueError, lambda: integrate(Nonlinear(), X, torch.tensor([0.9, 0.5], dtype=F64), other), *words)
