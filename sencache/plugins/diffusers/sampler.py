"""What a diffusers scheduler does with the outputs it is given, found by running a copy of it on numbers.

A scheduler is linear in its outputs, so run on unit vectors it says how much of every output is in the state after
every step, and in each tensor that it remembers: exact for every linear method, its history included, and nothing has
to be known about it.

Shapes: N calls of `step`, T <= N distinct times among them; sample (B, ...).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.trees import replace, tensors

Slot = tuple[str, int]  # where a scheduler keeps a state: ("", i) in what `step` returns, (attribute, i) in itself
BOUNDS = ("clip_sample", "thresholding")  # what makes a scheduler non-linear; left out of its numbers


@dataclass(frozen=True, eq=False)
class Sampler:
    """One scheduler on one grid, as numbers."""

    times: Tensor  # (T,) float64, the distinct times at which outputs are asked for, in order
    which: Tensor  # (N,) int64, the time of each call
    weights: tuple[Mapping[Slot, Tensor], ...]  # after each call, (N,) of every output in every state that is kept

    @property
    def gain(self) -> Tensor:
        """How the final state weighs the output at each time, (T,)."""
        return torch.zeros_like(self.times).index_add(0, self.which, self.weights[-1]["", 0])


def clock(scheduler: Any) -> Tensor:
    """The time (N,) float64 of each of a run's calls, in training timesteps, before it is rounded to an integer.

    Raises ValueError where it neither falls nor rises throughout.
    """
    steps = scheduler.timesteps.cpu().double()
    sigmas, total = getattr(scheduler, "sigmas", None), float(scheduler.config.get("num_train_timesteps", 1000))
    exact = []
    if isinstance(sigmas, Tensor) and sigmas.ndim == 1 and len(sigmas) > len(steps):
        sigmas = sigmas[: len(steps)].cpu().double()
        exact.append(sigmas * total)  # flow matching: sigma is the time
        if isinstance(table := getattr(scheduler, "alphas_cumprod", None), Tensor):
            table = table.cpu().double()
            noise = ((1 - table) / table).sqrt().log().numpy()
            with np.errstate(divide="ignore"):
                exact.append(torch.from_numpy(np.interp(np.log(sigmas.numpy()), noise, np.arange(len(noise)))))
    fits = [times for times in exact if (times - steps).abs().max() <= 1]
    times = fits[0] if fits else steps
    moves = times.diff()
    if not times.isfinite().all() or not ((moves <= 0).all() or (moves >= 0).all()):
        raise ValueError(
            f"{type(scheduler).__name__} goes back in time ({times.tolist()}), and the cache needs one direction. "
            "Disable it for this scheduler: `sencache.disable(pipe)`."
        )
    return times


def arguments(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `scheduler.step`, by name."""
    signature = inspect.signature(scheduler.step)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, one in signature.parameters.items():
        if one.kind is one.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def check_scheduler(scheduler: Any) -> None:
    """Raise where `step` is not one of a model output, a timestep and a sample."""
    step = getattr(scheduler, "step", None)
    names = list(inspect.signature(step).parameters) if callable(step) else []
    if not {"model_output", "timestep", "sample"} <= set(names) or not callable(
        getattr(scheduler, "set_timesteps", None)
    ):
        raise ValueError(
            f"Expected a scheduler with `set_timesteps` and `step(model_output, timestep, sample)`; got "
            f"{type(scheduler).__name__} with step({', '.join(names)}). The cache cannot follow it."
        )


def kept(scheduler: Any, result: Any, shape: torch.Size) -> dict[Slot, Tensor]:
    """Every tensor of `shape` that a step returned or that the scheduler remembers, by where it is."""
    places: dict[str, Any] = {"": tensors(result), **vars(scheduler)}
    found = {}
    for name, place in places.items():
        for i, part in enumerate(place if isinstance(place, list | tuple) else [place]):
            if isinstance(part, Tensor) and part.shape == shape:
                found[name, i] = part
    return found


def put(scheduler: Any, result: Any, states: Mapping[Slot, Tensor]) -> Any:
    """What a step returned, with `states` in it and in the scheduler instead of those that were there."""
    new = tensors(result)
    for (name, i), state in states.items():
        place = getattr(scheduler, name) if name else None
        if not name:
            new[i] = state
        elif isinstance(place, list | tuple):
            setattr(scheduler, name, type(place)([*place[:i], state, *place[i + 1 :]]))
        else:
            setattr(scheduler, name, state)
    return replace(result, new)


def probe(scheduler: Any, given: Mapping[str, Any], start: int) -> Sampler:
    """The numbers of a scheduler that stands before its first step, from call `start` of its grid on.

    given: the arguments of that step. Noise is left out, and nobody's random numbers are used. Raises ValueError for a
    scheduler that is not linear in its outputs.
    """
    times = clock(scheduler)[start:]
    size = len(times)
    each = torch.eye(size, dtype=torch.float64, device="cpu")
    mixture = torch.linspace(-1, 0.7, size, dtype=torch.float64, device="cpu")  # of all, to see that it is linear
    outputs = torch.cat([each, mixture[:, None]], 1)
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever there is to say, the scheduler says when it is run itself
            with_outputs, without = (_run(scheduler, given, start, some) for some in (outputs, 0 * outputs))
    finally:
        torch.set_rng_state(state)
    weights = []
    for states, noise in zip(with_outputs, without, strict=True):
        rows = {slot: (part - noise[slot])[0] for slot, part in states.items() if slot in noise}
        row = rows["", 0]
        scale = row.abs().max() * size
        if not row.isfinite().all() or (row[:-1] @ mixture - row[-1]).abs() > 1e-3 * scale + 1e-6:
            raise ValueError(
                f"{type(scheduler).__name__} is not linear in the model's outputs, and plans and corrections need "
                "that. Use `tolerance=...` with `correct=False`, or `sencache.disable(pipe)`."
            )
        weights.append({slot: row[:-1] for slot, row in rows.items()})
    distinct = list(dict.fromkeys(times.tolist()))
    which = torch.tensor([distinct.index(t) for t in times.tolist()], device="cpu")
    return Sampler(torch.tensor(distinct, dtype=torch.float64, device="cpu"), which, tuple(weights))


def _run(scheduler: Any, given: Mapping[str, Any], start: int, outputs: Tensor) -> list[dict[Slot, Tensor]]:
    """Every state that a copy of the scheduler keeps after each step, given the rows of outputs (N, C): (1, C)."""
    plain = copy.deepcopy(scheduler)
    for name, value in list(vars(plain).items()):
        if isinstance(value, Tensor):
            setattr(plain, name, value.cpu())
    plain.is_scale_input_called = True
    plain.register_to_config(**{name: False for name in BOUNDS if plain.config.get(name)})
    fixed: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(plain.step).parameters:
        fixed["generator"] = torch.Generator().manual_seed(0)
    torch.default_generator.manual_seed(0)
    x, result, found = torch.zeros_like(outputs[:1]), (None, None), []
    for k, output in enumerate(outputs, start):
        own = {**given, **fixed, "model_output": output[None], "timestep": plain.timesteps[k], "sample": x}
        if "old_pred_original_sample" in own:  # what CogVideoX's DPM hands from one step to the next
            own["old_pred_original_sample"] = result[1]
            own["timestep_back"] = plain.timesteps[k - 1] if k > start else None
        result = plain.step(**own)
        x = result[0]
        found.append({slot: part.double() for slot, part in kept(plain, result, x.shape).items()})
    return found
