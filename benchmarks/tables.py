"""The ablation's answers: every figure of RESULTS.md and of README's results, out of the CSVs in results/.

    python benchmarks/tables.py                  # all tables of the three committed studies
    python benchmarks/tables.py runs/ablation    # of another study, as ablation.py left it
    python benchmarks/tables.py --write          # into RESULTS.md and README.md, between their markers

A difference is paired: the same seed, so the same first weights, crops and views, and the same held-out
case. What only one arm has, in a study that was interrupted, is left out. An interval is a 95 % percentile
bootstrap over seeds and cases at once: both are drawn anew, with replacement, 10,000 times.
"""

import argparse
import csv
import gzip
import re
import textwrap
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
PAGES = HERE / "RESULTS.md", HERE.parent / "README.md"
COMMITTED = {"patients, 4 mm": "real_4mm", "patients, 2 mm": "real_2mm", "phantoms": "phantom"}
REGIONS = ("ET", "TC", "WT")
DICE, HD95 = ([f"{measure}_{region.lower()}" for region in REGIONS] for measure in ("dice", "hd95"))
PERTURBED = ("bias field", "contrast", "noise")
SINGLES = tuple(f"single {i}" for i in range(5))
CONDITIONS = ("as trained", *PERTURBED)
POOLED = {"unperturbed": "as trained", "perturbed": PERTURBED, "all four": CONDITIONS}


# ---- rows --------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """The rows of a study's CSVs, dicts of strings."""

    name: str
    cases: int          # all of them, trained on or held out
    scores: list        # a row a network and held-out case; the folds' networks are in the next two
    maps: list          # a row a map and region
    ensembles: list     # a row a case, region and way to merge


def read(path):
    """A CSV, gzipped or not -> its rows."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def load(pattern, name="cases"):
    """pattern: the path of the three CSVs, with a * for scores, maps, ensembles"""
    paths = (Path(str(pattern).replace("*", what)) for what in ("scores", "maps", "ensembles"))
    scores, maps, ensembles = map(read, paths)
    return Study(name, len({row["case"] for row in scores}), of(scores, fold="-1"), maps, ensembles)


def load_committed():
    return [load(HERE / "results" / f"{files}_*.csv.gz", name) for name, files in COMMITTED.items()]


def of(rows, **wanted):
    """The rows with these values; a tuple names several."""
    wanted = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return [row for row in rows if all(row[key] in values for key, values in wanted.items())]


def grid(values):
    """{(seed, case, ...): value} -> (seeds, cases): means over what shares the two, NaN for a gap."""
    seeds, cases = (sorted({key[i] for key in values}) for i in range(2))
    found = {}
    for (seed, case, *_), value in values.items():
        found.setdefault((seed, case), []).append(value)
    return np.array([[np.mean(found.get((seed, case), np.nan)) for case in cases] for seed in seeds])


def paired(one, other, columns):
    """The rows of two arms -> (2, seeds, cases): the mean over `columns`, out of what both arms have."""
    arms = {}, {}
    for arm, rows in zip(arms, (one, other)):
        for row in rows:
            tested = (row.get(name) for name in ("cohort", "cases", "condition", "region"))
            value = sum(float(row[column]) for column in columns) / len(columns)
            arm.setdefault((row["seed"], row["case"], *tested), []).append(value)
    shared = arms[0].keys() & arms[1].keys()
    return np.stack([grid({key: np.mean(arm[key]) for key in shared}) for arm in arms])


def interval(values, draws=10_000):
    """(seeds, cases), NaN where unknown -> its mean, and both ends of the mean's 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    seeds, cases = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in values.shape)    # (draws, n)
    known = ~np.isnan(values)
    total, number = (((seeds @ array) * cases).sum(1) for array in (np.where(known, values, 0.0), known))
    return np.nanmean(values), *np.percentile((total / np.maximum(number, 1))[number > 0], (2.5, 97.5))


# ---- what is asked of a study ------------------------------------------------------------------------------


def term(study, columns=DICE, arms=("without", "with"), condition="as trained"):
    """-> (2, seeds, cases): two arms' networks on the held-out cases."""
    return paired(*(of(study.scores, arm=arm, condition=condition) for arm in arms), columns)


def merged(study, way="top N/2 by confidence", maps="5 maps"):
    """-> (2, seeds, cases): Dice of ET, TC, WT of the maps' plain mean, and of another way to merge them."""
    return paired(*(of(study.ensembles, maps=maps, way=name) for name in ("mean", way)), ["dice"])


def where_varied(study):
    """The study with the scores of those cohorts, training cases and seeds that have the term's variants."""
    which = itemgetter("cohort", "cases", "seed")
    varied = {which(row) for row in study.scores if row["arm"] not in ("without", "with")}
    return study._replace(scores=[row for row in study.scores if which(row) in varied])


def maps_of(study, region, flips="0"):
    """-> {(seed, case): (4, maps)}: confidence (NaN of an empty map), Dice, voxels, true voxels"""
    groups = {}
    for row in of(study.maps, region=region, flip=tuple(flips)):
        values = [float(row[name]) for name in ("confidence", "dice", "voxels", "truth")]
        groups.setdefault((row["seed"], row["case"]), []).append(values)
    return {key: np.array(values).T for key, values in groups.items()}


