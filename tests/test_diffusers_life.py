"""What else happens to a pipeline while it is cached: nothing of it shows."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import diffusers
import pytest
import torch
from torch import nn

import sencache
from benchmarks.tiny_pipelines import counted, ltx, prompt, run_ltx, run_wan, wan
from sencache.norms import rms

STEPS, NFE = 10, 5


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("profiles")
        patch.setenv("SENCACHE_FOLDER", str(path))
        yield path


@pytest.fixture(scope="module")
def bare():
    return run_wan(wan(), STEPS)


@pytest.fixture(scope="module")
def cached(folder):
    """What a cached run of the same pipeline gives, undisturbed; measures, for all tests here."""
    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    run_wan(pipe, STEPS)
    return run_wan(pipe, STEPS)


def is_restored(pipe):
    plain = {"transformer": diffusers.WanTransformer3DModel, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler}
    return type(pipe) is diffusers.WanPipeline and all(
        type(getattr(pipe, name)) is kind for name, kind in plain.items()
    )


def test_no_class_is_touched(cached):
    kinds = (diffusers.WanPipeline, diffusers.WanTransformer3DModel, diffusers.FlowMatchEulerDiscreteScheduler)
    before = [dict(vars(kind)) for kind in kinds]
    pipe, other = wan(), wan()
    sencache.enable(pipe, nfe=NFE)
    assert [dict(vars(kind)) for kind in kinds] == before
    assert is_restored(other)
    keys = list(pipe.transformer.state_dict())
    assert keys == list(other.transformer.state_dict())
    assert isinstance(pipe, diffusers.WanPipeline)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert type(type(pipe.scheduler)(shift=2.0)) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.scheduler.from_config(pipe.scheduler.config)) is diffusers.FlowMatchEulerDiscreteScheduler
    sencache.disable(pipe)
    assert is_restored(pipe)
    assert vars(pipe.scheduler).keys() == vars(other.scheduler).keys()
    assert vars(pipe.transformer).keys() == vars(other.transformer).keys()


def test_the_library_and_its_plugin_import_no_diffusers():
    code = "import sys, sencache; sencache.enable; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_enabling_again_replaces_and_disabling_twice_does_no_harm(bare, cached):
    pipe = wan()
    sencache.disable(pipe)
    sencache.enable(pipe, tolerance=0)
    sencache.enable(pipe, nfe=NFE)
    assert torch.equal(run_wan(pipe, STEPS), cached)
    sencache.disable(pipe)
    sencache.disable(pipe)
    assert is_restored(pipe)
    assert torch.equal(run_wan(pipe, STEPS), bare)


@pytest.mark.parametrize("way", ["model", "group"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_in_either_order(bare, cached, way, order):
    def offload():
        if way == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            cpu = torch.device("cpu")
            pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")

    pipe = wan()
    if order == "before":
        offload()
    handle = sencache.enable(pipe, nfe=NFE)
    if order == "after":
        offload()
    for _ in range(3):  # hooks of diffusers are known to get lost at the second run
        out, count = counted(pipe, lambda: run_wan(pipe, STEPS))
        assert torch.equal(out, cached)
        assert count == 2 * NFE == int(handle.report.evaluations)
    sencache.disable(pipe)
    assert torch.equal(run_wan(pipe, STEPS), bare)


def test_weights_offloaded_one_layer_at_a_time_have_the_same_fingerprint():
    from accelerate import cpu_offload

    from sencache.plugins.diffusers.store import models_fingerprint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    before = models_fingerprint({"transformer": model})
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    assert models_fingerprint({"transformer": model}) == before


def test_layerwise_casting_and_other_precisions(bare):
    pipe, plain = wan(), wan()
    sencache.enable(pipe, nfe=NFE)
    run_wan(pipe, STEPS)
    for one in (pipe, plain):
        one.transformer.to(torch.bfloat16)
    half = run_wan(plain, STEPS)
    out, count = counted(pipe, lambda: run_wan(pipe, STEPS))  # another fingerprint: measured anew
    assert torch.equal(out, half)
    assert count == 2 * STEPS
    out, count = counted(pipe, lambda: run_wan(pipe, STEPS))
    assert count == 2 * NFE
    assert rms(out - half) < 0.02 * rms(half)
    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    run_wan(pipe, STEPS)
    assert counted(pipe, lambda: run_wan(pipe, STEPS))[1] == 2 * NFE


def compiled(pipe, way):
    if way == "in place":
        pipe.transformer.compile(backend="eager", fullgraph=True)
    elif way == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize("way", ["in place", "wrapped", "blocks"])
def test_compiled_in_either_order_it_is_one_graph_without_a_break(way):
    from torch._dynamo.utils import counters

    eager = wan(layers=1)
    bare = run_wan(eager, STEPS)
    sencache.enable(eager, nfe=NFE)
    run_wan(eager, STEPS)  # measures
    cached = run_wan(eager, STEPS)
    for order in ("compiled first", "enabled first"):
        torch._dynamo.reset()
        counters.clear()
        pipe = wan(layers=1)
        if order == "enabled first":
            handle = sencache.enable(pipe, nfe=NFE)
        compiled(pipe, way)
        if order == "compiled first":
            handle = sencache.enable(pipe, nfe=NFE)
        torch.testing.assert_close(run_wan(pipe, STEPS), cached)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        assert int(handle.report.evaluations) == 2 * NFE
        sencache.disable(pipe)
        torch.testing.assert_close(run_wan(pipe, STEPS), bare)
    torch._dynamo.reset()


def test_enabling_many_times_compiles_once():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    pipe = wan(layers=1)
    compiled(pipe, "in place")
    for nfe in (2, 3, 4):
        sencache.enable(pipe, nfe=nfe)
        run_wan(pipe, STEPS)
        run_wan(pipe, STEPS)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_lora_is_another_model_and_so_is_its_strength(bare):
    from peft import LoraConfig

    def add(pipe):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="style")

    pipe, plain = wan(), wan()
    sencache.enable(pipe, nfe=NFE)
    run_wan(pipe, STEPS)
    add(pipe)
    add(plain)

    def calls():
        return counted(pipe, lambda: run_wan(pipe, STEPS))

    with_lora, count = calls()
    assert torch.equal(with_lora, run_wan(plain, STEPS))
    assert not torch.equal(with_lora, bare)
    assert count == 2 * STEPS  # measured anew
    assert calls()[1] == 2 * NFE
    pipe.set_adapters(["style"], [0.3])
    assert calls()[1] == 2 * STEPS
    pipe.disable_lora()
    off, count = calls()
    assert count == 2 * STEPS
    assert torch.equal(off, bare)
    sencache.disable(pipe)
    assert is_restored(pipe)


def test_saved_pickled_and_copied_it_is_a_bare_pipeline(tmp_path, bare, cached):
    pipe = wan()
    pipe.save_pretrained(tmp_path / "bare")
    sencache.enable(pipe, nfe=NFE)
    run_wan(pipe, STEPS)
    pipe.save_pretrained(tmp_path / "enabled")
    files = [
        sorted(path.relative_to(top) for path in top.rglob("*")) for top in (tmp_path / "bare", tmp_path / "enabled")
    ]
    assert files[0] == files[1]
    for file in files[0]:
        if (tmp_path / "bare" / file).is_file():
            assert (tmp_path / "bare" / file).read_bytes() == (tmp_path / "enabled" / file).read_bytes()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "enabled", text_encoder=None, tokenizer=None)
    assert is_restored(loaded)
    in_memory = copy.deepcopy(loaded)  # some CPUs round otherwise with weights that lie where a file has them
    for other in (in_memory, pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        other.set_progress_bar_config(disable=True)
        assert is_restored(other)
        assert torch.equal(run_wan(other, STEPS), bare)
        sencache.enable(other, nfe=NFE)
        assert torch.equal(run_wan(other, STEPS), cached)
    assert torch.equal(run_wan(pipe, STEPS), cached)


def test_copied_and_pickled_in_the_middle_of_a_run_it_is_a_bare_pipeline_too(bare, cached):
    taken = []

    def take(pipe, i, t, given):
        if i == 4:
            taken.extend([copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))])
            taken.append(type(pipe.scheduler).from_config(pipe.scheduler.config))
            assert type(pipe.transformer) is not diffusers.WanTransformer3DModel  # in a run, and only there
        return given

    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    assert torch.equal(run_wan(pipe, STEPS, callback_on_step_end=take), cached)
    assert type(taken.pop()) is diffusers.FlowMatchEulerDiscreteScheduler
    for other in taken:
        other.set_progress_bar_config(disable=True)
        assert is_restored(other)
        assert torch.equal(run_wan(other, STEPS), bare)


def test_between_runs_its_parts_are_bare_and_serve_other_pipelines(bare, cached):
    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    assert torch.equal(run_wan(pipe, STEPS), cached)
    assert type(pipe.transformer) is diffusers.WanTransformer3DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    other = diffusers.WanPipeline.from_pipe(pipe)  # looks at the parts' very types
    assert other.transformer is pipe.transformer
    assert is_restored(other)
    assert torch.equal(run_wan(other, STEPS), bare)
    assert torch.equal(run_wan(pipe, STEPS), cached)


@pytest.mark.parametrize("step", [0, 4, STEPS - 1])
def test_a_run_after_one_that_raised_is_a_fresh_one(cached, step):
    def stop(pipe, i, t, given):
        if i == step:
            raise KeyError("stop")
        return given

    pipe = wan()
    handle = sencache.enable(pipe, nfe=NFE)
    with pytest.raises(KeyError, match="stop"):
        run_wan(pipe, STEPS, callback_on_step_end=stop)
    assert int(handle.report.queries) == 2 * (step + 1)
    out, count = counted(pipe, lambda: run_wan(pipe, STEPS))
    assert torch.equal(out, cached)
    assert count == 2 * NFE


def test_a_measurement_that_was_cut_short_is_not_kept(tmp_path):
    def stop(pipe, i, t, given):
        if i == 7:
            raise KeyError("stop")
        return given

    pipe = wan()
    sencache.enable(pipe, nfe=NFE, folder=tmp_path)
    with pytest.raises(KeyError, match="stop"):
        run_wan(pipe, STEPS, callback_on_step_end=stop)
    assert not list(tmp_path.iterdir())
    assert counted(pipe, lambda: run_wan(pipe, STEPS))[1] == 2 * STEPS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("way", ["exchanged", "written to"])
def test_a_prompt_that_a_callback_changes_is_never_answered_for_by_the_old_one(way):
    def change(pipe, i, t, given):
        if i == 3:
            given["prompt_embeds"] = prompt(9) if way == "exchanged" else given["prompt_embeds"].mul_(-1)
        return given

    def run(pipe):
        names = ["latents", "prompt_embeds"]
        return run_wan(
            pipe, STEPS, prompt_embeds=prompt(1), callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip

    plain, pipe = run(wan()), wan()
    sencache.enable(pipe, tolerance=0)
    assert torch.equal(run(pipe), plain)
    handle = sencache.enable(pipe, tolerance=100.0)  # reuses whatever it may
    _, count = counted(pipe, lambda: run(pipe))
    trace = handle.report.trace
    changed = [query for query in trace[8:] if query.branch != 1]  # the unconditional branch is the second
    assert not changed[0].reused.any()
    assert {query.branch for query in trace[:8]} == {0, 1}
    assert all(query.branch == 2 for query in changed)
    assert count == int(handle.report.evaluations)


def test_pipelines_inside_one_another_and_in_threads_do_not_mix(cached):
    inner, pipe, results = ltx(), wan(), []
    sencache.enable(inner, nfe=4)
    run_ltx(inner, 8)
    want = run_ltx(inner, 8)

    def run_other(pipe, i, t, given):
        if i in (1, 6):
            results.append(run_ltx(inner, 8))
        return given

    sencache.enable(pipe, nfe=NFE)
    assert torch.equal(run_wan(pipe, STEPS, callback_on_step_end=run_other), cached)
    assert all(torch.equal(result, want) for result in results)

    found = {}
    threads = [
        threading.Thread(target=lambda: found.update(wan=[run_wan(pipe, STEPS) for _ in range(3)])),
        threading.Thread(target=lambda: found.update(ltx=[run_ltx(inner, 8) for _ in range(3)])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, cached) for result in found["wan"])
    assert all(torch.equal(result, want) for result in found["ltx"])


def test_a_pipeline_that_shares_the_transformer_stays_bare_until_it_is_enabled_too(bare, cached):
    pipe = wan()
    shared = diffusers.WanPipeline(**pipe.components)
    shared.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    shared.set_progress_bar_config(disable=True)
    sencache.enable(pipe, nfe=NFE)
    assert torch.equal(run_wan(shared, STEPS), bare)
    sencache.enable(shared, nfe=NFE)
    assert torch.equal(run_wan(shared, STEPS), cached)
    sencache.disable(pipe)
    assert torch.equal(run_wan(pipe, STEPS), bare)
    assert torch.equal(run_wan(shared, STEPS), cached)
    sencache.disable(shared)
    assert is_restored(shared)


def test_parts_that_are_exchanged_are_followed_and_the_old_ones_restored(cached):
    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    old = pipe.scheduler, pipe.transformer
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    )
    pipe.transformer = wan(seed=1).transformer
    assert counted(pipe, lambda: run_wan(pipe, STEPS))[1] == 2 * STEPS
    assert counted(pipe, lambda: run_wan(pipe, STEPS))[1] == 2 * NFE
    assert type(old[0]) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(old[1]) is diffusers.WanTransformer3DModel
    pipe.scheduler, pipe.transformer = old
    assert torch.equal(run_wan(pipe, STEPS), cached)


def test_nothing_is_held_after_a_run(cached):
    pipe, seen = wan(), []

    def watch(pipe, i, t, given):
        seen.append(weakref.ref(given["latents"]))
        return given

    handle = sencache.enable(pipe, nfe=NFE)

    def latents():
        alive = (one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))
        return {id(one) for one in alive if one.shape == cached.shape}

    before = latents()
    run_wan(pipe, STEPS, callback_on_step_end=watch)
    gc.collect()
    assert not any(ref() is not None for ref in seen)
    assert latents() <= before
    assert int(handle.report.evaluations) == 2 * NFE


def test_inference_mode_and_no_random_numbers(cached):
    pipe = wan()
    sencache.enable(pipe, nfe=NFE)
    torch.manual_seed(0)
    with torch.inference_mode():
        out = run_wan(pipe, STEPS)
    assert torch.equal(out, cached)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    run_wan(wan(), STEPS)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)
