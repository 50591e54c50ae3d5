"""What goes in and comes out: requirements 14 to 17 of the cache."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sencache import CachedField, SensitivityProfile, rms
from solvers import grids
from tests.flows import Nonlinear, linear_flow

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
TS = grids.uniform(10)
PROFILE = SensitivityProfile(TS, torch.ones(11), torch.ones(11))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
UNEVEN = torch.tensor([[0.02], [0.3], [1.0]], dtype=torch.float64)  # how fast each sample moves
over_reuses = pytest.mark.parametrize("reuse", ["hold", "linear"])


class Split:
    """A field of which each sample is evaluated alone."""

    def __init__(self, field, speed=UNEVEN):
        self.field, self.speed = field, speed

    def __call__(self, x, t):
        return self.field(x, t) * self.speed.to(x)

    def select(self, rows):
        return Split(self.field, self.speed[rows])


def cached(field, **options):
    return Paper(field, **{"profile": PROFILE, "tolerance": 0.3, **options})


# requirement 14: what is stored is a copy, and nothing stored is handed out


@over_reuses
@pytest.mark.parametrize("split", [True, False])
def test_a_sampler_that_writes_in_place_gets_the_same_states(split, reuse):
    field = Split(Nonlinear()) if split else Nonlinear()
    tidy, untidy, x, z = cached(field, reuse=reuse), cached(field, reuse=reuse), X.clone(), X.clone()
    for t, t_next in pairwise(TS):
        v = tidy(x, t)
        tidy(x, t)
        x = x + (t_next - t) * v
        v = untidy(z, t)
        again = untidy(z, t)
        z += (t_next - t) * v
        for output in (v, again):
            output.fill_(torch.nan)
        assert torch.equal(x, z)
    assert untidy.report.reuses.any()
    assert (untidy.report.duplicates > 0).all()
    assert torch.equal(tidy.report.evaluations, untidy.report.evaluations)


def test_a_state_written_in_place_is_another_state_at_the_same_time_too():
    field, x = cached(Nonlinear(), tolerance=0), X.clone()
    for _ in range(3):
        assert torch.equal(field(x, 1.0), Nonlinear()(x, 1.0))
        x += 0.1
    assert field.report.duplicates.tolist() == [0, 0, 0]


@over_reuses
def test_a_field_that_writes_every_output_into_one_buffer_gets_the_same_states(reuse):
    buffer = torch.empty_like(X)

    def field(x, t):
        return buffer.copy_(Nonlinear()(x, t))

    plain, reusing = cached(Nonlinear(), reuse=reuse), cached(field, reuse=reuse)
    assert torch.equal(reusing.integrate(X, TS), plain.integrate(X, TS))
    assert reusing.report.reuses.any()


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_time_written_in_place_is_not_the_time_that_is_remembered(shape, dtype):
    field, t = cached(lambda x, t: -x), torch.ones(shape, dtype=dtype)
    for _ in range(5):
        field(X, t)
        t -= 0.1
    assert field.report.duplicates.tolist() == [0, 0, 0]
    assert [query.t[0].item() for query in field.report.trace] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


# requirement 15: detached storage; with gradients recorded everything passes through, with one warning


@pytest.mark.parametrize("what", ["state", "parameters", "conditioning"])
def test_gradients_pass_through_exactly_with_one_warning(what):
    x, weight, c = X.clone(), torch.full((6,), 0.7, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    wanted = {"state": x, "parameters": weight, "conditioning": c}[what].requires_grad_()

    def field(x, t, c):
        return torch.tanh(weight * x + c * t)

    def end(field):
        z = x
        for t, t_next in pairwise(TS):
            z = z + (t_next - t) * field(z, t, c)
        return z

    reusing = cached(field, tolerance=10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        result = end(reusing)
    assert [str(one.message).split(",")[0] for one in said] == ["Gradients are being recorded"]
    expected = end(field)
    assert torch.equal(result, expected)
    gradients = [torch.autograd.grad(y.square().sum(), wanted)[0] for y in (result, expected)]
    assert torch.equal(*gradients)
    assert (reusing.report.bypasses, reusing.report.reuses.tolist()) == (10, [0, 0, 0])
    with torch.no_grad():
        end(reusing)
    assert (reusing.report.reuses > 0).all()


def test_what_was_stored_before_gradients_were_recorded_is_not_used_after_it():
    field = cached(Nonlinear(), tolerance=10)
    field(X, 1.0)
    with pytest.warns(UserWarning, match="Gradients"):
        field(X.clone().requires_grad_(), 0.9)
    assert torch.equal(field(X, 0.8), Nonlinear()(X, 0.8))


@pytest.mark.parametrize("split", [True, False])
def test_parameters_that_ask_for_gradients_at_some_samples_only_are_passed_through_too(split):
    weight = torch.full((6,), 0.7, dtype=torch.float64, requires_grad=True)
    field = cached(Split(lambda x, t: weight * x) if split else lambda x, t: weight * x)
    with torch.no_grad():
        field(X, 1.0)
    with pytest.warns(UserWarning, match="Gradients"):
        v = field(X + 100 * (UNEVEN == 1), 0.9)
    assert v.requires_grad


def test_outputs_and_memory_are_detached():
    weight = torch.full((6,), 0.7, dtype=torch.float64, requires_grad=True)
    field = cached(lambda x, t: weight * x, tolerance=10)
    with torch.no_grad():
        assert not any(field(X, t).requires_grad for t in TS)


@over_reuses
@pytest.mark.parametrize("split", [True, False])
def test_a_run_may_begin_in_inference_mode_and_go_on_without(split, reuse):
    field = Split(Nonlinear()) if split else Nonlinear()
    plain, mixed, x, z = cached(field, reuse=reuse), cached(field, reuse=reuse), X, X
    for k, (t, t_next) in enumerate(pairwise(TS)):
        x = x + (t_next - t) * plain(x, t)
        with torch.inference_mode() if k in (0, 1, 2, 6) else torch.no_grad():
            z = z + (t_next - t) * mixed(z.clone(), t)
        assert torch.equal(x, z)
    assert mixed.report.reuses.any()


# requirement 16: the norms of half-precision states are taken in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_neither_overflow_nor_vanish(dtype):
    g = torch.Generator().manual_seed(0)
    for size in (300.0, 1e-4):  # squares of 9e4 and 1e-8: beyond float16 at both ends
        x = (size * torch.randn(2, 4, 32, 32, generator=g)).to(dtype)
        torch.testing.assert_close(rms(x).double(), x.double().flatten(1).square().mean(1).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("output", [torch.full((2, 64), 3e38), torch.full((2,), 3e38), torch.zeros(2, 0)])
def test_large_and_empty_outputs_are_reused_like_any(output):
    """Squares of theirs overflow, and means over nothing are NaN: neither says that an output is not finite."""
    field, x = cached(lambda x, t: (output.clone(), x), tolerance=1e9, max_reuses=99), torch.ones(2, 4)
    for t in TS:
        assert torch.equal(field(x, t)[0], output)
    assert [query.reused.all().item() for query in field.report.trace] == [False] + (len(TS) - 1) * [True]


def test_some_samples_keep_the_memory_format_of_all():
    """A field that views its rows as channels last must be able to."""
    x, seen = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), []

    class Splits:
        def __call__(self, x, t):
            seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return x

        def select(self, rows):
            return self

    field = cached(Splits(), tolerance=1e9, max_reuses=99)
    field(x, 1.0)
    moved = x.clone(memory_format=torch.preserve_format)
    moved[1] = torch.nan  # of one sample nothing is known
    field(moved, 0.9)
    assert seen == [(4, True), (1, True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_are_predicted_as_in_float64(dtype):
    profile = SensitivityProfile(TS, torch.ones(11), torch.zeros(11))
    field = cached(lambda x, t: -x, profile=profile, tolerance=1e9, max_reuses=99)
    states = [(1000 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)]
    for t in TS:
        assert field(states[-1], t).dtype == dtype
        states.append(states[-1] * 1.01)
    for x, query in zip(states[1:-1], field.report.trace[1:], strict=True):
        assert query.reused.all()
        true = (x.double() - states[0].double()).square().mean(1).sqrt()
        torch.testing.assert_close(query.predicted, true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("correct", [False, True])
@over_reuses
def test_every_precision_integrates_in_its_own(dtype, reuse, correct):
    field, reference = (cached(Nonlinear(), reuse=reuse, correct=correct) for _ in range(2))
    end, fine = field.integrate(X.to(dtype), TS), reference.integrate(X, TS)
    assert end.dtype == dtype
    assert field.report.reuses.any()
    torch.testing.assert_close(end.double(), fine, rtol=0, atol=0.1)


# requirement 17: lists, tuples and return_dict are kept


@dataclass
class Sample:
    sample: Any
    note: str = "kept"


class Pair(NamedTuple):
    v: Any
    variance: Any


@dataclass
class ModelOutput(OrderedDict):
    """A dataclass that is a dictionary too, as diffusers' outputs are."""

    sample: Any = None

    def __post_init__(self):
        self["sample"] = self.sample


