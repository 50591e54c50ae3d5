"""What a profile says between, outside of and instead of what was measured, and that a file gives back what it got."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sencache.profile
from sencache import CachedField, SensitivityProfile, fingerprint
from sencache.profile import FORMAT
from solvers import grids

Paper = partial(CachedField, reuse="hold", correct=False)  # its rule to the letter
T = torch.tensor([1.0, 0.7, 0.5, 0.1], dtype=torch.float64)
AX = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
AT = torch.tensor([0.5, 0.1, 0.3, 0.9], dtype=torch.float64)
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# lookup


@pytest.mark.parametrize("rising", [True, False])
def test_sensitivities_are_those_of_the_nodes_and_linear_between_them(rising):
    profile = SensitivityProfile(*((part.flip(0) if rising else part) for part in (T, AX, AT)))
    alpha_x, alpha_t = profile.lookup(doubles(1.0, 0.7, 0.5, 0.1, 0.85, 0.6, 0.2))
    torch.testing.assert_close(alpha_x, doubles(1, 2, 4, 3, 1.5, 3, 3.25))
    torch.testing.assert_close(alpha_t, doubles(0.5, 0.1, 0.3, 0.9, 0.3, 0.2, 0.75))


def test_what_is_predicted_is_equation_9():
    predicted = SensitivityProfile(T, AX, AT).predicted(
        doubles(1, 0.6), doubles(0.8, 0.5), doubles(2, 3), doubles(0.2, 0.1)
    )
    torch.testing.assert_close(predicted, doubles(1 * 2 + 0.5 * 0.2, 3 * 3 + 0.2 * 0.1))


def test_outside_of_the_calibrated_times_the_sensitivities_are_infinite():
    alpha_x, alpha_t = SensitivityProfile(T, AX, AT).lookup(doubles(1.01, 0.09, -1, 1000, math.nan))
    assert torch.equal(alpha_x, torch.full((5,), math.inf, dtype=torch.float64))
    assert torch.equal(alpha_t, alpha_x)


@pytest.mark.parametrize(("t_ref", "t"), [(1.1, 0.9), (0.9, 0.05), (1.2, 1.1)])
def test_the_predicted_change_from_or_to_outside_is_infinite(t_ref, t):
    profile = SensitivityProfile(T, 0 * AX, 0 * AT)
    assert profile.predicted(doubles(t_ref), doubles(t), doubles(0), doubles(0)).tolist() == [math.inf]


def test_the_ends_are_inside_also_in_float32():
    ends = torch.tensor([0.1, 0.7, 1.0]).double()  # 0.1 in float32 lies 1.5e-9 beyond
    assert torch.stack(SensitivityProfile(T, AX, AT).lookup(ends)).isfinite().all()


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["alpha_x", "alpha_t"])
def test_next_to_a_cell_that_could_not_be_measured_the_change_is_infinite(which, unknown):
    cells = {"alpha_x": AX.clone(), "alpha_t": AT.clone()}
    cells[which][1] = unknown
    profile = SensitivityProfile(T, **cells)
    t = doubles(1.0, 0.9, 0.7, 0.6, 0.5, 0.3)
    predicted = profile.predicted(t, t, torch.zeros_like(t), torch.zeros_like(t))
    assert predicted.isfinite().tolist() == [True, False, False, False, True, True]
    assert not predicted.isnan().any()


def test_a_profile_of_one_time_knows_that_time():
    profile = SensitivityProfile(T[:1], AX[:1], AT[:1])
    assert profile.direction == 0
    assert profile.lookup(doubles(1.0, 0.9))[0].tolist() == [1, math.inf]


def test_a_profile_keeps_its_values_when_the_callers_tensors_change():
    t, ax = T.clone(), AX.clone()
    profile = SensitivityProfile(t, ax, AT)
    t.zero_()
    ax.zero_()
    assert torch.equal(profile.t, T)
    assert torch.equal(profile.alpha_x, AX)


# files


def full():
    g = torch.Generator().manual_seed(0)
    ax, at = torch.rand(2, 3, 4, generator=g, dtype=torch.float64)
    ax[1, 2] = math.nan
    facts = {"fingerprint": "ab12", "shape": [1, 32, 32], "samples": 3, "nothing": None, "path": "Linear(ü)"}
    return SensitivityProfile(T, ax.mean(0), at.mean(0), ax, at, torch.rand(3, 4, 4, generator=g), facts=facts)


@pytest.mark.parametrize("profile", [full(), SensitivityProfile(T, AX, AT)], ids=["full", "bare"])
def test_a_saved_profile_loads_bit_for_bit(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    loaded = SensitivityProfile.load(tmp_path / "p.safetensors")
    for name in ("t", "alpha_x", "alpha_t", "samples_x", "samples_t", "gram"):
        one, other = getattr(profile, name), getattr(loaded, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert one.numpy().tobytes() == other.numpy().tobytes()
    assert dict(loaded.facts) == dict(profile.facts)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_profile_whose_sensitivities_are_one_tensor_is_saved(tmp_path):
    SensitivityProfile(T, AX, AX).save(tmp_path / "p.safetensors")
    assert torch.equal(SensitivityProfile.load(tmp_path / "p.safetensors").alpha_t, AX)


def test_a_slice_of_a_grid_is_saved(tmp_path):
    ts = grids.uniform(8)
    SensitivityProfile(ts[:-1:2], ts[1::2], ts[2::2]).save(tmp_path / "p.safetensors")
    loaded = SensitivityProfile.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.t, ts[:-1:2])
    assert torch.equal(loaded.alpha_t, ts[2::2])


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "p.safetensors"
    full().save(file)
    before = file.read_bytes()

    def dies(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sencache.profile, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        SensitivityProfile(T, AX, AT).save(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error(share, tmp_path):
    file = tmp_path / "p.safetensors"
    full().save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"p.safetensors is not a whole safetensors file.*Calibrate"):
        SensitivityProfile.load(file)


def test_a_file_of_something_else_is_an_error(tmp_path):
    file = tmp_path / "p.safetensors"
    file.write_text("timesteps, J_x_norm\n" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SensitivityProfile.load(file)
    save_file({"weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"Expected 'sencache profile 1'.*got a file holding weight.*from_npz"):
        SensitivityProfile.load(file)
    save_file({"t": torch.ones(3)}, file, {"format": "sencache profile 99"})
    with pytest.raises(ValueError, match=r"Expected 'sencache profile 1'.*got sencache profile 99"):
        SensitivityProfile.load(file)


@pytest.mark.parametrize("damage", ["no times", "no facts", "no JSON", "another tensor", "another shape"])
def test_a_profile_of_which_a_part_is_missing_or_wrong_is_an_error(damage, tmp_path):
    parts, header = {name: torch.ones(1) for name in ("t", "alpha_x", "alpha_t")}, {"format": FORMAT, "facts": "{}"}
    if damage == "no times":
        parts.pop("t")
    if damage == "no facts":
        header.pop("facts")
    if damage == "no JSON":
        header["facts"] = "{"
    if damage.startswith("another"):
        parts["beta" if damage == "another tensor" else "alpha_t"] = torch.ones(2)
    save_file(parts, tmp_path / "p.safetensors", header)
    with pytest.raises(ValueError, match=r"p.safetensors holds no whole profile.*Calibrate and save it again"):
        SensitivityProfile.load(tmp_path / "p.safetensors")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        SensitivityProfile.load(tmp_path / "none.safetensors")


# the authors' files


def npz(tmp_path, **changes):
    """As the authors' code writes them: timesteps in its own order, L2 norms, 0 where nothing was counted."""
    parts = {
        "timesteps": np.array([999, 750, 500, 250], dtype=np.int64),
        "J_x_norm": np.array([1.5, 2.0, 0.0, 3.0], dtype=np.float32),
        "J_t_norm": np.array([0.8, 0.4, 0.0, 1.6], dtype=np.float32),
        "sample_counts": np.array([8, 8, 0, 8], dtype=np.int64),
        **changes,
    }
    np.savez(tmp_path / "p.npz", **{name: part for name, part in parts.items() if part is not None})
    return tmp_path / "p.npz"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_the_authors_files_are_read_with_alpha_t_per_element(order, tmp_path):
    with np.load(npz(tmp_path)) as parts:
        shuffled = {name: part[order] for name, part in parts.items()}
    profile = SensitivityProfile.from_npz(npz(tmp_path, **shuffled), numel=16)
    nan = math.nan
    assert profile.t.tolist() == [999, 750, 500, 250]
    torch.testing.assert_close(profile.alpha_x, doubles(1.5, 2, nan, 3), equal_nan=True)
    torch.testing.assert_close(profile.alpha_t, doubles(0.2, 0.1, nan, 0.4), equal_nan=True, rtol=1e-6, atol=0)
    assert profile.direction == 0


