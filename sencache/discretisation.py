"""How far a full run is itself from the solution of the ODE, as far as its outputs' Gram matrix knows it.

A plan is measured by the full run of a sampler. Who wants the solution of dx/dt = v(x, t) instead should know how far
off that run is: 50 Euler steps can be a hundred times farther from the solution than a good plan is from the 50 steps.

Shapes: T query times; S calibration samples.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor

from sencache.profile import SensitivityProfile
from sencache.schedule import quadratic
from solvers import Stepper


def discretisation(profile: SensitivityProfile, ts: Tensor, stepper: Stepper, times: Tensor, gain: Tensor) -> float:
    """The relative RMS error of the full run on ts (K + 1,) against the ODE's solution; NaN where it is not known.

    The run adds up its outputs weighted by `gain` (T,); the trapezoidal rule weighs the same outputs one order better,
    the last one continued by the line through the last two. The Gram matrix has the size of the difference, a sum of
    local errors in which what becomes of them on the way is left out. Known of steppers of the first order that add
    nothing but outputs to the state, without noise: Euler's, and DDIM's on the linear path.
    """
    if profile.size is None or len(times) < 3 or stepper.order != 1 or hasattr(stepper, "noise"):
        return math.nan
    if not all(math.isclose(stepper.weights(*step).state, 1) for step in pairwise(ts.double().cpu())):
        return math.nan  # it shrinks or stretches the state, of which the Gram matrix knows nothing
    order = times.argsort()
    line = make_interp_spline(times[order].numpy(), np.eye(len(times)), k=1)
    weights = line.integrate(float(ts[0]), float(ts[-1]))[order.argsort().numpy()]
    error = quadratic((gain.numpy() - weights)[None], profile.gram_at(times).numpy())
    return float(torch.from_numpy(error).sqrt().median() / profile.size.median())
