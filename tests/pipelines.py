"""Tiny pipelines of diffusers, of its real classes with random weights, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

WIDTH = 32  # of the text embeddings


def lively(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """A model whose outputs are of the size of its inputs and change with time, as those of a trained one do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            if "time" in name and "embed" in name or "condition_embedder" in name:
                weight.mul_(3 * gain)
    return model.eval()


def prompt(seed: int, batch: int = 1, tokens: int = 6) -> Tensor:
    """Text embeddings (batch, tokens, WIDTH)."""
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def wan(scheduler: Any = None, *, two: bool = False, image: bool = False, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)

    def transformer() -> nn.Module:
        return lively(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36 if image else 16,
                out_channels=16, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
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


def run_wan(pipe: Any, steps: int = 12, guidance: float = 3.0, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    given = {"prompt_embeds": prompt(1), "negative_prompt_embeds": prompt(2)} | options
    return pipe(
        height=16, width=16, num_frames=5, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=generator, return_dict=False, **given,
    )[0]  # fmt: skip


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
