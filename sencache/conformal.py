"""What further values keep, said from values that were met, whatever they are: split conformal prediction.

It holds as long as all of them are exchangeable (Vovk et al. 2005). Shapes: values (n,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile

from scipy.special import betainc
from torch import Tensor


def quantile(values: Tensor, share: float) -> float:
    """The conformal quantile, which a further exchangeable value keeps with probability `share`, or the largest."""
    k = min(len(values), math.ceil(share * (len(values) + 1)))
    return float(values.kthvalue(k).values) if k else 0.0


def tolerance_limit(values: Tensor, share: float) -> float:
    """What a `share` of further values keeps, in nine of ten rehearsals (Wilks 1941), or the largest value.

    The k-th smallest of n covers a share that is distributed as Beta(k, n + 1 - k), whatever the values are.
    """
    n = len(values)
    if not n:
        return 0.0
    k = next((k for k in range(1, n) if betainc(k, n + 1 - k, share) <= 0.1), n)
    return float(values.kthvalue(k).values)


def shortest(limits: Mapping[int, float], asked: float) -> int | None:
    """The fewest evaluations whose limit is at most what is asked, as is that of every greater number; None if none is.

    Plans are tested from the longest down, up to the first that fails, so that what is promised holds of the one that
    is chosen, in nine of ten rehearsals, however many there were to choose from ("fixed-sequence testing", Angelopoulos
    et al. 2021, arXiv 2110.01052).
    """
    return min(takewhile(lambda n: limits[n] <= asked, sorted(limits, reverse=True)), default=None)
