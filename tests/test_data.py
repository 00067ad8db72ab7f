"""data.py against NumPy, SciPy, MONAI and by hand: sections 3.4 and 4 first; then samples, cache, files."""

import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import data
import phantom
import train
from conftest import TINIER, voxels
from data import InputError, find_cases, load_case, prepare, save_volume, split_folds

SHAPE = (5, 6, 7)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- section 3.4: "zero mean and unit std (based on non-zero voxels only)" --------------------------------


def with_zeros(seed=0):
    """(4, *SHAPE) float32; four fifths are zero, and not the same voxels in every channel."""
    rng = np.random.default_rng(seed)
    means, sds = np.array([[100, 2000, 5, -3], [30, 500, 1, 2]]).reshape(2, 4, 1, 1, 1)
    image = rng.normal(means, sds, (4, *SHAPE))
    image[:, rng.random(SHAPE) < 0.8] = 0    # so few are left that population and sample sd differ visibly
    image[1, 0] = 0
    return torch.from_numpy(image.astype(np.float32))


def test_normalize_is_the_z_score_of_nonzero_voxels():
    image = with_zeros()
    normalized = data.normalize(image)
    assert torch.equal(image, with_zeros()), "the input was changed"
    for channel, result in zip(image.double().numpy(), normalized.numpy()):
        brain = channel != 0
        expected = (channel[brain] - channel[brain].mean()) / channel[brain].std()    # the population's
        assert np.allclose(result[brain], expected, atol=1e-5) and not result[~brain].any()


def test_normalize_is_the_same_on_any_number_of_threads():
    image = 300 * torch.randn(4, 64, 96, 96, generator=generator(0)) + 500    # long enough to be shared out
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 5, threads):
        torch.set_num_threads(number)
        results.append(data.normalize(image))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("constant", [0.0, 7.0, 1000.1])
def test_a_constant_channel_gives_numbers(constant):
    image = with_zeros()
    image[2][image[2] != 0] = constant
    normalized = data.normalize(image)
    assert normalized.isfinite().all() and normalized[2].abs().max() <= 1
    assert torch.equal(normalized[[0, 1, 3]], data.normalize(with_zeros())[[0, 1, 3]])


# ---- section 4: "a random crop"; section 3.4: "a random axis mirror flip" ---------------------------------


def coordinates(shape):
    """Image (4, D, H, W): each voxel's d + 1, h + 1, w + 1 (0 is padding) and 1; target: which are odd."""
    places = torch.meshgrid(*(torch.arange(1.0, n + 1) for n in shape), indexing="ij")
    image = torch.stack([*places, torch.ones(shape)])
    return image, image[:3] % 2 == 1


@pytest.mark.parametrize("shape, size, margins, places", [
    ((6, 5, 4), (4, 4, 4), [(0, 0)] * 4, [*product(range(3), range(2), [0])]),
    # Of three and four slices that a small volume lacks, half are zeros in front.
    ((3, 9, 4), (6, 4, 8), [(0, 0), (1, 2), (0, 0), (2, 2)], [*product([0], range(6), [0])])])
def test_a_crop_is_a_box_and_every_place_is_reached(shape, size, margins, places):
    volumes, corners = coordinates(shape), []
    for seed in range(600):
        crops = data.random_crop(*volumes, size, generator(seed))
        corners.append(tuple(int(place[place > 0].min()) - 1 for place in crops[0][:3]))
        box = slice(None), *(slice(first, first + side) for first, side in zip(corners[-1], size))
        for whole, crop in zip(volumes, crops):
            assert np.array_equal(crop, np.pad(whole, margins)[box]) and crop.dtype == whole.dtype
    counts = [corners.count(corner) for corner in places]
    assert sum(counts) == 600 and min(counts) > 60, counts    # 100 each, sd 9


def test_each_axis_is_flipped_half_of_the_time_by_itself():
    image, target = coordinates((2, 4, 6))    # even sides: a flip of one of the two alone swaps odd and even
    flips = []
    for seed in range(800):
        flipped, flipped_target = data.random_flip(image, target, generator(seed))
        axes = [axis for axis in (1, 2, 3) if flipped[axis - 1, 0, 0, 0] != 1]
        assert torch.equal(flipped, image.flip(axes))
        assert torch.equal(flipped_target, target.flip(axes))
        flips.append(tuple(axis in axes for axis in (1, 2, 3)))
    assert np.all(np.abs(np.mean(flips, axis=0) - 0.5) < 0.07)    # sd 0.018
    combinations = [flips.count(choice) for choice in product([False, True], repeat=3)]
    assert min(combinations) > 60, combinations    # 100 each, sd 9


