"""What the adapters share: classifier-free guidance inside the field, rows, and a block stack under a fresh head.

Shapes: x, v (B, ...); t float, (), (B,) or, where a model knows times of tokens, (B, N); conditioning (B, ...) or a
list of B entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sencache.adapters import blocks

Conditioning = dict[str, Any]  # by name, (B, ...) tensors or lists of B entries
Self = TypeVar("Self", bound="Guided")


class Guided(ABC):
    """A model with its conditioning as a field: v = v(none) + w (v(given) - v(none)), w being `guidance`.

    given: what to condition on. none: what means nothing, needed unless w = 1, which costs one pass. Other scales cost
    two: `batched` runs them as one batch of 2B, otherwise one after the other, in half of the memory.
    """

    BLOCKS = "transformer_blocks"  # the model's list of blocks
    PAIR = False  # whether a block returns the text's tokens too
    fingerprint: str

    def __init__(
        self, model: nn.Module, given: Conditioning, none: Conditioning | None, guidance: float, batched: bool
    ):
        if guidance != 1 and none is None:
            raise ValueError(f"A guidance of {guidance:g} needs what it leads away from: give `negative`.")
        self.model, self.guidance, self.batched = model, float(guidance), batched
        self.sides = [_filled(given)] if guidance == 1 or none is None else [_filled(given), _filled(none)]
        self.size = _size(self.sides)

    @abstractmethod
    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        """The model's output for a batch: x (B, ...) in its own dtype, t (B,) or (B, N)."""

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The velocity (B, ...) from the guided output, by default itself."""
        return output

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The velocity (B, ...) at x (B, ...) and t."""
        t = self._time(x, t)
        return self._guided(x, t, [self.call(self.model, *batch) for batch in self._batches(x, t)])

    def stack(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        """What the blocks add to the tokens, (B, N, D) with the conditioning and, if guided, (B, N, D) without."""
        batches = self._batches(x, self._time(x, t))
        parts = [blocks.added(self.model, self.BLOCKS, self._on(batch)) for batch in batches]
        return torch.cat(parts).chunk(len(self.sides))

    def head(self, x: Tensor, t: Tensor | float, stack: tuple[Tensor, ...]) -> Tensor:
        """The velocity (B, ...) with embeddings and head at (x, t), where the blocks add `stack`."""
        t = self._time(x, t)
        batches = self._batches(x, t)
        parts = zip(batches, torch.cat(list(stack)).chunk(len(batches)), strict=True)
        name, pair = self.BLOCKS, self.PAIR
        return self._guided(x, t, [blocks.given(self.model, name, self._on(batch), one, pair) for batch, one in parts])

    def modulated(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The timestep-modulated input (B, ...) that TeaCache compares from query to query, at the price of embeddings.

        Of the conditional side alone: without the text in it both are the same.
        """
        t, x = self._time(x, t), x.to(_dtype(self.model) or x.dtype)
        given = self._on((x, t, self.sides[0]))
        block, args, kwargs = blocks.entered(self.model, self.BLOCKS, given, self.PAIR)
        return self.modulation(block, *args, **kwargs)

    def modulation(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`modulated` (B, ...) from what the model hands to its first block."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the timestep modulates.")

    def select(self: Self, rows: Tensor) -> Self:
        """The field of the samples `rows` alone; guidance is inside, so that no pair is torn apart."""
        few = object.__new__(type(self))
        sides = [{name: _rows(part, rows) for name, part in side.items()} for side in self.sides]
        vars(few).update(vars(self), sides=sides, size=len(rows))
        return few

    def _time(self, x: Tensor, t: Tensor | float) -> Tensor:
        if len(x) != self.size:
            raise ValueError(f"This field is conditioned for {self.size} samples, and x holds {len(x)}.")
        t = t if isinstance(t, Tensor) else torch.tensor(t, device=x.device)
        return t.expand(len(x), *t.shape[1:])

    def _batches(self, x: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor, Conditioning]]:
        """x, t and conditioning of each call of the model."""
        x = x.to(_dtype(self.model) or x.dtype)
        groups = [self.sides] if self.batched else [[side] for side in self.sides]
        return [
            (
                torch.cat([x] * len(group)),
                torch.cat([t] * len(group)),
                {name: _joined(group, name) for name in group[0]},
            )
            for group in groups
        ]

    def _on(self, batch: tuple[Tensor, Tensor, Conditioning]) -> Callable[[nn.Module], Tensor]:
        return lambda model: self.call(model, *batch)

    def _guided(self, x: Tensor, t: Tensor, outputs: list[Tensor]) -> Tensor:
        sides = torch.cat(outputs).to(x.dtype).chunk(len(self.sides))
        output = sides[0] if len(sides) == 1 else sides[1] + self.guidance * (sides[0] - sides[1])
        return self.velocity(x, t, output)


def _filled(given: Conditioning) -> Conditioning:
    return {name: part for name, part in given.items() if part is not None}


def _size(sides: list[Conditioning]) -> int:
    """B, of which every part of the conditioning must be."""
    sizes = {name: len(part) for side in sides for name, part in side.items()}
    if any(len(part) != next(iter(sizes.values())) for side in sides for part in side.values()):
        raise ValueError(f"Everything a field is conditioned on must be of as many samples; got {sizes}. Expand it.")
    return next(iter(sizes.values()))


def _rows(part: Any, rows: Tensor) -> Any:
    return part[rows.to(part.device)] if isinstance(part, Tensor) else [part[row] for row in rows.tolist()]


def _joined(group: list[Conditioning], name: str) -> Any:
    parts = [side[name] for side in group]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [entry for part in parts for entry in part]


def _dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that a model computes in: its own word for it, or that of its first parameter."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next((part.dtype for part in model.parameters()), None)
