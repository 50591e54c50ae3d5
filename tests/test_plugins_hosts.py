"""What each host has of its own: argument orders, containers, gradients, conditioning, solvers that must be refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp
from torch import nn

from benchmarks.hosts import k_diffusion_sampling
from sencache import cache, calibrate, rms
from sencache.plan import plan_for
from sencache.plugins import dpm_solver, flow_matching, kdiffusion, score_sde, sit
from sencache.plugins import scipy as for_scipy
from sencache.plugins import torchdiffeq as for_torchdiffeq
from sencache.plugins import torchsde as for_torchsde
from solvers import Euler, Linear, grids, integrate
from tests import hosts
from tests.hosts import FLOW, SHAPE, SIGMAS, TS, TS_UP, X, dpm_solver_module, fun, func

BY_NAME = {host.name: host for host in hosts.HOSTS}
sampling = k_diffusion_sampling()


def sampled(name, **options):
    host = BY_NAME[name]
    with torch.no_grad(), host.wrap(host.model, host.profile, **options) as wrapped:
        return host.sample(wrapped), wrapped.report


# The grid and the method that were named are those of the sampler


REFUSED = [
    *((for_torchdiffeq, (func, None, TS), name) for name in ("dopri5", "dopri8", "bosh3", "implicit_adams")),
    (for_torchdiffeq, (func, None, TS), "explicit_adams"),
    (flow_matching, (func, None, TS), "dopri5"),
    (sit, (func, None, TS), "dopri5"),
    *((for_scipy, (fun, None, TS), name) for name in ("Radau", "BDF", "LSODA")),
    (kdiffusion, (hosts.denoiser, None, SIGMAS), "dpm_adaptive"),
    (score_sde, (func, None, torch.tensor([1.0, 0.5])), "ode"),
]


@pytest.mark.parametrize(("plugin", "args", "method"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_method_that_reuses_would_fool_is_refused_unless_forced(plugin, args, method):
    options = dict(method=method, tolerance=0.1)
    options |= dict(sde=hosts.VPSDE()) if plugin is score_sde else {}
    with pytest.raises(ValueError, match=f"{method} .*force=True"), plugin.wrap(*args, **options):
        pass
    with pytest.warns(UserWarning, match="never called the wrapped model"), plugin.wrap(*args, force=True, **options):
        pass


def test_an_unknown_method_is_told_the_known_ones():
    told = pytest.raises(ValueError, match="euler, midpoint, heun2, heun3, rk4")
    with told, for_torchdiffeq.wrap(func, None, TS, method="rk5", tolerance=0.1):
        pass


def by_dopri5(wrapped):
    torchdiffeq.odeint(wrapped, X, TS, method="dopri5")


def by_solve_ivp(method, **steps):
    def run(wrapped):
        solve_ivp(wrapped, (1.0, 0.0), X[0].flatten().numpy(), method=method, **steps)

    return run


def by_dpm_adaptive(wrapped):
    sampling.sample_dpm_adaptive(wrapped, X, 0.1, float(SIGMAS[0]), disable=True)


def by_adaptive_sde(wrapped):
    torchsde.sdeint(wrapped, X.flatten(1), TS_UP[[0, -1]], dt=0.04, method="euler", adaptive=True)


def by_adaptive_dpm_solver(wrapped):
    schedule = dpm_solver_module().NoiseScheduleVP("linear")
    dpm_solver_module().DPM_Solver(wrapped, schedule).sample(X, method="adaptive", order=2, t_end=1e-3)


UNNAMED = {
    "torchdiffeq euler": by_dopri5,
    "SciPy RK45": by_solve_ivp("RK45"),
    "SciPy RK23": by_solve_ivp("Radau", first_step=1 / 8, max_step=1 / 8),
    "k-diffusion euler": by_dpm_adaptive,
    "torchsde euler": by_adaptive_sde,
    "DPM-Solver multistep 1": by_adaptive_dpm_solver,
    "score_sde VP": lambda model: solve_ivp(
        lambda t, y: hosts.vp_score(model, torch.tensor(y).reshape(SHAPE), torch.full((3,), t).double()).flatten(),
        (1.0, 0.01),
        X.flatten().numpy(),
    ),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_a_solver_that_chooses_its_own_steps_is_found_out(name):
    host = BY_NAME[name]
    found_out = pytest.raises(ValueError, match=r"The sampler asks at t = .* does not")
    with warnings.catch_warnings(), torch.no_grad(), host.wrap(host.model, host.profile, tolerance=0.05) as wrapped:
        warnings.simplefilter("ignore")  # torchsde's, about adaptive steps
        with found_out:
            UNNAMED[name](wrapped)


@pytest.mark.parametrize("name", ["heun", "lms", "dpmpp_2m"])
def test_a_sampler_that_does_not_step_as_was_said_is_found_out_and_not_corrected(name):
    host, sampler = BY_NAME["k-diffusion euler"], getattr(sampling, f"sample_{name}")
    start = X * (1 + SIGMAS[0])
    full = sampler(host.model, start, SIGMAS, disable=True)
    found = {}
    for method in ("euler", None):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with kdiffusion.wrap(host.model, host.profile, SIGMAS, method=method, nfe=12) as wrapped:
                found[method] = sampler(wrapped, start, SIGMAS, disable=True)
        assert any("does not step as" in str(one.message) for one in said) == (method == "euler")
    assert rms(found["euler"] - full).max() < 3 * rms(found[None] - full).max()


def test_forced_an_implicit_method_runs_and_without_reuse_is_itself():
    y0 = X[0].flatten().numpy()
    with for_scipy.wrap(fun, None, TS, method="Radau", tolerance=0.0, force=True) as wrapped:
        ours = solve_ivp(wrapped, (1.0, 0.0), y0, method="Radau")
    assert np.array_equal(ours.y, solve_ivp(fun, (1.0, 0.0), y0, method="Radau").y)


@pytest.mark.parametrize("name", ["k-diffusion euler", "flow_matching"])
def test_a_plan_is_made_once_for_all_trajectories(name, monkeypatch):
    made = []
    monkeypatch.setattr(cache, "plan_for", lambda *args: made.append(args) or plan_for(*args))
    host = BY_NAME[name]
    profile = replace(host.profile)
    for nfe, count in ((7, 1), (7, 1), (9, 2)):
        with torch.no_grad(), host.wrap(host.model, profile, nfe=nfe) as wrapped:
            host.sample(wrapped)
        assert len(made) == count


# torchdiffeq


def test_nothing_is_reused_where_another_network_takes_over():
    asked = []

    class Two:
        def __call__(self, t, y):
            asked.append(float(t))
            return func(t, y) if t > 0.505 else -func(t, y)

        def regime(self, t):
            return torch.as_tensor(t) > 0.505

    two = Two()
    profile = calibrate(for_torchdiffeq.field(two), X, TS, progress=False)
    asked.clear()
    with for_torchdiffeq.wrap(two, profile, TS, method="euler", nfe=6) as cached:
        torchdiffeq.odeint(cached, X, TS, method="euler")
    assert len(asked) == 6
    change = next(float(t) for t in TS if t <= 0.505)
    assert any(abs(t - change) < 1e-6 for t in asked)


def test_a_tuple_of_states_is_answered_part_by_part():
    host = BY_NAME["torchdiffeq euler"]

    def pair(t, y):
        return func(t, y[0]), -2 * y[1]

    states = X, torch.ones(3, 2, dtype=torch.float64)
    full = torchdiffeq.odeint(pair, states, TS, method="euler")
    for tolerance in (0.0, 0.02):
        with for_torchdiffeq.wrap(pair, None, TS, tolerance=tolerance) as wrapped:
            ours = torchdiffeq.odeint(wrapped, states, TS, method="euler")
        for part, of_full in zip(ours, full, strict=True):
            assert torch.equal(part, of_full) if tolerance == 0 else (part - of_full).abs().max() < 0.02
    assert wrapped.report.reuses.any()
    assert host.folds


def test_times_in_half_precision_are_the_grids_own():
    ts = grids.uniform(16)
    x = X.bfloat16()

    def rate(t, y):
        return FLOW[0](y, t).to(y.dtype)

    profile = calibrate(FLOW[0], hosts.X_CALIBRATION, ts, progress=False)
    with for_torchdiffeq.wrap(rate, profile, ts, nfe=8) as wrapped:
        half = torchdiffeq.odeint(wrapped, x, ts.bfloat16(), method="euler")[-1]
    assert (wrapped.report.evaluations == 8).all()
    assert rms(half - torchdiffeq.odeint(rate, x, ts.bfloat16(), method="euler")[-1]).max() < 0.05


class Rate(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, t, y):
        return torch.tanh(self.layer(y.flatten(1))).reshape(y.shape) * (1 + t)


@pytest.mark.parametrize("solve", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint], ids=["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("wanted", ["parameters", "state"])
def test_gradients_are_those_of_the_bare_function(solve, wanted):
    torch.manual_seed(0)
    rate = Rate().requires_grad_(wanted == "parameters")

    def gradient(model):
        y0 = X.clone().requires_grad_(wanted == "state")
        rate.zero_grad()
        solve(model, y0, TS, method="rk4")[-1].square().sum().backward()
        return y0.grad.clone() if wanted == "state" else rate.layer.weight.grad.clone()

    warned = pytest.warns(UserWarning, match="Gradients are being recorded")
    with warned, for_torchdiffeq.wrap(rate, None, TS, method="rk4", tolerance=1.0) as wrapped:
        ours = gradient(wrapped)
    assert torch.equal(ours, gradient(rate))
    assert wrapped.report.bypasses > 0
    assert not wrapped.report.reuses.any()


def test_gradients_of_what_could_not_be_seen_to_learn_are_refused_and_never_wrong():
    rate = Rate()

    def gradient(wrapped):
        parameters = tuple(rate.parameters())
        end = torchdiffeq.odeint_adjoint(wrapped, X, TS, method="euler", adjoint_params=parameters)[-1]
        end.square().sum().backward()

    stopped = pytest.raises(RuntimeError, match="outputs were reused; they would be wrong")
    with for_torchdiffeq.wrap(lambda t, y: rate(t, y), None, TS, tolerance=0.5) as wrapped, stopped:
        gradient(wrapped)


def test_without_gradients_a_module_with_parameters_is_cached():
    rate = Rate()
    with torch.no_grad(), for_torchdiffeq.wrap(rate, None, TS, tolerance=0.5) as wrapped:
        torchdiffeq.odeint_adjoint(wrapped, X, TS, method="euler")
    assert wrapped.report.reuses.any()
    assert list(wrapped.parameters()) == list(rate.parameters())


# torchsde


def test_the_probing_calls_before_the_first_step_cost_nothing_and_the_noise_is_the_sdes_own():
    x, report = sampled("torchsde euler", tolerance=0.0)
    assert (report.evaluations == hosts.STEPS).all()
    assert report.duplicates.any()
    with for_torchsde.wrap(hosts.Langevin(), None, TS_UP, tolerance=0.1) as wrapped:
        wrapped.f(TS_UP[0], X.flatten(1))
        assert (wrapped.noise_type, wrapped.sde_type) == ("diagonal", "ito")
        assert torch.equal(wrapped.g(0.0, X.flatten(1)), hosts.Langevin().g(0.0, X.flatten(1)))
    assert x.shape == SHAPE


def test_an_sde_without_a_drift_of_its_own_is_refused():
    class Joint(hosts.Langevin):
        def f_and_g(self, t, y):
            return self.f(t, y), self.g(t, y)

    with (
        pytest.raises(TypeError, match=r"f_and_g\. Write the drift"),
        for_torchsde.wrap(Joint(), None, TS_UP, tolerance=0.1),
    ):
        pass


# SciPy


def test_an_array_written_in_place_is_other_conditioning():
    steering, seen = np.array([1.0, 2.0]), []

    def steered(t, y, c):
        seen.append(c.copy())
        return -y * c.sum()

    with for_scipy.wrap(steered, None, TS, tolerance=10.0, method=None) as wrapped:
        for t in (1.0, 0.98, 0.96, 0.94):
            wrapped(t, np.ones(3), steering)
        assert len(seen) == 2
        steering[0] = 5.0
        assert np.array_equal(wrapped(0.94, np.ones(3), steering), steered(0.94, np.ones(3), steering))


def test_the_state_is_copied_in():
    with for_scipy.wrap(lambda t, y: -y, None, TS, tolerance=0.0, method=None) as wrapped:
        y = np.ones(3)
        first = wrapped(1.0, y)
        y *= 2
        assert np.array_equal(wrapped(1.0, y), -y)
        assert np.array_equal(first, -np.ones(3))


def test_steps_that_solve_ivp_cannot_be_held_to_are_refused():
    with pytest.raises(ValueError, match="equal steps only"):
        for_scipy.fixed_steps([0.0, 0.1, 0.3])


# DPM-Solver


def guided(condition, unconditional, net, tolerance, wrap_net):
    """Classifier-free guidance by the authors' `model_wrapper`, which makes a new conditioning tensor at every call."""
    module = dpm_solver_module()
    schedule = module.NoiseScheduleVP("discrete", betas=torch.linspace(1e-4, 0.02, 1000).double())
    ts = torch.linspace(1.0, 1e-3, 21).double()
    scope = dpm_solver.wrap(net, None, ts, schedule=schedule, tolerance=tolerance, labels=True)

    def sample(net):
        wrapped = module.model_wrapper(
            net,
            schedule,
            guidance_type="classifier-free",
            condition=condition,
            unconditional_condition=unconditional,
            guidance_scale=2.0,
        )
        return _steps(module.DPM_Solver(wrapped, schedule), schedule, ts)

    if not wrap_net:
        return sample(net), None
    with torch.no_grad(), scope as cached:
        return sample(cached), cached.report


