"""What the first run measured is kept and found again; what is not as hoped is said aloud."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

import sencache
from benchmarks.tiny_pipelines import (
    cogvideox,
    counted,
    flux,
    image_vae,
    lively,
    ltx,
    prompt,
    run_wan,
    sd3,
    wan,
)
from sencache.norms import rms
from sencache.plugins.diffusers.store import default_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of schedulers, in NumPy


def calls(pipe, run=run_wan, **options):
    return counted(pipe, lambda: run(pipe, **options))[1]


def test_profiles_are_kept_in_the_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path / "of environment"))
    pipe = wan()
    sencache.enable(pipe, nfe=4)
    run_wan(pipe, 8)
    assert len(list((tmp_path / "of environment").glob("*.safetensors"))) == 1
    sencache.enable(pipe, nfe=4, folder=tmp_path / "of argument")
    assert calls(pipe, steps=8) == 16
    assert len(list((tmp_path / "of argument").glob("*.safetensors"))) == 1
    monkeypatch.delenv("SENCACHE_FOLDER")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert default_folder() == tmp_path / "sencache"


def test_a_profile_is_of_one_model_one_scheduler_with_its_settings_and_one_grid(tmp_path):
    def first_run_is_full(pipe, steps=8):
        sencache.enable(pipe, nfe=4, folder=tmp_path)
        full = calls(pipe, steps=steps) == 2 * steps
        assert calls(pipe, steps=steps) == 8
        sencache.disable(pipe)
        return full

    assert first_run_is_full(wan())
    assert not first_run_is_full(wan())  # the same, built anew
    assert first_run_is_full(wan(seed=1))
    assert first_run_is_full(wan(), steps=9)
    assert first_run_is_full(wan(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)))
    for order in (1, 2):  # on the same grid
        unipc = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": order}
        assert first_run_is_full(wan(diffusers.UniPCMultistepScheduler.from_config(unipc)))
    pipe = wan()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.01)  # another checkpoint
    assert first_run_is_full(pipe)


def test_a_profile_can_be_saved_and_given_and_must_fit(tmp_path):
    pipe = wan()
    handle = sencache.enable(pipe, nfe=4, folder=tmp_path / "a")
    run_wan(pipe, 8)
    handle.profile.save(tmp_path / "wan.safetensors")
    want = run_wan(pipe, 8)
    profile = sencache.SensitivityProfile.load(tmp_path / "wan.safetensors")
    other = wan()
    sencache.enable(other, profile, nfe=4, folder=tmp_path / "b")
    assert torch.equal(run_wan(other, 8), want)
    assert not (tmp_path / "b").exists()
    stranger = wan(seed=1)
    sencache.enable(stranger, profile, nfe=4)
    with pytest.raises(ValueError, match="another model"):
        run_wan(stranger, 8)
    sencache.enable(other, profile, nfe=4)
    assert calls(other, steps=6) == 8  # a coarser grid inside the measured range
    part = sencache.SensitivityProfile(torch.tensor([500.0, 100.0]), *torch.ones(2, 2), gram=torch.ones(1, 2, 2))
    sencache.enable(other, part, nfe=4)
    with pytest.raises(ValueError, match="measured for t in"):
        run_wan(other, 8)


def test_a_file_that_cannot_be_read_is_measured_anew_with_a_warning(tmp_path):
    pipe = wan()
    sencache.enable(pipe, nfe=4, folder=tmp_path)
    run_wan(pipe, 8)
    [file] = tmp_path.iterdir()
    file.write_bytes(b"not a profile")
    sencache.enable(pipe, nfe=4, folder=tmp_path)
    with pytest.warns(UserWarning, match="measures anew"):
        assert calls(pipe, steps=8) == 16
    assert calls(pipe, steps=8) == 8


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_warning(tmp_path):
    (tmp_path / "file").touch()
    pipe = wan()
    sencache.enable(pipe, nfe=4, folder=tmp_path / "file" / "inside")
    with pytest.warns(UserWarning, match="could not be kept"):
        run_wan(pipe, 8)
    assert calls(pipe, steps=8) == 8


def test_outputs_that_are_not_finite_are_not_kept(tmp_path):
    pipe = wan()
    sencache.enable(pipe, nfe=4, folder=tmp_path)
    weight = pipe.transformer.proj_out.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
        run_wan(pipe, 8)
        weight.copy_(kept)
    assert not list(tmp_path.iterdir())


def test_a_run_that_saved_nothing_warns(tmp_path):
    pipe = wan()
    sencache.enable(pipe, nfe=8, folder=tmp_path)
    with pytest.warns(UserWarning, match="reused nothing in this run of 16 transformer calls. Ask for less"):
        run_wan(pipe, 8)
    sencache.enable(pipe, nfe=4, folder=tmp_path)
    run_wan(pipe, 8)
    sencache.enable(pipe, nfe=4, folder=tmp_path, key=lambda args, kwargs: object())
    with (
        pytest.warns(UserWarning, match="More than 8 conditionings"),
        pytest.warns(UserWarning, match="something new in every call"),
    ):
        run_wan(pipe, 8)

    class Blind(diffusers.WanPipeline):
        """A pipeline that calls the transformer's forward itself, past everything."""

        def __call__(self):
            self.scheduler.set_timesteps(2)
            return self.transformer.forward(torch.zeros(1, 16, 2, 2, 2), torch.ones(1), prompt(1))

    blind = Blind(**pipe.components)
    sencache.enable(blind, nfe=1)
    with pytest.warns(UserWarning, match="saw no call of a transformer"):
        blind()


