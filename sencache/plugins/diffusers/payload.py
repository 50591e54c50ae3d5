"""What is reused of a transformer's call: its output, or by blocks what its blocks add to the tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sencache.adapters import blocks

STACKS = {  # by the model's class: its list of blocks, and whether a block returns the text's tokens too
    "WanTransformer3DModel": ("blocks", False),
    "CogVideoXTransformer3DModel": ("transformer_blocks", True),
    "LTXVideoTransformer3DModel": ("transformer_blocks", False),
}


def check_blocks(models: dict[str, Any]) -> None:
    """Raise ValueError where the blocks of a model are not known."""
    for model in models.values():
        if type(model).__name__ not in STACKS:
            raise ValueError(
                f'payload="blocks" is for {", ".join(STACKS)}; this pipeline has a {type(model).__name__}. Reuse its '
                'outputs, payload="output".'
            )


class Transformers:
    """A pipeline's transformers as a field, of x, t, the conditioning and the call itself, which holds all of these."""

    def __call__(self, x: Tensor, t: Any, conditioning: Any, forward: Callable[[], Any]) -> Any:
        return forward()

    def stack(self, x: Tensor, t: Any, conditioning: Any, forward: partial[Any]) -> Tensor:
        """What the blocks add to the tokens (B, N, D)."""
        model, on = _taken_apart(forward)
        return blocks.added(model, STACKS[type(model).__name__][0], on)

    def head(self, x: Tensor, t: Any, stack: Tensor, conditioning: Any, forward: partial[Any]) -> Any:
        """The answer to the call, where the blocks add `stack`."""
        model, on = _taken_apart(forward)
        name, pair = STACKS[type(model).__name__]
        return blocks.given(model, name, on, stack, pair)


def _taken_apart(forward: partial[Any]) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """The model of a call, and the call of any."""
    model, *args = forward.args
    return model, lambda other: forward.func(other, *args, **forward.keywords)
