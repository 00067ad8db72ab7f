"""The ablation's tables and conclusions, out of its CSVs.

    python benchmarks/tables.py                  # of the study in benchmarks/results, which is committed
    python benchmarks/tables.py runs/ablation    # of another, as ablation.py left it
    python benchmarks/tables.py --write          # into RESULTS.md too, between its markers

A difference is paired: the same seed, so the same first weights, crops and views, and the same held-out case. What only one of the two
arms has, in a study that was interrupted, is left out. An interval is a 95 % percentile bootstrap over seeds and cases at once: both are
drawn anew, with replacement, 10,000 times.
"""

import argparse
import csv
import gzip
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
REGIONS = ("ET", "TC", "WT")
DICE, HD95 = ([f"{measure}_{region.lower()}" for region in REGIONS] for measure in ("dice", "hd95"))
PERTURBED = ("bias field", "contrast", "noise")
CONDITIONS = ("as trained", *PERTURBED)


# ---- rows -------------------------------------------------------------------------------------------------------------


def read(folder, name):
    """FOLDER/<name>.csv or <name>.csv.gz -> its rows, dicts of strings; none if there is neither."""
    for path, opened in ((folder / f"{name}.csv", open), (folder / f"{name}.csv.gz", gzip.open)):
        if path.exists():
            with opened(path, "rt", newline="") as file:
                return list(csv.DictReader(file))
    return []


def of(rows, **wanted):
    """The rows with these values; a tuple names several."""
    wanted = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return [row for row in rows if all(row[key] in values for key, values in wanted.items())]


def cells(rows, columns):
    """-> {(seed, case, what was tested): the mean over `columns`, and over the rows that agree in all of these}"""
    values = {}
    for row in rows:
        key = row["seed"], row["case"], *(row.get(name) for name in ("cohort", "cases", "condition", "region"))
        values.setdefault(key, []).append(np.mean([float(row[column]) for column in columns]))
    return {key: np.mean(value) for key, value in values.items()}


def average(rows, columns):
    return np.mean(list(cells(rows, columns).values()))


def grid(values):
    """{(seed, case, ...): value} -> array (seeds, cases): means over what has the same seed and case, NaN where nothing has."""
    seeds, cases = (sorted({key[i] for key in values}) for i in range(2))
    sums, counts = np.zeros((2, len(seeds), len(cases)))
    for key, value in values.items():
        at = seeds.index(key[0]), cases.index(key[1])
        sums[at] += value
        counts[at] += 1
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def paired(one, other, columns):
    """The rows of two arms -> array (2, seeds, cases) of the mean over `columns`, out of what both arms have."""
    values = [cells(rows, columns) for rows in (one, other)]
    shared = values[0].keys() & values[1].keys()
    return np.stack([grid({key: arm[key] for key in shared}) for arm in values])


