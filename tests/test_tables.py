"""The ablation's intervals against a loop and a closed form, pairs and ranks by hand, pages against CSVs."""

import itertools
import re
import sys

import numpy as np
import pytest

from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import tables  # noqa: E402

RESULTS, README = (page.read_text(encoding="utf-8") for page in tables.PAGES)


def looped(values, draws=4000):
    """The bootstrap as one would say it: draw seeds, draw cases, take the mean of what is known."""
    rng = np.random.default_rng(7)
    drawn = ([rng.integers(n, size=n) for n in values.shape] for _ in range(draws))
    return np.percentile([np.nanmean(values[np.ix_(*which)]) for which in drawn], (2.5, 97.5))


def test_interval_with_gaps_is_that_of_a_plain_loop():
    rng = np.random.default_rng(1)
    values = 0.3 * rng.standard_normal((5, 1)) + rng.standard_normal((1, 40)) + rng.standard_normal((5, 40))
    values.flat[rng.choice(200, 30, replace=False)] = np.nan
    mean, low, high = tables.interval(values)
    assert mean == pytest.approx(np.nanmean(values))
    assert (low, high) == pytest.approx(looped(values), abs=0.05 * (high - low))


def test_interval_of_seeds_plus_cases_has_the_closed_form():
    # x = a + b: the mean of a draw has the variance var(a) / seeds + var(b) / cases, and is nearly normal
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((60, 1)), 2 * rng.standard_normal((1, 50))
    sd = np.sqrt(a.var() / 60 + b.var() / 50)
    mean, low, high = tables.interval(a + b)
    assert (low - mean, high - mean) == pytest.approx((-1.96 * sd, 1.96 * sd), abs=0.06 * sd)


def rows_of(values, **constant):
    """{(seed, case): Dice} -> rows of scores.csv and of ensembles.csv, the same Dice for every region"""
    return [{"seed": seed, "case": case, **constant, **dict.fromkeys([*tables.DICE, "dice"], str(value))}
            for (seed, case), value in values.items()]


def scores_of(arms):
    """{arm: {(seed, case): Dice}} -> rows of scores.csv"""
    about = {"cohort": "real", "cases": "40", "condition": "as trained"}
    return [row for arm, values in arms.items() for row in rows_of(values, arm=arm, **about)]


def test_what_both_arms_have_is_paired_before_it_is_averaged():
    noise, contrast = {"cohort": "easy", "condition": "noise"}, {"cohort": "easy", "condition": "contrast"}
    without = rows_of({("0", "a"): 0.5, ("0", "b"): 0.7, ("1", "b"): 0.1, ("3", "a"): 0.1}, **noise)
    with_term = rows_of({("0", "a"): 0.6, ("0", "b"): 0.6, ("1", "b"): 0.4, ("2", "a"): 0.2}, **noise)
    without += rows_of({("0", "a"): 0.3, ("0", "b"): 0.9}, **contrast)
    with_term += rows_of({("0", "a"): 0.8}, **contrast)    # and of b none
    without += rows_of({("0", "a"): 0.9}, cohort="hard", condition="noise")    # its partner was never trained
    pair = tables.paired(without, with_term, tables.DICE)
    expected = np.array([[[0.4, 0.7], [np.nan, 0.1]], [[0.7, 0.6], [np.nan, 0.4]]])
    assert pair == pytest.approx(expected, nan_ok=True)


def test_variants_stand_beside_the_term_of_their_own_seeds():
    trained = {"without": {("0", "a"): 0.25, ("1", "a"): 0.25}, "with": {("0", "a"): 0.5, ("1", "a"): 0.9},
               "weight 1": {("0", "a"): 0.75}}    # seed 1 has no variants
    study = tables.Study("", 1, scores_of(trained), [], [])
    *_, with_term, weight = tables.variants([study]).splitlines()
    assert re.findall(r"(\S+) \[", with_term) == ["+0.2500"]
    assert re.findall(r"(\S+) \[", weight) == ["+0.2500", "+0.5000"]


