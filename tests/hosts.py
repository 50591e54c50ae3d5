"""Samplers of other people, all around one Gaussian flow: the real ones where they install, else their call shape.

A host is how its sampler is run, `sample(model)`, on a model of its own shape, and how that model is wrapped. The
stand-ins at the end make the calls that were read in the hosts' sources, and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp

from benchmarks.hosts import k_diffusion_sampling
from sencache import calibrate
from sencache.plugins import dpm_solver, flow_matching, kdiffusion, score_sde, sit
from sencache.plugins import scipy as scipy_plugin
from sencache.plugins import torchdiffeq as torchdiffeq_plugin
from sencache.plugins import torchsde as torchsde_plugin
from solvers import VP, Linear, grids
from tests.flows import GaussianFlow

SHAPE = (3, 1, 2, 3)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X_CALIBRATION = torch.randn(8, *SHAPE[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MEAN = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 2, 3)
STD = torch.linspace(0.2, 0.9, 6, dtype=torch.float64).reshape(1, 2, 3)
FLOW = {end: GaussianFlow(Linear(data_at=float(end)), MEAN, STD) for end in (0, 1)}
STEPS = 24


@dataclass
class Host:
    name: str
    model: Callable[..., Any]
    sample: Callable[[Any], torch.Tensor]
    wrap: Callable[..., Any]  # (model, profile, **options) -> scope
    profile: Any
    folds: bool = False  # whether corrections are folded into its steps
    real: bool = True
    queries: int = STEPS  # that the plan knows of

    def __repr__(self) -> str:
        return self.name


def rows(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x)


def seeded(sampler: Callable[..., Any]) -> Callable[..., Any]:
    """The sampler with its noise from the same seed in every run."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return sampler(*args, **kwargs)

    return run


# k-diffusion


def denoiser(x, sigma, **extra):
    c = rows(sigma, x)
    return FLOW[0].data(x / (1 + c), c / (1 + c))


SIGMAS = torch.cat([torch.linspace(4.0, 0.15, STEPS, dtype=torch.float64) ** 2, torch.zeros(1, dtype=torch.float64)])


