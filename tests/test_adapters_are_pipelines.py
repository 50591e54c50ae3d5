"""An adapter integrated by our steppers is the diffusers pipeline with its scheduler: real transformers, tiny ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")  # which the pipelines of diffusers import

from sencache import CachedField
from sencache.adapters.cogvideox import CogVideoXField
from sencache.adapters.ltx import LTXField
from sencache.adapters.wan import WanExperts, WanField
from solvers import DPMSolverPP, Linear, UniPC, grids, integrate
from tests import tiny
from tests.tiny import drawn

PROMPT, NEGATIVE = drawn(2, 7, 16, seed=1), drawn(2, 7, 16, seed=2)
WAN_X, LTX_X, COG_X = drawn(2, 4, 3, 4, 4, seed=3), drawn(2, 12, 8, seed=3), drawn(2, 3, 4, 8, 8, seed=3)
MASK, NO_MASK = (torch.arange(7) < torch.tensor(ends)[:, None] for ends in ([5, 7], [3, 2]))
LTX_SHAPE = {"num_frames": 3, "height": 2, "width": 2, "scale": (8 / 24, 32, 32)}


def same(ours, theirs, start):
    """Equal to the float32 rounding of a few steps, and somewhere else than at the start."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - start).abs().mean() > 0.1


def run_wan(pipe, x=WAN_X, steps=6, guidance=4.0, **more):
    shape = {"height": 8 * x.shape[3], "width": 8 * x.shape[4], "num_frames": 4 * x.shape[2] - 3}
    prompts = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE}
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent", **more}
    return pipe(**prompts, **shape, **options, latents=x).frames


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_wan_is_wan_pipeline(guidance, shift):
    scheduler, model = tiny.flow_euler(shift=shift), tiny.wan()
    theirs = run_wan(tiny.pipeline("WanPipeline", scheduler, model), guidance=guidance)
    field = WanField(model, PROMPT, negative=NEGATIVE, guidance=guidance)
    same(integrate(field, WAN_X, scheduler.sigmas), theirs, WAN_X)


def test_wan_cached_at_no_tolerance_is_wan_pipeline_to_the_bit():
    scheduler, model = tiny.flow_euler(shift=3.0), tiny.wan()
    theirs = run_wan(tiny.pipeline("WanPipeline", scheduler, model))
    field = WanField(model, PROMPT, negative=NEGATIVE, guidance=4.0)
    assert torch.equal(CachedField(field, tolerance=0.0).integrate(WAN_X, scheduler.sigmas), theirs)


def test_wan_with_unipc_is_the_pipeline_as_it_is_shipped():
    """Wan's own scheduler truncates timesteps to integers."""
    import diffusers

    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler, model = diffusers.UniPCMultistepScheduler(**config), tiny.wan()
    theirs = run_wan(tiny.pipeline("WanPipeline", scheduler, model), steps=8)
    assert scheduler.timesteps.dtype == torch.int64
    field = WanField(model, PROMPT, negative=NEGATIVE, guidance=4.0, integer=True)
    same(integrate(field, WAN_X, scheduler.sigmas, UniPC(Linear())), theirs, WAN_X)


@pytest.mark.parametrize("guidance_2", [4.0, 2.0])
def test_the_two_experts_of_wan_2_2_take_turns_as_in_the_pipeline(guidance_2):
    scheduler, high, low = tiny.flow_euler(shift=3.0), tiny.wan(0), tiny.wan(1)
    pipe = tiny.pipeline("WanPipeline", scheduler, high, transformer_2=low, boundary_ratio=0.875)
    theirs = run_wan(pipe, steps=8, guidance_scale_2=guidance_2)
    one, two = (
        WanField(model, PROMPT, negative=NEGATIVE, guidance=scale) for model, scale in ((high, 4.0), (low, guidance_2))
    )
    field = WanExperts(one, two, 0.875)
    turns = field.regime(scheduler.sigmas[:-1]).tolist()
    assert turns == sorted(turns, reverse=True)
    assert 0 < sum(turns) < 8
    same(integrate(field, WAN_X, scheduler.sigmas), theirs, WAN_X)


@pytest.mark.parametrize("boundary", [0.9, 0.875, 0.417])
def test_a_timestep_on_the_boundary_is_the_high_expert_s_in_any_precision(boundary):
    """As in the pipeline, which compares float32 timesteps with 1000 boundary: float32(0.9) is below 0.9."""
    one = WanField(tiny.wan(), PROMPT)
    field = WanExperts(one, one, boundary)
    for t in (torch.tensor(boundary), torch.tensor(boundary).double(), torch.tensor(boundary, dtype=torch.float64)):
        assert bool(field.regime(t)) == bool(t.float() * 1000 >= boundary * 1000)
        assert not field.regime(t - 1e-5)


