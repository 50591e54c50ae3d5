"""An error that was asked for is met, by the share of samples that rehearsal promises."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import binom, spearmanr

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, SensitivityProfile, calibrate, rehearse, rms
from sencache.command.show import budgets_of
from sencache.rehearse import COMPARED, TEACHERS, usual_budgets
from solvers import Euler, Linear, grids, integrate

FIELD = GaussianMixture.load("benchmarks/fields/gmm.safetensors", Linear())
TS = grids.uniform(40)


def noise(samples, seed):
    return torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def profile():
    return rehearse(FIELD, calibrate(FIELD, noise(8, 0), TS, progress=False), noise(40, 1), TS)


@pytest.mark.parametrize("rtol", [0.03, 0.01, 0.003])
def test_nine_of_ten_new_samples_are_within_what_was_asked(profile, rtol):
    cached, x = CachedField(FIELD, profile, rtol=rtol), noise(128, 2)
    full = integrate(FIELD, x, TS)
    error = rms(cached.integrate(x, TS) - full) / rms(full)
    # 128 samples at 90 %, and 32 that promise: four standard errors of both together
    assert (error <= rtol).double().mean() > 0.9 - 4 * (0.09 / 128 + 0.09 / 34) ** 0.5
    assert cached.report.evaluations.max() < 40


def test_asking_for_less_error_never_costs_less(profile):
    spent = [len(CachedField(FIELD, profile, rtol=rtol).plan(TS).nodes) for rtol in (0.1, 0.03, 0.01, 0.003, 1e-9)]
    assert spent == sorted(spent)
    assert spent[-1] == 40


def test_a_factor_is_kept_by_nine_of_ten_in_nine_of_ten_rehearsals(profile):
    x, full = noise(40, 1), integrate(FIELD, noise(40, 1), TS)
    enough = [k for k in range(1, 33) if binom.sf(k - 1, 32, 0.9) <= 0.1]  # 90 % quantile under the k-th smallest
    for budget, factors in zip(profile.budgets.tolist(), profile.factors, strict=True):
        cached = CachedField(FIELD, profile, nfe=budget)
        error = (rms(cached.integrate(x, TS) - full).double() / rms(full).double())[TEACHERS:]
        assert torch.allclose(factors, error / cached.plan(TS).relative_error)
        assert profile.factor(budget) == factors.sort().values[enough[0] - 1]


def test_the_usual_budgets_are_from_a_tenth_to_nine_tenths():
    assert usual_budgets(50) == [*range(5, 29), 30, 31, 33, 34, 36, 37, 39, 41, 43, 45]
    assert usual_budgets(50, most=COMPARED) == [5, 6, 7, 9, 10, 12, 15, 18, 22, 26, 31, 37, 45]
    assert usual_budgets(50, most=9) == [5, 7, 9, 11, 15, 20, 26, 34, 45]
    assert usual_budgets(4) == [1, 2, 3]


def test_what_a_rehearsal_pays_for():
    """Two full runs, less three steps, what plans evaluate, and for some the truth of what they reuse."""
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return FIELD(x, t)

    profile = rehearse(counted, calibrate(FIELD, noise(2, 0), TS, progress=False), noise(3, 1), TS)
    compared = [4, 5, 6, 7, 8, 10, 12, 14, 17, 21, 25, 30, 36]
    alone = [9, 11, 13, 15, 16, 18, 19, 20, 22, 23, 24, 26, 27, 29, 31, 33, 34]
    assert profile.budgets.tolist() == usual_budgets(40) == sorted(compared + alone)
    assert sum(calls) == 3 * (40 * 2 - 3 + 40 * 13 + sum(alone))
    for n, ratios in zip(profile.budgets.tolist(), profile.ratios, strict=True):
        assert ratios.isfinite().sum() == 3 * (40 - n) * (n in compared)


@pytest.mark.parametrize("nfe", [11, 16, 23])
def test_what_is_predicted_between_two_compared_lengths_nearly_holds(profile, nfe):
    assert profile.ratios[profile.budgets.tolist().index(nfe)].isnan().all()
    predicted, _, true = reuses(profile, nfe, noise(128, 3))
    assert 0.8 < float((predicted / true).median()) < 1.25
    assert 0.9 < float((true <= profile.bound(nfe, 0.95) * predicted).double().mean()) < 0.99


@pytest.mark.parametrize("budgets", [(), (9, 10)])
def test_the_bar_ends_where_the_rehearsal_does(profile, budgets, capsys):
    rehearse(FIELD, profile, noise(2, 1), TS, budgets=budgets)
    assert "rehearse: 100%" in capsys.readouterr().err
    rehearse(FIELD, profile, noise(2, 1), TS, budgets=budgets, progress=False)
    assert capsys.readouterr().err == ""


def test_every_budget_of_ones_own_is_compared_with_the_truth(profile):
    known = rehearse(FIELD, profile, noise(2, 1), TS, budgets=(9, 10))
    assert [int(each.isfinite().sum()) for each in known.ratios] == [2 * (40 - 9), 2 * (40 - 10)]


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("queries", [1, 2, 3, 8, 30, 250])
def test_the_usual_budgets_evaluate_every_network_and_leave_something_to_reuse(queries, networks):
    budgets = usual_budgets(queries, networks)
    assert budgets == sorted(set(budgets))
    assert set(usual_budgets(queries, networks, COMPARED)) <= set(budgets)
    assert networks <= budgets[0]
    assert budgets[-1] < queries or budgets == [networks]


@pytest.mark.parametrize("budgets", [5, (5.5,), "5", ("5",), (True,), (0, 5)])
def test_budgets_that_count_nothing_are_refused_in_words(profile, budgets):
    with pytest.raises(ValueError, match=r"`budgets` count evaluations, 1, 2, \.\.\., each of a plan"):
        rehearse(FIELD, profile, noise(2, 1), TS, budgets=budgets)


@pytest.mark.parametrize("budgets", [[6, 3, 3], (3.0, 6.0), torch.tensor([3, 6]), range(3, 9, 3)])
def test_budgets_are_any_numbers_that_count(profile, budgets):
    assert rehearse(FIELD, profile, noise(2, 1), TS, budgets=budgets).budgets.tolist() == [3, 6]


@pytest.mark.parametrize("budgets", [(5, 41), (41,)])
def test_budgets_without_a_plan_are_refused_before_anything_is_paid(profile, budgets):
    def costly(x, t):
        raise AssertionError

    with pytest.raises(ValueError, match="Rehearse budgets from 1 to 40 evaluations"):
        rehearse(costly, profile, noise(2, 1), TS, budgets=budgets)


def test_below_the_least_rehearsed_budget_nothing_is_promised(profile):
    assert profile.factor(int(profile.budgets[0]) - 1) == torch.inf
    assert len(CachedField(FIELD, profile, rtol=1e9).plan(TS).nodes) == profile.budgets[0]


def test_what_was_rehearsed_is_saved(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    again = SensitivityProfile.load(tmp_path / "p.safetensors")
    assert torch.equal(again.factors, profile.factors)
    assert torch.equal(again.budgets, profile.budgets)


def test_an_error_cannot_be_asked_of_a_profile_that_was_not_rehearsed():
    bare = calibrate(FIELD, noise(2, 0), TS, progress=False)
    with pytest.raises(ValueError, match="`rtol` needs a profile whose plans were rehearsed"):
        CachedField(FIELD, bare, rtol=0.01)


def test_of_few_samples_the_largest_factor_is_taken():
    few = SensitivityProfile(torch.tensor([1.0]), torch.ones(1), torch.ones(1))
    few = replace(few, budgets=torch.tensor([3]), factors=torch.arange(21.0)[None])
    assert few.factor(3) == 20
    assert replace(few, factors=torch.arange(38.0)[None]).factor(3) == 36  # not the largest of 38 any more


def test_of_plans_that_were_not_rehearsed_nothing_is_promised():
    some = SensitivityProfile(torch.tensor([1.0]), torch.ones(1), torch.ones(1))
    some = replace(some, budgets=torch.tensor([3, 6, 9]), factors=torch.tensor([[5.0], [2.0], [4.0]]))
    none = torch.inf
    assert [some.factor(n) for n in range(2, 11)] == [none, 5, none, none, 2, none, none, 4, none]


def rehearsed(*factors, expected=1.0, budgets=None):
    """A profile of which only this is known: plans of 3, 6, 9, ... evaluations, and the factors of each."""
    some = SensitivityProfile(torch.tensor([1.0]), torch.ones(1), torch.ones(1))
    budgets = torch.tensor(budgets or range(3, 3 * len(factors) + 1, 3))
    sizes = torch.full((len(factors),), expected, dtype=torch.float64)
    return replace(some, budgets=budgets, expected=sizes, factors=torch.as_tensor(factors))


def test_plans_are_tested_from_the_longest_down():
    some = rehearsed([1.0], [5.0], [2.0], expected=0.1)
    assert some.shortest(0.5) == 3
    assert some.shortest(0.4) == 9  # 6 fails, and what 3 promises may be luck
    assert some.shortest(0.19) is None
    assert replace(some, expected=torch.tensor([0.1, 0.1, torch.inf])).shortest(9.0) is None  # errors can grow


def test_a_choice_among_many_plans_is_no_lucky_one():
    """Plans of which a little less than 90 % of samples keep what is asked: seldom is one chosen."""
    draws = torch.rand(400, 25, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chosen = [rehearsed(*factors.tolist()).shortest(0.899) is not None for factors in draws]
    lucky = [any(rehearsed(*factors.tolist()).factor(n) <= 0.899 for n in range(3, 76, 3)) for factors in draws]
    assert sum(chosen) < 400 * (0.1 + 3 * (0.09 / 400) ** 0.5)
    assert sum(lucky) > 3 * sum(chosen)


def test_a_rehearsal_of_before_is_asked_for_again(profile):
    old = replace(profile, expected=None)
    with pytest.raises(ValueError, match=r"rehearsed by an earlier version.*rehearse again"):
        CachedField(FIELD, old, rtol=0.01)
    assert CachedField(FIELD, old, nfe=17).plan(TS).promised == CachedField(FIELD, profile, nfe=17).plan(TS).promised


@pytest.mark.parametrize("name", ["expected", "factors"])
def test_a_rehearsal_has_a_row_for_each_budget(profile, name):
    with pytest.raises(ValueError, match=f"`{name}` of a rehearsal has a row for each of its `budgets`"):
        replace(profile, **{name: getattr(profile, name)[:3]})


def test_a_field_that_is_zero_is_promised_to_be_met():
    zero, x = lambda x, t: 0 * x, noise(24, 3)
    known = rehearse(zero, calibrate(zero, x[:8], TS, progress=False), x, TS)
    assert CachedField(zero, known, rtol=1e-6).plan(TS).promised == 0
    assert CachedField(zero, known, rtol=1e-6).integrate(x, TS).equal(x)
    assert known.typical(7) == 1
    assert known.bound(7) == 0


@pytest.mark.parametrize("seed", range(4))
def test_where_no_error_is_expected_of_most_samples_none_is_promised(seed):
    """The half of the samples that stand still cannot answer for the others."""

    def gate(x, t):
        return torch.where(x[:, :1].abs() > 0.9, torch.tanh(3 * x) * torch.sin(20 * t), 0 * x)

    x = torch.randn(469, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ts = grids.uniform(12, 0.97, 0.05)
    known = rehearse(gate, calibrate(gate, x[:9], ts, progress=False), x[9:69], ts)
    cached, full = CachedField(gate, known, rtol=1e-4), integrate(gate, x[69:], ts)
    error = rms(cached.integrate(x[69:], ts) - full) / rms(full)
    assert (error <= 1e-4).double().mean() > 0.9 - 4 * (0.09 / 400 + 0.09 / 54) ** 0.5


def test_a_budget_under_which_runs_diverge_is_not_promised():
    def steep(x, t):
        return torch.exp(1.5 * x[:, :1]) * torch.cos(6 * t) + 0 * x

    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ts = grids.uniform(12, 0.97, 0.05)
    with torch.no_grad():
        assert integrate(steep, x, ts).isfinite().all()
    profile = calibrate(steep, x[:8], ts, progress=False)

    def breaking(x, t):
        return steep(x, t) if len(x) < 100 or CALLS.append(float(t)) or len(CALLS) <= 21 else steep(x, t) / 0

    CALLS: list[float] = []
    known = rehearse(breaking, profile, x, ts, budgets=(3, 6))
    assert known.factor(3) == known.factor(6) == torch.inf
    assert known.shortest(1e9) is None


def test_where_the_truth_is_no_number_a_reuse_is_far_off_and_its_plan_is_promised():
    """Off the full run's states the field fails at one time, which some plans evaluate and others do not."""
    asked, x = [], noise(24, 3)

    def failing(x, t):
        asked.append(float(t))
        return FIELD(x, t) / (len(asked) <= 40 or float(t) != float(TS[13]))

    profile = calibrate(FIELD, noise(8, 0), TS, progress=False)
    known = rehearse(failing, profile, x, TS)
    for n in known.budgets.tolist():
        evaluated = 13 in CachedField(FIELD, known, nfe=n).plan(TS).nodes.tolist()
        assert (known.factor(n) == torch.inf) == evaluated
        if not evaluated:
            assert 0 < known.typical(n) < torch.inf
            assert known.bound(n, whole=True) == torch.inf
    assert known.factors.isfinite().any()