@pytest.mark.parametrize("counts", [np.array([8, 8, 0, 8]), None])
def test_a_cell_in_which_nothing_was_counted_never_means_always_reuse(counts, tmp_path):
    profile = SensitivityProfile.from_npz(npz(tmp_path, sample_counts=counts), numel=16)
    field = Paper(lambda x, t: -x, profile, tolerance=math.inf, max_reuses=1)
    for t in (999, 800, 740, 600, 500, 480, 400, 250):
        field(X, t)
    reused = {query.t[0].item() for query in field.report.trace if query.reused[0]}
    assert reused == {800.0}  # from 740 on each reference lies next to the cell at 500


def test_a_counted_cell_is_used_and_an_uncounted_one_is_not_whatever_it_holds(tmp_path):
    filled = np.array([1.5, 2.0, 2.5, 3.0])
    profile = SensitivityProfile.from_npz(npz(tmp_path, J_x_norm=filled, J_t_norm=filled), numel=1)
    assert profile.alpha_x.isnan().tolist() == [False, False, True, False]


def test_an_authors_file_with_names_beside_the_numbers_is_read(tmp_path):
    profile = SensitivityProfile.from_npz(npz(tmp_path, model=np.array("Wan2.1-T2V-1.3B")), numel=16)
    assert profile.t.tolist() == [999, 750, 500, 250]


