"""The command on a pipeline in a folder: its figures are those of `sencache.enable` and of plain runs."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from matplotlib import image

from sencache import SensitivityProfile, disable, enable, rms
from sencache.command import main
from tests.test_command import table, typed
from tests.tiny_text import saved_wan

SIZE = "--height 16 --width 16 --frames 5 --steps 10 --option max_sequence_length=8"
PROMPTS = ["a cat", "a dog in rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    saved_wan(folder / "wan")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    line = f"calibrate --pipeline {folder}/wan --prompts {folder}/prompts.txt {SIZE} --samples 2 --rehearse 3"
    assert main(shlex.split(f"{line} --out {folder}/wan.safetensors")) == 0
    return folder


@pytest.fixture
def pipe(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = diffusers.WanPipeline.from_pretrained(folder / "wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ran(pipe, seed, prompt, steps=10, kind="latent"):
    return torch.as_tensor(
        pipe(
            prompt, height=16, width=16, num_frames=5, num_inference_steps=steps, max_sequence_length=8,
            generator=torch.Generator().manual_seed(seed), output_type=kind, return_dict=False,
        )[0]
    )  # fmt: skip


def test_the_profile_is_what_the_handle_measures_and_rehearses(folder, pipe, tmp_path):
    grams, profile = [], SensitivityProfile.load(folder / "wan.safetensors")
    for seed, prompt in enumerate(PROMPTS):
        handle = enable(pipe, folder=tmp_path / str(seed))
        ran(pipe, seed, prompt)
        grams.append(handle.profile.gram)
    torch.testing.assert_close(profile.gram, torch.cat(grams))
    assert profile.facts["samples"] == 2
    assert list(profile.facts["seeds"]) == [0, 4]
    handle = enable(pipe, profile)
    again = handle.rehearse([partial(ran, pipe, seed, PROMPTS[seed % 2]) for seed in (2, 3, 4)])
    torch.testing.assert_close(profile.factors, again.factors, rtol=1e-2, atol=1e-3)
    disable(pipe)


def test_show_plans_as_the_pipeline_will(folder, pipe, capsys):
    file = folder / "wan.safetensors"
    assert typed(f"show {file} --nfe 4 --plot shown.png") == 0
    printed = capsys.readouterr().out
    handle = enable(pipe, SensitivityProfile.load(file), nfe=4)
    ran(pipe, 5, "a cat")
    plan = handle.plan
    times = ", ".join(f"{t:.4g}" for t in plan.times[plan.nodes].tolist())
    assert f"nfe=4: {times}\n" in printed
    assert f" {plan.relative_error:.2e} " in printed
    assert f" {plan.promised:.2e}\n" in printed
    assert "FlowMatchEulerDiscreteScheduler, 10 calls from 1000" in printed
    assert "Sensitivities were not measured" in printed
    assert image.imread("shown.png").std() > 0.05


@pytest.mark.parametrize("kind", ["np", "latent"])
def test_compare_prints_the_errors_of_plain_runs(kind, folder, pipe, capsys):
    line = f"compare --pipeline {folder}/wan --prompt '{PROMPTS[0]}' --prompt '{PROMPTS[1]}' {SIZE} --nfe 4 --samples 3"
    line += " --option output_type=latent" if kind == "latent" else ""
    assert typed(f"{line} --profile {folder}/wan.safetensors") == 0
    printed = capsys.readouterr().out
    said, seeds = table(printed), range(1000, 1003)
    full, fewer = (
        torch.cat([ran(pipe, seed, PROMPTS[seed % 2], steps, kind) for seed in seeds]).double() for steps in (10, 4)
    )
    enable(pipe, SensitivityProfile.load(folder / "wan.safetensors"), nfe=4)
    ours = torch.cat([ran(pipe, seed, PROMPTS[seed % 2], kind=kind) for seed in seeds]).double()
    for name, samples in (("sencache, nfe=4", ours), ("fewer steps, 4", fewer)):
        error = rms(samples - full) / rms(full)
        assert said[name]["median"] == pytest.approx(float(error.median()), rel=0.05)
        assert said[name]["decile"] == pytest.approx(float(error.quantile(0.9)), rel=0.05)
        assert said[name]["evaluations"] == 8  # with and without the prompt
    assert said["full, 10 steps"]["evaluations"] == 20
    assert ("PSNR" in printed) == (kind == "np")
    if kind == "np":
        near = float((-20 * rms(fewer - full).log10()).median())
        assert said["fewer steps, 4"]["psnr"] == pytest.approx(near, abs=0.1)
    assert image.imread("comparison.png")[..., :3].std() > 0.05


def test_without_a_profile_it_is_measured_on_another_seed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path / "kept"))
    assert typed(f"compare --pipeline {folder}/wan --prompt 'a cat' {SIZE} --no-picture") == 0
    printed = capsys.readouterr().out
    assert "Measured on seed 0;" in printed
    assert "1 sample, seed 1000;" in printed
    assert table(printed)["sencache, nfe=5"]["evaluations"] == 10
    assert not list(tmp_path.iterdir())


WRONG = {
    "argument": ("--option nothing=1", r"WanPipeline takes no nothing; it takes"),
    "nfe": ("--nfe 11", r"from 1 to the 10 of the full run; got 11"),
    "another model": ("--profile {other}", r"The profile was measured on another model.*Calibrate"),
}


@pytest.mark.parametrize(("more", "words"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line(more, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    profile = SensitivityProfile.load(folder / "wan.safetensors")
    SensitivityProfile(profile.t, profile.alpha_x, profile.alpha_t, facts={"fingerprint": "0"}).save("other")
    line = f"compare --pipeline {folder}/wan --prompt 'a cat' {SIZE} {more.format(other='other')}"
    assert typed(line) == 2
    said = capsys.readouterr()
    assert not said.out
    last = said.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("sencache: ")
    assert re.search(words, last), last
    assert not Path("comparison.png").exists()


def test_the_commands_of_the_guide_run_one_after_the_other(folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/guide.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert [shlex.split(line)[:2] for line in lines] == [
        ["sencache", name] for name in ("calibrate", "show", "compare", "calibrate", "compare")
    ]
    monkeypatch.chdir(tmp_path)
    smaller = {
        "--rehearse 32": "--rehearse 1 --steps 10 --samples 2",
        "--nfe 20 10": "--nfe 5 3",
        "--nfe 20": "--nfe 5",
        "--pipeline FOLDER": f"--pipeline {folder}/wan",
        "--prompts prompts.txt": f"--prompts {folder}/prompts.txt",
        "--steps 50": SIZE,
        "compare --field": "compare --samples 2 --field",
    }
    for line in lines:
        for large, small in smaller.items():
            line = line.replace(large, small)
        assert typed(line.removeprefix("sencache ")) == 0, capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {
        "sit.safetensors", "sit.png", "comparison.png", "wan.safetensors"
    }  # fmt: skip
