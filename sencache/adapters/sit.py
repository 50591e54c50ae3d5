"""SiT (Ma et al. 2024) as a velocity field, with classifier-free guidance inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sencache.adapters.guided import Conditioning, Guided
from sencache.fingerprint import fingerprint
from solvers import Linear


class SiTField(Guided):
    """v(x, t) of a SiT on the linear path, for the classes y.

    model: called ``model(x, t, y)`` with t (B,), noise at 0 and data at 1, as SiT's authors train theirs. If it
        returns more channels than x has (a learned variance), the first ones are the velocity.
    y: (B,) class indices. guidance: the scale w of v = v(none) + w (v(y) - v(none)); 1 costs one pass, others two,
        run as one batch of 2B. null: the index that means "no class", by default the model's `num_classes`.
    data_at: 1 integrates upward in SiT's own time; 0 is the same flow in the papers' time, from noise at t = 1.
    """

    BLOCKS = "blocks"

    def __init__(
        self, model: nn.Module, y: Tensor, *, guidance: float = 1.0, null: int | None = None, data_at: int = 1
    ):
        if y.ndim != 1 or y.is_floating_point():
            raise ValueError(f"`y` must be integer classes of shape (B,); got {y.dtype} of shape {tuple(y.shape)}.")
        if null is None and guidance != 1.0 and not hasattr(model, "num_classes"):
            raise ValueError(
                "Guidance needs the index that means no class, and the model has no `num_classes`: give `null`."
            )
        self.null = null if null is not None else getattr(model, "num_classes", -1)
        super().__init__(model, {"y": y}, {"y": torch.full_like(y, self.null)}, guidance, batched=True)
        self.data_at, self.path = data_at, Linear(data_at=float(data_at))
        self.fingerprint = fingerprint(model, "SiT", guidance, data_at)

    @property
    def y(self) -> Tensor:
        """The classes (B,)."""
        return self.sides[0]["y"]

    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        at = t.to(x)
        return model(x, at if self.data_at == 1 else 1 - at, given["y"])[:, : x.shape[1]]

    def modulation(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        tokens, c = args
        name = "adaLN_modulation" if hasattr(block, "adaLN_modulation") else "modulation"  # as in the authors' SiT
        shift, scale = block.get_submodule(name)(c).chunk(6, -1)[:2]
        return layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return output if self.data_at == 1 else -output
