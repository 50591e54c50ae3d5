"""Tensors inside containers: a model that returns a list, a tuple, a dict or a dataclass gets its own kind back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in `tree` that is no container, depth first."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, part.name) for part in dataclasses.fields(tree)]
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for part in tree:
        yield from leaves(part)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in `tree`, depth first."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def replace(tree: Any, new: list[Tensor]) -> Any:
    """`tree` with its tensors replaced, in the order of `tensors`, and everything else kept."""
    return _replace(tree, iter(new))


def _replace(tree: Any, new: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(new)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):  # before Mapping: diffusers' outputs are both
        parts = {part.name: _replace(getattr(tree, part.name), new) for part in dataclasses.fields(tree)}
        return type(tree)(**parts)
    if isinstance(tree, Mapping):
        return type(tree)({name: _replace(part, new) for name, part in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_replace(part, new) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_replace(part, new) for part in tree)
    return tree
