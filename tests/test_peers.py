"""Other people's caches in our loop: they skip, they are counted, and nothing of them stays or leaks."""

import math
from functools import cache
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from benchmarks import installed, peers
from benchmarks.fields import video
from benchmarks.multiplications import Multiplications
from solvers import DPMSolverPP, Euler, grids, integrate

STEPS, GUIDANCE = 9, 3.0
TS, SCENE = grids.uniform(STEPS), torch.tensor([3])
HEADS = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
SMALL = {"wan": {"ffn_dim": 64}, "ltx": {"cross_attention_dim": 32}, "cogvideox": {}}
NAMED = {peer.name: peer for peer in peers.PEERS}
ALL = [(peer.name, family) for peer in peers.PEERS for family in peer.families]
SPARSE = {  # where there is no knob
    "TaylorSeer": {"cache_interval": 3, "disable_cache_before_step": 3},
    "TaylorSeer lite": {"cache_interval": 3, "disable_cache_before_step": 3, "use_lite_mode": True},
    "PAB": {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2},
    "FasterCache": {"unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": (-1, 781)},
}
CAUTIOUS = {
    "TaylorSeer": {"cache_interval": 1},
    "TaylorSeer lite": {"cache_interval": 1, "use_lite_mode": True},
    "PAB": {"spatial_attention_block_skip_range": 1, "cross_attention_block_skip_range": 1},
    "FasterCache": {"unconditional_batch_skip_range": 1, "unconditional_batch_timestep_skip_range": (-1, 781)},
}
every = pytest.mark.parametrize(("name", "family"), ALL)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@cache
def model(family):
    """A tiny model of the family, with weights under which both the prompt and the blocks matter."""
    kind, config = video.CLASSES[family]
    small = getattr(video.diffusers, kind)(**{**config, **HEADS, **SMALL[family]}).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for parameter in small.parameters():
        scale = 0.5 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
    return small


def noise(family):
    return video.packed(family, torch.randn(len(SCENE), *video.SHAPE, generator=torch.Generator().manual_seed(2)))


def task(family, guidance=GUIDANCE):
    return peers.Task(family, model(family), SCENE, noise(family), TS, Euler(), guidance)


@cache
def plain(family, guidance=GUIDANCE):
    """What the sampler does without any cache."""
    return integrate(video.field(family, model(family), SCENE, guidance), noise(family), TS)


@cache
def ratios(family):
    return peers.mag_ratios(NAMED["MagCache"], task(family))


def sparse(name, family):
    """A setting that skips a good deal."""
    peer = NAMED[name]
    if peer.knob is None:
        return SPARSE[name]
    more = ratios(family) if peer.calibrated else {}
    more |= {"max_warmup_steps": 3} if name.startswith("DBCache") else {}
    return {**peer.settings[0], **more, peer.knob: 1e3}


def cautious(name, family):
    peer = NAMED[name]
    more = ratios(family) if peer.calibrated else {}
    return {**peer.settings[0], **more, peer.knob: 1e-12} if peer.knob else CAUTIOUS[name]


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


def contrasts(peer, setting, family):
    """How far what is served as "cond" is from what is served as "uncond", at every step."""
    outputs, call = [], installed.Loop.__call__

    def recording(loop, **given):
        output = call(loop, **given)
        outputs.extend([output[0]] if loop.separate else output[0].chunk(2))
        return output

    with mock.patch.object(installed.Loop, "__call__", recording):
        peers.sample(peer, setting, task(family))
    assert len(outputs) == 2 * STEPS
    return torch.tensor([distance(cond, uncond) for cond, uncond in zip(outputs[::2], outputs[1::2], strict=True)])


@cache
def plain_contrasts(family):
    return contrasts(NAMED["PAB"], cautious("PAB", family), family)


@every
def test_the_most_cautious_setting_is_the_plain_run(name, family):
    end, spent = peers.sample(NAMED[name], cautious(name, family), task(family))
    assert spent == pytest.approx(STEPS, abs=1e-9)
    torch.testing.assert_close(end, plain(family), rtol=1e-5, atol=1e-5)


@every
def test_a_peer_skips_and_what_it_skips_is_not_paid_for(name, family):
    """And a second run is the same as the first: nothing of one is left in the other, and nothing on the model."""

    def state():
        return {path: {key: id(value) for key, value in vars(part).items()} for path, part in parts.items()}

    parts = dict(model(family).named_modules())
    before = state()
    end, spent = peers.sample(NAMED[name], sparse(name, family), task(family))
    assert 1 < spent < 0.95 * STEPS
    assert distance(end, plain(family)) > 1e-6
    assert state() == before
    again = peers.sample(NAMED[name], sparse(name, family), task(family))
    assert torch.equal(end, again[0])
    assert spent == again[1]
    bare = integrate(video.field(family, model(family), SCENE, GUIDANCE), noise(family), TS)
    assert torch.equal(bare, plain(family))


