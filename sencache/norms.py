"""The norm of everything here: root mean square per sample, so that a tolerance means the same at every size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]  # (B, ...) -> (B,)


def rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The root mean square of each sample of x (B, ...), as (B,), accumulated in float32 or better.

    mask: broadcastable to x, 1 where an element counts and 0 where it is left out (static channels, padded tokens).
    Pass it bound, ``norm=partial(rms, mask=mask)``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1) if x.ndim > 1 else x.double()[:, None]
    if mask is None:
        return torch.linalg.vector_norm(wide, dim=1) / wide.shape[1] ** 0.5
    counted = torch.broadcast_to(mask, x.shape).reshape(wide.shape).to(wide)
    return ((counted * wide.square()).sum(1) / counted.sum(1)).sqrt()


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in float32 or better, where half precision would lose what small steps change."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) - b.to(wide)
