"""Every error says what was expected, what came, and the next move (of files and misfits: test_profile.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from sencache import CachedField, SensitivityProfile, calibrate, jacobian_norms, rehearse, strict_start
from solvers import Euler, Heun, Linear, TorchDiffEq, UniPC, grids, integrate

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
TS = grids.uniform(4)
ONES = torch.ones(5)
PROFILE = SensitivityProfile(TS, ONES, ONES)
X = torch.ones(2, 3)


def decay(x, t):
    return -x


def cached(field=decay, **options):
    return Paper(field, PROFILE, **{"tolerance": 0.1, **options})


def at_half(value):
    """A field whose second sample is `value` at t = 0.5."""

    def field(x, t):
        v = -x
        v[1] = value if t == 0.5 else v[1]
        return v

    return field


def grid(*times):
    return torch.tensor(times)


RULE = {
    "tolerance": (dict(tolerance=-0.1), r"`tolerance` is the size of a change and cannot be negative; got -0.1"),
    "no tolerance": (dict(tolerance=math.nan), r"`tolerance`.*cannot be negative; got nan"),
    "max_reuses": (dict(max_reuses=-1), r"`max_reuses` counts reuses, 0, 1, 2, ... or math.inf; got -1"),
    "half a reuse": (dict(max_reuses=1.5), r"`max_reuses` counts reuses.*got 1.5"),
    "no number of reuses": (dict(max_reuses=math.nan), r"`max_reuses` counts reuses.*got nan"),
    "reuse": (dict(reuse="steal"), r"`reuse` must be one of .*hold.*; got 'steal'"),
    "two ways": (dict(nfe=3), r"in one way, `nfe`, `rtol` or `tolerance`; got nfe, tolerance"),
    "two other ways": (dict(nfe=3, rtol=0.1, tolerance=None), r"in one way.*got nfe, rtol"),
    "nfe": (dict(nfe=0, tolerance=None), r"`nfe` counts evaluations, 1, 2, ...; got 0"),
    "half an evaluation": (dict(nfe=2.5, tolerance=None), r"`nfe` counts evaluations.*got 2.5"),
    "rtol": (dict(rtol=0, tolerance=None), r"`rtol` is a relative error and must be positive; got 0"),
    "no rtol": (dict(rtol=math.nan, tolerance=None), r"`rtol`.*must be positive; got nan"),
    "no number of evaluations": (dict(nfe=math.nan, tolerance=None), r"`nfe` counts evaluations.*got nan"),
    "no end of evaluations": (dict(nfe=math.inf, tolerance=None), r"`nfe` counts evaluations.*got inf"),
    "correct": (dict(correct="no"), r"`correct` must be True, False or None.*got 'no'"),
}


@pytest.mark.parametrize(("options", "words"), RULE.values(), ids=RULE)
def test_a_rule_that_makes_no_sense_is_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        cached(**options)


@pytest.mark.parametrize("name", ["nfe", "rtol", "tolerance", "max_reuses"])
def test_a_word_is_no_number(name):
    with pytest.raises(TypeError, match=rf"`{name}` is a number; got 'three'"):
        cached(**{"tolerance": None if name in ("nfe", "rtol") else 0.1, name: "three"})


@pytest.mark.parametrize("options", [{}, {"nfe": 3}, {"rtol": 0.1}], ids=str)
def test_without_a_profile_a_tolerance_is_asked_for(options):
    with pytest.raises(ValueError, match=r"Without a profile give `tolerance`.*calibrate first"):
        CachedField(decay, **options)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_tolerance_that_is_negative_somewhere_is_refused_there(bad):
    field = cached(tolerance=lambda t: bad if t < 0.6 else 0.1)
    with pytest.raises(ValueError, match=rf"`tolerance` must be 0 or more at every t; got \[{bad}.*at \[0.5, 0.5\]"):
        field.integrate(X, TS)


STATES = {
    "no samples": (X[:0], ValueError, r"at least one sample, shape \(B, ...\).*got shape \(0, 3\)"),
    "no elements": (X[:, :0], ValueError, r"at least one sample.*got shape \(2, 0\)"),
    "no batch": (torch.tensor(1.0), ValueError, r"at least one sample.*got shape \(\)"),
    "integers": (X.long(), TypeError, r"floating-point tensor of shape \(B, ...\); got torch.int64"),
    "no tensor": (np.ones((2, 3)), TypeError, r"floating-point tensor.*got ndarray"),
    "NaN": (X * math.nan, ValueError, r"x holds NaN or infinity before the first step"),
}
GRIDS = {
    "equal times": (grid(1, 0.25, 0.25, 0), r"strictly monotone; got ts\[1\] == ts\[2\]: 0.25, 0.25"),
    "back and forth": (grid(1, 0.5, 0.7, 0), r"strictly monotone; got ts\[1\] < ts\[2\]: 0.5, 0.7"),
    "forth and back": (grid(0, 0.5, 0.3), r"strictly monotone; got ts\[1\] > ts\[2\]: 0.5, 0.3"),
    "one time": (grid(1.0), r"at least two times, shape \(K \+ 1,\); got shape \(1,\)"),
    "a table": (torch.ones(2, 2), r"at least two times.*got shape \(2, 2\)"),
    "NaN": (grid(1, math.nan, 0), r"`ts` must be finite; got ts\[1\] = nan"),
}


@pytest.mark.parametrize("entry", ["integrate", "calibrate"])
@pytest.mark.parametrize(("x", "error", "words"), STATES.values(), ids=STATES)
def test_a_state_that_is_none_is_refused(x, error, words, entry):
    with pytest.raises(error, match=words):
        cached().integrate(x, TS) if entry == "integrate" else calibrate(decay, x, TS, progress=False)


@pytest.mark.parametrize("entry", ["integrate", "calibrate", "strict_start"])
@pytest.mark.parametrize(("ts", "words"), GRIDS.values(), ids=GRIDS)
def test_a_grid_that_is_none_is_refused(ts, words, entry):
    enter = {
        "integrate": lambda: cached().integrate(X, ts),
        "calibrate": lambda: calibrate(decay, X, ts, progress=False),
        "strict_start": lambda: strict_start(ts, 0.1),
    }
    with pytest.raises(ValueError, match=words):
        enter[entry]()


OUTPUTS = {
    "NaN": (at_half(math.nan), FloatingPointError, r"NaN or infinity at t = 0.5 in samples \[1\]"),
    "infinity": (at_half(math.inf), FloatingPointError, r"NaN or infinity at t = 0.5 in samples \[1\]"),
    "shape": (lambda x, t: x[:, :2], TypeError, r"velocity like x, \(2, 3\) torch.float32; got \(2, 2\).*at t = 1"),
    "dtype": (lambda x, t: x.double(), TypeError, r"velocity like x.*got \(2, 3\) torch.float64 at t = 1"),
    "no tensor": (lambda x, t: (x,), TypeError, r"velocity like x.*got tuple at t = 1"),
}
NOTHING = {"None": lambda x, t: None, "numpy": lambda x, t: x.numpy()}


@pytest.mark.parametrize("entry", ["integrate", "calibrate"])
@pytest.mark.parametrize(("field", "error", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_is_no_velocity_is_named_with_its_time(field, error, words, entry):
    with pytest.raises(error, match=words):
        cached(field, max_reuses=0).integrate(X, TS) if entry == "integrate" else calibrate(
            field, X, TS, progress=False
        )


@pytest.mark.parametrize("field", NOTHING.values(), ids=NOTHING)
def test_an_output_without_a_tensor_is_named_with_its_time(field):
    with pytest.raises(TypeError, match=r"must return a tensor.*got (NoneType|ndarray) at t = 1"):
        cached(field).integrate(X, TS)
    with pytest.raises(TypeError, match=r"velocity like x.*got (NoneType|ndarray) at t = 1"):
        calibrate(field, X, TS, progress=False)


STEPPERS = {
    "a class": (Heun, r"Heun is a class: call it"),
    "a class in it": (UniPC(Linear), r"Linear is a class: call it"),
    "a path": (Linear(), r"Expected a stepper, such as `Euler\(\)`.*; got Linear\("),
    "a name": ("euler", r"Expected a stepper.*; got 'euler'"),
}


@pytest.mark.parametrize(("stepper", "words"), STEPPERS.values(), ids=STEPPERS)
def test_what_is_no_stepper_is_refused(stepper, words):
    enter = (
        lambda: integrate(decay, X, TS, stepper),
        lambda: cached().integrate(X, TS, stepper),
        lambda: cached().run(TS, stepper).__enter__(),
        lambda: CachedField(decay, PROFILE, nfe=2).plan(TS, stepper),
        lambda: calibrate(decay, X, TS, stepper, progress=False),
        lambda: rehearse(decay, PROFILE, X, TS, stepper),
    )
    for way in enter:
        with pytest.raises(TypeError, match=words):
            way()


@dataclass(frozen=True)
class Clipped:
    """Euler's method on velocities that are clipped."""

    at: float
    order, adaptive = 1, False
    weights = Euler.weights

    def advance(self, field, x, t, t_next, memory):
        return (t_next - t) * field(x, t).clamp(-self.at, self.at), None


