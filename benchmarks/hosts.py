"""The shipped SiT through the samplers of other people: `python -m benchmarks.hosts` prints the table of docs/hosts.md.

Every sampler's own full run is the reference of its cached runs. The states are the same in all of them: 64 images of
noise from the seeds for choosing, on 50 uniform steps from t = 0.999, where sigma = t / (1 - t) is finite.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec
from typing import Any

from solvers import grids

GRID = grids.uniform(50, start=0.999)
SIGMAS = GRID / (1 - GRID)


def k_diffusion_sampling() -> Any:
    """k-diffusion's `sampling` module, without the rest of the package.

    The package's __init__ imports models, CLIP and torchvision, which samplers need nothing of; `sampling` itself needs
    `utils.append_dims`, and `utils` imports torchvision for two functions on images.
    """
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    stand_in, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    transforms.functional = types.ModuleType("functional")  # type: ignore[attr-defined]
    stand_in.transforms = transforms  # type: ignore[attr-defined]
    added = {"k_diffusion": package}
    if find_spec("torchvision") is None:
        added |= {"torchvision": stand_in, "torchvision.transforms": transforms}
    sys.modules.update(added)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in set(added) - {"k_diffusion"}:
            del sys.modules[name]