@every
def test_cond_is_never_served_for_uncond(name, family):
    ratio = contrasts(NAMED[name], sparse(name, family), family) / plain_contrasts(family)
    assert ratio.min() > 0.2


def test_in_separate_calls_pab_serves_cond_for_uncond():
    """The reason why Wan is run fused with it: its one counter of calls takes "uncond" for the step after "cond"."""
    ratio = contrasts(NAMED["PAB"]._replace(fused=False), SPARSE["PAB"], "wan") / plain_contrasts("wan")
    assert ratio.min() < 1e-3


@pytest.mark.parametrize("name", ["TaylorSeer", "FasterCache", "DBCache"])
def test_an_exception_takes_the_cache_off_too(name):
    def fails(*_):
        raise RuntimeError("stop")

    class Failing(Euler):
        advance = fails

    before = {path: set(vars(part)) for path, part in model("wan").named_modules()}
    with pytest.raises(RuntimeError, match="stop"):
        peers.sample(NAMED[name], sparse(name, "wan"), task("wan")._replace(stepper=Failing()))
    assert {path: set(vars(part)) for path, part in model("wan").named_modules()} == before


def test_an_adaptive_peer_decides_for_each_sample():
    peer, setting = NAMED["FirstBlockCache"], {"threshold": 0.5}
    x = torch.cat([noise("ltx"), -0.5 * noise("ltx")])
    two = task("ltx")._replace(scene=torch.tensor([3, 7]), x=x)
    both = peers.sample(peer, setting, two)
    alone = [peers.sample(peer, setting, two.part(slice(k, k + 1))) for k in range(2)]
    assert torch.equal(both[0], torch.cat([end for end, _ in alone]))
    assert both[1] == pytest.approx((alone[0][1] + alone[1][1]) / 2)


@pytest.mark.parametrize("name", ["FirstBlockCache", "DBCache"])
@pytest.mark.parametrize("family", video.FAMILIES)
def test_a_first_block_that_always_runs_is_paid_for(name, family):
    """Of three equal blocks one is run at every step, the others only at the first `warmup`."""
    end = {"max_warmup_steps": 1} if name == "DBCache" else {}
    setting = {**NAMED[name].settings[0], **end, NAMED[name].knob: 1e9}
    _, spent = peers.sample(NAMED[name], setting, task(family))
    assert spent == pytest.approx(1 + (STEPS - 1) / 3, rel=2e-3)


@pytest.mark.parametrize("family", video.FAMILIES)
def test_multiplications_are_those_that_torch_counts(family):
    """And attention's, which torch leaves out on a CPU: 2 products of N x N x D in each of H heads of B samples."""
    field, x = video.field(family, model(family), SCENE, GUIDANCE), noise(family)
    with FlopCounterMode(display=False) as torchs:
        field(x, TS[0])
    with mock.patch("benchmarks.multiplications.sdpa_flop_count", return_value=0), Multiplications() as ours:
        field(x, TS[0])
    counts = torchs.get_flop_counts()["Global"]
    assert ours.total == sum(count for op, count in counts.items() if "convolution" not in str(op))
    with Multiplications() as with_attention:
        field(x, TS[0])
    assert with_attention.total > ours.total
    q = torch.zeros(2, 3, 5, 4)
    with Multiplications() as attention:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert attention.total == 2 * 2 * (2 * 3) * 5 * 5 * 4