def _steps(solver, schedule, ts):
    x = X.flatten(1)[:, :4]
    for s, t in pairwise(ts):
        x = solver.dpm_solver_first_update(x, s.expand(3), t.expand(3))
    return x


def test_conditioning_in_new_tensors_is_known_by_its_contents():
    calls = []

    def net(x, t, cond):
        calls.append((len(x), t.min().item(), t.max().item()))
        return torch.tanh(x * (1 + t[:, None] / 1000)) + cond

    condition, unconditional = torch.ones(3, 4).double(), torch.zeros(3, 4).double()
    full, _ = guided(condition, unconditional, net, 0.0, wrap_net=False)
    assert min(low for _, low, _ in calls) >= 0
    assert max(high for _, _, high in calls) <= 999
    exact, _ = guided(condition, unconditional, net, 0.0, wrap_net=True)
    assert torch.equal(exact, full)
    close, report = guided(condition, unconditional, net, 0.1, wrap_net=True)
    assert {query.branch for query in report.trace} == {0}
    assert report.reuses.any()
    assert (rms(close - full) < 0.01 * rms(full)).all()


def test_two_conditionings_are_never_answered_alike():
    module = dpm_solver_module()
    schedule, ts = module.NoiseScheduleVP("linear"), torch.linspace(1.0, 1e-3, 21).double()

    def net(x, t, cond):
        return torch.tanh(x) * cond

    class Alike:
        direction = 0

        def predicted(self, seen):  # a decision that is the same whoever asks
            return torch.zeros_like(seen.t)

    def walk(values, tolerance, **options):
        said = {value: [] for value in values}
        options |= dict(schedule=schedule, tolerance=tolerance, method=None)
        with dpm_solver.wrap(net, None, ts, **options) as cached:
            for t in ts[:-1]:
                for value in values:
                    said[value].append(cached(X.flatten(1), t.expand(3), torch.full((3, 1), value).double()))
        assert cached.report.reuses.any()
        return said

    every = dict(tolerance=0.5, criterion=Alike(), max_reuses=2)
    for value, said in walk([1.0, -1.0], **every).items():
        assert all(torch.equal(*pair) for pair in zip(said, walk([value], **every)[value], strict=True))
    together, output = walk([1.0, -1.0], 0.05), torch.tanh(X.flatten(1))
    for value, answers in together.items():
        for said in answers:
            assert (rms(said - value * output) < rms(said + value * output)).all()
    for one, alone in zip(together[1.0], walk([1.0], 0.05)[1.0], strict=True):  # who is asked first decides as if alone
        assert torch.equal(one, alone)


