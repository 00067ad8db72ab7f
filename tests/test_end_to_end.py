"""README's snippets with their file alone; the commands of its quick start, in small: their numbers agree."""

import re
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from barlow import barlow_twins_loss, soft_dice_loss
from conftest import REPO, TINY, read_rows
from data import find_cases, split_folds
from ensemble import confidence_ensemble

OURS = {"barlow", "data", "ensemble", "infer", "segresnet", "train"}


@pytest.fixture
def snippet(monkeypatch, tmp_path):
    """Runs README's Python lines for one file, which finds no other of ours -> the names that they define."""
    def run_lines(file, without, **names):
        text = (REPO / "README.md").read_text(encoding="utf-8")
        (lines,) = re.findall(f"```python\n([^`]*from {file} import [^`]*)```", text)
        for module in OURS | {*without}:
            monkeypatch.setitem(sys.modules, module, None)    # cannot be imported
        monkeypatch.delitem(sys.modules, file)
        monkeypatch.chdir(tmp_path)
        exec(lines, names)
        return names
    return run_lines


def test_readmes_lines_for_barlow_give_the_papers_loss(snippet):
    views = torch.rand(2, 1, 32, 32, 32, 16)
    found = snippet("barlow", ("nibabel", "numpy", "scipy"), features_a=views[0], features_b=views[1],
                    probabilities=torch.rand(1, 3, 8, 8, 8), target=torch.ones(1, 3, 8, 8, 8))
    barlow = barlow_twins_loss(*(found["projector"](view) for view in views))
    assert torch.equal(found["loss"], soft_dice_loss(found["probabilities"], found["target"]) + barlow / 128)


def test_readmes_lines_for_ensemble_merge_three_maps(snippet):
    maps = torch.rand(3, 3, 8, 8, 8)
    found = snippet("ensemble", ("scipy",), **{f"model_{n}_map": one for n, one in zip("abc", maps)})
    assert torch.equal(found["merged"], confidence_ensemble(maps))


def test_readmes_lines_for_segresnet_load_monais_weights(snippet, tmp_path):
    nets, image = pytest.importorskip("monai.networks.nets"), torch.rand(1, 4, 16, 16, 16)
    theirs = nets.SegResNet(init_filters=16, in_channels=4, out_channels=3)
    torch.save(theirs.state_dict(), tmp_path / "monai_segresnet.pt")
    expected = theirs.eval()(image)
    found = snippet("segresnet", ("monai", "nibabel", "numpy", "scipy"))
    assert torch.allclose(found["model"].eval()(image), expected, atol=1e-5)


@pytest.fixture(scope="module")
def both(run, cohort, checkpoint, tmp_path_factory):
    """The networks of fold 0, after one epoch, and of fold 1, after twelve."""
    out = tmp_path_factory.mktemp("runs") / "fold1"
    run("train.py", "--data", cohort, "--fold", 1, "--folds", 2, "--out", out, *TINY, "--epochs", 12,
        "--crop", 24, 24, 24, "--lr", 0.02, ok=0)
    return [checkpoint, out / "best.pt"]


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
