"""Say what a profile holds: what was measured, sensitivities, and what plans are expected to do.

sencache show sit.safetensors --nfe 10 20 --plot sit.png
"""

from __future__ import annotations

import argparse
import math
import textwrap

import numpy as np

from sencache.cache import CachedField
from sencache.command.fields import stepper_of
from sencache.command.options import check_nfe, check_pictures, count, load_profile
from sencache.plan import Plan
from sencache.plugins.diffusers.plans import plan_on_file
from sencache.profile import SensitivityProfile
from sencache.rehearse import usual_budgets

ROWS = 9  # times at which sensitivities are printed
HIDDEN = ("gain", "inputs", "rehearsed", "rehearsed_ts")  # facts that are for programs


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a file that `sencache calibrate` or `profile.save` wrote")
    parser.add_argument(
        "--nfe", type=count, nargs="+", metavar="N", help="budgets to plan (default: rehearsed or usual)"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a picture too (needs matplotlib)")


def run(options: argparse.Namespace) -> None:
    """Print, and draw where asked."""
    profile = load_profile(options.profile)
    if options.plot:
        check_pictures(options.plot)
    why = unplannable(profile)
    if why and options.nfe:
        raise ValueError(why)
    check_nfe(options.nfe or [], len(profile.t))
    plans = [] if why else [plan_on(profile, nfe) for nfe in options.nfe or budgets_of(profile)]
    print("\n\n".join([facts(options.profile, profile), sensitivities(profile), why or expectations(profile, plans)]))
    if options.plot:
        from sencache.plots import draw_summary, saved

        with saved(options.plot) as figure:
            draw_summary(figure, profile, plans)
        print(f"\n{options.plot}: what is printed here, drawn.")


def budgets_of(profile: SensitivityProfile) -> list[int]:
    """Up to nine of the rehearsed budgets, or from 1/10 to 9/10 of all times."""
    if profile.budgets is not None:
        at = np.linspace(0, len(profile.budgets) - 1, min(9, len(profile.budgets))).round()
        return profile.budgets[at.astype(int)].tolist()
    networks = len(profile.facts.get("crossings", [])) + 1  # that take turns
    return usual_budgets(len(profile.t), networks, most=9)


def unplannable(profile: SensitivityProfile) -> str:
    """Why no plan can be made of this file, or nothing."""
    if profile.gram is None:
        return "No plans: this profile has no Gram matrix. With it use `tolerance=`, or calibrate anew."
    if profile.end is None and "gain" not in profile.facts:
        return "No plans: this profile does not know how its sampler weighed the outputs. Calibrate anew."
    return ""


def plan_on(profile: SensitivityProfile, nfe: int) -> Plan:
    """The plan of `nfe` evaluations on the grid and with the sampler of the calibration."""
    if "gain" in profile.facts:
        return plan_on_file(profile, nfe)
    return CachedField(lambda x, t: x, profile, nfe=nfe).plan(stepper=stepper_of(profile))


def facts(name: str, profile: SensitivityProfile) -> str:
    """What was measured."""
    known = {
        key: value for key, value in profile.facts.items() if key not in HIDDEN and value not in (None, [], "None")
    }
    known["times"] = f"{len(profile.t)} from {profile.t[0]:g} to {profile.t[-1]:g}"
    if profile.factors is not None:
        taught = "" if profile.amplified is None else f", of plans that {len(profile.amplified)} others taught"
        known["rehearsed on"] = f"{profile.factors.shape[1]} samples{taught}"
    if "seeds" in known:
        known["seeds"] = "{} to {}".format(*known["seeds"])
    if "shape" in known:
        known["shape"] = "x".join(map(str, known["shape"]))
    return "\n".join([name, *(f"  {key:<14}{value}" for key, value in known.items())])


def sensitivities(profile: SensitivityProfile) -> str:
    """The output's size and its sensitivities at some times."""
    rows = np.unique(np.linspace(0, len(profile.t) - 1, ROWS).round().astype(int)).tolist()
    size = profile.gram.diagonal(dim1=1, dim2=2).mean(0).sqrt() if profile.gram is not None else None
    lines = [f"{'t':>10}{'RMS output':>12}{'|J_x|':>10}{'|J_t|':>10}"]
    for k in rows:
        output = number(math.nan if size is None else float(size[k]))
        lines.append(
            f"{profile.t[k]:10.4g}{output:>12}"
            + "".join(f"{number(float(a[k])):>10}" for a in (profile.alpha_x, profile.alpha_t))
        )
    if "assumed" in profile.facts:
        lines.append("All of this is assumed, and nothing measured; `tolerance=` needs |J_t| too.")
    elif not (profile.alpha_x.isfinite() & profile.alpha_t.isfinite()).any():
        lines.append("Sensitivities were not measured; plans do not need them, `tolerance=` does.")
    return "\n".join(lines)


def expectations(profile: SensitivityProfile, plans: list[Plan]) -> str:
    """What each plan should do to the sample, and which times it evaluates."""
    times = "\n".join(map(evaluated, plans))
    if "assumed" in profile.facts:
        return f"No error is expected of plans where nothing was measured. They evaluate at\n{times}"
    rehearsed = any(plan.promised < math.inf for plan in plans)
    heads = f"{'evaluations':>12}{'expected error':>16}" + (f"{'90 % keep':>12}" if rehearsed else "")
    bounds = rehearsed and profile.ratios is not None
    lines = [heads + (f"{'reuse within':>14}" if bounds else "")]
    for plan in plans:
        error = "-" if math.isnan(plan.relative_error) else f"{plan.relative_error:.2e}"
        line = f"{len(plan.nodes):12}{error:>16}"
        line += (f"{plan.promised:12.2e}" if plan.promised < math.inf else f"{'-':>12}") if rehearsed else ""
        lines.append(line + (f"{profile.bound(len(plan.nodes)):13.1f}x" if bounds else ""))
    said = ["Errors are relative RMS errors of the final state to the full run's."]
    if bounds:
        said.append("95 % of reuses are off by at most so many times what is predicted of them.")
    if any(math.isnan(plan.relative_error) for plan in plans):
        said.append("None is expected where several outputs of one time are answered by one of them.")
    elif not rehearsed:
        known = "know the size alone of" if profile.alpha_x.isfinite().any() else "leave out"
        said.append(f"They {known} what errors do to later outputs: `sencache calibrate --rehearse` measures that.")
    lines += textwrap.wrap(" ".join(said), 110)
    return "\n".join([*lines, "", times])


def evaluated(plan: Plan) -> str:
    """The times at which a plan evaluates."""
    times, lead = ", ".join(f"{t:.4g}" for t in plan.times[plan.nodes].tolist()), f"nfe={len(plan.nodes)}: "
    return "\n".join(textwrap.wrap(lead + times, 110, subsequent_indent=" " * len(lead)))


def number(value: float) -> str:
    """A number, or a dash where nothing was measured."""
    return f"{value:.3g}" if math.isfinite(value) else "-"
