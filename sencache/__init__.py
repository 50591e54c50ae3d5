"""Sample diffusion and flow-matching models with a fraction of their evaluations."""

from typing import TYPE_CHECKING, Any

from sencache.assume import assumed
from sencache.cache import CachedField
from sencache.calibrate import calibrate
from sencache.fingerprint import fingerprint
from sencache.jacobian import JacobianNorms, jacobian_norms
from sencache.norms import rms
from sencache.profile import SensitivityProfile
from sencache.rehearse import rehearse
from sencache.report import Query, Report
from sencache.run import Run
from sencache.tolerance import planned_tolerance, strict_start

if TYPE_CHECKING:
    from sencache.plugins.diffusers import disable, enable

__all__ = [
    "CachedField",
    "JacobianNorms",
    "Query",
    "Report",
    "Run",
    "SensitivityProfile",
    "assumed",
    "calibrate",
    "disable",
    "enable",
    "fingerprint",
    "jacobian_norms",
    "planned_tolerance",
    "rehearse",
    "rms",
    "strict_start",
]


def __getattr__(name: str) -> Any:
    if name in ("enable", "disable"):  # the plugin is imported when it is asked for
        from sencache.plugins import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
