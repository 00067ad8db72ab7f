"""examples/phantom.py: BraTS's layout and headers, the same voxels from the same seed, and a task that one threshold does not solve."""

import importlib.util
import os

import nibabel as nib
import numpy as np
import pytest

from conftest import REPO

_spec = importlib.util.spec_from_file_location("phantom", REPO / "examples" / "phantom.py")
phantom = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(phantom)

SUFFIXES = ("t1", "t1ce", "t2", "flair", "seg")


@pytest.fixture(scope="module")
def twelve():
    """[(images (4, X, Y, Z), labels (X, Y, Z))] of the default cohort, a quarter of BraTS's resolution."""
    return [phantom.make_case((60, 60, 40), 0, number) for number in range(12)]


def voxels(folder, name):
    return [np.asarray(nib.load(folder / name / f"{name}_{suffix}.nii.gz").dataobj) for suffix in SUFFIXES]


# ---- files ------------------------------------------------------------------------------------------------------------


def test_files_are_laid_out_as_brats_2021(cohort):
    expected = [f"BraTS2021_{n:05d}/BraTS2021_{n:05d}_{suffix}.nii.gz" for n in range(6) for suffix in SUFFIXES]
    assert sorted(str(path.relative_to(cohort)) for path in cohort.rglob("*") if path.is_file()) == sorted(expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_headers_are_those_of_brats_2021(cohort, suffix):
    image = nib.load(cohort / "BraTS2021_00002" / f"BraTS2021_00002_{suffix}.nii.gz")
    assert image.get_data_dtype() == (np.uint8 if suffix == "seg" else np.int16)
    assert image.affine.tolist() == [[-1, 0, 0, 0], [0, -1, 0, 31], [0, 0, 1, 0], [0, 0, 0, 1]]    # 31: the last voxel of 32
    assert (image.header["sform_code"], image.header["qform_code"], image.header["xyzt_units"]) == (1, 1, 2)    # scanner, scanner, mm
    assert np.array_equal(image.header.get_qform(), image.affine) and image.header.get_zooms() == (1, 1, 1)
    assert "".join(nib.aff2axcodes(image.affine)) == "LPS"


def test_headers_are_those_of_the_real_case(run, real_case, tmp_path):
    run("examples/phantom.py", tmp_path, "--cases", 1, ok=0)    # in full size
    for suffix in SUFFIXES:
        real = next(real_case.rglob(f"BraTS2021_*_{suffix}.nii.gz"))
        ours, theirs = nib.load(next(tmp_path.rglob(f"*_{suffix}.nii.gz"))), nib.load(real)
        assert ours.shape == theirs.shape and np.array_equal(ours.affine, theirs.affine)
        for field in ("datatype", "sform_code", "qform_code", "xyzt_units"):
            assert ours.header[field] == theirs.header[field], field
        assert np.array_equal(ours.header["pixdim"][1:4], theirs.header["pixdim"][1:4])


# ---- what a case depends on -------------------------------------------------------------------------------------------


def test_a_case_depends_on_seed_and_number_alone(run, cohort, tmp_path):
    # Neither on how many cases there are nor on which one is first.
    run("examples/phantom.py", tmp_path, "--cases", 1, "--first", 4, "--shape", 32, 32, 32, "--seed", 0, ok=0)
    assert os.listdir(tmp_path) == ["BraTS2021_00004"]
    images, labels = phantom.make_case((32, 32, 32), 0, 4)
    for alone, among_six, in_memory in zip(voxels(tmp_path, "BraTS2021_00004"), voxels(cohort, "BraTS2021_00004"), (*images, labels)):
        assert np.array_equal(alone, among_six) and np.array_equal(alone, in_memory)


def test_seeds_and_numbers_give_different_cases():
    cases = [phantom.make_case((32, 32, 32), seed, number) for seed, number in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, (images, labels) in enumerate(cases):
        for other_images, other_labels in cases[:i]:
            either = (images > 0) | (other_images > 0)
            assert np.mean((images != other_images)[either]) > 0.9
            assert not np.array_equal(labels, other_labels)


def test_a_small_shape_is_the_same_head_seen_coarsely():
    fine_images, fine = phantom.make_case((96, 96, 64), 0, 3)
    images, coarse = phantom.make_case((48, 48, 32), 0, 3)
    tumour, sampled = coarse > 0, fine[::2, ::2, ::2] > 0
    assert 2 * (tumour & sampled).sum() / (tumour.sum() + sampled.sum()) > 0.75
    for image, fine_image in zip(images, fine_images):    # the scanner's gain is drawn from 200 to 3000
        assert 0.9 < image[image > 0].mean() / fine_image[fine_image > 0].mean() < 1.1


# ---- what is in a case ------------------------------------------------------------------------------------------------


def test_labels_and_background(twelve):
    for number, (images, labels) in enumerate(twelve):
        assert images.dtype == np.int16 and labels.dtype == np.uint8
        _, enhancing, _ = phantom.traits(np.random.default_rng((0, number)))
        assert set(np.unique(labels)) == ({0, 1, 2, 4} if enhancing else {0, 1, 2})
        brain = images[0] > 0
        assert all(np.array_equal(image > 0, brain) for image in images), "modalities are stripped differently"
        assert images.min() == 0 and (labels[~brain] == 0).all()
        assert 0.12 < brain.mean() < 0.22    # 0.17 in BraTS2021_00006


def test_regions_have_a_decent_size(twelve):
    for images, labels in twelve:
        whole, core = (labels > 0).sum(), ((labels == 1) | (labels == 4)).sum()
        assert 0.05 < whole / (images[0] > 0).sum() < 0.13
        assert 0.3 < core / whole < 0.65
        assert (labels == 1).sum() > 0.05 * core
    assert sum((labels == 4).any() for _, labels in twelve) >= 8


def test_tumours_look_as_they_should(twelve):
    """The intensity relations that make the four modalities worth having, in the mean over cases."""
    def contrast(channel, inside, outside):
        return np.mean([images[channel][inside(labels)].mean() / images[channel][outside(images, labels)].mean() for images, labels in twelve
                        if inside(labels).any()])

    def healthy(images, labels):
        return (images[0] > 0) & (labels == 0)

    assert contrast(3, lambda labels: labels == 2, healthy) > 1.2      # oedema is bright in FLAIR
    assert contrast(2, lambda labels: labels > 0, healthy) > 1.2       # the whole tumour is in T2
    assert contrast(1, lambda labels: labels == 4, healthy) > 1.4      # the rim is in T1ce
    assert contrast(1, lambda labels: labels == 4, healthy) > 1.5 * contrast(0, lambda labels: labels == 4, healthy)    # and not in T1
    assert contrast(1, lambda labels: labels == 1, healthy) < 0.9      # necrosis is dark


def test_the_rim_encloses_the_necrosis(twelve):
    for images, labels in twelve:
        if (labels == 4).any():
            core = np.argwhere(labels == 1)
            rim = np.argwhere(labels == 4)
            centre = core.mean(0)
            assert np.linalg.norm(rim - centre, axis=1).mean() > np.linalg.norm(core - centre, axis=1).mean()


def test_shares_of_cases_without_enhancement_and_with_a_lookalike():
    traits = np.array([phantom.traits(np.random.default_rng((0, number))) for number in range(2000)])
    side, enhancing, lookalike = traits.T
    assert abs(np.mean(side == 1) - 0.5) < 0.05
    assert abs(np.mean(enhancing) - 0.9) < 0.03    # sd 0.007
    assert abs(np.mean(lookalike) - 1 / 3) < 0.05    # sd 0.011


def otsu(values):
    """The threshold with the largest variance between the two classes (Otsu 1979), over a histogram of 256 bins."""
    counts, edges = np.histogram(values, bins=256)
    middles = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sums = (counts * middles).cumsum()
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return edges[1:-1][between.argmax()]


def test_otsu_finds_the_gap_between_two_peaks():
    values = np.concatenate([np.random.default_rng(0).normal(10, 1, 5000), np.random.default_rng(1).normal(20, 1, 5000)])
    assert 13 < otsu(values) < 17


def test_one_threshold_does_not_solve_it(twelve):
    scores = []
    for images, labels in twelve:
        flair, brain = images[3], images[3] > 0
        predicted, truth = brain & (flair > otsu(flair[brain])), labels > 0
        scores.append(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    assert 0.1 < np.mean(scores) < 0.6, scores    # nor is FLAIR without any trace of it


# ---- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, named", [
    (["--cases", "0"], "--cases 0"),
    (["--shape", "32", "31", "32"], "--shape 32 31 32"),
    (["--seed", "-1"], "--seed"),
    (["--shape", "32", "32"], "--shape"),
    (["--cases", "many"], "--cases"),
])
def test_bad_arguments_are_one_line(run, tmp_path, arguments, named):
    process = run("examples/phantom.py", tmp_path / "out", *arguments, ok=2)
    assert len(process.stderr.splitlines()) == 1 and named in process.stderr and not process.stdout
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    process = run("examples/phantom.py", tmp_path / "file" / "out", "--cases", 1, "--shape", 32, 32, 32, ok=2)
    assert len(process.stderr.splitlines()) == 1 and str(tmp_path / "file" / "out") in process.stderr
    assert os.listdir(tmp_path) == ["file"]
