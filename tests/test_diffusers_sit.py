"""The trained SiT in a pipeline of diffusers' manner is as close to its full run as through `integrate`."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

import sencache
from benchmarks.metrics import psnr
from benchmarks.shipped import noise, sit_field
from sencache import CachedField, calibrate
from solvers import UniPC, grids, integrate
from solvers.paths import Linear

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SAMPLES, STEPS = 4, 50


class Transformer(nn.Module):
    """The SiT with guidance inside, called as pipelines call: noise at timestep 1000, a tuple returned."""

    def __init__(self):
        super().__init__()
        self.field = sit_field(SAMPLES)
        self.model = self.field.model

    def forward(self, hidden_states, timestep, return_dict=True):
        assert not return_dict
        return (self.field(hidden_states, timestep / 1000),)


class Pipeline(diffusers.DiffusionPipeline):
    """A pipeline's loop, and nothing else."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents):
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            v = self.transformer(hidden_states=latents, timestep=t.expand(len(latents)), return_dict=False)[0]
            latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
        return latents


def grid(pipe):
    pipe.scheduler.set_timesteps(STEPS)
    return pipe.scheduler.sigmas.double()


@pytest.mark.parametrize("nfe", [25, 15])
def test_with_a_single_step_scheduler_it_is_as_close_as_integrate(nfe, tmp_path):
    pipe, x = Pipeline(Transformer(), diffusers.FlowMatchEulerDiscreteScheduler()), noise(SAMPLES, "choosing")
    ts, field = grid(pipe), sit_field(SAMPLES)
    full = pipe(x)
    handle = sencache.enable(pipe, nfe=nfe, folder=tmp_path)
    pipe(noise(SAMPLES, "calibration"))
    cached = pipe(x)
    assert handle.report.evaluations.tolist() == [nfe] * SAMPLES
    assert handle.report.expected == handle.plan.relative_error
    with torch.no_grad():
        profile = calibrate(field, noise(SAMPLES, "calibration"), ts.float(), secants=False, progress=False)
        ours = CachedField(field, profile, nfe=nfe).integrate(x, ts.float())
        reference = integrate(field, x, ts.float())
        fewer = integrate(field, x, grids.uniform(nfe, float(ts[0]), 0.0).float())
    assert psnr(cached, ours).min() > 90  # the same sample, not only as good a one
    ways = psnr(cached, full).median(), psnr(ours, reference).median()
    assert abs(float(ways[0] - ways[1])) < 0.5
    assert ways[0] > psnr(fewer, full).median() + 10


def test_with_a_multistep_scheduler_it_is_closer_than_with_fewer_steps(tmp_path):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, num_train_timesteps=1000
    )
    pipe, x = Pipeline(Transformer(), scheduler), noise(SAMPLES, "choosing")
    full, ts = pipe(x), grid(pipe)
    sencache.enable(pipe, nfe=20, folder=tmp_path)
    pipe(noise(SAMPLES, "calibration"))
    near = psnr(pipe(x), full).median()
    inner = torch.linspace(float(ts[0]), 0.0, 21, dtype=torch.float64)
    with torch.no_grad():
        fewer = integrate(sit_field(SAMPLES), x, inner.float(), UniPC(Linear()))
    assert near > psnr(fewer, full).median() + 6
