"""Sample diffusion and flow-matching models with a fraction of their evaluations."""

from sencache.cache import CachedField
from sencache.calibrate import calibrate
from sencache.jacobian import JacobianNorms, jacobian_norms
from sencache.norms import rms
from sencache.profile import SensitivityProfile, fingerprint
from sencache.rehearse import rehearse
from sencache.report import Query, Report
from sencache.run import Run
from sencache.tolerance import planned_tolerance, strict_start

__all__ = [
    "CachedField",
    "JacobianNorms",
    "Query",
    "Report",
    "Run",
    "SensitivityProfile",
    "calibrate",
    "fingerprint",
    "jacobian_norms",
    "planned_tolerance",
    "rehearse",
    "rms",
    "strict_start",
]
