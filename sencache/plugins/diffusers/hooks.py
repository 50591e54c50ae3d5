"""Methods of a single object overridden, and restored: the class of that object is replaced, no class is changed.

A forward hook, or a method set on the instance, is lost when weights are offloaded or recompiled; the class is not. A
copy, a pickle or a saved folder of the object has its own class, and so has an object made by `type(thing)(...)`.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

MARK = "_sencache_holders"
MADE: WeakKeyDictionary[Any, type] = WeakKeyDictionary()
LOCK = threading.Lock()  # pipelines in two threads may share a transformer


def hook(thing: Any, holder: object, made: type) -> None:
    """Override methods of `thing` on behalf of `holder`, by a class that was `made` for it.

    Of several holders the first one's class stays until the last one has let go.
    """
    with LOCK:
        if MARK in vars(type(thing)):
            vars(type(thing))[MARK].append(holder)
            return
        vars(made)[MARK].append(holder)
        object.__setattr__(thing, "__class__", made)


def make(base: type, methods: Callable[[type], Mapping[str, Any]]) -> type:
    """A class like `base` with the methods that `methods` returns for it."""

    class Maker(type(base)):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return base(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        found: Any = base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        if isinstance(found, str):
            return found
        build, args, *rest = found
        if build is copyreg.__newobj__ and len(args) == 1:  # type: ignore[attr-defined]
            return (copyreg._reconstructor, (base, object, None), *rest)  # type: ignore[attr-defined]
        return (base if build is cls else build, args, *rest)

    space = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    cls = Maker(base.__name__, (base,), {**space, "__reduce_ex__": reduce, MARK: [], **methods(base)})
    return cls


def made(thing: Any, methods: Callable[[type], Mapping[str, Any]]) -> type:
    """The class that `make` returns for `thing`, always the same one: code compiled for it would be compiled anew."""
    if MARK in vars(type(thing)):
        return type(thing)
    if thing not in MADE or MADE[thing].__bases__[0] is not type(thing):
        MADE[thing] = make(type(thing), methods)
    return MADE[thing]


def unhook(thing: Any, holder: object) -> None:
    """Let go of `thing`; the last holder restores its class. Nothing happens where `holder` holds nothing."""
    with LOCK:
        present = holders(thing)
        if held(thing, holder):
            present.remove(holder)
            if not present:
                object.__setattr__(thing, "__class__", type(thing).__bases__[0])


def holders(thing: Any) -> list[object]:
    """On whose behalf methods of `thing` are overridden."""
    found: list[object] = vars(type(thing)).get(MARK, [])
    return found


def held(thing: Any, holder: object) -> bool:
    """Whether `holder` has hooked `thing`."""
    return any(one is holder for one in holders(thing))
