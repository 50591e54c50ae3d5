"""The ways to sample that are compared: a dict of them, by name. Another one is one more entry.

A method is a scope in which the pipeline runs that way, and what it needs to have been measured before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from benchmarks.paper.models import Model
from sencache import SensitivityProfile, strict_start
from sencache.command.pipelines import PipelineSource

BUDGETS = (25, 20, 15, 10)
TOLERANCES = (0.02, 0.05, 0.1)  # of ours without calibration, in units of the sample, whose RMS is about 1
TRUTH = 4  # how many times the steps are taken for a truth
REFERENCE, TRUE = "full", "truth"

Scope = Callable[[PipelineSource, SensitivityProfile | None], AbstractContextManager[Any]]


class Method(NamedTuple):
    """One way of sampling."""

    steps: int
    nfe: int  # evaluations asked for; 0 where a rule decides
    scope: Scope
    needs: str = ""  # a kind of `calibration.KINDS`


def methods(model: Model, steps: int) -> dict[str, Method]:
    """All of them, by the names of their folders, in the order of the tables."""
    found = {REFERENCE: bare(steps)}
    budgets = sorted({*BUDGETS, *model.published}, reverse=True)
    budgets = [nfe for nfe in budgets if nfe < steps] or [steps // 2]
    found |= {f"steps{nfe}": bare(nfe) for nfe in budgets}
    found |= {name: paper(steps, *rule) for name, rule in model.rules.items()}
    found |= {f"{name}-outputs": paper(steps, *rule, "output") for name, rule in model.rules.items()}
    found |= {f"ours-nfe{nfe}": ours(steps, nfe) for nfe in budgets}
    found |= {f"ours-tolerance{tolerance:g}": uncalibrated(steps, tolerance) for tolerance in TOLERANCES}
    found |= {swept(rule): paper(steps, *rule) for table in model.sweeps.values() for rule in table}
    return found | {TRUE: bare(TRUTH * steps)}


def swept(rule: tuple[float, int]) -> str:
    """The name of the paper's rule with another epsilon and n."""
    return f"sencache-{rule[0]:g}-n{rule[1]}"


def groups(model: Model, steps: int) -> dict[str, list[str]]:
    """Names for several methods."""
    tables = {name: [swept(rule) for rule in table] for name, table in model.sweeps.items()}
    everything, beside = list(methods(model, steps)), {TRUE, *(name for table in tables.values() for name in table)}
    return {"all": everything, "table1": [name for name in everything if name not in beside], **tables}


def chosen(text: str, model: Model, steps: int) -> dict[str, Method]:
    """The methods that a comma-separated list names, and the reference. Raises ValueError for an unknown one."""
    known, several = methods(model, steps), groups(model, steps)
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in known and name not in several]
    if wrong:
        raise ValueError(f"No method {wrong[0]!r}. There are {', '.join(known)}; or several: {', '.join(several)}.")
    wanted = {REFERENCE, *(one for name in names for one in several.get(name, [name]))}
    return {name: method for name, method in known.items() if name in wanted}


def bare(steps: int) -> Method:
    """The pipeline alone."""
    return Method(steps, steps, lambda source, profile: nullcontext())


def paper(steps: int, epsilon: float, n: int, payload: str = "blocks") -> Method:
    """SenCache: held while S <= epsilon, .01 in the first fifth of the steps, at most n times in a row.

    What is held is what the blocks add to the tokens, as in the authors' code, or the output.
    """

    def scope(source: PipelineSource, profile: SensitivityProfile | None) -> AbstractContextManager[Any]:
        assert profile is not None
        rule = dict(tolerance=strict_start(profile.grid, epsilon), max_reuses=n, reuse="hold", payload=payload)
        return source.enabled(f"epsilon {epsilon:g}, n = {n}", profile=profile, **rule)

    return Method(steps, 0, scope, "sensitivities")


def ours(steps: int, nfe: int) -> Method:
    """The best plan of the calibrated profile, outputs continued and gaps repaid."""
    return Method(steps, nfe, lambda source, profile: source.enabled(f"nfe={nfe}", profile=profile, nfe=nfe), "gram")


def uncalibrated(steps: int, tolerance: float) -> Method:
    """Ours from the run's own outputs alone."""
    return Method(steps, 0, lambda source, profile: source.enabled(f"tolerance={tolerance:g}", tolerance=tolerance))