# k-diffusion


def test_a_callback_may_edit_what_was_denoised():
    host = BY_NAME["k-diffusion dpmpp_2m"]

    def dim(state):
        state["denoised"].mul_(0.9)

    def run(model):
        return sampling.sample_dpmpp_2m(model, X * (1 + SIGMAS[0]), SIGMAS, callback=dim, disable=True)

    full = run(host.model)
    with host.wrap(host.model, host.profile, tolerance=0.0) as wrapped:
        assert torch.equal(run(wrapped), full)
    with host.wrap(host.model, host.profile, nfe=16) as wrapped:
        assert rms(run(wrapped) - full).max() < 0.02


def test_with_churn_sigma_goes_up_and_the_result_stays_close():
    host = BY_NAME["k-diffusion euler"]

    def run(model):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return sampling.sample_euler(model, X * (1 + SIGMAS[0]), SIGMAS, disable=True, s_churn=3.0, s_tmax=3.0)

    full = run(host.model)
    for options, bound in ((dict(tolerance=0.0), 0.0), (dict(nfe=16), 0.05)):
        with kdiffusion.wrap(host.model, host.profile, SIGMAS, method=None, **options) as wrapped:
            assert rms(run(wrapped) - full).max() <= bound


def test_euler_in_sigma_is_euler_on_the_linear_path():
    start = X * (1 + SIGMAS[0])
    theirs = sampling.sample_euler(hosts.denoiser, start, SIGMAS, disable=True)
    ours = integrate(FLOW[0], X, kdiffusion.times(SIGMAS), Euler())
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_ancestral_step_without_its_noise_is_as_its_weights_say(eta):
    options = dict(eta=eta, noise_sampler=lambda sigma, sigma_next: torch.zeros_like(X), disable=True)
    theirs = sampling.sample_euler_ancestral(hosts.denoiser, X * (1 + SIGMAS[0]), SIGMAS, **options)
    ours = integrate(FLOW[0], X, kdiffusion.times(SIGMAS), kdiffusion.EulerAncestral(eta))
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-12)


