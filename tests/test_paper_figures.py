"""What the paper's figures and tables are made of, on fields whose answers are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch

pytest.importorskip("skimage")

from benchmarks import paper_figures, paper_tables, written
from benchmarks.cases import Case, Samples
from benchmarks.recorded import record, tolerance_for
from benchmarks.terms import agreement, changes
from sencache import CachedField, calibrate
from sencache.adapters.wan import WanField
from solvers import Euler, Linear, grids, integrate

GRID = grids.uniform(16, 1.0, 0.1).double()
CASE = Case("a flow", Linear(), Euler(), 1.0, 1.0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def straight(x, t):
    """The flow x = t z: every output along a trajectory is z."""
    return x / t


def curved(x, t):
    return torch.sin(3 * x) * t + t**2


def found(field, samples=4, **options):
    profile = calibrate(field, drawn(samples, 6), GRID, progress=False)
    return changes(record(field, drawn(samples, 6, **options), GRID, Euler()), profile, CASE)


def test_a_recording_ends_where_the_sampler_does():
    x = drawn(3, 6)
    recording = record(curved, x, GRID, Euler())
    assert torch.equal(recording.x[-1], integrate(curved, x, GRID))
    for k, y in enumerate(recording.y):
        assert torch.equal(y, curved(recording.x[k], GRID[k]))


def test_a_recording_answers_by_the_time_alone():
    recording = record(curved, drawn(3, 6), GRID, Euler())
    few = recording.select(torch.tensor([2, 0]))
    assert torch.equal(few(drawn(2, 6, seed=9), GRID[5]), recording.y[5][[2, 0]])


def test_consecutive_outputs_of_a_field_of_t_alone_differ_by_what_t_says():
    recording = record(lambda x, t: torch.full_like(x, 2.0) * t**2, drawn(3, 6), GRID, Euler())
    known = 2 * (GRID[1:-1] ** 2 - GRID[:-2] ** 2).abs()
    torch.testing.assert_close(paper_figures.consecutive(recording), known.expand(3, -1))


def test_along_a_straight_flow_nothing_changes_and_both_terms_say_it_does():
    seen = found(straight)
    assert float(seen.true["hold"].max()) < 1e-12
    time, latent, both = (seen.predicted[name] for name in ("time term", "latent term", "S, their sum"))
    assert float(time.min()) > 0.01
    assert float(latent.min()) > 0.01
    torch.testing.assert_close(both, time + latent)


def test_the_terms_of_a_linear_field_are_its_coefficients_times_the_moves():
    a, b = -1.5, 0.7
    recording = record(lambda x, t: a * x + b * t, drawn(4, 6), GRID, Euler())
    profile = calibrate(lambda x, t: a * x + b * t, drawn(4, 6, seed=1), GRID, progress=False)
    seen = changes(recording, profile, CASE)
    ref = seen.step - seen.gap
    states = torch.stack(recording.x, 1)
    moved = (states[:, seen.step] - states[:, ref]).square().mean(2).sqrt()
    elapsed = (GRID[seen.step] - GRID[ref]).abs()
    torch.testing.assert_close(seen.predicted["latent term"], 1.5 * moved)
    torch.testing.assert_close(seen.predicted["time term"], (0.7 * elapsed).expand(4, -1))
    assert bool((seen.predicted["S, their sum"] >= seen.true["hold"] - 1e-12).all())


def test_of_the_very_sample_it_was_calibrated_on_a_plan_predicts_the_truth():
    seen = found(curved, samples=1)
    for name in ("plan, holding", "plan, on a line"):
        torch.testing.assert_close(seen.predicted[name], seen.truth(name), rtol=1e-6, atol=1e-9)


def test_reuses_are_of_gaps_one_to_four_and_fall_into_thirds():
    seen = found(curved)
    assert seen.gap.unique().tolist() == [1, 2, 3, 4]
    assert seen.step.min() == 2
    assert seen.step.max() == 15
    assert seen.third(16).unique().tolist() == [0, 1, 2]


def test_agreement_tells_times_from_samples():
    true = torch.tensor([[1.0, 10.0, 100.0], [1.2, 12.0, 120.0], [1.4, 14.0, 140.0]], dtype=torch.float64)
    told = agreement(2 * true, true)
    assert (told.rank, told.within, told.ratio, told.under) == pytest.approx((1.0, 1.0, 2.0, 0.0))
    backwards = agreement(true.flip(0) / 2, true)  # right about the times, wrong about the samples
    assert backwards.within == pytest.approx(-1.0)
    assert backwards.rank > 0.7
    assert backwards.under == 1.0
    assert agreement(true[:1].expand(3, -1), true).within == 0.0  # says nothing of samples


def test_a_subset_is_the_calibration_on_its_samples():
    x = drawn(6, 6)
    many = calibrate(curved, x, GRID, progress=False)
    one, two = paper_figures.groups(many, 3)
    for group, rows in ((one, x[:3]), (two, x[3:])):
        alone = calibrate(curved, rows, GRID, progress=False)
        for name in ("alpha_x", "alpha_t", "gram", "size"):
            torch.testing.assert_close(getattr(group, name), getattr(alone, name))


def test_a_tolerance_is_found_on_recorded_outputs():
    profile, x = calibrate(curved, drawn(4, 6), GRID, progress=False), drawn(8, 6, seed=2)

    def rule(field):
        options = {"max_reuses": 3, "reuse": "hold"}
        return lambda tolerance: CachedField(field, profile, tolerance=tolerance, **options)

    tolerance = tolerance_for(9, rule(record(curved, x, GRID, Euler())), CASE, record(curved, x, GRID, Euler()))

    class Selectable:
        def __call__(self, x, t):
            return curved(x, t)

        def select(self, rows):
            return self

    cached = rule(Selectable())(tolerance)
    cached.integrate(x, GRID)
    assert float(cached.report.evaluations.double().mean()) == pytest.approx(9, abs=1)


class TinyCase(Case):
    """A random Wan, 12 steps."""

    def grid(self, steps=12):
        return grids.shifted(steps, self.shift)

    def samples(self, count, purpose):
        seed = len(purpose)
        prompt = torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(seed))
        x = torch.randn(count, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
        field = WanField(tiny.wan(), prompt, negative=torch.zeros_like(prompt), guidance=2.0)
        return Samples(field, x, torch.arange(len(x)))

    @property
    def profile(self):
        field, x, _ = self.samples(2, "calibration")
        return calibrate(field, x, self.grid(), self.stepper, progress=False)

    def pixels(self, x):
        return x[:, :3].clamp(-1, 1)


@torch.no_grad()
def test_every_method_spends_about_what_it_was_told_to(monkeypatch):
    monkeypatch.setattr(paper_tables, "OTHERS", 2)
    monkeypatch.setattr(paper_tables, "BUDGETS", {"wan": ((7, 3, 4),)})
    monkeypatch.setattr(
        paper_tables, "stlpips", lambda images, reference: (images - reference).flatten(1).abs().mean(1)
    )
    monkeypatch.setattr(paper_tables, "ssim", lambda images, reference: torch.ones(len(images)))  # too small for it
    bench = paper_tables.Bench(TinyCase("wan", Linear(), Euler(), 3.0, 2.0), 3)
    rows = {row["method"]: row for row in paper_tables.table_1(bench)}
    assert list(rows) == ["TeaCache", "MagCache", "SenCache", "SenCache, outputs held", "ours", "fewer steps"]
    assert rows["ours"]["NFE"] == rows["fewer steps"]["NFE"] == 7
    for row in rows.values():
        assert row["NFE"] == pytest.approx(7, abs=1.1)
        assert row["cache ratio"] == pytest.approx(1 - row["NFE"] / 12)
        assert 0 < row["PSNR"] < 200
    assert rows["SenCache"]["PSNR less SenCache's"] == 0
    by_n = paper_tables.table_2(bench, paper_tables.scaled(bench))
    assert [row["n"] for row in by_n] == list(paper_tables.REUSES)
    assert all(more["NFE"] >= fewer["NFE"] for more, fewer in pairwise(by_n))


def test_a_table_takes_its_place_on_the_page_and_nothing_else_moves(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n<!-- b -->\n<!-- end of b -->\n")
    monkeypatch.setattr(written, "PAGE", page)
    for value in (1, 2):  # a second time in place of the first
        written.publish("a", {"A title": [{"x": value, "y": "±"}]})
        table = f"A title:\n\n| x | y |\n| --- | --- |\n| {value} | ± |"
        begin, end = "<!-- a -->\n", "<!-- end of a -->"
        rest = "\nafter\n<!-- b -->\n<!-- end of b -->\n"
        assert page.read_text() == f"before\n{begin}\n{table}\n\n{end}{rest}"
    with pytest.raises(ValueError, match="no lines '<!-- c -->'"):
        written.publish("c", {"A title": [{"x": 1}]})


def test_the_page_has_a_place_for_every_table():
    page = written.PAGE.read_text()
    names = [f"paper_{figure}" for figure in paper_figures.FIGURES] + [f"paper_table_{n}" for n in (1, 2, 3)]
    for name in names:
        assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- end of {name} -->") == 1
