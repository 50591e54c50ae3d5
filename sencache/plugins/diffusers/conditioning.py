"""What a call of a transformer was conditioned on: everything it is given but the state and the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sencache.memory import Key
from sencache.trees import leaves

STATES, TIMES = ("hidden_states", "sample", "x"), ("timestep", "t")  # by diffusers' names, else the first two arguments
PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)


class Call:
    """A call of a transformer, taken apart into its state x, its time and its conditioning."""

    def __init__(self, model: str, context: str, args: tuple[Any, ...], kwargs: dict[str, Any], key: Key | None):
        rest, positional = dict(kwargs), list(args)
        self.x, self.timestep = (_taken(names, rest, positional) for names in (STATES, TIMES))
        self.where = model, context
        self.given = key(args, kwargs) if key else [_Part(leaf) for leaf in leaves((positional, sorted(rest.items())))]

    def turn(self, number: int) -> Conditioning:
        """What this call is known by as the `number`-th since the last step."""
        return Conditioning((*self.where, number), self.given)


class Conditioning:
    """Equal to another of the same model, diffusers' `cache_context` and turn in the step, given the same values."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, where: tuple[str, str, int], given: Any):
        self.where, self.given = where, given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conditioning) and self.where == other.where and bool(self.given == other.given)


class _Part:
    """One value; a tensor stands for what it held when it was given."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any):
        self.value, self.state = value, None
        if isinstance(value, Tensor):  # tensors of inference mode do not count how often they were written to
            self.state = value.clone() if value.is_inference() else value._version

    def __eq__(self, other: object) -> bool:
        one, two = self.value, other.value if isinstance(other, _Part) else other
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            return one is two or (isinstance(one, PLAIN) and type(one) is type(two) and bool(one == two))
        unwritten = torch.equal(one, self.state) if isinstance(self.state, Tensor) else one._version == self.state
        if one is two or not unwritten:
            return unwritten
        same_kind = (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
        return same_kind and torch.equal(one, two)


def _taken(names: tuple[str, ...], kwargs: dict[str, Any], args: list[Any]) -> Any:
    """The argument of one of these names, or else the first of those without a name; it is taken out."""
    for name in names:
        if name in kwargs:
            return kwargs.pop(name)
    return args.pop(0) if args else None
