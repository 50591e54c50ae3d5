"""UniPC is diffusers' at every step, linear in the outputs, and one order better than its predictor."""

from functools import cache
from itertools import pairwise
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, calibrate
from solvers import VP, Cosine, DPMSolverPP, Linear, TorchDiffEq, UniPC, grids, integrate, trajectory
from solvers.paths import Path
from tests.flows import GaussianFlow, Nonlinear, by_scipy, linear_flow, rms

F64 = torch.float64
SHIPPED = File(__file__).parents[1] / "benchmarks/fields/gmm.safetensors"
STDS = torch.linspace(0.3, 1.2, 6, dtype=F64)
X, Y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
PATHS = [kind(data_at) for kind in (Linear, Cosine, VP) for data_at in (0.0, 1.0)]

over_paths = pytest.mark.parametrize("path", PATHS, ids=str)
over_orders = pytest.mark.parametrize("order", [1, 2])


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def ends(path, u=0.05):
    """The times at which u is 1 - u and u: noisy, clean."""
    return abs(path.data_at - (1 - u)), abs(path.data_at - u)


class Recorded:
    """A field that remembers where it was evaluated."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, x, t):
        self.calls.append((x, t))
        return self.field(x, t)


# Against an independent implementation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@over_paths
@pytest.mark.parametrize("steps", [3, 8, 20])
@over_orders
def test_unipc_is_diffusers_at_every_step(order, steps, path):
    diffusers = pytest.importorskip("diffusers")
    flow = isinstance(path, Linear)
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        solver_type="bh2",
        prediction_type="flow_prediction" if flow else "epsilon",
        use_flow_sigmas=flow,
        flow_shift=3.0 if flow else 1.0,
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()  # (K + 1,) sigma on the flow path, sigma / alpha elsewhere; the last is 0
    ts = abs(path.data_at - sigmas) if flow else path.time_of(-sigmas.log())
    field = GaussianFlow(path, 0.7, torch.linspace(0.2, 1.2, 6))
    x = X.float()
    for step, t, timestep in zip(trajectory(field, x, ts, UniPC(path, order)), ts, scheduler.timesteps, strict=False):
        output = field(x, t) * (1 - 2 * path.data_at) if flow else field.noise(x, t)  # their flow is noise - data
        x = scheduler.step(output, timestep, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5)
    assert rms(x - X.float()).min() > 0.1


@over_paths
def test_the_corrector_is_exact_where_the_data_prediction_is_quadratic_in_log_snr(path):
    """From the second step of order 2 on. A step of no length shows the corrected state, which no step ends at."""

    def field(x, t):
        u = path.log_snr(t)
        return path.velocity_from_data(x, 1 + Y * u - 0.3 * u**2, t)

    ts = grids.karras(6, path, *ends(path))
    stepper, x, memory, corrected = UniPC(path), X, None, X
    for k, (t, t_next) in enumerate(pairwise(ts)):
        dx, memory = stepper.advance(field, x, t, t_next, memory)
        x = x + dx
        nothing, _ = stepper.advance(field, x, t_next, t_next + 1e-9 * (ts[-1] - ts[0]), memory)
        before, corrected = corrected, x + nothing
        if k >= 1:
            exact = by_scipy(field, before, t.item(), t_next.item())
            close(corrected, exact, 1e-6)
            assert rms(x - exact).min() > 1e-4  # which the predictor alone is not


# Orders


PROBLEMS = {"Gaussian": lambda path: GaussianFlow(path, 0.7, STDS), "nonlinear": lambda path: Nonlinear()}


@cache
def exact(problem, path):
    return PROBLEMS[problem](path).solution(X, *ends(path))


def observed_order(error, steps):
    """The regression's slope of log `error(k)` against log(1 / k)."""
    return -np.polyfit(np.log(steps), np.log([error(k) for k in steps]), 1)[0]


@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras])
@pytest.mark.parametrize("problem", PROBLEMS)
@over_paths
@over_orders
def test_the_corrector_lifts_the_order_by_one(order, path, problem, grid):
    field, stepper = PROBLEMS[problem](path), UniPC(path, order)

    def error(k):
        return rms(integrate(field, X, grid(k, path, *ends(path)), stepper) - exact(problem, path)).max().item()

    assert observed_order(error, [32, 64, 128]) == pytest.approx(stepper.order + 1, abs=0.1)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@over_paths
