"""What a run costs, whatever was left out of it: the operations of its matrix products, convolutions and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's registry does not have it


class Multiplications(TorchDispatchMode):
    """Counts floating-point operations as torch's `FlopCounterMode` does, and those of attention on a CPU too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is ATTENTION_ON_CPU:
            self.total += sdpa_flop_count(*(part.shape for part in args[:3]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out
