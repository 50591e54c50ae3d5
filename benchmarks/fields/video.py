"""Three small video models of diffusers' own classes, trained on Big Buck Bunny, as fields: Wan, LTX, CogVideoX.

Each is what its big brother is: Wan and LTX match flows on the linear path, CogVideoX predicts v on the schedule of its
5B model, zero SNR at the end. In place of a text four fixed random tokens stand for a scene, and zeros for none.
Shapes: latents (B, 24, 4, 8, 16), which Wan takes as they are, LTX as 128 tokens (B, 128, 96) of 2 x 2 and CogVideoX
frames first, (B, 4, 24, 8, 16).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fields.bunny import CHANNELS, HERE
from sencache.adapters.cogvideox import CogVideoXField
from sencache.adapters.ltx import LTXField
from sencache.adapters.wan import WanField

VideoField = WanField | LTXField | CogVideoXField
FAMILIES = ("wan", "ltx", "cogvideox")
SCENES, TOKENS, TEXT = 127, 4, 64
SHAPE = (CHANNELS, 4, 8, 16)  # of latents: channels, frames, height, width

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", dict(
        patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=32, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT, freq_dim=128, ffn_dim=768, num_layers=5, rope_max_seq_len=32,
    )),
    "ltx": ("LTXVideoTransformer3DModel", dict(
        in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, num_attention_heads=6, attention_head_dim=32,
        cross_attention_dim=192, num_layers=5, caption_channels=TEXT,
    )),
    "cogvideox": ("CogVideoXTransformer3DModel", dict(
        num_attention_heads=6, attention_head_dim=32, in_channels=CHANNELS, out_channels=CHANNELS, time_embed_dim=128,
        text_embed_dim=TEXT, num_layers=5, sample_width=16, sample_height=8, sample_frames=13,
        max_text_seq_length=TOKENS,
    )),
}  # fmt: skip


def build(family: str) -> nn.Module:
    """The model of a family, with random weights."""
    name, config = CLASSES[family]
    return getattr(diffusers, name)(**config)


def prompts(scene: Tensor) -> Tensor:
    """The four tokens (B, 4, 64) that stand for scenes (B,), zeros for scene -1."""
    codes = torch.randn(SCENES, TOKENS, TEXT, generator=torch.Generator().manual_seed(0)).to(scene.device)
    return torch.where(scene.reshape(-1, 1, 1) >= 0, codes[scene], 0.0)


def alphas_cumprod() -> Tensor:
    """CogVideoX 5B's schedule, (1000,) float64: scaled-linear betas, rescaled to a terminal SNR of zero."""
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    return scheduler.alphas_cumprod.double()


def field(family: str, model: nn.Module, scene: Tensor, guidance: float = 1.0) -> VideoField:
    """The velocity of videos of scenes (B,), both halves of the guidance in one batch."""
    given = prompts(scene)
    options: dict[str, Any] = dict(guidance=guidance, batched=True)
    options |= {"negative": torch.zeros_like(given)} if guidance != 1 else {}
    if family == "wan":
        return WanField(model, given, **options)
    if family == "cogvideox":
        return CogVideoXField(model, given, alphas_cumprod(), **options)
    mask = torch.ones(given.shape[:2], device=scene.device)
    options |= {"negative_mask": mask} if guidance != 1 else {}
    return LTXField(model, given, mask, num_frames=4, height=4, width=8, scale=(5.0, 256.0, 256.0), **options)


def packed(family: str, latents: Tensor) -> Tensor:
    """Latents (B, 24, 4, 8, 16) in the shape that the family's model takes."""
    if family == "wan":
        return latents
    if family == "cogvideox":
        return latents.transpose(1, 2)
    parts = latents.unflatten(4, (8, 2)).unflatten(3, (4, 2))  # (B, C, F, H, 2, W, 2)
    return parts.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpacked(family: str, x: Tensor) -> Tensor:
    """The inverse of `packed`."""
    if family == "wan":
        return x
    if family == "cogvideox":
        return x.transpose(1, 2)
    parts = x.unflatten(1, (4, 4, 8)).unflatten(4, (CHANNELS, 2, 2))  # (B, F, H, W, C, 2, 2)
    return parts.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def save(model: nn.Module, family: str, file: str | Path, /, **facts: str) -> None:
    """Write the weights in half precision, and in the header the family and any `facts` worth keeping."""
    weights = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, file, {"family": family, "config": json.dumps(CLASSES[family][1]), **facts})


def load(family: str, folder: Path = HERE) -> nn.Module:
    """The trained model of a family, float32, in eval mode, asking for no gradients."""
    file = folder / f"{family}.safetensors"
    with safe_open(file, "pt") as header:
        config = json.loads(header.metadata()["config"])
    model = getattr(diffusers, CLASSES[family][0])(**config)
    model.load_state_dict({name: p.float() for name, p in load_file(file).items()})
    return model.eval().requires_grad_(False)
