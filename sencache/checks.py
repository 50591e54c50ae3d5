"""What a `CachedField` refuses, and what to do instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from sencache.criteria import Scheduled
from sencache.profile import SensitivityProfile
from sencache.reuse import REUSES
from sencache.run import Criterion, check_direction
from solvers import Path, Stepper
from solvers.loop import check_stepper

UNITS = ("output", "sample")


def check_options(
    nfe: int | None,
    rtol: float | None,
    tolerance: float | Callable[[float], float] | None,
    max_reuses: float | None,
    unit: str | None,
    reuse: str,
    correct: bool | None,
    together: bool | None,
    criterion: Criterion | None = None,
) -> None:
    """Raise where how much to pay is not said in one way, or in a way that means nothing."""
    if criterion is not None and (nfe is not None or rtol is not None or unit is not None):
        raise ValueError(
            "A `criterion` goes with `tolerance`, in its own unit; `nfe`, `rtol` and `unit` need a profile."
        )
    if criterion is not None and tolerance is None and not isinstance(criterion, Scheduled):
        raise ValueError(
            f"{type(criterion).__name__} says how far outputs move; give the `tolerance` up to which they are reused."
        )
    for name, value in (("nfe", nfe), ("rtol", rtol), ("tolerance", tolerance), ("max_reuses", max_reuses)):
        if not (value is None or isinstance(value, Real | Tensor) or (name == "tolerance" and callable(value))):
            raise TypeError(f"`{name}` is a number; got {value!r}.")
    said = {
        name: value for name, value in (("nfe", nfe), ("rtol", rtol), ("tolerance", tolerance)) if value is not None
    }
    if len(said) > 1:
        raise ValueError(f"Say how much to pay in one way, `nfe`, `rtol` or `tolerance`; got {', '.join(said)}.")
    if nfe is not None and not _counts(nfe):
        raise ValueError(f"`nfe` counts evaluations, 1, 2, ...; got {nfe}.")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"`rtol` is a relative error and must be positive; got {rtol}.")
    if rtol is not None and (reuse != "linear" or correct is False):
        raise ValueError("`rtol` is rehearsed with linear reuse and correction; with other choices give `nfe`.")
    if tolerance is not None and not callable(tolerance) and not tolerance >= 0:
        raise ValueError(f"`tolerance` is the size of a change and cannot be negative; got {tolerance}.")
    if max_reuses is not None and tolerance is None and criterion is None:
        raise ValueError(f"`max_reuses` goes with `tolerance`; a plan knows its own. Got max_reuses={max_reuses}.")
    if max_reuses is not None and not (max_reuses >= 0 and (max_reuses == math.inf or max_reuses == int(max_reuses))):
        raise ValueError(f"`max_reuses` counts reuses, 0, 1, 2, ... or math.inf; got {max_reuses}.")
    if unit is not None and tolerance is None:
        raise ValueError(f"`unit` says what `tolerance` is measured in and goes with it; got unit={unit!r} alone.")
    if unit is not None and unit not in UNITS:
        raise ValueError(f"`unit` must be {' or '.join(UNITS)}; got {unit!r}.")
    if correct not in (None, True, False):
        raise ValueError(f"`correct` must be True, False or None, for what goes with `reuse`; got {correct!r}.")
    if together not in (None, True, False):
        raise ValueError(f"`together` must be True, False or None, for what goes with the field; got {together!r}.")
    if reuse not in REUSES:
        raise ValueError(f"`reuse` must be one of {', '.join(REUSES)}; got {reuse!r}.")


def check_payload(field: Any, payload: str, rtol: float | None) -> None:
    if payload not in ("output", "blocks", "difference"):
        raise ValueError(f"`payload` must be output, blocks or difference; got {payload!r}.")
    missing = [name for name in ("stack", "head") if not hasattr(field, name)]
    if payload == "blocks" and missing:
        raise ValueError(
            f'payload="blocks" needs a field with `stack(x, t)`, what its blocks add to the tokens, and `head(x, t, '
            f"stack)`, its output made of that; {type(field).__name__} has no {' and no '.join(missing)}. The adapters "
            'of `sencache.adapters` have both; for any other field take payload="output".'
        )
    if payload != "output" and rtol is not None:
        raise ValueError(f'`rtol` is rehearsed with payload="output"; with "{payload}" give `nfe`.')


def check_budgets(budgets: Iterable[int]) -> tuple[int, ...]:
    """Numbers of evaluations, rising and each once; raises ValueError where one is none."""
    given = list(budgets) if isinstance(budgets, Iterable) else [0]  # which counts nothing
    if not all(not isinstance(n, str) and _counts(n) for n in given):
        raise ValueError(f"`budgets` count evaluations, 1, 2, ..., each of a plan, as in (10, 20); got {budgets!r}.")
    return tuple(sorted({int(n) for n in given}))


def _counts(n: float) -> bool:
    """Whether this is 1, 2, ..."""
    return not isinstance(n, bool) and n >= 1 and n % 1 == 0


def check_profile(profile: object) -> None:
    if not isinstance(profile, SensitivityProfile):
        raise TypeError(
            "Expected a profile after the field, as `calibrate` returns and `SensitivityProfile.load(file)` reads it; "
            f"got {type(profile).__name__}."
        )


def check_model(profile: SensitivityProfile, ours: str | None) -> None:
    """Raise where a profile is of a model with another fingerprint than `ours`."""
    measured = profile.facts.get("fingerprint")
    if measured and ours and measured != ours:
        raise ValueError(
            f"The profile was measured on another model or with other settings: fingerprint {measured}, and this "
            f"field's is {ours}. Calibrate this field: `calibrate(field, x_T, ts)`."
        )


def check_path(profile: SensitivityProfile, ours: object) -> None:
    """Raise where a profile was assumed on another path than `ours`; a field that does not know its own passes."""
    if "assumed" in profile.facts and isinstance(ours, Path) and str(ours) != profile.facts["path"]:
        raise ValueError(
            f"The profile was assumed on {profile.facts['path']}, and this field is on {ours}: assume it on that, "
            "`assumed(field.path, ts)`."
        )


def check_fixed(stepper: Stepper) -> None:
    """Raise where this is no stepper, or one that chooses its steps by the outputs."""
    check_stepper(stepper)
    if stepper.adaptive:
        raise ValueError(
            f"{stepper} chooses its steps by comparing outputs, and reused outputs fool it into wrong results. "
            "Integrate the bare field with it, or take a fixed-step method here: Euler, Heun, DPMSolverPP, UniPC."
        )


def check_fit(profile: SensitivityProfile, ts: Tensor) -> None:
    """Raise where a grid (K + 1,) is not in the profile's unit of time or runs against its direction."""
    inside = int(profile.covers(ts[:-1].double().cpu()).sum())
    span, measured = float((ts[-1] - ts[0]).abs()), float(profile.t.max() - profile.t.min())
    outside = 2 * inside < len(ts) - 1
    if outside or span < 0.02 * measured:
        steps = f"only {inside} of the grid's {len(ts) - 1} steps begin there"
        raise ValueError(
            f"The profile was measured for t in [{profile.t.min():g}, {profile.t.max():g}], and "
            f"{steps if outside else 'the grid covers less than 2 % of that'} (it runs from {ts[0]:g} to {ts[-1]:g}). "
            "If that is another unit of time, calibrate in it; if it is another part of the trajectory, calibrate on a "
            "grid that covers it."
        )
    check_direction(profile.direction, (ts[1] - ts[0]).sign().cpu())
