"""The ComfyUI node against ComfyUI's call shapes: conditionings by uuid, batches that split, interrupts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sencache import calibrate, rms
from sencache.plugins.comfyui.node import Cache, SenCache
from solvers import Linear, grids
from tests import comfy_shapes as comfy
from tests.flows import GaussianFlow

STD = torch.linspace(0.2, 0.9, 32, dtype=torch.float64).reshape(2, 4, 4)
FLOW = GaussianFlow(Linear(), 0.0, STD)
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONTEXTS = {
    name: torch.linspace(low, 1, 32, dtype=torch.float64).reshape(2, 4, 4)
    for name, low in (("cond", -1), ("uncond", 0.4))
}
TS = grids.uniform(20, start=0.98)
EULER = comfy.sampler(comfy.sample_euler)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    comfy.installed(monkeypatch)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "flow.safetensors"
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    calibrate(GaussianFlow(Linear(), CONTEXTS["cond"], STD), x, TS, progress=False).save(file)
    return str(file)


def guider(sampling=None, model=None, cfg=2.0, **more):
    model = model or comfy.Model(comfy.Network(FLOW, sampling or comfy.CONST()))
    return comfy.Guider(model, CONTEXTS, cfg, **more)


def sigmas(sampling=None):
    return TS if sampling is None or isinstance(sampling, comfy.CONST) else TS / (1 - TS)


def patched(model, nfe=0, tolerance=0.02, profile=""):
    return SenCache().patch(model, nfe, tolerance, profile)[0]


KINDS = [comfy.CONST(), comfy.EPS(), comfy.V_PREDICTION()]


@pytest.mark.parametrize("sampling", KINDS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("split", ["together", "apart", "flipping"])
def test_at_tolerance_0_it_is_the_bare_model_bit_by_bit(sampling, split):
    together = {"together": lambda step: True, "apart": lambda step: False, "flipping": lambda step: step % 3 > 0}
    bare = guider(sampling)
    bare.together = together[split]
    full = bare.sample(NOISE, EULER, sigmas(sampling))
    cached = guider(model=patched(bare.model_patcher, tolerance=0.0))
    cached.together = bare.together
    assert torch.equal(cached.sample(NOISE, EULER, sigmas(sampling)), full)


@pytest.mark.parametrize("sampling", KINDS, ids=lambda s: type(s).__name__)
def test_a_budget_is_kept_and_repaid_and_close(sampling, profile):
    bare = guider(sampling)
    full = bare.sample(NOISE, EULER, sigmas(sampling))
    network = bare.model_patcher.network
    network.calls = 0
    one = guider(model=patched(bare.model_patcher, nfe=10, profile=profile))
    close = one.sample(NOISE, EULER, sigmas(sampling))
    assert network.calls == 10
    unknown = comfy.sampler(lambda *args: comfy.sample_euler(*args))  # a sampler of which nothing is known
    plain = guider(model=patched(bare.model_patcher, nfe=10, profile=profile)).sample(NOISE, unknown, sigmas(sampling))
    fewer = bare.sample(NOISE, EULER, sigmas(sampling)[::2])
    assert rms(close - full).max() < 0.75 * rms(plain - full).max()
    assert rms(plain - full).max() < 0.2 * rms(fewer - full).max()


@pytest.mark.parametrize("split", [True, False])
def test_a_tolerance_pays_for_all_conditionings_at_once_and_is_ahead_of_fewer_steps(split):
    """One call computes all that is stacked in it: what one of them needs, all of them have."""
    bare = guider(cfg=3.0)
    bare.together = lambda step: not split
    network, ts, rows = bare.model_patcher.network, grids.uniform(40, start=0.98), 2 * len(NOISE)
    full = bare.sample(NOISE, EULER, ts)
    for tolerance in (0.05, 0.02, 0.005):
        network.rows, model = 0, patched(bare.model_patcher, tolerance=tolerance)
        cached = guider(model=model, cfg=3.0)
        cached.together = bare.together
        close, report = cached.sample(NOISE, EULER, ts), _report(model)
        assert network.rows == int(report.evaluations.sum())
        assert not report.unused.any()
        assert network.rows < 30 * rows
        fewer = bare.sample(NOISE, EULER, grids.uniform(network.rows // rows, start=0.98))
        assert rms(close - full).median() < rms(fewer - full).median() / 3


def test_conditionings_are_known_by_their_uuids_when_the_batch_is_split_otherwise(profile):
    whole, flipping = (guider(cfg=3.0) for _ in range(2))
    model = patched(whole.model_patcher, nfe=10, profile=profile)
    whole.model_patcher = flipping.model_patcher = model
    flipping.together = lambda step: step % 3 == 0
    a, b = (g.sample(NOISE, EULER, TS) for g in (whole, flipping))
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_run_after_an_interrupt_and_a_second_one_are_as_the_first(profile):
    bare = guider()
    model = patched(bare.model_patcher, nfe=10, profile=profile)
    first = guider(model=model).sample(NOISE, EULER, TS)
    stopped = guider(model=model)
    stopped.interrupt_at = 7
    with pytest.raises(comfy.InterruptProcessingException):
        stopped.sample(NOISE, EULER, TS)
    cache = model.wrappers["outer_sample"]["sencache"][0].__self__
    assert isinstance(cache, Cache)
    assert cache.scopes == []
    assert torch.equal(guider(model=model).sample(NOISE, EULER, TS), first)


def test_the_model_that_came_in_stays_as_it_was_and_a_second_node_replaces_the_first(profile):
    model = guider().model_patcher
    twice = patched(patched(model, nfe=5, profile=profile), tolerance=0.0)
    assert model.wrappers == {}
    assert all(len(keyed["sencache"]) == 1 for keyed in twice.wrappers.values())
    full = guider(model=model).sample(NOISE, EULER, TS)
    assert torch.equal(guider(model=twice).sample(NOISE, EULER, TS), full)


def test_static_channels_do_not_dilute_what_is_measured():
    model = guider().model_patcher
    runs = {}
    for static in (0, 2):
        patch = patched(model, tolerance=0.004)
        runs[static] = guider(model=patch, static=static).sample(NOISE, EULER, TS), _report(patch)
    assert torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1].evaluations, runs[2][1].evaluations)
    assert 4 < runs[0][1].evaluations.max() < 40


def _report(model):
    return model.wrappers["outer_sample"]["sencache"][0].__self__.report


def test_windows_of_one_conditioning_are_told_apart():
    cache = Cache(None, 0, 0.5)
    network = guider().model_patcher.network
    x = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 2, 1, 1).double()
    seen = []

    def executor(x, timesteps, options):
        seen.append(options["context_window"].index_list)
        return x * 0 + options["context_window"].index_list[0]

    with cache._scope(NOISE, EULER, TS, network.sampling):
        for sigma in TS[:6]:
            for first in (3, 8):
                window = type("Window", (), {"index_list": [first, first + 1]})
                options = dict(uuids=["a"], sigmas=sigma.expand(2), context_window=window)
                assert (cache.predict(executor, x, sigma.expand(2), options) == first).all()
    assert len(seen) < 12


def test_outside_of_a_sampling_the_model_is_called_as_ever():
    cache = Cache(None, 0, 0.5)
    assert cache.predict(lambda *args: "bare", NOISE, None, {"uuids": ["a"]}) == "bare"


HALF = type("Half", (comfy.EPS,), {"sigma_data": 0.5})()


@pytest.mark.parametrize("sampling", [comfy.EDM(), HALF], ids=["EDM", "Half"])
def test_a_model_of_another_kind_is_refused(sampling):
    with pytest.raises(ValueError, match="SenCache knows the models of"):
        guider(model=patched(guider(sampling).model_patcher)).sample(NOISE, EULER, TS)


def test_what_cannot_work_is_refused(profile):
    with pytest.raises(ValueError, match="comparing outputs"):
        guider(model=patched(guider().model_patcher)).sample(NOISE, comfy.sampler(comfy.dpm_adaptive_function), TS)
    with pytest.raises(ValueError, match="needs a profile"):
        patched(guider().model_patcher, nfe=5)


def test_the_folder_loads_as_a_custom_node(monkeypatch):
    folder = Path(__file__).parents[1] / "sencache/plugins/comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom", module)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "custom.node")
    (node,) = module.NODE_CLASS_MAPPINGS.values()
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    required = node.INPUT_TYPES()["required"]
    assert list(required) == ["model", "nfe", "tolerance", "profile"]
    assert (node.RETURN_TYPES, callable(getattr(node(), node.FUNCTION))) == (("MODEL",), True)
