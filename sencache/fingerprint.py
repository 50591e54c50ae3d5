"""What a profile knows a model by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn


def fingerprint(model: nn.Module | Mapping[str, Tensor], *options: object) -> str:
    """A short name for a model and the options that change its output, from its weights' names, shapes and values.

    model: the module, or its weights by name where these are kept elsewhere.

    Of a large parameter 64 values are read, spread over it: enough to tell two models, or two checkpoints, apart.
    """
    digest = hashlib.sha256(repr(options).encode())
    for name, value in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        flat = value.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].double().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