def test_extra_args_are_conditioning():
    def steered(x, sigma, shift):
        return hosts.denoiser(x, sigma) + shift

    shifts = torch.zeros(()).double(), torch.ones(()).double()
    with kdiffusion.wrap(steered, None, SIGMAS, tolerance=10.0) as wrapped:
        for sigma in SIGMAS[:6]:
            for shift in shifts:
                wrapped(X, sigma.expand(3), shift=shift)
    assert {query.branch for query in wrapped.report.trace} == {0, 1}
    assert wrapped.report.reuses.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_model_in_half_precision_is_answered_in_it(dtype):
    sigmas = SIGMAS.to(torch.float32)

    def low(x, sigma):
        return hosts.denoiser(x.float(), sigma).to(dtype)

    for tolerance in (0.0, 0.05):
        with kdiffusion.wrap(low, None, sigmas, tolerance=tolerance, method=None) as wrapped:
            for sigma in sigmas[:-1]:
                said = wrapped(X.to(dtype), sigma.expand(3))
                assert said.dtype == dtype
                assert tolerance > 0 or torch.equal(said, low(X.to(dtype), sigma.expand(3)))
    assert wrapped.report.reuses.any()


@pytest.mark.parametrize("moved", [[], [1]], ids=["nothing moved", "one image moved"])
def test_what_is_asked_again_is_answered_bit_by_bit_though_it_was_translated(moved):
    x = 30 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))

    def low(x, sigma):
        return torch.sin(x) / 3

    for tolerance in (0.0, 0.5):
        with kdiffusion.wrap(low, None, SIGMAS.float(), tolerance=tolerance, method=None) as wrapped:
            again = x.clone()
            again[moved] += 1
            for sigma in SIGMAS.float()[3:5]:
                assert torch.equal(wrapped(x, sigma.expand(3)), low(x, sigma))
                assert torch.equal(wrapped(again, sigma.expand(3))[[0, 2]], low(again, sigma)[[0, 2]])
                if tolerance == 0.0:
                    assert torch.equal(wrapped(x, sigma.expand(3)), low(x, sigma))
    assert wrapped.report.duplicates.any()