@pytest.mark.parametrize("budgets", [range(1, 11), range(4, 20), (3,)], ids=len)
def test_show_has_at_most_nine_of_the_rehearsed_lengths_both_ends_among_them(budgets):
    shown = budgets_of(rehearsed(*[[1.0]] * len(budgets), budgets=list(budgets)))
    assert len(shown) == min(9, len(budgets))
    assert (shown[0], shown[-1]) == (budgets[0], budgets[-1])


def test_bounds_between_budgets_are_those_of_reuses_that_are_known():
    ratios = torch.full((3, 4, 10), torch.nan, dtype=torch.float64)
    ratios[0, :, 5:], ratios[2, :, 7:] = 1.0, 3.0
    some = replace(rehearsed([1.0] * 4, [1.0] * 4, [1.0] * 4), ratios=ratios)
    assert [some.typical(n) for n in (3, 6, 9)] == [1, 2, 3]
    assert some.bound(6) == 1
    ratios[0, 0, 5:] = 2.0
    wide = replace(some, ratios=ratios)
    assert wide.bound(3, whole=True) == wide.bound(6, whole=True) == 2  # the larger of both sides
    assert wide.bound(9, whole=True) == 1


FIELDS = {  # of which plans of some lengths expect far too much or too little
    "stiff": lambda x, t: 8 * (x - torch.cos(5 * t)),
    "cubic": lambda x, t: -4 * x * (1 - x**2),
    "growing": lambda x, t: -x / (0.1 + t),
}


