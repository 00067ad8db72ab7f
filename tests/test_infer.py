"""infer.py: windows and blending against MONAI and by hand, Dice and HD95, and the command."""

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from data import find_cases, labels_to_regions, load_case, normalize, regions_to_labels
from infer import HD95_ONE_EMPTY, axis_windows, choose_window, dice, hausdorff95, load_checkpoint, predict
from segresnet import SegResNet


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegResNet(filters=8).eval()


# ---- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lo", "hi", "n", "side", "starts", "grown"), [
    (30, 130, 240, 192, [0], 192),          # centred on 80 would start at -16: moved inside
    (60, 180, 240, 192, [24], 192),         # (60 + 180 - 192) / 2
    (150, 240, 240, 192, [48], 192),        # moved inside at the other end
    (20, 220, 240, 192, [20], 200),         # 200 voxels: 8 more than the window, which grows to the next multiple of 8
    (20, 228, 240, 192, [20], 208),         # 16 more: the most it grows
    (10, 219, 240, 192, [10, 27], 192),     # 17 more: two windows, the second flush with the brain's end
    (0, 240, 240, 96, [0, 48, 96, 144], 96),
    (0, 100, 100, 144, [0], 144),           # smaller than the window: padded to it
    (0, 150, 150, 144, [0], 152),           # grown beyond the volume: padded
])
def test_windows_along_one_axis(lo, hi, n, side, starts, grown):
    assert axis_windows(lo, hi, n, side) == (starts, grown)


@pytest.mark.parametrize(("extents", "crop", "window"), [
    ((140, 178, 136), (192, 192, 144), (192, 192, 144)),    # the paper's crop stays
    ((134, 177, 136), (96, 96, 96), (136, 184, 136)),       # grown to the brain, in multiples of 8
    ((200, 90, 150), (96, 96, 96), (192, 96, 144)),         # up to the paper's; predict() grows or blends beyond
])
def test_the_window_grows_to_the_brain_up_to_the_papers(extents, crop, window):
    image = torch.zeros(4, 240, 240, 155)
    image[2, 10:10 + extents[0], 20:20 + extents[1], 3:3 + extents[2]] = 1.0
    assert choose_window(image, crop) == window


def test_one_window_is_the_network_on_that_box_and_zero_outside(model):
    image = torch.zeros(4, 48, 40, 40)
    image[:, 10:30, 4:34, 6:36] = torch.randn(4, 20, 30, 30, generator=torch.Generator().manual_seed(1))
    found = predict(model, image, roi=(32, 32, 32))
    box = (slice(None), slice(4, 36), slice(3, 35), slice(5, 37))    # 32 voxels centred on 10..30, 4..34, 6..36
    with torch.no_grad():
        expected = torch.sigmoid(model(image[box][None]))[0]
    torch.testing.assert_close(found[box], expected, rtol=1e-5, atol=1e-6)
    outside = found.clone()
    outside[box] = 0
    assert not outside.any() and found[box].min() > 0


@pytest.mark.parametrize("shape", [(64, 50, 32), (80, 72, 51)])
def test_several_windows_blend_as_monai_does(model, shape):
    inferers = pytest.importorskip("monai.inferers")
    image = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))    # no zeros: the brain is the whole volume
    # MONAI knows nothing of our growing windows: it is given the size that ours come to.
    size = [axis_windows(0, n, n, 32)[1] for n in shape]
    with torch.no_grad():
        expected = inferers.sliding_window_inference(image[None], size, 1, lambda x: torch.sigmoid(model(x)), overlap=0.5, mode="gaussian")[0]
    torch.testing.assert_close(predict(model, image, roi=(32, 32, 32)), expected, rtol=1e-4, atol=1e-5)


def test_a_small_volume_is_padded_with_zeros_on_both_sides(model):
    image = torch.randn(4, 20, 32, 26, generator=torch.Generator().manual_seed(3))
    padded = torch.zeros(4, 32, 32, 32)
    padded[:, 6:26, :, 3:29] = image
    with torch.no_grad():
        expected = torch.sigmoid(model(padded[None]))[0, :, 6:26, :, 3:29]
    torch.testing.assert_close(predict(model, image, roi=(32, 32, 32)), expected, rtol=1e-5, atol=1e-6)


