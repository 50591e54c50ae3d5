"""What the reuses of a run owe, repaid in the states of somebody else's scheduler.

`correct.Repaying` does this for steppers of ours; here the outputs are the guided ones that `scheduler.step` is given,
and the weight of each output in each state is known beforehand (`sampler.probe`).

Shapes: B samples, N calls; y, states (B, ...).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sencache.batch import spread
from sencache.correct import Note, owed, repaid
from sencache.plugins.diffusers.sampler import Sampler, Slot


class Asked(NamedTuple):
    """What the calls of the model before one step did, all alike."""

    offset: Tensor  # (B, 3) as in `correct.Note`
    closes: Tensor  # (B,) bool
    nodes: Tensor  # (B, 3)


def fold(rows: Tensor, batch: int) -> Tensor:
    """Of rows (R, ...) those of the first conditioning, (B, ...), where a call stacks several: R = m B."""
    return rows[:batch] if len(rows) % batch == 0 else rows[:1].expand(batch, *rows.shape[1:])


def unfold(samples: Tensor, rows: int) -> Tensor:
    """What holds of each sample (B,) for the rows (R,) of a call; of another layout, what holds of the worst."""
    if rows % len(samples) == 0:
        return samples.repeat(rows // len(samples))
    return samples.max().expand(rows)


def agreed(notes: list[Note], batch: int) -> Asked | None:
    """What all calls of a step did, or None where some were evaluated and others not."""
    parts = [map(torch.from_numpy, (note.offset, note.closes, note.nodes)) for note in notes]
    said = [Asked(*(fold(part, batch) for part in each)) for each in parts]
    alike = all(
        torch.equal(one.offset, said[0].offset)
        and torch.equal(one.closes, said[0].closes)
        and torch.equal(one.nodes.nan_to_num(), said[0].nodes.nan_to_num())
        for one in said
    )
    return said[0] if said and alike and not any(note.anew.any() for note in notes) else None


class Debts:
    """The open gaps of one run, and the guided outputs at their ends.

    pays: whether anything is repaid; what was evaluated is remembered in any case.
    """

    def __init__(self, sampler: Sampler, batch: int, pays: bool):
        self.sampler, self.pays = sampler, pays
        shape = len(sampler.which), batch, 3
        self.open = torch.zeros(shape, dtype=torch.float64, device="cpu")  # what each call's reuse adds
        self.closes = torch.zeros(batch, dtype=torch.bool, device="cpu")  # which samples the last step evaluated
        self.asked: tuple[int, ...] = ()  # which conditionings it asked for
        self.drop()

    def drop(self) -> None:
        """Nothing is owed, and no line goes through what was evaluated so far."""
        self.open.zero_()
        self.y_r: Tensor | None = None  # the last evaluation
        self.y_2: Tensor | None = None  # the one before
        nowhere = torch.full((len(self.closes),), torch.nan, dtype=torch.float64, device="cpu")
        self.s_r = self.s_2 = nowhere  # where they were

    def settle(self, k: int, notes: list[Note], y: Tensor, states: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """The states after call k that differ once the gaps that it closed are repaid; y (B, ...) is the guided output.

        What is owed under one set of conditionings (a prompt, a transformer, guidance) is not owed under another.
        """
        step, asked = agreed(notes, len(y)), tuple(note.branch for note in notes)
        if step is None or asked != self.asked or (self.y_2 is None and (step.offset[:, 2] != 0).any()):
            self.drop()
        self.asked, self.closes = asked, torch.zeros_like(self.closes) if step is None else step.closes
        if step is None or (self.y_r is None and not step.closes.all()):  # a reuse of what was dropped
            return {}
        self.open[k] = step.offset * ~step.closes[:, None]
        repaid_states = self._repaid(k, step, y, states) if self.pays and self.y_r is not None else {}
        self.open[:, step.closes] = 0
        self._remember(step, y)
        return repaid_states

    def _repaid(self, k: int, step: Asked, y: Tensor, states: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        assert self.y_r is not None
        nodes = torch.stack([step.nodes[:, 0], self.s_r, self.s_2], 1)
        outputs, changed = (y, self.y_r, self.y_r if self.y_2 is None else self.y_2), {}
        for slot, row in self.sampler.weights[k].items():
            moments = torch.einsum("n,nbm->bm", row, self.open)
            weights = np.where(step.closes[:, None].numpy(), owed(moments.numpy(), nodes.numpy()), 0.0)
            if weights.any() and slot in states:
                changed[slot] = repaid(states[slot], weights, outputs)
        return changed

    def _remember(self, step: Asked, y: Tensor) -> None:
        """y becomes the last evaluation of the samples that were evaluated, and what was that, the one before."""
        closes = step.closes
        if self.y_r is None or closes.all():
            self.y_2, self.y_r = self.y_r, y.clone()
        elif closes.any():
            rows = spread(closes, y).bool()
            self.y_2 = torch.where(rows, self.y_r, self.y_r if self.y_2 is None else self.y_2)
            self.y_r = torch.where(rows, y, self.y_r)
        self.s_2 = torch.where(closes, self.s_r, self.s_2)
        self.s_r = torch.where(closes, step.nodes[:, 0], self.s_r)