@pytest.mark.parametrize("name", FIELDS)
def test_promises_hold_where_expectations_do_not(name):
    field, ts = FIELDS[name], grids.uniform(40, 1.0, 0.01)
    start = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (8, 64, 256)]
    profile = rehearse(field, calibrate(field, start[0], ts, progress=False), start[1], ts)
    full = integrate(field, start[2], ts)
    for rtol in torch.logspace(-4, -0.5, 12).tolist():
        cached = CachedField(field, profile, rtol=rtol)
        error = rms(cached.integrate(start[2], ts) - full) / rms(full)
        assert (error <= rtol).double().mean() > 0.9 - 4 * (0.09 / 256 + 0.09 / 58) ** 0.5
        assert len(cached.plan(ts).nodes) in [*profile.budgets.tolist(), 40]


def test_a_factor_says_nothing_of_the_plans_next_to_its_own():
    field, ts = FIELDS["stiff"], grids.uniform(50, 1.0, 0.0)
    start = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (8, 64)]
    profile = rehearse(field, calibrate(field, start[0], ts, progress=False), start[1], ts, budgets=(11, 12, 15))
    assert profile.factor(12) > 10 * max(profile.factor(11), profile.factor(15))


class Plain:
    """Euler's method as somebody writes it who needs no dataclass."""

    order, adaptive = 1, False
    weights, advance = Euler.weights, Euler.advance


