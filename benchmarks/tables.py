"""The ablation's tables and conclusions, out of its CSVs.

    python benchmarks/tables.py                            # of the study in benchmarks/results, committed
    python benchmarks/tables.py runs/ablation              # of another, as ablation.py left it
    python benchmarks/tables.py --write                    # puts them into RESULTS.md, between its markers

A difference is paired: the same seed, so the same first weights, crops and views, and the same held-out case. Its interval is a 95 %
percentile bootstrap over seeds and cases at once: both are drawn anew with replacement, 10,000 times.
"""

import argparse
import csv
import gzip
import re
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
REGIONS = ("ET", "TC", "WT")
DICE = [f"dice_{region.lower()}" for region in REGIONS]
HD95 = [f"hd95_{region.lower()}" for region in REGIONS]
PERTURBED = ("bias field", "contrast", "noise")
CONDITIONS = ("as trained", *PERTURBED)


def read(folder, name):
    """FOLDER/<name>.csv or .csv.gz -> rows as dicts of strings."""
    path = folder / f"{name}.csv"
    with open(path, newline="") if path.exists() else gzip.open(folder / f"{name}.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


def matrix(rows, columns):
    """The mean of `columns` by seed and case -> {(seed, case): value}; rows of one seed and case, such as conditions, are averaged."""
    values = {}
    for row in rows:
        values.setdefault((row["seed"], row["case"]), []).append(np.mean([float(row[column]) for column in columns]))
    return {key: np.mean(value) for key, value in values.items()}


def paired(one, other):
    """Two of `matrix`'s -> other - one (seeds, cases), over the seeds and cases that both have."""
    keys = one.keys() & other.keys()
    seeds, cases = sorted({seed for seed, _ in keys}), sorted({case for _, case in keys})
    return np.array([[other[seed, case] - one[seed, case] for case in cases] for seed in seeds])


def interval(differences, draws=10_000):
    """(seeds, cases) -> mean, and the ends of its 95 % bootstrap interval, seeds and cases drawn anew with replacement."""
    rng = np.random.default_rng(0)
    seeds, cases = differences.shape
    times_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds    # (draws, seeds): how often each was drawn
    times_case = rng.multinomial(cases, np.full(cases, 1 / cases), draws) / cases
    means = ((times_seed @ differences) * times_case).sum(1)
    return differences.mean(), *np.percentile(means, (2.5, 97.5))


def signed(differences, digits=4):
    mean, low, high = interval(differences)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def of(rows, **wanted):
    return [row for row in rows if all(row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items())]


def settings_of(scores):
    """The primary comparison's (cohort, cases), in the order of the study; the secondary one's is the last."""
    return list(dict.fromkeys((row["cohort"], row["cases"]) for row in of(scores, arm="without", fold="-1")))


# ---- the tables -------------------------------------------------------------------------------------------------------


def primary(scores):
    rows = []
    for cohort, cases in settings_of(scores):
        for condition in CONDITIONS:
            without, with_term = (of(scores, cohort=cohort, cases=cases, condition=condition, arm=arm, fold="-1") for arm in ("without", "with"))
            by_region = [signed(paired(matrix(without, [c]), matrix(with_term, [c])), 3) for c in DICE]
            d = paired(matrix(without, DICE), matrix(with_term, DICE))
            means = [f"{np.mean(list(matrix(arm, DICE).values())):.4f}" for arm in (without, with_term)]
            rows.append([cohort, cases, condition, *means, f"**{signed(d)}**", f"{(d.mean(1) > 0).sum()} of {len(d)}", *by_region])
    head = ["cohort", "training cases", "tested", "without", "with", "difference [95 %]", "seeds better", "ET", "TC", "WT"]
    return table(head, rows)


def primary_hd95(scores):
    rows = []
    for cohort, cases in settings_of(scores):
        for name, conditions in (("as trained", ("as trained",)), ("perturbed, all three", PERTURBED)):
            without, with_term = (of(scores, cohort=cohort, cases=cases, condition=conditions, arm=arm, fold="-1") for arm in ("without", "with"))
            cells = [f"{np.mean(list(matrix(without, [c]).values())):.2f}, {signed(paired(matrix(without, [c]), matrix(with_term, [c])), 2)}"
                     for c in HD95]
            rows.append([cohort, cases, name, *cells])
    return table(["cohort", "training cases", "tested", *(f"{region}: without, difference [95 %]" for region in REGIONS)], rows)


def pooled(scores, conditions):
    """The difference of the term, mean over regions, settings and `conditions` -> (seeds, cases)"""
    arms = [matrix(of(scores, condition=conditions, arm=arm, fold="-1", cases=tuple({c for _, c in settings_of(scores)})), DICE)
            for arm in ("without", "with")]
    return paired(*arms)


def secondary(scores):
    cohort, cases = settings_of(scores)[-1]
    here = of(scores, cohort=cohort, cases=cases, fold="-1")
    arms = list(dict.fromkeys(row["arm"] for row in here))
    others = [arm for arm in arms if arm not in ("without", "with")]
    seeds = tuple({row["seed"] for row in here if row["arm"] == others[0]}) if others else ()
    rows = []
    for arm in ("without", "with", *others):
        cells = []
        for conditions in (("as trained",), PERTURBED):
            mine, without, with_term = (matrix(of(here, arm=a, condition=conditions, seed=seeds), DICE) for a in (arm, "without", "with"))
            cells += [f"{np.mean(list(mine.values())):.4f}", *("" if a == arm else signed(paired(other, mine), 3)
                                                              for a, other in (("without", without), ("with", with_term)))]
        rows.append([arm, *cells])
    return table(["arm", "as trained", "to without [95 %]", "to with [95 %]", "perturbed", "to without [95 %]", "to with [95 %]"], rows)


WAYS = ("single, mean of five", "best single", "mean", "geometric mean", "top N/2 by confidence", "weighted by confidence")


def ensemble_matrix(ensembles, maps, way, regions=REGIONS):
    ways = tuple(f"single {i}" for i in range(5)) if way == WAYS[0] else (way,)
    return matrix(of(ensembles, maps=maps, way=ways, region=tuple(regions)), ["dice"])


def ensemble(ensembles):
    rows = []
    for maps in dict.fromkeys(row["maps"] for row in ensembles):
        plain = ensemble_matrix(ensembles, maps, "mean")
        for way in WAYS:
            mine = ensemble_matrix(ensembles, maps, way)
            if mine:
                regions = [f"{np.mean(list(ensemble_matrix(ensembles, maps, way, [region]).values())):.4f}" for region in REGIONS]
                rows.append([maps, way, *regions, f"{np.mean(list(mine.values())):.4f}", "" if way == "mean" else signed(paired(plain, mine))])
    return table(["maps", "merged by", *REGIONS, "mean", "to the plain mean [95 %]"], rows)


def correlations(maps, region, flips, disagreement=None):
    """Spearman's rho between the confidence and the true Dice of a case's maps, and whether the most confident is the best one.

    -> {(seed, case): rho}, {(seed, case): 1 or 0}. Left out: maps without a voxel, cases with fewer than three others or of one Dice for all.
    disagreement: (0, 1), (1, 2) or (2, 3): the first, second or last third of the cases by the spread of the maps' sizes (sd / mean).
    """
    groups = {}
    for row in of(maps, region=region, flip=flips):
        if int(row["voxels"]):
            groups.setdefault((row["seed"], row["case"]), []).append((float(row["confidence"]), float(row["dice"]), int(row["voxels"])))
    groups = {key: np.array(value).T for key, value in groups.items() if len(value) > 2}
    groups = {key: value for key, value in groups.items() if np.ptp(value[1]) > 0 and np.ptp(value[0]) > 0}
    order = sorted(groups, key=lambda key: groups[key][2].std() / groups[key][2].mean())
    if disagreement:
        order = order[len(order) * disagreement[0] // 3 : len(order) * disagreement[1] // 3]
    rho = {key: stats.spearmanr(groups[key][0], groups[key][1]).statistic for key in order}
    return rho, {key: float(groups[key][1][groups[key][0].argmax()] == groups[key][1].max()) for key in order}


def bootstrap_mean(values, draws=10_000):
    """Of unpaired values, such as correlations by case, which not every seed has: mean and 95 % interval over all of them."""
    values = np.array(list(values))
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return f"{values.mean():+.3f} [{np.percentile(means, 2.5):+.3f}, {np.percentile(means, 97.5):+.3f}]"


def ranking(maps):
    rows = []
    every = tuple(str(i) for i in range(8))
    for region in REGIONS:
        within, best = correlations(maps, region, ("0",))
        among = correlations(maps, region, every)[0]
        thirds = [bootstrap_mean(correlations(maps, region, ("0",), (i, i + 1))[0].values()) for i in range(3)]
        whole = [row for row in of(maps, region=region, flip="0") if int(row["voxels"])]
        across = stats.spearmanr([float(row["confidence"]) for row in whole], [float(row["dice"]) for row in whole]).statistic
        empty = sum(not int(row["voxels"]) for row in of(maps, region=region, flip="0"))
        rows.append([region, bootstrap_mean(within.values()), f"{np.mean(list(best.values())):.2f}", bootstrap_mean(among.values()), *thirds,
                     f"{across:+.3f}", f"{len(within)}, {empty}"])
    head = ["region", "5 maps of a case: rho [95 %]", "most confident is best", "40 maps: rho [95 %]", "sizes agree best", "middle", "least",
            "across cases", "cases, empty maps"]
    return table(head, rows)


def features(scores):
    names = {"c_diagonal": "diagonal of C", "c_off_diagonal": "off the diagonal", "effective_rank": "effective rank"}
    rows = []
    for cohort, cases in settings_of(scores):
        here = of(scores, cohort=cohort, cases=cases, condition="as trained", fold="-1")
        for arm in dict.fromkeys(row["arm"] for row in here):
            mine, without = of(here, arm=arm), of(here, arm="without")
            cells = []
            for name in names:
                values = matrix(mine, [name])
                cells.append(f"{np.mean(list(values.values())):.3f}" + ("" if arm == "without" else
                                                                        f", {signed(paired(matrix(without, [name]), values), 3)}"))
            z = ["" if not mine[0][name] else f"{np.mean([float(row[name]) for row in mine]):.3f}" for name in ("z_diagonal", "z_off_diagonal")]
            rows.append([cohort, cases, arm, *cells, *z])
    head = ["cohort", "training cases", "arm", *(f"{name}, to without [95 %]" for name in names.values()), "of z: diagonal", "of z: off it"]
    return table(head, rows)


def other_side(rows):
    """False whole tumour on the healthy side: the failure of the paper's Figure 2."""
    lines = []
    for cases in dict.fromkeys(row["cases"] for row in rows):
        without, with_term = (matrix(of(rows, cases=cases, arm=arm), ["voxels"]) for arm in ("without", "with"))
        d = paired(without, with_term)
        lines.append([cases, d.shape[1], d.shape[0], *(f"{np.mean(list(m.values())):.1f}" for m in (without, with_term)), signed(d, 1)])
    return table(["training cases", "held-out cases", "seeds", "without", "with", "difference [95 %]"], lines)


def claims(scores, ensembles):
    """The two sentences that the paper has no figure for."""
    sentences = []
    for name, conditions in (("held-out cases like those trained on", ("as trained",)), ("perturbed held-out cases", PERTURBED)):
        d = pooled(scores, conditions)
        mean, low, high = interval(d)
        verdict = "helps" if low > 0 else "harms" if high < 0 else "makes no difference that can be told from none"
        sentences.append(f"On this cohort the Barlow Twins term {verdict} on {name}: mean Dice {mean:+.4f} with it (95 % interval {low:+.4f} to "
                         f"{high:+.4f}; {d.shape[0]} seeds, {d.shape[1]} cases, all settings pooled).")
    for maps in dict.fromkeys(row["maps"] for row in ensembles):
        plain, mine, single = (ensemble_matrix(ensembles, maps, way) for way in ("mean", "top N/2 by confidence", WAYS[0]))
        d = paired(plain, mine)
        mean, low, high = interval(d)
        verdict = "is better than" if low > 0 else "is worse than" if high < 0 else "cannot be told from"
        tail = f"; the plain mean is {signed(paired(single, plain))} from a single network" if single else ""
        sentences.append(f"On this cohort the confidence ensemble of {maps} {verdict} their plain mean: mean Dice {mean:+.4f} (95 % interval "
                         f"{low:+.4f} to {high:+.4f}; {d.shape[0]} sets of five networks, {d.shape[1]} cases){tail}.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def all_tables(folder):
    """{marker: Markdown} of all that the CSVs in `folder` hold."""
    scores, ensembles, maps = (read(folder, name) for name in ("scores", "ensembles", "maps"))
    tables = {"claims": claims(scores, ensembles), "primary": primary(scores), "hd95": primary_hd95(scores), "secondary": secondary(scores),
              "ensemble": ensemble(ensembles), "ranking": ranking(maps), "features": features(scores)}
    if list(folder.glob("other_side.csv*")):
        tables["other side"] = other_side(read(folder, "other_side"))
    return tables


def write_into(text, tables):
    """RESULTS.md's text with each block between <!-- name --> and <!-- end --> made anew."""
    for name, content in tables.items():
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda match: match[1] + content + match[2], text, flags=re.DOTALL)
        assert found == 1, f"RESULTS.md has no block for {name}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "results", help="of scores.csv, ensembles.csv and maps.csv, or .csv.gz")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md beside this file")
    args = parser.parse_args()
    tables = all_tables(args.folder)
    for name, content in tables.items():
        print(f"\n{name}\n\n{content}")
    if args.write:
        path = HERE / "RESULTS.md"
        path.write_text(write_into(path.read_text(), tables))


if __name__ == "__main__":
    main()
