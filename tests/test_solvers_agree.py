"""Steppers, paths and grids against independent implementations and identities; and the suite's own oracles too."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torchdiffeq import odeint

from solvers import (
    VP,
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
from tests.algorithm_1 import algorithm_1
from tests.flows import GaussianFlow, Nonlinear, by_scipy, linear_flow, rms

F64 = torch.float64
PATHS = [Linear, Cosine, VP]
X, Y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)  # (B, d) each
FLOWS = [linear_flow(), Nonlinear(), *(GaussianFlow(path(data_at)) for path in PATHS for data_at in (0.0, 1.0))]

paths = st.builds(lambda path, data_at: path(data_at), st.sampled_from(PATHS), st.sampled_from([0.0, 1.0]))
times = st.floats(0.01, 0.99)
no_deadline = settings(deadline=None)


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def zero_noise(x, t, t_next):
    return torch.zeros_like(x)


def steppers(path):
    return [
        Euler(),
        Heun(),
        DPMSolverPP(path, 1),
        DPMSolverPP(path, 2),
        EulerMaruyama(path, WhiteNoise(torch.Generator().manual_seed(0))),
        TorchDiffEq("rk4"),
        TorchDiffEq("dopri5"),
    ]


# Steppers


@pytest.mark.parametrize(("stepper", "method"), [(Euler(), "euler"), (Heun(), "heun2")])
@pytest.mark.parametrize("ts", [grids.uniform(20), grids.shifted(20, 3.0), grids.logarithmic(20, 0.01, 1.0)])
@pytest.mark.parametrize("field", [linear_flow(), Nonlinear()])
def test_euler_and_heun_are_torchdiffeqs(field, ts, stepper, method):
    theirs = odeint(lambda t, x: field(x, t), X, ts, method=method)
    ours = torch.stack([X, *(step.x for step in trajectory(field, X, ts, stepper))])
    close(ours, theirs)
    close(integrate(field, X, ts, TorchDiffEq(method)), theirs[-1])


def test_the_default_reference_is_good_to_1e5():
    field, stepper = linear_flow(), TorchDiffEq(rtol=1e-7, atol=1e-7)
    assert stepper.adaptive
    for steps in (1, 20):
        close(integrate(field, X, grids.uniform(steps), stepper), field.solution(X, 1.0, 0.0), 1e-5)


@pytest.mark.parametrize(("method", "tolerances"), [("dopri5", 10), ("dopri8", 10), ("bosh3", 20), ("fehlberg2", 1000)])
def test_adaptive_methods_keep_their_tolerance_however_the_grid_is_cut(method, tolerances):
    field, stepper = linear_flow(), TorchDiffEq(method, rtol=1e-7, atol=1e-7)
    for steps in (1, 20):
        close(integrate(field, X, grids.uniform(steps), stepper), field.solution(X, 1.0, 0.0), 1e-7 * tolerances)


METHODS = ["euler", "midpoint", "heun2", "heun3", "rk4", "adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_offer_runs(method):
    end = linear_flow().solution(X, 1.0, 0.0)
    close(integrate(linear_flow(), X, grids.uniform(60), TorchDiffEq(method)), end, 0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_is_diffusers_at_every_step(order, steps, path, data_at):
    diffusers = pytest.importorskip("diffusers")
    flow = path is Linear
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=order,
        prediction_type="flow_prediction" if flow else "epsilon",
        use_flow_sigmas=flow,
        flow_shift=3.0 if flow else 1.0,
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()  # (K + 1,) sigma on the flow path, sigma / alpha elsewhere; the last is 0
    ts = (sigmas if data_at == 0 else 1 - sigmas) if flow else path(data_at).time_of(-sigmas.log())
    field = GaussianFlow(path(data_at), 0.7, torch.linspace(0.2, 1.2, 6))
    x = X.float()
    for step, t, timestep in zip(
        trajectory(field, x, ts, DPMSolverPP(path(data_at), order)), ts, scheduler.timesteps, strict=False
    ):
        output = field(x, t) * (1 - 2 * data_at) if flow else field.noise(x, t)  # their flow is noise - data
        x = scheduler.step(output, timestep, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5)
    assert rms(x - X.float()).min() > 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_shifted_grid_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(30)
    close(grids.shifted(30, 5.0, 0.999, 0.0), scheduler.sigmas.double(), 1e-6)


@pytest.mark.parametrize("order", [1, 2])
@given(path=paths, ends=st.lists(st.floats(0.02, 0.98), min_size=2, max_size=5, unique_by=lambda t: round(t, 2)))
@no_deadline
def test_dpm_solver_is_exact_where_the_data_prediction_is_constant(order, path, ends):
    field = GaussianFlow(path, 0.7, 0.0)
    ts = torch.tensor(sorted(ends, reverse=path.data_at == 0), dtype=F64)
    close(integrate(field, X, ts, DPMSolverPP(path, order)), field.solution(X, ts[0], ts[-1]), 1e-10)


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_ddim_keeps_the_noise_it_predicts(path, data_at):
    """The textbook form of the step: predict data and noise, and put them together again at the next time."""
    path = path(data_at)
    field, noisy, clean = GaussianFlow(path), abs(data_at - 0.9), abs(data_at - 0.4)
    one_step = integrate(field, X, torch.tensor([noisy, clean], dtype=F64), DPMSolverPP(path, 1))
    close(one_step, path.sample(field.data(X, noisy), field.noise(X, noisy), clean), 1e-11)


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_is_made_of_its_weights(path, data_at):
    path = path(data_at)
    field = GaussianFlow(path)
    ts = grids.karras(12, path, abs(data_at - 0.98), abs(data_at - 0.02))
    for stepper in (Euler(), DPMSolverPP(path, 1), EulerMaruyama(path, zero_noise)):
        x, t = X, ts[0]
        for step in trajectory(field, X, ts, stepper):
            close(step.x, step.weights.state * x + step.weights.field * field(x, t))
            x, t = step.x, step.t


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_the_field_weight_is_that_of_all_outputs_together(path, data_at):
    """It tells where outputs do not change: a constant velocity, or for DPM-Solver++ a constant data prediction."""
    path = path(data_at)
    ts = grids.log_snr(6, path, abs(data_at - 0.95), abs(data_at - 0.05))
    point = GaussianFlow(path, 0.7, 0.0)
    cases = [(lambda x, t: Y, Heun()), (lambda x, t: Y, TorchDiffEq("rk4")), (point, DPMSolverPP(path, 2))]
    for field, stepper in cases:
        x, t = X, ts[0]
        for step in trajectory(field, X, ts, stepper):
            close(step.x, step.weights.state * x + step.weights.field * field(x, t), 1e-11)
            x, t = step.x, step.t


@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_a_trajectory_telescopes(data_at):
    path = Cosine(data_at)
    ts = grids.log_snr(10, path, abs(data_at - 0.95), abs(data_at - 0.05))
    for stepper in steppers(path):
        steps = list(trajectory(GaussianFlow(path), X, ts, stepper))
        assert len(steps) == len(ts) - 1
        close(sum(step.dx for step in steps), steps[-1].x - X)
        close(sum(step.dt for step in steps), ts[-1] - ts[0])
        assert [step.t for step in steps] == list(ts[1:])
        assert all(torch.equal(now.x + after.dx, after.x) for now, after in pairwise(steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype_on_a_float64_grid(dtype):
    path = Linear()
    for stepper in steppers(path):
        assert integrate(Nonlinear(), X.to(dtype), grids.uniform(4, 0.9, 0.1), stepper).dtype == dtype


@pytest.mark.parametrize(
    "stepper", [Euler(), Heun(), DPMSolverPP(Linear(), 1), DPMSolverPP(Linear()), TorchDiffEq("rk4")]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_sample_does_not_feel_its_batch(stepper, dtype):
    ts, x = grids.uniform(10, 0.95, 0.05), torch.cat([X, 30 * Y]).to(dtype)
    for field in (linear_flow(), Nonlinear(), GaussianFlow(Linear())):
        together = integrate(field, x, ts, stepper)
        assert all(torch.equal(together[[b]], integrate(field, x[[b]], ts, stepper)) for b in range(len(x)))


# Paths


def literal(path, u):
    """alpha and sigma from the papers' formulas; VP's from the integral of beta, which ours has in closed form."""
    if isinstance(path, Linear):
        return 1 - u, u
    if isinstance(path, Cosine):
        return np.cos(np.pi * u / 2), np.sin(np.pi * u / 2)
    integral = quad(lambda s: 0.1 + s * (20.0 - 0.1), 0, u)[0]
    return np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))


@given(path=paths, t=times)
@no_deadline
def test_schedules_are_the_papers(path, t):
    c = path.coefficients(t)
    assert (c.alpha.item(), c.sigma.item()) == pytest.approx(literal(path, abs(path.data_at - t)), rel=1e-10)


@given(path=paths, t=times)
@no_deadline
def test_coefficients_carry_their_own_derivatives(path, t):
    t = torch.tensor(t, dtype=F64, requires_grad=True)
    c = path.coefficients(t)
    close(torch.autograd.grad(c.alpha, t, retain_graph=True)[0], c.dalpha)
    close(torch.autograd.grad(c.sigma, t)[0], c.dsigma, 1e-10)


@pytest.mark.parametrize("data_at", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_the_data_are_where_the_path_says(path, data_at):
    path = path(data_at)
    close(path.sample(X, Y, data_at), X)
    noisiest = path.sample(X, Y, 1 - data_at)
    assert rms(noisiest - Y).max() < (0.02 if isinstance(path, VP) else 1e-12)  # VP stops at alpha = e^-5
    assert path.log_snr(data_at) == torch.inf


@given(path=paths, t=times)
@no_deadline
def test_a_network_may_predict_any_of_the_four(path, t):
    """From a known point of a known line: x = alpha data + sigma noise, v its derivative, score = -noise / sigma."""
    data, noise, c = X, Y, path.coefficients(t)
    x, v, score = c.alpha * data + c.sigma * noise, c.dalpha * data + c.dsigma * noise, -noise / c.sigma
    close(path.sample(data, noise, t), x)
    close(path.data_from_velocity(x, v, t), data, 1e-9)
    close(path.noise_from_velocity(x, v, t), noise, 1e-9)
    close(path.score_from_velocity(x, v, t), score, 1e-9)
    close(path.velocity_from_data(x, data, t), v, 1e-9)
    close(path.velocity_from_noise(x, noise, t), v, 1e-9)
    close(path.velocity_from_score(x, score, t), v, 1e-9)


@pytest.mark.parametrize("kind", ["data", "noise", "score"])
@given(path=paths, t=times)
@no_deadline
def test_conversions_undo_each_other(kind, path, t):
    out, back = getattr(path, f"{kind}_from_velocity"), getattr(path, f"velocity_from_{kind}")
    close(back(X, out(X, Y, t), t), Y, 1e-9)
    close(out(X, back(X, Y, t), t), Y, 1e-9)


@given(path=paths, t=times)
@no_deadline
def test_conversions_of_a_gaussian_are_its_closed_forms(path, t):
    flow = GaussianFlow(path, 0.7, 0.5)
    v = flow(X, t)
    close(path.data_from_velocity(X, v, t), flow.data(X, t), 1e-10)
    close(path.noise_from_velocity(X, v, t), flow.noise(X, t), 1e-10)
    close(path.score_from_velocity(X, v, t), flow.score(X, t), 1e-10)


@given(path=paths, ts=st.lists(times, min_size=4, max_size=4))
@no_deadline
def test_times_a_sample_are_the_same_as_one_by_one(path, ts):
    """For (B, ...) of any rank, and for a time that is a float, () or (B,)."""
    x, v = X.reshape(4, 2, 3), Y.reshape(4, 2, 3)
    for convert in (path.data_from_velocity, path.noise_from_velocity, path.velocity_from_score, path.sample):
        together = convert(x, v, torch.tensor(ts, dtype=F64))
        for b, t in enumerate(ts):
            close(together[[b]], convert(x[[b]], v[[b]], t))
            close(together[[b]], convert(x[[b]], v[[b]], torch.tensor(t, dtype=F64)))


@given(path=paths, t=st.floats(1e-3, 1 - 1e-3))
@no_deadline
def test_time_of_inverts_log_snr(path, t):
    assert path.time_of(path.log_snr(t)).item() == pytest.approx(t, abs=1e-10)


# Grids


@given(
    steps=st.integers(1, 60),
    ends=st.tuples(times, times).filter(lambda ends: abs(ends[0] - ends[1]) > 0.05),
    path=paths,
    shift=st.floats(0.2, 10),
    rho=st.floats(1, 9),
)
@no_deadline
def test_grids_run_from_end_to_end_in_steps_equal_in_what_they_claim(steps, ends, path, shift, rho):
    def moved(t):
        return shift * t / (1 + (shift - 1) * t)

    claims = [  # the grid, its ends, and the quantity in which it is uniform
        (grids.uniform(steps, *ends), ends, lambda t: t),
        (grids.shifted(steps, shift, *ends), [moved(t) for t in ends], lambda t: t / (shift - (shift - 1) * t)),
        (grids.logarithmic(steps, *ends), ends, torch.log),
        (grids.log_snr(steps, path, *ends), ends, path.log_snr),
        (grids.karras(steps, path, *ends, rho), ends, lambda t: torch.exp(-path.log_snr(t) / rho)),
    ]
    for ts, (start, end), measure in claims:
        assert ts.shape == (steps + 1,)
        assert ts.dtype == F64
        assert (ts.diff() * (end - start) > 0).all()
        assert (ts[0].item(), ts[-1].item()) == pytest.approx((start, end), abs=1e-10)
        equal = measure(ts).diff()
        close(equal, equal.mean().expand_as(equal), 1e-8)


def test_the_default_ends_are_noise_at_one_and_data_at_zero():
    assert grids.uniform(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grids.shifted(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert grids.logarithmic(3).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


# The oracles of this suite


@pytest.mark.parametrize("flow", FLOWS, ids=str)
@pytest.mark.parametrize(("start", "end"), [(0.95, 0.05), (0.1, 0.8)])
def test_exact_solutions_are_scipys(flow, start, end):
    close(flow.solution(X, start, end), by_scipy(flow, X, start, end), 1e-10)


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_flows_take_time_in_any_form_and_each_row_is_the_same_bits_in_every_batch(flow):
    ts = torch.linspace(0.1, 0.9, 4, dtype=F64)
    together = flow(X, ts)
    for b, t in enumerate(ts):
        row = X[[b]]
        assert all(torch.equal(together[[b]], flow(row, form)) for form in (t, t.item(), t[None]))
        assert torch.equal(flow(X, t)[[b]], together[[b]])
    assert flow(X.float(), ts.float()).dtype == torch.float32


@given(x=st.integers(0, 2**31), t=times, dt=st.floats(-1, 1), size=st.floats(1e-3, 10))
@no_deadline
def test_the_linear_flow_obeys_its_first_order_bound(x, t, dt, size):
    flow, g = linear_flow(), torch.Generator().manual_seed(x)
    x, dx = torch.randn(2, 1, 6, generator=g, dtype=F64)
    change = rms(flow(x + size * dx, t + dt) - flow(x, t))
    assert change <= flow.alpha_x * rms(size * dx) + flow.alpha_t * abs(dt) + 1e-12


@pytest.mark.parametrize("t", [0.2, 0.7])
@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_sensitivities_of_flows_are_those_of_autograd(flow, t):
    row, t = X[:1], torch.tensor(t, dtype=F64)
    J_x = torch.autograd.functional.jacobian(lambda x: flow(x[None], t)[0], row[0])
    alpha_x = flow.alpha_x(row, t) if callable(flow.alpha_x) else torch.tensor([flow.alpha_x], dtype=F64)
    close(alpha_x, torch.linalg.matrix_norm(J_x, 2)[None])
    if hasattr(flow, "alpha_t"):
        J_t = torch.autograd.functional.jacobian(lambda t: flow(row, t), t)
        alpha_t = flow.alpha_t(row, t) if callable(flow.alpha_t) else torch.tensor([flow.alpha_t], dtype=F64)
        close(alpha_t, rms(J_t))


def numpy_field(flow):
    return lambda x, t: flow(torch.tensor(x)[None], t)[0].numpy()


@pytest.mark.parametrize("n", [0, 3])
def test_algorithm_1_that_never_reuses_is_euler(n):
    flow, ts = Nonlinear(), grids.shifted(12, 3.0)
    epsilon = -1.0 if n else np.inf
    x, reused, _ = algorithm_1(numpy_field(flow), X[0].numpy(), ts, lambda t: (1, 1), lambda t: epsilon, n)
    assert not any(reused)
    close(torch.tensor(x), integrate(flow, X[:1], ts)[0])


@pytest.mark.parametrize(("printed", "pattern"), [(False, [0, 1, 1, 0, 1, 1, 0]), (True, [0, 1, 0, 1, 0, 1, 0])])
def test_algorithm_1_lets_n_reuses_follow_and_as_printed_one_less(printed, pattern):
    _, reused, _ = algorithm_1(
        lambda x, t: x, X[0].numpy(), grids.uniform(7), lambda t: (1, 1), lambda t: np.inf, 2, printed
    )
    assert reused == pattern


def test_algorithm_1_adds_up_what_moved_since_its_reference():
    """By hand: v = 2, four steps of -1/4; each moves x by 1/2 and the prediction by 3/2 + 1/4."""
    x, reused, predicted = algorithm_1(
        lambda x, t: np.full(5, 2.0), np.zeros(5), [1, 0.75, 0.5, 0.25, 0], lambda t: (3, 1), lambda t: 2.0, 9
    )
    assert reused == [False, True, False, True]
    assert predicted == pytest.approx([np.inf, 1.75, 3.5, 1.75])
    assert x == pytest.approx(-2)


def test_algorithm_1_reads_the_sensitivities_at_the_reference_and_the_tolerance_now():
    asked = []
    ts = [1.0, 0.75, 0.5, 0.25, 0.0]
    algorithm_1(lambda x, t: x, np.ones(3), ts, lambda t: asked.append(t) or (0, 1), lambda t: t - 0.25, 9)
    assert asked == [1.0, 0.5, 0.25]  # |tau| = 1/4 <= 1/2 at .75; 1/2 > 1/4 at .5; 1/4 > 0 at .25
