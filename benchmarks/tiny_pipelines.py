"""Tiny pipelines of diffusers, of its real classes with random weights, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

WIDTH = 32  # of the text embeddings


def lively(model: nn.Module, gain: float = 2.0) -> nn.Module:
    """A model that changes with time as trained ones do: visibly, and smoothly.

    Random weights answer to the fastest waves of the time's embedding, one a training timestep; these are silenced.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "time" in name and name.endswith("linear_1.weight"):
                half = weight.shape[1] // 2
                slow = 10000.0 ** (-torch.arange(half) / half) < 0.01
                weight.mul_(gain * slow.repeat(2))
    return model.eval()


def prompt(seed: int, batch: int = 1, tokens: int = 6) -> Tensor:
    """Text embeddings (batch, tokens, WIDTH)."""
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def wan(
    scheduler: Any = None, *, two: bool = False, image: bool = False, seed: int = 0, layers: int = 2, **options: Any
) -> Any:
    torch.manual_seed(seed)

    def transformer() -> nn.Module:
        return lively(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36 if image else 16,
                out_channels=16, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
                qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
            )
        )  # fmt: skip

    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": vae.eval(), "transformer": transformer()}
    parts |= {"scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    if two:
        parts |= {"transformer_2": transformer(), "boundary_ratio": 0.875}
    if image:
        pipe = diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, **options)
    else:
        pipe = diffusers.WanPipeline(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(
    pipe: Any, steps: int = 12, guidance: float = 3.0, seed: int = 0, *, size: int, frames: int, **options: Any
) -> Tensor:
    """What a pipeline of these makes of two prompts, not decoded, in videos of `frames` frames, `size` pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    given = {"prompt_embeds": prompt(1), "negative_prompt_embeds": prompt(2)} | options
    return pipe(
        height=size, width=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
        output_type="latent", generator=generator, return_dict=False, **given,
    )[0]  # fmt: skip


run_wan = partial(latents, size=16, frames=5)
run_cogvideox = partial(latents, size=16, frames=9)
MASK = torch.ones(1, 6)
run_ltx = partial(latents, size=32, frames=9, prompt_attention_mask=MASK, negative_prompt_attention_mask=MASK)


def counted(pipe: Any, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a run returns, and how often the forward methods of its transformers were called meanwhile."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    models = [model for name, model in pipe.components.items() if name.startswith("transformer") and model is not None]
    hooks = [model.register_forward_hook(count) for model in models]
    try:
        return run(), calls
    finally:
        for one in hooks:
            one.remove()


def run_image_to_wan(pipe: Any, **options: Any) -> Tensor:
    return run_wan(pipe, image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)), **options)


def cogvideox(scheduler: Any = None, *, image: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8 if image else 4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=6, use_rotary_positional_embeddings=image,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4, norm_num_groups=2,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = scheduler or diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0,
    )  # fmt: skip
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipe = kind(tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=lively(transformer), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_image_to_cogvideox(pipe: Any, **options: Any) -> Tensor:
    return run_cogvideox(pipe, image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)), **options)


def ltx(scheduler: Any = None, *, image: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    kind = diffusers.LTXImageToVideoPipeline if image else diffusers.LTXPipeline
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=lively(transformer),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_image_to_ltx(pipe: Any, **options: Any) -> Tensor:
    return run_ltx(pipe, image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)), **options)


def image_vae(channels: int) -> nn.Module:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=channels,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip


def flux(scheduler: Any = None, *, guidance_embeds: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        tokenizer=None, tokenizer_2=None, text_encoder=None, text_encoder_2=None, vae=image_vae(1),
        transformer=lively(transformer), scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_flux(pipe: Any, steps: int = 12, guidance: float = 3.0, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    negative = {
        "negative_prompt_embeds": prompt(2), "negative_pooled_prompt_embeds": prompt(4)[:, 0], "true_cfg_scale": 3.0
    }  # fmt: skip
    given = {"prompt_embeds": prompt(1), "pooled_prompt_embeds": prompt(3)[:, 0], **negative} | options
    return pipe(
        height=8, width=8, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=generator, return_dict=False, **given,
    )[0]  # fmt: skip


def sd3(scheduler: Any = None, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=WIDTH, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        tokenizer=None, tokenizer_2=None, tokenizer_3=None, text_encoder=None, text_encoder_2=None,
        text_encoder_3=None, vae=image_vae(4), transformer=lively(transformer),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_sd3(pipe: Any, steps: int = 12, guidance: float = 3.0, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    negative = {"negative_prompt_embeds": prompt(2), "negative_pooled_prompt_embeds": prompt(4)[:, 0]}
    given = {"prompt_embeds": prompt(1), "pooled_prompt_embeds": prompt(3)[:, 0], **negative} | options
    return pipe(
        height=8, width=8, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=generator, return_dict=False, **given,
    )[0]  # fmt: skip
