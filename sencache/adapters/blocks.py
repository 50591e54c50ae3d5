"""What a transformer's blocks add to its tokens: noted in one call of the model, given to it in another.

Neither the model nor its class is touched. The call is made on a twin, an object that shares every part with the model
but the list of blocks, in whose place stands one block of ours. So nothing has to be undone after an exception, and
threads that share a model do not meet. A model whose `forward` is bound to the model itself (hooks that offload the
whole of it, sequence parallelism) leads the call around the twin, which is an error.

Shapes: tokens (B, N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sencache.norms import difference

Call = Callable[[nn.Module], Any]  # calls the model that it is given


def added(model: nn.Module, name: str, call: Call) -> Tensor:
    """What the blocks `name` of the model add to its tokens in a call, (B, N, D) in float32 or better."""
    noting = _Noting(model._modules.get(name) or [])
    _through(model, name, noting, call)
    return noting.added


def given(model: nn.Module, name: str, call: Call, what: Tensor, pair: bool = False) -> Any:
    """The output of a call in which the blocks `name` of the model are not run but add `what` (B, N, D).

    pair: whether they return the text's tokens beside the video's. Heads look at the video's alone.
    """
    return _through(model, name, _Adding(what, pair), call)


def entered(model: nn.Module, name: str, call: Call, pair: bool = False) -> tuple[nn.Module, tuple[Any, ...], dict]:
    """The first of the blocks `name` of the model, and what a call hands to it; no block is run."""
    block = _Entering(pair)
    _through(model, name, block, call)
    return next(iter(model.get_submodule(name).children())), block.args, block.kwargs


def _through(model: nn.Module, name: str, block: _Noting | _Entering | _Adding, call: Call) -> Any:
    """The output of a call on a twin of the model that has one block."""
    if not isinstance(model._modules.get(name), nn.ModuleList):
        raise TypeError(
            f"Expected a model with a list of blocks `{name}`; {type(model).__name__} has none. Reuse outputs."
        )
    twin = object.__new__(type(model))
    vars(twin).update(vars(model), _modules={**model._modules, name: nn.ModuleList([block])})
    twin._compiled_call_impl = None  # of `model.compile()`: compiled for the model's own blocks
    out = call(twin)
    if block.calls != 1:
        raise RuntimeError(
            f"The forward of this {type(model).__name__} ran {block.calls} times through `{name}` where once was "
            "expected: it is bound to the model itself, as by hooks that offload the whole model. Hook the blocks "
            'instead, or reuse outputs, payload="output".'
        )
    return out


class _Noting(nn.Module):
    """All the blocks as one, and what they added."""

    added: Tensor

    def __init__(self, blocks: Any):
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(blocks), 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before, out = _tokens(args, kwargs), None
        for block in self.blocks:
            out = block(*args, **kwargs)
            if isinstance(out, tuple):  # the video's tokens and the text's, which such blocks take by name
                kwargs = {**kwargs, "hidden_states": out[0], "encoder_hidden_states": out[1]}
            elif args:
                args = (out, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": out}
        self.calls += 1
        self.added = difference(_tokens(args, kwargs), before)
        return out


class _Entering(nn.Module):
    """One block in place of all, that keeps what it was handed and changes nothing."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, pair: bool):
        super().__init__()
        self.pair, self.calls = pair, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.args, self.kwargs = args, kwargs
        tokens = _tokens(args, kwargs)
        return (tokens, kwargs["encoder_hidden_states"]) if self.pair else tokens


class _Adding(nn.Module):
    """One block in place of all, that adds what it was given."""

    def __init__(self, added: Tensor, pair: bool):
        super().__init__()
        self.added, self.pair, self.calls = added, pair, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        tokens = _tokens(args, kwargs)
        out = (tokens.to(self.added.dtype) + self.added).to(tokens.dtype)
        return (out, kwargs["encoder_hidden_states"]) if self.pair else out


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
