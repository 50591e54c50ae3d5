"""The samples of a batch, in trees of tensors (B, ...): counted, copied, taken, merged, measured.

Host-side vectors (B,) are NumPy's, quick where there are few numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sencache.norms import Norm, difference
from sencache.trees import replace, tensors

Array = NDArray[Any]


def batch_of(x: Any) -> int:
    """B, the number of samples in x."""
    parts = tensors(x)
    if not parts or not parts[0].ndim or not len(parts[0]):
        came = f"shape {tuple(parts[0].shape)}" if parts else type(x).__name__
        raise ValueError(f"x must hold at least one sample, shape (B, ...) with B >= 1; got {came}.")
    return len(parts[0])


def clock_of(t: Tensor | float, batch: int) -> Array:
    """t as (B, T) float64, whatever way the sampler writes it."""
    clock = np.array(_plain(t) if isinstance(t, Tensor) else t, dtype=np.float64)
    if clock.ndim and clock.shape[0] not in (1, batch):
        raise ValueError(f"t must be a float, (), (B,) or (B, T) with B = {batch}; got shape {clock.shape}.")
    clock = clock.reshape(clock.shape[0] if clock.ndim else 1, -1)
    return clock if len(clock) == batch else clock.repeat(batch, 0)


def _plain(t: Tensor) -> Array | float:
    return t.detach().cpu().double().numpy() if t.ndim else t.item()


def kind(tree: Any) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    """Shape, dtype and device of every tensor."""
    return [(part.shape, part.dtype, part.device) for part in tensors(tree)]


def copy(tree: Any) -> Any:
    return replace(tree, [part.detach().clone() for part in tensors(tree)])


def take(rows: Array | Tensor, tree: Any) -> Any:
    """The samples `rows` (B,) bool of every tensor; if these are all, the tree itself."""
    if rows.all():
        return tree
    at = _tensor(rows).nonzero()[:, 0]
    return replace(tree, [part[at.to(part.device)] for part in tensors(tree)])


def merge(rows: Array, new: Any, old: Any) -> Any:
    """A copy of `old` with its samples `rows` (B,) bool replaced, in order, by the tensors of `new`."""
    if rows.all() and kind(new) == kind(old):
        return replace(old, [part.detach().clone() for part in tensors(new)])
    at = torch.from_numpy(rows).nonzero()[:, 0]
    pairs = zip(tensors(old), tensors(new), strict=True)
    return replace(old, [was.index_copy(0, at.to(was.device), part.detach()) for was, part in pairs])


def spread(values: Array | Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) of the dtype and on the device of `like` (B, ...)."""
    return _tensor(values).to(like).reshape(-1, *[1] * (like.ndim - 1))


def _tensor(values: Array | Tensor) -> Tensor:
    """On the host, whatever the default device is."""
    return values if isinstance(values, Tensor) else torch.from_numpy(values)


def apart(a: Any, b: Any, norm: Norm) -> Tensor:
    """The norm (B,) float64 of a - b; of a state in several parts, the RMS over all of them."""
    norms = [norm(difference(one, two)).detach().double() for one, two in zip(tensors(a), tensors(b), strict=True)]
    for part, each in zip(tensors(a), norms, strict=True):
        if each.shape != (len(part),):
            raise ValueError(f"`norm` must give a number a sample, shape ({len(part)},); got {tuple(each.shape)}.")
    if len(norms) == 1:
        return norms[0]
    sizes = [part[0].numel() for part in tensors(a)]
    squares = torch.stack([size * part.square() for size, part in zip(sizes, norms, strict=True)])
    return (squares.sum(0) / sum(sizes)).sqrt()


def finiteness(y: Any) -> Tensor:
    """0 (B,) float64, and NaN of samples that are not finite: quicker than isfinite."""
    zeros = [(part * 0).reshape(len(part), -1).sum(1).abs().double() for part in tensors(y)]
    return zeros[0] if len(zeros) == 1 else torch.stack(zeros).sum(0)
