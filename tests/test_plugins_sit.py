"""The trained SiT through other people's loops: the same fidelity at the same cost as in `integrate`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.hosts import CASES, measured

BY_NAME = {case.name: case for case in CASES}
FOLDED = [case for case in CASES if case.folds and not case.noisy][1:]
OTHERS = ["k-diffusion `sample_dpmpp_2m`", "torchdiffeq `midpoint`", "torchdiffeq `rk4`"]


def decibels(case, samples, budgets, ways):
    """The median PSNR of each way, and the evaluations it took."""
    with torch.no_grad():
        return {way: (values.median().item(), paid) for way, paid, values in measured(case, samples, budgets, ways)}


def is_as_by_integrate(samples, budgets):
    ours = decibels(CASES[0], samples, budgets, ("repaid", "fewer steps"))
    for case in FOLDED:
        theirs = decibels(case, samples, budgets, ("repaid",))
        for nfe in budgets:
            assert theirs[f"repaid {nfe}"][1] == ours[f"repaid {nfe}"][1] == nfe
            assert abs(theirs[f"repaid {nfe}"][0] - ours[f"repaid {nfe}"][0]) < 0.5, (case.name, nfe)
            assert theirs[f"repaid {nfe}"][0] > ours[f"fewer steps {nfe}"][0] + 10


def gains_by_continuing(name, samples, budgets):
    found = decibels(BY_NAME[name], samples, budgets, ("fewer steps", "hold", "line"))
    for nfe in budgets:
        assert found[f"line {nfe}"][1] <= nfe
        assert found[f"line {nfe}"][0] > max(found[f"hold {nfe}"][0], found[f"fewer steps {nfe}"][0]) + 5, nfe


def test_where_corrections_fold_a_few_images_are_as_close_as_by_integrate():
    is_as_by_integrate(4, (15,))


def test_elsewhere_a_few_images_gain_by_continuing_outputs():
    gains_by_continuing("k-diffusion `sample_dpmpp_2m`", 4, (15,))


@pytest.mark.slow
def test_where_corrections_fold_images_are_as_close_as_by_integrate():
    is_as_by_integrate(32, (25, 15))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_elsewhere_images_gain_by_continuing_outputs(name):
    gains_by_continuing(name, 32, (25, 15))