# ---- section 3.4: "we copy the image, and apply the intensity and spatial transforms" ---------------------


def centred_grid(shape):
    """(3, D, H, W) float64: each voxel's offset from the volume's centre, in voxels."""
    return np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))


def matrix_of(moved):
    """The 3x3 matrix, output to input voxels from the centre, of what turned `centred_grid` into `moved`.

    Linear interpolation of a linear function is exact, so what was drawn can be read off, whatever drew it.
    """
    grid = centred_grid(moved.shape[1:])
    inside = np.all([np.abs(g) < 0.25 * n for g, n in zip(grid, moved.shape[1:])], axis=0)    # far from zeros
    solution, residual, _, _ = np.linalg.lstsq(grid[:, inside].T, moved[:, inside].T, rcond=None)
    assert np.all(residual < 1e-5), "not a linear transform about the centre"
    return solution.T


@pytest.mark.parametrize("shape", [(20, 28, 36), (36, 12, 24)])
def test_affine_is_that_of_scipy(shape):
    rng = np.random.default_rng(0)
    texture, mask = rng.random(shape, np.float32), rng.random((3, *shape)) < 0.5
    images = torch.from_numpy(np.concatenate([centred_grid(shape), texture[None]])).float()
    moved, targets = data.random_affine(images.expand(5, -1, -1, -1, -1),
                                        torch.from_numpy(mask).expand(5, -1, -1, -1, -1), generator(0))
    assert targets.dtype == torch.bool
    centre = (np.array(shape) - 1) / 2
    for image, target in zip(moved.numpy(), targets.numpy()):
        matrix = matrix_of(image[:3])
        offset = centre - matrix @ centre
        expected = ndimage.affine_transform(texture, matrix, offset, order=1, mode="grid-constant")
        assert np.allclose(image[3], expected, atol=1e-3)
        # Of the mask the nearest voxel; those that lie between two are either's.
        source = np.tensordot(matrix, centred_grid(shape), 1) + centre.reshape(3, 1, 1, 1)
        clear = np.all(np.abs(source - np.floor(source) - 0.5) > 1e-3, axis=0)
        nearest = np.stack([ndimage.affine_transform(region, matrix, offset, order=0, mode="grid-constant")
                            for region in mask])
        assert clear.mean() > 0.9 and np.array_equal(target[:, clear], nearest[:, clear])


def test_affine_is_a_rotation_and_a_scale_in_their_ranges():
    shape = (8, 10, 12)    # unequal sides: a rotation of normalised coordinates would be a shear here
    images = torch.from_numpy(centred_grid(shape)).float().expand(400, -1, -1, -1, -1)
    moved, _ = data.random_affine(images, torch.zeros(400, 3, *shape, dtype=torch.bool), generator(0))
    matrices = np.stack([matrix_of(view) for view in moved.numpy()])[:, ::-1, ::-1]    # axes W, H, D
    scale = 1 / np.cbrt(np.linalg.det(matrices))
    rotation = matrices * scale[:, None, None]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-4), "sides or angles change"
    assert 0.9 - 1e-4 < scale.min() < 0.905 and 1.095 < scale.max() < 1.1 + 1e-4
    assert abs(scale.mean() - 1) < 0.012    # sd of the mean 0.003
    angles = [np.arctan2(-rotation[:, 1, 2], rotation[:, 2, 2]), np.arcsin(rotation[:, 0, 2]),
              np.arctan2(-rotation[:, 0, 1], rotation[:, 0, 0])]    # of Rx Ry Rz, from its entries
    for angle in angles:
        assert -0.1 - 1e-4 < angle.min() < -0.095 and 0.095 < angle.max() < 0.1 + 1e-4
    assert np.abs(np.corrcoef([scale, *angles]) - np.eye(4)).max() < 0.2, "drawn together"    # sd 0.05


