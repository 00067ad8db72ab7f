"""The figure: the paper's colours, the case of median Dice, curves of what was measured."""

import numpy as np
import pytest

from conftest import voxels
from data import find_cases, save_volume

plt = pytest.importorskip("matplotlib.pyplot")
import figure  # noqa: E402


def test_truth_and_prediction_are_in_the_papers_colours(call, cohort, checkpoint, tmp_path):
    case = next(case for case in find_cases(cohort) if {1, 2, 4} <= set(np.unique(voxels(case.label))))
    truth, counts = voxels(case.label), []
    for labels in (np.zeros_like(truth), truth):
        save_volume(tmp_path / f"{case.name}.nii.gz", labels, case.label)
        call("figure.py", "--cohort", cohort, "--predictions", tmp_path, "--case", case.name,
             "--runs", checkpoint.parent, "--out", tmp_path / "figure.png", ok=0)
        red, green, blue = np.moveaxis(plt.imread(tmp_path / "figure.png")[..., :3], -1, 0)
        # Half colour, half grey image: the differences between the channels are half the colour's.
        counts.append([(np.minimum(red, green) > blue + 0.2).sum(),      # yellow: ET
                       (red > np.maximum(green, blue) + 0.25).sum(),     # red: the rest of TC
                       (green > np.maximum(red, blue) + 0.12).sum()])    # green: the rest of WT
    empty, full = np.array(counts)
    # The truth is drawn in both, the prediction in the second alone; legend and curves are the same.
    assert (empty > 500).all() and (full > 1.5 * empty).all() and (full < 2 * empty).all()


def test_without_a_name_the_case_of_median_dice_is_shown(cohort, tmp_path):
    low, high, middle = [case for case in find_cases(cohort) if 4 in voxels(case.label)][:3]
    changes = np.zeros_like, np.copy, lambda labels: np.where(labels, 2, 0)    # Dice 0 0 0; 1 1 1; 0 0 1
    for case, change in zip((low, high, middle), changes):
        save_volume(tmp_path / f"{case.name}.nii.gz", change(voxels(case.label)), case.label)
    case, title = figure.choose(find_cases(cohort), tmp_path)
    assert case == middle and "3 cases" in title
    assert figure.choose(find_cases(cohort), tmp_path, low.name) == (low, low.name)


def test_curves_leave_out_epochs_without_validation(tmp_path):
    lines = "epoch,dice_loss,barlow,dice_et,dice_tc,dice_wt", "1,0.9,3,,,", "2,0.5,1,0.1,0.2,0.3"
    (tmp_path / "log.csv").write_text("\n".join(lines))
    (log,) = figure.read_logs([tmp_path])
    better = log | {"dice_wt": log["dice_wt"] + 0.2}
    line = figure.curve(plt.figure().gca(), [log, better], "dice_wt", "green")
    assert line.get_xydata() == pytest.approx(np.array([[2, 0.4]]))    # the mean of 0.3 and 0.5