def spearman(one, other):
    """Of what both know; NaN for fewer than three pairs, or where either side is one value."""
    known = ~np.isnan(one + other)
    one, other = one[known], other[known]
    return stats.spearmanr(one, other).statistic if len(one) > 2 and np.ptp(one) and np.ptp(other) else np.nan


def ranks(groups, one=0, other=1):
    """Spearman's rho of two rows over each case's maps -> {(seed, case): rho}, where there is one."""
    rhos = {key: spearman(values[one], values[other]) for key, values in groups.items()}
    return {key: rho for key, rho in rhos.items() if not np.isnan(rho)}


def usual(groups):
    """-> {seed: (4, networks)}, each network's means over the cases."""
    seeds = dict.fromkeys(seed for seed, _ in groups)
    return {seed: np.nanmean([groups[key] for key in groups if key[0] == seed], 0) for seed in seeds}


def without_usual(groups):
    """The maps, less their network's means over the cases: its usual confidence, its usual Dice."""
    level = usual(groups)
    return {key: values - level[key[0]] for key, values in groups.items()}


# ---- Markdown ----------------------------------------------------------------------------------------------


def signed(values, digits=4):
    """'mean [its interval]'; nothing, where the study has none."""
    return "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*interval(values), n=digits) if values.size else ""


def change(pair, digits=4):
    return signed(pair[1] - pair[0], digits)


def from_to(pair, digits=4):
    """'one to other: difference [its interval]'"""
    return "{:.{n}f} to {:.{n}f}: ".format(*np.nanmean(pair, (1, 2)), n=digits) + change(pair, digits)


def spread(values, digits):
    """'median (lowest tenth to highest tenth)'; 'none' where no case has what is asked."""
    if not len(values):
        return "none"
    return "{1:.{n}f} ({0:.{n}f} to {2:.{n}f})".format(*np.percentile(values, (10, 50, 90)), n=digits)