def test_views_are_affine_then_intensity_of_one_generator():
    images, targets = torch.rand(8, 4, 12, 14, 16), torch.rand(8, 3, 12, 14, 16) < 0.5
    images[:, :, :5] = 0    # background
    before, found = (images.clone(), targets.clone()), []
    for seed in (7, 7, 8):    # while the global generator goes on
        found.append(data.augment(images, targets, generator(seed)))
        moved, moved_targets = data.random_affine(images, targets, drawn := generator(seed))
        assert torch.equal(found[-1][1], moved_targets)
        # The other way round noise would be smoothed: the affine averages neighbours.
        assert torch.equal(found[-1][0], data.random_intensity(moved, drawn))
        assert (moved[:, :, 1] == 0).all() and not found[-1][0][moved == 0].any(), "background stays zero"
    assert not any(torch.equal(one, other) for one, other in zip(*found[1:])), "two seeds, the same views"
    assert torch.equal(images, before[0]) and torch.equal(targets, before[1]), "the input was changed"


@pytest.mark.parametrize("sd", [0.5, 0.8, 1.0])
def test_gaussian_blur_is_that_of_scipy(sd):
    volume = np.random.default_rng(0).random((9, 6, 11), np.float32)    # as long as the kernel
    expected = ndimage.gaussian_filter(volume, sd, mode="constant", radius=4)
    assert np.allclose(data.gaussian_blur(torch.from_numpy(volume), sd), expected, atol=1e-6)


def test_intensity_operations_have_their_shares_and_ranges():
    # Each channel is a step from 1 to 3. No blur reaches the middle of either side: scale and shift can be
    # read off there, noise shows as unequal voxels, and what spills over the step is the blur.
    step, n = torch.full((26, 9, 24), 1.0), 2000
    step[13:] = 3
    changed = data.random_intensity(step.expand(n // 4, 4, -1, -1, -1), generator(0)).double()
    lines = changed.view(n, *step.shape)[:, :, 4, 4:20]    # (n, 26, 16), 4 voxels off the other sides
    low, high = lines[:, 4:9].mean((1, 2)), lines[:, 17:22].mean((1, 2))
    residual = lines[:, 4:9] - low.view(-1, 1, 1)
    noise, scale = residual.std((1, 2)), (high - low) / 2
    shift, spill = low - scale, (lines[:, 12].mean(1) - low) / (high - low)
    noisy, blurred = noise > 1e-5, spill > 0.05
    scaled, shifted = ((scale - 1).abs() > 1e-4)[~noisy], (shift.abs() > 1e-5)[~noisy]

    for name, happened, p in [("noise", noisy, 0.2), ("blur", blurred, 0.2), ("scale", scaled, 0.5),
                              ("shift", shifted, 0.5)]:
        assert abs(happened.double().mean() - p) < 0.045, name    # sd at most 0.0125
    pairs = [(noisy, blurred), (blurred[~noisy], scaled), (blurred[~noisy], shifted), (scaled, shifted)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.1 for a, b in pairs), "drawn together"    # sd at most 0.025
    together = np.corrcoef(blurred.view(-1, 8).T) - np.eye(8)    # two views of four channels each
    assert np.abs(together).max() < 0.3, "views or channels are drawn together"    # sd 0.063

    for values, middle, reach in ((scale[~noisy][scaled], 1, 0.3), (shift[~noisy][shifted], 0, 0.1)):
        values = (values - middle) / reach    # U(-1, 1); sd of the mean at most 0.034
        assert 0.94 < values.max() < 1 + 1e-4 and 0.94 < -values.min() < 1 + 1e-4
        assert abs(values.mean()) < 0.12
    # A step's spill is the kernel's share beyond its middle, here by SciPy: 0.107 for sd 0.5, 0.301 for 1.
    edge = np.repeat([0.0, 1.0], 13)
    smallest, largest = (ndimage.gaussian_filter1d(edge, sd, radius=4)[12] for sd in (0.5, 1.0))
    spill = spill[blurred & ~noisy]
    assert smallest - 1e-4 < spill.min() < smallest + 0.01 and largest - 0.01 < spill.max() < largest + 1e-4
    assert abs(noise[noisy].mean() - 0.05) < 0.006 and 0.09 < noise.max() < 0.12    # U(0, 0.1) to 6 %
    # Noise comes last: where the image was blurred, neighbouring voxels' noise is still independent.
    both = residual[noisy & blurred]
    assert len(both) > 40
    assert abs(np.corrcoef(both[:, :, 1:].flatten(), both[:, :, :-1].flatten())[0, 1]) < 0.1


@pytest.mark.parametrize("call", [
    lambda x: data.normalize(x[0]), lambda x: data.random_crop(x, x[0], (2, 2, 2), generator(0)),
    lambda x: data.random_flip(x[0], x, generator(0)), lambda x: data.augment(x, x, generator(0)),
    lambda x: data.labels_to_regions(x[0, 0]), lambda x: data.regions_to_labels(x[:3, 0] > 0)])
def test_a_tensor_of_the_wrong_rank_is_a_value_error(call):
    with pytest.raises(ValueError, match=r"shape.*\(.*expected.*D, H, W"):
        call(torch.ones(4, 4, 4, 4))


# ---- labels <-> regions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("et", [4, 3])
def test_labels_and_regions_by_hand(et):
    labels = torch.tensor([0, 1, 2, et, 7 - et], dtype=torch.uint8).view(1, 1, -1)    # the last is no tumour
    regions = data.labels_to_regions(labels, et)
    assert regions.dtype == torch.bool
    assert regions.int().view(3, -1).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0]]
    batch = torch.stack([labels, labels.flip(-1)])    # leading axes stay in front
    assert torch.equal(data.labels_to_regions(batch, et), torch.stack([regions, regions.flip(-1)]))
    regions = torch.tensor(list(product([0, 1], repeat=3))).bool().T.reshape(3, 1, 1, 8)    # nested or not
    labels = data.regions_to_labels(regions, et)
    assert labels.dtype == torch.uint8 and labels.flatten().tolist() == [0, 2, 1, 1, et, et, et, et]


