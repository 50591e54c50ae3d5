"""The methods that SenCache is compared with, as criteria and schedules; docs/baselines.md tells of each."""

from sencache.baselines.easycache import EasyCache
from sencache.baselines.lemica import lemica, minimax_path, segment_errors
from sencache.baselines.magcache import MagCache, magnitude_ratios
from sencache.baselines.teacache import TeaCache, teacache_coefficients
from sencache.baselines.uniform import every, uniform

__all__ = [
    "EasyCache",
    "MagCache",
    "TeaCache",
    "every",
    "lemica",
    "magnitude_ratios",
    "minimax_path",
    "segment_errors",
    "teacache_coefficients",
    "uniform",
]
