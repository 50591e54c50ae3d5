"""Every scheduler that a pipeline takes: its numbers, its counts, and what is owed in its states."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

import sencache
from benchmarks.tiny_pipelines import cogvideox, counted, prompt, run_cogvideox, run_wan, wan
from sencache import CachedField
from sencache.norms import rms
from sencache.plugins.diffusers.sampler import clock, probe
from solvers import DPMSolverPP, Euler, Linear, UniPC

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # of schedulers, in NumPy
    pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning"),  # torchsde, of the bare scheduler too
    pytest.mark.filterwarnings("ignore:The `scale_model_input` function:UserWarning"),
]

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NOISY = {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}


def variants():
    """(id, family, class name, options) of everything that steps and is not adaptive."""
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name != "DPMSolverSDEScheduler" or diffusers.utils.is_torchsde_available():
            yield scheduler.name, "diffusion", scheduler.name, {}
    yield "CogVideoXDDIM", "diffusion", "CogVideoXDDIMScheduler", {}
    yield "CogVideoXDPM", "diffusion", "CogVideoXDPMScheduler", {}
    yield "PNDM, multistep only", "diffusion", "PNDMScheduler", {"skip_prk_steps": True}
    yield "UniPC 3", "diffusion", "UniPCMultistepScheduler", {"solver_order": 3}
    yield "DPM 3, Karras", "diffusion", "DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}
    yield "DPM, SDE", "diffusion", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
    yield "DDIM, noisy", "diffusion", "DDIMScheduler", {"clip_sample": True}
    for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"):
        yield f"{name}, flow", "flow", f"{name}Scheduler", FLOW
    yield "UniPC 3, flow", "flow", "UniPCMultistepScheduler", FLOW | {"solver_order": 3}
    for name in ("Euler", "Heun"):
        yield f"FlowMatch{name}", "flow", f"FlowMatch{name}DiscreteScheduler", {"shift": 3.0}
    yield "FlowMatchLCM", "flow", "FlowMatchLCMScheduler", {"shift": 3.0}
    yield (
        "FlowMatchEuler, noisy",
        "flow",
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "stochastic_sampling": True},
    )


VARIANTS = list(variants())


@pytest.fixture(scope="module")
def pipes():
    return {"diffusion": cogvideox(), "flow": wan()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path))


def error(x, of):
    return float(rms(x - of).max() / rms(of).max())


def run_of(pipe, steps):
    """A run on `pipe` in which also global random numbers are the same each time."""
    torch.manual_seed(5)
    return (run_wan if isinstance(pipe, diffusers.WanPipeline) else run_cogvideox)(pipe, steps=steps)


CONFIG = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(("family", "name", "options"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_counts_are_true_and_tolerance_0_is_exact(pipes, family, name, options):
    pipe = pipes[family]
    kind = getattr(diffusers, name)
    pipe.scheduler = kind.from_config(options if family == "flow" else CONFIG | options)
    bare, count = counted(pipe, lambda: run_of(pipe, 8))
    numbers = torch.rand(3)

    handle = sencache.enable(pipe, tolerance=0)
    exact, exact_count = counted(pipe, lambda: run_of(pipe, 8))
    assert torch.equal(exact, bare)
    assert count == exact_count == int(handle.report.evaluations[0])

    handle = sencache.enable(pipe, nfe=5)
    measured = run_of(pipe, 8)
    assert torch.equal(measured, bare)
    assert torch.equal(torch.rand(3), numbers)  # no random number was used
    cached, cached_count = counted(pipe, lambda: run_of(pipe, 8))
    assert torch.equal(torch.rand(3), numbers)
    assert (handle.report.evaluations == cached_count).all()
    assert cached_count == 5 * (2 if family == "flow" else 1)
    assert error(cached, bare) < (0.2 if kind.__name__ in NOISY or "SDE" in str(options) else 0.1)

    sencache.disable(pipe)
    assert type(pipe.scheduler) is kind
    assert torch.equal(run_of(pipe, 8), bare)


@pytest.mark.parametrize(("family", "name", "options"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_the_numbers_of_a_scheduler_predict_where_it_ends(family, name, options):
    """Random outputs, fed step by step into the scheduler itself, end where their weights say."""
    kind = getattr(diffusers, name)
    scheduler = kind.from_config(options if family == "flow" else CONFIG | options | {"clip_sample": False})
    scheduler.set_timesteps(7)
    scheduler.is_scale_input_called = True
    given = {"return_dict": False}
    if name == "CogVideoXDPMScheduler":
        given |= {"old_pred_original_sample": None, "timestep_back": None}
    sampler = probe(scheduler, given, 0)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, len(sampler.which), 1, 4, 2, 2, generator=generator)
    ends = []
    for some in (outputs[0], outputs[1], outputs[1]):
        torch.manual_seed(3)
        scheduler.set_timesteps(7)
        scheduler.noise_sampler = None
        x, old = torch.ones(1, 4, 2, 2), None
        for k, (y, t) in enumerate(zip(some, scheduler.timesteps, strict=True)):
            if name == "CogVideoXDPMScheduler":
                back = scheduler.timesteps[k - 1] if k else None
                x, old = scheduler.step(y, old, t, back, x, return_dict=False)
            else:
                x = scheduler.step(y, t, x, return_dict=False)[0]
        ends.append(x)
    weights = sampler.weights[-1]["", 0]
    predicted = torch.einsum("k,k...->...", weights, (outputs[0] - outputs[1]).double())
    torch.testing.assert_close((ends[0] - ends[1]).double(), predicted, rtol=1e-3, atol=2e-4)


def test_time_is_what_the_model_would_be_told_unrounded():
    unipc = diffusers.UniPCMultistepScheduler.from_config(FLOW)
    unipc.set_timesteps(10)
    assert not unipc.timesteps.is_floating_point()
    torch.testing.assert_close(clock(unipc), unipc.sigmas[:-1].double() * 1000)
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(CONFIG | {"use_karras_sigmas": True})
    dpm.set_timesteps(10)
    assert (clock(dpm) - dpm.timesteps).abs().max() <= 1
    assert (clock(dpm) - dpm.timesteps).abs().max() > 0.1
    ddim = diffusers.DDIMScheduler.from_config(CONFIG)
    ddim.set_timesteps(10)
    assert torch.equal(clock(ddim), ddim.timesteps.double())
    upward = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    upward.set_timesteps(10)
    assert (clock(upward).diff() > 0).all()


@pytest.mark.parametrize(
    ("scheduler", "stepper"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), Euler()),
        (diffusers.UniPCMultistepScheduler.from_config(FLOW), UniPC(Linear())),
        (diffusers.DPMSolverMultistepScheduler.from_config(FLOW), DPMSolverPP(Linear())),
    ],
    ids=["Euler", "UniPC", "DPM-Solver++"],
)
def test_what_is_owed_is_what_the_library_repays_in_its_own_steppers(scheduler, stepper):
    """The same plan on the guided field, by `CachedField.integrate`, which repays state and history of our steppers."""
    pipe = wan(scheduler)
    x_T = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    full = run_wan(pipe, 14, latents=x_T)
    handle = sencache.enable(pipe, nfe=6)
    run_wan(pipe, 14)
    cached = run_wan(pipe, 14, latents=x_T)
    sigmas, profile, nodes = scheduler.sigmas.double(), handle.profile, handle.plan.nodes
    sencache.enable(pipe, nfe=6, correct=False)
    uncorrected = run_wan(pipe, 14, latents=x_T)
    sencache.disable(pipe)

    def field(x, t):
        told = scheduler.timesteps[(scheduler.sigmas[:-1] - t).abs().argmin()].expand(1)
        outputs = (
            pipe.transformer(hidden_states=x.float(), timestep=told, encoder_hidden_states=prompt(i), return_dict=False)
            for i in (1, 2)
        )
        with torch.no_grad():
            v, v_none = (output[0] for output in outputs)
        return (v_none + 3.0 * (v - v_none)).to(x)

    scheduler.set_timesteps(14)
    own = replace(profile, t=scheduler.sigmas[:-1].double(), facts={})
    library = CachedField(field, own, nfe=6)
    mine = library.integrate(x_T.double(), sigmas, stepper)
    assert torch.equal(library.plan(sigmas, stepper).nodes, nodes)
    assert error(cached.double(), mine) < 0.05 * error(uncorrected.double(), full)


def test_a_scheduler_that_cannot_be_followed_is_refused_with_the_next_move():
    class Backwards(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas[2], self.timesteps[2] = self.sigmas[0], self.timesteps[0]

    class Curved(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output.abs(), timestep, sample, **kwargs)

    class Stepless:
        def set_timesteps(self, steps):
            pass

    pipe = wan(Backwards(shift=3.0))
    sencache.enable(pipe, nfe=4)
    with pytest.raises(ValueError, match=r"goes back in time.*disable"):
        run_wan(pipe, 8)
    pipe.scheduler = Curved(shift=3.0)
    with pytest.raises(ValueError, match="not linear"):
        run_wan(pipe, 8)
    sencache.disable(pipe)
    pipe.scheduler = Stepless()
    with pytest.raises(ValueError, match="Expected a scheduler with"):
        sencache.enable(pipe, nfe=4)
