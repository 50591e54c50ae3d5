"""diffusers pipelines, tiny and of their real classes: exact where exactness is asked for, and honest in counting."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch

import sencache
from benchmarks.tiny_pipelines import (
    cogvideox,
    counted,
    flux,
    ltx,
    prompt,
    run_cogvideox,
    run_flux,
    run_image_to_cogvideox,
    run_image_to_ltx,
    run_image_to_wan,
    run_ltx,
    run_sd3,
    run_wan,
    sd3,
    wan,
)
from sencache.norms import rms
from sencache.plugins.diffusers.conditioning import Call
from sencache.schedule import Problem

PIPELINES = {  # how it is built, how it is run, transformer calls a step
    "Wan 2.1": (wan, run_wan, 2),
    "Wan 2.1 without guidance": (wan, partial(run_wan, guidance=1.0), 1),
    "Wan 2.2, two transformers": (partial(wan, two=True), run_wan, 2),
    "Wan 2.2, times for tokens": (partial(wan, expand_timesteps=True), run_wan, 2),
    "Wan, image to video": (partial(wan, image=True), run_image_to_wan, 2),
    "CogVideoX": (cogvideox, run_cogvideox, 1),
    "CogVideoX, dynamic guidance": (cogvideox, partial(run_cogvideox, use_dynamic_cfg=True), 1),
    "CogVideoX, image to video": (partial(cogvideox, image=True), run_image_to_cogvideox, 1),
    "LTX": (ltx, run_ltx, 1),
    "LTX, rescaled guidance": (ltx, partial(run_ltx, guidance_rescale=0.5), 1),
    "LTX, image to video": (partial(ltx, image=True), run_image_to_ltx, 1),
    "Flux": (partial(flux, guidance_embeds=True), partial(run_flux, true_cfg_scale=1.0), 1),
    "Flux with a negative prompt": (flux, run_flux, 2),
    "Stable Diffusion 3": (sd3, run_sd3, 1),
}
over_pipelines = pytest.mark.parametrize(("make", "run", "calls"), PIPELINES.values(), ids=PIPELINES.keys())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def error(x, of):
    return float(rms(x - of).max() / rms(of).max())


@over_pipelines
def test_at_tolerance_0_nothing_changes(make, run, calls):
    pipe = make()
    bare, count = counted(pipe, lambda: run(pipe, steps=6))
    handle = sencache.enable(pipe, tolerance=0)
    cached, cached_count = counted(pipe, lambda: run(pipe, steps=6))
    assert torch.equal(cached, bare)
    assert cached_count == count == 6 * calls
    assert (handle.report.evaluations == cached_count).all()
    assert not handle.report.reuses.any()


@over_pipelines
def test_the_first_run_measures_and_the_next_ones_are_cheaper(make, run, calls):
    pipe = make()
    bare, fewer = run(pipe, steps=12), run(pipe, steps=6)
    handle = sencache.enable(pipe, nfe=6)
    first, first_count = counted(pipe, lambda: run(pipe, steps=12))
    assert torch.equal(first, bare)
    assert first_count == 12 * calls
    second, count = counted(pipe, lambda: run(pipe, steps=12))
    assert count == 6 * calls
    assert (handle.report.evaluations == count).all()
    assert (handle.report.queries == 12 * calls).all()
    assert error(second, bare) < 0.5 * error(fewer, bare)


@over_pipelines
def test_runs_are_as_if_each_were_the_only_one(make, run, calls):
    pipe, other = make(), make()
    bare = run(pipe, steps=8)
    sencache.enable(other, nfe=4)
    run(other, steps=8)  # measures
    want = run(other, steps=8)
    sencache.enable(pipe, nfe=4)
    assert torch.equal(run(pipe, steps=8), want)  # by the profile that the other one kept
    run(pipe, steps=8, seed=1)
    assert torch.equal(run(pipe, steps=8), want)
    with pytest.raises(KeyError, match="stop"):
        run(pipe, steps=8, callback_on_step_end=stopping_at(2))
    assert torch.equal(run(pipe, steps=8), want)
    sencache.disable(pipe)
    assert torch.equal(run(pipe, steps=8), bare)


def stopping_at(step):
    def callback(pipe, i, t, given):
        if i == step:
            raise KeyError("stop")
        return given

    return callback


def test_half_the_evaluations_of_flow_matching_beat_half_the_steps_by_far():
    """With Euler and with UniPC, whose order would suffer from outputs held."""
    unipc = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )  # fmt: skip
    for make, run in ((wan, run_wan), (ltx, run_ltx)):
        for seed, scheduler in enumerate((None, unipc) if make is wan else (None,)):
            pipe = make(scheduler, seed=seed)
            full, half = run(pipe, steps=24), run(pipe, steps=12)
            sencache.enable(pipe, nfe=12)
            run(pipe, steps=24, seed=7)  # measured on another sample
            assert error(run(pipe, steps=24), full) < 0.1 * error(half, full)


def test_a_held_plan_does_what_a_loop_by_hand_does():
    """Both branches are evaluated at the plan's nodes and held in between, each its own: nothing else happens."""
    pipe = wan()
    handle = sencache.enable(pipe, nfe=4, reuse="hold")
    run_wan(pipe, 10)
    given = {"latents": torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(5))}
    cached = run_wan(pipe, 10, **given)
    nodes = handle.plan.nodes.tolist()
    sencache.disable(pipe)

    x, scheduler, model = given["latents"], pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(10)
    for k, t in enumerate(scheduler.timesteps):
        if k in nodes:
            with torch.no_grad():
                v, v_none = (
                    model(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=prompt(which), return_dict=False)
                    for which in (1, 2)
                )
        x = scheduler.step(v_none[0] + 3.0 * (v[0] - v_none[0]), t, x, return_dict=False)[0]
    assert torch.equal(cached, x)


