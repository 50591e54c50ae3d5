"""Tensors inside containers: a model that returns a list, a tuple, a dict or a dataclass gets its own kind back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in `tree` that is no container, depth first, and of every container its type, size and names."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts: list[Any] = [part for name in dataclasses.fields(tree) for part in (name.name, getattr(tree, name.name))]
    elif isinstance(tree, Mapping):
        parts = [part for item in tree.items() for part in item]
    elif isinstance(tree, list | tuple):
        parts = list(tree)
    else:
        yield tree
        return
    yield type(tree)
    yield len(parts)
    for part in parts:
        yield from leaves(part)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in `tree`, depth first."""
    if isinstance(tree, Tensor):  # as it nearly always is
        return [tree]
    if tree is None or isinstance(tree, list | tuple):
        return [leaf for part in tree or () for leaf in tensors(part)]
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