# ---- section 4: "our own 5-fold splits" -------------------------------------------------------------------


def folds_of(names, *settings):
    """The folds' names of cases that are called so; a patient is the first five letters."""
    cases = [data.Case(name, name[:5], (f"{name}_t1",) * 4, None, data.NAMINGS[0]) for name in names]
    return [sorted(case.name for case in fold) for fold in split_folds(cases, *settings)]


# 23 patients with one to three time points each
COHORT = [f"{n:05d}-{time:03d}" for n in range(23) for time in range(1 + n % 3)]


@pytest.mark.parametrize("folds", [2, 5, 23])
def test_folds_are_a_balanced_partition_by_patient(folds):
    split = folds_of(COHORT, folds)
    assert len(split) == folds and sorted(sum(split, [])) == COHORT
    patients = [len({name[:5] for name in fold}) for fold in split]
    assert sum(patients) == 23, "a patient is in two folds"
    assert max(patients) - min(patients) <= 1
    with pytest.raises(InputError, match="--folds 24.* 23 patients"):    # of 45 time points
        folds_of(COHORT, 24)


def test_folds_depend_on_names_and_seed_alone():
    assert folds_of(random.Random(0).sample(COHORT, len(COHORT))) == folds_of(COHORT)
    assert len({str(folds_of(COHORT, 5, seed)) for seed in range(10)}) == 10, "two seeds, the same folds"
    # The order of `printf "0 P$i" | sha256sum` for i = 0 to 9 is 1 8 5 7 9 0 6 2 4 3, dealt out in turn.
    expected = [["P0", "P1"], ["P6", "P8"], ["P2", "P5"], ["P4", "P7"], ["P3", "P9"]]
    assert folds_of([f"P{i}" for i in range(10)]) == expected


# ---- a sample: the functions above in section 3.4's order, with and without the cache ---------------------


@pytest.fixture
def case(cohort, tmp_path):
    """A case of its own, so that its files may be changed: 32x32x32, the brain about 19x24x29."""
    shutil.copytree(cohort / "BraTS2021_00002", tmp_path / "data" / "BraTS2021_00002")
    return find_cases(tmp_path / "data")[0]


FAR = np.max(np.indices((32, 32, 32)), 0) > 14    # all but a corner of the brain


