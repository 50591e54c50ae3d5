"""The paper's comparison on tiny pipelines: whole files or none, nothing twice, nothing mixed, true figures."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import tiny_pipelines
from benchmarks.paper import calibration, methods, sample, tabulate
from benchmarks.paper.folder import Folder, Unit, load_unit, save_unit
from benchmarks.paper.models import MODELS
from sencache import calibrate
from sencache.adapters.wan import WanField
from tests.tiny_text import saved

ROOT = Path(__file__).parents[1]
METHODS = "full,steps3,sencache-fast,ours-nfe3,ours-tolerance0.05"
SIZES = {
    "wan": "--height 16 --width 16 --frames 5 --option max_sequence_length=8",
    "cogvideox-2b": "--height 16 --width 16 --frames 9 --option max_sequence_length=6",
    "ltx": "--height 32 --width 32 --frames 9 --option max_sequence_length=6",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of tiny pipelines, and prompts in files."""
    folder = tmp_path_factory.mktemp("weights")
    for name, make in (("wan", "wan"), ("cogvideox-2b", "cogvideox"), ("ltx", "ltx")):
        saved(getattr(tiny_pipelines, make)(), folder / name)
    (folder / "prompts.txt").write_text("a cat\na dog in rain\n")
    (folder / "others.txt").write_text("a train\na horse in snow\n")
    return folder


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Distances that need no download, and no group of processes left from elsewhere."""
    monkeypatch.setattr(tabulate, "DISTANCES", {"psnr": tabulate.psnr, "ssim": tabulate.ssim})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def line(weights, out, model="wan", more=""):
    return shlex.split(
        f"--model {model} --weights {weights}/{model} --prompts {weights}/prompts.txt --out {out} --dtype fp32 "
        f"--steps 6 --calibration-prompts {weights}/others.txt --calibration-samples 2 {SIZES[model]} "
        f"--methods {METHODS} {more}"
    )


def times(out):
    return {str(file): file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}


def rows(out):
    with (out / "table.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory):
    """A finished folder of the tiny Wan."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert sample.main(line(weights, out)) == 0
    return out


def test_every_prompt_has_a_file_of_every_method_and_is_not_sampled_twice(weights, done, capsys):
    before = times(done)
    assert len(before) == 2 * 5 + 2 * 2  # videos; calibration samples of two kinds
    assert not list(done.rglob("*.partial"))
    assert sample.main(line(weights, done)) == 0
    assert "Rank 0: 0 of 10 videos to make." in capsys.readouterr().out
    assert times(done) == before


def test_a_unit_says_what_it_is(done):
    video, facts = load_unit(done / "full/00001.safetensors")
    assert (video.shape, video.dtype) == ((5, 16, 16, 3), torch.uint8)
    assert (facts["prompt"], facts["seed"], facts["evaluations"]) == ("a dog in rain", 43, 6)
    assert facts["seconds"] > 0
    assert load_unit(done / "ours-nfe3/00001.safetensors").facts["evaluations"] == 3
    assert not torch.equal(video, load_unit(done / "full/00000.safetensors").video)


def test_the_table_is_finite_and_the_full_run_is_itself(done, capsys):
    assert tabulate.main(["--out", str(done)]) == 0
    found = rows(done)
    assert list(found) == METHODS.split(",")
    assert float(found["full"]["psnr"]) == math.inf
    assert float(found["full"]["ssim"]) == 1
    for name, row in found.items():
        assert row["psnr_true"] == row["stlpips"] == ""
        assert row["field"] == "wan"
        if name != "full":
            assert 10 < float(row["psnr"]) < 120
            assert 0 < float(row["ssim"]) <= 1
            assert 1 <= float(row["evaluations"]) < 6
    assert float(found["ours-nfe3"]["psnr"]) > float(found["steps3"]["psnr"])
    assert (done / "table.md").read_text() in capsys.readouterr().out
    assert "torch" in json.loads((done / "environment.json").read_text())["sampled"]


def test_what_was_measured_is_not_measured_again(done, monkeypatch):
    assert tabulate.main(["--out", str(done)]) == 0
    first = (done / "table.csv").read_text()
    monkeypatch.setattr(tabulate, "load_unit", lambda file: pytest.fail(f"{file} was loaded again"))
    assert tabulate.main(["--out", str(done)]) == 0
    assert (done / "table.csv").read_text() == first