def image_pipeline(transformer, **config):
    """Wan's image-to-video pipeline with a tiny VAE, and what it makes of an image."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    scheduler = tiny.flow_euler(shift=3.0)
    none = {"image_processor": None, "image_encoder": None}
    pipe = tiny.pipeline("WanImageToVideoPipeline", scheduler, transformer, vae=vae, **none, **config)
    image, x = drawn(1, 3, 32, 32, seed=5).sigmoid(), drawn(2, 16, 3, 4, 4, seed=3)
    shaped = {"num_channels_latents": 16, "height": 32, "width": 32, "num_frames": 9, "dtype": torch.float32}
    with torch.no_grad():
        seen = pipe.video_processor.preprocess(image, height=32, width=32)
        return pipe, scheduler, image, x, pipe.prepare_latents(seen, 2, latents=x, device="cpu", **shaped)


def test_wan_with_an_image_beside_x_is_the_image_pipeline():
    model, embedded = tiny.wan(channels=16, beside=20, image=16), drawn(1, 5, 16, seed=6)
    pipe, scheduler, image, x, (_, condition) = image_pipeline(model)
    pipe.encode_image = lambda image, device: embedded  # what an image encoder would make of it
    theirs = run_wan(pipe, x, image=image)
    beside = {"condition": condition, "image": embedded.expand(2, -1, -1)}
    field = WanField(model, PROMPT, negative=NEGATIVE, guidance=4.0, **beside)
    same(integrate(field, x, scheduler.sigmas), theirs, x)


def test_wan_with_a_frame_held_is_the_image_pipeline_of_wan_2_2_ti2v():
    model = tiny.wan(channels=16)
    pipe, scheduler, image, x, (_, condition, mask) = image_pipeline(model, expand_timesteps=True)
    theirs = run_wan(pipe, x, image=image)
    field = WanField(model, PROMPT, negative=NEGATIVE, guidance=4.0, held=torch.tensor([True, False, False]))
    start = (1 - mask) * condition + mask * x
    ours = integrate(field, start, scheduler.sigmas)
    same(ours, theirs, x)
    assert torch.equal(ours[:, :, 0], start[:, :, 0])


def run_ltx(pipe, guidance=3.0, **more):
    prompts = {"prompt_embeds": PROMPT, "prompt_attention_mask": MASK.float()}
    negative = {"negative_prompt_embeds": NEGATIVE, "negative_prompt_attention_mask": NO_MASK.float()}
    shape = {"height": 64, "width": 64, "num_frames": 17, "frame_rate": 24, "num_inference_steps": 6}
    return pipe(
        **prompts, **negative, **shape, guidance_scale=guidance, output_type="latent", latents=LTX_X, **more
    ).frames


def ltx_field(model, guidance=3.0, **more):
    prompts = {"prompt": PROMPT, "mask": MASK.float(), "negative": NEGATIVE, "negative_mask": NO_MASK.float()}
    return LTXField(model, **prompts, guidance=guidance, **LTX_SHAPE, **more)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "shift", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "shift_terminal": 0.1}], ids=["none", "3", "dynamic"]
)
def test_ltx_is_ltx_pipeline(shift, guidance):
    scheduler, model = tiny.flow_euler(**shift), tiny.ltx()
    theirs = run_ltx(tiny.pipeline("LTXPipeline", scheduler, model), guidance)
    same(integrate(ltx_field(model, guidance), LTX_X, scheduler.sigmas), theirs, LTX_X)


def test_ltx_with_tokens_held_is_the_image_pipeline():
    scheduler, model = tiny.flow_euler(shift=2.0), tiny.ltx()
    theirs = run_ltx(tiny.pipeline("LTXImageToVideoPipeline", scheduler, model), image=None)
    held = (torch.arange(12) < 4).expand(2, -1)
    ours = integrate(ltx_field(model, held=held), LTX_X, scheduler.sigmas)
    same(ours, theirs, LTX_X)
    assert torch.equal(ours[:, :4], LTX_X[:, :4])


SCHEDULES = {
    "2b: zero SNR, shift 3": {},
    "5b: zero SNR, shift 1": {"snr_shift_scale": 1.0},
    "noise never pure": {"rescale_betas_zero_snr": False},
    "linear betas": {"beta_schedule": "linear", "beta_end": 0.02},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("rotary", [True, False])
def test_cogvideox_with_ddim_is_cogvideox_pipeline(schedule, guidance, rotary):
    scheduler, model = tiny.cogvideox_ddim(**SCHEDULES[schedule]), tiny.cogvideox(rotary=rotary)
    pipe = tiny.pipeline("CogVideoXPipeline", scheduler, model)
    prompts = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "latents": COG_X, "output_type": "latent"}
    shape = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 10}
    theirs = pipe(**prompts, **shape, guidance_scale=guidance).frames
    turns = pipe._prepare_rotary_positional_embeddings(64, 64, 3, torch.device("cpu")) if rotary else None
    field = CogVideoXField(model, PROMPT, scheduler.alphas_cumprod, negative=NEGATIVE, guidance=guidance, rotary=turns)
    own = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    for ts in (own, grids.uniform(10)):  # one and the same grid, in float32 and in float64
        same(integrate(field, COG_X, ts, DPMSolverPP(field.path, order=1)), theirs, COG_X)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_other_spacings_of_cogvideox_timesteps_are_grids_too(spacing):
    """DDIM takes the step before a timestep to be 1000 / steps earlier, whatever the spacing."""
    scheduler, model = tiny.cogvideox_ddim(timestep_spacing=spacing), tiny.cogvideox(rotary=False)
    pipe = tiny.pipeline("CogVideoXPipeline", scheduler, model)
    shape = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 10, "guidance_scale": 1.0}
    theirs = pipe(prompt_embeds=PROMPT, latents=COG_X, output_type="latent", **shape).frames
    field = CogVideoXField(model, PROMPT, scheduler.alphas_cumprod)
    ts = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    ours = integrate(field, COG_X, ts, DPMSolverPP(field.path, order=1))
    if spacing == "leading":
        same(ours, theirs, COG_X)
    else:  # there the scheduler's steps overlap, and ours meet
        assert (ours - theirs).abs().max() > 1e-4
