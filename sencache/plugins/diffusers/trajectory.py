"""One trajectory of a pipeline: what its transformers are asked, and what its scheduler does with the answers.

Between two steps of the scheduler the transformers are called once for each conditioning, or once for several stacked
in one batch. Time is the scheduler's own, by the number of its step, and not the rounded one that a model is given.

Shapes: B samples; N calls of `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sencache.correct import Notes
from sencache.norms import rms
from sencache.plugins.diffusers import sampler as numbers
from sencache.plugins.diffusers.conditioning import Call
from sencache.plugins.diffusers.debts import Debts
from sencache.plugins.diffusers.decide import Drift, Options, everything, rule_of
from sencache.plugins.diffusers.known import Known
from sencache.plugins.diffusers.payload import Transformers
from sencache.plugins.diffusers.sampler import Sampler
from sencache.profile import SensitivityProfile
from sencache.report import Report
from sencache.run import Run
from sencache.trees import replace, tensors

ELEMENTS = 1 << 18  # of an output, from which inner products are measured: their standard error is below 0.3 %


class Trajectory:
    """From `set_timesteps` to the last step.

    know: asked at the first step for what is known of this sampler: (scheduler, arguments of the step, first
        call, whether gaps are repaid).
    """

    def __init__(self, options: Options, report: Report, know: Callable[..., Known]):
        self.options, self.know = options, know
        self.times = torch.zeros(0, device="cpu")  # (N,) of the grid, once it is walked
        self.notes = Notes()  # what the calls since the last step did
        self.run = Run(Transformers(), everything(options.norm, options.payload), lambda args, _: args[0])
        self.run.report, self.run.ledger = report, self.notes
        self.start: int | None = None  # where in the grid it begins, 0 but for image to image
        self.k = 0  # where in the grid it is
        self.known: Known | None = None
        self.debts: Debts | None = None
        self.measured = Measurement()

    @property
    def over(self) -> bool:
        """Whether the grid has been walked to its end."""
        return self.start is not None and self.k == len(self.times)

    def ask(self, scheduler: Any, call: Call, forward: Callable[[], Any]) -> Any:
        """The answer of a model, evaluated or from memory."""
        if self.start is None:
            self.times = numbers.clock(scheduler)
            self.start = self.k = _first(scheduler, call.timestep)
        if not self.notes:
            self.measured.models.append(call.where[0])
        t, conditioning = self.times[self.k], call.turn(len(self.notes))
        if isinstance(call.x, Tensor):
            return self.run(call.x, t, conditioning, forward)
        return _map(self.run(_map(call.x, _row), t, conditioning, lambda: _map(forward(), _row)), _only)

    def step(self, scheduler: Any, given: dict[str, Any], forward: Callable[[], Any]) -> Any:
        """What the scheduler's step returns, given these arguments, with what was owed repaid."""
        if self.start is None or not self.notes:
            return forward()  # nothing was asked of us
        self._stand(scheduler, given["timestep"])
        if self.known is None:
            self.known = self._begin(scheduler, given)
        k = self.k - self.start
        result = forward()
        if self.known.measures:
            self.measured.add(given["model_output"], tensors(result)[0])
        if self.debts is not None:
            states = numbers.kept(scheduler, result, given["sample"].shape)
            changed = self.debts.settle(k, self.notes, given["model_output"], states)
            result = numbers.put(scheduler, result, changed) if changed else result
        if isinstance(criterion := self.run.rule.criterion, Drift):
            criterion.stepped(k)
        self.notes.clear()
        self.k += 1
        return result

    def _begin(self, scheduler: Any, given: dict[str, Any]) -> Known:
        """At the first step it is seen how the scheduler is used, and so what to do with the rest."""
        uneven = {name for name, value in given.items() if isinstance(value, Tensor) and name not in OWN}
        even = {name: value for name, value in given.items() if name not in uneven}
        x, y = given["sample"], given["model_output"]
        pays = self.options.correct and not uneven and x.shape == y.shape  # else weights differ within a sample
        known = self.know(scheduler, even, self.start, pays)
        if known.sampler is not None:
            self.debts = Debts(known.sampler, len(x), pays and (known.plan is None or known.plan.correct))
            self.run.rule = rule_of(self.options, known.plan, known.profile, self.debts)
            variable = self.run.rule.variable  # until here it was t itself
            self.notes[:] = [note._replace(nodes=variable(note.nodes)) for note in self.notes]
        return known

    def _stand(self, scheduler: Any, timestep: Any) -> None:
        """Make sure that the step to be taken is the one that the grid stands at; the first one may be anywhere."""
        steps, t = scheduler.timesteps.cpu().double(), float(torch.as_tensor(timestep, device="cpu").flatten()[0])
        if len(steps) == len(self.times) and float(steps[self.k]) == t:
            return
        hits = (steps == t).nonzero()
        if self.known is None and len(hits) and len(steps) == len(self.times):
            self.start = self.k = int(hits[0])
            self.run.branches.clear()  # what was asked was noted down at another time
            return
        raise RuntimeError(
            f"{type(scheduler).__name__} was stepped at {t:g}, and its grid stands at {float(steps[self.k]):g}: this "
            "pipeline steps in a way that the cache cannot follow. Disable it here: `sencache.disable(pipe)`."
        )

    def forget(self) -> None:
        """Drop every tensor that is held."""
        self.run.forget()
        self.notes.clear()
        self.debts = None
        self.measured = Measurement()


