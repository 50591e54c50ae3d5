"""What is known of a run once its first step was seen."""

from __future__ import annotations

from typing import NamedTuple

from sencache.plan import Plan
from sencache.plugins.diffusers.sampler import Sampler
from sencache.profile import SensitivityProfile


class Known(NamedTuple):
    """What is known of a run once its first step was seen; nothing but its name where everything is evaluated."""

    name: str  # of the scheduler on its grid
    model: str = ""  # the models' fingerprint
    sampler: Sampler | None = None  # the scheduler as numbers
    profile: SensitivityProfile | None = None
    plan: Plan | None = None
    measures: bool = False  # whether this run is the one that measures
