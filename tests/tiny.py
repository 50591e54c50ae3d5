"""Tiny video transformers of diffusers, randomly initialised, and pipelines around them that need no hub.

A model is built once and shared: copy it before you change it. Prompts are embeddings, so that the pipelines get no
tokenizer and no text encoder; latents are given and handed back.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "num_layers": 2}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(kind, seed, **config):
    """A transformer whose every weight is drawn anew, so that none is zero, in eval mode and frozen."""
    model = getattr(diffusers, kind)(**HEADS, **config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
    return model


@cache
def wan(seed=0, channels=4, beside=0, image=None):
    return built(
        "WanTransformer3DModel",
        seed,
        attention_head_dim=12,
        in_channels=channels + beside,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        rope_max_seq_len=32,
        image_dim=image,
        added_kv_proj_dim=None if image is None else 24,
    )


@cache
def ltx(seed=0):
    shape = {"in_channels": 8, "out_channels": 8, "attention_head_dim": 8, "cross_attention_dim": 16}
    return built("LTXVideoTransformer3DModel", seed, caption_channels=16, **shape)


@cache
def cogvideox(seed=0, rotary=True, beside=0, **more):
    return built(
        "CogVideoXTransformer3DModel",
        seed,
        attention_head_dim=16,
        in_channels=4 + beside,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=rotary,
        **more,
    )


def pipeline(kind, scheduler, transformer, **more):
    """A pipeline without tokenizer, text encoder and, unless given, VAE, that shows no progress."""
    none = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = getattr(diffusers, kind)(**{**none, **more}, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_euler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def cogvideox_ddim(**config):
    usual = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "clip_sample": False}
    return diffusers.CogVideoXDDIMScheduler(**{**usual, "rescale_betas_zero_snr": True, **config})
