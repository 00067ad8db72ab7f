"""infer.py: Dice and HD95, prediction by windows, the table, the command."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

import infer
from conftest import read_rows, voxels
from data import find_cases, labels_to_regions, load_case, normalize, read_volume, regions_to_labels
from infer import axis_windows, choose_window, dice, hausdorff95, load_checkpoint, predict, score
from segresnet import SegResNet


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegResNet(filters=8).eval()


def mask(*boxes):
    """A 20x20x20 mask of boxes."""
    volume = np.zeros((20, 20, 20), bool)
    for box in boxes:
        volume[box] = True
    return volume


# ---- section 4: Dice and Hausdorff95 ----------------------------------------------------------------------


def test_dice_by_hand():
    a, b = mask((slice(0, 4), 0, 0)), mask((slice(2, 8), 0, 0))
    assert dice(a, b) == dice(b, a) == 2 * 2 / (4 + 6) and dice(a, a) == 1


def test_empty_regions_count_as_in_brats():
    one, none = mask((3, 4, 5)), mask()
    assert dice(none, none) == 1 and dice(one, none) == dice(none, one) == 0
    assert hausdorff95(none, none) == 0 and hausdorff95(one, none) == hausdorff95(none, one) == 373.13


def test_hausdorff95_by_hand():
    here, there = mask((3, 4, 5)), mask((6, 8, 5))
    assert infer.surface(here).tolist() == [[3, 4, 5]]
    assert hausdorff95(here, there) == pytest.approx(5)                             # a 3-4-5 triangle
    assert hausdorff95(here, there, spacing=(2, 1, 1)) == pytest.approx(52**0.5)    # 6 mm and 4 mm
    # 40 voxels are 0 away, one is 10: the 95th percentile of the 41 is number 38, counted from 0.
    line, far = (slice(0, 10), slice(0, 4), 0), (19, 3, 0)
    assert hausdorff95(mask(line, far), mask(line)) == 0
    # Of two voxels one is 0 away and one 10: 95 % of the way. Pooled with the way back it would be 9.
    assert hausdorff95(mask((0, 0, 0), (10, 0, 0)), mask((0, 0, 0))) == pytest.approx(9.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.7)])
def test_hausdorff95_is_monais(cohort, spacing):
    metrics = pytest.importorskip("monai.metrics")
    targets = [load_case(case)[1] for case in find_cases(cohort)]
    pairs = [(p, t) for a, b in itertools.pairwise(targets) for p, t in zip(a, b) if p.any() and t.any()]
    assert len(pairs) > 10
    for p, t in pairs:
        expected = metrics.compute_hausdorff_distance(p[None, None], t[None, None], include_background=True,
                                                      percentile=95, spacing=spacing)
        assert hausdorff95(p, t, spacing) == pytest.approx(expected.item(), abs=2e-5)


def test_scores_are_dice_then_hausdorff95_of_et_tc_wt():
    labels, truth = torch.zeros(2, 16, 16, 16, dtype=torch.uint8)
    labels[0, 0, :4] = torch.tensor([4, 1, 2, 2])    # ET one voxel, TC two, WT four
    truth[0, 0, 3:5] = 4                             # ET, TC, WT: voxels 3 and 4
    found = score(labels, labels_to_regions(truth), (1, 1, 2))
    assert found == pytest.approx([0, 0, 2 * 1 / 6, 2 * 3.95, 2 * 2.95, 2 * 2.85])


def test_other_ranks_and_unequal_shapes_are_refused(model):
    image, volume, flat = torch.ones(1, 4, 16, 16, 16), torch.ones(16, 16, 16), np.ones((16, 16))
    for function, *arguments in ((dice, volume, flat), (hausdorff95, volume, flat), (hausdorff95, flat, flat),
                                 (hausdorff95, image[0], image[0]), (predict, model, volume),
                                 (predict, model, image)):
        with pytest.raises(ValueError, match="expected"):
            function(*arguments)


# ---- prediction -------------------------------------------------------------------------------------------


def noise(*shape):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def network(model, image):
    return torch.sigmoid(model(image[None]))[0]


@pytest.mark.parametrize(("lo", "hi", "n", "side", "starts", "grown"), [
    (60, 180, 240, 192, [24], 192),              # about the brain: (60 + 180 - 192) / 2
    (30, 130, 240, 192, [0], 192),               # would start at -16: moved inside
    (150, 240, 240, 192, [48], 192),             # and at the other end
    (20, 220, 240, 192, [20], 200),              # a brain of 200: the window grows to the next multiple of 8
    (20, 228, 240, 192, [20], 208),              # 16 more: the most it grows
    (10, 219, 240, 192, [10, 27], 192),          # 17 more: two windows, the second flush with the brain's end
    (0, 240, 240, 96, [0, 48, 96, 144], 96),     # half overlapping
    (0, 100, 100, 144, [0], 144),                # a volume that is smaller is padded to the window
    (0, 150, 150, 144, [0], 152),                # and to a grown one
])
def test_windows_along_an_axis(lo, hi, n, side, starts, grown):
    assert axis_windows(lo, hi, n, side) == (starts, grown)


@pytest.mark.parametrize(("brain", "crop", "window"), [
    ((140, 178, 136), (192, 192, 144), (192, 192, 144)),    # the paper's crop stays
    ((134, 177, 136), (96, 96, 96), (136, 184, 136)),       # up to the brain, in multiples of 8
    ((200, 90, 150), (96, 96, 96), (192, 96, 144)),         # and up to the paper's
])
def test_the_window_is_the_crop_or_the_brain(brain, crop, window):
    image = torch.zeros(4, 240, 240, 155)
    image[2, 10:10 + brain[0], 20:20 + brain[1], 3:3 + brain[2]] = 1
    assert choose_window(image, crop) == window


def test_one_window_is_the_network_on_it_and_zero_outside(model):
    image = torch.zeros(4, 48, 40, 40)
    image[:, 10:30, 4:34, 6:36] = noise(20, 30, 30)
    window = np.s_[:, 4:36, 3:35, 5:37]    # 32 voxels about 10 to 30, 4 to 34, 6 to 36
    expected = torch.zeros(3, 48, 40, 40)
    expected[window] = network(model, image[window])
    torch.testing.assert_close(predict(model, image, (32, 32, 32)), expected, rtol=0, atol=1e-6)


def test_several_windows_blend_as_monais(model):
    sliding_window_inference = pytest.importorskip("monai.inferers").sliding_window_inference
    image = noise(50, 40, 49)    # no zeros: the brain is the whole volume
    with torch.no_grad():    # MONAI's windows do not grow: it is given the size of ours
        mapped, size = lambda x: torch.sigmoid(model(x)), (32, 40, 32)
        expected = sliding_window_inference(image[None], size, 1, mapped, overlap=0.5, mode="gaussian")[0]
    torch.testing.assert_close(predict(model, image, (32, 32, 32)), expected, rtol=0, atol=1e-5)


def test_a_small_volume_gets_zeros_on_both_sides(model):
    image, padded = noise(20, 32, 15), torch.zeros(4, 32, 32, 16)
    padded[:, 6:26, :, :15] = image
    expected = network(model, padded)[:, 6:26, :, :15]
    torch.testing.assert_close(predict(model, image, (32, 32, 16)), expected, rtol=0, atol=1e-6)


def test_flips_are_the_mean_over_eight_mirrorings(model):
    image = noise(24, 16, 32)
    mirrorings = [[], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3]]
    expected = sum(network(model, image.flip(axes)).flip(axes) for axes in mirrorings) / 8
    torch.testing.assert_close(predict(model, image, (24, 16, 32), flips=True), expected, rtol=0, atol=1e-6)
    assert (network(model, image) - expected).abs().max() > 1e-3


# ---- the table --------------------------------------------------------------------------------------------


def test_the_table_has_a_line_a_fold_and_the_mean_by_hand(capsys):
    rows = [{"case": case, "fold": fold} | dict.fromkeys(infer.COLUMNS, value) | {"hd95_wt": "7"}
            for case, fold, value in (("a", "0", "0.5"), ("b", "0", "1.5"), ("c", "1", "4"))]
    infer.print_table(rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == ["Dice Hausdorff95, mm", "ET TC WT ET TC WT cases",
                         "fold 0 " + "1.0000 ± 0.500 " * 5 + "7.0000 ± 0.000 2",
                         "fold 1 " + "4.0000 ± 0.000 " * 5 + "7.0000 ± 0.000 1",
                         "mean " + "2.0000 ± 1.472 " * 5 + "7.0000 ± 0.000 3",    # ((1.5² + 0.5² + 2²) / 3)^½
                         "(mean ± sd over cases)"]


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohorts(cohort, tmp_path_factory):
    """`cohort`, and its first case stored along other axes."""
    folder, first = tmp_path_factory.mktemp("turned"), find_cases(cohort)[0]
    for path in (*first.images, first.label):
        image = nib.load(path).as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))    # axes and flips
        nib.save(image, folder / path.name.replace(first.name, "turned"))
    return [cohort, folder]


@pytest.fixture(scope="module")
def predicted(call, cohorts, networks, tmp_path_factory):
    """The folder of one call's predictions, maps and table, for all `cohorts` by the first network."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    flags = "--checkpoints", networks[0], "--out", out, "--probabilities"
    _, printed, _ = call("infer.py", *cohorts, *flags, ok=0)
    assert all(text in printed for text in ("3 cases were trained on", "\n7/7 turned\n", "7 of 7 cases done"))
    return out


