"""The ablation: its intervals against a plain loop and a closed form, pairs and ranks by hand, RESULTS.md against its CSVs."""

import csv
import re
import sys

import numpy as np
import pytest

from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import tables  # noqa: E402

RESULTS = REPO / "benchmarks" / "RESULTS.md"


def looped(values, draws=4000):
    """The bootstrap as one would say it: draw seeds, draw cases, take the mean of what is known."""
    rng = np.random.default_rng(7)
    seeds, cases = values.shape
    means = [np.nanmean(values[np.ix_(rng.integers(seeds, size=seeds), rng.integers(cases, size=cases))]) for _ in range(draws)]
    return np.percentile(means, (2.5, 97.5))


def score_rows(arm, values, **constant):
    """{(seed, case): Dice} -> rows of scores.csv, the same Dice for every region."""
    return [{"arm": arm, "seed": seed, "case": case, **constant, **dict.fromkeys(tables.DICE, str(value))}
            for (seed, case), value in values.items()]


# ---- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0, 30])
def test_interval_is_that_of_a_plain_loop(unknown):
    rng = np.random.default_rng(1)
    values = 0.3 * rng.standard_normal((5, 1)) + rng.standard_normal((1, 40)) + rng.standard_normal((5, 40)) + 0.2
    values.flat[rng.choice(200, unknown, replace=False)] = np.nan
    mean, low, high = tables.interval(values)
    assert mean == pytest.approx(np.nanmean(values))
    assert (low, high) == pytest.approx(looped(values), abs=0.05 * (high - low))


def test_interval_of_independent_seeds_and_cases_has_the_closed_form():
    # x = a + b: the mean of a draw has the variance var(a) / seeds + var(b) / cases, and is nearly normal with so many of each
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((60, 1)), 2 * rng.standard_normal((1, 50))
    sd = np.sqrt(a.var() / 60 + b.var() / 50)
    mean, low, high = tables.interval(a + b)
    assert (low - mean, high - mean) == pytest.approx((-1.96 * sd, 1.96 * sd), abs=0.06 * sd)


def test_what_differs_between_seeds_alone_is_not_averaged_away_by_cases():
    by_seed = np.array([[0.0], [1.0]])
    assert tables.interval(by_seed) == tables.interval(np.repeat(by_seed, 1000, 1)) == (0.5, 0, 1)    # 1 in 4 draws is one seed twice


def test_interval_is_the_same_every_time():
    values = np.random.default_rng(3).standard_normal((3, 20))
    assert tables.interval(values) == tables.interval(values)


# ---- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_what_both_arms_have():
    without = score_rows("without", {("0", "a"): 0.5, ("0", "b"): 0.7, ("1", "a"): 0.1}, cohort="easy")
    without += score_rows("without", {("0", "a"): 0.9}, cohort="hard")    # its partner was never trained
    with_term = score_rows("with", {("0", "a"): 0.6, ("0", "b"): 0.6, ("2", "a"): 0.2}, cohort="easy")
    pair = tables.paired(without, with_term, tables.DICE)
    assert pair.tolist() == [[[pytest.approx(0.5), pytest.approx(0.7)]], [[pytest.approx(0.6), pytest.approx(0.6)]]]


def test_conditions_are_paired_before_they_are_averaged():
    arms = []
    for arm, noise, bias in (("without", 0.2, 0.4), ("with", 0.3, 0.8)):
        by_condition = {"noise": noise, "bias field": bias}
        arms.append([row for condition, value in by_condition.items() for row in score_rows(arm, {("0", "a"): value}, condition=condition)])
    one, other = tables.paired(*arms, tables.DICE)
    assert (other - one).tolist() == [[pytest.approx((0.1 + 0.4) / 2)]]
    one, other = tables.paired(arms[0], arms[1][:1], tables.DICE)    # the bias field is missing in one arm
    assert (other - one).tolist() == [[pytest.approx(0.1)]]


def test_a_seed_without_a_case_leaves_a_gap():
    values = tables.grid({("0", "a"): 1.0, ("0", "b", "x"): 2.0, ("0", "b", "y"): 4.0, ("1", "b"): 5.0})
    assert np.array_equal(values, [[1, 3], [np.nan, 5]], equal_nan=True)


# ---- ranks ------------------------------------------------------------------------------------------------------------


def map_rows(case, confidences, dices, voxels):
    return [{"seed": "0", "case": case, "confidence": str(c), "dice": str(d), "voxels": str(v)}
            for c, d, v in zip(confidences, dices, voxels)]


def test_ranks_of_maps_by_hand():
    rows = map_rows("ties", (0.6, 0.7, 0.8, 0.9, "nan"), (0.5, 0.5, 0.7, 0.9, 1.0), (10, 10, 10, 30, 0))    # the last map is empty
    rows += map_rows("reversed", (0.9, 0.8, 0.7), (0.1, 0.2, 0.3), (5, 5, 5))
    rows += map_rows("one Dice", (0.9, 0.8, 0.7), (0.0, 0.0, 0.0), (5, 5, 5)) + map_rows("two maps", (0.9, 0.8), (0.1, 0.2), (5, 5))
    ranked = tables.rank_maps(rows)
    # Dice's ranks 1.5, 1.5, 3, 4 about their mean: -1, -1, 0.5, 1.5; confidence's: -1.5, -0.5, 0.5, 1.5. 4.5 / sqrt(4.5 * 5)
    assert ranked == {("0", "ties"): (pytest.approx(4.5 / 22.5**0.5), 1, pytest.approx(75**0.5 / 15)),
                      ("0", "reversed"): (pytest.approx(-1), 0, 0)}


