"""What is remembered, under which key, and for how long: requirements 1 to 6 of the cache."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from sencache import CachedField, SensitivityProfile, calibrate, strict_start
from solvers import BrownianPath, EulerMaruyama, Linear, grids
from tests.flows import linear_flow

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
TS = grids.uniform(10)
PROFILE = SensitivityProfile(TS, torch.ones(11), torch.ones(11))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def guided(x, t, c=0.0):
    return linear_flow()(x, t) + c


def steered(x, t, *args, **kwargs):
    """The sum of the tensors called `plus`, less those called `minus`, wherever they are."""
    return x + found([*args, kwargs], "plus") - found([*args, kwargs], "minus")


def found(tree, name):
    if isinstance(tree, dict):
        return sum(value if key == name else found(value, name) for key, value in tree.items())
    return sum(found(part, name) for part in tree) if isinstance(tree, list | tuple) else 0


def cached(field=guided, **options):
    return Paper(field, PROFILE, **{"tolerance": 0.5, **options})


def walk(field, x=X, *cond, ts=TS):
    """A loop as other people write it: the outputs on the way, and the state at the end."""
    outputs = []
    for t, t_next in pairwise(ts):
        outputs.append(field(x, t, *cond))
        x = x + (t_next - t) * outputs[-1]
    return torch.stack([*outputs, x])


# requirement 1: the key is the conditioning's identity, of a reference that is kept, or the caller's own


def test_the_same_tensor_is_the_same_conditioning():
    field, c = cached(), torch.ones(6)
    field(X, 1.0, c)
    field(X, 1.0, c)
    assert field.report.duplicates.tolist() == [1, 1, 1]


def test_an_equal_tensor_is_another_conditioning():
    field, c = cached(), torch.ones(6)
    field(X, 1.0, c)
    field(X, 1.0, c.clone())
    assert field.report.evaluations.tolist() == [2, 2, 2]
    assert [query.branch for query in field.report.trace] == [0, 1]


def test_a_conditioning_that_was_written_to_is_another():
    field, c = cached(), torch.ones(6)
    field(X, 1.0, c)
    c.add_(1)
    assert torch.equal(field(X, 1.0, c), guided(X, 1.0, c))


def test_in_inference_mode_too_a_conditioning_that_was_written_to_is_another():
    field = cached()
    with torch.inference_mode():
        c = torch.ones(6)  # a tensor that counts no versions
        field(X, 1.0, c)
        c.add_(1)
        assert torch.equal(field(X, 1.0, c), guided(X, 1.0, c))


def test_an_array_that_was_written_to_is_another_conditioning_and_one_that_was_not_is_the_same():
    field, c = cached(lambda x, t, c: guided(x, t, torch.from_numpy(c))), np.ones(6)
    field(X, 1.0, c)
    field(X, 1.0, c)
    assert field.report.duplicates.tolist() == [1, 1, 1]
    c += 1
    assert torch.equal(field(X, 1.0, c), guided(X, 1.0, torch.from_numpy(c)))


def test_a_tensor_that_was_written_to_through_an_array_is_another_conditioning():
    field, array = cached(), np.ones(6)
    c = torch.from_numpy(array)
    field(X, 1.0, c)
    array += 1  # counts no version of the tensor
    assert torch.equal(field(X, 1.0, c), guided(X, 1.0, c))


def test_a_freed_address_that_is_used_again_is_never_mistaken_for_the_tensor_it_held():
    field = cached()
    for k in range(8):
        c = torch.full((6,), float(k))
        assert torch.equal(field(X, 1.0, c), guided(X, 1.0, c))
        del c


P, M = torch.tensor(2.0), torch.tensor(3.0)
OTHERS = {
    "keywords": (((), {"plus": P}), ((), {"minus": P})),
    "a keyword and a position": ((({"plus": P},), {}), ((), {"plus": P})),
    "swapped keywords": (((), {"plus": P, "minus": M}), ((), {"minus": P, "plus": M})),
    "keys of a nested dict": (((), {"cond": {"plus": P}}), ((), {"cond": {"minus": P}})),
    "swapped keys of a dict": ((({"plus": P, "minus": M},), {}), (({"minus": P, "plus": M},), {})),
    "numbers": (((), {"plus": 1.0}), ((), {"plus": 2.0})),
    "None": (((), {"plus": P, "mask": None}), ((), {"plus": P})),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS)
def test_conditionings_that_differ_in_what_is_called_what_are_told_apart(one, other):
    field = cached(steered)
    for args, kwargs in (one, other):
        assert torch.equal(field(X, 1.0, *args, **kwargs), steered(X, 1.0, *args, **kwargs))
    assert field.report.trace[1].branch == 1


def test_containers_and_strings_are_compared_by_what_they_hold():
    field = cached(steered)
    field(X, 1.0, {"cond": [P, "text"]}, plus=M, guidance=7.5)
    field(X, 1.0, {"cond": [P, "te" + "xt"]}, guidance=7.5, plus=M)
    assert field.report.duplicates.tolist() == [1, 1, 1]


def test_a_key_of_ones_own_decides_what_is_the_same():
    field = cached(lambda x, t, c, uuid: guided(x, t, c), key=lambda args, kwargs: kwargs["uuid"])
    field(X, 1.0, torch.ones(6), uuid="cond")
    field(X, 1.0, torch.ones(6), uuid="cond")
    field(X, 1.0, torch.zeros(6), uuid="uncond")
    assert [query.branch for query in field.report.trace] == [0, 0, 1]
    assert field.report.duplicates.tolist() == [1, 1, 1]


def test_a_new_conditioning_tensor_at_every_step_is_evaluated_and_said():
    field, t = cached(), iter(TS)
    for _ in range(8):
        field(X, next(t), torch.ones(6))
    with pytest.warns(UserWarning, match="More than 8 conditionings.*`key=`"):
        field(X, next(t), torch.ones(6))
    assert not field.report.reuses.any()


# requirement 2: equal (x, t) with other conditioning never shares an output


def test_guidance_in_two_calls_is_two_runs_that_do_not_meet():
    field, c, none = cached(), torch.ones(6), torch.zeros(6)
    outputs, x = [], X
    for t, t_next in pairwise(TS):
        v, v_none = field(x, t, c), field(x, t, none)  # bit-identical x and t, as diffusers' Wan calls them
        assert not torch.equal(v, v_none)
        outputs.append((x, v, v_none))
        x = x + (t_next - t) * (v_none + 2 * (v - v_none))
    assert (field.report.reuses > 0).all()
    for which, cond in ((1, c), (2, none)):
        alone = cached()
        for t, output in zip(TS, outputs, strict=False):
            assert torch.equal(alone(output[0], t, cond), output[which])


# requirement 3: no parity counters


@pytest.mark.parametrize("pattern", ["ab", "ba", "a", "aab", "abb", "abba", "aaabb"])
def test_no_order_of_the_branches_matters(pattern):
    field, conds = cached(), {"a": torch.ones(6), "b": torch.zeros(6)}
    alone = {name: cached() for name in conds}
    for k, t in enumerate(TS):
        order = pattern if k < 4 else "a" if k < 7 else "ba"  # the pattern, then one branch drops out and returns
        for name in order:
            x = X * (1 - 0.05 * k)
            assert torch.equal(field(x, t, conds[name]), alone[name](x, t, conds[name]))


# requirement 4: reset, a scope that clears on exceptions, and automatic reset


class Breaks:
    """A field that raises at one of its evaluations."""

    def __init__(self, at=None):
        self.at = at

    def __call__(self, x, t, c=0.0):
        if self.at == 0:
            self.at = None
            raise RuntimeError("out of memory")
        self.at = None if self.at is None else self.at - 1
        return guided(x, t, c)


def test_reset_forgets_and_begins_a_new_report():
    field = cached()
    first = walk(field)
    field.reset()
    assert len(field.report.trace) == 0
    assert torch.equal(walk(field), first)
    assert torch.equal(field.report.queries, torch.full((3,), 10))


@pytest.mark.parametrize("begin", ["integrate", "scope", "reset", "restart"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("mode", [{}, {"reuse": "linear", "correct": True}], ids=["to the letter", "corrected"])
def test_after_an_exception_in_the_field_a_fresh_run_is_bit_equal(begin, at, mode):
    field, fresh = cached(Breaks(at), **mode), cached(**mode)

    def run(field):
        if begin == "integrate":
            return field.integrate(X, TS)
        if begin == "scope":
            with field.run():
                return walk(field)
        return walk(field)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(field)
    if begin == "reset":
        field.reset()
    assert torch.equal(run(field), run(fresh))
    assert begin == "restart" or torch.equal(field.report.evaluations, fresh.report.evaluations)


def test_an_exception_between_two_shapes_leaves_a_memory_that_works():
    breaks = Breaks()
    field = cached(breaks)
    field(X, 1.0)
    field(0.99 * X, 0.9)
    breaks.at = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        field(X[:2], 0.8)
    torch.testing.assert_close(field(0.98 * X, 0.8), guided(0.98 * X, 0.8), rtol=0, atol=0.5)


def test_time_that_runs_backwards_is_a_new_run():
    field, fresh = cached(max_reuses=100), cached(max_reuses=100)
    walk(field)
    assert torch.equal(walk(field, Y), walk(fresh, Y))
    assert field.report.resets == 1
    assert torch.equal(field.report.trace[10].reused, torch.zeros(3, dtype=torch.bool))


def test_another_state_at_the_first_time_is_a_new_run():
    """After one that was given up there, or where a run has only one step."""
    field = cached(tolerance=100)
    field(X, 1.0)
    assert torch.equal(field(Y, 1.0), guided(Y, 1.0))
    assert field.report.resets == 1
    assert torch.equal(field(Y, 1.0), guided(Y, 1.0))
    assert field.report.resets == 1
    assert field.report.trace[2].duplicate.all()
    field(0.99 * Y, 0.9)
    assert field.report.trace[3].reused.all()
    field(0.98 * Y, 0.9)  # as a stepper of several stages asks
    assert field.report.trace[4].reused.all()


OTHER_STATES = {"batch": X[:2], "shape": X.reshape(3, 2, 3), "dtype": X.float()}


@pytest.mark.parametrize("other", OTHER_STATES.values(), ids=OTHER_STATES)
def test_another_shape_or_dtype_is_a_new_run(other):
    field, fresh = cached(lambda x, t: -x, tolerance=100), cached(lambda x, t: -x, tolerance=100)
    field(X, 1.0)
    field(X, 0.9)
    assert torch.equal(walk(field, other), walk(fresh, other))
    assert field.report.resets == 1


def test_another_number_of_times_is_a_new_run():
    """One time for all samples, then one a token, as when an image-to-video pipeline follows a text-to-video one."""
    field = cached(lambda x, t: -x)
    field(X, 1.0)
    x, tokens = 2 * X, torch.tensor([[0.9, 0.0]]).expand(3, 2)
    assert torch.equal(field(x, tokens), -x)


@pytest.mark.gpu
def test_another_device_is_a_new_run():
    field = cached(lambda x, t: -x)
    field(X, 1.0)
    assert torch.equal(field(X.cuda(), 0.9), -X.cuda())
    assert field.report.resets == 1


# requirement 5: two interleaved or threaded runs do not mix


def test_two_interleaved_runs_do_not_mix():
    field = cached()
    with field.run() as one, field.run() as other:
        x, y = [X], [Y]
        for t, t_next in pairwise(TS):
            x.append(x[-1] + (t_next - t) * one(x[-1], t))
            y.append(y[-1] + (t_next - t) * other(y[-1], t))
    assert torch.equal(x[-1], cached().integrate(X, TS))
    assert torch.equal(y[-1], cached().integrate(Y, TS))
    assert one.report is not other.report


def test_a_run_inside_a_run_leaves_it_alone():
    field, outputs, x = cached(), [], X
    with field.run():
        for t, t_next in pairwise(TS):
            field.integrate(Y, TS)
            outputs.append(field(x, t))
            x = x + (t_next - t) * outputs[-1]
    assert torch.equal(x, cached().integrate(X, TS))


def test_threads_do_not_mix():
    states = [X + k for k in range(6)]
    alone = [(walk(cached(), x), count(x)) for x in states]
    field, found, together = cached(), {}, threading.Barrier(6)

    def work(k):
        together.wait()
        for _ in range(3):
            field.reset()
            found[k] = walk(field, states[k]), field.report.evaluations

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, (outputs, evaluations) in enumerate(alone):
        assert torch.equal(found[k][0], outputs)
        assert torch.equal(found[k][1], evaluations)


def count(x):
    field = cached()
    walk(field, x)
    return field.report.evaluations


# requirement 6: nothing is held after a run


@pytest.mark.parametrize("correct", [True, False])
def test_no_stepper_s_noise_is_held_after_a_run(correct):
    field, ts = lambda x, t: -x, torch.linspace(0.95, 0.05, 13, dtype=torch.float64)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cached, gone = None, []
    for _ in range(3):
        noise = BrownianPath(x, ts, torch.Generator().manual_seed(1))
        stepper = EulerMaruyama(Linear(), noise)
        cached = cached or CachedField(field, calibrate(field, x, ts, stepper, progress=False), nfe=6, correct=correct)
        with torch.no_grad():
            cached.integrate(x, ts, stepper)
        gone.append(weakref.ref(noise))
        del noise, stepper
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def held(shape):
    gc.collect()
    return sum(type(thing) is torch.Tensor and thing.shape == shape for thing in gc.get_objects())


@pytest.mark.parametrize("mode", [{}, {"reuse": "linear", "correct": True}], ids=["to the letter", "corrected"])
@pytest.mark.parametrize("how", ["integrate", "scope", "exception", "reset", "gradients"])
def test_nothing_is_held_after_a_run(how, mode):
    breaks = Breaks(3 if how == "exception" else None)
    field, x = cached(breaks, **mode), torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).flatten(1)
    before, c = held(x.shape), torch.zeros(35)
    gone = weakref.ref(c)
    field.field = lambda x, t, c=0.0: breaks(torch.zeros(2, 6), t).sum(1, keepdim=True) + c + x
    if how == "integrate":
        field.integrate(x, TS)
    elif how in ("scope", "exception"):
        try:
            with field.run() as run:
                walk(run, x, c)
        except RuntimeError:
            pass
    else:
        field(x, 1.0, c)
        assert held(x.shape) > before
        if how == "reset":
            field.reset()
        else:
            with pytest.warns(UserWarning, match="Gradients"):
                field(x.requires_grad_(), 0.9, c)
            x = x.detach()
    del c
    assert held(x.shape) <= before
    assert gone() is None
    assert field.report.trace or how == "reset"


# copies of a cached field


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda field: pickle.loads(pickle.dumps(field))])
def test_a_copy_has_the_rule_and_a_memory_of_its_own(clone):
    field = Paper(linear_flow(), PROFILE, tolerance=0.5, max_reuses=2)
    field(X, 1.0)
    other = clone(field)
    assert (other.tolerance, other.max_reuses) == (0.5, 2)
    other(X, 1.0)
    assert other.report.evaluations.tolist() == [1, 1, 1]
    assert torch.equal(other.integrate(Y, TS), field.integrate(Y, TS))
    field.reset()
    assert len(other.report.trace) == 10


def test_a_cached_field_with_a_strict_start_can_be_sent_to_another_process():
    field = Paper(linear_flow(), PROFILE, tolerance=strict_start(TS, 0.5), max_reuses=2)
    other = pickle.loads(pickle.dumps(field))
    assert torch.equal(other.integrate(Y, TS), field.integrate(Y, TS))
    assert field.report.reuses.any()
