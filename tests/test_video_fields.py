"""The small video models: latents, packings, what they are trained toward, and that the shipped ones are trained."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from benchmarks.cases import cases
from benchmarks.fields import bunny, video
from benchmarks.fields.train_video import loss_of
from sencache import CachedField
from solvers import integrate

over_families = pytest.mark.parametrize("family", video.FAMILIES)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(cases()))
def test_a_shipped_profile_is_of_the_shipped_field_on_any_machine(name):
    case = cases()[name]
    cached = CachedField(case.samples(1, "choosing").field, case.profile, nfe=20)
    assert len(cached.plan(case.grid(), case.stepper).nodes) == 20


@over_families
def test_packing_is_undone(family):
    latents = drawn(2, *video.SHAPE)
    packed = video.packed(family, latents)
    assert torch.equal(video.unpacked(family, packed), latents)
    shape = {"wan": (24, 4, 8, 16), "ltx": (128, 96), "cogvideox": (4, 24, 8, 16)}[family]
    assert packed.shape[1:] == shape


def test_an_ltx_token_holds_one_square_of_the_frame():
    latents = torch.zeros(1, *video.SHAPE)
    latents[0, :, 1, 2:4, 6:8] = 1
    full = video.packed("ltx", latents).abs().sum(-1).nonzero()
    assert full.tolist() == [[0, 1 * 32 + 1 * 8 + 3]]  # frame 1, row 1, column 3


def test_latents_are_a_projection_and_their_basis_is_orthonormal():
    latents = bunny.Latents.load()
    torch.testing.assert_close(latents.basis.T @ latents.basis, torch.eye(24), atol=1e-5, rtol=0)
    z = 0.05 * drawn(2, *video.SHAPE)  # so small that nothing is clamped
    torch.testing.assert_close(latents.encode(latents.decode(z)), z, atol=1e-5, rtol=0)


def test_a_fitted_basis_keeps_what_lies_in_it():
    """Clips made of 24 patterns are kept; a pattern is one block of 2 x 4 x 4 pixels."""
    patterns, weights = drawn(24, 96), 0.03 * drawn(3, 4, 8, 16, 24, seed=1)
    blocks = (weights @ patterns).unflatten(-1, (3, *bunny.BLOCK))
    clip = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(3, 3, 8, 32, 64)
    latents = bunny.Latents.fit(clip)
    torch.testing.assert_close(latents.decode(latents.encode(clip)), clip, atol=1e-5, rtol=1e-4)
    assert latents.encode(clip).square().mean() == pytest.approx(1, rel=0.05)


def test_scenes_end_at_cuts_and_neither_short_ones_nor_credits_count():
    lengths = [10, 5, 40, 450]
    frames = torch.cat(
        [torch.full((n, 3, 4, 4), level) for n, level in zip(lengths, (-1.0, 0.0, 1.0, -0.5), strict=True)]
    )
    assert bunny.scenes(frames) == [(0, 10), (15, 55)]
    train, scene, held, held_scene = bunny.clips(frames)
    assert scene.tolist() == [0] * 3 + [1] * 25
    assert held_scene.tolist() == [1]
    assert (len(train), len(held)) == (28, 1)


def test_cogvideox_is_trained_toward_the_schedulers_own_targets():
    """x_t and v of `CogVideoXDDIMScheduler`; the loss of a model that says v is zero."""
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    data, noise = drawn(3, 4, 24, 8, 16), drawn(3, 4, 24, 8, 16, seed=1)
    n = torch.tensor([999, 500, 3])
    x, v = scheduler.add_noise(data, noise, n), scheduler.get_velocity(data, noise, n)
    model = Says({int(timestep): (one, other) for timestep, one, other in zip(n, x, v, strict=True)})
    loss = loss_of("cogvideox", model, data, torch.tensor([0, 1, -1]), noise, (n + 1) / 1000)
    assert loss < 1e-6


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_wan_and_ltx_are_trained_toward_the_schedulers_own_targets(family):
    """x_t of `FlowMatchEulerDiscreteScheduler`, and noise minus data."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    data, noise = (video.packed(family, drawn(2, *video.SHAPE, seed=seed)) for seed in (0, 1))
    timesteps = torch.tensor([900.0, 50.0])
    x = scheduler.scale_noise(data, timesteps, noise)
    model = Says({int(n): (one, other) for n, one, other in zip(timesteps, x, noise - data, strict=True)})
    assert loss_of(family, model, data, torch.tensor([0, -1]), noise, timesteps / 1000) < 1e-6


class Says(torch.nn.Module):
    """A model that checks x and answers what it was told to, by timestep."""

    config = SimpleNamespace(patch_size=(1, 2, 2))

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, hidden_states, timestep, **kwargs):
        known = [self.answers[round(float(n))] for n in timestep]
        torch.testing.assert_close(hidden_states, torch.stack([x for x, _ in known]), atol=1e-5, rtol=1e-5)
        return (torch.stack([v for _, v in known]),)


@over_families
def test_the_shipped_model_samples_its_scenes(family):
    """Small enough to ship; what comes out is of the data's size, the same every time, and moves within its scene."""
    file = bunny.HERE / f"{family}.safetensors"
    assert file.stat().st_size <= 12e6
    case = cases()[family]
    with torch.no_grad():
        field, x, _ = case.samples(2, "choosing")
        ends = integrate(field, x, case.grid(12), case.stepper)
        again = integrate(case.field(case.conditions(2, "choosing")), x, case.grid(12), case.stepper)
    assert torch.equal(ends, again)
    assert 0.4 < ends.std() < 1.6  # latents have unit variance, scenes vary less
    clips = case.pixels(ends)
    assert clips.shape == (2, 3, 8, 32, 64)
    still = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean()
    apart = (clips[0] - clips[1]).abs().mean()
    assert 0.003 < still < apart  # it moves, and less than scenes differ