def table(head, rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def side_by_side(studies, first, answer):
    """A column a study, and a row a question. answer(study): {question: answer, '' where nothing was run}"""
    columns = [answer(study) for study in studies]
    rows = [[question, *(column[question] or "not run" for column in columns)] for question in columns[0]]
    return table([first, *(study.name for study in studies)], rows)


def sentence(studies, what, pairs):
    """'On 56 patients ...': what was found, each study's interval, and what the intervals allow to say."""
    found, words = [], {}
    for study, pair in zip(studies, pairs):
        _, low, high = interval(pair[1] - pair[0])
        seeds = f"{pair.shape[1]} seed{'s' * (pair.shape[1] > 1)}"
        few = f", as far as {seeds} tell" * (pair.shape[1] < 3)
        words[f"better{few}" if low > 0 else f"worse{few}" if high < 0 else "not shown"] = None
        scale = "".join(f"{scale}, " for scale in study.name.split(", ")[1:])
        found.append(f"{change(pair)} ({scale}{seeds})")
    who = "phantoms" if study.name == "phantoms" else f"{study.cases} {study.name.split(', ')[0]}"
    text = f"On {who}, {pair.shape[2]} held out, {what} changes mean Dice by {' and '.join(found)}: "
    return textwrap.fill(f"- {text}{', '.join(words)}.", 110, subsequent_indent="  ", break_on_hyphens=False)


def in_short(studies):
    """The paper's two claims, of patients and of phantoms, and of patients what the term consists of."""
    phantoms = [study for study in studies if study.name == "phantoms"]
    patients = [study for study in studies if study.name != "phantoms"]
    varied = [study for study in patients if where_varied(study).scores]
    lines = [(these, "the Barlow Twins term", map(term, these)) for these in (patients, phantoms)]
    lines += [(these, "merging five maps by confidence, not by their mean,", map(merged, these))
              for these in (patients, phantoms)]
    lines += [(varied, "the term at weight 1, the sum read literally,",
               [term(study, arms=("without", "weight 1")) for study in varied]),
              (varied, "dropping its redundancy half (lambda 0)",
               [term(study, arms=("with", "lambda 0")) for study in varied])]
    return "\n".join(sentence(*line) for line in lines if line[0])


def alone(pair):
    """The interval, were seeds alone to vary; were cases alone."""
    means = (np.nanmean(pair[1] - pair[0], axis, keepdims=True) for axis in (1, 0))
    return "; ".join(signed(values).split(" ", 1)[1] for values in means)


def answers(study):
    pair = term(study)
    return {
        "the term at 1/dim, unperturbed": from_to(pair),
        "its difference by seed": ", ".join(f"{x:+.3f}" for x in np.nanmean(pair[1] - pair[0], 1)),
        "the first two seeds alone": change(pair[:, :2]),
        "the interval by seeds alone; by cases alone": alone(pair),
        "the term, perturbed": from_to(term(study, condition=PERTURBED)),
        "top N/2 of 5 maps to their mean": from_to(merged(study)),
        "the network that validates best to that mean": from_to(merged(study, "best single")),
        "top N/2 of 40 maps to their mean": from_to(merged(study, maps="40 maps")),
        "effective rank of the features, of 8": from_to(term(study, ["effective_rank"]), 2)}


def terms(studies, condition):
    """The term in every cohort, with every number of training cases."""
    lines = []
    for study in studies:
        rows = of(study.scores, condition=condition)
        for cohort, cases in dict.fromkeys((row["cohort"], row["cases"]) for row in of(rows, arm="with")):
            arms = [of(rows, cohort=cohort, cases=cases, arm=arm) for arm in ("without", "with")]
            regions = [change(paired(*arms, [column]), 3) for column in DICE]
            hd95 = change(paired(*arms, HD95), 1)
            lines.append([study.name, cohort, cases, from_to(paired(*arms, DICE)), *regions, hd95])
    return table(["study", "cohort", "to train on", "mean Dice", *REGIONS, "mean HD95, mm"], lines)


def variants(studies, condition="as trained", columns=DICE):
    """The term and its variants, beside the term and beside its absence, in the studies that have them."""
    studies = [study for study in map(where_varied, studies) if study.scores]
    beside = [(study, other) for study in studies for other in ("with", "without")]
    names = dict.fromkeys(row["arm"] for study in studies for row in study.scores if row["arm"] != "without")
    rows = [[name, *(change(term(study, columns, (other, name), condition)) if name != other else ""
                     for study, other in beside)] for name in names]
    return table(["arm", *(f"{study.name}: to *{other}*" for study, other in beside)], rows)


def ensembles(study):
    """Ways to merge the maps, each to the maps' plain mean."""
    ways = {way: way for way in ("top N/2 by confidence", "weighted by confidence", "geometric mean")}
    ways |= {"the network that validates best": "best single", "a network alone, on average": SINGLES}
    return {f"{maps}: {name}": change(merged(study, way, maps))
            for maps in ("5 maps", "5 maps, flips averaged", "40 maps") for name, way in ways.items()}


def rho(groups):
    return signed(grid(ranks(groups)), 2)


def usual_rho(groups):
    """Is the network that is usually confident usually good? rho over a seed's networks, mean over seeds."""
    return f"{np.mean([spearman(*network[:2]) for network in usual(groups).values()]):+.2f}"


def about_maps(groups):
    """What a region's maps of a case are like, and what goes with how confidence ranks them."""
    _, dice, voxels, truth = zip(*groups.values())
    sizes = [np.median(painted) / true[0] for painted, true in zip(voxels, truth) if true[0]]
    return {
        "rho of confidence and Dice": rho(groups),
        "rho, each network's usual level taken off": rho(without_usual(groups)),
        "rho of usual confidence and usual Dice": usual_rho(groups),
        "rho of confidence and size": f"{np.mean([*ranks(groups, 0, 2).values()]):+.2f}",
        "sd of Dice": f"{np.mean([values.std() for values in dice]):.3f}",
        "sd of size / size": f"{np.mean([values.std() / values.mean() for values in voxels]):.2f}",
        "voxels predicted / true": spread(sizes, 1)}


def rankings(study):
    et, _, wt = five = [maps_of(study, region) for region in REGIONS]
    forty = (maps_of(study, region, "01234567") for region in REGIONS)
    abouts = [about_maps(groups) for groups in five]
    found = {question: "; ".join(about[question] for about in abouts) for question in abouts[0]}
    share = spread([et[key][3, 0] / wt[key][3, 0] for key in et], 2)
    enhances = {case: values[3, 0] > 0 for (_, case), values in et.items()}
    none = len(enhances) - sum(enhances.values())
    return found | {"ET's share of WT in truth": f"{share}; none in {none} of {len(enhances)}",
                    "rho of confidence and Dice of 40 maps": "; ".join(map(rho, forty))}


# ---- the command -------------------------------------------------------------------------------------------


def all_tables(studies):
    """-> {name: Markdown}"""
    tables = {"in short": in_short(studies),
              "answers": side_by_side(studies, "mean Dice, but for the last row", answers),
              "ensembles": side_by_side(studies, "to the plain mean", ensembles),
              "rankings": side_by_side(studies, "five maps of a case: ET; TC; WT", rankings)}
    for name, condition in POOLED.items():
        tables[f"variants, {name}"] = variants(studies, condition)
    tables["variants, effective rank"] = variants(studies, columns=["effective_rank"])
    conditions = POOLED | {name: name for name in PERTURBED}
    return tables | {f"term, {name}": terms(studies, condition) for name, condition in conditions.items()}


def print_all(studies):
    for name, content in all_tables(studies).items():
        print(f"\n{name}\n\n{content}", flush=True)


def fill(text, tables):
    """A page's text with what stands between <!-- table: name --> and <!-- end --> made anew."""
    blocks = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return blocks.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where ablation.py left its three CSVs")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md and README.md instead")
    args = parser.parse_args()
    try:
        studies = [load(args.folder / "*.csv")] if args.folder else load_committed()
    except OSError as error:
        parser.error(f"{error}: ablation.py writes it as it ends")
    if not args.write:
        return print_all(studies)
    tables = all_tables(studies)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
