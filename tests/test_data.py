"""data.py against NumPy, SciPy, nibabel's world coordinates and MONAI, by hand, and by property."""

import math
import os
import random
import shutil
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import data
from data import Case, InputError, find_cases, load_case, save_volume, split_folds

OLD, NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")


def touch(folder, *names):
    """Empty files: finding cases reads listings only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def touch_case(folder, name, modalities=OLD, separator="_", ending=".nii.gz", seg=True):
    return touch(folder, *[f"{name}{separator}{m}{ending}" for m in (*modalities, *["seg"] * seg)])


def make_cases(names, patient=lambda name: name):
    return [Case(name, patient(name), (f"{name}_t1",) * 4, None, 4) for name in names]


# ---- finding cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, modalities, separator, ending, et_label, patient", [
    ("HGG/Brats18_2013_10_1", OLD, "_", ".nii.gz", 4, "Brats18_2013_10_1"),
    ("LGG/BraTS19_TCIA13_650_1", OLD, "_", ".nii", 4, "BraTS19_TCIA13_650_1"),
    ("BraTS20_Training_001", OLD, "_", ".nii", 4, "BraTS20_Training_001"),
    ("deep/down/BraTS2021_00000", OLD, "_", ".nii.gz", 4, "BraTS2021_00000"),
    ("BraTS-GLI-00005-100", NEW, "-", ".nii.gz", 3, "BraTS-GLI-00005"),
    ("BraTS-GLI-00005-101", NEW, "-", ".nii", 3, "BraTS-GLI-00005"),
])
def test_every_generation_is_found(tmp_path, folder, modalities, separator, ending, et_label, patient):
    name = folder.split("/")[-1]
    touch_case(tmp_path / folder, name, modalities, separator, ending)
    touch(tmp_path / folder, "survival.csv", "notes.nii.gz")    # what is no modality is no case
    path = tmp_path / folder / name
    images = tuple(path.with_name(f"{name}{separator}{m}{ending}") for m in modalities)
    expected = Case(name, patient, images, path.with_name(f"{name}{separator}seg{ending}"), et_label)
    assert find_cases(tmp_path) == [expected]
    assert find_cases(tmp_path / folder) == [expected], "one case's own folder is a cohort too"


def test_a_cohort_of_nested_grades_is_sorted_by_name(tmp_path):
    for folder, name in [("LGG", "BraTS19_C"), ("HGG", "BraTS19_D"), ("LGG", "BraTS19_A"), ("HGG", "BraTS19_B")]:
        touch_case(tmp_path / folder / name, name)
    assert [case.name for case in find_cases(tmp_path)] == ["BraTS19_A", "BraTS19_B", "BraTS19_C", "BraTS19_D"]


@pytest.mark.parametrize("extra, expected", [
    (["W39_1998.09.19_Segm.nii"], "W39_1998.09.19_Segm.nii"),
    (["W39_1998.09.19_Segm.nii", "Segm_old.nii.gz"], None),    # two candidates: no guess
    (["case_seg.nii", "W39_1998.09.19_Segm.nii"], "case_seg.nii"),    # its own name comes first
    ([], None),
])
def test_one_oddly_named_segmentation_is_taken(tmp_path, extra, expected):
    folder = touch(touch_case(tmp_path / "case", "case", ending=".nii", seg=False), *extra)
    assert [case.label for case in find_cases(tmp_path)] == [folder / expected if expected else None]


def test_resource_forks_are_ignored(tmp_path):
    touch(touch_case(tmp_path / "a", "a"), *[f"._a_{m}.nii.gz" for m in (*OLD, "seg")], "._W39_Segm.nii")
    assert [case.name for case in find_cases(tmp_path)] == ["a"]


def test_linked_folders_are_followed_once(tmp_path):
    touch_case(tmp_path / "elsewhere" / "a", "a")
    cohort = touch_case(tmp_path / "cohort" / "b", "b").parent
    (cohort / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (cohort / "again").symlink_to(tmp_path / "elsewhere")    # the same folder by another way: no duplicate
    (cohort / "loop").symlink_to(cohort)
    assert [case.name for case in find_cases(cohort)] == ["a", "b"]


def test_a_name_found_twice_is_an_error_that_names_both_folders(tmp_path):
    touch_case(tmp_path / "one" / "a", "a")
    touch_case(tmp_path / "two" / "a", "a")
    with pytest.raises(InputError) as error:
        find_cases(tmp_path)
    assert str(tmp_path / "one" / "a") in str(error.value) and str(tmp_path / "two" / "a") in str(error.value)


def test_a_missing_modality_keeps_its_place(tmp_path):
    folder = touch(tmp_path / "a", "a_t1.nii.gz", "a_t2.nii.gz", "a_flair.nii.gz")
    assert find_cases(tmp_path)[0].images == tuple(folder / f"a_{m}.nii.gz" for m in OLD)


@pytest.mark.parametrize("root", ["", "nowhere"])
def test_no_case_says_where_it_looked_and_how_to_get_some(tmp_path, root):
    touch(tmp_path, "readme.txt")
    with pytest.raises(InputError) as error:
        find_cases(tmp_path / root)
    for word in (str(tmp_path / root), "BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz", "synapse.org", "examples/phantom.py"):
        assert word in str(error.value)


def test_the_cohort_is_described_with_generation_and_et_label(tmp_path):
    for name in ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"):
        touch_case(tmp_path / name, name, NEW, "-")
    line = data.describe(find_cases(tmp_path))
    assert "3 cases of 2 patients" in line and "ET is label 3" in line and "ET is label 4" not in line
    assert line.count("label 4, the resection cavity") == 1


# ---- folds ------------------------------------------------------------------------------------------------------------


def timepoints():
    """23 patients with one to three time points each."""
    names = [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(23) for time in range(1 + patient % 3)]
    return make_cases(names, patient=lambda name: name[:-4])


def fold_names(cases, **settings):
    return [sorted(case.name for case in fold) for fold in split_folds(cases, **settings)]


@pytest.mark.parametrize("folds", [2, 5, 23])
def test_folds_are_a_balanced_partition_by_patient(folds):
    cases = timepoints()
    split = split_folds(cases, folds)
    assert len(split) == folds
    assert sorted(case.name for fold in split for case in fold) == sorted(case.name for case in cases)
    patients = [{case.patient for case in fold} for fold in split]
    assert sum(map(len, patients)) == 23, "a patient is in two folds"
    assert max(map(len, patients)) - min(map(len, patients)) <= 1


def test_folds_depend_on_names_and_seed_alone():
    cases = timepoints()
    shuffled = random.Random(0).sample(cases, len(cases))
    moved = [case._replace(images=("elsewhere",) * 4, label="elsewhere", et_label=4) for case in shuffled]
    np.random.seed(1), torch.manual_seed(1), random.seed(1)
    assert fold_names(moved) == fold_names(cases)
    assert len({str(fold_names(cases, seed=seed)) for seed in range(10)}) == 10, "two seeds give the same folds"


def test_folds_never_move():
    # The order of `printf "0 P$i" | sha256sum` for i = 0 to 9 is 1 8 5 7 9 0 6 2 4 3, dealt out in turn.
    expected = [["P0", "P1"], ["P6", "P8"], ["P2", "P5"], ["P4", "P7"], ["P3", "P9"]]
    assert fold_names(make_cases([f"P{i}" for i in range(10)])) == expected


def test_fewer_patients_than_folds_is_an_error():
    cases = make_cases(["A-0", "A-1", "A-2", "B-0"], patient=lambda name: name[0])    # four cases, but two patients
    with pytest.raises(InputError, match="--folds 3.* 2 patients"):
        split_folds(cases, 3)
    assert len(split_folds(cases, 2)) == 2


# ---- reading and writing ----------------------------------------------------------------------------------------------

SHAPE = (5, 6, 7)
TURN = np.deg2rad(8)    # oblique, as clinical images are, and with three different voxel sides
LPS = np.array([[math.cos(TURN), -math.sin(TURN), 0, 11], [math.sin(TURN), math.cos(TURN), 0, 22], [0, 0, 1, -33], [0, 0, 0, 1]]) @ np.diag(
    [-1.0, -1.5, 2.0, 1])
CODES = ["LPS", "RAS", "LAS", "SPL", "PIR", "IRA"]


def stored_as(code, array, affine=LPS):
    """The same anatomy as `array`, which is LPS, with axes that run as `code` says. By hand, without nibabel's help."""
    axes = ["LPS".index({"R": "L", "A": "P", "I": "S"}.get(letter, letter)) for letter in code]
    turned = [letter in "RAI" for letter in code]
    to_lps = np.zeros((4, 4))    # voxel of the file -> voxel of `array`
    to_lps[3, 3] = 1
    for i, (axis, turn) in enumerate(zip(axes, turned)):
        to_lps[axis, i] = -1 if turn else 1
        to_lps[axis, 3] = array.shape[axis] - 1 if turn else 0
    array = array.transpose(*axes, *range(3, array.ndim))[tuple(slice(None, None, -1 if turn else 1) for turn in turned)]
    assert "".join(nib.aff2axcodes(affine @ to_lps)) == code
    return array, affine @ to_lps


