"""A pipeline from a folder or a name; the only place where the package itself imports diffusers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def load(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline of a folder that `save_pretrained` wrote, or of a name on the Hugging Face hub.

    Raises ImportError where diffusers is not installed, ValueError where no pipeline comes of it.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("Pipelines need diffusers: `pip install 'sencache[diffusers]'`.") from error
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"Expected a folder that `pipe.save_pretrained` wrote; {name} holds no model_index.json.")
    word = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"  # the older word works until 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return diffusers.DiffusionPipeline.from_pretrained(name, **{word: dtype}).to(device)
    except Exception as error:  # the hub, the files and the parts each have their own
        raise ValueError(
            f"No pipeline could be loaded from {name!r}: give a folder that `save_pretrained` wrote, or a name on the "
            f"hub and a way to reach it. {type(error).__name__}: {error}"
        ) from error