def test_calls_that_differ_in_nothing_but_their_turn_in_a_step_are_told_apart():
    """As those of a perturbed attention, which is set up between the calls."""
    given = {"hidden_states": torch.zeros(1), "timestep": torch.ones(1), "encoder_hidden_states": prompt(1)}
    one, other = (Call("transformer", "", (), dict(given), None) for _ in range(2))
    assert one.turn(0) == other.turn(0)
    assert one.turn(0) != other.turn(1)


def test_calls_under_other_names_are_told_apart():
    class Swapping(diffusers.WanPipeline):
        """Calls the same under two names, in changing order."""

        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(4)
            x = torch.ones(1, 16, 2, 2, 2)
            for i, t in enumerate(self.scheduler.timesteps):
                for name in ("usual", "perturbed")[:: 1 if i % 2 else -1]:
                    with self.transformer.cache_context(name):
                        y = self.transformer(x, t.expand(1), prompt(1), return_dict=False)[0]
                x = self.scheduler.step(y, t, x, return_dict=False)[0]

    pipe = Swapping(**wan().components)
    handle = sencache.enable(pipe, tolerance=10.0)
    with pytest.warns(UserWarning, match="reused nothing"):
        pipe()
    assert len({query.branch for query in handle.report.trace}) == 4


def test_equal_prompts_are_two_branches_all_the_same():
    pipe = wan()
    bare = run_wan(pipe, 6, negative_prompt_embeds=prompt(1))
    handle = sencache.enable(pipe, tolerance=0)
    again, count = counted(pipe, lambda: run_wan(pipe, 6, negative_prompt_embeds=prompt(1)))
    assert torch.equal(again, bare)
    assert count == 12 == int(handle.report.evaluations)
    assert {query.branch for query in handle.report.trace} == {0, 1}


@pytest.mark.parametrize("nfe", [2, 3, 5])
def test_a_boundary_between_two_transformers_is_evaluated_and_planned(nfe):
    pipe = wan(two=True)
    pipe.transformer_2.load_state_dict(pipe.transformer.state_dict())  # for its outputs alone nobody would look there
    handle = sencache.enable(pipe, nfe=nfe)
    run_wan(pipe, 12)
    _, count = counted(pipe, lambda: run_wan(pipe, 12))
    crossing = int((pipe.scheduler.timesteps < 875).nonzero()[0])
    assert 1 < crossing < 11
    assert crossing in handle.plan.nodes
    assert count == 2 * nfe
    first = [query for query in handle.report.trace if query.branch >= 2][:2]  # of the second transformer
    assert not any(query.reused.any() for query in first)


def test_two_transformers_need_two_evaluations():
    pipe = wan(two=True)
    sencache.enable(pipe, nfe=1)
    run_wan(pipe, 12)
    with pytest.raises(ValueError, match="2 networks take turns"):
        run_wan(pipe, 12)


