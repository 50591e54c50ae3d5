"""Every host alike: nothing reused is nothing changed, runs do not feel each other, what is paid is what was said."""

from __future__ import annotations

import threading

import pytest
import torch

from sencache import rms
from tests.hosts import HOSTS

over_hosts = pytest.mark.parametrize("host", HOSTS, ids=str)
ASTRAY = ("k-diffusion dpmpp_2m_sde", "SciPy RK45", "torchsde srk")  # where no line can be drawn, as the docs say


@pytest.fixture(autouse=True)
def sampling():
    with torch.no_grad():
        yield


def cached(host, model=None, between=None, **options):
    """The sample and the report; `between(wrapped)` stands between the sampler and the wrapped model."""
    options = options or dict(nfe=host.queries // 2)
    with host.wrap(model or host.model, host.profile, **options) as wrapped:
        return host.sample(between(wrapped) if between else wrapped), wrapped.report


def in_between(host, wrapped, call):
    """The wrapped model with `call(inner, *args)` in its place, in the host's own shape."""
    if host.name.startswith("torchsde"):
        sde = type(host.model)()
        sde.f = lambda t, y: call(wrapped.f, t, y)
        return sde
    return lambda *args, **kwargs: call(wrapped, *args, **kwargs)


@over_hosts
def test_at_tolerance_0_it_is_the_bare_host_bit_by_bit(host):
    x, report = cached(host, tolerance=0.0)
    assert torch.equal(x, host.sample(host.model))
    assert not report.reuses.any()


@over_hosts
def test_what_is_paid_is_what_was_said(host):
    _, report = cached(host)
    if not any(name in host.name for name in ("srk", "singlestep 3")):  # which ask elsewhere than at the grid's times
        assert (report.evaluations == host.queries // 2).all()
    assert (report.evaluations < report.queries).all()


@over_hosts
def test_a_second_run_and_one_after_an_exception_are_as_the_first(host):
    first, report = cached(host)
    calls = 0

    def failing(inner, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with host.wrap(host.model, host.profile, nfe=host.queries // 2) as wrapped, pytest.raises(KeyboardInterrupt):
        host.sample(in_between(host, wrapped, failing))
    second, again = cached(host)
    assert torch.equal(first, second)
    assert torch.equal(report.evaluations, again.evaluations)


@over_hosts
def test_a_second_trajectory_in_one_scope_is_as_the_first(host):
    with host.wrap(host.model, host.profile, nfe=host.queries // 2) as wrapped:
        assert torch.equal(host.sample(wrapped), host.sample(wrapped))


@over_hosts
def test_two_runs_at_once_are_as_two_alone(host):
    """A second trajectory, of another tolerance, is sampled whole inside every third call of the first."""
    alone, other = cached(host)[0], cached(host, tolerance=0.05)[0]
    calls, inner_samples = 0, []

    def interleaved(inner, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (4, 7):
            inner_samples.append(cached(host, tolerance=0.05)[0])
        return inner(*args, **kwargs)

    outer, _ = cached(host, between=lambda wrapped: in_between(host, wrapped, interleaved))
    assert torch.equal(outer, alone)
    assert len(inner_samples) == 2
    assert all(torch.equal(sample, other) for sample in inner_samples)


@pytest.mark.parametrize("host", [h for h in HOSTS if h.name in ("k-diffusion euler", "torchdiffeq rk4")], ids=str)
def test_two_threads_are_as_one_after_the_other(host):
    found: dict[int, torch.Tensor] = {}
    barrier, budgets = threading.Barrier(2), {0: host.queries // 2, 1: host.queries // 3}

    def in_step(inner, *args, **kwargs):
        barrier.wait(timeout=60)
        return inner(*args, **kwargs)

    def work(number):
        with torch.no_grad():
            found[number], _ = cached(host, between=lambda w: in_between(host, w, in_step), nfe=budgets[number])

    threads = [threading.Thread(target=work, args=[number]) for number in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, nfe in budgets.items():
        assert torch.equal(found[number], cached(host, nfe=nfe)[0])


@over_hosts
def test_what_is_handed_out_may_be_written_to(host):
    def careless(inner, *args, **kwargs):
        y = inner(*args, **kwargs)
        mine = y.copy() if hasattr(y, "copy") else y.clone()
        y.fill(9.0) if hasattr(y, "fill") else y.fill_(9.0)
        return mine

    for options in ({}, dict(tolerance=0.05)):
        careful, _ = cached(host, **options)
        careless_one, _ = cached(host, between=lambda wrapped: in_between(host, wrapped, careless), **options)
        assert torch.equal(careful, careless_one)


@over_hosts
def test_no_random_number_is_drawn_and_nothing_is_held_after_the_scope(host):
    state = torch.get_rng_state()
    with host.wrap(host.model, host.profile, nfe=host.queries // 2) as wrapped:
        run = wrapped._calls.run
        host.sample(wrapped)
    assert torch.equal(torch.get_rng_state(), state)
    assert (run.branches.known, run.ledger) == ([], None)
    with pytest.raises(RuntimeError, match="scope of this wrapper has ended"):
        host.sample(wrapped)


@pytest.mark.parametrize("host", [h for h in HOSTS if h.name not in ASTRAY], ids=str)
def test_reused_outputs_are_better_continued_than_held(host):
    full = host.sample(host.model)
    line, _ = cached(host, nfe=host.queries // 2, correct=False)
    hold, _ = cached(host, nfe=host.queries // 2, reuse="hold")
    best = cached(host, nfe=host.queries // 2, correct=True)[0] if host.folds else line
    assert rms(best - full).median() < 0.9 * rms(hold - full).median()


@pytest.mark.parametrize("host", [h for h in HOSTS if h.folds], ids=str)
def test_where_a_step_uses_one_output_what_a_gap_owed_is_repaid(host):
    full = host.sample(host.model)
    folded, _ = cached(host, nfe=host.queries // 2, correct=True)
    plain, _ = cached(host, nfe=host.queries // 2, correct=False)
    assert rms(folded - full).median() < 0.75 * rms(plain - full).median()


@over_hosts
def test_options_are_those_of_a_cached_field_and_wrong_ones_are_refused(host):
    with pytest.raises(ValueError, match="in one way"), host.wrap(host.model, host.profile, nfe=3, tolerance=0.1):
        pass
    with pytest.raises(ValueError, match="Without a profile"), host.wrap(host.model, None, nfe=3):
        pass
