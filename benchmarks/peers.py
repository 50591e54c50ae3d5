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
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import installed
from benchmarks.fields import video
from benchmarks.installed import Install, Loop, Setting, as_it_was
from benchmarks.multiplications import Multiplications
from solvers import Stepper, integrate

SLACK = 0.5  # evaluations that a setting may cost above the wanted
FINALISTS = 12  # of the listed settings that keep a budget


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


class Tried(NamedTuple):
    """What a setting cost, in evaluations a sample, and how far it led: the logarithm of the mean squared error."""

    cost: float
    error: float
    setting: Setting


Try = Callable[[Setting, Task], Tried]


class Peer(NamedTuple):
    """A way of caching that others publish.

    settings: what there is to choose from. knob: a threshold, left to be chosen with each of them.
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
def settings_for(peer: Peer, task: Task, budgets: Sequence[float]) -> list[Setting | None]:
    """For each budget, of all settings that keep it the one that leads nearest to the full run on these samples.

    To be asked on samples of the choosing seeds; nearest by the geometric mean of their squared errors. A budget is
    kept at a cost of at most half an evaluation more; None where even the sparsest costs more.
    """
    full = integrate(video.field(*task[:3], task.guidance), task.x, task.ts, task.stepper)

    def tried(setting: Setting, task: Task) -> Tried:
        end, cost = sample(peer, setting, task)
        error = (end - full[: len(end)]).square().flatten(1).mean(1).log().mean().item()
        return Tried(cost, error, setting)

    return (_listed if peer.knob is None else _at_thresholds)(peer, task, budgets, tried)


def _listed(peer: Peer, task: Task, budgets: Sequence[float], tried: Try) -> list[Setting | None]:
    """All on the first sample, which tells their costs; the best there on all samples."""
    first = task.part(slice(1))
    seen = [tried(setting, first) for setting in tqdm(peer.settings, desc=peer.name, leave=False)]
    last = [sorted(_kept(seen, nfe), key=attrgetter("error"))[:FINALISTS] for nfe in budgets]
    return [_nearest([tried(one.setting, task) for one in ones]) for ones in last]


def _at_thresholds(peer: Peer, task: Task, budgets: Sequence[float], tried: Try) -> list[Setting | None]:
    """Every setting at every threshold that was looked at on the way to those that spend the budgets."""
    measured = mag_ratios(peer, task) if peer.calibrated else {}
    seen: list[Tried] = []
    for setting in tqdm(peer.settings, desc=peer.name, leave=False):
        known: dict[float, float] = {}  # cost by the threshold's logarithm

        def cost(log_knob: float, setting: Setting = setting, known: dict[float, float] = known) -> float:
            if log_knob not in known:
                seen.append(tried({**setting, **measured, str(peer.knob): math.exp(log_knob)}, task))
                known[log_knob] = seen[-1].cost
            return known[log_knob]

        for nfe in budgets:
            _spend(nfe, cost, known)
    return [_nearest(_kept(seen, nfe)) for nfe in budgets]


def _kept(seen: list[Tried], nfe: float) -> list[Tried]:
    return [one for one in seen if one.cost <= nfe + SLACK]


def _nearest(seen: list[Tried]) -> Setting | None:
    return min(seen, key=attrgetter("error")).setting if seen else None


def _spend(nfe: float, cost: Callable[[float], float], known: dict[float, float], rounds: int = 10) -> None:
    """Look for the threshold that costs `nfe`, by bisection of its logarithm from what is known."""
    if cost(math.log(1e2)) > nfe + SLACK:
        return
    low = max((knob for knob, spent in known.items() if spent > nfe), default=math.log(1e-3))
    high = min((knob for knob, spent in known.items() if spent <= nfe and knob > low), default=math.log(1e2))
    for _ in range(rounds):
        if min(abs(spent - nfe) for spent in known.values()) <= SLACK / 2:
            return
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > nfe else (low, middle)


def mag_ratios(peer: Peer, task: Task) -> Setting:
    """The ratios that MagCache prints after a calibration run, here of all samples at once: the first, of "cond"."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        sample(peer._replace(adaptive=False), {"calibrate": True}, task)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return {"mag_ratios": ast.literal_eval(lists[0])}


ALL = video.FAMILIES
MAG = tuple({"max_skip_steps": skips, "retention_ratio": share} for skips in (3, 5, 10) for share in (0.2, 0.1))
SEA = tuple({"max_consecutive_cached": most} for most in (2, 3, 4, 5, 6, 8, 0))  # 0 is no limit
TAYLOR = tuple(
    {"cache_interval": interval, "disable_cache_before_step": before, "disable_cache_after_step": after, "max_order": k}
    for interval, before, after, k in product(range(2, 9), (1, 2, 3, 5), (None, 49, 47, 45, 42, 39), (1, 2))
)
LITE = tuple({**setting, "use_lite_mode": True} for setting in TAYLOR)
PYRAMID = tuple(
    {f"{part}_attention_{name}_skip_range": value for part, n in (("spatial", reach), ("cross", 3 * reach))
     for name, value in (("block", n), ("timestep", times))}
    for reach, times in product(range(2, 11), ((100, 800), (-1, 1001)))
)  # fmt: skip
FASTER = tuple(
    {"unconditional_batch_skip_range": n, "unconditional_batch_timestep_skip_range": (-1, below)}
    for n, below in product((2, 3, 5, 8, 12), (641, 781, 901))
)
DUAL = tuple(
    {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": steps, "max_continuous_cached_steps": most}
    for steps, most in product((8, 4, 2, 1), (-1, 5, 3, 2))  # -1 is no limit
)
DUAL_TAYLOR = tuple({**setting, "taylorseer_order": 2} for setting in DUAL)  # at 1 it is farther off in every line
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
    Peer("DBCache + TaylorSeer", ALL, installed.dual_block, DUAL_TAYLOR, KNOB, adaptive=True, probes=True),
)
