"""The comparison: budgets are kept, settings come from the choosing seeds, and a line says what was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import comparison, leads, peers
from benchmarks.cases import cases
from benchmarks.methods import BLOCKS, FORECAST, HOLD, METHODS, free_solvers
from benchmarks.metrics import psnr
from benchmarks.results import read, write
from benchmarks.shipped import SEEDS
from solvers import integrate

SIT = cases()["sit"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_the_three_sets_of_seeds_share_no_noise_and_their_first_samples_are_the_same():
    noises = [SIT.samples(3, purpose).x for purpose in SEEDS]
    assert len(SEEDS) == 3
    assert all(
        not torch.equal(a[i], b[j]) for a in noises for b in noises if a is not b for i in range(3) for j in range(3)
    )
    for case in cases().values():
        if (comparison.ROOT / f"benchmarks/fields/{case.name}.safetensors").exists():
            few, more = case.samples(2, "reported"), case.samples(5, "reported")
            assert torch.equal(few.x, more.x[:2])
            assert torch.equal(few.conditions, more.conditions[:2])


@pytest.mark.parametrize("nfe", [25, 10])
def test_free_solvers_cost_what_they_say(nfe):
    field, x, _ = SIT.samples(1, "choosing")
    for name, (grid, stepper) in free_solvers(SIT, nfe).items():
        calls = []
        integrate(lambda x, t, calls=calls: (calls.append(t), field(x, t))[1], x, grid, stepper)
        assert len(calls) == nfe, name


def test_a_comparison_on_the_sit(monkeypatch):
    names = ("ours", "ours-uncalibrated", "sencache-rule", "teacache", "uniform", "fewer-steps")
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in names})
    monkeypatch.setattr(comparison, "TRUE_STEPS", 60)
    monkeypatch.setattr(comparison, "stlpips", lambda a, b: torch.zeros(len(a)))  # its weights are a download
    settings = comparison.choose(SIT, 2, (20,))
    assert set(settings) == {"ours-uncalibrated", "sencache-rule", "teacache", "uniform"}
    assert len(settings["teacache"]["measured"]) == 5
    results = {result.method: result for result in comparison.compare(SIT, 3, (20,), settings)}
    assert list(results) == ["all-steps", *names]
    assert results["all-steps"].psnr == math.inf
    assert results["all-steps"].psnr_true < 60
    for name in names:
        assert results[name].evaluations == pytest.approx(20, abs=2), name
        assert results[name].seconds > 0
    assert results["ours"].psnr > results["fewer-steps"].psnr + 8
    assert results["ours"].ssim > results["fewer-steps"].ssim


def test_of_a_method_s_options_the_best_is_taken_each_at_the_budget(monkeypatch):
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    bench, method = comparison.Comparison(SIT, 2, "choosing"), METHODS["easycache"]

    def outcome(each):
        knob = bench.knob(each, 15, None)
        x, evaluations = method.sample(SIT, bench.samples, 15, knob, None)
        return knob, evaluations, psnr(x, bench.reference).median().item()

    alone = [outcome(replace(method, options=(option,))) for option in method.options]
    assert [knob.keys() for knob, *_ in alone] == [{"warmup", "tolerance"}] * 3
    assert all(abs(spent - 15) <= 2 for _, spent, _ in alone)
    nearest = max(alone, key=lambda each: each[2])
    assert nearest[2] > min(near for *_, near in alone) + 2  # it matters
    assert outcome(method) == nearest


def test_of_listed_options_the_best_is_taken(monkeypatch):
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    bench, method = comparison.Comparison(SIT, 2, "choosing"), METHODS["taylorseer-stack"]
    ends = [method.sample(SIT, bench.samples, 15, option, None).x for option in method.options]
    near = [psnr(end, bench.reference).median().item() for end in ends]
    assert abs(near[0] - near[1]) > 0.5  # it matters
    assert bench.knob(method, 15, None) == method.options[near.index(max(near))]


def test_a_setting_never_looked_for_is_an_error_that_says_how(monkeypatch):
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    with pytest.raises(ValueError, match=r"no 30 for teacache on sit. Run this with --choose .* --budgets 30"):
        comparison.compare(SIT, 1, (30,), {"teacache": {"measured": [1.0] * 5, "25": None}}, ["teacache"])


def test_a_line_goes_when_its_setting_is_no_longer_to_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    monkeypatch.setattr(comparison, "SETTINGS", tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text('{"sit": {"sencache-paper": {"9": null, "20": 1.0}}}')
    old = [comparison.Result("sit", "sencache-paper", nfe, nfe, *[1.0] * 7) for nfe in (20, 9)]
    write(old, tmp_path / "comparison.csv")
    comparison.main(["sit"], ["sencache-paper"], 1, (9,), False, tmp_path)
    assert [row[1:3] for row in read(tmp_path / "comparison.csv")] == [("sencache-paper", 20), ("all-steps", 50)]


def test_a_method_measured_again_takes_its_old_place_and_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    monkeypatch.setattr(comparison, "stlpips", lambda a, b: torch.zeros(len(a)))
    old = [
        comparison.Result(field, method, nfe, nfe, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        for field in ("wan", "sit")
        for method, nfe in (("all-steps", 50), ("ours", 20), ("ours", 15), ("uniform", 20))
    ]
    write(old, tmp_path / "comparison.csv")
    comparison.main(["sit"], ["fewer-steps", "ours"], 2, (20,), False, tmp_path)
    new = read(tmp_path / "comparison.csv")
    assert [row[:3] for row in new] == [*(row[:3] for row in old), ("sit", "fewer-steps", 20)]
    again = [row[:3] for row, before in zip(new, old, strict=False) if row != before]
    assert again == [("sit", "all-steps", 50), ("sit", "ours", 20)]
    comparison.present(tmp_path)
    made = {file.name for file in tmp_path.iterdir()}
    assert made == {"comparison.csv", "environment.json", "comparison_reference.png", "comparison_truth.png"}


def test_seconds_are_taken_again_alone_and_nothing_else_changes(tmp_path):
    old = [comparison.Result("sit", name, 12, 12, 50.0, 45.0, 0.1, 0.9, 0.01, 40.0, 1e6) for name in ("ours", "lemica")]
    old.append(old[0]._replace(method="all-steps", nfe=50))
    other = old[0]._replace(field="wan")
    write([*old, other], tmp_path / "comparison.csv")
    comparison.again(["sit"], ["uniform"], tmp_path)
    assert read(tmp_path / "comparison.csv") == [*old, other]
    comparison.again(["sit"], None, tmp_path)
    *new, untouched = read(tmp_path / "comparison.csv")
    assert untouched == other
    assert [line._replace(seconds=1e6) for line in new] == old
    assert all(0 < line.seconds < 100 for line in new)


def test_a_setting_that_cannot_keep_the_budget_is_none_and_its_line_is_left_out(monkeypatch):
    """Ten strict steps leave more than ten evaluations."""
    monkeypatch.setattr(comparison, "METHODS", {"sencache-paper": METHODS["sencache-paper"]})
    monkeypatch.setattr(comparison, "TRUE_STEPS", 10)
    monkeypatch.setattr(comparison, "stlpips", lambda a, b: torch.zeros(len(a)))
    settings = comparison.choose(SIT, 1, (9,))
    assert settings == {"sencache-paper": {"9": None}}
    assert [each.method for each in comparison.compare(SIT, 2, (9,), settings)] == ["all-steps"]


def test_what_a_peer_probes_is_told_apart_from_what_it_computes():
    probing = next(peer for peer in peers.PEERS if peer.name == "FirstBlockCache")
    plain = next(peer for peer in peers.PEERS if peer.name == "TaylorSeer")
    assert probing.cost(20, 50, BLOCKS) == 20 + 30 / 5
    assert probing.computed(26, 50, BLOCKS) == 20
    assert plain.cost(20, 50, BLOCKS) == plain.computed(20, 50, BLOCKS) == 20


def test_every_method_is_of_one_kind():
    others = {name for name in METHODS if name.startswith(("ours", "fewer-steps"))}
    assert set(METHODS) == others | set(HOLD) | set(FORECAST)
    assert not set(HOLD) & set(FORECAST)


def test_pictures_and_tables_are_made_of_results(tmp_path):
    lines = [
        comparison.Result("sit", method, nfe, nfe, psnr, psnr - 5, 0.3, 0.9, 0.01, 40.0, 0.1 * nfe)
        for method, psnr in (("ours", 60.0), ("ours-fine", 45.0), ("fewer-steps", 40.0), ("fewer-steps-unipc", 41.0))
        for nfe in (25, 10)
    ]
    lines[1] = lines[1]._replace(evaluations=10.7)
    write(lines, tmp_path / "comparison.csv")
    again = read(tmp_path / "comparison.csv")
    assert again == lines
    leads.draw(again, "psnr", "dB", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    title, *others = leads.tables([*again, lines[0]._replace(method="all-steps", nfe=50)]).items()
    assert "best other" in title[0]
    assert others[0][1][0] == {"method": "ours", "25": "60.0 (55.0; 0.3)", "10": "60.0 (55.0; 0.3) at 10.7"}
    assert len(others) == 3
    pab = lines[0]._replace(method="pab", nfe=40, evaluations=39.6)
    *same, (_, (alone,)) = leads.tables([*again, lines[0]._replace(method="all-steps", nfe=50), pab]).items()
    assert dict(same) == dict([title, *others])  # what cannot save half stands by itself
    assert (alone["method"], alone["evaluations"]) == ("pab", "39.6")


def test_margins_are_over_the_best_of_their_kind():
    psnrs = {"ours": 60, "ours-unipc": 53, "ours-fine": 50, "teacache": 44, "lemica": 45, "taylorseer": 52}
    psnrs |= {"fewer-steps": 43, "fewer-steps-unipc": 47}
    trues = {"ours-unipc": 53, "ours-fine": 52, "fewer-steps-unipc": 49}
    lines = [
        comparison.Result("sit", name, 20, 20, psnr, 0, 0, 1, 0, trues.get(name, 40), 1) for name, psnr in psnrs.items()
    ]
    (row,) = leads.margins(lines)
    assert row["best that holds"] == "+15.0 (lemica)"
    assert row["best that forecasts"] == "+8.0 (taylorseer)"
    assert row["fewer steps"] == "+13.0"
    assert row["`ours-fine` to the true ODE, best free solver"] == "+3.0"
