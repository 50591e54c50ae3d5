"""SiT (Ma et al. 2024) as a velocity field, with classifier-free guidance inside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sencache.profile import fingerprint
from solvers import Linear


class SiTField:
    """v(x, t) of a SiT on the linear path, for the classes y.

    model: called ``model(x, t, y)`` with t (B,), noise at 0 and data at 1, as SiT's authors train theirs. If it
        returns more channels than x has (a learned variance), the first ones are the velocity.
    y: (B,) class indices. guidance: the scale w of v = v(none) + w (v(y) - v(none)); 1 costs one pass, others two,
        run as one batch of 2B. null: the index that means "no class", by default the model's `num_classes`.
    data_at: 1 integrates upward in SiT's own time; 0 is the same flow in the papers' time, from noise at t = 1.
    """

    def __init__(
        self, model: nn.Module, y: Tensor, *, guidance: float = 1.0, null: int | None = None, data_at: int = 1
    ):
        if y.ndim != 1 or y.is_floating_point():
            raise ValueError(f"`y` must be integer classes of shape (B,); got {y.dtype} of shape {tuple(y.shape)}.")
        if null is None and guidance != 1.0 and not hasattr(model, "num_classes"):
            raise ValueError(
                "Guidance needs the index that means no class, and the model has no `num_classes`: give `null`."
            )
        self.model, self.y, self.guidance, self.data_at = model, y, guidance, data_at
        self.null = null if null is not None else getattr(model, "num_classes", -1)
        self.path = Linear(data_at=float(data_at))
        self.fingerprint = fingerprint(model, "SiT", guidance, data_at)

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The velocity (B, C, H, W) at x (B, C, H, W) and t, (), (B,) or a float."""
        if len(x) != len(self.y):
            raise ValueError(f"This field was made for {len(self.y)} classes y, and x holds {len(x)} samples.")
        t = torch.as_tensor(t).to(device=x.device, dtype=x.dtype).expand(len(x))
        sign, at = (1, t) if self.data_at == 1 else (-1, 1 - t)
        if self.guidance == 1.0:
            return sign * self.model(x, at, self.y)[:, : x.shape[1]]
        both = torch.cat([self.y, torch.full_like(self.y, self.null)])
        v, v_none = self.model(torch.cat([x, x]), torch.cat([at, at]), both)[:, : x.shape[1]].chunk(2)
        return sign * (v_none + self.guidance * (v - v_none))

    def select(self, rows: Tensor) -> SiTField:
        """The field of the samples `rows` alone; guidance is inside, so that no pair is torn apart."""
        few = object.__new__(SiTField)
        vars(few).update(vars(self), y=self.y[rows.to(self.y.device)])
        return few