def test_the_command_writes_what_predict_and_score_give(predicted, cohorts, networks):
    model, rows = load_checkpoint(networks[0])["model"], read_rows(predicted.with_name("out.csv"))
    for case, row in zip((*find_cases(cohorts[0]), *find_cases(cohorts[1])), rows, strict=True):
        image, target, _ = load_case(case)
        maps = predict(model, normalize(image), (32, 32, 32))
        labels, path = regions_to_labels(maps > 0.5), predicted / f"{case.name}.nii.gz"
        written, _ = read_volume(path)    # in LPS again
        assert np.array_equal(written, labels) and {*np.unique(written)} == {0, 1, 2, 4}
        assert np.array_equal(nib.load(path).affine, nib.load(case.images[0]).affine)
        for channel in range(3):
            written, _ = read_volume(predicted / "probabilities" / path.name, channel)
            assert written.dtype == np.float32 and np.abs(written - maps[channel].numpy()).max() < 1e-6
        scores, expected = [float(row[column]) for column in infer.COLUMNS], score(labels, target, (1, 1, 1))
        assert row["case"] == case.name and scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_keeps_order_and_stays_near(threads):
    begun, seen = [], []
    for future in infer.read_ahead(lambda item: begun.append(item) or item, range(20), threads):
        seen.append(future.result())
        assert len(begun) <= len(seen) + 2 * threads, "each holds an image in memory"
    assert seen == list(range(20)) and not list(infer.read_ahead(seen.append, []))


