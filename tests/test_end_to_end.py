"""The commands one after the other, as README's quick start runs them, in small: their numbers agree."""

import nibabel as nib
import numpy as np
import pytest

from conftest import TINY, read_rows
from data import find_cases, split_folds


@pytest.fixture(scope="module")
def both(run, cohort, checkpoint, tmp_path_factory):
    """The networks of fold 0, after one epoch, and of fold 1, after twenty-four."""
    out = tmp_path_factory.mktemp("runs") / "fold1"
    run("train.py", "--data", cohort, "--fold", 1, "--folds", 2, "--out", out, *TINY, "--epochs", 24,
        "--lr", 0.01, ok=0)
    return [checkpoint, out / "best.pt"]


def test_the_cohort_check_counts_what_training_reads(call, cohort):
    cases = find_cases(cohort)
    voxels = [(np.asarray(nib.load(case.label).dataobj) > 0).sum() for case in cases]
    _, printed, _ = call("data.py", cohort, ok=0)
    assert f"6 case(s) of 6 patient(s), named as {cases[0].naming.cohort}" in printed
    assert f"WT: mean {np.mean(voxels):,.0f} voxels, empty in 0 of 6" in printed
    assert "6 of 6 cases can be used" in printed


def test_training_learns_and_held_out_scores_are_validations(call, cohort, both, tmp_path):
    flags = "--held-out", "--out", tmp_path / "out"
    _, printed, _ = call("infer.py", cohort, "--checkpoints", *both, *flags, ok=0)
    rows, folds = read_rows(tmp_path / "out.csv"), split_folds(find_cases(cohort), folds=2)
    for fold, checkpoint in enumerate(both):
        validated = [row for row in read_rows(checkpoint.with_name("log.csv")) if row["dice_mean"]]
        best = max(validated, key=lambda row: float(row["dice_mean"]))
        mine = [row for row in rows if row["fold"] == str(fold)]
        assert [row["case"] for row in mine] == [case.name for case in folds[fold]]
        for region in ("et", "tc", "wt"):
            mean = np.mean([float(row[f"dice_{region}"]) for row in mine])
            assert float(best[f"dice_{region}"]) == pytest.approx(mean, abs=1e-5)
        mean = np.mean([float(row["dice_wt"]) for row in mine])
        assert [f"{mean:.4f}" in line for line in printed.splitlines() if f"fold {fold} " in line] == [True]
    assert mean > 0.4    # on cases that it never saw; all of the brain as tumour has 0.15


def test_merged_maps_are_the_ensemble_in_one_go(call, cohort, both, tmp_path):
    singles = [tmp_path / "fold0", tmp_path / "fold1"]
    for out, checkpoint in zip(singles, both):
        call("infer.py", cohort, "--checkpoints", checkpoint, "--probabilities", "--out", out, ok=0)
    call("ensemble.py", "--out", tmp_path / "merged", *(out / "probabilities" for out in singles), ok=0)
    call("infer.py", cohort, "--checkpoints", *both, "--out", tmp_path / "direct", ok=0)
    call("infer.py", cohort, "--score", tmp_path / "merged", ok=0)
    seen = set()
    for case in find_cases(cohort):
        merged, direct = (nib.load(tmp_path / name / f"{case.name}.nii.gz") for name in ("merged", "direct"))
        assert np.array_equal(merged.dataobj, direct.dataobj) and np.array_equal(merged.affine, direct.affine)
        seen |= {*np.unique(merged.dataobj)}
    assert seen == {0, 1, 2, 4}
    scored = (tmp_path / "merged.csv").read_text()
    assert scored == (tmp_path / "direct.csv").read_text()
    assert scored not in [out.with_suffix(".csv").read_text() for out in singles]