@pytest.mark.parametrize("size, changes", [    # which file, where, to what
    ((16, 16, 16), []), ((24, 32, 16), []), ((40, 32, 48), []),    # also beyond the brain, and the volume
    ((24, 32, 16), [(1, (0, 0, 31), 500), (3, (31, 31, 0), 500)]),    # a brain that reaches two corners
    ((8, 8, 8), [(file, FAR, 0) for file in range(5)]),               # one that some crops miss
    ((32, 32, 32), [(4, (31, 31, 0), 2)])])                           # labels beyond it
def test_a_sample_is_crop_and_flip_of_the_whole_volume(case, tmp_path, size, changes):
    cache, filled = tmp_path / "cache", set()
    cache.mkdir()
    for file, where, value in changes:
        path = (*case.images, case.label)[file]
        volume = voxels(path).copy()
        volume[where] = value
        phantom.save(path, volume)
    image, target, _ = load_case(case)
    for epoch in range(8):
        drawn = train.case_generator(3, epoch, case.name)
        crop = data.random_crop(data.normalize(image), target, size, drawn)
        expected, expected_target = data.random_flip(*crop, drawn)
        expected_seed = int(torch.randint(2**31, (), generator=drawn))    # the views' seed is drawn last
        for folder in (None, cache, cache):    # without a cache, into it, out of it
            sample, labels, seed, _ = train.draw_sample((epoch, case), size, 3, folder)
            assert sample.dtype == torch.float16 and torch.equal(sample, expected.half())
            assert labels.dtype == torch.uint8 and seed == expected_seed
            assert torch.equal(data.labels_to_regions(labels[0]), expected_target)
        filled.add(bool(sample.any()))
    assert filled == ({False, True} if size == (8, 8, 8) else {True})


# ---- the cache --------------------------------------------------------------------------------------------