# does it fit?


def constant(ts, **facts):
    return SensitivityProfile(ts, torch.ones(len(ts)), torch.ones(len(ts)), facts=facts)


class Named:
    def __init__(self, name):
        self.fingerprint = name

    def __call__(self, x, t):
        return -x


def test_a_profile_of_another_model_is_refused():
    ts = grids.uniform(5)
    with pytest.raises(ValueError, match=r"another model.*fingerprint ab12.*cd34.*Calibrate this field"):
        Paper(Named("cd34"), constant(ts, fingerprint="ab12"))
    for field, facts in (
        (Named("ab12"), {"fingerprint": "ab12"}),
        (Named("ab12"), {}),
        (Named(None), {"fingerprint": "ab12"}),
    ):
        Paper(field, constant(ts, **facts))


@pytest.mark.parametrize("measured", [grids.uniform(10), grids.uniform(10, 0, 1)], ids=["falling", "rising"])
def test_a_profile_of_the_other_direction_is_refused(measured):
    field = Paper(lambda x, t: -x, constant(measured), tolerance=0.1)
    words = r"measured with t (rising|falling), and here t is (rising|falling): another time convention.*Calibrate"
    with pytest.raises(ValueError, match=words):
        field.integrate(X, measured.flip(0))
    field(X, 0.5)
    with pytest.raises(ValueError, match=words):
        field(X, 0.5 - 0.1 * (measured[1] - measured[0]).sign())


def test_a_profile_whose_direction_is_not_known_serves_both():
    field = Paper(lambda x, t: -x, constant(grids.uniform(10), direction="unknown"), tolerance=9)
    for ts in (grids.uniform(10), grids.uniform(10, 0, 1)):
        field.integrate(X, ts)
        assert (field.report.reuses > 0).all()


@pytest.mark.parametrize("ts", [grids.uniform(10, 1000, 0), grids.uniform(10, 1, -2), grids.uniform(10, 3, 2)])
def test_a_profile_in_another_unit_of_time_is_refused(ts):
    with pytest.raises(
        ValueError, match=r"measured for t in \[0, 1\].*only \d of the grid's 10 steps begin there.*unit"
    ):
        Paper(lambda x, t: -x, constant(grids.uniform(10)), tolerance=0.1).integrate(X, ts)


def test_a_grid_of_a_small_part_of_the_profile_is_refused():
    with pytest.raises(ValueError, match=r"measured for t in \[0, 1\], and the grid covers less than 2 % of that"):
        Paper(lambda x, t: -x, constant(grids.uniform(10)), tolerance=0.1).integrate(X, grids.uniform(3, 0.5, 0.49))


def test_a_grid_that_begins_a_little_outside_is_integrated():
    field = Paper(lambda x, t: -x, constant(grids.uniform(10, 0.9, 0.1)), tolerance=9)
    field.integrate(X, grids.uniform(20))
    assert (field.report.reuses > 0).all()


# fingerprints


def test_a_fingerprint_names_weights_shapes_and_options():
    def model(seed=0, width=8):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4))

    names = {
        fingerprint(model()),
        fingerprint(model(1)),
        fingerprint(model(width=9)),
        fingerprint(model(), "guidance", 2),
    }
    assert len(names) == 4
    assert fingerprint(model()) == fingerprint(model())
    changed = model()
    with torch.no_grad():
        changed[0].weight[0, 0] += 1e-3
    assert fingerprint(changed) not in names