OWN = {"model_output", "timestep", "sample", "timestep_back", "old_pred_original_sample"}


class Measurement:
    """What a full run says of a model: inner products of its guided outputs, in the sampler's own coordinates."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []  # (B, at most ELEMENTS), one a call
        self.models: list[str] = []  # which one answered
        self.some = torch.zeros(0, device="cpu")  # which elements are kept
        self.size = torch.zeros(0, device="cpu")  # (B,) RMS of the last state

    def add(self, y: Tensor, x: Tensor) -> None:
        """A call's output y (B, ...) and the state x (B, ...) after it."""
        flat = y.detach().reshape(len(y), -1)
        if flat.shape[1] > ELEMENTS:
            if not self.outputs:
                generator = torch.Generator().manual_seed(0)
                some = torch.randperm(flat.shape[1], generator=generator, device="cpu")[:ELEMENTS]
                self.some = some.to(flat.device)
            flat = flat[:, self.some]
        self.outputs.append(flat.float().cpu())
        self.size = rms(x).double().cpu()

    def profile(self, sampler: Sampler, facts: dict[str, Any]) -> SensitivityProfile:
        """The profile of a whole run. Of several outputs at one time the first one counts."""
        first = torch.tensor([int((sampler.which == t).nonzero()[0]) for t in range(len(sampler.times))], device="cpu")
        y = torch.stack(self.outputs, 1)[:, first].double()  # (B, T, d)
        unmeasured = torch.full_like(sampler.times, torch.nan)
        models = [self.models[k] for k in first.tolist()]
        crossings = [float(sampler.times[k]) for k in range(1, len(models)) if models[k] != models[k - 1]]
        facts = {**facts, "along": "its own trajectories", "samples": len(y), "crossings": crossings}
        gram = y @ y.mT / y.shape[2]
        return SensitivityProfile(sampler.times, unmeasured, unmeasured, gram=gram, size=self.size, facts=facts)


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return replace(tree, [change(part) for part in tensors(tree)])


def _row(part: Tensor) -> Tensor:
    """One of a list of samples, which have no batch dimension: they are decided on together, as a batch of one."""
    return part[None]


def _only(part: Tensor) -> Tensor:
    return part[0]


def _first(scheduler: Any, timestep: Any) -> int:
    """Which call of the grid comes first, where a pipeline begins in its middle."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    steps = scheduler.timesteps.cpu().double()
    t = torch.as_tensor(timestep, device="cpu").detach().double().max()
    for unit in (1.0, float(scheduler.config.get("num_train_timesteps", 1000))):
        hits = ((steps - t * unit).abs() <= 1e-3 * (t * unit).abs().clamp(min=1e-3)).nonzero()
        if len(hits):
            return int(hits[0])
    return 0