@over_orders
def test_unipc_converges_at_its_order_or_better_on_any_grid(order, path, problem, uneven):
    """Uniform in t, and with long and short steps in turn, 4 : 2, so that the ratio of neighbours matters."""
    field, stepper = PROBLEMS[problem](path), UniPC(path, order)

    def error(k):
        ts = grids.uniform(k, *ends(path))
        ts[1::2] += (ts[1] - ts[0]) / 3 * uneven
        return rms(integrate(field, X, ts, stepper) - exact(problem, path)).max().item()

    assert observed_order(error, [32, 64, 128]) > stepper.order + 0.5


@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_unipc_is_second_order_from_pure_noise_to_pure_data(data_at):
    """The first step, in which log-SNR is infinite, leaves 1 / K^2; the corrector sees to the ones after it."""
    path = Linear(data_at)
    field = GaussianFlow(path, 0.7, STDS)
    end = field.solution(X, 1 - data_at, data_at)

    def error(k):
        return rms(integrate(field, X, grids.uniform(k, 1 - data_at, data_at), UniPC(path)) - end).max().item()

    assert observed_order(error, [128, 256, 512]) == pytest.approx(2, abs=0.2)


def test_unipc_is_better_than_its_predictor_at_few_steps():
    """On the mixture, from pure noise to pure data and inside: the mean over 32 samples."""
    field = GaussianMixture.load(SHIPPED, dtype=F64)
    path = field.path
    x = torch.randn(32, field.mean.shape[1], generator=torch.Generator().manual_seed(1), dtype=F64)
    for name, grid in {
        "uniform": grids.uniform,
        "log_snr": lambda k: grids.log_snr(k, path, 0.99, 0.01),
    }.items():
        truth = integrate(field, x, grid(1), TorchDiffEq(rtol=1e-7, atol=1e-7))
        for k in (6, 10, 20):
            unipc, dpm = (
                rms(integrate(field, x, grid(k), s) - truth).mean().item() for s in (UniPC(path), DPMSolverPP(path))
            )
            print(f"{name}, {k} steps: UniPC {unipc:.4f}, DPM-Solver++ 2M {dpm:.4f}")
            assert unipc < dpm


# What every stepper promises


@over_orders
@pytest.mark.parametrize("path", [path for path in PATHS if not isinstance(path, VP)], ids=str)
def test_pure_noise_and_pure_data_are_finite_ends(path, order):
    noisy, clean = 1 - path.data_at, path.data_at
    field = GaussianFlow(path, 0.7, STDS)
    for k in (1, 2, 3, 10):
        ts = grids.uniform(k, noisy, clean)
        steps = list(trajectory(field, X, ts, UniPC(path, order)))
        assert all(step.x.isfinite().all() for step in steps)
        assert all(weight.isfinite() for step in steps for weight in step.weights)
        before, t = (steps[-2].x, steps[-2].t) if k > 1 else (X, ts[0])
        close(steps[-1].x, field.data(before, t))  # the last step is the data prediction, whatever was before


@over_orders
@pytest.mark.parametrize("data_at", [0.0, 1.0])
def test_the_step_from_pure_noise_is_not_corrected_and_the_next_is_of_order_one(order, data_at):
    path, ts = Linear(data_at), abs(data_at - torch.tensor([1.0, 0.7, 0.5, 0.2], dtype=F64))
    field = GaussianFlow(path, 0.7, STDS)
    ours, ddim = ([step.x for step in trajectory(field, X, ts, s)] for s in (UniPC(path, order), DPMSolverPP(path, 1)))
    close(torch.stack(ours[:2]), torch.stack(ddim[:2]))
    assert rms(ours[2] - ddim[2]).min() > 1e-4