def test_flips_average_all_eight_mirrorings(model):
    image = torch.randn(4, 32, 32, 32, generator=torch.Generator().manual_seed(4))
    expected = torch.zeros(3, 32, 32, 32)
    for flip_d in (False, True):
        for flip_h in (False, True):
            for flip_w in (False, True):
                axes = [axis for axis, flip in ((1, flip_d), (2, flip_h), (3, flip_w)) if flip]
                with torch.no_grad():
                    expected += torch.sigmoid(model(image.flip(axes)[None]))[0].flip(axes) / 8
    torch.testing.assert_close(predict(model, image, (32, 32, 32), flips=True), expected, rtol=1e-5, atol=1e-6)
    mirrored = predict(model, image.flip(2), (32, 32, 32), flips=True).flip(2)    # the mean over a group commutes with its members
    torch.testing.assert_close(mirrored, expected, rtol=1e-5, atol=1e-6)


# ---- scores -----------------------------------------------------------------------------------------------------------


def mask(*boxes, shape=(20, 20, 20)):
    volume = torch.zeros(shape, dtype=torch.bool)
    for box in boxes:
        volume[box] = True
    return volume


def test_dice_by_hand():
    a, b = mask((slice(0, 4), 0, 0)), mask((slice(2, 8), 0, 0))
    assert dice(a, b) == pytest.approx(2 * 2 / (4 + 6))
    assert dice(a, mask()) == 0.0 and dice(mask(), a) == 0.0 and dice(mask(), mask()) == 1.0


def test_hausdorff95_by_hand():
    assert hausdorff95(mask((3, 4, 5)), mask((6, 8, 5))) == pytest.approx(5.0)                        # a 3-4-5 triangle
    assert hausdorff95(mask((3, 4, 5)), mask((6, 8, 5)), spacing=(2, 1, 1)) == pytest.approx(52**0.5)
    assert hausdorff95(mask(), mask()) == 0.0
    assert hausdorff95(mask((3, 4, 5)), mask()) == HD95_ONE_EMPTY == 373.13 == hausdorff95(mask(), mask((3, 4, 5)))
    # One far voxel among 40: towards b the distances are 0 (40 times) and 10; the 95th percentile of 41 values is the 39th
    # of 0..40, so 0. Towards a all are 0. Pooled or maximal distances would not be 0.
    line, far = (slice(0, 10), slice(0, 4), 0), (19, 3, 0)
    assert hausdorff95(mask(line, far), mask(line)) == 0.0
    # Directed percentiles: of a's two voxels one is 0 and one 10 away, 95 % of the way from 0 to 10; b's one voxel is 0 away.
    assert hausdorff95(mask((0, 0, 0), (10, 0, 0)), mask((0, 0, 0))) == pytest.approx(9.5)


def test_the_inside_of_a_mask_does_not_count():
    solid, shell = mask((slice(2, 12),) * 3), mask((slice(2, 12),) * 3)
    shell[3:11, 3:11, 3:11] = False
    # a shell one voxel thick is the solid's surface: were the inside counted, its voxels would be up to 4 away
    assert hausdorff95(solid, shell) == 0.0


def test_hausdorff95_equals_monai_on_phantom_masks(cohort):
    metrics = pytest.importorskip("monai.metrics")
    targets = [load_case(case)[1] for case in find_cases(cohort)]
    compared = 0
    for a, b in zip(targets, targets[1:]):
        for spacing in ((1.0, 1.0, 1.0), (1.0, 2.0, 0.7)):
            for p, t in zip(a, b):
                if p.any() and t.any():
                    expected = metrics.compute_hausdorff_distance(p[None, None], t[None, None], include_background=True, percentile=95, spacing=spacing)
                    assert hausdorff95(p, t, spacing) == pytest.approx(expected.item(), abs=2e-5)
                    compared += 1
    assert compared > 10