def test_a_truth_and_another_distance_fill_their_columns(weights, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert sample.main([*line(weights, out), "--methods", "truth,steps3"]) == 0
    assert load_unit(out / "truth/00000.safetensors").facts["evaluations"] == 24
    brightness = lambda video, reference: float((video.float().mean() - reference.float().mean()).abs())  # noqa: E731
    monkeypatch.setitem(tabulate.DISTANCES, "stlpips", brightness)
    monkeypatch.setattr(tabulate, "fetch", lambda: None)
    monkeypatch.setattr(tabulate, "CACHE", tmp_path)
    (tmp_path / tabulate.WHEEL).touch()
    assert tabulate.main(["--out", str(out)]) == 0
    found = rows(out)
    assert float(found["steps3"]["psnr_true"]) < float(found["full"]["psnr_true"]) < math.inf
    assert float(found["truth"]["psnr_true"]) == math.inf
    assert float(found["full"]["stlpips"]) == 0 < float(found["steps3"]["stlpips"])


def test_without_the_weights_of_st_lpips_its_column_is_empty(done, tmp_path, monkeypatch, capsys):
    def failing():
        raise RuntimeError("pip could not download them")

    monkeypatch.setitem(tabulate.DISTANCES, "stlpips", tabulate.stlpips)
    monkeypatch.setattr(tabulate, "fetch", failing)
    monkeypatch.setattr(tabulate, "CACHE", tmp_path)
    assert tabulate.main(["--out", str(done)]) == 0
    assert "Without ST-LPIPS. pip could not" in capsys.readouterr().err
    assert {row["stlpips"] for row in rows(done).values()} == {""}


def test_psnr_is_of_all_pixels_and_in_eight_bits():
    black = torch.zeros(3, 12, 12, 3, dtype=torch.uint8)
    grey = black + 1
    half = torch.cat([grey[:1], black[:2]])
    assert tabulate.psnr(grey, black) == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert tabulate.psnr(half, black) == pytest.approx(20 * math.log10(255) + 10 * math.log10(3), abs=1e-4)
    assert tabulate.psnr(black, black) == math.inf


def test_an_interruption_loses_what_was_under_way_alone(weights, tmp_path, monkeypatch):
    out, saves = tmp_path / "out", []

    def failing(file, unit):
        saves.append(file)
        if len(saves) == 4:
            raise RuntimeError("out of memory")
        save_unit(file, unit)

    monkeypatch.setattr(sample, "save_unit", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample.main(line(weights, out))
    before = times(out)
    assert len(before) == 3 + 4
    monkeypatch.setattr(sample, "save_unit", save_unit)
    assert sample.main(line(weights, out)) == 0
    after = times(out)
    assert len(after) == 10 + 4
    assert all(after[file] == stamp for file, stamp in before.items())


def test_a_truncated_file_of_a_dead_process_is_no_result(weights, done, tmp_path):
    out = tmp_path / "out"
    assert sample.main([*line(weights, out), "--methods", "full", "--samples", "1"]) == 0
    whole = (out / "full/00000.safetensors").read_bytes()
    (out / "full/00001.safetensors.partial").write_bytes(whole[: len(whole) // 2])
    assert Folder(out).numbers("full") == {0}
    assert sample.main([*line(weights, out), "--methods", "full"]) == 0
    assert torch.equal(
        load_unit(out / "full/00001.safetensors").video, load_unit(done / "full/00001.safetensors").video
    )
    (out / "full/00000.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged.*Remove it"):
        load_unit(out / "full/00000.safetensors")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--steps 8 --methods full", "steps: 6 there, 8 here"),
        ("--seed0 1", "seed0: 42 there, 1 here"),
        ("--guidance 2", "call: .*'guidance_scale': 5.0.* there, .*'guidance_scale': 2.0"),
        ("--dtype bf16", "dtype: 'fp32' there, 'bf16' here"),
        ("--prompts {weights}/others.txt", "prompts: "),
    ],
)
def test_other_settings_are_refused_and_nothing_is_sampled(more, words, weights, done, capsys):
    before = times(done)
    assert sample.main([*line(weights, done), *shlex.split(more.format(weights=weights))]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"holds samples of other settings.*{words}.*--out", said), said
    assert times(done) == before


def test_other_weights_are_refused(weights, done, tmp_path, capsys):
    saved(tiny_pipelines.wan(seed=1), tmp_path / "wan")
    assert sample.main([*line(weights, done), "--weights", str(tmp_path / "wan")]) == 2
    assert "weights: " in capsys.readouterr().err


@pytest.mark.parametrize("model", ["cogvideox-2b", "ltx"])
def test_the_other_models_run_too(model, weights, tmp_path):
    out = tmp_path / "out"
    names = ["full", "steps3", "sencache", "ours-nfe3"]
    assert sample.main([*line(weights, out, model), "--methods", ",".join(names), "--samples", "1"]) == 0
    assert tabulate.main(["--out", str(out)]) == 0
    found = rows(out)
    assert list(found) == names
    assert float(found["ours-nfe3"]["evaluations"]) == 3
    assert all(math.isfinite(float(found[name]["psnr"])) for name in names[1:])


def test_sensitivities_are_those_of_calibrate_on_the_adapter(weights):
    options = sample.parser().parse_args([*line(weights, "nowhere"), "--guidance", "1"])
    with torch.no_grad():
        source = sample.open_source(options, MODELS["wan"], "cpu")
        ours = calibration.sensitivities(source, 42)
        prompt, _ = source.pipe.encode_prompt("a cat", None, False, max_sequence_length=8)
        x_T = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(42))
        field, ts = WanField(source.pipe.transformer, prompt), source.pipe.scheduler.sigmas
        theirs = calibrate(field, x_T, ts, progress=False)
    torch.testing.assert_close(ours.t, 1000 * theirs.t, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.alpha_x[:-1], theirs.alpha_x[:-1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(1000 * ours.alpha_t[:-1], theirs.alpha_t[:-1], rtol=1e-3, atol=1e-5)


def test_wan_decodes_in_single_precision_from_weights_that_were_not_rounded(weights):
    options = sample.parser().parse_args([*line(weights, "nowhere"), "--dtype", "bf16"])
    pipe = sample.open_source(options, MODELS["wan"], "cpu").pipe
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    assert any(not torch.equal(p, p.bfloat16().float()) for p in pipe.vae.parameters())


def test_methods_are_the_paper_s_rows_and_as_many_evaluations_of_others():
    wan = methods.groups(MODELS["wan"], 50)
    assert {"sencache-slow", "sencache-fast", "steps25", "steps21", "ours-nfe21"} < set(wan["table1"])
    assert wan["table2"] == ["sencache-0.05-n1", "sencache-0.05-n3", "sencache-0.05-n4", "sencache-0.05-n7"]
    assert len(wan["table3"]) == 4
    assert set(methods.chosen("table2", MODELS["wan"], 50)) == {"full", *wan["table2"]}
    with pytest.raises(ValueError, match=r"No method 'teacache'\. There are full, steps27, steps25"):
        methods.chosen("full,teacache", MODELS["ltx"], 50)


def test_a_folder_without_a_common_prompt_has_no_table(done, tmp_path, capsys):
    assert tabulate.main(["--out", str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_bytes((done / "manifest.json").read_bytes())
    save_unit(Folder(tmp_path).unit("steps3", 0), Unit(torch.zeros(1, 12, 12, 3, dtype=torch.uint8), {}))
    assert tabulate.main(["--out", str(tmp_path)]) == 2
    assert "sample them first" in capsys.readouterr().err


def test_the_commands_of_the_page_can_be_typed():
    page = (ROOT / "docs/paper.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    lines = [shlex.split(one) for one in block.replace("\\\n", " ").splitlines()]
    typed = [
        words[words.index("benchmarks.paper.sample") + 1 :] for words in lines if "benchmarks.paper.sample" in words
    ]
    assert [sample.parser().parse_args(words).model for words in typed] == list(MODELS)
    known = {name for model in MODELS.values() for name in methods.methods(model, 50)}
    known |= {name for model in MODELS.values() for name in methods.groups(model, 50)}
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall("`([^`]+)`", row)
    }
    assert named - {"--methods"} <= known
    assert len(named) > 10


def environ():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_ranks_share_the_work_and_give_what_one_gives(weights, done, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]

    def run(module, *words):
        return subprocess.run(
            [*launch, module, *words], env=environ(), cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    first = run("benchmarks.paper.sample", *line(weights, out))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("5 of 5 videos to make.") == 2
    for name in METHODS.split(","):
        for number in (0, 1):
            mine, alone = (load_unit(Folder(where).unit(name, number)).video for where in (out, done))
            assert torch.equal(mine, alone), (name, number)
    before = times(out)
    again = run("benchmarks.paper.sample", *line(weights, out))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("0 of 5 videos to make.") == 2
    assert times(out) == before
    refused = run("benchmarks.paper.sample", *line(weights, out), "--seed0", "7")
    assert refused.returncode != 0
    assert "seed0: 42 there, 7 here" in refused.stderr
    assert times(out) == before


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files(weights, done, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.paper.sample", *line(weights, out)]
    process = subprocess.Popen(
        command, env=environ(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not Folder(out).numbers("steps3") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = times(out)
    assert 3 <= len([file for file in before if "calibration" not in file]) < 10
    assert sample.main(line(weights, out)) == 0
    after = times(out)
    assert all(after[file] == stamp for file, stamp in before.items())
    for name in METHODS.split(","):
        for number in (0, 1):
            mine, alone = (load_unit(Folder(where).unit(name, number)).video for where in (out, done))
            assert torch.equal(mine, alone), (name, number)