Old = namedtuple("Old", "v")
KINDS = {
    "tensor": lambda v: v,
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "pair": lambda v: (v, 2 * v),
    "dict": lambda v: {"sample": v, "more": [v + 1, None]},
    "OrderedDict": lambda v: OrderedDict(sample=v),
    "dataclass": Sample,
    "NamedTuple": lambda v: Pair(v, v + 1),
    "namedtuple": Old,
    "model output": ModelOutput,
    "nested": lambda v: (Sample({"a": [v]}), "text", 3),
}


def shape_of(tree):
    """The containers of a tree, with tensors left out, and its tensors."""
    if isinstance(tree, Tensor):
        return "tensor", [tree]
    if isinstance(tree, Sample | ModelOutput):
        inner = vars(tree)
    elif isinstance(tree, dict):
        inner = tree
    elif isinstance(tree, list | tuple):
        inner = dict(enumerate(tree))
    else:
        return tree, []
    parts = {name: shape_of(part) for name, part in inner.items()}
    found = [tensor for _, tensors in parts.values() for tensor in tensors]
    return (type(tree), {name: kind for name, (kind, _) in parts.items()}), found


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@over_reuses
def test_the_container_of_the_output_is_kept(kind, split, reuse):
    """At evaluations, at reuses, at duplicates, and where some samples do the one and some the other."""

    class Boxed(Split):
        def __call__(self, x, t):
            return kind(super().__call__(x, t))

        def select(self, rows):
            return Boxed(self.field, self.speed[rows])

    def whole(x, t):
        return kind(Split(Nonlinear())(x, t))

    boxed = cached(Boxed(Nonlinear()) if split else whole, reuse=reuse)
    plain, x = cached(Split(Nonlinear()), reuse=reuse), X
    for t, t_next in pairwise(TS):
        v, output = plain(x, t), boxed(x, t)
        for out in (output, boxed(x, t)):
            (form, tensors), (expected, values) = shape_of(out), shape_of(kind(v))
            assert form == expected
            torch.testing.assert_close(tensors, values, rtol=1e-12, atol=1e-12)
        x = x + (t_next - t) * v
    reused = torch.stack([query.reused for query in boxed.report.trace])
    assert (reused.any(1) & ~reused.all(1)).any()