@pytest.mark.parametrize("at", [0.3, 30.0])
def test_a_stepper_that_is_not_linear_takes_no_plans_and_no_corrections(at):
    profile, ts = calibrate(decay, X, grids.uniform(8), progress=False), grids.uniform(8)
    for options in ({"nfe": 4}, {"tolerance": 0.1}, {"tolerance": 0.1, "unit": "sample", "correct": False}):
        with pytest.raises(ValueError, match=r"Clipped\(at=.*\) is not linear.*`correct=False`"):
            CachedField(decay, profile, **options).integrate(X, ts, Clipped(at))
    field = CachedField(decay, profile, tolerance=0.0, correct=False)
    assert torch.equal(field.integrate(X, ts, Clipped(at)), integrate(decay, X, ts, Clipped(at)))


@pytest.mark.parametrize("wrong", ["profile.safetensors", decay])
def test_what_is_no_profile_is_refused(wrong):
    with pytest.raises(TypeError, match=r"Expected a profile after the field.*got (str|function)"):
        CachedField(decay, wrong, nfe=2)


def test_a_profile_is_not_saved_where_there_is_no_folder(tmp_path):
    file = tmp_path / "nowhere" / "p.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to save the profile in"):
        PROFILE.save(file)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to save the profile in"):
        calibrate(lambda x, t: pytest.fail("this was paid for"), X, TS, file=file, progress=False)


