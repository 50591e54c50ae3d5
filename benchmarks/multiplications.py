"""What a run costs, whatever was left out of it: the operations of its linear layers and attention."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import sdpa_flop_count


class Multiplications:
    """Counts the operations of linear layers and attention within `with`, two a multiplication.

    It looks where modules call for them, and so not at every operation, as torch's `FlopCounterMode` does.
    """

    def __init__(self) -> None:
        self.total, self._patches = 0, ExitStack()

    def __enter__(self) -> Multiplications:
        linear, attention = functional.linear, functional.scaled_dot_product_attention

        def counted_linear(input: Tensor, weight: Tensor, *given: Any, **named: Any) -> Tensor:
            self.total += 2 * input.numel() * len(weight)
            return linear(input, weight, *given, **named)

        def counted_attention(query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Tensor:
            self.total += sdpa_flop_count(query.shape, key.shape, value.shape)
            return attention(query, key, value, *given, **named)

        self._patches.enter_context(mock.patch.object(functional, "linear", counted_linear))
        self._patches.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", counted_attention))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()