def test_a_model_that_could_learn_is_cached_in_samplers_that_never_teach():
    net = Net(hosts.denoiser)
    with kdiffusion.wrap(net, None, SIGMAS, tolerance=0.02) as wrapped:
        sampling.sample_euler(wrapped, X * (1 + SIGMAS[0]), SIGMAS, disable=True)  # without gradients inside
    assert wrapped.report.reuses.any()
    assert wrapped.report.bypasses == 0


def test_where_one_step_takes_a_gradient_the_others_are_cached_and_it_is_right():
    with kdiffusion.wrap(hosts.denoiser, None, SIGMAS, tolerance=0.5, method=None) as wrapped:
        for k, sigma in enumerate(SIGMAS[:-1].unbind()):
            x = X.clone().requires_grad_(k == 12)
            if k != 12:
                wrapped(x, sigma.expand(3))
                continue
            with pytest.warns(UserWarning, match="Gradients are being recorded"):
                ours = torch.autograd.grad(wrapped(x, sigma.expand(3)).sum(), x)[0]
            bare = torch.autograd.grad(hosts.denoiser(x, sigma.expand(3)).sum(), x)[0]
            assert torch.equal(ours, bare)
    assert wrapped.report.reuses.any()


# SiT, score_sde, flow_matching


def test_the_second_call_at_the_same_place_is_free_in_sits_sde():
    _, report = sampled("SiT SDE", nfe=12)
    assert (report.duplicates == hosts.STEPS).all()
    assert (report.evaluations == 12).all()


