"""What `MODULE:NAME` on the command line means."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def field_maker(name: str) -> Callable[[int], Any]:
    """What makes the field `MODULE:NAME` for a number of samples."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--field is MODULE:NAME, such as mymodel:field; got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not look here
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever happens in somebody's module
        advice = f"Run it where {module.split('.')[0]} can be imported; modules of this folder can."
        if module.split(".")[0] == "benchmarks":
            advice = (
                "The shipped fields are in the repository and not in the installed package: clone it, and run this in "
                "its root."
            )
        raise ImportError(f"{module} cannot be imported ({type(error).__name__}: {error}). {advice}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [one for one, value in vars(found).items() if callable(value) and not one.startswith("_")]
            raise ValueError(f"{module} has no {attribute}. Callables there: {', '.join(there) or 'none'}.")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} should be a field or make one; it is {type(found).__name__} and cannot be called.")
    thing: Any = found
    return thing if is_factory(thing) else lambda samples: thing


def is_factory(thing: Any) -> bool:
    """Whether it is called with the number of samples and not with x and t: it has one required argument."""
    if isinstance(thing, nn.Module):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(thing).parameters.values()
    return sum(one.kind in positional and one.default is one.empty for one in given) == 1
