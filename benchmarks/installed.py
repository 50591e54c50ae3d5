"""Other people's caches on a model for the length of one run, with their own code, as their documentation says.

An installation is a context: (model, loop, setting) puts a cache on the model, and at the end takes it off. The traps
that each holds are told in docs/peers.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging
from torch import Tensor, nn

from benchmarks.fields import video

Setting = dict[str, Any]  # what a cache's configuration is given beyond its defaults


class Loop:
    """The model as a pipeline's loop calls it: in a cache context that says whose call it is and where the loop stands.

    The pipelines name the contexts "cond" and "uncond" (Wan), or "cond_uncond" (LTX, CogVideoX: both in one batch).
    swapped: hand the batch over as [uncond, cond], the pipelines' order; ours is [cond, uncond].
    """

    def __init__(self, field: video.VideoField, family: str, steps: int, swapped: bool):
        self.model: Any = field.model
        self.field, self.family, self.steps, self.swapped = field, family, steps, swapped
        self.guided = len(field.sides) == 2
        self.separate = self.guided and not field.batched
        self.names = ("cond", "uncond") if self.separate else ("cond_uncond",) if self.guided else ("cond",)
        self.step, self.calls, self.sigma, self.timestep = -1, 0, 1.0, 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def begin(self, x: Tensor, t: Tensor) -> None:
        """Go to the next step, which is at t."""
        at = self.field.path.coefficients(t, x)
        self.step += 1
        self.sigma = float(at.sigma / (at.alpha + at.sigma))  # where the linear path has this signal-to-noise ratio

    def __call__(self, **given: Any) -> tuple[Tensor]:
        name = self.names[self.calls % len(self.names)]
        self.calls += 1
        self.timestep = float(given["timestep"].flatten()[0])
        if self.swapped:
            given |= {part: _swapped(given[part]) for part in ("hidden_states", "encoder_hidden_states", "timestep")}
        where = {"step_index": self.step, "num_inference_steps": self.steps, "sigma": self.sigma}
        with self.model.cache_context(name, timestep=self.timestep, **where):
            output = self.model(**given)[0]
        return (_swapped(output) if self.swapped else output,)


def _swapped(batch: Tensor) -> Tensor:
    return torch.cat(batch.chunk(2)[::-1])


Install = Callable[[Any, Loop, Setting], AbstractContextManager[None]]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever is set inside on the model and its parts is gone afterwards: removed caches leave some behind."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def _hooked(model: Any, config: Any) -> Iterator[None]:
    """One of diffusers' caches, without its remarks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.enable_cache(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.meshgrid")  # FasterCache's
            yield
    finally:
        model.disable_cache()
        logging.set_verbosity(verbosity)


def first_block(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return _hooked(model, FirstBlockCacheConfig(**setting))


def mag(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return _hooked(model, MagCacheConfig(num_inference_steps=loop.steps, **setting))


def sea(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    """SeaCache, shown the latents as videos (C, F, H, W), of which it knows by itself only where Wan's are."""

    def latents(module: nn.Module, args: Any, given: dict[str, Any]) -> list[Tensor]:
        return list(video.unpacked(loop.family, given["hidden_states"]))

    return _hooked(model, SeaCacheConfig(raw_vision_callback=latents, **setting))


def taylor(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    """TaylorSeer on every attention and feed-forward, as in its paper; by default the hook finds none of them here."""
    blocks, forward = ("blocks", "ffn") if loop.family == "wan" else ("transformer_blocks", "ff")
    parts = {} if setting.get("use_lite_mode") else {"cache_identifiers": [rf"{blocks}\.\d+\.(attn1|attn2|{forward})"]}
    return _hooked(model, TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **parts, **setting))


def pyramid(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return _hooked(model, PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: loop.timestep, **setting))


def faster(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    config = FasterCacheConfig(
        current_timestep_callback=lambda: loop.timestep,
        attention_weight_callback=lambda _: 0.3,
        tensor_format={"wan": "BCFHW", "cogvideox": "BFCHW"}[loop.family],
        is_guidance_distilled=not loop.guided,
        **setting,
    )
    return _hooked(model, config)


@contextmanager
def dual_block(model: nn.Module, loop: Loop, setting: Setting) -> Iterator[None]:
    """cache-dit's DBCache on the transformer alone, with its TaylorSeer where the setting has a `taylorseer_order`."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit

    rest = {"num_inference_steps": loop.steps, "enable_separate_cfg": loop.separate, **setting}
    order = rest.pop("taylorseer_order", None)
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    try:
        cache_dit.enable_cache(model, cache_config=cache_dit.DBCacheConfig(**rest), calibrator_config=calibrator)
        yield
    finally:
        cache_dit.disable_cache(model)
