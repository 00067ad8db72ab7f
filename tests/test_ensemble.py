"""ensemble.py against sums done by hand, scipy's geometric mean, and data.py's painting; then the command."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats

import ensemble
from conftest import voxels, write_header
from data import regions_to_labels
from ensemble import METHODS, confidence, confidence_ensemble, geometric_mean_ensemble, mean_ensemble


def region_maps(*maps):
    """Each argument a map's voxels, of one region -> (N, 1, 1, 1, voxels)."""
    return torch.tensor(maps).view(len(maps), 1, 1, 1, -1)


def nested_maps(n, seed=0):
    """(n, 3, 4, 5, 6): random, but the probabilities of ET, TC and WT rise in that order."""
    return torch.rand(n, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed)).sort(1).values


# ---- section 3.2 -------------------------------------------------------------------------------------------


def test_confidence_is_the_mean_probability_inside_each_region():
    found = confidence(region_maps([0.9, 0.7, 0.4, 0.1], [0.6, 0.2, 0.2, 0.2], [0.5, 0.5, 0.5, 0.75]))
    torch.testing.assert_close(found, torch.tensor([[0.8], [0.6], [0.75]]))    # 1/2 is outside
    maps = nested_maps(5)
    expected = [[p[p > 0.5].mean() for p in regions] for regions in maps.double().numpy()]
    np.testing.assert_allclose(confidence(maps).numpy(), expected, rtol=1e-6)


def test_a_small_sure_map_beats_a_large_unsure_one():
    # The second has the higher mean over all voxels. The rank is of the region, what is averaged is the map.
    maps = region_maps([0.95, 0.1, 0.1], [0.6, 0.6, 0.6])
    assert torch.equal(confidence_ensemble(maps), maps[0])


@pytest.mark.parametrize("maps, expected", [
    ([0.6, 0.9, 0.7, 0.8], (0.9 + 0.8) / 2),                       # N = 4: the top 2, with equal weights
    ([0.6, 0.9], 0.9), ([0.6], 0.6),
    # Where the paper is silent: N/2 is rounded up,
    ([0.6, 0.9, 0.7, 0.8, 0.55], (0.9 + 0.8 + 0.7) / 3),
    # empty maps are not ranked, but counted in N,
    ([0.4, 0.9, 0.7, 0.45, 0.6], (0.9 + 0.7 + 0.6) / 3), ([0.4, 0.9, 0.7, 0.8, 0.6], (0.9 + 0.8 + 0.7) / 3),
    # and where half are empty it is the mean of all.
    ([0.9, 0.1, 0.2, 0.8], 2 / 4), ([0.9, 0.1, 0.2, 0.3, 0.8], 2.3 / 5), ([0.1, 0.2], 0.15), ([0.1], 0.1),
])
def test_the_top_half_by_hand(maps, expected):
    assert confidence_ensemble(region_maps(*maps)).item() == pytest.approx(expected)    # one voxel each


def test_each_region_is_ranked_by_itself():
    maps = torch.tensor([[0.9, 0.6, 0.1, 0.1], [0.6, 0.9, 0.7, 0.2]]).view(2, 4, 1, 1, 1)
    torch.testing.assert_close(confidence_ensemble(maps).flatten(), torch.tensor([0.9, 0.9, 0.4, 0.15]))


def test_ties_go_by_the_order_of_the_maps():
    maps = region_maps([0.6, 0.6], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75])    # three have 0.75
    assert confidence_ensemble(maps).flatten().tolist() == [0.5, 0.5]


def test_mean_and_geometric_mean():
    assert mean_ensemble(region_maps([0.25, 1.0], [0.75, 0.5])).flatten().tolist() == [0.5, 0.75]
    expected = stats.gmean(nested_maps(5).double().numpy(), axis=0)
    np.testing.assert_allclose(geometric_mean_ensemble(nested_maps(5)).numpy(), expected, rtol=1e-5)
    assert geometric_mean_ensemble(region_maps(0.0, 0.9)).item() == 0
    assert geometric_mean_ensemble(region_maps(*[1e-30] * 40)).item() == pytest.approx(1e-30, rel=1e-4, abs=0)


