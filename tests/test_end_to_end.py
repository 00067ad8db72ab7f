"""The commands one after the other, as the quick start runs them, in small."""

import csv

import nibabel as nib
import numpy as np
import pytest

from data import find_cases

TINY = ("--folds", 2, "--epochs", 1, "--crop", 32, 32, 32, "--filters", 8, "--pool", 8, "--dim", 4, "--workers", 0, "--amp", "off")


@pytest.fixture(scope="module")
def both_folds(run, cohort, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fold1"
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data", cohort, "--fold", 1, "--out", out, *TINY, ok=0)
    return checkpoint, out / "best.pt"


@pytest.mark.parametrize("method", ["mean", "geometric", "confidence"])
def test_merging_saved_maps_equals_ensembling_in_one_go(run, cohort, both_folds, tmp_path, method):
    folders = []
    for fold, checkpoint in enumerate(both_folds):
        run("infer.py", cohort, "--checkpoints", checkpoint, "--out", tmp_path / f"fold{fold}", "--probabilities", ok=0)
        folders.append(tmp_path / f"fold{fold}" / "probabilities")
    run("ensemble.py", "--method", method, "--out", tmp_path / "merged", *folders, ok=0)
    run("infer.py", cohort, "--checkpoints", *both_folds, "--ensemble", method, "--out", tmp_path / "direct", ok=0)
    for case in find_cases(cohort):
        merged, direct = (nib.load(tmp_path / folder / f"{case.name}.nii.gz") for folder in ("merged", "direct"))
        assert np.array_equal(np.asarray(merged.dataobj), np.asarray(direct.dataobj)) and np.array_equal(merged.affine, direct.affine)
    run("infer.py", "--score", tmp_path / "merged", "--truth", cohort, ok=0)
    assert (tmp_path / "merged.csv").read_text() == (tmp_path / "direct.csv").read_text()


def test_training_learns(run, cohort, tmp_path):
    case = find_cases(cohort)[1]
    run("train.py", "--data", case.images[0].parent, "--fold", "all", "--out", tmp_path / "run", *TINY, "--epochs", 80, "--lr", "1e-2", ok=0)
    assert not (tmp_path / "run" / "best.pt").exists()    # nothing was held out to choose by
    run("infer.py", case.images[0].parent, "--checkpoints", tmp_path / "run" / "last.pt", "--out", tmp_path / "out", ok=0)
    with open(tmp_path / "out.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    # An untrained network gets about 0.05, everything painted as tumour about 0.1.
    assert float(row["dice_wt"]) > 0.6


def test_the_figure_shows_truth_and_prediction_in_the_papers_colours(run, cohort, checkpoint, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    case = next(case for case in find_cases(cohort) if 4 in np.unique(np.asarray(nib.load(case.label).dataobj)))
    empty = np.zeros((32, 32, 32), np.uint8)
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    counts = {}
    for what in ("empty", "truth"):
        truth = nib.load(case.label)
        nib.save(truth if what == "truth" else nib.Nifti1Image(empty, truth.affine, truth.header), predictions / f"{case.name}.nii.gz")
        run("examples/figure.py", "--cohort", cohort, "--predictions", predictions, "--case", case.name, "--runs", checkpoint.parent,
            "--out", tmp_path / "figure.png", ok=0)
        red, green, blue = np.moveaxis(plt.imread(tmp_path / "figure.png")[..., :3], -1, 0)
        # half colour, half grey image: the differences between the channels are half the colour's
        counts[what] = [int((np.minimum(red, green) > blue + 0.2).sum()),            # yellow: ET
                        int((red > np.maximum(green, blue) + 0.25).sum()),           # red: the rest of TC
                        int((green > np.maximum(red, blue) + 0.12).sum())]           # green: the rest of WT
    # drawn once above, and a second time where the prediction is the truth; legend and curves are the same in both
    assert all(full > once > 0 for once, full in zip(counts["empty"], counts["truth"]))