# ---- the command ------------------------------------------------------------------------------------------------------


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_predicts_scores_and_resumes(run, cohort, checkpoint, tmp_path):
    out = tmp_path / "predictions"
    first = run("infer.py", cohort, "--checkpoints", checkpoint, "--out", out, "--probabilities", ok=0)
    cases = find_cases(cohort)
    assert sorted(path.name for path in out.iterdir()) == [f"{case.name}.nii.gz" for case in cases] + ["probabilities"]
    assert "trained on" in first.stdout    # three of the six were
    rows = read_rows(tmp_path / "predictions.csv")
    model = load_checkpoint(checkpoint)["model"]
    for case, row in zip(cases, rows):
        image, target, _ = load_case(case)
        probabilities = predict(model, normalize(image), (32, 32, 32))
        written, maps, like = (nib.load(path) for path in (out / f"{case.name}.nii.gz", out / "probabilities" / f"{case.name}.nii.gz", case.images[0]))
        assert written.get_data_dtype() == np.uint8 and written.shape == like.shape and np.array_equal(written.affine, like.affine)
        assert written.header["xyzt_units"] == like.header["xyzt_units"]
        labels = regions_to_labels(probabilities > 0.5)
        assert np.array_equal(np.asarray(written.dataobj), labels.numpy())    # the phantom is stored in LPS already
        assert maps.get_data_dtype() == np.float32 and maps.shape == (*like.shape, 3)
        np.testing.assert_allclose(np.moveaxis(maps.get_fdata(), -1, 0), probabilities.numpy(), atol=1e-5)
        assert row["case"] == case.name
        for region, p, t in zip(("et", "tc", "wt"), labels_to_regions(labels), target):
            assert float(row[f"dice_{region}"]) == pytest.approx(dice(p, t), abs=1e-5)
            assert float(row[f"hd95_{region}"]) == pytest.approx(hausdorff95(p, t), rel=1e-5)
    mean = sum(float(row["dice_wt"]) for row in rows) / len(rows)
    assert f"{mean:.4f}" in next(line for line in first.stdout.splitlines() if line.startswith("mean"))

    # A finished case is kept, an unfinished one predicted, and --overwrite predicts all again.
    kept, lost = out / f"{cases[0].name}.nii.gz", out / f"{cases[1].name}.nii.gz"
    original = kept.read_bytes()
    shutil.copy(out / f"{cases[2].name}.nii.gz", kept)    # to be recognised by
    lost.unlink()
    second = run("infer.py", cohort, "--checkpoints", checkpoint, "--out", out, ok=0)
    assert "5 cases were predicted before" in second.stdout and lost.exists() and kept.read_bytes() != original
    run("infer.py", cohort / cases[0].name, "--checkpoints", checkpoint, "--out", out, "--overwrite", ok=0)
    assert kept.read_bytes() == original
    run("infer.py", cohort, "--checkpoints", checkpoint, "--out", out, ok=0)

    # Scoring alone, and two processes sharing the cases, come to the same numbers.
    run("infer.py", "--score", out, "--truth", cohort, ok=0)
    assert read_rows(tmp_path / "predictions.csv") == rows
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "infer.py", cohort, "--checkpoints", checkpoint, "--out", tmp_path / "two", ok=0)
    assert read_rows(tmp_path / "two.csv") == rows


def other_fold(checkpoint, path):
    """A second "fold" beside `checkpoint`: the complement of its cases, other weights. -> what was saved to `path`"""
    content = torch.load(checkpoint, weights_only=True)
    content["train_cases"], content["val_cases"] = content["val_cases"], content["train_cases"]
    content["settings"]["fold"] = "1"
    torch.manual_seed(5)
    content["model"] = SegResNet(filters=8).state_dict()
    torch.save(content, path)
    return content