def test_two_ranks_share_the_cases_and_give_the_same_table(run, predicted, cohorts, networks, tmp_path):
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "infer.py", *cohorts,
        "--checkpoints", networks[0], "--out", tmp_path / "out", ok=0)
    assert (tmp_path / "out.csv").read_bytes() == predicted.with_name("out.csv").read_bytes()
    for path in predicted.glob("*.nii.gz"):
        assert np.array_equal(voxels(tmp_path / "out" / path.name), voxels(path))


def test_held_out_and_flips_reach_the_networks(call, cohort, networks, tmp_path):
    mine, flags = load_checkpoint(networks[1]), ["--held-out", "--flips", "--out", tmp_path / "out"]
    case = next(case for case in find_cases(cohort) if case.name in mine["val_cases"])
    _, printed, _ = call("infer.py", case.label.parent, "--checkpoints", *networks, *flags, ok=0)
    assert "trained on" not in printed
    maps = predict(mine["model"], normalize(load_case(case)[0]), (32, 32, 32), flips=True)
    assert np.array_equal(voxels(tmp_path / f"out/{case.name}.nii.gz"), regions_to_labels(maps > 0.5))
    assert [row["fold"] for row in read_rows(tmp_path / "out.csv")] == ["1"]
    _, _, error = call("infer.py", case.label.parent, "--score", tmp_path / "out", ok=2)
    assert f"{tmp_path / 'out.csv'}: has scores by fold" in error


@pytest.mark.parametrize("there", ["another.nii.gz", "probabilities/another.nii.gz"])
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_an_out_with_predictions_is_refused(call, cohort, networks, tmp_path, monkeypatch, there, rank):
    """Each rank refuses before they meet: alone, a rank that went on would wait for the other."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")) if rank else ():
        monkeypatch.setenv(name, value)
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("of another call\n")
    flags = "--out", tmp_path, "--probabilities"
    _, _, error = call("infer.py", cohort, "--checkpoints", *networks, *flags, ok=2)
    assert f"error: --out {tmp_path}: {tmp_path / there} is there, expected an empty" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / there]