def test_a_stepper_that_has_no_name_is_not_rehearsed(profile):
    with pytest.raises(ValueError, match=r"known by its `repr`, and Plain has none.*make it a dataclass"):
        rehearse(FIELD, profile, noise(2, 1), TS, Plain())


def reuses(profile, nfe, x, field=FIELD, ts=TS):
    """Predicted, observed and true errors (reuses, samples) of a plan's reuses."""
    cached, true = CachedField(field, profile, nfe=nfe), []
    with cached.following(ts) as (run, stepper):

        def compared(x, t):
            used = run(x, t)
            if run.report.trace[-1].reused.any():
                true.append(rms(field(x, t) - used).double())
            return used

        integrate(compared, x, ts, stepper)
    told = [query for query in cached.report.trace if query.reused.any()]
    predicted, observed = (torch.stack([getattr(query, name) for query in told]) for name in ("predicted", "observed"))
    return predicted, observed, torch.stack(true)


@pytest.mark.parametrize("name", FIELDS)
def test_bounds_hold_where_reuses_were_compared_and_are_a_guess_in_between(name):
    field, ts = FIELDS[name], grids.uniform(50, 1.0, 0.01)
    start = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (8, 64, 200)]
    profile = rehearse(field, calibrate(field, start[0], ts, progress=False), start[1], ts)
    for nfe, ratios in zip(profile.budgets.tolist(), profile.ratios, strict=True):
        predicted, _, true = reuses(profile, nfe, start[2], field, ts)
        within = float((true <= profile.bound(nfe, 0.95) * predicted).double().mean())
        wholly = float((true <= profile.bound(nfe, 0.9, whole=True) * predicted).all(0).double().mean())
        if ratios.isnan().all():
            assert within > 0.7
        else:
            assert 0.92 < within < 0.98
            assert wholly > 0.9 - 4 * (0.09 / 200 + 0.09 / 58) ** 0.5
            assert 0.9 < float((predicted / true).median()) < 1.15


