"""A pipeline's cache: what was asked for, what is known, and what the last run did."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sencache.checks import check_model
from sencache.plan import Plan
from sencache.plugins.diffusers import methods
from sencache.plugins.diffusers import sampler as numbers
from sencache.plugins.diffusers.conditioning import Call
from sencache.plugins.diffusers.decide import Options
from sencache.plugins.diffusers.hooks import held, hook, made, make, unhook
from sencache.plugins.diffusers.known import Known
from sencache.plugins.diffusers.payload import check_blocks
from sencache.plugins.diffusers.plans import plan_of
from sencache.plugins.diffusers.rehearse import rehearse
from sencache.plugins.diffusers.store import Store, models_fingerprint, sampler_name
from sencache.plugins.diffusers.trajectory import Trajectory
from sencache.profile import SensitivityProfile
from sencache.report import Report
from sencache.trees import tensors


class Handle:
    """What `enable` returns.

    report: the record of the last run, also of one that raised. profile, plan: what it went by.
    """

    def __init__(self, pipe: Any, options: Options, profile: SensitivityProfile | None, folder: str | Path | None):
        self.pipe, self.options, self.given, self.store = pipe, options, profile, Store(folder)
        self.report = Report()  # of the last run
        self.known: Known | None = None  # of the last run
        self._trajectory: Trajectory | None = None
        self.ends: list[Tensor] | None = None  # last states, while rehearsing
        self._plans: dict[tuple[str, str, Options], Plan] = {}
        self._samplers: dict[str, numbers.Sampler] = {}
        self._hooked: list[Any] = []
        self._models: dict[str, Any] = {}
        self._context = ""
        self._parts()  # raises for what cannot be cached
        hook(pipe, self, make(type(pipe), methods.of_pipeline))

    @property
    def plan(self) -> Plan | None:
        """The schedule of the last run, where it had one."""
        return None if self.known is None else self.known.plan

    @property
    def profile(self) -> SensitivityProfile | None:
        """What the last run went by, or measured."""
        if self.known is None:
            return None
        return self.known.profile or self.store.find(self.known.model, self.known.name)

    def rehearse(self, runs: Sequence[Callable[[], Any]], budgets: tuple[int, ...] = ()) -> SensitivityProfile:
        """Try plans on fresh `runs` of the pipeline, so that `rtol` can be promised; see `rehearse.rehearse`."""
        return rehearse(self, runs, budgets)

    def keep(self, profile: SensitivityProfile) -> None:
        """Go by another profile of the last run's model and sampler from now on."""
        assert self.known is not None
        self._plans = {}
        if self.given is not None:
            self.given = profile
        else:
            self.store.keep(self.known.model, self.known.name, profile)

    def disable(self) -> None:
        """Restore the pipeline and everything in it; the report stays."""
        for thing in [*self._hooked, self.pipe]:
            unhook(thing, self)

    def models(self) -> dict[str, Any]:
        """The pipeline's transformers (or its UNet), by name."""
        parts = self.pipe.components.items()
        return {name: one for name, one in parts if one is not None and name.startswith(("transformer", "unet"))}

    def owns(self, thing: Any) -> bool:
        """Whether a call of `thing` belongs to the present run."""
        return held(thing, self)

    def _parts(self) -> list[Any]:
        """The models and the scheduler that the pipeline is made of now; they may have been exchanged since."""
        models, scheduler = self.models(), getattr(self.pipe, "scheduler", None)
        if not models:
            raise ValueError(
                f"Expected a diffusers pipeline with a `transformer`; {type(self.pipe).__name__} has "
                f"{', '.join(self.pipe.components)}."
            )
        numbers.check_scheduler(scheduler)
        if self.options.payload == "blocks":
            check_blocks(models)
        self._models = models
        return [*models.values(), scheduler]

    def _attach(self) -> list[Any]:
        """Hook the parts for one run; returns those that were not hooked already, by a run around this one."""
        parts = self._parts()
        self._hooked = [thing for thing in parts if not held(thing, self)]
        for thing in self._hooked:
            hook(thing, self, made(thing, methods.of_scheduler if thing is parts[-1] else methods.of_model))
        return self._hooked

    @contextmanager
    def scope(self) -> Iterator[None]:
        """One run of the pipeline; its memory is dropped at the end, come what may."""
        attached = self._attach()
        outer, token = self._trajectory, methods.CURRENT.set(self)
        self._trajectory, self.report, self.known, self._context = None, Report(), None, ""
        try:
            yield
            self._look_back()
        finally:
            self._end()
            self._trajectory = outer
            methods.CURRENT.reset(token)
            for thing in attached:
                unhook(thing, self)

    def begin(self) -> None:
        """The scheduler has a new grid: another trajectory."""
        self._end()
        self._trajectory = Trajectory(self.options, self.report, self._know)

    def ask(self, model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a model in the present run."""
        name = next(name for name, one in self._models.items() if one is model)
        if self._trajectory is None or self._trajectory.over:
            self.begin()
        assert self._trajectory is not None
        call = Call(name, self._context, args, kwargs, self.options.key)
        return self._trajectory.ask(self.pipe.scheduler, call, functools.partial(forward, *args, **kwargs))

    def step(self, scheduler: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step of the scheduler in the present run."""
        run = functools.partial(forward, *args, **kwargs)
        if self._trajectory is None:
            return run()
        result = self._trajectory.step(scheduler, numbers.arguments(scheduler, args, kwargs), run)
        if self.ends is not None and self._trajectory.over:
            self.ends.append(tensors(result)[0].clone())
        return result

    @contextmanager
    def named(self, context: str) -> Iterator[None]:
        """diffusers' name for the calls inside."""
        outer, self._context = self._context, context
        try:
            yield
        finally:
            self._context = outer

    def _know(self, scheduler: Any, given: dict[str, Any], start: int, pays: bool) -> Known:
        times = numbers.clock(scheduler)[start:]
        name, options = sampler_name(scheduler, given, times), replace(self.options, correct=pays)
        if options.tolerance == 0:
            self.known = Known(name)
            return self.known
        if name not in self._samplers:
            self._samplers[name] = numbers.probe(scheduler, given, start)
        sampler, model = self._samplers[name], models_fingerprint(self._models)
        if self.given is not None:
            check_model(self.given, model)
        planned = options.tolerance is None
        profile = self.given or (self.store.find(model, name) if planned else None)
        plan, full = None, options.nfe is not None and options.nfe >= len(sampler.times)
        if planned and profile is not None and not full:
            if (model, name, options) not in self._plans:
                self._plans[model, name, options] = plan_of(profile, sampler, name, options)
            plan = self._plans[model, name, options]
            self.report.expected, self.report.promised = plan.relative_error, plan.promised
        self.known = Known(name, model, sampler, profile, plan, planned and profile is None and not full)
        return self.known

    def _end(self) -> None:
        """The present trajectory is done, or given up."""
        if self._trajectory is None:
            return
        known, measured = self._trajectory.known, self._trajectory.measured
        if known is not None and known.measures and known.sampler is not None and self._trajectory.over:
            facts = {"fingerprint": known.model, "sampler": known.name, "gain": known.sampler.gain.tolist()}
            profile = measured.profile(known.sampler, facts)
            if profile.gram is not None and profile.gram.isfinite().all():
                self.store.keep(known.model, known.name, profile)
        self._trajectory.forget()
        self._trajectory = None

    def _look_back(self) -> None:
        """Warn where a run was not what the user had in mind."""
        known, calls = self.known, len(self.report.trace)
        if not calls:
            warnings.warn(
                f"sencache is enabled on this {type(self.pipe).__name__} and saw no call of a transformer in this run, "
                "so that nothing was saved.",
                stacklevel=5,
            )
        elif known is not None and known.sampler is not None and not known.measures and not self.report.reuses.any():
            new = len({query.branch for query in self.report.trace}) > calls / 2
            why = "Ask for less (`nfe`) or allow more (`tolerance`)."
            if new:
                why = "The transformer was given something new in every call; if it means the same, say so with `key=`."
            warnings.warn(f"sencache reused nothing in this run of {calls} transformer calls. {why}", stacklevel=5)
