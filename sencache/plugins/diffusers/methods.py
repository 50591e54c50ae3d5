"""What is overridden on a single pipeline, transformer and scheduler.

Everything happens inside a call of the pipeline, and is found by it: two pipelines may share a transformer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sencache.plugins.diffusers.hooks import holders

CURRENT: ContextVar[Any] = ContextVar("the sencache handle of the pipeline that is running", default=None)


def _current(thing: Any) -> Any:
    """The handle whose run a call of `thing` belongs to, or None."""
    handle = CURRENT.get()
    return handle if handle is not None and handle.owns(thing) else None


def of_pipeline(base: type) -> dict[str, Callable[..., Any]]:
    """A call of the pipeline is a run."""
    original: Any = base.__call__

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handle: Any = holders(self)[0]
        with handle.scope():
            return original(self, *args, **kwargs)

    return {"__call__": __call__}


def of_model(base: type) -> dict[str, Callable[..., Any]]:
    """A call of a transformer is a query."""
    original: Any = base.__call__

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handle = _current(self)
        if handle is None:
            return original(self, *args, **kwargs)
        return handle.ask(self, functools.partial(original, self), args, kwargs)

    @contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        handle = CURRENT.get()
        with base.cache_context(self, name, *args, **kwargs):  # type: ignore[attr-defined]
            if handle is None:
                yield
            else:
                with handle.named(name):
                    yield

    return {"__call__": __call__} | ({"cache_context": cache_context} if hasattr(base, "cache_context") else {})


def of_scheduler(base: type) -> dict[str, Callable[..., Any]]:
    """A new grid is a new trajectory; a step is where what was asked takes effect."""
    set_original: Any = base.set_timesteps  # type: ignore[attr-defined]
    step_original: Any = base.step  # type: ignore[attr-defined]

    @functools.wraps(set_original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, handle = set_original(self, *args, **kwargs), _current(self)
        if handle is not None:
            handle.begin()
        return result

    @functools.wraps(step_original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle, forward = _current(self), functools.partial(step_original, self)
        return forward(*args, **kwargs) if handle is None else handle.step(self, forward, args, kwargs)

    return {"set_timesteps": set_timesteps, "step": step}