def test_other_sources_and_other_labels_are_other_entries(cohort, case, tmp_path, monkeypatch):
    first = prepare(case, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_case", None)    # nothing is read again
        assert torch.equal(prepare(case, tmp_path)["image"], first["image"])
    prepare(find_cases(cohort)[2], tmp_path)    # a case of the same name elsewhere
    shutil.copy(case.images[1], case.images[0])    # another content, another time
    changed = prepare(case, tmp_path)
    assert torch.equal(changed["image"][0], changed["image"][1])
    (swapped,) = find_cases(tmp_path / "data", labels=((2,), (1,), (4,)))
    swapped = prepare(swapped, tmp_path)["labels"]
    assert torch.equal(swapped == 1, first["labels"] == 2) and torch.equal(swapped == 2, first["labels"] == 1)
    assert len(list(tmp_path.glob("*.pt"))) == 4


def test_two_runs_may_fill_one_entry_at_once(case, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            (cache := tmp_path / str(number)).mkdir()
            for prepared in pool.map(prepare, [case] * 4, [cache] * 4):
                assert prepared["image"].isfinite().all()
            assert len(list(cache.iterdir())) == 1


def test_room_is_counted_for_the_missing_cases(call, cohort, tmp_path, monkeypatch):
    flags = "--data", cohort, "--fold", "all", "--out", tmp_path / "run", "--cache", tmp_path, *TINIER
    [prepare(case, tmp_path) for case in find_cases(cohort)[:2]]    # so four are missing
    usage = shutil.disk_usage(tmp_path)
    for free, code in ((4 * 30_000_000 - 1, 2), (4 * 30_000_000, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        assert ("--cache none" in call("train.py", *flags, ok=code)[2]) == bool(code)


# ---- reading and writing, in any orientation --------------------------------------------------------------

TURN = np.deg2rad(8)    # oblique, as clinical images are, and with three different voxel sides
LPS = np.array([[math.cos(TURN), -math.sin(TURN), 0, 11], [math.sin(TURN), math.cos(TURN), 0, 22],
                [0, 0, 1, -33], [0, 0, 0, 1]]) @ np.diag([-1.0, -1.5, 2.0, 1])
CODES = ["LPS", "RAS", "LAS", "SPL", "PIR", "IRA"]


def write(path, code, array, sform=1, qform=1, slope=(None, None)):
    """The anatomy of `array`, which is LPS, into a file with axes that run as `code` says."""
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", code)))
    image = nib.Nifti1Image(array, LPS).as_reoriented(turn)
    affine = image.affine.copy()    # set_sform changes it
    assert nib.aff2axcodes(affine) == tuple(code)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 3000
    image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


def anatomy():
    """Four modalities and labels, every voxel random: no two orientations look alike."""
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (4, *SHAPE), np.int16), rng.choice(np.array([0, 1, 2, 4], np.uint8), SHAPE)


@pytest.mark.parametrize("codes, dtype", [
    *[((code,) * 5, np.int16) for code in CODES], (("RAS", "LPS", "SPL", "IRA", "PIR"), np.int16),
    *[(("RAS",) * 5, dtype) for dtype in (np.uint8, np.uint16, np.float32, np.float64)]])
def test_an_anatomy_is_the_same_in_memory_from_any_file(tmp_path, codes, dtype):
    images, labels = anatomy()
    for suffix, volume, code in zip(("t1", "t1ce", "t2", "flair", "seg"), (*images, labels), codes):
        slope = (0.5, -7) if suffix == "t2" else (None, None)
        write(tmp_path / f"a_{suffix}.nii.gz", code, volume.astype(dtype), slope=slope)
    image, target, affine = load_case(find_cases(tmp_path)[0])
    assert image.dtype == torch.float32 and np.array_equal(image[[0, 1, 3]].numpy(), images[[0, 1, 3]])
    assert np.array_equal(image[2].numpy(), 0.5 * images[2] - 7)
    by_hand = [labels == 4, (labels == 4) | (labels == 1), labels > 0]
    assert target.dtype == torch.bool and np.array_equal(target.numpy(), by_hand)
    assert np.allclose(affine, LPS, atol=1e-4)


@pytest.mark.parametrize("what", ["labels", "maps"])
@pytest.mark.parametrize("code, ending, sform, qform", [
    *[(code, ".nii.gz", 1, 1) for code in CODES],
    ("RAS", ".nii", 2, 1), ("SPL", ".nii.gz", 0, 1), ("LPS", ".nii.gz", 4, 0)])
def test_a_saved_volume_lies_where_its_voxels_were(tmp_path, code, ending, sform, qform, what):
    like = write(tmp_path / f"like{ending}", code, anatomy()[0][0], sform, qform, slope=(2, 10))
    volume = anatomy()[1] if what == "labels" else np.random.default_rng(2).random((3, *SHAPE), np.float32)
    save_volume(tmp_path / "out.nii.gz", volume, like)

    like, saved = nib.load(like), nib.load(tmp_path / "out.nii.gz")
    array = np.asanyarray(saved.dataobj)
    assert array.dtype == volume.dtype and array.shape == like.shape + (3,) * (what == "maps")
    assert np.array_equal(saved.affine, like.affine)
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert saved.header[field] == like.header[field]
    assert saved.header["cal_max"] == 0, "labels shown from 0 to 3000 are black"
    # Every voxel of the file, by way of the world, must hold what the volume in memory has at that place.
    places = np.indices(saved.shape[:3]).reshape(3, -1)
    world = saved.affine @ np.vstack([places, np.ones_like(places[:1])])
    d, h, w = (np.linalg.inv(LPS) @ world)[:3].round(1).astype(int)
    in_memory = np.moveaxis(volume, 0, -1) if what == "maps" else volume
    assert np.array_equal(array[tuple(places)], in_memory[d, h, w])


# ---- the command: what it finds is test_cohorts.py's and test_bad_input.py's ------------------------------


def test_a_terminal_sees_count_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(data.time, "monotonic", lambda: 110.0)
    data.show_progress("checking", 20, 100, 100.0)    # a log gets nothing
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    data.show_progress("checking", 20, 100, 100.0)
    data.show_progress("checking", 20, 10**6, 100.0)
    data.show_progress("checking", 100, 100, 100.0)    # and the line is empty again
    line = "\rchecking {}, {} left\x1b[K"
    assert capsys.readouterr().out == (
        line.format("20/100, 2.00/s", "0:00:40") + line.format("20/1000000, 2.00/s", "5 days, 18:53:10")
        + line.format("100/100, 10.00/s", "0:00:00") + "\r\x1b[K")