def test_a_folder_is_no_file_of_a_profile(tmp_path):
    for use in (PROFILE.save, SensitivityProfile.load):
        with pytest.raises(IsADirectoryError, match=r"is a folder: name (a file|the file of a profile) in it"):
            use(tmp_path)
    assert not list(tmp_path.parent.glob("*.partial"))


def test_what_answers_from_memory_is_not_measured():
    measured = calibrate(decay, X, TS, progress=False)
    with cached().run() as run:
        for memory in (cached(), run):
            with pytest.raises(TypeError, match=r"(CachedField|Run) answers from memory.*Give the field itself"):
                calibrate(memory, X, TS, progress=False)
            with pytest.raises(TypeError, match=r"(CachedField|Run) answers from memory.*Give the field itself"):
                rehearse(memory, measured, X, TS)


def test_a_rehearsal_takes_the_grids_that_calibration_takes_and_a_profile():
    profile = calibrate(decay, X, TS, progress=False)
    named = rehearse(decay, profile, X, TS.tolist()).facts["rehearsed"]
    assert named == rehearse(decay, profile, X, TS).facts["rehearsed"]
    with pytest.raises(TypeError, match=r"Expected a profile after the field.*got NoneType"):
        rehearse(decay, None, X, TS)


@pytest.mark.parametrize("t", [torch.ones(5), torch.ones(3, 1), np.ones(5)], ids=["(5,)", "(3, 1)", "numpy"])
def test_times_that_belong_to_no_sample_are_refused(t):
    with pytest.raises(ValueError, match=r"t must be a float, \(\), \(B,\) or \(B, T\) with B = 2; got shape \([35],"):
        cached()(X, t)


def test_an_adaptive_solver_is_refused_by_the_cache_and_by_calibration():
    with pytest.raises(ValueError, match=r"dopri5.*reused outputs fool it.*Integrate the bare field"):
        cached().integrate(X, TS, TorchDiffEq())
    with pytest.raises(ValueError, match=r"Calibrate with a fixed-step method; .*dopri5.*chooses its own steps"):
        calibrate(decay, X, TS, TorchDiffEq(), progress=False)


PROFILES = {
    "shapes": (lambda: SensitivityProfile(TS, ONES, ONES[:4]), r"one shape \(M,\); got alpha_t of shape \(4,\) beside"),
    "dimensions": (
        lambda: SensitivityProfile(TS[None], ONES[None], ONES[None]),
        r"one shape \(M,\); got t of shape \(1, 5\)",
    ),
    "order": (
        lambda: SensitivityProfile(grid(1, 0, 2), ONES[:3], ONES[:3]),
        r"strictly monotone; got \[1.0, 0.0, 2.0\]",
    ),
    "twice": (lambda: SensitivityProfile(grid(1, 1, 0), ONES[:3], ONES[:3]), r"finite and strictly monotone"),
    "no time": (lambda: SensitivityProfile(grid(1, math.nan), ONES[:2], ONES[:2]), r"finite and strictly monotone"),
    "nothing": (lambda: SensitivityProfile(TS[:0], ONES[:0], ONES[:0]), r"finite and strictly monotone; got \[\]"),
    "negative": (lambda: SensitivityProfile(TS, -ONES, ONES), r"cannot be negative; use NaN where one could not"),
    "gram": (
        lambda: SensitivityProfile(TS, ONES, ONES, gram=torch.ones(2, 7, 7)),
        r"`gram` must be \(S, T, T\) of the 5 outputs at `t`.*got shape \(2, 7, 7\)",
    ),
}