def k_hosts():
    sampling, ts = k_diffusion_sampling(), kdiffusion.times(SIGMAS)
    profile = calibrate(kdiffusion.field(denoiser), X_CALIBRATION, ts, progress=False)
    start = X * (1 + SIGMAS[0])
    known = {"euler": True, "euler_ancestral": True, "heun": False, "dpmpp_2m": False}
    for name in (*known, "lms", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"):
        sampler = seeded(getattr(sampling, f"sample_{name}"))
        if name in ("dpmpp_sde", "dpmpp_2m_sde"):  # their own Brownian tree takes its seed from nowhere
            sampler = partial(sampler, noise_sampler=lambda sigma, sigma_next: torch.randn_like(start))
        yield Host(
            f"k-diffusion {name}",
            denoiser,
            lambda model, s=sampler: s(model, start, SIGMAS, disable=True),
            lambda model, profile, m=name if name in known else None, **options: kdiffusion.wrap(
                model, profile, SIGMAS, method=m, **options
            ),
            profile,
            known.get(name, False),
        )


# torchdiffeq

TS = grids.uniform(STEPS)


def func(t, y):
    return FLOW[0](y, t)


def torchdiffeq_hosts():
    for name, stages in {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}.items():
        ts = grids.uniform(STEPS // stages)
        yield Host(
            f"torchdiffeq {name}",
            func,
            lambda model, name=name, ts=ts: torchdiffeq.odeint(model, X, ts, method=name)[-1],
            lambda model, profile, m=name, ts=ts, **options: torchdiffeq_plugin.wrap(
                model, profile, ts, method=m, **options
            ),
            calibrate(torchdiffeq_plugin.field(func), X_CALIBRATION, ts, progress=False),
            name == "euler",
        )


# torchsde


class Langevin:
    """The SDE with the flow's marginals, upward in time, and its noise."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        x = y.reshape(-1, *SHAPE[1:])
        return (FLOW[1](x, t) + 0.05 * FLOW[1].score(x, t)).flatten(1)

    def g(self, t, y):
        return torch.full_like(y, 0.1**0.5)


TS_UP = grids.uniform(STEPS, start=0.0, end=0.96)


def torchsde_hosts():
    start, profile = X.flatten(1), None
    profile = calibrate(torchsde_plugin.field(Langevin()), X_CALIBRATION.flatten(1), TS_UP, progress=False)
    for name in ("euler", "srk"):

        def sample(sde, name=name):
            levy = dict(levy_area_approximation="space-time") if name == "srk" else {}
            brownian = torchsde.BrownianInterval(0.0, 1.0, start.shape, start.dtype, entropy=3, **levy)
            ends = TS_UP[[0, -1]]
            return torchsde.sdeint(sde, start, ends, bm=brownian, dt=0.04, method=name)[-1].reshape(SHAPE)

        yield Host(
            f"torchsde {name}",
            Langevin(),
            sample,
            lambda model, profile, m=name if name == "euler" else None, **options: torchsde_plugin.wrap(
                model, profile, TS_UP, method=m, **options
            ),
            profile,
            name == "euler",
        )


# DPM-Solver


def dpm_solver_module() -> Any:
    """The authors' file, which stable-diffusion-sdkit carries; it is older than Python's warning about its strings."""
    if importlib.util.find_spec("ldm") is None:
        raise ModuleNotFoundError("DPM-Solver's file is not here: pip install --no-deps stable-diffusion-sdkit==2.1.5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("ldm.models.diffusion.dpm_solver.dpm_solver")


def dpm_hosts():
    module = dpm_solver_module()
    schedule, flow = module.NoiseScheduleVP("linear"), GaussianFlow(VP(), MEAN, STD)
    ts = torch.linspace(1.0, 1e-3, STEPS + 1, dtype=torch.float64)

    def model_fn(x, t):
        return flow.noise(x, t)

    start = X
    scale = schedule.marginal_alpha(ts[:1]) + schedule.marginal_std(ts[:1])
    profile = calibrate(
        dpm_solver.field(model_fn, schedule), X_CALIBRATION / scale, dpm_solver.times(ts, schedule), progress=False
    )
    for method, order in (("multistep", 1), ("multistep", 2), ("multistep", 3), ("singlestep", 3)):

        def sample(model, method=method, order=order):
            solver = module.DPM_Solver(model, schedule, predict_x0=order == 2)
            skip = "logSNR" if method == "singlestep" else "time_uniform"  # with the other, that one fails in torch
            options = dict(steps=STEPS, order=order, method=method, t_end=1e-3, skip_type=skip)
            get = solver.get_time_steps
            solver.get_time_steps = lambda *a, **k: get(*a, **k).double()  # float32 otherwise
            module.tqdm = lambda loop, **k: loop
            return solver.sample(start, **options)

        name = f"{method} {order}"
        yield Host(
            f"DPM-Solver {name}",
            model_fn,
            sample,
            lambda model, profile, m=name if method == "multistep" else None, **options: dpm_solver.wrap(
                model, profile, ts, schedule=schedule, method=m, **options
            ),
            profile,
            order == 1,
        )


# SciPy


def fun(t, y):
    return FLOW[0](torch.tensor(y).reshape(1, *SHAPE[1:]), t).flatten().numpy()


def scipy_hosts():
    ts = grids.uniform(8)
    profile = calibrate(scipy_plugin.field(fun), X_CALIBRATION.flatten(1), ts, progress=False)
    for method, stages in {"RK23": 3, "RK45": 6}.items():

        def sample(model, method=method):
            steps = scipy_plugin.fixed_steps(ts)
            solution = solve_ivp(model, (1.0, 0.0), X[0].flatten().numpy(), method=method, **steps)
            return torch.from_numpy(solution.y[:, -1].copy()).reshape(1, *SHAPE[1:])

        yield Host(
            f"SciPy {method}",
            fun,
            sample,
            lambda model, profile, m=method, **options: scipy_plugin.wrap(model, profile, ts, method=m, **options),
            profile,
            queries=8 * stages,
        )


# The call shapes of hosts that do not install: what their loops ask for, and how they use it


class OdeSolver:
    """flow_matching's: keyword arguments, t 0-dim, and torchdiffeq underneath."""

    def __init__(self, velocity_model):
        self.velocity_model = velocity_model

    def sample(self, x_init, time_grid, method, step_size=None, **extras):
        def rate(t, x):
            return self.velocity_model(x=x, t=t, **extras)

        return torchdiffeq.odeint(rate, x_init, time_grid, method=method)[-1]


def flow_matching_hosts():
    ts, label = grids.uniform(STEPS, start=0.0, end=1.0), torch.arange(3)

    def model(x, t, label):
        return FLOW[1](x, t)

    yield Host(
        "flow_matching",
        model,
        lambda model: OdeSolver(model).sample(X, ts, "euler", label=label),
        lambda model, profile, **options: flow_matching.wrap(model, profile, ts, **options),
        calibrate(flow_matching.field(model, label=label), X_CALIBRATION, ts, progress=False),
        True,
        real=False,
    )


class Sit:
    """A SiT whose guidance wants the batch in two halves."""

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        conditional = FLOW[1](half, rows(t[: len(half)], half)) + 0 * cfg_scale
        assert len(t) == len(y) == len(x)
        return torch.cat([conditional, conditional])


def sit_sde(model, x, ts, last_step, diffusion, **kwargs):
    """Euler-Maruyama as SiT's own: the model is called for the drift and for the score, at the same (x, t)."""
    dt = ts[1] - ts[0]

    def drift(x, t):
        sigma = rows(1 - t, x)
        v = model(x, t, **kwargs)
        score = (rows(t, x) * model(x, t, **kwargs) - x) / sigma
        return v + diffusion(t, x) * score

    for at in ts:
        t = torch.ones(len(x)).to(x) * at
        x = x + drift(x, t) * dt + (2 * diffusion(t, x) * dt).sqrt() * torch.randn_like(x)
    end = torch.ones(len(x)).to(x) * (ts[-1] + dt)
    return x + drift(x, end) * last_step


def sit_hosts():
    both, y = torch.cat([X[:2], X[:2]]), torch.tensor([1, 2, 9, 9])
    ts = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    model = Sit().forward_with_cfg
    conditioning = dict(y=y, cfg_scale=1.5)
    profile = calibrate(lambda x, t: FLOW[1](x, t), X_CALIBRATION, ts, progress=False)

    def ode(model):
        def rate(t, x):
            return model(x, torch.ones(len(x)).to(x) * t, **conditioning)

        return torchdiffeq.odeint(rate, both, ts, method="euler")[-1][:2]

    yield Host(
        "SiT ODE",
        model,
        ode,
        lambda model, profile, **options: sit.wrap(model, profile, ts, **options),
        profile,
        True,
        real=False,
    )
    steps, dt = torch.linspace(0.0, 0.96, STEPS, dtype=torch.float64)[:-1], 0.96 / (STEPS - 1)
    grid = torch.cat([steps, torch.tensor([0.96, 1.0], dtype=torch.float64)])
    sde = sit.SDE(Linear(data_at=1.0), "sigma", 1.0)
    assert abs(float(grid[1] - grid[0]) - dt) < 1e-12
    yield Host(
        "SiT SDE",
        model,
        seeded(lambda model: sit_sde(model, both, steps, 0.04, lambda t, x: rows(1 - t, x), **conditioning)[:2]),
        lambda model, profile, **options: sit.wrap(model, profile, grid, method=sde, **options),
        calibrate(lambda x, t: FLOW[1](x, t), X_CALIBRATION, grid, progress=False),
        True,
        real=False,
    )


class VPSDE:
    """score_sde's: what its samplers and ours ask of it."""

    N, T = 1000, 1

    def marginal_prob(self, x, t):
        c = VP().coefficients(t)
        return rows(c.alpha, x) * x, c.sigma


class VESDE:
    sigma_max, N, T = 20.0, 1000, 1

    def marginal_prob(self, x, t):
        return x, 0.02 * (self.sigma_max / 0.02) ** t


def ancestral(sde, model, x, ts, score):
    """A predictor of score_sde's kind with one Langevin step before it, on any Gaussian path."""
    for t, t_next in zip(ts, [*ts[1:], ts[-1] / 2], strict=True):
        vec_t = torch.ones(len(x), dtype=x.dtype) * t
        x = x + 1e-3 * score(model, x, vec_t) + 0.045 * torch.randn_like(x)
        (alpha, sigma), (a, s) = (score_sde.marginal(sde, torch.stack([at])) for at in (t, t_next))
        noise = -sigma * score(model, x, vec_t)
        x = a * (x - sigma * noise) / alpha + s * noise
    return x


def vp_score(model, x, t):
    return -model(x, t * 999) / rows(VPSDE().marginal_prob(x, t)[1], x)


def score_hosts():
    vp_flow = GaussianFlow(VP(), MEAN, STD)
    ts = torch.linspace(1.0, 1e-2, STEPS, dtype=torch.float64)

    def vp_model(x, labels):
        return vp_flow.noise(x, labels / 999)

    def ve_model(x, labels):
        c = rows(labels, x)
        return -FLOW[0].noise(x / (1 + c), c / (1 + c)) / c

    def ve_score(model, x, t):
        return model(x, VESDE().marginal_prob(x, t)[1])

    for name, sde, model, score in (("VP", VPSDE(), vp_model, vp_score), ("VE", VESDE(), ve_model, ve_score)):
        grid = torch.cat([score_sde.times(ts, sde), torch.zeros(1, dtype=torch.float64)])
        start = X * score_sde.marginal(sde, ts[:1])[1]
        profile = calibrate(FLOW[0], X_CALIBRATION, grid, progress=False)
        yield Host(
            f"score_sde {name}",
            model,
            seeded(lambda model, sde=sde, start=start, score=score: ancestral(sde, model, start, ts, score)),
            lambda model, profile, sde=sde, **options: score_sde.wrap(model, profile, ts, sde=sde, **options),
            profile,
            real=False,
        )


def stand_ins(monkeypatch) -> dict[str, Any]:
    """What the page of hosts takes as given: modules that are not installed, and the names of SiT's and score_sde's."""
    dpm_solver_module()
    k_diffusion_sampling()
    solver = types.ModuleType("flow_matching.solver")
    solver.ODESolver = OdeSolver
    monkeypatch.setitem(sys.modules, "flow_matching", types.ModuleType("flow_matching"))
    monkeypatch.setitem(sys.modules, "flow_matching.solver", solver)
    z = torch.cat([X[:2], X[:2]])

    def sample_ode(sampling_method, num_steps):
        ts = torch.linspace(0, 1, num_steps)

        def sample(x, model, **kwargs):
            rate = lambda t, x: model(x, torch.ones(len(x)).to(x) * t, **kwargs)  # noqa: E731
            return torchdiffeq.odeint(rate, x, ts.to(x), method=sampling_method)

        return sample

    sde, vp_flow = VPSDE(), GaussianFlow(VP(), MEAN, STD)
    monkeypatch.setattr(VPSDE, "N", 100)

    def sampling_fn(model):
        ts = torch.linspace(1, 1e-3, sde.N)
        return ancestral(sde, model, X.float(), ts, vp_score), sde.N

    return dict(
        net=Sit(),
        z=z,
        y=torch.tensor([1, 2, 9, 9]),
        sampler=types.SimpleNamespace(sample_ode=sample_ode),
        sde=sde,
        score_model=lambda x, labels: vp_flow.noise(x, labels / 999),
        sampling_fn=sampling_fn,
    )


HOSTS = [
    host
    for make in (
        k_hosts,
        torchdiffeq_hosts,
        torchsde_hosts,
        dpm_hosts,
        scipy_hosts,
        flow_matching_hosts,
        sit_hosts,
        score_hosts,
    )
    for host in make()
]