def interval(values, draws=10_000):
    """(seeds, cases), NaN where unknown -> its mean, and both ends of the mean's 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    seed_counts, case_counts = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in values.shape)    # (draws, n): how often each is drawn
    known = ~np.isnan(values)
    total, number = (((seed_counts @ array) * case_counts).sum(1) for array in (np.where(known, values, 0.0), known))
    return np.nanmean(values), *np.percentile((total / np.maximum(number, 1))[number > 0], (2.5, 97.5))


def signed(values, digits=4):
    mean, low, high = (f"{x:+.{digits}f}" for x in interval(values))
    return f"{mean} [{low}, {high}]"


def compared(pair, digits=3):
    """An array of `paired` -> 'one, other: difference [its interval]'"""
    one, other = (f"{np.nanmean(arm):.{digits}f}" for arm in pair)
    return f"{one}, {other}: {signed(pair[1] - pair[0], digits)}"


def extent(values):
    return " x ".join(map(str, values.shape[-2:]))


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def settings(scores):
    """The (cohort, training cases) that both primary arms have, in the order of the study; the secondary arms have the last."""
    without, with_term = (dict.fromkeys((row["cohort"], row["cases"]) for row in of(scores, arm=arm)) for arm in ("without", "with"))
    return [setting for setting in without if setting in with_term]


# ---- the term ---------------------------------------------------------------------------------------------------------


def without_and_with(scores, columns, **wanted):
    return paired(of(scores, arm="without", **wanted), of(scores, arm="with", **wanted), columns)


def primary_rows(scores):
    """[(cohort, training cases, tested), the rows' filter] of every comparison of the two arms, the pooled ones last."""
    rows = [((cohort, cases, condition), {"cohort": cohort, "cases": cases, "condition": condition})
            for cohort, cases in settings(scores) for condition in CONDITIONS]
    pooled = (("as trained", CONDITIONS[:1]), ("perturbed", PERTURBED), ("all four", CONDITIONS))
    return rows + [(("all", "all", name), {"condition": conditions}) for name, conditions in pooled]


def primary(scores):
    rows = []
    for names, wanted in primary_rows(scores):
        pair = without_and_with(scores, DICE, **wanted)
        difference = pair[1] - pair[0]
        better = f"{(np.nanmean(difference, 1) > 0).sum()} of {len(difference)}"
        rows.append([*names, *(f"{np.nanmean(arm):.4f}" for arm in pair), signed(difference), better, extent(difference)])
    return table(["cohort", "training cases", "tested", "without", "with", "difference [95 %]", "seeds better", "seeds x cases"], rows)


def by_region(scores, columns, digits):
    rows = [[*names, *(compared(without_and_with(scores, [column], **wanted), digits) for column in columns)]
            for names, wanted in primary_rows(scores)]
    return table(["cohort", "training cases", "tested", *(f"{region}: without, with: difference [95 %]" for region in REGIONS)], rows)


def secondary_rows(scores):
    """-> the setting of the secondary arms, {arm: its rows}, of the seeds that they have; of all seeds as long as there are none"""
    cohort, cases = settings(scores)[-1]
    here = of(scores, cohort=cohort, cases=cases)
    others = [row for row in here if row["arm"] not in ("without", "with")]
    seeds = tuple({row["seed"] for row in others or here})
    return (cohort, cases), {arm: of(here, arm=arm, seed=seeds) for arm in dict.fromkeys(row["arm"] for row in here)}


def secondary(scores):
    (cohort, cases), arms = secondary_rows(scores)
    lines = []
    for arm, rows in arms.items():
        line = [arm]
        for conditions in (CONDITIONS[:1], PERTURBED):
            mine = of(rows, condition=conditions)
            line.append(f"{average(mine, DICE):.4f}")
            for reference in ("without", "with"):
                _, other = pair = paired(of(arms[reference], condition=conditions), mine, DICE)
                line.append("" if arm == reference else signed(other - pair[0], 3))
        lines.append([*line, extent(pair)])
    differences = ["to without [95 %]", "to with [95 %]"]
    return table([f"{cohort}, {cases} cases", "as trained", *differences, "perturbed", *differences, "seeds x cases"], lines)


def features(scores):
    """What the term does to the features of held-out crops, and to its own projections z."""
    names = {"c_diagonal": "diagonal of C", "c_off_diagonal": "rms off the diagonal", "effective_rank": "effective rank"}
    lines = []
    for cohort, cases in settings(scores):
        here = of(scores, cohort=cohort, cases=cases, condition="as trained")
        for arm in dict.fromkeys(row["arm"] for row in here):
            mine, line = of(here, arm=arm), [cohort, cases, arm]
            for name in names:
                pair = paired(of(here, arm="without"), mine, [name])
                line.append(f"{np.nanmean(pair[1]):.3f}" + ("" if arm == "without" else f", {signed(pair[1] - pair[0], 3)}"))
            line += [f"{average(mine, [name]):.3f}" if mine[0][name] else "" for name in ("z_diagonal", "z_off_diagonal")]
            lines.append([*line, extent(pair)])
    head = ["cohort", "training cases", "arm", *(f"{name}, to without [95 %]" for name in names.values()), "of z: diagonal", "of z: off it",
            "seeds x cases"]
    return table(head, lines)


def other_side(rows):
    """Voxels of whole tumour predicted in the healthy half of the brain, in cases that are bright there."""
    lines = []
    for cases in dict.fromkeys(row["cases"] for row in rows):
        pair = without_and_with(rows, ["voxels"], cases=cases)
        lines.append([cases, *(f"{np.nanmean(arm):.1f}" for arm in pair), signed(pair[1] - pair[0], 1), extent(pair)])
    return table(["training cases", "without", "with", "difference [95 %]", "seeds x cases"], lines)


# ---- the ensemble -----------------------------------------------------------------------------------------------------

SINGLES = tuple(f"single {i}" for i in range(5))
WAYS = {"singles averaged": SINGLES, "best single, by validation": "best single"}    # the name in the table -> in the CSV, if they differ


def ensemble(ensembles):
    lines = []
    for maps in dict.fromkeys(row["maps"] for row in ensembles):
        here = of(ensembles, maps=maps)
        for name in (*WAYS, "mean", "geometric mean", "top N/2 by confidence", "weighted by confidence"):
            mine = of(here, way=WAYS.get(name, name))
            if mine:    # forty maps come from no single network
                pair = paired(of(here, way="mean"), mine, ["dice"])
                regions = [f"{average(of(mine, region=region), ['dice']):.4f}" for region in REGIONS]
                to_mean = "" if name == "mean" else signed(pair[1] - pair[0])
                lines.append([maps, name, *regions, f"{np.nanmean(pair[1]):.4f}", to_mean, extent(pair)])
    return table(["maps", "merged by", *REGIONS, "mean", "to the plain mean [95 %]", "seeds x cases"], lines)


def rank_maps(maps):
    """How confidence ranks the maps of each case of one region -> {(seed, case): (rho, is the most confident the best, spread of sizes)}

    rho: Spearman's, between confidence and true Dice; spread: sd / mean of the maps' voxels. Left out: empty maps, whose confidence is
    0/0, and then cases with fewer than three maps, or with one Dice or one confidence for all.
    """
    groups = {}
    for row in maps:
        if row["voxels"] != "0":
            groups.setdefault((row["seed"], row["case"]), []).append([float(row[name]) for name in ("confidence", "dice", "voxels")])
    ranked = {}
    for key, values in groups.items():
        confidence, dice, voxels = np.array(values).T
        if len(dice) > 2 and np.ptp(dice) > 0 and np.ptp(confidence) > 0:
            best = float(dice[confidence.argmax()] == dice.max())
            ranked[key] = (stats.spearmanr(confidence, dice).statistic, best, voxels.std() / voxels.mean())
    return ranked


def thirds(ranked):
    """The keys of `rank_maps` in three lists, from the cases whose maps agree most in size to those where they agree least."""
    keys = sorted(ranked, key=lambda key: ranked[key][2])
    return [keys[len(keys) * i // 3 : len(keys) * (i + 1) // 3] for i in range(3)]


def mean_rho(ranked, keys, digits=3):
    return signed(grid({key: ranked[key][0] for key in keys}), digits) if keys else ""


def ranking(maps):
    lines = []
    for region in REGIONS:
        here = of(maps, region=region)
        unflipped = of(here, flip="0")
        five, forty = rank_maps(unflipped), rank_maps(here)
        best = grid({key: value[1] for key, value in five.items()})
        empty = sum(row["voxels"] == "0" for row in unflipped)
        lines.append([region, mean_rho(five, five), *(mean_rho(five, keys) for keys in thirds(five)), f"{signed(best, 2).replace('+', '')}",
                      mean_rho(forty, forty), f"{len(five)} of {len(unflipped) // 5}", f"{empty} of {len(unflipped)}"])
    head = ["region", "rho of the 5 maps of a case [95 %]", "third with the most equal sizes", "middle third", "least equal sizes",
            "most confident is best", "rho of its 40 maps", "cases ranked", "empty maps"]
    return table(head, lines)


def across_cases(maps):
    """One network, many cases: does a confident prediction tell an easy case?"""
    lines = []
    for region in REGIONS:
        rhos = []
        for network in dict.fromkeys((row["seed"], row["model"]) for row in maps):
            here = [row for row in of(maps, region=region, flip="0", seed=network[0], model=network[1]) if row["voxels"] != "0"]
            rhos.append(stats.spearmanr([float(row["confidence"]) for row in here], [float(row["dice"]) for row in here]).statistic)
        lines.append([region, f"{np.mean(rhos):+.3f}", f"{min(rhos):+.3f} to {max(rhos):+.3f}", len(rhos)])
    return table(["region", "rho over cases, mean over networks", "range", "networks"], lines)


# ---- in words ---------------------------------------------------------------------------------------------------------


def verdict(values, better, worse, neither):
    """-> the word that the interval allows, 'mean (95 % interval low to high; seeds, cases)'"""
    mean, low, high = interval(values)
    seeds, cases = values.shape
    return (better if low > 0 else worse if high < 0 else neither,
            f"{mean:+.4f} (95 % interval {low:+.4f} to {high:+.4f}; {seeds} seed{'s' * (seeds > 1)}, {cases} cases)")


def claims_of_the_term(scores):
    sentences = []
    for name, conditions in (("held-out cases like those it was trained on", CONDITIONS[:1]), ("perturbed held-out cases", PERTURBED)):
        one, other = without_and_with(scores, DICE, condition=conditions)
        word, figures = verdict(other - one, "helps", "harms", "makes no difference that can be told from none")
        sentences.append(f"On this cohort the Barlow Twins term {word} on {name}: mean Dice, all settings pooled, {figures}.")
    (cohort, cases), arms = secondary_rows(scores)
    differences = {arm: np.subtract(*paired(rows, arms["with"], DICE)) for arm, rows in arms.items() if arm not in ("without", "with")}
    groups = {"above": [], "below": [], "not to be told from": []}
    for arm, difference in differences.items():
        word, _ = verdict(difference, "above", "below", "not to be told from")
        groups[word].append(f"{arm} {signed(difference)}")
    listed = "; ".join(f"{word} it: {', '.join(members)}" for word, members in groups.items() if members)
    if listed:
        sentences.append(f"Beside the term at its default, all four conditions pooled ({cohort}, {cases} cases), {listed}.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def claims_of_the_ensemble(ensembles, maps):
    sentences = []
    for kind in dict.fromkeys(row["maps"] for row in ensembles):
        mean, top, singles = (of(ensembles, maps=kind, way=way) for way in ("mean", "top N/2 by confidence", SINGLES))
        one, other = paired(mean, top, ["dice"])
        word, figures = verdict(other - one, "is better than", "is worse than", "cannot be told from")
        sentence = f"On this cohort the confidence ensemble of {kind} {word} their plain mean: mean Dice {figures}"
        if singles:
            single, merged = paired(singles, mean, ["dice"])
            sentence += f"; the plain mean to a network alone, {signed(merged - single)}"
        sentences.append(sentence + ".")
    for region in REGIONS:
        ranked = rank_maps(of(maps, region=region, flip="0"))
        agree, _, differ = thirds(ranked)
        sentences.append(f"On this cohort confidence ranks the five maps of a case by their true Dice of {region} with a mean Spearman "
                         f"correlation of {mean_rho(ranked, ranked, 2)}; {mean_rho(ranked, agree, 2)} where their sizes agree most, "
                         f"{mean_rho(ranked, differ, 2)} where they agree least.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


# ---- the command ------------------------------------------------------------------------------------------------------


def all_tables(folder):
    """{name: Markdown} of all that the CSVs in `folder` hold."""
    scores, ensembles, maps, beyond = (read(folder, name) for name in ("scores", "ensembles", "maps", "other_side"))
    scores = of(scores, fold="-1")    # the folds' networks are the ensemble's
    tables = {}
    if scores:
        tables |= {"the term": claims_of_the_term(scores), "primary": primary(scores), "Dice by region": by_region(scores, DICE, 3),
                   "HD95 by region, mm": by_region(scores, HD95, 2), "secondary": secondary(scores), "features": features(scores)}
    if beyond:
        tables["other side"] = other_side(beyond)
    if ensembles:
        tables |= {"the ensemble": claims_of_the_ensemble(ensembles, maps), "ensemble": ensemble(ensembles), "ranking": ranking(maps),
                   "across cases": across_cases(maps)}
    return tables


def print_all(folder):
    for name, content in all_tables(folder).items():
        print(f"\n{name}\n\n{content}", flush=True)


def fill(text, tables):
    """RESULTS.md's text with what stands between <!-- table: name --> and <!-- end --> made anew."""
    blocks = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return blocks.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "results", help="of the CSVs, as they are or as .csv.gz")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md beside this file, instead of printing")
    args = parser.parse_args()
    if not read(args.folder, "scores"):
        print(f"tables.py: error: {args.folder}: no rows in scores.csv or scores.csv.gz there, expected what ablation.py writes as it ends",
              file=sys.stderr)
        sys.exit(2)
    if args.write:
        path = HERE / "RESULTS.md"
        path.write_text(fill(path.read_text(encoding="utf-8"), all_tables(args.folder)), encoding="utf-8")
    else:
        print_all(args.folder)


if __name__ == "__main__":
    main()
