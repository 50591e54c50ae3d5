"""What every plugin does: a sampler calls in its own way, a run of a `CachedField` answers.

A plugin says for its host how a call becomes (x, t) of a field, on which grid, and by which step the sampler uses what
it is answered: with that, plans are made for it, and corrections are folded in where a step uses one output. The model
itself is always called with the very tensors that the sampler gave.

Shapes: x (B, ...) or a tree of them; ts (K + 1,); clocks (B,) float64 on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sencache.batch import batch_of, clock_of
from sencache.cache import CachedField
from sencache.influence import influence
from sencache.linear import uses_one_output
from sencache.norms import difference, rms
from sencache.profile import SensitivityProfile
from sencache.report import Report
from sencache.run import Run
from sencache.trees import tensors
from solvers import Euler, Stepper
from solvers.loop import check_grid

Method = str | Stepper | None

PLANS: WeakKeyDictionary[SensitivityProfile, dict] = WeakKeyDictionary()  # a scope is short; plans take seconds

ADAPTIVE = "chooses its steps by comparing outputs, and reused ones fool it into more evaluations and wrong results"
NEXT = "Hand the sampler what the `with` statement names, in place of the model."
IMPLICIT = "solves for each step with the outputs, and reused ones fool it into wrong results"


class Calls:
    """The calls of one trajectory, checked against the method that was named, and answered."""

    def __init__(self, model: Any, ts: Tensor, stepper: Stepper, exact: bool, strict: bool, adjoint: bool):
        self.fingerprint, self.report = getattr(model, "fingerprint", None), Report()
        self.ts, self.stepper, self.exact = ts.double().cpu(), stepper, exact
        times = torch.cat([influence(stepper, ts)[0], self.ts[-1:]]) if strict else self.ts
        self.times, self.strict = times.unique(), strict
        self.recording = adjoint and torch.is_grad_enabled()
        self.learns = self.recording and any(part.requires_grad for part in _parameters(model))
        if hasattr(model, "regime"):  # which network answers, asked in the grid's time
            self.regime = model.regime
        self.evaluate: Callable[[], Any]
        self.run: Run | None = None
        self.expected: tuple[float, Tensor, Tensor] | None = None  # t of the next step, x there, the size of the step
        self.last: tuple[float, int] | None = None  # t and conditioning of the last query

    def __call__(self, x: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The field that the run caches: it evaluates what the host asks for."""
        return self.evaluate()

    def ask(self, x: Any, t: Tensor | float, evaluate: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """The answer to a query at (x, t), from `evaluate()` or from memory; further arguments are conditioning."""
        if self.run is None:
            raise RuntimeError("The `with` scope of this wrapper has ended; open a new one for every trajectory.")
        clock, self.evaluate = self._on_grid(t, batch_of(x)), evaluate
        self._check_gradients(x)
        if self.learns:
            return self.run.bypass(evaluate(), x, clock)
        self._check_step(x, clock)
        y = self.run(x, clock, *args, **kwargs)
        self._check_count(clock)
        self._expect(x, clock, y)
        return y

    def _check_gradients(self, x: Any) -> None:
        """An adjoint method goes there without gradients and back with them: see it on the way there, or stop it."""
        wanted = any(part.requires_grad for part in tensors(x))
        if not torch.is_grad_enabled():
            self.learns = self.learns or (self.recording and wanted)
        elif self.recording and not self.learns and wanted and self.report.reuses.any():
            raise RuntimeError(
                "Gradients are asked for through a trajectory on which outputs were reused; they would be wrong. Open "
                "the scope around a module, so that its parameters are seen, or integrate the bare one."
            )

    def close(self) -> None:
        self.run = self.expected = None

    def _on_grid(self, t: Tensor | float, batch: int) -> Tensor:
        """t as (B,) float64, without the rounding of the sampler's own precision."""
        clock = torch.from_numpy(clock_of(t, batch)[:, 0].copy())
        rounding = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 1e-12
        slack = max(1e-3 * float(self.times.diff().min()), rounding * float(self.times.abs().max()))
        off, nearest = (clock[:, None] - self.times).abs().min(1)
        if self.strict and (off > slack).any():
            raise ValueError(
                f"The sampler asks at t = {clock[off.argmax()]:g}, where {self.stepper} on the given grid does not. "
                "If it chooses its own steps, comparing outputs, reused ones would fool it: take a fixed-step "
                "method. Else name its method and grid, or give `method=None`: any fixed steps, without corrections."
            )
        return torch.where(off <= slack, self.times[nearest], clock)

    def _expect(self, x: Any, clock: Tensor, y: Any) -> None:
        """Where a step of the named method leads with this answer."""
        self.expected = None
        k = int((self.ts[:-1] - clock[0]).abs().argmin())
        if self.run is None or not self.exact or self.run.ledger is None or (clock != self.ts[k]).any():
            return
        if isinstance(x, Tensor) and isinstance(y, Tensor) and len(self.run.branches.known) == 1:
            state, field = (float(weight) for weight in self.stepper.weights(self.ts[k], self.ts[k + 1]))
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            led = state * wide + field * y
            self.expected = float(self.ts[k + 1]), led, rms(led - wide)

    def _check_step(self, x: Any, clock: Tensor) -> None:
        """A step leads where the named method leads."""
        if self.run is None or self.expected is None or (clock != self.expected[0]).any():
            return
        _, led, moved = self.expected
        if led.shape == x.shape and led.device == x.device:
            slack = 1e-3 * moved + 8 * torch.finfo(x.dtype).eps * rms(x)
            if (rms(difference(x, led)) > slack).any():
                self._stop_correcting()

    def _check_count(self, clock: Tensor) -> None:
        """A step uses one output: nothing is asked twice at one time, unless at the same x."""
        query, before = self.report.trace[-1], self.last
        self.last = float(clock[0]), query.branch
        if self.exact and self.last == before and not query.duplicate.any():
            self._stop_correcting()

    def _stop_correcting(self) -> None:
        """What is owed is not known of a sampler that does not step as it was said to."""
        if self.run is None or self.run.ledger is None:
            return
        self.run.ledger = self.expected = None
        warnings.warn(
            f"The sampler does not step as {self.stepper} would: nothing is corrected from here on. Name its "
            "method, or `method=None` if it is none of those known.",
            stacklevel=6,
        )


@contextmanager
def calling(
    model: Any,
    profile: SensitivityProfile | None,
    ts: Tensor,
    method: Method,
    known: Mapping[str, Stepper],
    refused: Mapping[str, str] | None = None,
    *,
    adjoint: bool = False,
    mirror: bool = False,
    unchecked: bool = False,
    force: bool = False,
    **options: Any,
) -> Iterator[Calls]:
    """One trajectory over ts (K + 1,) by a host's `method`, whose memory is dropped at the end, come what may.

    method: a name among `known`, a stepper that makes the same steps, or None for any other of fixed steps. Those of
        `refused` raise their reason unless `force` is given, and with it nothing is checked. adjoint: gradients may be
        taken by an adjoint method. mirror: a profile measured toward data at 0 is turned to a grid that rises.
        unchecked: the steps add noise or mix several answers, so that where they lead cannot be checked. Further
        options are `CachedField`'s.
    """
    ts, refused = check_grid(ts), refused or {}
    if isinstance(method, str) and method in refused and not force:
        raise ValueError(
            f"{method} {refused[method]}. Take another method, such as {', '.join(known) or None}, or run the bare "
            "model. `force=True` runs it all the same."
        )
    if isinstance(method, str) and method not in {*known, *refused}:
        raise ValueError(f"`method` must be one of {', '.join(known)}, a stepper, or None; got {method!r}.")
    named = known.get(method) if isinstance(method, str) else method
    stepper = named or Euler()
    if named is None or not uses_one_output(stepper, ts):
        options.setdefault("correct", False)
    unchecked = unchecked or force or hasattr(stepper, "noise")
    calls = Calls(model, ts, stepper, exact=not unchecked, strict=named is not None and not force, adjoint=adjoint)
    cached = CachedField(calls, mirrored(profile, ts) if mirror else profile, **options)
    if profile is not None:
        made = PLANS.setdefault(profile, {})
        cached._plans = made.setdefault((cached.nfe, cached.rtol, cached.reuse, cached.correct), {})
    with cached.run(ts, stepper) as calls.run:
        calls.report = cached.report
        try:
            yield calls
            if not calls.report.trace:
                warnings.warn(f"The sampler never called the wrapped model: nothing was saved. {NEXT}", stacklevel=4)
        finally:
            calls.close()


def mirrored(profile: SensitivityProfile | None, ts: Tensor) -> SensitivityProfile | None:
    """The profile in the time that runs the other way, 1 - t, if it was measured toward data at 0 and ts rises."""
    if profile is None or profile.direction >= 0 or ts[-1] < ts[0]:
        return profile
    end = None if profile.end is None else 1 - profile.end
    return replace(profile, t=1 - profile.t, end=end)


def _parameters(model: Any) -> list[Tensor]:
    owner = getattr(model, "__self__", model)  # of a bound method, its module
    return list(owner.parameters()) if isinstance(owner, nn.Module) else []
