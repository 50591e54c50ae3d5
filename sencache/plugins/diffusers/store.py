"""Profiles kept between sessions: a file for every model, scheduler and grid that was measured.

A model is told by its fingerprint, so that a LoRA, another checkpoint or another precision is another model.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sencache.fingerprint import fingerprint
from sencache.profile import SensitivityProfile


def default_folder() -> Path:
    """Where profiles are kept: $SENCACHE_FOLDER, or the platform's folder for what can be made again."""
    if named := os.environ.get("SENCACHE_FOLDER"):
        return Path(named)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "sencache"


def models_fingerprint(models: Mapping[str, nn.Module]) -> str:
    """One name for the models of a pipeline, with the adapters that are active in them."""
    parts = [name + fingerprint(_weights(model), _adapters(model)) for name, model in sorted(models.items())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _adapters(model: nn.Module) -> list[tuple[str, str]]:
    """The adapters (PEFT's) that are active in a model, and how strongly."""
    layers = ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "active_adapters"))
    return [
        (name, f"{layer.active_adapters} {getattr(layer, 'scaling', {})} {getattr(layer, 'disable_adapters', False)}")
        for name, layer in layers
        if not callable(layer.active_adapters)
    ]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model wherever they are: compiled, or offloaded one layer at a time."""
    model = getattr(model, "_orig_mod", model)
    found = dict(model.state_dict())
    for name, value in found.items():
        if value.is_meta:
            place, _, own = name.rpartition(".")
            held = getattr(getattr(model.get_submodule(place), "_hf_hook", None), "weights_map", None)
            found[name] = value.new_empty(0, device="cpu") if held is None else held[own]
    return found


def sampler_name(scheduler: Any, given: Mapping[str, Any], times: Tensor) -> str:
    """Tells samplers apart: the scheduler's class and settings, the options of its steps, and the grid."""
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    options = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    settings = repr(sorted({**config, **options}.items(), key=lambda item: item[0]))
    digest = hashlib.sha256(settings.encode() + times.numpy().tobytes()).hexdigest()[:16]
    return f"{type(scheduler).__name__}, {len(times)} calls from {times[0]:g} to {times[-1]:g} ({digest})"


class Store:
    """Profiles by model and sampler, in memory and in a folder."""

    def __init__(self, folder: str | Path | None):
        self.folder = default_folder() if folder is None else Path(folder)
        self.known: dict[str, SensitivityProfile] = {}

    def find(self, model: str, sampler: str) -> SensitivityProfile | None:
        """What was measured, or None; a file that cannot be read counts as none, with a warning."""
        name = _file(model, sampler)
        if name not in self.known and (self.folder / name).exists():
            try:
                self.known[name] = SensitivityProfile.load(self.folder / name)
            except ValueError as error:
                warnings.warn(f"{error} This run measures anew.", stacklevel=2)
        return self.known.get(name)

    def keep(self, model: str, sampler: str, profile: SensitivityProfile) -> None:
        """Write a profile; where that cannot be done it is kept for this session, with a warning."""
        name = _file(model, sampler)
        self.known[name] = profile
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.save(self.folder / name)
        except OSError as error:
            warnings.warn(
                f"The profile could not be kept in {self.folder} ({error}), so another session measures again. Name a "
                "folder: `enable(pipe, folder=...)` or $SENCACHE_FOLDER.",
                stacklevel=2,
            )


def _file(model: str, sampler: str) -> str:
    return f"{model}-{hashlib.sha256(sampler.encode()).hexdigest()[:16]}.safetensors"