def test_float16_maps_are_summed_in_float32():
    p = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float16).view(3, 1, 1, 1, 1)
    maps, (high, middle, low) = p.expand(3, 1, 48, 48, 48), p.flatten().tolist()    # sums beyond 65504
    assert confidence(maps).flatten().tolist() == pytest.approx([high, middle, low], rel=1e-5)
    for method, expected in (("confidence", (high + middle) / 2), ("mean", (high + middle + low) / 3),
                             ("geometric", (high * middle * low) ** (1 / 3))):
        assert METHODS[method](maps)[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("function", [confidence, *METHODS.values()])
def test_nan_and_another_rank_are_refused(function):
    maps = nested_maps(2)
    for wrong in (maps[0], maps[None], torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"\(N, C, D, H, W\)"):
            function(wrong)
    maps[1, 2, 3, 4, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        function(maps)


# ---- the command -------------------------------------------------------------------------------------------

# Sheared, anisotropic, off-centre: nothing that a default could look like.
AFFINE = np.array([[-0.9, 0.2, 0, 91.5], [0.1, 1.1, 0.3, -20.25], [0, -0.2, 2.5, 33], [0, 0, 0, 1]])


def write_map(path, volume, affine=AFFINE):
    """Writes (3, X, Y, Z) as X, Y, Z, 3."""
    image = nib.Nifti1Image(np.moveaxis(np.asarray(volume, np.float32), 0, -1), affine)
    image.set_sform(affine, code=4)
    image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), code=1)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)


@pytest.fixture
def folders(tmp_path):
    """Three folders with maps of two cases, and {file name: (3, 3, X, Y, Z)}."""
    maps = {f"BraTS2021_0000{seed}.nii.gz": nested_maps(3, seed) for seed in (1, 2)}
    for name, volumes in maps.items():
        for folder, volume in zip("abc", volumes):
            write_map(tmp_path / folder / name, volume)
    (tmp_path / "a" / "._BraTS2021_00001.nii.gz").write_bytes(b"")    # a Mac leaves such files
    return [tmp_path / folder for folder in "abc"], maps


@pytest.fixture
def merge(call, tmp_path, recwarn):
    def merge(*arguments):
        """Runs the command in this process -> exit code, stderr: at most one line, and no warning."""
        code, _, error = call("ensemble.py", "--out", tmp_path / "out", *arguments)
        assert error.count("\n") == (code == 2) and not recwarn.list
        return code, error
    return merge


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_command_writes_what_the_functions_give(folders, tmp_path, merge, method):
    paths, maps = folders
    assert merge(*(["--method", method] if method else []), *paths) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == maps.keys()
    for name, volumes in maps.items():
        expected = {key: regions_to_labels(function(volumes) > 0.5) for key, function in METHODS.items()}
        assert len({labels.numpy().tobytes() for labels in expected.values()}) == 3    # a mix-up would show
        found, like = (nib.load(tmp_path / folder / name) for folder in ("out", "a"))
        assert np.array_equal(found.dataobj, expected[method or "confidence"])
        assert (found.get_data_dtype(), found.dataobj.slope) == (np.uint8, 1)
        for field in ("sform_code", "qform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d"):
            assert found.header[field] == like.header[field]
        np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("case, flags, necrosis, oedema, enhancing", [
    ("BraTS2021_00001", [], 1, 2, 4), ("BraTS-GLI-00001-000", [], 1, 2, 3), ("BRATS_001", [], 2, 1, 3),
    ("UCSF-PDGM-0004", [], 1, 2, 4), ("BraTS-PED-00002-000", ["--labels", 2, 4, 1], 2, 4, 1),
])
def test_labels_are_those_of_the_cases_cohort(tmp_path, merge, case, flags, necrosis, oedema, enhancing):
    # Resampling may overshoot a little.
    wt, tc, et = [0.5, 0.9, 0.9, 1.0009], [0.1, 0.1, 0.9, 0.9], [-0.0009, 0.1, 0.1, 0.9]
    write_map(tmp_path / "a" / f"{case}.nii.gz", np.reshape([et, tc, wt], (3, 4, 1, 1)))
    assert merge(tmp_path / "a", *flags) == (0, "")
    assert voxels(tmp_path / "out" / f"{case}.nii.gz").flatten().tolist() == [0, oedema, necrosis, enhancing]


def tumour():
    """(3, 12, 12, 12): ET, TC and WT as cubes of 3, 6 and 9 voxels a side, one inside the other."""
    volume = np.full((3, 12, 12, 12), 0.1)
    for region, side in zip(volume, (3, 6, 9)):
        region[1:1 + side, 1:1 + side, 1:1 + side] = 0.9
    return volume


@pytest.mark.parametrize("case, order, words", [
    *[("case", order, "expected ET, TC, WT") for order in ([1, 2, 0], [2, 1, 0], [0, 2, 1])],
    ("BraTS-PED-00002-000", [0, 1, 2], "--labels")])    # MONAI's order: TC, WT, ET