def test_ranks_of_maps_by_hand():
    groups = {"ties": [[0.6, 0.7, 0.8, 0.9, np.nan], [0.5, 0.5, 0.7, 0.9, 1.0]],    # and an empty map
              "reversed": [[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]],
              "one Dice": [[0.9, 0.8, 0.7], [0.0, 0.0, 0.0]], "two maps": [[0.9, 0.8], [0.1, 0.2]]}
    # ranks less their mean: confidence's -1.5, -0.5, 0.5, 1.5, Dice's -1, -1, 0.5, 1.5: 4.5 / sqrt(5 * 4.5)
    assert tables.ranks({case: np.array(maps) for case, maps in groups.items()}) == pytest.approx(
        {"ties": 4.5 / 22.5**0.5, "reversed": -1})


def test_a_networks_level_hides_how_it_ranks_cases():
    # confidence follows Dice from case to case, but the networks that are usually surer are usually worse
    about = {"a": [0, 1, 2], "b": [1, 2, 0], "c": [2, 0, 1]}
    groups = {("0", case): np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]]) + 0.01 * np.array(shift)
              for case, shift in about.items()}
    assert list(tables.ranks(groups).values()) == pytest.approx([-1, -1, -1])
    assert list(tables.ranks(tables.without_usual(groups)).values()) == pytest.approx([1, 1, 1])
    assert tables.usual_rho(groups) == "-1.00"


WORDS = {0.125: "better, as far as 2 seeds tell", -0.125: "worse, as far as 2 seeds tell", 0: "not shown"}


@pytest.mark.parametrize("effect, words", WORDS.items())
def test_the_sentences_say_what_the_scores_say(effect, words):
    values = {(seed, case): i / 8 for i, (seed, case) in enumerate(itertools.product("01", "abc"))}
    changed = {key: value + effect for key, value in values.items()}
    merged = rows_of(values, way="mean", maps="5 maps")
    merged += rows_of(changed, way="top N/2 by confidence", maps="5 maps")
    study = tables.Study("cases", 3, scores_of({"without": values, "with": changed}), [], merged)
    found, number = " ".join(tables.in_short([study]).split()), f"{effect:+.4f}"
    assert found.count(f"changes mean Dice by {number} [{number}, {number}] (2 seeds): {words}.") == 2


def test_a_folder_without_scores_is_named(call, tmp_path):
    assert str(tmp_path / "scores.csv") in call("tables.py", tmp_path, ok=2)[2].splitlines()[-1]


@pytest.fixture(scope="module")
def made():
    return tables.all_tables(tables.load_committed())


@pytest.mark.parametrize("page", [RESULTS, README], ids=["RESULTS.md", "README.md"])
def test_a_page_says_what_the_committed_csvs_say(page, made):
    emptied = re.sub(r"(<!-- table: .+? -->\n).*?<!-- end -->", r"\g<1><!-- end -->", page, flags=re.DOTALL)
    assert tables.fill(emptied, made) == page
    intervals = re.findall(r"[+-]\d+\.\d+ \[[^]]+\]", page)    # inside the blocks or not
    everything = " ".join("\n".join(made.values()).split())
    assert len(intervals) >= 6 and all(" ".join(interval.split()) in everything for interval in intervals)


def test_each_claim_has_its_two_sentences():
    sentences = re.findall(r"\n- (On 56 patients|On phantoms), .*?\[[-+.\d\s,]+\]", RESULTS, re.DOTALL)
    assert sentences == [*2 * ["On 56 patients", "On phantoms"], "On 56 patients", "On 56 patients"]


def test_numbers_in_the_prose_of_results_are_settings():
    prose = RESULTS[: RESULTS.index("## Method")]
    prose = re.sub(r"<!-- table.*?<!-- end -->", "", prose, flags=re.DOTALL)
    prose = re.sub(r"section\s3\.[12]|[24] mm|95 %|1/dim|N/2|HD95|weight 1\b|lambda 0\b", "", prose)
    assert not re.findall(r".*\d.*", prose)
