"""Caching that others publish, on our small video models, in our loop: what it costs and where it leads.

docs/peers.md says how each is set up and why. A cost is a number of evaluations: the multiplications inside the
transformer's blocks over those of one full evaluation. So first blocks that are always run are paid for, and what is
skipped is not, be it steps, branches or layers; embeddings and head are left out, as in our own block reuse.
Shapes: x (B, ...) packed as the family's model takes it.
"""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import installed
from benchmarks.fields import video
from benchmarks.installed import Install, Loop, Setting, as_it_was
from benchmarks.multiplications import Multiplications
from solvers import Stepper, integrate

SLACK = 0.5  # evaluations that a setting may cost above the wanted


class Task(NamedTuple):
    """What is sampled: x (B, ...) packed, of scenes (B,), over ts (K + 1,) by a stepper of one evaluation a step."""

    family: str
    model: nn.Module
    scene: Tensor
    x: Tensor
    ts: Tensor
    stepper: Stepper
    guidance: float

    def part(self, rows: slice) -> Task:
        """Some of its samples."""
        return self._replace(scene=self.scene[rows], x=self.x[rows])


class Peer(NamedTuple):
    """A way of caching that others publish.

    settings: what its documentation recommends. With a `knob`, the threshold that spends a budget, each is sparser at
        its sparsest than the one before it; without one they are all there is to choose from. The first, at a knob of
        almost nothing, reuses nothing.
    adaptive: it decides by what it sees, once for a whole batch; so samples are run one by one.
    fused: it needs both halves of the guidance in one batch, which Wan's pipeline does not make.
    calibrated: it needs `mag_ratios` of the model.
    probes: it runs the first block at every step to decide.
    """

    name: str
    families: tuple[str, ...]
    install: Install
    settings: tuple[Setting, ...]
    knob: str | None = None
    adaptive: bool = False
    fused: bool = False
    calibrated: bool = False
    probes: bool = False

    def computed(self, cost: float, steps: int, blocks: int) -> float:
        """How many of the steps were computed in full, the probing of the others left out: (L cost - K) / (L - 1)."""
        return (blocks * cost - steps) / (blocks - 1) if self.probes else cost

    def cost(self, computed: float, steps: int, blocks: int) -> float:
        """The inverse of `computed`."""
        return computed + (steps - computed) / blocks if self.probes else computed


