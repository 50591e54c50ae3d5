"""diffusers pipelines: `enable` caches one in one line, `disable` restores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sencache.cache import Tolerance
from sencache.checks import check_options
from sencache.memory import Key
from sencache.norms import Norm, rms
from sencache.plugins.diffusers.decide import Options
from sencache.plugins.diffusers.handle import Handle
from sencache.plugins.diffusers.hooks import holders
from sencache.profile import SensitivityProfile

__all__ = ["Handle", "disable", "enable"]


def enable(
    pipe: Any,
    profile: SensitivityProfile | None = None,
    *,
    nfe: int | None = None,
    rtol: float | None = None,
    tolerance: Tolerance | None = None,
    max_reuses: float | None = None,
    reuse: str = "linear",
    correct: bool | None = None,
    payload: str = "output",
    norm: Norm = rms,
    key: Key | None = None,
    together: bool | None = None,
    folder: str | Path | None = None,
) -> Handle:
    """Let a diffusers pipeline pay for a fraction of its transformer calls, from its next run on.

    pipe: a built pipeline with a `scheduler` and a `transformer` (or several in turn, or a UNet). Only this object is
        touched, and its parts while it runs; none of their classes. `disable` restores it.
    profile: what was measured. Without one, and without `tolerance`, the first run with a scheduler on a grid is a full
        one that measures itself; what it measured is kept in `folder` for all later runs and sessions.
    nfe: of how many times in a run the transformer is evaluated, once for each conditioning; by default half of them.
    rtol, tolerance, max_reuses, reuse, correct, norm, together: as in `CachedField`; the unit of time is the training
        timestep. `rtol` needs `handle.rehearse(...)` first. Under `tolerance` and without a profile the change of the
        state is that of the guided trajectory, and samples of a batch decide together, because a transformer computes
        all of them for the need of one.
    payload: what is reused, as in `CachedField`: the "output" of the transformer, or by "blocks", of Wan, CogVideoX and
        LTX-Video, what its blocks add to the tokens. Of these nothing is repaid: `correct=False`, or `reuse="hold"`.
    key: what tells conditionings apart, a function of a transformer call's (args, kwargs). By default everything that
        the call is given besides state and time is compared.
    folder: where profiles are kept, by default $SENCACHE_FOLDER or `sencache` in the platform's cache folder.

    Returns the handle, whose `report` tells of the last run. Enabling again replaces what was enabled before. Raises
    ValueError for options that contradict each other, and for what is no pipeline or has a scheduler that cannot be
    followed.
    """
    check_options(nfe, rtol, tolerance, max_reuses, None, reuse, correct, together)
    if payload not in ("output", "blocks"):
        raise ValueError(f"In a pipeline `payload` must be output or blocks; got {payload!r}.")
    corrects = reuse != "hold" if correct is None else correct
    if payload == "blocks" and (corrects or rtol is not None):
        raise ValueError(
            'In a pipeline outputs are repaid and rehearsed, not blocks: payload="blocks" goes with correct=False, and '
            "with `nfe` or `tolerance`."
        )
    options = Options(nfe, rtol, tolerance, max_reuses, reuse, corrects, payload, norm, key, together)
    if not hasattr(pipe, "components"):
        raise ValueError(f"Expected a diffusers pipeline; got {type(pipe).__name__}.")
    disable(pipe)
    return Handle(pipe, options, profile, folder)


def disable(pipe: Any) -> None:
    """Restore a pipeline to what it was before `enable`; one that is not enabled is left as it is."""
    for handle in list(holders(pipe)):
        if isinstance(handle, Handle):
            handle.disable()
