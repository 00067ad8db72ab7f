"""The ablation's statistics against calculations by other means, and RESULTS.md against its CSVs."""

import itertools
import sys

import numpy as np
import pytest

from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import tables  # noqa: E402

RESULTS = REPO / "benchmarks" / "results"


def test_the_interval_is_that_of_every_possible_resample():
    differences = np.array([[0.1, -0.2, 0.4], [0.3, 0.0, 0.2]])    # 2 seeds, 3 cases
    means = [differences[np.ix_(seeds, cases)].mean() for seeds in itertools.product(range(2), repeat=2)
             for cases in itertools.product(range(3), repeat=3)]    # all 4 x 27 draws, equally likely
    mean, low, high = tables.interval(differences, draws=200_000)
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.01)


def test_an_interval_over_seeds_that_agree_is_that_over_cases_alone():
    differences = np.tile([0.0, 1.0], (5, 50))    # 100 cases, half 0 and half 1: the binomial's 95 % is 0.5 +- 1.96 * 0.05
    assert tables.interval(differences) == pytest.approx((0.5, 0.402, 0.598), abs=0.01)


def row(**values):
    return {key: str(value) for key, value in values.items()}


def test_differences_are_taken_within_a_seed_and_case_and_only_where_both_arms_have_them():
    one = tables.matrix([row(seed=s, case=c, dice=s + 10 * c) for s in (0, 1, 2) for c in (0, 1)], ["dice"])
    other = tables.matrix([row(seed=s, case=c, dice=s + 10 * c + (0.5 if c else 0.25)) for c in (1, 0) for s in (1, 0)], ["dice"])
    assert tables.paired(one, other).tolist() == [[0.25, 0.5], [0.25, 0.5]]


def test_ranking_by_hand():
    # ranks of confidence 1 2 3 4 5, of Dice 2 1 3 5 4: rho = 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24) = 0.8; the most confident is second best
    maps = [row(seed=0, case="a", model=i, flip=0, region="ET", dice=d, confidence=c, voxels=100, truth=100)
            for i, (c, d) in enumerate(zip((0.6, 0.7, 0.8, 0.9, 0.95), (0.5, 0.4, 0.6, 0.8, 0.7)))]
    maps += [row(seed=0, case="b", model=i, flip=0, region="ET", dice=0, confidence="nan", voxels=0, truth=100) for i in range(5)]
    rho, best = tables.correlations(maps, "ET", ("0",))
    assert rho == {("0", "a"): pytest.approx(0.8)} and best == {("0", "a"): 0.0}


def test_the_tables_of_results_md_come_out_of_the_committed_csvs():
    text = (REPO / "benchmarks" / "RESULTS.md").read_text()
    assert tables.write_into(text, tables.all_tables(RESULTS)) == text
    assert tables.write_into(text.replace("0.", "1.", 1), tables.all_tables(RESULTS)).count("<!-- end -->") == text.count("<!-- end -->")


def test_the_whole_study_in_miniature_prints_every_table_and_is_not_done_twice(run, tmp_path):
    import ablation
    import torch

    done = run("benchmarks/ablation.py", "--quick", "--out", tmp_path, ok=0)
    assert "29 networks, 29 to do" in done.stdout
    for name in ("claims", "primary", "hd95", "secondary", "ensemble", "ranking", "features"):
        assert f"\n{name}\n" in done.stdout
    # a row against the saved network, predicted and scored anew
    (found,) = tables.of(tables.read(tmp_path, "scores"), cohort="hard", cases="4", arm="with", seed="1", condition="as trained", case="BraTS2021_00007")
    model = ablation.SegResNet(filters=8)
    model.load_state_dict(torch.load(tmp_path / "models" / "hard-4-with-seed_1.pt", weights_only=True)["model"])
    (case,) = [case for case in ablation.find_cases(tmp_path / "cohorts" / "hard") if case.name == found["case"]]
    image, truth, _ = ablation.load_case(case)
    painted = ablation.labels_to_regions(ablation.regions_to_labels(ablation.predict(model.eval(), ablation.normalize(image), (32, 32, 24)) > 0.5))
    assert [float(found[column]) for column in tables.DICE] == pytest.approx([ablation.dice(p, t) for p, t in zip(painted, truth)], abs=1e-4)
    again = run("benchmarks/ablation.py", "--quick", "--out", tmp_path, ok=0)
    assert "29 networks, 0 to do" in again.stdout and again.stdout.split("claims")[1] == done.stdout.split("claims")[1]


def test_perturbations_keep_the_background_and_do_what_they_say():
    import ablation
    import torch

    image = torch.zeros(4, 24, 24, 24)
    image[:, 4:20, 4:20, 4:20] = 100 + 10 * torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    brain = image != 0
    for condition in ablation.CONDITIONS:
        out = ablation.perturb(image, condition, torch.Generator().manual_seed(1))
        assert not out[~brain].any() and torch.equal(out, image) == (condition == "as trained")
    noise = ablation.perturb(image, "noise", torch.Generator().manual_seed(1))[brain] - image[brain]
    assert noise.std().item() == pytest.approx(20, rel=0.05)
    contrast = ablation.perturb(image, "contrast", torch.Generator().manual_seed(1))
    for before, after in zip(image, contrast):    # monotone: the order of the voxels stays
        inside = before != 0
        assert (after[inside][before[inside].argsort()].diff() >= 0).all() and not torch.allclose(before, after, rtol=0.05)
    field = torch.log(ablation.perturb(image, "bias field", torch.Generator().manual_seed(1))[brain] / image[brain])
    assert 0.2 < field.std().item() < 0.5
