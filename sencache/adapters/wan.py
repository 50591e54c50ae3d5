"""Wan (Wan team 2025, arXiv 2503.20314) as a velocity field: diffusers' transformer, the official one, two experts.

Time is sigma in [0, 1] on the linear path, data at 0, the unit of `scheduler.sigmas`; the transformer is handed the
timestep 1000 sigma in float32. Shapes: x (B, C, F, H, W); prompts (B, L, D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sencache.adapters.guided import Conditioning, Guided
from sencache.fingerprint import fingerprint
from solvers import Linear


class WanField(Guided):
    """v(x, t) of diffusers' `WanTransformer3DModel` for the prompts' embeddings, in the model's dtype.

    negative: embeddings of what `guidance` leads away from. batched: see `Guided`; the pipelines do not.
    condition: (B, C', F, H, W) what image-to-video models see beside x and does not change: mask and image latents.
    image: (B, L', D') embeddings of the image, for those that have an image encoder.
    held: (F,) bool, frames of x that are given and stay (Wan 2.2 TI2V): the model sees them at timestep 0.
    integer: hand over timesteps truncated to integers, as UniPC does in diffusers and in the official code.
    """

    BLOCKS = "blocks"

    def __init__(
        self,
        model: nn.Module,
        prompt: Any,
        *,
        negative: Any = None,
        guidance: float = 1.0,
        batched: bool = False,
        condition: Tensor | None = None,
        image: Tensor | None = None,
        held: Tensor | None = None,
        integer: bool = False,
    ):
        beside = {"condition": condition, "image": image}
        none = None if negative is None else {"prompt": negative, **beside}
        super().__init__(model, {"prompt": prompt, **beside}, none, guidance, batched)
        self.held, self.integer, self.path = None if held is None else held.bool(), integer, Linear()
        options = (self.guidance, integer, condition is not None, None if self.held is None else self.held.tolist())
        self.fingerprint = fingerprint(model, type(self).__name__, *options)

    def timestep(self, t: Tensor) -> Tensor:
        """What the transformer is handed for t."""
        timestep = 1000 * t.float()
        return timestep.long() if self.integer else timestep

    def timesteps(self, x: Tensor, t: Tensor, patch: tuple[int, int, int]) -> Tensor:
        """The timesteps (B,) of t (B,), or where frames are held those (B, N) of the tokens of x."""
        timestep = self.timestep(t).to(x.device)
        if self.held is None:
            return timestep
        frames = timestep[:, None] * ~self.held[:: patch[0]].to(x.device)
        return frames.repeat_interleave(x.shape[3] // patch[1] * (x.shape[4] // patch[2]), 1)

    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        seen = torch.cat([x, given["condition"].to(x)], 1) if "condition" in given else x
        return model(
            hidden_states=seen,
            timestep=self.timesteps(x, t, _patch(model.config)),
            encoder_hidden_states=given["prompt"],
            encoder_hidden_states_image=given.get("image"),
            return_dict=False,
        )[0]

    def modulation(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return kwargs["e"] if "e" in kwargs else args[2]  # the projected time embedding, in both codes

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return output if self.held is None else output * ~self.held.to(x.device)[:, None, None]


def _patch(config: Any) -> tuple[int, int, int]:
    return config.patch_size


class WanListField(WanField):
    """The same of the official code's `WanModel`, called ``model([x], t=, context=[...], seq_len=)`` for a list.

    prompt, negative: lists of B embeddings (L, D), of any lengths L. condition and image are its `y` and `clip_fea`.
    """

    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        beside = {"y": list(given["condition"].to(x))} if "condition" in given else {}
        beside |= {"clip_fea": given["image"]} if "image" in given else {}
        patch = _patch(model)
        shape = {"t": self.timesteps(x, t, patch), "seq_len": x[0, 0].numel() // math.prod(patch)}
        return torch.stack(model(list(x), context=given["prompt"], **shape, **beside))


class WanExperts:
    """Wan 2.2's two experts as one field: `high` at timesteps from 1000 `boundary` upward, `low` below.

    Each is a field of its own, with its own guidance. `regime(t)` tells a cache which of them answers, so that nothing
    is carried from one to the other: its first query is evaluated, and what the other owed stays owed.
    """

    def __init__(self, high: WanField, low: WanField, boundary: float):
        if not 0 < boundary < 1:
            raise ValueError(f"`boundary` is a sigma between 0 and 1, as 0.875 in Wan 2.2; got {boundary:g}.")
        self.high, self.low, self.boundary, self.path = high, low, boundary, high.path
        self.fingerprint = " ".join([high.fingerprint, low.fingerprint, f"{boundary:g}"])

    def regime(self, t: Tensor) -> Tensor:
        """Whether the high-noise expert answers at times t, of t's shape."""
        return self.high.timestep(t) >= 1000 * self.boundary

    def expert(self, t: Tensor | float) -> WanField:
        """The one that answers at t. Raises ValueError where samples stand on both sides of the boundary."""
        high = self.regime(t if isinstance(t, Tensor) else torch.tensor(t, device="cpu"))
        if high.any() and not high.all():
            raise ValueError(f"Samples of one call must stand on one side of t = {self.boundary:g}; got {t}.")
        return self.high if high.all() else self.low

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The velocity (B, C, F, H, W) at x (B, C, F, H, W) and t."""
        return self.expert(t)(x, t)

    def modulated(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.expert(t).modulated(x, t)

    def stack(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        return self.expert(t).stack(x, t)

    def head(self, x: Tensor, t: Tensor | float, stack: tuple[Tensor, ...]) -> Tensor:
        return self.expert(t).head(x, t, stack)

    def select(self, rows: Tensor) -> WanExperts:
        few = object.__new__(WanExperts)
        vars(few).update(vars(self), high=self.high.select(rows), low=self.low.select(rows))
        return few
