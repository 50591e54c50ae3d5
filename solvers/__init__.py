"""Integrators of dx/dt = v(x, t) that report what each step did."""

from solvers import grids
from solvers.dpm import DPMSolverPP
from solvers.field import VelocityField
from solvers.loop import integrate, trajectory
from solvers.ode import Euler, Heun, TorchDiffEq
from solvers.paths import VP, Cosine, Linear, Path
from solvers.sde import BrownianPath, EulerMaruyama, WhiteNoise
from solvers.stepper import Step, Stepper, Weights
from solvers.tabulated import Tabulated
from solvers.unipc import UniPC

__all__ = [
    "VP",
    "BrownianPath",
    "Cosine",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Linear",
    "Path",
    "Step",
    "Stepper",
    "Tabulated",
    "TorchDiffEq",
    "UniPC",
    "VelocityField",
    "Weights",
    "WhiteNoise",
    "grids",
    "integrate",
    "trajectory",
]