def write(path, array, affine=LPS, sform=1, qform=1, slope=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 3000
    if slope:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


def anatomy(seed=0, shape=SHAPE):
    """Four int16 modalities and uint8 labels, every voxel random: no two orientations look alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 1000, (4, *shape), dtype=np.int16), rng.choice(np.array([0, 1, 2, 4], np.uint8), shape)


def write_case(folder, images, labels=None, codes=("LPS",) * 5):
    for suffix, volume, code in zip((*OLD, "seg"), (*images, labels), codes):
        if volume is not None:
            write(folder / f"{folder.name}_{suffix}.nii.gz", *stored_as(code, volume))
    return find_cases(folder)[0]


def regions_by_hand(labels, et_label=4):
    return np.stack([labels == et_label, (labels == et_label) | (labels == 1), (labels == et_label) | (labels == 1) | (labels == 2)])


@pytest.mark.parametrize("codes", [(code,) * 5 for code in CODES] + [("RAS", "LPS", "SPL", "IRA", "PIR")])
def test_the_same_anatomy_in_any_orientation_is_the_same_in_memory(tmp_path, codes):
    images, labels = anatomy()
    image, target, affine = load_case(write_case(tmp_path / "a", images, labels, codes))
    assert image.dtype == torch.float32 and target.dtype == torch.bool
    assert np.array_equal(image.numpy(), images)
    assert np.array_equal(target.numpy(), regions_by_hand(labels))
    assert np.allclose(affine, LPS, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_segmentations_of_any_type_read_alike(tmp_path, dtype):
    images, labels = anatomy()
    _, target, _ = load_case(write_case(tmp_path / "a", images, labels.astype(dtype)))
    assert np.array_equal(target.numpy(), regions_by_hand(labels))


def test_scaled_integers_are_unscaled(tmp_path):
    images, _ = anatomy()
    case = write_case(tmp_path / "a", images)
    write(case.images[2], images[2], slope=(0.5, -7))    # value = 0.5 * stored - 7
    assert np.array_equal(load_case(case)[0][2], 0.5 * images[2] - 7)


def test_resection_cavity_is_background(tmp_path):
    images, _ = anatomy()
    labels = np.random.default_rng(1).integers(0, 5, SHAPE, dtype=np.uint8)    # 0 to 4, as in BraTS 2024
    for suffix, volume in zip((*NEW, "seg"), (*images, labels)):
        write(tmp_path / f"BraTS-GLI-00001-000-{suffix}.nii.gz", volume)
    _, target, _ = load_case(find_cases(tmp_path)[0])
    assert np.array_equal(target.numpy(), regions_by_hand(labels, et_label=3))
    assert (labels == 4).any() and not target.numpy()[:, labels == 4].any()


@pytest.mark.parametrize("what", ["labels", "maps"])
@pytest.mark.parametrize("code, ending, sform, qform", [
    *[(code, ".nii.gz", 1, 1) for code in CODES], ("RAS", ".nii", 2, 1), ("SPL", ".nii.gz", 0, 1), ("LPS", ".nii.gz", 4, 0)])
def test_a_saved_volume_lies_where_its_voxels_were(tmp_path, code, ending, sform, qform, what):
    like = write(tmp_path / f"like{ending}", *stored_as(code, anatomy()[0][0]), sform=sform, qform=qform, slope=(2, 10))
    rng = np.random.default_rng(2)
    volume = rng.choice(np.array([0, 1, 2, 4], np.uint8), SHAPE) if what == "labels" else rng.random((3, *SHAPE), np.float32)
    save_volume(tmp_path / "out.nii.gz", volume, like)

    like, saved = nib.load(like), nib.load(tmp_path / "out.nii.gz")
    array = np.asanyarray(saved.dataobj)
    assert array.dtype == volume.dtype and array.shape == like.shape + (3,) * (what == "maps")
    assert np.array_equal(saved.affine, like.affine)
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert saved.header[field] == like.header[field]
    assert saved.header["cal_max"] == 0, "labels shown from 0 to 3000 are black"
    # Every voxel of the file, by way of the world, must hold what the volume in memory has at that place.
    voxels = np.indices(saved.shape[:3]).reshape(3, -1)
    world = saved.affine @ np.vstack([voxels, np.ones_like(voxels[:1])])
    d, h, w = (np.linalg.inv(LPS) @ world)[:3].round(1).astype(int)
    assert np.array_equal(array[tuple(voxels)], np.moveaxis(volume, 0, -1)[d, h, w] if what == "maps" else volume[d, h, w])


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    like = write(tmp_path / "like.nii.gz", anatomy()[0][0])
    out = tmp_path / "out.nii.gz"
    out.write_bytes(b"old")

    def full_disk(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.nib, "save", full_disk)
    with pytest.raises(OSError):
        save_volume(out, np.zeros(SHAPE, np.uint8), like)
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["like.nii.gz", "out.nii.gz"]


# ---- labels <-> regions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("et_label, labels, et, tc, wt", [
    (4, [0, 1, 2, 4], [0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]),
    (3, [0, 1, 2, 3, 4], [0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0]),    # 4: the resection cavity
])
def test_labels_to_regions_by_hand(et_label, labels, et, tc, wt):
    labels = torch.tensor(labels, dtype=torch.uint8).view(1, 1, -1)
    regions = data.labels_to_regions(labels, et_label)
    assert regions.dtype == torch.bool
    assert regions.int().view(3, -1).tolist() == [et, tc, wt]
    batch = torch.stack([labels, labels.flip(-1)])    # leading axes stay in front
    assert torch.equal(data.labels_to_regions(batch, et_label), torch.stack([regions, regions.flip(-1)]))


@pytest.mark.parametrize("et_label", [4, 3])
def test_regions_to_labels_by_hand(et_label):
    # All eight combinations, nested or not: ET wins over TC, TC over WT.
    et, tc, wt = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1]]).bool().view(3, 1, 1, 8)
    e = et_label
    labels = data.regions_to_labels(torch.stack([et, tc, wt]), et_label)
    assert labels.dtype == torch.uint8
    assert labels.flatten().tolist() == [0, 2, 1, 1, e, e, e, e]


@pytest.mark.parametrize("et_label", [4, 3])
def test_labels_survive_the_way_to_regions_and_back(et_label):
    labels = torch.from_numpy(np.random.default_rng(0).choice(np.array([0, 1, 2, et_label], np.uint8), SHAPE))
    assert torch.equal(data.regions_to_labels(data.labels_to_regions(labels, et_label), et_label), labels)


def test_regions_are_those_of_monai():
    transforms = pytest.importorskip("monai.transforms")
    labels = torch.from_numpy(anatomy()[1])
    tc, wt, et = transforms.ConvertToMultiChannelBasedOnBratsClasses()(labels[None])    # in its order
    assert torch.equal(data.labels_to_regions(labels), torch.stack([et, tc, wt]))


# ---- normalisation ----------------------------------------------------------------------------------------------------


def with_zeros(seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    image = rng.normal(np.array([100, 2000, 5, -3]).reshape(4, 1, 1, 1), np.array([30, 500, 1, 2]).reshape(4, 1, 1, 1), (4, *shape))
    image[:, rng.random(shape) < 0.8] = 0    # few voxels are left: population and sample sd differ visibly
    image[1, 0] = 0    # and not the same ones in every channel
    return torch.from_numpy(image.astype(np.float32))


def test_normalize_is_the_z_score_of_nonzero_voxels():
    image = with_zeros()
    before = image.clone()
    normalized = data.normalize(image)
    assert torch.equal(image, before), "the input was changed"
    for channel, result in zip(image.double().numpy(), normalized.numpy()):
        brain = channel != 0
        expected = (channel[brain] - channel[brain].mean()) / channel[brain].std()    # NumPy's default is the population's
        assert np.allclose(result[brain], expected, atol=1e-5)
        assert not result[~brain].any()


def test_normalize_is_the_same_on_any_number_of_threads():
    image = torch.randn(4, 96, 96, 96, generator=torch.Generator().manual_seed(0)) * 300 + 500    # long enough for PyTorch's sums to be shared out
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(data.normalize(image))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_normalize_is_that_of_monai():
    transforms = pytest.importorskip("monai.transforms")
    image = with_zeros(1)
    expected = transforms.NormalizeIntensity(nonzero=True, channel_wise=True)(image.clone())
    assert torch.allclose(data.normalize(image), torch.as_tensor(expected), atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 7.0, 1000.1])
def test_a_constant_channel_gives_numbers(constant):
    image = with_zeros()
    image[2][image[2] != 0] = constant
    normalized = data.normalize(image)
    assert normalized.isfinite().all() and normalized[2].abs().max() <= 1
    assert torch.equal(normalized[[0, 1, 3]], data.normalize(with_zeros())[[0, 1, 3]])


# ---- crop and flips ---------------------------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def coordinates(shape):
    """Image (4, D, H, W): each voxel holds its own d + 1, h + 1, w + 1 (0 is padding) and 1; target (3, D, H, W): which of them are odd."""
    d, h, w = torch.meshgrid(*(torch.arange(1.0, n + 1) for n in shape), indexing="ij")
    image = torch.stack([d, h, w, torch.ones(shape)])
    return image, image[:3] % 2 == 1


def test_a_crop_is_a_box_of_image_and_target_alike_and_every_place_is_reached():
    image, target = coordinates((6, 5, 4))
    corners = []
    for seed in range(600):
        crop, crop_target = data.random_crop(image, target, (4, 4, 4), generator(seed))
        d, h, w = (int(start) - 1 for start in crop[:3, 0, 0, 0])
        assert torch.equal(crop, image[:, d:d + 4, h:h + 4, w:w + 4])
        assert torch.equal(crop_target, target[:, d:d + 4, h:h + 4, w:w + 4])
        corners.append((d, h, w))
    counts = [corners.count(corner) for corner in product(range(3), range(2), range(1))]
    assert sum(counts) == 600 and min(counts) > 60, counts    # 100 each, sd 9


def test_a_volume_smaller_than_the_crop_is_padded_with_zeros_on_both_sides():
    image, target = coordinates((3, 6, 4))
    crop, crop_target = data.random_crop(image, target, (6, 6, 8), generator(0))
    margins = ((0, 0), (1, 2), (0, 0), (2, 2))    # three and four missing slices, half of them in front
    assert np.array_equal(crop, np.pad(image, margins))
    assert np.array_equal(crop_target, np.pad(target, margins)) and crop_target.dtype == torch.bool


def test_padding_and_cropping_go_together():
    image, target = coordinates((3, 9, 4))
    starts = set()
    for seed in range(60):
        crop, _ = data.random_crop(image, target, (4, 4, 4), generator(seed))
        start = int(crop[1].max()) - 4
        assert np.array_equal(crop, np.pad(image[:, :, start:start + 4], ((0, 0), (0, 1), (0, 0), (0, 0))))
        starts.add(start)
    assert starts == set(range(6))


def test_each_axis_is_flipped_half_of_the_time_in_image_and_target_alike():
    image, target = coordinates((2, 4, 6))    # even sides: a flip of one of the two alone swaps odd and even
    flips = []
    for seed in range(800):
        flipped, flipped_target = data.random_flip(image, target, generator(seed))
        axes = [axis for axis in (1, 2, 3) if flipped[axis - 1, 0, 0, 0] != 1]
        assert torch.equal(flipped, image.flip(axes)) and torch.equal(flipped_target, target.flip(axes))
        flips.append([axis in axes for axis in (1, 2, 3)])
    share = np.mean(flips, axis=0)
    assert np.all(np.abs(share - 0.5) < 0.07), share    # sd 0.018
    combinations = [flips.count(list(choice)) for choice in product([False, True], repeat=3)]
    assert min(combinations) > 60, combinations    # the axes are independent: 100 each, sd 9


def test_a_sample_depends_on_seed_epoch_and_name():
    keys = [*product(range(3), range(5), ("BraTS2021_00000", "BraTS2021_00001", "order"))]
    draws = [tuple(torch.rand(4, generator=data.case_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys), "two keys, such as two epochs of a case, give the same sample"
    torch.manual_seed(5), np.random.seed(5)
    assert [tuple(torch.rand(4, generator=data.case_generator(*key)).tolist()) for key in keys] == draws


# ---- affine augmentation ----------------------------------------------------------------------------------------------


def centred_grid(shape):
    """(3, D, H, W) float64: each voxel's offset from the volume's centre, in voxels."""
    return np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))


def matrix_of(moved):
    """The 3x3 matrix from output to input voxels, from the centre, of a transform that turned `centred_grid` into `moved`.

    Linear interpolation of a linear function is exact, so that what was drawn can be read off the result, whatever drew it.
    """
    grid = centred_grid(moved.shape[1:])
    inside = np.all([np.abs(g) < 0.25 * n for g, n in zip(grid, moved.shape[1:])], axis=0)    # far from the zeros outside
    solution, residual, _, _ = np.linalg.lstsq(grid[:, inside].T, moved[:, inside].T, rcond=None)
    assert np.all(residual < 1e-5), "not a linear transform about the centre"
    return solution.T


@pytest.mark.parametrize("shape", [(20, 28, 36), (36, 12, 24)])
def test_affine_is_that_of_scipy(shape):
    rng = np.random.default_rng(0)
    texture, mask = rng.random(shape, np.float32), rng.random((3, *shape)) < 0.5
    images = torch.from_numpy(np.concatenate([centred_grid(shape), texture[None]])).float().expand(5, -1, -1, -1, -1)
    moved, targets = data.random_affine(images, torch.from_numpy(mask).expand(5, -1, -1, -1, -1), generator(0))
    assert targets.dtype == torch.bool
    centre = (np.array(shape) - 1) / 2
    for image, target in zip(moved.numpy(), targets.numpy()):
        matrix = matrix_of(image[:3])
        expected = ndimage.affine_transform(texture, matrix, centre - matrix @ centre, order=1, mode="grid-constant")
        assert np.allclose(image[3], expected, atol=1e-3)
        # The nearest voxel of the mask, by hand; voxels that lie between two are either's.
        source = np.tensordot(matrix, centred_grid(shape), 1) + centre.reshape(3, 1, 1, 1)
        clear = np.all(np.abs(source - np.floor(source) - 0.5) > 1e-3, axis=0)
        nearest = np.floor(source + 0.5).astype(int)
        within = np.all([(0 <= i) & (i < n) for i, n in zip(nearest, shape)], axis=0)
        i, j, k = (np.clip(i, 0, n - 1) for i, n in zip(nearest, shape))
        assert clear.mean() > 0.9
        assert np.array_equal(target[:, clear], (mask[:, i, j, k] & within)[:, clear])


def test_affine_is_a_rotation_and_a_scale_within_their_ranges():
    shape = (8, 10, 12)    # a shear, which rotation in normalised coordinates would be, shows on unequal sides
    images = torch.from_numpy(centred_grid(shape)).float().expand(400, -1, -1, -1, -1)
    moved, _ = data.random_affine(images, torch.zeros(400, 3, *shape, dtype=torch.bool), generator(0))
    matrices = np.stack([matrix_of(view) for view in moved.numpy()])[:, ::-1, ::-1]    # axes W, H, D
    scale = 1 / np.cbrt(np.linalg.det(matrices))
    rotation = matrices * scale[:, None, None]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-4), "sides or angles change"
    assert 0.9 - 1e-4 < scale.min() < 0.905 and 1.095 < scale.max() < 1.1 + 1e-4
    assert abs(scale.mean() - 1) < 0.012    # sd of the mean 0.003
    # rotation = Rx Ry Rz, from its entries
    angles = [np.arctan2(-rotation[:, 1, 2], rotation[:, 2, 2]), np.arcsin(rotation[:, 0, 2]), np.arctan2(-rotation[:, 0, 1], rotation[:, 0, 0])]
    for angle in angles:
        assert -0.1 - 1e-4 < angle.min() < -0.095 and 0.095 < angle.max() < 0.1 + 1e-4
    assert np.abs(np.corrcoef([scale, *angles]) - np.eye(4)).max() < 0.2, "drawn together"    # sd 0.05


def tumour():
    """Two copies of a crop: nested balls away from the centre, each channel a smooth copy of one, with zeros around."""
    shape, centre = (40, 32, 52), np.array([28, 11, 40]).reshape(3, 1, 1, 1)
    distance = np.sqrt(((np.indices(shape) - centre) ** 2).sum(0))
    target = np.stack([distance < radius for radius in (5, 6, 7)])
    image = ndimage.gaussian_filter(target[[0, 1, 2, 2]].astype(np.float32), (0, 0.7, 0.7, 0.7), truncate=3)
    return torch.from_numpy(image).expand(2, -1, -1, -1, -1), torch.from_numpy(target).expand(2, -1, -1, -1, -1)


def dice(a, b):
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_image_and_target_move_together_and_views_apart():
    images, targets = tumour()
    alignment, between_views = [], []
    for seed in range(30):
        moved, moved_targets = data.random_affine(images, targets, generator(seed))
        assert all(dice(image[:3] > 0.5, target) > 0.9 for image, target in zip(moved, moved_targets))
        # With intensity on top no threshold is right any more; correlation does not mind scale and shift.
        moved, moved_targets = data.augment(images, targets, generator(seed))
        alignment += [np.corrcoef(channel.flatten(), region.flatten())[0, 1]
                      for image, target in zip(moved, moved_targets) for channel, region in zip(image, target[[0, 1, 2, 2]])]
        assert (moved_targets[:, 0] <= moved_targets[:, 1]).all() and (moved_targets[:, 1] <= moved_targets[:, 2]).all()
        assert moved_targets.dtype == torch.bool and moved.dtype == torch.float32
        assert not torch.equal(moved[0], moved[1])
        between_views.append(dice(*moved_targets[:, 2]))
    assert min(alignment) > 0.85 and np.mean(alignment) > 0.92    # with the other view's target: 0.3 and 0.7
    assert max(between_views) < 1 and np.mean(between_views) < 0.9
    assert torch.equal(images, tumour()[0]) and torch.equal(targets, tumour()[1]), "the input was changed"


def test_noise_is_not_smoothed_by_the_affine():
    # Drawn before it, noise would be averaged between voxels: neighbours would be alike.
    flat = torch.ones(16, 4, 20, 20, 20)
    views, _ = data.augment(flat, torch.zeros(16, 3, 20, 20, 20, dtype=torch.bool), generator(0))
    inside = views[:, :, 6:14, 6:14, 6:14].flatten(0, 1)    # (64, 8, 8, 8)
    noise = inside - inside.mean((1, 2, 3), keepdim=True)
    noise = noise[noise.std((1, 2, 3)) > 1e-3]
    assert len(noise) >= 5
    for axis in (1, 2, 3):
        here, there = noise.narrow(axis, 0, 7).flatten(), noise.narrow(axis, 1, 7).flatten()
        assert abs(np.corrcoef(here, there)[0, 1]) < 0.1    # sd 0.02


def test_augment_depends_on_its_generator_alone():
    images, targets = tumour()
    images = images.repeat(4, 1, 1, 1, 1)    # 32 channels: some get noise
    targets = targets.repeat(4, 1, 1, 1, 1)
    results = []
    for global_seed, seed in [(0, 7), (1, 7), (0, 8)]:
        torch.manual_seed(global_seed)
        results.append(data.augment(images, targets, generator(seed)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not torch.equal(results[0][0], results[2][0]) and not torch.equal(results[0][1], results[2][1])


# ---- intensity augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.5, 0.8, 1.0])
def test_gaussian_blur_is_that_of_scipy(sd):
    volume = np.random.default_rng(0).random((9, 6, 11), np.float32)    # sides about as long as the kernel: the edges count
    expected = ndimage.gaussian_filter(volume, sd, mode="constant", radius=4)
    assert np.allclose(data.gaussian_blur(torch.from_numpy(volume), sd), expected, atol=1e-6)


def test_background_stays_zero_and_the_input_as_it_was():
    rng = np.random.default_rng(0)
    brain = rng.random((100, 4, 3, 4, 5)) < 0.5
    images = torch.from_numpy(np.where(brain, rng.normal(size=brain.shape), 0).astype(np.float32))
    before = images.clone()
    changed = data.random_intensity(images, generator(0))
    assert torch.equal(images, before)
    assert not changed[images == 0].any()
    assert changed[images != 0].bool().float().mean() > 0.999
    assert (changed != images).any((2, 3, 4)).float().mean() > 0.7    # 1 - 0.8 * 0.5 * 0.5 * 0.8 = 0.84 of all channels


def test_intensity_operations_have_their_probabilities_and_ranges():
    # Each channel is a step from 1 to 3. No blur reaches the middle of either side: scale and shift can be read off there, noise
    # shows as unequal voxels, and what spills over the step is the blur.
    step = torch.full((26, 9, 24), 1.0)
    step[13:] = 3
    n = 2000
    changed = data.random_intensity(step.expand(n // 4, 4, -1, -1, -1), generator(0)).double().view(n, *step.shape)
    lines = changed[:, :, 4, 4:20]    # (n, 26, 16): at least 4 voxels from the other sides, from where zeros are blurred in
    low, high = lines[:, 4:9].mean((1, 2)), lines[:, 17:22].mean((1, 2))
    residual = lines[:, 4:9] - low.view(-1, 1, 1)
    noise = residual.std((1, 2))
    scale = (high - low) / 2
    shift = low - scale
    spill = (lines[:, 12].mean(1) - low) / (high - low)
    noisy, blurred = noise > 1e-5, spill > 0.05
    scaled, shifted = ((scale - 1).abs() > 1e-4)[~noisy], (shift.abs() > 1e-5)[~noisy]

    for name, happened, p in [("noise", noisy, 0.2), ("blur", blurred, 0.2), ("scale", scaled, 0.5), ("shift", shifted, 0.5)]:
        assert abs(happened.double().mean() - p) < 0.045, name    # sd at most 0.0125
    pairs = [(noisy, blurred), (blurred[~noisy], scaled), (blurred[~noisy], shifted), (scaled, shifted)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.1 for a, b in pairs), "drawn together"    # sd at most 0.025
    views_and_channels = np.corrcoef(blurred.view(-1, 8).T) - np.eye(8)    # two images of four channels each
    assert np.abs(views_and_channels).max() < 0.3, "views or channels are drawn together"    # sd 0.063

    def is_uniform(values, low, high):
        width, rounding = high - low, 1e-5
        return (low - rounding < values.min() < low + 0.03 * width and high - 0.03 * width < values.max() < high + rounding
                and abs(values.mean() - (low + high) / 2) < 0.06 * width)    # sd of the mean at most 0.017 widths

    assert is_uniform(scale[~noisy][scaled], 0.7, 1.3)
    assert is_uniform(shift[~noisy][shifted], -0.1, 0.1)
    # A step's spill is the kernel's share beyond its middle, here by SciPy: 0.107 for sd 0.5, 0.301 for sd 1.
    edge = np.repeat([0.0, 1.0], 13)
    smallest, largest = (ndimage.gaussian_filter1d(edge, sd, radius=4)[12] for sd in (0.5, 1.0))
    spill = spill[blurred & ~noisy]
    assert smallest - 1e-4 < spill.min() < smallest + 0.01 and largest - 0.01 < spill.max() < largest + 1e-4
    assert abs(noise[noisy].mean() - 0.05) < 0.006 and 0.09 < noise.max() < 0.12    # U(0, 0.1); each measured to 6 %
    # Noise comes last: where the image was blurred, neighbouring voxels' noise is still independent.
    both = residual[noisy & blurred]
    assert len(both) > 40 and abs(np.corrcoef(both[:, :, 1:].flatten(), both[:, :, :-1].flatten())[0, 1]) < 0.1


# ---- as a command, and alone ------------------------------------------------------------------------------------------


def voxels_of(folder):
    """[(ET, TC, WT) voxels] of each segmentation below the folder, counted by nibabel and NumPy alone."""
    labels = [np.asarray(nib.load(path).dataobj) for path in sorted(folder.rglob("*_seg.nii.gz"))]
    return [((x == 4).sum(), (x == 4).sum() + (x == 1).sum(), (x > 0).sum()) for x in labels]


def lines_of(text):
    """A report's lines with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_command_counts_a_cohort(run, cohort):
    lines = lines_of(run("data.py", cohort, ok=0).stdout)
    assert f"{cohort}: 6 cases of 6 patients, file names of BraTS 2018-2021 (ET is label 4)" in lines
    assert "shape 32x32x32 (6)" in lines and "spacing, mm 1x1x1 (6)" in lines and "segmentation 6 of 6" in lines
    for region, sizes in zip(("ET", "TC", "WT"), zip(*voxels_of(cohort))):
        assert f"{region}, voxels {np.mean(sizes):,.0f} on average, empty in {sizes.count(0)} of 6" in lines
    assert "5 folds, seed 0 2, 1, 1, 1, 1 cases for validation" in lines
    assert not any("warning" in line or "error" in line for line in lines)


def test_the_command_warns_of_what_can_be_read_but_looks_wrong(run, tmp_path):
    images, labels = anatomy()    # no voxel of the images is zero
    labels[labels == 4] = 2
    for name in ("a", "b"):
        write_case(tmp_path / name, images, labels)
    touch(tmp_path / "c", *[f"c_{m}.nii.gz" for m in OLD])    # and one case that cannot be read
    touch(tmp_path / "d", *[f"d_{m.upper()}.nii.gz" for m in OLD])    # and one that is none, to be left out in silence by nobody
    process = run("data.py", tmp_path, ok=1)
    lines = lines_of(process.stdout)
    assert "spacing, mm 1x1.5x2 (2)" in lines and "segmentation 2 of 3, not c" in lines
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 3 and warnings[2].startswith("warning: 4 NIfTI files belong to no case (d/d_FLAIR.nii.gz, d/d_T1.nii.gz, d/d_T1CE.nii.gz ...)")
    assert warnings[0].startswith("warning: ET is empty in every case") and "skull-stripped" in warnings[1] and "(a, b)" in warnings[1]
    assert [line for line in lines if line.startswith("error")][0].startswith(f"error: {tmp_path / 'c' / 'c_t1.nii.gz'}")
    assert "1 of 3 cases cannot be used" in lines[-1]
    assert "none: fewer patients than folds" in process.stdout


def test_the_file_works_alone(run, cohort, tmp_path):
    shutil.copy(data.__file__, tmp_path)
    assert "all 6 cases can be read" in run(tmp_path / "data.py", cohort, cwd=tmp_path, ok=0).stdout
    script = f"""
import pathlib, torch, data
case = data.find_cases({str(cohort)!r})[0]
image, target, affine = data.load_case(case)
image = data.normalize(image)
crop = data.random_crop(image, target, (16, 16, 16), data.case_generator(0, 0, case.name))
crop = data.random_flip(*crop, torch.Generator())
views, regions = data.augment(crop[0].expand(2, -1, -1, -1, -1), crop[1].expand(2, -1, -1, -1, -1), torch.Generator())
assert views.isfinite().all()
made, mapped = [data.prepare(case, pathlib.Path()) for _ in range(2)]
assert torch.equal(made.image, mapped.image) and len(list(pathlib.Path().glob("*.case"))) == 1
data.save_volume("out.nii.gz", data.regions_to_labels(target).numpy(), case.images[0])
print(*target.sum((1, 2, 3)).tolist())
"""
    process = run("-c", script, cwd=tmp_path, ok=0)
    assert process.stdout.split() == [str(n) for n in voxels_of(cohort)[0]]
    truth = nib.load(next((cohort / "BraTS2021_00000").glob("*_seg.nii.gz")))
    saved = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(saved.dataobj, truth.dataobj) and np.array_equal(saved.affine, truth.affine)


def test_the_real_case_is_reported_right(run, real_case):
    folders = [path for path in [real_case, *real_case.rglob("BraTS2021_00006")] if path.name == "BraTS2021_00006"]
    if not folders:
        pytest.skip("BRATS_DATA has no BraTS2021_00006")
    lines = lines_of(run("data.py", folders[0], ok=0).stdout)
    assert "shape 240x240x155 (1)" in lines and "spacing, mm 1x1x1 (1)" in lines
    for region, voxels in (("ET", "26,448"), ("TC", "51,954"), ("WT", "137,911")):
        assert f"{region}, voxels {voxels} on average, empty in 0 of 1" in lines