@pytest.mark.parametrize("nfe", [8, 14, 20])
def test_what_is_predicted_of_a_reuse_on_new_samples_holds(profile, nfe):
    predicted, _, true = reuses(profile, nfe, noise(128, 3))
    assert 0.9 < float((predicted / true).median()) < 1.15
    of_any = CachedField(FIELD, profile, nfe=nfe).plan(TS).change
    of_any = of_any[of_any > 0][:, None].expand_as(true)  # by the plan alone, the same for every sample
    ranks = [spearmanr(told.flatten(), true.flatten()).statistic for told in (predicted, of_any)]
    assert ranks[0] > max(ranks[1], 0.7)
    within = (true <= profile.bound(nfe, 0.95) * predicted).double().mean()
    assert 0.92 < float(within) < 0.98
    wholly = (true <= profile.bound(nfe, 0.9, whole=True) * predicted).all(0).double().mean()
    assert wholly > 0.9 - 3 * (0.09 / 128) ** 0.5


def test_a_bound_for_whole_trajectories_is_wider(profile):
    assert profile.bound(14, 0.9, whole=True) > profile.bound(14, 0.95) > profile.bound(14, 0.5)


@pytest.mark.parametrize("nfe", [8, 14, 20])
def test_what_is_observed_ranks_reuses_by_their_true_error(profile, nfe):
    _, observed, true = reuses(profile, nfe, noise(64, 3))
    known = observed.isfinite()  # all but what comes after the last evaluation
    assert known.double().mean() > 0.8
    assert spearmanr(observed[known], true[known]).statistic > 0.9


def test_the_report_tells_what_to_expect(profile):
    cached = CachedField(FIELD, profile, nfe=17)
    cached.integrate(noise(4, 3), TS)
    plan, told = cached.plan(TS), str(cached.report)
    assert cached.report.expected == plan.relative_error
    assert cached.report.promised == plan.promised == plan.relative_error * profile.factor(17)
    assert "observed over predicted error of the reuses: median" in told
    assert f"expected relative error of the sample: {plan.relative_error:.2g}; 90 % of samples keep" in told


def test_a_second_rehearsal_forgets_the_first(profile):
    assert torch.equal(rehearse(FIELD, profile, noise(4, 1), TS, budgets=(10,)).budgets, torch.tensor([10]))


def test_everything_evaluated_is_promised_to_be_exact(profile):
    assert CachedField(FIELD, profile, nfe=40).plan(TS).promised == 0
    assert CachedField(FIELD, profile, rtol=1e-12).plan(TS).promised == 0


def test_bounds_of_budgets_without_reuses_or_outside_of_what_was_rehearsed():
    one = SensitivityProfile(torch.tensor([2.0, 1.0]), torch.ones(2), torch.ones(2))
    nan, inf = torch.nan, torch.inf
    ratios = torch.tensor([[[nan, 1.0], [nan, inf]], [[nan, nan], [nan, nan]]])
    one = replace(one, budgets=torch.tensor([1, 2]), factors=torch.ones(2, 2), ratios=ratios)
    assert one.bound(1, whole=True) == one.bound(1) == inf  # a reuse that was infinitely far off is not forgotten
    assert one.bound(2, whole=True) == one.bound(2) == 0
    assert one.bound(3) == inf


def test_every_network_is_rehearsed():
    class Two:
        def __call__(self, x, t):
            return torch.where(t > 0.4, -x, x.tanh())

        def regime(self, t):
            return torch.as_tensor(t) > 0.4

    ts, x = grids.uniform(6), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    known = rehearse(Two(), calibrate(Two(), x, ts, progress=False), x, ts)
    assert known.budgets.min() == 2