@torch.no_grad()
def sample(peer: Peer, setting: Setting, task: Task, counted: bool = True) -> tuple[Tensor, float]:
    """The samples (B, ...) at the end of a task, and the evaluations that one of them cost on average.

    Not `counted`, which takes time, the cost is NaN.
    """
    family, model, scene, x, ts, stepper, guidance = task
    if family not in peer.families:
        raise ValueError(f"{peer.name} runs on {', '.join(peer.families)}, not on {family}; docs/peers.md says why.")
    if peer.adaptive and len(x) > 1:
        runs = [sample(peer, setting, task.part(slice(row, row + 1)), counted) for row in range(len(x))]
        return torch.cat([end for end, _ in runs]), sum(spent for _, spent in runs) / len(runs)
    field: Any = video.field(family, model, scene, guidance)
    field.batched = peer.fused or family != "wan"
    counter = Counter(field, x, ts[0]) if counted else None
    loop = Loop(field, family, len(ts) - 1, swapped=peer.fused and guidance != 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        loop.begin(x, t)
        return counter(x, t) if counter else field(x, t)

    with as_it_was(model), peer.install(model, loop, setting):
        field.model = loop
        return integrate(velocity, x, ts, stepper), counter.spent if counter else math.nan


class Counter:
    """A field whose calls are counted in full evaluations, of which embeddings and head are free."""

    def __init__(self, field: Any, x: Tensor, t: Tensor):
        with Multiplications() as whole:
            field(x, t)
        stack = field.stack(x, t)
        with Multiplications() as outside:
            field.head(x, t, stack)
        self.field, self.spent = field, 0.0
        self.free, self.full = outside.total, whole.total - outside.total

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with Multiplications() as now:
            v = self.field(x, t)
        self.spent += max(0, now.total - self.free) / self.full
        return v


@torch.no_grad()
def setting_for(peer: Peer, task: Task, nfe: float, costs: list[float] | None = None) -> Setting | None:
    """The setting at which these samples, of the choosing seeds, cost nearest to `nfe` and at most half above it.

    Among listed settings of the same cost it is the one of the smallest error. None where even the sparsest costs more.
    costs: `listed_costs`, where several budgets are asked for.
    """
    if peer.knob is not None:
        measured = mag_ratios(peer, task) if peer.calibrated else {}
        for setting in peer.settings:

            def cost(knob: float, setting: Setting = setting) -> float:
                return sample(peer, {**setting, **measured, str(peer.knob): knob}, task)[1]

            knob = _bisected(cost, nfe)
            if knob is not None:
                return {**setting, **measured, peer.knob: knob}
        return None
    costs = listed_costs(peer, task) if costs is None else costs
    best = max((spent for spent in costs if spent <= nfe + SLACK), key=lambda spent: -abs(spent - nfe), default=None)
    if best is None:
        return None
    near = [setting for setting, spent in zip(peer.settings, costs, strict=True) if abs(spent - best) < SLACK / 2]
    full = integrate(video.field(*task[:3], task.guidance), task.x, task.ts, task.stepper)
    errors = [(sample(peer, setting, task)[0] - full).square().mean().item() for setting in near]
    return near[errors.index(min(errors))]


def listed_costs(peer: Peer, task: Task) -> list[float]:
    """What each of the peer's settings costs, seen on the first sample: without a knob it depends on no sample."""
    return [sample(peer, setting, task.part(slice(1)))[1] for setting in peer.settings]


def _bisected(cost: Callable[[float], float], nfe: float, rounds: int = 10) -> float | None:
    """The threshold whose cost is nearest to `nfe`, at most the slack above it; None where there is none."""
    low, high = math.log(1e-3), math.log(1e2)
    found = {math.exp(high): cost(math.exp(high))}
    if min(found.values()) > nfe + SLACK:
        return None
    for _ in range(rounds):
        middle = (low + high) / 2
        found[math.exp(middle)] = spent = cost(math.exp(middle))
        if abs(spent - nfe) <= SLACK / 2:
            break
        low, high = (middle, high) if spent > nfe else (low, middle)
    return min((knob for knob in found if found[knob] <= nfe + SLACK), key=lambda knob: abs(found[knob] - nfe))


def mag_ratios(peer: Peer, task: Task) -> Setting:
    """The ratios that MagCache prints after a calibration run, here of all samples at once: the first, of "cond"."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        sample(peer._replace(adaptive=False), {"calibrate": True}, task)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return {"mag_ratios": ast.literal_eval(lists[0])}


ALL = video.FAMILIES
MAG = tuple(
    {"max_skip_steps": skips, "retention_ratio": share} for skips, share in ((3, 0.2), (5, 0.2), (5, 0.1), (10, 0.1))
)
SEA = tuple({"max_consecutive_cached": most} for most in (2, 4, 0))  # 0 is no limit
TAYLOR = tuple(
    {"cache_interval": interval, "disable_cache_before_step": before, "max_order": 1}
    for interval in range(1, 13)
    for before in (3, 10)
)
LITE = tuple({**setting, "use_lite_mode": True} for setting in TAYLOR)
PYRAMID = tuple(
    {"spatial_attention_block_skip_range": n, "cross_attention_block_skip_range": 3 * n if n > 1 else 1}
    for n in range(1, 11)
)
FASTER = tuple(
    {"unconditional_batch_skip_range": n, "unconditional_batch_timestep_skip_range": (-1, below)}
    for n in (1, 2, 3, 5, 8, 12)
    for below in (641, 781, 901)
)
DUAL = tuple({"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": steps} for steps in (8, 4, 2, 1))
DUAL_TAYLOR = tuple({**setting, "taylorseer_order": 1} for setting in DUAL)
KNOB = "residual_diff_threshold"
PEERS = (
    Peer("FirstBlockCache", ALL, installed.first_block, ({},), "threshold", adaptive=True, probes=True),
    Peer("MagCache", ALL, installed.mag, MAG, "threshold", adaptive=True, calibrated=True),
    Peer("SeaCache", ALL, installed.sea, SEA, "threshold", adaptive=True),
    Peer("TaylorSeer", ALL, installed.taylor, TAYLOR),
    Peer("TaylorSeer lite", ALL, installed.taylor, LITE),
    Peer("PAB", ALL, installed.pyramid, PYRAMID, fused=True),
    Peer("FasterCache", ("wan", "cogvideox"), installed.faster, FASTER, fused=True),
    Peer("DBCache", ALL, installed.dual_block, DUAL, KNOB, adaptive=True, probes=True),
    Peer(
        "DBCache + TaylorSeer",
        ALL,
        installed.dual_block,
        DUAL_TAYLOR,
        "residual_diff_threshold",
        adaptive=True,
        probes=True,
    ),
)
