"""Block stacks reused in a pipeline: the adapter's under the same rule, and an error where there are none."""

from __future__ import annotations

import pytest
import torch

import sencache
from benchmarks.tiny_pipelines import cogvideox, flux, ltx, prompt, run_cogvideox, run_ltx, run_wan, wan
from sencache import CachedField, SensitivityProfile, rms
from sencache.adapters.cogvideox import CogVideoXField
from sencache.adapters.wan import WanField
from solvers import DPMSolverPP, Euler, integrate

STEPS, N = 10, 2  # DDIM's steps of 1000 timesteps meet where their number divides 1000
GIVEN = {"negative": prompt(2), "guidance": 3.0}


def of_wan(pipe):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    return WanField(pipe.transformer, prompt(1), **GIVEN), (1, 16, 2, 2, 2), scheduler.sigmas, Euler()


def of_cogvideox(pipe):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    field = CogVideoXField(pipe.transformer, prompt(1), scheduler.alphas_cumprod, **GIVEN)
    ts = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    return field, (1, 3, 4, 2, 2), ts, DPMSolverPP(field.path, order=1)


def flat(times):
    """A profile by which everything changes alike."""
    return SensitivityProfile(times, torch.ones(len(times)), torch.ones(len(times)), end=2 * times[-1] - times[-2])


def enabled(pipe, run, payload, **more):
    """The end of a run that evaluates every third step, and the handle."""
    probe = sencache.enable(pipe, tolerance=1.0)  # no profile, so nothing is written
    run(pipe, steps=STEPS)
    profile = flat(probe.known.sampler.times)
    rule = {"tolerance": 1e9, "max_reuses": N, "reuse": "hold", "payload": payload, **more}
    handle = sencache.enable(pipe, profile, **rule)
    try:
        return run(pipe, steps=STEPS), handle
    finally:
        sencache.disable(pipe)


@pytest.mark.parametrize(
    ("make", "run", "of"), [(wan, run_wan, of_wan), (cogvideox, run_cogvideox, of_cogvideox)], ids=["Wan", "CogVideoX"]
)
def test_a_pipeline_reuses_the_stacks_that_the_adapter_reuses(make, run, of):
    pipe = make()
    (blocks, handle), (outputs, _) = enabled(pipe, run, "blocks"), enabled(pipe, run, "output")
    field, shape, ts, stepper = of(pipe)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rule = dict(tolerance=1e9, max_reuses=N, reuse="hold", payload="blocks", unit="output")
    with torch.no_grad():
        adapter = CachedField(field, flat(ts[:-1].double()), **rule)
        theirs = adapter.integrate(x_T, ts, stepper)
        full = integrate(field, x_T, ts, stepper)
    evaluated = [bool(query.computed.all()) for query in handle.report.trace]
    assert sum(evaluated) * int(adapter.report.queries[0]) == len(evaluated) * int(adapter.report.evaluations[0])
    assert float(rms(blocks - theirs) / rms(theirs)) < 1e-4
    assert float(rms(outputs - theirs) / rms(theirs)) > 1e-3
    assert float(rms(full - theirs) / rms(theirs)) > 1e-3


@pytest.mark.parametrize(("make", "run"), [(wan, run_wan), (cogvideox, run_cogvideox), (ltx, run_ltx)])
def test_stacks_that_are_never_reused_change_nothing(make, run):
    pipe = make()
    bare = run(pipe, steps=STEPS)
    sencache.enable(pipe, tolerance=0.0, reuse="hold", payload="blocks")
    torch.testing.assert_close(run(pipe, steps=STEPS), bare, rtol=1e-4, atol=1e-4)
    sencache.disable(pipe)
    assert torch.equal(run(pipe, steps=STEPS), bare)


@pytest.mark.parametrize(("make", "run"), [(wan, run_wan), (ltx, run_ltx)])
def test_a_plan_reuses_stacks_too(make, run, tmp_path):
    pipe = make()
    bare = run(pipe, steps=STEPS)
    handle = sencache.enable(pipe, nfe=5, correct=False, payload="blocks", folder=tmp_path)
    run(pipe, steps=STEPS, seed=1)
    near = run(pipe, steps=STEPS)
    assert int(handle.report.evaluations.max()) * 2 == int(handle.report.queries.max())
    assert 0 < float(rms(near - bare) / rms(bare)) < 0.02


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="goes with correct=False"):
        sencache.enable(wan(), nfe=6, payload="blocks")
    with pytest.raises(ValueError, match="must be output or blocks; got 'block'"):
        sencache.enable(wan(), nfe=6, payload="block")
    with pytest.raises(ValueError, match=r"is for WanTransformer3DModel.*has a FluxTransformer2DModel"):
        sencache.enable(flux(), nfe=6, correct=False, payload="blocks")