@pytest.mark.parametrize("container", [tuple, list])
def test_a_state_in_parts_decides_as_the_whole_does(container):
    flow = linear_flow()
    whole = cached(flow, tolerance=1)

    def apart(x, t):
        return container(flow(torch.cat([x[0], x[1]], 1), t).split([4, 2], 1))

    parts, x, z = cached(apart, tolerance=1), X, container(X.split([4, 2], 1))
    for t, t_next in pairwise(TS):
        x = x + (t_next - t) * whole(x, t)
        v = parts(z, t)
        assert type(v) is container
        z = container(part + (t_next - t) * rate for part, rate in zip(z, v, strict=True))
        torch.testing.assert_close(torch.cat(list(z), 1), x, rtol=1e-12, atol=1e-12)
    for a, b in zip(whole.report.trace, parts.report.trace, strict=True):
        assert torch.equal(a.reused, b.reused)
        torch.testing.assert_close(a.predicted, b.predicted, rtol=1e-9, atol=0)
    assert parts.report.reuses.any()


def test_a_state_of_one_number_a_sample_is_a_state():
    field = cached(Nonlinear())
    end = field.integrate(X[:, 0], TS)
    assert torch.equal(end[:, None], cached(Nonlinear()).integrate(X[:, :1], TS))
    assert field.report.reuses.any()


def decay(x, t):
    return -x


def test_a_norm_may_have_parameters_of_its_own():
    weights = torch.ones(6, dtype=X.dtype, requires_grad=True)
    plain, weighed = (
        CachedField(decay, tolerance=0.05),
        CachedField(decay, tolerance=0.05, norm=lambda d: rms(d * weights)),
    )
    for t in grids.uniform(10):
        assert torch.equal(plain(X * t, t), weighed(X * t, t))
    assert weighed.report.reuses.all()


def test_complex_states_are_states():
    cached = CachedField(decay, tolerance=0.05)
    x = X.to(torch.complex128)
    for t in grids.uniform(10):
        assert cached(x * t, t).dtype == x.dtype
    assert cached.report.reuses.all()
