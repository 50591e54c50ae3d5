"""What methods need to know of a model beforehand, measured on samples that are not reported; a file for each.

gram: inner products of a full run's outputs, which plans are made of; `sencache.enable` measures them.
sensitivities: the paper's alpha_x and alpha_t, Eqs. 11 and 12, with two further evaluations for each of the run's own.
    They are of the transformer's output as it is, and means over the passes with and without the prompt. The paper's
    authors noise videos of a data set instead; here the states are the sampler's own, so that no videos are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sencache import SensitivityProfile, rms
from sencache.command.pipelines import PipelineSource, is_network
from sencache.norms import difference
from sencache.plugins.diffusers.sampler import clock
from sencache.plugins.diffusers.store import models_fingerprint
from sencache.trees import tensors

Key = tuple[nn.Module, int]  # a model, and which of its calls since the last step


def gram(source: PipelineSource, seed: int) -> SensitivityProfile:
    """One sample's."""
    return source.measured(range(seed, seed + 1), False, None)


def sensitivities(source: PipelineSource, seed: int) -> SensitivityProfile:
    """One sample's. Nothing follows the last time: there the sensitivities are those of the one before."""
    networks = {name: part for name, part in source.pipe.components.items() if is_network(name) and part is not None}
    secants = Secants()
    with secants.watching(networks.values()):
        source.timed("calibrate", range(seed, seed + 1), source.steps)
    times = clock(source.pipe.scheduler)
    steps = times.diff().abs()
    alpha_x, alpha_t = (torch.tensor([*map(_mean, part), _mean(part[-1])]) for part in (secants.x, secants.t))
    facts = {"fingerprint": models_fingerprint(networks), "along": "its own trajectories", "samples": 1}
    return SensitivityProfile(
        times, alpha_x, alpha_t / torch.cat([steps, steps[-1:]]), end=2 * times[-1] - times[-2], facts=facts
    )


KINDS: dict[str, Callable[[PipelineSource, int], SensitivityProfile]] = {"gram": gram, "sensitivities": sensitivities}


def joined(profiles: list[SensitivityProfile]) -> SensitivityProfile:
    """One profile of several samples of one grid."""
    first = profiles[0]
    alphas = {name: torch.stack([getattr(one, name) for one in profiles]) for name in ("alpha_x", "alpha_t")}
    stacked = {
        name: torch.cat([getattr(one, name) for one in profiles])
        for name in ("gram", "size")
        if getattr(first, name) is not None
    }
    means = {name: alpha.mean(0) for name, alpha in alphas.items()}
    own = {"samples_x": alphas["alpha_x"], "samples_t": alphas["alpha_t"]}
    return replace(first, **means, **own, **stacked, facts={**first.facts, "samples": len(profiles)})


@dataclass
class Secants:
    """How far each call's output moves when its state alone, or its time alone, is that of the next step."""

    x: list[list[float]] = field(default_factory=list)  # by step: |f(x', t) - f(x, t)| / |x' - x| of each call
    t: list[list[float]] = field(default_factory=list)  # by step: |f(x, t') - f(x, t)|
    now: Tensor | None = None  # the timestep that the model was given last
    turn: int = 0
    before: dict[Key, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # x, timestep and output

    @contextmanager
    def watching(self, models: Any) -> Iterator[None]:
        """Every call of the models is measured inside."""
        hooks = [model.register_forward_hook(self.called, with_kwargs=True) for model in models]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()
            self.before.clear()

    def called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a call: two more, at this state and the last time, and at the last state and this time."""
        x, timestep, y = kwargs["hidden_states"], kwargs["timestep"], tensors(output)[0]
        if self.now is None or not torch.equal(self.now, timestep):
            if self.now is not None:
                self.x.append([])
                self.t.append([])
            self.now, self.turn = timestep.clone(), 0
        key = model, self.turn
        self.turn += 1
        if key in self.before:
            x_r, t_r, y_r = self.before[key]
            moved = tensors(model.forward(*args, **{**kwargs, "timestep": t_r}))[0]
            later = tensors(model.forward(*args, **{**kwargs, "hidden_states": x_r}))[0]
            self.x[-1].append(_mean(rms(difference(moved, y_r)) / rms(difference(x, x_r))))
            self.t[-1].append(_mean(rms(difference(later, y_r))))
        self.before[key] = x.clone(), timestep.clone(), y.clone()


def _mean(values: Any) -> float:
    return float(torch.as_tensor(values, dtype=torch.float64).mean())