def test_conditioning_made_anew_in_every_call_is_known_by_its_values(tmp_path):
    pipe = wan()
    sencache.enable(pipe, nfe=4, folder=tmp_path)
    run_wan(pipe, 8)
    want = run_wan(pipe, 8)

    def renew(pipe, i, t, given):
        return {"prompt_embeds": given["prompt_embeds"].clone()}

    names = ["prompt_embeds"]
    out, count = counted(
        pipe,
        lambda: run_wan(pipe, 8, callback_on_step_end=renew, callback_on_step_end_tensor_inputs=names),
    )
    assert count == 8
    assert torch.equal(out, want)


def test_options_that_contradict_each_other_are_refused_at_once():
    pipe = wan()
    with pytest.raises(ValueError, match="in one way"):
        sencache.enable(pipe, nfe=4, tolerance=0.1)
    with pytest.raises(ValueError, match="counts evaluations"):
        sencache.enable(pipe, nfe=0)
    with pytest.raises(ValueError, match="Expected a diffusers pipeline; got Linear"):
        sencache.enable(nn.Linear(1, 1), nfe=4)
    assert type(pipe) is diffusers.WanPipeline


def test_an_error_asked_for_needs_rehearsal_and_is_kept(tmp_path):
    pipe = wan()
    handle = sencache.enable(pipe, rtol=0.002, folder=tmp_path)
    run_wan(pipe, 12)
    with pytest.raises(ValueError, match=r"handle\.rehearse"):
        run_wan(pipe, 12)
    handle.rehearse(
        [lambda s=s: run_wan(pipe, 12, seed=s, prompt_embeds=prompt(50 + s)) for s in range(100, 109)], budgets=(4, 7)
    )
    for seed in (1, 2):
        given = {"steps": 12, "seed": seed, "prompt_embeds": prompt(seed)}
        out, count = counted(pipe, lambda given=given: run_wan(pipe, **given))
        assert count < 24
        full = run_wan(wan(), **given)
        assert rms(out - full) < 0.002 * rms(full)
    again = wan()
    sencache.enable(again, rtol=0.002, folder=tmp_path)  # the rehearsal is kept with the profile
    assert calls(again, steps=12) < 24
    with pytest.raises(ValueError, match="at least one run"):
        handle.rehearse([])