def test_thirds_go_from_equal_sizes_to_unequal_ones():
    ranked = {("0", str(i)): (0.0, 1.0, (i * 3) % 7) for i in range(7)}    # spreads 0 3 6 2 5 1 4
    assert [[int(case) for _, case in third] for third in tables.thirds(ranked)] == [[0, 5], [3, 1], [6, 4, 2]]


# ---- the study --------------------------------------------------------------------------------------------------------


def study(folder, effect, seeds=2):
    """scores.csv of a study in which the term adds `effect` to every Dice of every case."""
    rng = np.random.default_rng(4)
    columns = ("c_diagonal", "c_off_diagonal", "z_diagonal", "z_off_diagonal", "effective_rank")
    rows = []
    for seed, case, condition in [(s, c, k) for s in range(seeds) for c in "abc" for k in tables.CONDITIONS]:
        base = dict(zip(tables.DICE + tables.HD95, [*rng.uniform(0.2, 0.8, 3), *rng.uniform(1, 9, 3)]))
        for arm in ("without", "with"):
            shifted = {key: value + (effect if arm == "with" and key in tables.DICE else 0) for key, value in base.items()}
            rows.append({"cohort": "BraTS", "cases": 10, "arm": arm, "seed": seed, "fold": -1, "condition": condition, "case": case,
                         **shifted, **dict.fromkeys(columns, 1.0 if condition == "as trained" else "")})
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("effect, words", [(0.125, "helps on perturbed"), (-0.125, "harms on perturbed"), (0, "makes no difference that")])
def test_the_command_says_what_the_scores_say(run, tmp_path, effect, words):
    study(tmp_path, effect)
    output = run("benchmarks/tables.py", tmp_path, ok=0).stdout
    assert words in output
    assert output.count(f"{effect:+.4f} [{effect:+.4f}, {effect:+.4f}]") == 7    # four conditions, and three ways to pool them
    assert output.count("| 2 x 3 |") == 7 + 2 + 2    # two arms among the secondary ones, two in the table of features


def test_a_folder_without_scores_is_named(run, tmp_path):
    process = run("benchmarks/tables.py", tmp_path, ok=2)
    assert process.stderr.count("\n") == 1 and str(tmp_path) in process.stderr and "scores.csv" in process.stderr


def test_results_are_what_the_committed_csvs_say():
    text = RESULTS.read_text(encoding="utf-8")
    made = tables.all_tables(REPO / "benchmarks" / "results")
    assert sorted(re.findall(r"<!-- table: (.+?) -->", text)) == sorted(made)    # every table is there, once
    assert tables.fill(text, made) == text
    assert tables.fill(text.replace("| 0.", "| 9."), made) == text


# ---- the study itself -----------------------------------------------------------------------------------------------


def test_the_whole_study_in_miniature_prints_every_table_and_is_not_done_twice(run, tmp_path):
    import ablation
    import torch

    done = run("benchmarks/ablation.py", "--quick", "--out", tmp_path, ok=0)
    assert "29 networks, 29 to do" in done.stdout
    for name in tables.all_tables(tmp_path):
        assert f"\n{name}\n" in done.stdout
    # a row against the saved network, predicted and scored anew
    (found,) = tables.of(tables.read(tmp_path, "scores"), cohort="hard", cases="4", arm="with", seed="1", condition="as trained", case="BraTS2021_00007")
    model = ablation.SegResNet(filters=8)
    model.load_state_dict(torch.load(tmp_path / "models" / "hard-4-with-seed_1.pt", weights_only=True)["model"])
    (case,) = [case for case in ablation.find_cases(tmp_path / "cohorts" / "hard") if case.name == found["case"]]
    image, truth, _ = ablation.load_case(case)
    precision = ablation.choose_precision("auto", torch.device("cpu"))
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        probabilities = ablation.predict(model.eval(), ablation.normalize(image), (32, 32, 24))
    painted = ablation.labels_to_regions(ablation.regions_to_labels(probabilities > 0.5))
    assert [float(found[column]) for column in tables.DICE] == pytest.approx([ablation.dice(p, t) for p, t in zip(painted, truth)], abs=1e-4)
    again = run("benchmarks/ablation.py", "--quick", "--out", tmp_path, ok=0)
    assert "29 networks, 0 to do" in again.stdout and again.stdout.split("the term", 1)[1] == done.stdout.split("the term", 1)[1]


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


# ---- the figures ------------------------------------------------------------------------------------------------------


def test_the_healthy_half_is_the_one_without_the_tumour(cohort, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures
    monkeypatch.setattr(figures.phantom, "P_LOOKALIKE", 1.0)
    for case in figures.find_cases(cohort):
        image, target, _ = figures.load_case(case)
        half, brain, tumour = figures.healthy_half(case, image).numpy(), image.any(0).numpy(), target[2].bool().numpy()
        assert 0.45 < (half & brain).sum() / brain.sum() < 0.55
        assert (half & tumour).sum() < 0.05 * tumour.sum()
    monkeypatch.setattr(figures.phantom, "P_LOOKALIKE", 0.0)
    assert figures.healthy_half(case, image) is None


def test_the_readmes_figures_of_the_ablation_are_in_its_tables():
    text = (REPO / "README.md").read_text()
    block = text[text.index("**The ablation that the paper lacks**"):text.index("**The quick start**")]
    figures = re.findall(r"[+-]0\.\d+ \[[^\]]+\]", block) + re.findall(r"[+]0\.\d\d(?= \()", block)
    told = "\n".join(tables.all_tables(RESULTS.parent / "results").values())
    assert len(figures) > 6 and not [figure for figure in figures if figure not in told.replace(" (95 % interval ", " [")
                                     .replace(" to +", ", +").replace(" to -", ", -").replace(";", "]")]
