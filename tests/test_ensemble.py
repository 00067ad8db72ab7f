"""ensemble.py against sums done by hand, scipy's geometric mean, and data.py's painting; then the command on NIfTI files."""

import os
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats

import ensemble
from data import regions_to_labels
from ensemble import METHODS, confidence, confidence_ensemble, geometric_mean_ensemble, mean_ensemble, paint

SCRIPT = Path(__file__).parents[1] / "ensemble.py"


def region_maps(*maps):
    """Each argument a map's voxels, one region -> (N, 1, 1, 1, voxels)."""
    return torch.tensor(maps).view(len(maps), 1, 1, 1, -1)


def random_maps(n=5, seed=0):
    return torch.rand(n, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


# ---- section 3.2 ------------------------------------------------------------------------------------------------------


def test_confidence_is_the_mean_probability_inside_each_maps_own_region():
    maps = region_maps([0.9, 0.7, 0.4, 0.1], [0.6, 0.2, 0.2, 0.2])
    torch.testing.assert_close(confidence(maps), torch.tensor([[0.8], [0.6]]))


def test_confidence_is_taken_per_map_and_region():
    maps = random_maps().double()
    expected = [[p[p > 0.5].mean() for p in regions] for regions in maps.numpy()]
    np.testing.assert_allclose(confidence(maps).numpy(), expected, rtol=1e-6)


def test_a_probability_of_one_half_is_outside_the_region():
    torch.testing.assert_close(confidence(region_maps([0.5, 0.5, 0.75])), torch.tensor([[0.75]]))


def test_confidence_of_an_empty_map_is_nan():
    assert confidence(region_maps([0.5, 0.1], [0.6, 0.1])).isnan().tolist() == [[True], [False]]


def test_mean_by_hand():
    assert mean_ensemble(region_maps([0.25, 1.0], [0.75, 0.5])).flatten().tolist() == [0.5, 0.75]


def test_geometric_mean_equals_scipy():
    maps = random_maps()
    np.testing.assert_allclose(geometric_mean_ensemble(maps).numpy(), stats.gmean(maps.double().numpy(), axis=0), rtol=1e-5)


def test_one_exact_zero_makes_the_geometric_mean_zero():
    merged = geometric_mean_ensemble(region_maps([0.0, 0.25], [0.9, 1.0]))
    torch.testing.assert_close(merged.flatten(), torch.tensor([0.0, 0.5]))


def test_geometric_mean_of_many_tiny_probabilities_does_not_vanish():
    merged = geometric_mean_ensemble(torch.full((40, 1, 1, 1, 2), 1e-30))    # their product is 1e-1200
    torch.testing.assert_close(merged.flatten(), torch.tensor([1e-30, 1e-30]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("confidences, expected", [
    ([0.6, 0.9, 0.7, 0.8, 0.55], (0.9 + 0.8 + 0.7) / 3),    # N = 5: the top 3
    ([0.6, 0.9, 0.7, 0.8], (0.9 + 0.8) / 2),                # N = 4: the top 2
    ([0.6, 0.9, 0.7], (0.9 + 0.7) / 2),
    ([0.6, 0.9], 0.9),
    ([0.6], 0.6),
])
def test_confidence_ensemble_is_the_mean_of_the_top_half_rounded_up(confidences, expected):
    merged = confidence_ensemble(region_maps(*([p] for p in confidences)))    # maps of one voxel: confidence is its value
    assert merged.item() == pytest.approx(expected, abs=1e-6)


def test_a_small_sure_map_beats_a_large_unsure_one():
    # Over all voxels the second has the higher mean: the rank must come from inside the region, the result from all voxels.
    assert torch.equal(confidence_ensemble(region_maps([0.95, 0.1, 0.1], [0.6, 0.6, 0.6])), region_maps([0.95, 0.1, 0.1])[0])


def test_one_map_comes_back_as_it_is():
    maps = random_maps(1)
    assert torch.equal(confidence_ensemble(maps), maps[0])


def test_each_region_is_ranked_by_itself():
    maps = torch.tensor([[0.9, 0.6, 0.8], [0.6, 0.9, 0.7]]).view(2, 3, 1, 1, 1)
    torch.testing.assert_close(confidence_ensemble(maps).flatten(), torch.tensor([0.9, 0.9, 0.8]))


def test_ties_go_by_the_order_of_the_maps():
    maps = region_maps([0.6, 0.6], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75])    # three with 0.75, N/2 = 2: the first two of them
    assert confidence_ensemble(maps).flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("maps, expected", [
    ([0.9, 0.1, 0.2, 0.8], (0.9 + 0.1 + 0.2 + 0.8) / 4),         # half are empty: the mean of all
    ([0.9, 0.1, 0.2, 0.3, 0.8], (0.9 + 0.1 + 0.2 + 0.3 + 0.8) / 5),
    ([0.1, 0.2], 0.15),                                          # all are
    ([0.1], 0.1),
    ([0.1, 0.9], 0.5),
    ([0.4, 0.9, 0.7, 0.45, 0.6], (0.9 + 0.7 + 0.6) / 3),         # two of five: N/2 still counts five, so the top 3 of three
    ([0.4, 0.9, 0.7, 0.8, 0.6], (0.9 + 0.8 + 0.7) / 3),          # one of five: the top 3 of four
])
def test_empty_maps(maps, expected):
    assert confidence_ensemble(region_maps(*([p] for p in maps))).item() == pytest.approx(expected, abs=1e-6)


def test_an_empty_region_does_not_touch_the_others():
    maps = torch.tensor([[0.1, 0.6], [0.2, 0.9]]).view(2, 2, 1, 1, 1)
    torch.testing.assert_close(confidence_ensemble(maps).flatten(), torch.tensor([0.15, 0.9]))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_maps_does_not_matter_without_ties(method):
    maps = random_maps(5)
    maps[1, 0] *= 0.4    # one map empty in one region
    permuted = METHODS[method](maps[torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(permuted, METHODS[method](maps))


def test_float16_maps_are_summed_in_float32():
    maps = torch.full((3, 1, 48, 48, 48), 0.9, dtype=torch.float16)    # a sum of 1e5, beyond float16's 65504
    maps[1] = 0.8
    maps[2] = 0.7
    high, middle, low = (float(np.float16(p)) for p in (0.9, 0.8, 0.7))
    torch.testing.assert_close(confidence(maps).flatten(), torch.tensor([high, middle, low]), rtol=1e-5, atol=0)
    expected = {"confidence": (high + middle) / 2, "mean": (high + middle + low) / 3, "geometric": (high * middle * low) ** (1 / 3)}
    for method, value in expected.items():
        merged = METHODS[method](maps)
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged, torch.full_like(merged, value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("et_label", [3, 4])
def test_painting_equals_that_of_data_py(et_label):
    probabilities = random_maps(1)[0]
    probabilities[:, 0, 0, 0] = 0.5    # not above 0.5
    et, tc, wt = probabilities > 0.5
    assert (et & ~tc).any() and (tc & ~wt).any()    # not nested, as raw maps are not
    assert np.array_equal(paint(probabilities, et_label), regions_to_labels(probabilities > 0.5, et_label).numpy())


def test_painting_by_hand():
    # Voxels: nothing, WT, TC without WT, ET without either, all three, exactly one half.
    et, tc, wt = [0.1, 0.1, 0.1, 0.9, 0.9, 0.5], [0.1, 0.1, 0.9, 0.1, 0.9, 0.5], [0.1, 0.9, 0.1, 0.1, 0.9, 0.5]
    probabilities = torch.tensor([et, tc, wt]).view(3, 1, 1, 6)
    assert paint(probabilities, 4).flatten().tolist() == [0, 2, 1, 4, 4, 0]


# ---- the command ------------------------------------------------------------------------------------------------------

# Sheared, anisotropic, off-centre: nothing that a default could look like.
AFFINE = np.array([[-0.9, 0.2, 0.0, 91.5], [0.1, 1.1, 0.3, -20.25], [0.0, -0.2, 2.5, 33.0], [0.0, 0.0, 0.0, 1.0]])


def write_map(path, volume, affine=AFFINE):
    image = nib.Nifti1Image(np.asarray(volume, np.float32), affine)
    image.set_sform(affine, code=4)
    image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), code=1)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)


@pytest.fixture
def folders(tmp_path):
    """Three folders of maps for two cases; returns the folders and {case: (3, 3, X, Y, Z)}."""
    maps = {case: random_maps(3, seed) for seed, case in enumerate(["BraTS2021_00001", "BraTS2021_00002"], 1)}
    for case, volumes in maps.items():
        for name, volume in zip("abc", volumes):
            write_map(tmp_path / name / f"{case}.nii.gz", volume.movedim(0, 3))
    return [tmp_path / name for name in "abc"], maps


def run_here(arguments, capsys, monkeypatch, script=SCRIPT):
    """Runs the script as __main__ inside this process, which has PyTorch loaded already -> exit code, stdout, stderr.

    Any exception but SystemExit, which is what would print a traceback, fails the test.
    """
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    output = capsys.readouterr()
    return code, output.out, output.err


def run_alone(arguments, tmp_path):
    """Runs a copy of the script with no other file of the project beside it, as a user would."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "ensemble.py", *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True)


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_command_writes_the_labels_that_the_functions_give(folders, tmp_path, capsys, monkeypatch, method):
    paths, maps = folders
    code, _, err = run_here(["--method", method, "--out", tmp_path / "out", *paths], capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{case}.nii.gz" for case in maps]
    for case, volumes in maps.items():
        labels = np.asarray(nib.load(tmp_path / "out" / f"{case}.nii.gz").dataobj)
        expected = {m: regions_to_labels(merge(volumes) > 0.5).numpy() for m, merge in METHODS.items()}
        assert len({e.tobytes() for e in expected.values()}) == 3    # the three differ here, so that a mix-up shows
        assert np.array_equal(labels, expected[method])


def test_command_keeps_affine_codes_and_units_and_writes_uint8(folders, tmp_path, capsys, monkeypatch):
    paths, _ = folders
    run_here(["--out", tmp_path / "out", *paths], capsys, monkeypatch)
    found, like = nib.load(tmp_path / "out" / "BraTS2021_00001.nii.gz"), nib.load(paths[0] / "BraTS2021_00001.nii.gz")
    assert found.shape == (4, 5, 6) and found.get_data_dtype() == np.uint8 and found.dataobj.slope == 1
    for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x"):
        assert np.array_equal(found.header[field], like.header[field]), field
    assert np.array_equal(found.header["pixdim"][:4], like.header["pixdim"][:4])
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


def test_command_works_as_a_single_copied_file_with_et_label_3(folders, tmp_path):
    paths, maps = folders
    done = run_alone(["--method", "confidence", "--out", tmp_path / "out", "--et-label", 3, *paths], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for case, volumes in maps.items():
        labels = np.asarray(nib.load(tmp_path / "out" / f"{case}.nii.gz").dataobj)
        assert np.array_equal(labels, regions_to_labels(confidence_ensemble(volumes) > 0.5, et_label=3).numpy())


def test_command_merges_by_confidence_by_default_and_paints_et_as_4(folders, tmp_path, capsys, monkeypatch):
    paths, maps = folders
    run_here(["--out", tmp_path / "out", *paths], capsys, monkeypatch)
    for case, volumes in maps.items():
        labels = np.asarray(nib.load(tmp_path / "out" / f"{case}.nii.gz").dataobj)
        assert np.array_equal(labels, regions_to_labels(confidence_ensemble(volumes) > 0.5, et_label=4).numpy())


def test_command_never_holds_the_maps_of_two_cases(folders, tmp_path, capsys, monkeypatch):
    paths, _ = folders
    load, loaded, alive = ensemble.load_maps, [], []

    def watched(case_paths):
        alive.append(sum(maps() is not None for maps in loaded))    # those of the cases before
        maps, image = load(case_paths)
        loaded.append(weakref.ref(maps))
        return maps, image

    monkeypatch.setattr(ensemble, "load_maps", watched)
    monkeypatch.setattr(sys, "argv", ["ensemble.py", "--out", str(tmp_path / "out"), *map(str, paths)])
    ensemble.main()
    assert alive == [0, 0]


def missing_case(folder):
    (folder / "BraTS2021_00001.nii.gz").unlink()
    return f"{folder / 'BraTS2021_00001.nii.gz'}: missing"


def other_shape(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", np.full((4, 5, 7, 3), 0.5))
    return r"00001.nii.gz: shape (4, 5, 7, 3)"


def other_affine(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", np.full((4, 5, 6, 3), 0.5), np.diag([-1.0, -1, 1, 1]))
    return "affine differs"


def three_axes(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", np.full((4, 5, 6), 0.5))
    return "shape (4, 5, 6), expected (X, Y, Z, 3)"


def text_file(folder):
    (folder / "BraTS2021_00001.nii.gz").write_text("not a volume\n")
    return "00001.nii.gz: cannot be read"


def empty_file(folder):
    (folder / "BraTS2021_00001.nii.gz").write_bytes(b"")
    return "00001.nii.gz: cannot be read"


def truncated_file(folder):
    path = folder / "BraTS2021_00001.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    return "00001.nii.gz: cannot be read"


def one_voxel(value):
    volume = np.full((4, 5, 6, 3), 0.5)
    volume[1, 2, 3, 0] = value
    return volume


def above_one(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", one_voxel(1.5))
    return "values from 0.5 to 1.5, expected probabilities in [0, 1]"


def below_zero(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", one_voxel(-0.25))
    return "values from -0.25 to 0.5, expected probabilities in [0, 1]"


def not_a_number(folder):
    write_map(folder / "BraTS2021_00001.nii.gz", one_voxel(np.nan))
    return "00001.nii.gz: values from nan"


def no_files(folder):
    for path in folder.iterdir():
        path.unlink()
    return f"{folder}: no *.nii.gz file"


def no_folder(folder):
    shutil.rmtree(folder)
    return f"{folder}: no"


def assert_one_line(err, words):
    assert err.startswith("ensemble.py: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert words in err and "Traceback" not in err


BREAKS = [missing_case, other_shape, other_affine, three_axes, text_file, empty_file, truncated_file, above_one, below_zero,
          not_a_number, no_files, no_folder]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
def test_input_that_cannot_be_merged_is_one_line_and_exit_code_2(folders, tmp_path, capsys, monkeypatch, break_it):
    paths, _ = folders
    words = break_it(paths[1])
    before = files_below(tmp_path)
    code, _, err = run_here(["--out", tmp_path / "out", *paths], capsys, monkeypatch)
    assert code == 2
    assert_one_line(err, words)
    assert files_below(tmp_path) == before


def below_a_file(tmp_path, paths):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


def a_file(tmp_path, paths):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def an_input(tmp_path, paths):
    return paths[1] / ".." / paths[1].name


@pytest.mark.parametrize("choose_out", [below_a_file, a_file, an_input], ids=lambda f: f.__name__)
def test_a_place_that_cannot_be_written_is_one_line_and_exit_code_2(folders, tmp_path, capsys, monkeypatch, choose_out):
    paths, _ = folders
    out = choose_out(tmp_path, paths)
    before = files_below(tmp_path)
    code, _, err = run_here(["--out", out, *paths], capsys, monkeypatch)
    assert code == 2
    assert_one_line(err, str(out))
    assert files_below(tmp_path) == before


def test_a_disk_that_fills_up_leaves_no_half_file(folders, tmp_path, capsys, monkeypatch):
    def full(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    paths, _ = folders
    monkeypatch.setattr(nib, "save", full)
    before = files_below(tmp_path)
    code, _, err = run_here(["--out", tmp_path / "out", *paths], capsys, monkeypatch)
    assert code == 2
    assert_one_line(err, "No space left on device")
    assert files_below(tmp_path) == before


def test_the_real_process_ends_with_exit_code_2_and_one_line(folders, tmp_path):
    paths, _ = folders
    words = truncated_file(paths[2])
    before = files_below(tmp_path)
    done = run_alone(["--out", tmp_path / "out", *paths], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, words)
    assert files_below(tmp_path).keys() - before.keys() == {tmp_path / "elsewhere" / "ensemble.py"}