@pytest.mark.parametrize(("wrong", "words"), PROFILES.values(), ids=PROFILES)
def test_a_profile_that_is_none_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_a_plan_asks_for_what_it_is_made_from():
    bare = CachedField(decay, PROFILE, nfe=2)
    with pytest.raises(ValueError, match=r"does not know where its grid ended; give the grid, `ts`"):
        bare.plan()
    with pytest.raises(ValueError, match=r"no Gram matrix, which plans are made from; measure one with `calibrate`"):
        bare.plan(TS)
    with pytest.raises(ValueError, match=r"A plan needs a profile and `nfe` or `rtol`; here the rule decides"):
        cached().plan(TS)
    measured = calibrate(decay, X, TS, progress=False)
    with pytest.raises(ValueError, match=r"`nfe` is 9, and Euler\(\) asks for only 4 outputs on this grid"):
        CachedField(decay, measured, nfe=9).integrate(X, TS)


def test_an_authors_file_that_is_none_is_refused(tmp_path):
    file = tmp_path / "p.npz"
    np.savez(file, timesteps=np.ones(3), alpha=np.ones(3))
    with pytest.raises(ValueError, match=r"Expected J_x_norm, J_t_norm in .*p.npz; got timesteps, alpha"):
        SensitivityProfile.from_npz(file, numel=4)
    with pytest.raises(ValueError, match=r"`numel` is the number of elements.*at least 1; got 0"):
        SensitivityProfile.from_npz(file, numel=0)
    np.savez(file, timesteps=np.ones(3), J_x_norm=np.ones(3), J_t_norm=np.ones(2))
    with pytest.raises(ValueError, match=r"as many values of everything in .*p.npz; got .*'J_t_norm': 2"):
        SensitivityProfile.from_npz(file, numel=4)


@pytest.mark.parametrize("wrong", [dict(iterations=0), dict(probes=0)], ids=str)
def test_jacobian_norms_of_no_effort_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`iterations` and `probes` must be at least 1; got"):
        jacobian_norms(decay, X, 0.5, **wrong)


@pytest.mark.parametrize(
    "wrong", [dict(tolerance=-1), dict(tolerance=1, strict=-1), dict(tolerance=1, share=1.5)], ids=str
)
def test_a_strict_start_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"Expected tolerances >= 0 and a share in \[0, 1\]; got"):
        strict_start(TS, **wrong)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25, 30, 50, 100])
def test_a_strict_start_is_strict_in_exactly_its_share_of_the_steps(steps):
    """Whatever the rounding: 0.28 * 25 is 7.000000000000001 in floating point, and 7 steps."""
    for ts in (grids.uniform(steps), grids.shifted(steps, 3.0).float(), grids.uniform(steps, 0, 1000)):
        for percent in range(101):
            epsilon = strict_start(ts, 0.1, 0.01, percent / 100)
            strict = [epsilon(t) == 0.01 for t in ts[:-1].tolist()]
            assert strict == [100 * k < percent * steps for k in range(steps)]


def test_after_an_error_the_next_run_is_whole():
    field, fails = cached(decay), cached(at_half(math.nan))
    with pytest.raises(FloatingPointError):
        fails.integrate(X, TS)
    fails.field = decay
    assert torch.equal(fails.integrate(X, TS), field.integrate(X, TS))


@pytest.mark.parametrize(("shape", "words"), [((), r"\(\)"), ((3, 3), r"\(3, 3\)")], ids=str)
def test_outputs_of_another_number_of_samples_are_refused_in_loops_of_others(shape, words):
    called = CachedField(lambda x, t: torch.ones(shape), PROFILE, tolerance=0.1)
    with pytest.raises(ValueError, match=rf"an output a sample, shape \(2, ...\); got {words}"):
        called(X, 1.0)


@pytest.mark.parametrize("how", [dict(nfe=2), dict(tolerance=0.1)], ids=str)
def test_a_norm_of_the_whole_batch_is_refused(how):
    profile = calibrate(decay, X, TS, progress=False)
    with pytest.raises(ValueError, match=r"`norm` must give a number a sample, shape \(2,\); got \(\)"):
        CachedField(decay, profile, norm=torch.linalg.vector_norm, **how).integrate(X, TS)


def test_a_selection_of_another_number_of_samples_is_refused():
    class Forgetful:
        def __call__(self, x, t):
            return -x

        def select(self, rows):
            return lambda x, t: -x[:1].expand(3, -1)

    field = Paper(Forgetful(), PROFILE, tolerance=lambda t: 0.4, max_reuses=3)
    with pytest.raises(ValueError, match=r"`select` was asked for the field of 1 samples.*returned shape \(3, 3\)"):
        field.integrate(torch.stack([torch.ones(3), 1e-3 * torch.ones(3)]), torch.tensor([1.0, 0.9, 0.8, 0.7]))