def test_held_out_uses_only_checkpoints_that_never_saw_the_case(run, cohort, checkpoint, tmp_path):
    content = other_fold(checkpoint, tmp_path / "other.pt")
    done = run("infer.py", cohort, "--checkpoints", checkpoint, tmp_path / "other.pt", "--held-out", "--out", tmp_path / "held-out", ok=0)
    assert "trained on" not in done.stdout and "fold 0" in done.stdout and "fold 1" in done.stdout
    other = SegResNet(filters=8).eval()
    other.load_state_dict(content["model"])
    for case, row in zip(find_cases(cohort), read_rows(tmp_path / "held-out.csv")):
        fold = "1" if case.name in content["val_cases"] else "0"
        assert row["fold"] == fold
        network = other if fold == "1" else load_checkpoint(checkpoint)["model"]
        expected = regions_to_labels(predict(network, normalize(load_case(case)[0]), (32, 32, 32)) > 0.5)
        assert np.array_equal(np.asarray(nib.load(tmp_path / "held-out" / f"{case.name}.nii.gz").dataobj), expected.numpy())


def test_predictions_of_another_call_are_never_taken_for_this_ones(run, cohort, checkpoint, tmp_path):
    """Else --held-out would score networks on the cases that they were trained on."""
    other_fold(checkpoint, tmp_path / "other.pt")
    both, out = [checkpoint, tmp_path / "other.pt"], ["--out", tmp_path / "out"]
    run("infer.py", cohort, "--checkpoints", *both, *out, ok=0)
    left = {path: path.read_bytes() for path in [*(tmp_path / "out").iterdir(), tmp_path / "out.csv"]}
    for call in ([*both, "--held-out"], [*both, "--ensemble", "mean"], [*both, "--flips"], [checkpoint]):
        done = run("infer.py", cohort, "--checkpoints", *call, *out, ok=2)
        (line,) = done.stderr.splitlines()
        assert not done.stdout and f"{tmp_path / 'out'}" in line and "expected another --out, or --overwrite" in line
        assert {path: path.read_bytes() for path in left} == left
    assert "6 cases were predicted before" in run("infer.py", cohort, "--checkpoints", *both[::-1], *out, ok=0).stdout    # the same networks
    # Another network under the same name is another network; nor is a file without a note taken for a prediction.
    other_fold(checkpoint, tmp_path / "again.pt")
    content = torch.load(tmp_path / "again.pt", weights_only=True)
    content["model"]["decoder_end.2.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    run("infer.py", cohort, "--checkpoints", *both, *out, ok=2)
    run("infer.py", cohort, "--checkpoints", *both, *out, "--overwrite", ok=0)
    case = find_cases(cohort)[0]
    shutil.copy(case.label, tmp_path / "out" / f"{case.name}.nii.gz")
    run("infer.py", cohort, "--checkpoints", *both, *out, ok=2)


@pytest.mark.parametrize("codes", ["RAS", "SPL", "AIR"])
def test_a_volume_stored_otherwise_gives_the_same_prediction_in_its_own_orientation(run, cohort, checkpoint, tmp_path, codes):
    case = find_cases(cohort)[0]
    folder = tmp_path / "stored" / case.name
    folder.mkdir(parents=True)
    target = nib.orientations.axcodes2ornt(codes)
    for path in case.images:
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), target)
        nib.save(image.as_reoriented(turn), folder / path.name)
    for source, out in ((cohort / case.name, "as-is"), (folder, "turned")):
        run("infer.py", source, "--checkpoints", checkpoint, "--out", tmp_path / out, "--probabilities", ok=0)
    for name in (f"{case.name}.nii.gz", f"probabilities/{case.name}.nii.gz"):
        as_is, turned = nib.load(tmp_path / "as-is" / name), nib.load(tmp_path / "turned" / name)
        assert "".join(nib.aff2axcodes(turned.affine)) == codes
        np.testing.assert_allclose(turned.affine, nib.load(folder / case.images[0].name).affine)
        back = turned.as_reoriented(nib.orientations.ornt_transform(target, nib.io_orientation(as_is.affine)))
        np.testing.assert_allclose(back.affine, as_is.affine)
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(as_is.dataobj))


def test_the_real_case(run, real_case, checkpoint, tmp_path):
    out = tmp_path / "out"
    run("infer.py", real_case, "--checkpoints", checkpoint, "--out", out, ok=0)
    for case in find_cases(real_case):
        written, like = nib.load(out / f"{case.name}.nii.gz"), nib.load(case.images[0])
        assert written.shape == like.shape and np.array_equal(written.affine, like.affine) and written.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2, 4}