@pytest.mark.parametrize("which", ["SD3", "Flux in half precision", "CogVideoX"])
def test_pipelines_that_begin_in_the_middle_of_the_grid(which, tmp_path):
    """From an image, where the scheduler says where it begins, and from a video, where the timestep does."""
    image = {"image": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    if which == "SD3":
        pipe, given = diffusers.StableDiffusion3Img2ImgPipeline(**sd3().components), image
    elif which == "CogVideoX":
        pipe, given = (
            diffusers.CogVideoXVideoToVideoPipeline(**cogvideox().components),
            {"video": torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        )
    else:
        parts = flux().components | {"image_encoder": None, "feature_extractor": None}
        pipe, given = diffusers.FluxImg2ImgPipeline(**parts).to(torch.bfloat16), image
    pipe.set_progress_bar_config(disable=True)

    def run():
        return start_in_the_middle(pipe, given)

    bare, count = counted(pipe, run)
    assert count == 9
    handle = sencache.enable(pipe, nfe=4, folder=tmp_path)
    assert torch.equal(run(), bare)
    out, count = counted(pipe, run)
    assert count == 4 == int(handle.report.evaluations[0])
    assert rms(out - bare).max() < 0.02 * rms(bare).max()


def test_tokens_with_times_of_their_own_are_planned_for_and_not_corrected(tmp_path):
    pipe = diffusers.LTXConditionPipeline(**ltx(image=True).components)
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 6)

    def run(steps=12):
        return pipe(
            image=image, prompt_embeds=prompt(1), negative_prompt_embeds=prompt(2), prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask, height=32, width=32, num_frames=9, num_inference_steps=steps,
            guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False,
        )[0]  # fmt: skip

    bare, half = run(), run(6)
    sencache.enable(pipe, nfe=6, folder=tmp_path)
    assert torch.equal(run(), bare)
    out = run()
    assert rms(out - bare) < 0.5 * rms(half - bare)
    sencache.enable(pipe, nfe=6, folder=tmp_path, correct=False)
    uncorrected, count = counted(pipe, run)
    assert torch.equal(uncorrected, out)
    assert count == 6


def start_in_the_middle(pipe, given):
    embeds = {"prompt_embeds": prompt(1), "negative_prompt_embeds": prompt(2)}
    size = {"height": 16, "width": 16}
    if not isinstance(pipe, diffusers.CogVideoXVideoToVideoPipeline):
        embeds |= {"pooled_prompt_embeds": prompt(3)[:, 0], "negative_pooled_prompt_embeds": prompt(4)[:, 0]}
        size = {"height": 8, "width": 8}
    if isinstance(pipe, diffusers.FluxImg2ImgPipeline):
        embeds = {name: embed.to(torch.bfloat16) for name, embed in embeds.items() if "negative" not in name}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        **embeds, **given, **size, strength=0.6, num_inference_steps=15, guidance_scale=3.0, output_type="latent",
        generator=generator, return_dict=False,
    )[0]  # fmt: skip


def test_a_list_of_samples_is_decided_on_together(tmp_path):
    """Z-Image hands over a list of samples without a batch dimension, and takes a list back."""
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=image_vae(4), text_encoder=None,
        tokenizer=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            prompt_embeds=[prompt(1)[0], prompt(3)[0]], negative_prompt_embeds=[prompt(2)[0], prompt(4)[0]], height=16,
            width=16, num_inference_steps=10, guidance_scale=3.0, output_type="latent", return_dict=False,
            generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    bare = run()
    handle = sencache.enable(pipe, nfe=5, folder=tmp_path)
    assert torch.equal(run(), bare)
    _, count = counted(pipe, run)
    assert count == 5 == int(handle.report.evaluations)
    handle = sencache.enable(pipe, tolerance=0.1)
    out, count = counted(pipe, run)
    assert count == int(handle.report.evaluations) < 10
    assert rms(out - bare).max() < 0.1 * rms(bare).max()


def test_a_unet_takes_the_same_path(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=image_vae(4), text_encoder=None, tokenizer=None, unet=lively(unet), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            prompt_embeds=prompt(1), negative_prompt_embeds=prompt(2), num_inference_steps=12, height=8, width=8,
            output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False,
        )[0]  # fmt: skip

    bare = run()
    handle = sencache.enable(pipe, nfe=6, folder=tmp_path)
    assert torch.equal(run(), bare)
    out = run()
    assert handle.report.evaluations.tolist() == [6, 6]
    assert rms(out - bare) < 0.02 * rms(bare)
