"""What stands in the model's place while a host samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sencache.plugins.host import Calls
from sencache.report import Report


class Hosted:
    """A callable in the model's place and the host's shape; `report` tells how its trajectory went.

    Whatever else the host asks of it is asked of the model.
    """

    def __init__(self, model: Any, calls: Calls, call: Callable[..., Any]):
        self._model, self._calls, self._call = model, calls, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def report(self) -> Report:
        return self._calls.report

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)


class HostedModule(nn.Module):
    """The same for a host that wants a module: the model's parameters are its own."""

    def __init__(self, model: nn.Module, calls: Calls, call: Callable[..., Any]):
        super().__init__()
        self._model, self._calls, self._call = model, calls, call
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def report(self) -> Report:
        return self._calls.report

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("_") else getattr(self._model, name)


def hosted(model: Any, calls: Calls, call: Callable[..., Any]) -> Hosted | HostedModule:
    """`call` in the model's place."""
    return (HostedModule if isinstance(model, nn.Module) else Hosted)(model, calls, call)
