"""Algorithm 1 of SenCache (arXiv 2602.24208), written out for one sample in NumPy float64, from the paper alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def algorithm_1(
    f: Callable[[NDArray, float], NDArray],
    x: NDArray,
    ts: Sequence[float],
    alpha: Callable[[float], tuple[float, float]],
    epsilon: Callable[[float], float],
    n: int,
    printed: bool = False,
) -> tuple[NDArray, list[bool], list[float]]:
    """x_0, and for each of the K steps whether the output was reused and the predicted change, S of Eq. 9.

    f: the network, f(x, t) for one sample. x: x_T. ts: the K + 1 times, in the order in which they are visited.
    alpha: the sensitivities (alpha_x, alpha_t) at a time. epsilon: the tolerance at a time.
    n: how many reuses may follow an evaluation; the algorithm as `printed` allows n - 1.
    The first step has no reference and predicts inf.
    """
    x = np.array(x, dtype=np.float64)
    allowed = n - 1 if printed else n
    reused, predicted = [], []
    y_r = None  # of the reference (x^r, t^r, y^r) the algorithm needs x^r in d alone
    d, tau, m, alpha_x, alpha_t = np.zeros_like(x), 0.0, 0, 0.0, 0.0
    for k in range(len(ts) - 1):
        t, dt = float(ts[k]), float(ts[k + 1]) - float(ts[k])
        if y_r is None:
            change, hit = math.inf, False
        else:
            change = alpha_x * math.sqrt(np.mean(d**2)) + alpha_t * abs(tau)  # Eq. 9
            hit = change <= epsilon(t) and m < allowed  # Eq. 10
        if hit:
            y = y_r
            m = m + 1
        else:
            y = np.array(f(x, t), dtype=np.float64)
            t_r, y_r = t, y
            alpha_x, alpha_t = alpha(t_r)
            d, tau, m = np.zeros_like(x), 0.0, 0
        x_next = x + dt * y  # the solver's step, Euler
        d = d + (x_next - x)
        tau = tau + dt
        x = x_next
        reused.append(hit)
        predicted.append(change)
    return x, reused, predicted