def test_another_order_and_unknown_labels_are_refused(tmp_path, merge, case, order, words):
    write_map(tmp_path / "a" / f"{case}.nii.gz", tumour()[order])
    code, error = merge(tmp_path / "a")
    assert code == 2 and f"{case}.nii.gz" in error and words in error


def test_et_about_tc_is_merged_with_a_warning(call, tmp_path):
    """A young network's ET may hold its TC, so another order of these two cannot be told from it."""
    volume = tumour()[[1, 0, 2]]
    write_map(tmp_path / "a" / "case.nii.gz", volume)
    _, printed, _ = call("ensemble.py", "--out", tmp_path / "out", tmp_path / "a", ok=0)
    assert f"warning: {tmp_path}/a/case.nii.gz: most of ET lies outside TC, expected the order" in printed
    assert np.array_equal(voxels(tmp_path / "out/case.nii.gz"), regions_to_labels(torch.tensor(volume) > 0.5))


@pytest.mark.parametrize("p_et, p_others", [(0.9, 0.9), (0.1, 0.9), (0.9, 0.1)])    # whole; no ET; ET alone
def test_stray_voxels_of_a_young_network_are_merged(tmp_path, merge, p_et, p_others):
    volume = np.where(tumour() > 0.5, np.reshape([p_et, p_others, p_others], (3, 1, 1, 1)), 0.1)
    volume[0, 11, 11, :10] = 0.9    # 10 voxels of ET outside all
    write_map(tmp_path / "a" / "case.nii.gz", volume)
    assert merge(tmp_path / "a") == (0, "")
    assert np.array_equal(voxels(tmp_path / "out/case.nii.gz"), regions_to_labels(torch.tensor(volume) > 0.5))


HALF, SHAPE, NINE = np.full((3, 4, 5, 6), 0.5), (4, 5, 6, 3), np.full(360, 9, np.float32).tobytes()
DAMAGES = {    # what is done to a file, what the line must tell besides the file's name
    "missing from another": (lambda path: path.unlink(), "no such file"),
    "another shape": (lambda path: write_map(path, HALF[..., :5]), "(4, 5, 5, 3)"),
    "another affine": (lambda path: write_map(path, HALF, np.diag([-1.0, -1, 1, 1])), "affine"),
    "two regions": (lambda path: write_map(path, HALF[:2]), "(4, 5, 6, 2)"),
    "one region": (lambda path: nib.save(nib.Nifti1Image(HALF[0], AFFINE), path), "(4, 5, 6)"),
    "too large": (lambda path: write_header(path, (5000, 5000, 2, 3)), "(5000, 5000, 2, 3)"),
    "above one": (lambda path: write_map(path, HALF + 1), "1.5"),
    "below zero": (lambda path: write_map(path, HALF - 0.75), "-0.25"),
    "not a number": (lambda path: write_map(path, np.where(np.arange(6) == 3, np.nan, HALF)), "nan"),
    "text": (lambda path: path.write_text("not a volume"), ""),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), ""),
    "offset": (lambda path: write_header(path, SHAPE, NINE, vox_offset=-5), ""),
    "slope": (lambda path: write_header(path, SHAPE, NINE, scl_slope=3e38), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_merged_is_named(folders, tmp_path, merge, damage):
    path, (do, found) = tmp_path / "b" / "BraTS2021_00001.nii.gz", DAMAGES[damage]
    do(path)
    code, error = merge(*(folders[0] if "another" in damage else [path.parent]))
    assert code == 2 and str(path) in error and found in error
    assert not list(tmp_path.glob("out/*"))


def test_a_case_must_be_in_every_folder(folders, tmp_path, merge):
    a, b, c = folders[0]
    (missing := a / "BraTS2021_00001.nii.gz").unlink()
    for paths, path in (([a, b, c], missing), ([b, c, tmp_path / "d"], tmp_path / "d")):
        code, error = merge(*paths)
        assert code == 2 and str(path) in error and not (tmp_path / "out").exists()


def test_what_nibabel_logs_is_not_said_twice(run, tmp_path):
    write_map(tmp_path / "a" / "case.nii.gz", HALF)
    write_header(tmp_path / "a" / "case.nii.gz", SHAPE, NINE, datatype=9999)
    alone = shutil.copy(ensemble.__file__, tmp_path)
    done = run(alone, "--out", tmp_path / "out", tmp_path / "a", ok=2)
    assert done.stderr.count("\n") == 1 and "a/case.nii.gz" in done.stderr
