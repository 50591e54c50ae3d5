"""What the command prints and writes is what the library computes; what a user gets wrong ends in one line."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from sencache import CachedField, SensitivityProfile, calibrate, rehearse, rms
from sencache.command import main
from solvers import Heun, Linear, UniPC, grids, integrate
from tests import command_fields

ROOT = Path(__file__).parents[1]
MIXTURE = "--field tests.command_fields:mixture --shape 6"
SCALED = "--field tests.command_fields:Scaled --shape 1x4x4"
TS = grids.uniform(20)
COLUMNS = ["evaluations", "seconds", "speed", "median", "decile", "expected"]


def noise(shape, seeds):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def typed(line: str) -> int:
    return main(shlex.split(line))


def table(printed: str) -> dict[str, dict[str, float]]:
    """The numbers of a comparison by row and column; of pictures the last two are in dB."""
    found = {}
    for row in re.findall(r"^((?:full|sencache|fewer)[\w ,=]*?\d+(?: steps)?)  +(.*)$", printed, flags=re.MULTILINE):
        numbers = [float(one) for one in re.findall(r"[-+.\de]+|inf", row[1].replace("dB", "").replace("x", ""))]
        names = COLUMNS if row[0].startswith("sencache") else COLUMNS[:-1]
        found[row[0]] = dict(zip([*names, "psnr", "worst"], numbers, strict=False))
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path / "kept"))
    return tmp_path


@pytest.fixture
def profile(elsewhere):
    assert typed(f"calibrate {MIXTURE} --steps 20 --rehearse 12 --out p.safetensors") == 0
    return SensitivityProfile.load("p.safetensors")


def test_the_module_is_the_command():
    run = [sys.executable, "-m", "sencache", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(name in done.stdout for name in ("calibrate", "show", "compare", "--traceback"))
    assert not done.stderr


def test_what_is_installed_as_sencache_is_the_command():
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    name, module, function = re.fullmatch(r'(\w+) = "([\w.]+):(\w+)"', scripts).groups()
    assert name == "sencache"
    assert getattr(importlib.import_module(module), function) is main


@pytest.mark.parametrize("command", ["calibrate", "show", "compare"])
def test_every_command_explains_itself(command, capsys):
    assert typed(f"{command} --help") == 0
    assert f"sencache {command}" in capsys.readouterr().out


def test_calibrate_writes_what_the_library_measures(capsys):
    assert typed(f"calibrate {MIXTURE} --steps 20 --rehearse 12 --out p.safetensors") == 0
    profile = SensitivityProfile.load("p.safetensors")
    ours = calibrate(command_fields.mixture, noise((6,), range(8)), TS, progress=False)
    ours = rehearse(command_fields.mixture, ours, noise((6,), range(8, 20)), TS)
    for name in ("t", "alpha_x", "alpha_t", "gram", "size", "end", "budgets", "expected", "factors"):
        torch.testing.assert_close(getattr(profile, name), getattr(ours, name), rtol=1e-6, atol=1e-9)
    assert list(profile.facts["seeds"]) == [0, 19]
    assert {name: profile.facts[name] for name in ours.facts} == dict(ours.facts)
    printed = capsys.readouterr().out
    assert "8 full runs of 20 steps (euler), seeds 0 to 7." in printed
    assert "12 further samples, seeds 8 to 19." in printed


def test_the_next_commands_that_calibrate_names_run(capsys):
    assert typed(f"calibrate {MIXTURE} --steps 20 --shift 3 --out 'a profile.safetensors'") == 0
    lines = re.findall(r"^(?:Next:)? +sencache (.*)$|^Next: sencache (.*)$", capsys.readouterr().out, re.MULTILINE)
    following = [first or second for first, second in lines]
    assert [line.split()[0] for line in following] == ["show", "compare"]
    for line in following:
        assert typed(line) == 0
    assert Path("comparison.png").exists()
    assert "20 steps" in capsys.readouterr().out


def test_show_says_what_plans_expect_and_promise(profile, capsys):
    capsys.readouterr()
    assert typed("show p.safetensors --nfe 5 10") == 0
    printed = capsys.readouterr().out
    for nfe in (5, 10):
        plan = CachedField(command_fields.mixture, profile, nfe=nfe).plan(TS)
        numbers = re.search(rf"^ +{nfe} +(\S+) +(\S+) +(\S+)x$", printed, flags=re.MULTILINE)
        said = [float(one) for one in numbers.groups()]
        assert said[:2] == pytest.approx([plan.relative_error, plan.promised], rel=0.01)
        assert said[2] == pytest.approx(profile.bound(nfe), abs=0.06)
        times = re.search(rf"^nfe={nfe}: (.*)$", printed, flags=re.MULTILINE)[1]
        assert [float(t) for t in times.split(", ")] == pytest.approx(plan.times[plan.nodes].tolist(), abs=1e-4)
    first = re.search(r"^ +1 +(\S+) +(\S+) +(\S+)$", printed, flags=re.MULTILINE)
    measured = profile.gram[:, 0, 0].mean().sqrt(), profile.alpha_x[0], profile.alpha_t[0]
    assert [float(one) for one in first.groups()] == pytest.approx([float(one) for one in measured], rel=0.01)
    assert "Linear" in printed
    assert "9 samples, of plans that 3 others taught" in printed


@pytest.mark.parametrize("stepper", ["heun", "dpm++", "unipc"])
def test_show_plans_for_the_stepper_that_was_measured(stepper, capsys):
    assert typed(f"calibrate {MIXTURE} --steps 12 --stepper {stepper} --no-secants --out p.safetensors") == 0
    assert typed("show p.safetensors --nfe 4") == 0
    ours, kind = SensitivityProfile.load("p.safetensors"), {"heun": Heun(), "unipc": UniPC(Linear())}.get(stepper)
    printed = capsys.readouterr().out
    assert "Sensitivities were not measured" in printed
    if kind is not None:
        plan = CachedField(command_fields.mixture, ours, nfe=4).plan(grids.uniform(12), kind)
        said = "-" if stepper == "heun" else f"{plan.relative_error:.2e}"  # of its several outputs a step, one is paid
        assert re.search(rf"^ +4 +{re.escape(said)}$", printed, flags=re.MULTILINE)
        assert ("None is expected" in printed) == (stepper == "heun")


def test_compare_prints_what_the_library_gives(profile, capsys):
    assert typed("compare --field tests.command_fields:mixture --profile p.safetensors --nfe 10 6 --samples 9") == 0
    printed = capsys.readouterr().out
    said, x = table(printed), noise((6,), range(1000, 1009))
    full = integrate(command_fields.mixture, x, TS)
    assert list(said) == [
        "full, 20 steps", "sencache, nfe=10", "fewer steps, 10", "sencache, nfe=6", "fewer steps, 6"
    ]  # fmt: skip
    for nfe in (10, 6):
        cached = CachedField(command_fields.mixture, profile, nfe=nfe)
        for name, end in (
            (f"sencache, nfe={nfe}", cached.integrate(x, TS)),
            (f"fewer steps, {nfe}", integrate(command_fields.mixture, x, grids.uniform(nfe))),
        ):
            error = (rms(end - full) / rms(full)).double()
            expected = [nfe, float(error.median()), float(error.quantile(0.9))]
            assert [said[name][one] for one in ("evaluations", "median", "decile")] == pytest.approx(expected, rel=0.02)
        expectation = said[f"sencache, nfe={nfe}"]["expected"]
        assert expectation == pytest.approx(cached.plan(TS).relative_error, rel=0.01)
    assert said["full, 20 steps"]["evaluations"] == 20
    assert "9 samples, seeds 1000 to 1008; euler, 20 steps." in printed


def test_pictures_have_a_psnr_and_each_sample_its_own_conditioning(capsys):
    assert typed(f"compare {SCALED} --steps 12 --nfe 6 --samples 5 --picture shown.png") == 0
    printed = capsys.readouterr().out
    assert "Measured on seeds 0 to 7" in printed
    said, x, field = table(printed), noise((1, 4, 4), range(1000, 1005)), command_fields.Scaled(5)
    full, fewer = (integrate(field, x, grids.uniform(steps)) for steps in (12, 6))
    near = 20 * torch.log10(2 / rms((full - fewer).double()))
    assert said["fewer steps, 6"]["psnr"] == pytest.approx(float(near.median()), abs=0.06)
    assert said["fewer steps, 6"]["worst"] == pytest.approx(float(near.min()), abs=0.06)
    assert said["sencache, nfe=6"]["evaluations"] == 6
    drawn = image.imread("shown.png")
    assert drawn[..., :3].std() > 0.05
    assert not list(Path().glob("*.partial"))


def test_evaluations_are_counted_where_a_step_takes_two(capsys):
    assert typed(f"compare {MIXTURE} --stepper heun --steps 10 --nfe 6 --samples 3 --no-picture") == 0
    said = table(capsys.readouterr().out)
    assert said["full, 10 steps"]["evaluations"] == 20
    assert said["sencache, nfe=6"]["evaluations"] == 6
    assert said["fewer steps, 3"]["evaluations"] == 6
    assert not list(Path().glob("*.png"))


def test_seeds_that_were_calibrated_on_are_owned_up_to(profile, capsys):
    line = (
        "compare --field tests.command_fields:mixture --profile p.safetensors --nfe 6 --no-picture --samples 4 --seed"
    )
    assert typed(f"{line} 18") == 0
    assert "made from seeds 18 to 19 too" in capsys.readouterr().out
    assert typed(f"{line} 20") == 0
    assert "too" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_a_profile_is_drawn_with_and_without_sensitivities(profile, ending):
    bare = SensitivityProfile(profile.t, profile.alpha_x, profile.alpha_t)
    bare.save("bare.safetensors")
    for name in ("p", "bare"):
        assert typed(f"show {name}.safetensors --plot {name}.{ending}") == 0
        assert Path(f"{name}.{ending}").stat().st_size > 5000
    if ending == "png":
        assert np.abs(image.imread("p.png")[:500, :1500] - image.imread("bare.png")[:500, :1500]).max() > 0.5


def test_an_interrupted_calibration_goes_on_where_it_stopped(monkeypatch, capsys):
    line = f"calibrate {SCALED} --steps 6 --samples 4 --out p.safetensors"
    monkeypatch.setattr(command_fields.Scaled, "asked", 0)
    monkeypatch.setattr(command_fields.Scaled, "stops_at", 45)  # in the third sample, of 18 each and one to try
    assert typed(line) == 130
    said = capsys.readouterr()
    assert "interrupted. What was measured is in p.safetensors.unfinished" in said.err
    assert not said.out
    assert not Path("p.safetensors").exists()
    monkeypatch.setattr(command_fields.Scaled, "stops_at", -1)
    monkeypatch.setattr(command_fields.Scaled, "asked", 0)
    assert typed(line) == 0
    assert command_fields.Scaled.asked <= 2 * 18 + 2  # two samples, and a look at the field
    whole = calibrate(command_fields.Scaled(4), noise((1, 4, 4), range(4)), grids.uniform(6), progress=False)
    torch.testing.assert_close(SensitivityProfile.load("p.safetensors").gram, whole.gram)
    assert [file.name for file in Path().glob("p.*")] == ["p.safetensors"]


WRONG = {
    "nothing": ("", r"sencache: .*required.*COMMAND"),
    "command": ("calibarte", r"invalid choice: 'calibarte'"),
    "no source": ("compare", r"one of the arguments --pipeline --field is required"),
    "no file": ("show nowhere.safetensors", r"Expected a profile, and nowhere.safetensors does not exist"),
    "folder": ("show .", r"and \. is a folder"),
    "no profile": ("show noise.txt", r"noise.txt is not a whole safetensors file"),
    "other file": ("show other.safetensors", r"Expected 'sencache profile 1' in other.safetensors; got a file"),
    "no plan": ("show bare.safetensors --nfe 2", r"no Gram matrix"),
    "plot": ("show bare.safetensors --plot x.txt", r"Expected a picture's name, such as picture.png; got x.txt"),
    "module": ("compare --field nowhere:f --shape 2", r"nowhere cannot be imported \(ModuleNotFoundError"),
    "benchmarks": ("compare --field benchmarks.nowhere:f --shape 2", r"not in the installed package: clone it"),
    "name": ("compare --field tests.command_fields:f --shape 2", r"no f\. Callables there: .*mixture"),
    "number": ("compare --field tests.command_fields:number --shape 2", r"it is int and cannot be called"),
    "colon": ("compare --field tests.command_fields --shape 2", r"--field is MODULE:NAME"),
    "no shape": ("compare --field tests.command_fields:mixture", r"needs the --shape of one sample"),
    "shape": ("compare --field tests.command_fields:mixture --shape 7", r"not be evaluated on x of shape \(1, 7\)"),
    "sizes": ("compare --field tests.command_fields:mixture --shape 0x2", r"expected sizes such as 1x32x32; got '0x2'"),
    "velocity": ("compare --field tests.command_fields:wrong_shape --shape 3", r"return v like x, \(1, 3\); got"),
    "raises": ("compare --field tests.command_fields:raises --shape 3", r"RuntimeError: out of sorts"),
    "nfe": (f"compare {MIXTURE} --steps 10 --nfe 11", r"from 1 to the 10 of the full run; got 11"),
    "no nfe": (f"compare {MIXTURE} --nfe 0", r"expected 1, 2, \.\.\.; got '0'"),
    "grid": (f"compare {MIXTURE} --start 1 --end 1", r"two different ends; got 50 from 1.0 to 1.0"),
    "device": (f"compare {MIXTURE} --device abacus", r"--device abacus cannot be used here"),
    "prompt": (f"compare {MIXTURE} --prompt cat", r"--prompt goes with --pipeline; leave it out"),
    "picture": (f"compare {MIXTURE} --picture no/such.png", r"The folder of no/such.png does not exist"),
    "out": (f"calibrate {MIXTURE} --out no/such.safetensors", r"The folder of no/such.safetensors does not exist"),
    "exists": (f"calibrate {MIXTURE} --out bare.safetensors", r"bare.safetensors exists.*--overwrite"),
    "heun": (f"calibrate {MIXTURE} --stepper heun --rehearse 4 --out p", r"--rehearse goes with steppers of one"),
    "no prompt": ("compare --pipeline . ", r"--pipeline needs a prompt"),
    "no prompts": ("compare --pipeline . --prompts nowhere.txt", r"--prompts is a file.*nowhere.txt is none"),
    "no pipeline": ("compare --pipeline . --prompt cat", r"\. holds no model_index.json"),
    "stepper": ("compare --pipeline . --prompt cat --stepper heun", r"--stepper goes with --field"),
    "option": ("compare --pipeline . --prompt cat --option nothing", r"--option is NAME=VALUE"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "words"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_and_exit_status_2(line, words, capsys):
    from safetensors.torch import save_file

    Path("noise.txt").write_text("no profile")
    save_file({"a": torch.ones(2)}, "other.safetensors")
    SensitivityProfile(TS, torch.ones(21), torch.ones(21)).save("bare.safetensors")
    before = set(Path().iterdir())
    assert typed(line) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err), said.err
    assert said.err.startswith("sencache")
    assert said.err.count("\n") == 1
    assert not said.out
    assert set(Path().iterdir()) == before


def test_where_an_error_came_from_is_shown_on_request():
    with pytest.raises(ValueError, match="out of sorts"):
        typed("--traceback compare --field tests.command_fields:raises --shape 3")


@pytest.mark.parametrize(
    ("missing", "line", "words"),
    [
        ("matplotlib.figure", f"compare {MIXTURE}", r"Pictures need matplotlib: `pip install 'sencache\[plots\]'`"),
        ("diffusers", "compare --pipeline . --prompt cat", r"Pipelines need diffusers: `pip install 'sencache\["),
    ],
)
def test_what_is_not_installed_is_said_before_any_work(missing, line, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert typed(line) == 2
    assert re.search(words, capsys.readouterr().err)