def test_a_tolerance_needs_no_measurement_and_one_decision_serves_both_branches():
    pipe = wan()
    bare = run_wan(pipe, 16)
    errors, counts = [], []
    for tolerance in (0.003, 0.03):
        handle = sencache.enable(pipe, tolerance=tolerance)
        cached, count = counted(pipe, lambda: run_wan(pipe, 16))
        decisions = [bool(query.reused) for query in handle.report.trace]
        assert decisions[::2] == decisions[1::2]
        assert count == int(handle.report.evaluations) < 32
        errors.append(error(cached, bare))
        counts.append(count)
    assert counts[0] > counts[1]
    assert errors[0] < errors[1] < 0.03


def test_what_reuses_may_cost_adds_up_until_the_next_evaluation():
    """On a uniform grid all steps carry as much, and each reuse is one step further away: 1, 1 + 2, 1 + 2 + 3."""
    pipe = wan(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0))
    handle = sencache.enable(pipe, tolerance=1e6)
    run_wan(pipe, 8)
    predicted = torch.cat([query.predicted for query in handle.report.trace if query.branch == 0])
    assert predicted[:2].isinf().all()
    sums = torch.tensor([1.0, 3.0, 6.0, 10.0]).double()
    torch.testing.assert_close(predicted[2:6] / predicted[2], sums, rtol=1e-4, atol=0)


def test_nothing_is_continued_or_repaid_across_a_change_of_models():
    plain = Problem(np.linspace(1000, 100, 10), np.ones(10), np.eye(10)[None], "linear", "t", True)
    relay = replace(plain, part=np.array(4 * [0] + 6 * [1]))

    def left(problem, before, ref, end):
        return problem.residuals(*np.array([[before], [ref], [end]]))[0]

    assert np.array_equal(left(relay, 2, 4, 7), left(plain, -1, 4, 7))
    assert np.array_equal(left(relay, 5, 6, 9), left(plain, 5, 6, 9))
    assert np.array_equal(left(relay, 0, 2, 4), left(replace(plain, correct=False), 0, 2, 4))
    assert not np.array_equal(left(plain, 0, 2, 4), left(replace(plain, correct=False), 0, 2, 4))
    assert np.isinf(relay.costs()[:, 2, 5]).all()


def test_samples_of_a_batch_decide_together_or_for_themselves():
    pipe = cogvideox()
    x = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x[1] *= 3  # a sample that moves otherwise
    both = {"prompt_embeds": prompt(1, 2), "negative_prompt_embeds": prompt(2, 2)}
    full, errors = run_cogvideox(pipe, 16, latents=x, **both), []
    for together in (False, None):
        handle = sencache.enable(pipe, tolerance=0.02, together=together)
        ends, count = counted(pipe, lambda: run_cogvideox(pipe, 16, latents=x, **both))
        assert (handle.report.evaluations == count).all()
        assert handle.report.unused.any() == (together is False)
        errors.append((count, error(ends, full)))
        company = []
        for i in range(2):
            own = {name: embeds[i : i + 1] for name, embeds in both.items()}
            alone = run_cogvideox(pipe, 16, latents=x[i : i + 1], **own)
            company.append(error(alone, ends[i : i + 1]))
        assert (max(company) < 1e-5) == (together is False)
    assert errors[1] < errors[0]  # fewer calls, or as many and nearer


def test_the_papers_rule_runs_in_a_pipeline():
    profile = sencache.SensitivityProfile(
        torch.linspace(1000, 0, 20), torch.full((20,), 0.1), torch.full((20,), 0.001)
    )  # fmt: skip
    for make, run in ((wan, run_wan), (ltx, run_ltx)):
        pipe = make()
        handle = sencache.enable(pipe, profile, tolerance=0.15, max_reuses=3, reuse="hold")
        _, count = counted(pipe, lambda run=run, pipe=pipe: run(pipe, steps=16))
        decisions = [bool(query.reused.all()) for query in handle.report.trace]
        assert [bool(query.reused.any()) for query in handle.report.trace] == decisions
        if make is wan:
            assert decisions[::2] == decisions[1::2]
        reused = decisions[:: len({query.branch for query in handle.report.trace})]
        assert (handle.report.evaluations == count).all()
        assert any(reused)
        assert [True] * 4 not in [reused[k : k + 4] for k in range(13)]  # n = 3
