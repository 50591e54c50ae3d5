"""Every host alike: nothing reused is nothing changed, runs do not feel each other, what is paid is what was said."""

from __future__ import annotations

import pytest
import torch

from tests.hosts import HOSTS

pytestmark = pytest.mark.parametrize("host", HOSTS, ids=str)
torch.set_grad_enabled(False)


def cached(host, model=None, **options):
    options = options or dict(nfe=host.queries // 2)
    with host.wrap(model or host.model, host.profile, **options) as wrapped:
        return host.sample(wrapped), wrapped.report


def test_at_tolerance_0_it_is_the_bare_host_bit_by_bit(host):
    x, report = cached(host, tolerance=0.0)
    assert torch.equal(x, host.sample(host.model))
    assert not report.reuses.any()