def test_sits_sde_steps_as_its_weights_say():
    host = BY_NAME["SiT SDE"]
    grid = torch.cat([torch.linspace(0.0, 0.96, 5).double(), torch.tensor([1.0]).double()])
    stepper = sit.SDE(Linear(data_at=1.0), "sigma", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        theirs = hosts.sit_sde(lambda x, t: FLOW[1](x, t), X, grid[:-2], 0.04, lambda t, x: hosts.rows(1 - t, x))
    ours = integrate(FLOW[1], X, grid, stepper)
    assert host.folds
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-6)


def test_a_profile_in_the_papers_time_is_mirrored():
    ts = grids.uniform(hosts.STEPS, start=0.0, end=1.0)
    down = calibrate(FLOW[0], hosts.X_CALIBRATION, 1 - ts, progress=False)
    host = BY_NAME["flow_matching"]
    with host.wrap(host.model, down, nfe=12) as wrapped:
        theirs = host.sample(wrapped)
    assert torch.allclose(theirs, sampled("flow_matching", nfe=12)[0], rtol=0, atol=1e-12)


class Net(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.scale, self.model = nn.Parameter(torch.ones(()).double()), model

    def forward(self, x, labels):
        return self.scale.detach() * self.model(x, labels)


def test_a_module_stays_one_for_a_host_that_says_eval():
    host = BY_NAME["score_sde VP"]
    net = Net(host.model)
    with torch.no_grad(), host.wrap(net, host.profile, nfe=12) as wrapped:
        wrapped.eval()
        assert not net.training
        assert wrapped.scale is net.scale
        assert list(wrapped.parameters()) == [net.scale]
        assert torch.equal(host.sample(wrapped), sampled("score_sde VP", nfe=12)[0])


@pytest.mark.parametrize("name", ["VP", "VE"])
def test_a_score_function_and_discrete_labels_are_the_same_field(name):
    host = BY_NAME[f"score_sde {name}"]
    sde, ts = (hosts.VPSDE(), hosts.VESDE())[name == "VE"], torch.linspace(1.0, 1e-2, hosts.STEPS).double()

    def prob(x, t):
        return score_sde.marginal(sde, t)[1]

    def score_fn(x, t):
        labels = prob(x, t) if name == "VE" else t * 999
        y = host.model(x, labels)
        return y if name == "VE" else -y / hosts.rows(prob(x, t), x)

    def discrete(x, labels):
        t = sde.T - labels.double() / 999 if name == "VE" else labels.double() / 999
        return score_fn(x, t) if name == "VE" else host.model(x, t * 999)

    continuous = torch.round((sde.T - ts if name == "VE" else ts) * 999)
    start = X * prob(X, ts[:1])
    answers = []
    for model, labels, asked in ((score_fn, "time", ts), (discrete, "discrete", continuous)):
        times = ts if labels == "time" else (sde.T - continuous / 999 if name == "VE" else continuous / 999)
        with score_sde.wrap(model, host.profile, times, sde=sde, labels=labels, nfe=12) as wrapped:
            answers.append([wrapped(start, at.expand(3)) for at in asked])
        assert (wrapped.report.evaluations == 12).all()
    with score_sde.wrap(discrete, host.profile, times, sde=sde, labels="discrete", tolerance=0.0) as wrapped:
        assert all(torch.equal(wrapped(start, at.expand(3)), discrete(start, at.expand(3))) for at in continuous)


def test_no_plugin_imports_a_host():
    """SciPy and torchdiffeq are dependencies of the library itself."""
    names = sorted(p.stem for p in (Path(__file__).parents[1] / "sencache/plugins").glob("[a-z]*.py"))
    assert len(names) >= 9
    plugins = "; ".join(f"import sencache.plugins.{name}" for name in (*names, "comfyui"))
    strangers = "{'torchsde', 'k_diffusion', 'ldm', 'comfy', 'flow_matching', 'diffusers'}"
    code = f"import sys, sencache; {plugins}; print({strangers} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