@over_orders
@given(path=st.sampled_from(PATHS), seed=st.integers(0, 2**31), whole=st.booleans(), a=st.floats(-2, 2))
def test_unipc_is_linear_in_its_state_and_the_outputs(order, path, seed, whole, a):
    """Superposition, of runs that are answered with fixed outputs: a u + v leads to a U + V, memory and all."""
    ts = grids.uniform(6, *(ends(path, 0.0) if whole and not isinstance(path, VP) else ends(path)))
    u, v = torch.randn(2, len(ts), 3, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def run(answers):
        answers = iter(answers)
        x, memory = next(answers), None
        for t, t_next in pairwise(ts):
            dx, memory = UniPC(path, order).advance(lambda x, t: next(answers), x, t, t_next, memory)
            x = x + dx
        return x, memory

    (at_u, memory_u), (at_v, memory_v), (at_both, memory) = run(u), run(v), run(a * u + v)
    close(at_both, a * at_u + at_v, 1e-10)
    for one, other, both in zip(memory_u, memory_v, memory, strict=True):
        assert both.shape in (X[:3].shape, ())
        close(both, a * one + other if both.ndim else one, 1e-10)  # what has no shape is of time alone
    zero, _ = run(torch.zeros_like(u))
    assert torch.equal(zero, torch.zeros_like(zero))


@over_orders
@over_paths
def test_a_step_costs_one_evaluation_where_it_begins(path, order):
    field, ts = Recorded(GaussianFlow(path)), grids.uniform(7, *ends(path))
    steps = list(trajectory(field, X, ts, UniPC(path, order)))
    begun = [X, *(step.x for step in steps[:-1])]
    assert [t for _, t in field.calls] == list(ts[:-1])
    assert all(torch.equal(seen, x) for (seen, _), x in zip(field.calls, begun, strict=True))


@over_orders
@over_paths
def test_the_steps_add_up(path, order):
    ts = grids.log_snr(10, path, *ends(path))
    steps = list(trajectory(GaussianFlow(path), X, ts, UniPC(path, order)))
    close(sum(step.dx for step in steps), steps[-1].x - X)
    assert [step.t for step in steps] == list(ts[1:])
    assert all(torch.equal(now.x + after.dx, after.x) for now, after in pairwise(steps))


@over_orders
@over_paths
def test_the_field_weight_is_that_of_all_outputs_together(path, order):
    """A step is made of its weights where the data prediction does not change."""
    field, ts = GaussianFlow(path, 0.7, 0.0), grids.log_snr(6, path, *ends(path))
    x, t = X, ts[0]
    for step in trajectory(field, X, ts, UniPC(path, order)):
        close(step.x, step.weights.state * x + step.weights.field * field(x, t), 1e-11)
        x, t = step.x, step.t
    close(x, field.solution(X, ts[0], ts[-1]), 1e-10)


@over_orders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_a_sample_keeps_its_dtype_and_does_not_feel_its_batch(dtype, order):
    x = torch.cat([X, 30 * Y]).to(dtype)
    for field in (linear_flow(), Nonlinear(), GaussianFlow(Linear())):
        for ts in (grids.uniform(10), grids.uniform(10, 0.95, 0.05).float()):
            together = integrate(field, x, ts, UniPC(Linear(), order))
            assert together.dtype == dtype
            alone = [integrate(field, x[[b]], ts, UniPC(Linear(), order)) for b in range(len(x))]
            assert torch.equal(together, torch.cat(alone))


def test_tiny_steps_do_not_amplify_rounding():
    """The corrector's weights are differences of numbers like 1 / h, times differences of predictions like h."""
    path, field = Linear(), GaussianFlow(Linear(), 0.7, STDS)
    fine = torch.linspace(0.5, 0.499, 2001, dtype=F64)
    close(integrate(field, X, fine, UniPC(path)), field.solution(X, fine[0], fine[-1]), 1e-11)


# Errors


@pytest.mark.parametrize("order", [0, 3])
def test_another_order_is_refused(order):
    with pytest.raises(ValueError, match=f"`order` must be 1 or 2.*got {order}"):
        UniPC(Linear(), order)


@over_paths
def test_unipc_cannot_start_at_pure_data(path: Path):
    ts = grids.uniform(4, path.data_at, 1 - path.data_at)
    with pytest.raises(ValueError, match="cannot start at pure data"):
        integrate(lambda x, t: x, X, ts, UniPC(path))


# Under a cache


def test_a_cache_on_unipc_beats_fewer_steps_of_it():
    field = GaussianMixture.load(SHIPPED)
    stepper, ts = UniPC(field.path), grids.uniform(50)
    x = torch.randn(24, field.mean.shape[1], generator=torch.Generator().manual_seed(2))
    profile = calibrate(field, x[:8], ts, stepper, progress=False)
    full = integrate(field, x[8:], ts, stepper)
    everything = CachedField(field, profile, nfe=50).integrate(x[8:], ts, stepper)
    assert torch.equal(everything, full)
    for nfe in (25, 15):
        counted = Recorded(field)
        cached = rms(CachedField(counted, profile, nfe=nfe).integrate(x[8:], ts, stepper) - full).median().item()
        fewer = rms(integrate(field, x[8:], grids.uniform(nfe), stepper) - full).median().item()
        print(f"{nfe} evaluations: cached {cached:.5f}, fewer steps {fewer:.5f}")
        assert len(counted.calls) == nfe
        assert cached < fewer / 3