@pytest.mark.parametrize("name", ["FirstBlockCache", "SeaCache", "DBCache"])
def test_without_guidance_there_is_one_branch(name):
    end, spent = peers.sample(NAMED[name], cautious(name, "wan"), task("wan", 1.0))
    assert spent == pytest.approx(STEPS, abs=1e-9)
    torch.testing.assert_close(end, plain("wan", 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["SeaCache", "FasterCache"])
def test_cogvideox_runs_on_its_own_solver(name):
    """Its DDIM is DPM-Solver of order 1 on its path, whose noisiest time has no signal at all."""
    stepper = DPMSolverPP(video.field("cogvideox", model("cogvideox"), SCENE).path, order=1)
    given = task("cogvideox")._replace(stepper=stepper)
    full = integrate(video.field(*given[:3], given.guidance), given.x, TS, stepper)
    end, spent = peers.sample(NAMED[name], sparse(name, "cogvideox"), given)
    assert 1 < spent < 0.95 * STEPS
    assert distance(end, full) < 0.3 * distance(full, given.x)


@pytest.mark.parametrize("nfe", [4, 6])
def test_a_threshold_spends_what_is_wanted(nfe):
    (setting,) = peers.settings_for(NAMED["FirstBlockCache"], task("wan"), [nfe])
    _, spent = peers.sample(NAMED["FirstBlockCache"], setting, task("wan"))
    assert nfe - 1.5 <= spent <= nfe + peers.SLACK


def two_scenes():
    x = torch.cat([noise("wan"), -0.5 * noise("wan")])
    return task("wan")._replace(scene=torch.tensor([3, 7]), x=x)


def tried(peer, setting):
    """The geometric mean of the root mean squared errors of two scenes, and what one cost."""
    two = two_scenes()
    end, spent = peers.sample(peer, setting, two)
    full = integrate(video.field("wan", two.model, two.scene, GUIDANCE), two.x, TS)
    return math.sqrt(math.prod(distance(a, b) for a, b in zip(end, full, strict=True))), spent


def test_of_listed_settings_that_keep_a_budget_the_best_is_taken_cheaper_ones_too():
    settings = [
        {"cache_interval": interval, "disable_cache_before_step": before, "disable_cache_after_step": after}
        for interval, before, after in ((2, 1, None), (2, 3, None), (3, 1, 8), (3, 3, None), (4, 1, 7), (5, 2, 8))
    ]
    peer, budgets = NAMED["TaylorSeer"]._replace(settings=tuple(settings)), (4, 5, 6)
    all_tried = [(*tried(peer, setting), setting) for setting in settings]
    expected = [min(one for one in all_tried if one[1] <= nfe + peers.SLACK) for nfe in budgets]
    dearest = [max((spent, -error) for error, spent, _ in all_tried if spent <= nfe + peers.SLACK) for nfe in budgets]
    assert any(best[1] < most[0] - peers.SLACK for best, most in zip(expected, dearest, strict=True))
    assert peers.settings_for(peer, two_scenes(), budgets) == [setting for *_, setting in expected]


def test_only_the_best_of_the_first_sample_are_tried_on_all(monkeypatch):
    monkeypatch.setattr(peers, "FINALISTS", 1)
    peer = NAMED["TaylorSeer"]._replace(settings=NAMED["TaylorSeer"].settings[::12])
    alone, together = (peers.settings_for(peer, scenes, [5]) for scenes in (task("wan"), two_scenes()))
    assert alone == together


SINGLE = {
    "MagCache": [{"max_skip_steps": 5, "retention_ratio": share} for share in (0.1, 0.5)],
    "DBCache + TaylorSeer": [
        {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": steps, "taylorseer_order": order}
        for steps, order in ((1, 1), (3, 2))
    ],
}


@pytest.mark.parametrize("name", SINGLE)
def test_every_setting_is_tried_at_the_thresholds_that_spend_the_budgets(name):
    peer, budgets = NAMED[name], [5, 7]
    single = [peer._replace(settings=(setting,)) for setting in SINGLE[name]]
    found = [peers.settings_for(each, two_scenes(), budgets) for each in single]
    both = peers.settings_for(peer._replace(settings=tuple(SINGLE[name])), two_scenes(), budgets)
    differ = []
    for nfe, of_each, taken in zip(budgets, zip(*found, strict=True), both, strict=True):
        (error, spent), *others = sorted(tried(peer, setting) for setting in of_each)
        assert tried(peer, taken) == (error, spent)
        assert spent <= nfe + peers.SLACK
        differ.append(others[0][0] / error)
    assert max(differ) > 1.1


def test_a_setting_is_none_where_a_peer_always_costs_more():
    assert peers.settings_for(NAMED["PAB"], task("wan"), [2]) == [None]
    assert peers.settings_for(NAMED["DBCache"], task("wan"), [3]) == [None]


def test_mag_ratios_are_of_the_residuals_norms():
    """Against hooks of ours on the first block's input and the last one's output, for "cond", in a plain run."""
    seen, net = [], model("wan")
    begin = net.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    end = net.blocks[-1].register_forward_hook(lambda _, given, out: seen.append(out - seen.pop()))
    field = video.field("wan", net, SCENE, GUIDANCE)
    field.batched = False
    integrate(field, noise("wan"), TS)
    begin.remove(), end.remove()
    norms = [residual.norm(dim=-1) for residual in seen[::2]]
    expected = [1.0] + [(now / before).mean().item() for before, now in pairwise(norms)]
    assert ratios("wan")["mag_ratios"] == pytest.approx(expected, rel=1e-4)
    assert all(math.isfinite(ratio) for ratio in expected)


def test_a_family_that_a_peer_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="FasterCache runs on wan, cogvideox, not on ltx"):
        peers.sample(NAMED["FasterCache"], {}, task("ltx"))
