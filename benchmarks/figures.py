"""The ablation's plots, out of its CSVs, and pictures of what its networks predict.

    python benchmarks/figures.py                            # the plots of the study in benchmarks/results, into that folder
    python benchmarks/figures.py --study runs/ablation      # the pictures and other_side.csv as well, by the networks that lie there

The pictures: case.png, the test case of median Dice; other_side.png, the paper's Figure 2, whole tumour predicted in the healthy half of
the brain because it is bright there in FLAIR. Their networks are those of the hard cohort, which has such cases. Needs matplotlib.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import figure  # noqa: E402
import phantom  # noqa: E402
from ablation import COHORTS, PHANTOM, QUICK, Run  # noqa: E402
from data import brain_box, find_cases, labels_to_regions, load_case, normalize, regions_to_labels, save_volume  # noqa: E402
from infer import choose_precision, choose_window, predict, write_csv  # noqa: E402
from segresnet import SegResNet  # noqa: E402
from tables import (CONDITIONS, DICE, HERE, PERTURBED, REGIONS, interval, mean_rho, of, paired, primary_rows, rank_maps, read,  # noqa: E402
                    secondary_rows, settings, without_and_with)

ARMS = {"without": {"color": "#888888", "marker": "o", "mfc": "white"}, "with": {"color": "#111111", "marker": "s"}}    # open, filled


# ---- plots ------------------------------------------------------------------------------------------------------------


def error_bar(ax, at, values, across=False, **style):
    """The mean of (seeds, cases) and its interval, at a place on x; across: on y instead."""
    mean, low, high = interval(values)
    place, error = ((mean, at), "xerr") if across else ((at, mean), "yerr")
    return ax.errorbar(*place, **{error: [[mean - low], [high - mean]]}, ls="", ms=4.5, lw=1, capsize=2, **style)


def plot_dice(scores, path):
    """Mean Dice by arm, a panel for each setting."""
    shown = settings(scores)
    fig, axes = plt.subplots(1, len(shown), figsize=(2.3 * len(shown), 2.9), sharey=True, squeeze=False, layout="constrained")
    for ax, (cohort, cases) in zip(axes[0], shown):
        for x, condition in enumerate(CONDITIONS):
            pair = without_and_with(scores, DICE, cohort=cohort, cases=cases, condition=condition)
            for shift, (arm, style), values in zip((-0.12, 0.12), ARMS.items(), pair):
                error_bar(ax, x + shift, values, label=f"{arm} the term" if not x else None, **style)
        ax.set_title(f"{cohort}, {cases} training cases", loc="left", fontsize=9, color="#222222")
        ax.set_xticks(range(len(CONDITIONS)), [condition.replace(" ", "\n") for condition in CONDITIONS])
        ax.set_xlim(-0.5, len(CONDITIONS) - 0.5)
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    axes[0, 0].set_ylabel("mean Dice of ET, TC, WT")
    axes[0, 0].legend(loc="lower left")
    figure.save(fig, path)


def plot_differences(scores, path):
    """Forest plots: with minus without in every setting and condition; the secondary arms minus the default term."""
    (cohort, cases), arms = secondary_rows(scores)
    left = [(", ".join(dict.fromkeys(names)), "with", without_and_with(scores, DICE, **wanted)) for names, wanted in primary_rows(scores)]
    right = [(f"{arm}, {name}", "without" if name == "perturbed" else "with",
              paired(*(of(arms[one], condition=conditions) for one in ("with", arm)), DICE))
             for arm in arms if arm != "with" for name, conditions in (("as trained", CONDITIONS[:1]), ("perturbed", PERTURBED))]
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 0.6 + 0.21 * max(len(left), len(right))), layout="constrained")
    titles = "With the term minus without", f"Minus the default term: {cohort}, {cases} cases"
    for ax, lines, title in zip(axes, (left, right), titles):
        for y, (_, style, pair) in enumerate(lines):
            error_bar(ax, -y, pair[1] - pair[0], across=True, **ARMS[style])
        ax.set_yticks(-np.arange(len(lines)), [name for name, *_ in lines])
        ax.set_title(title, loc="left", fontsize=9.5, color="#222222")
        ax.set_xlabel("difference in mean Dice")
        ax.locator_params(axis="x", nbins=6)
        ax.axvline(0, color="#999999", lw=0.8, zorder=0)
        ax.grid(axis="x", color="#e6e6e6", lw=0.6)
    figure.save(fig, path)


def plot_confidence(maps, path):
    """Each map of each case: its confidence against its true Dice."""
    fig, axes = plt.subplots(1, 3, figsize=(9.2, 3.1), sharey=True, layout="constrained")
    for ax, region in zip(axes, REGIONS):
        here = of(maps, region=region, flip="0")
        ranked, (colour, marker) = rank_maps(here), figure.LINES[region]
        x, y = np.array([(float(row["confidence"]), float(row["dice"])) for row in here if row["voxels"] != "0"]).T
        ax.scatter(x, y, s=11, marker=marker, facecolor="none", edgecolor=colour, lw=0.7, alpha=0.7)
        ax.set_title(f"{region}: rho within a case {mean_rho(ranked, ranked, 2)}", loc="left", fontsize=9, color="#222222")
        ax.set_xlabel("confidence of a map")
        ax.set_ylim(-0.02, 1.02)
        ax.set_axisbelow(True)
        ax.grid(color="#e6e6e6", lw=0.6)
    axes[0].set_ylabel("its true Dice")
    figure.save(fig, path)


# ---- pictures ---------------------------------------------------------------------------------------------------------


def predictor(study, run, size):
    """The network of a run -> a function from an image as stored to regions (3, D, H, W) bool, painted as they are scored."""
    network = SegResNet(filters=size.filters).eval()
    network.load_state_dict(torch.load(study / "models" / f"{run.name}.pt", map_location="cpu", weights_only=True)["model"])
    precision = choose_precision("auto", torch.device("cpu"))

    def regions_of(image):
        image = normalize(image)
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            return labels_to_regions(regions_to_labels(predict(network, image, choose_window(image, size.crop)) > 0.5))

    return regions_of


def healthy_half(case, image):
    """(D, 1, 1) bool: the half of the brain that the tumour is not in; None where that half has nothing bright in FLAIR."""
    side, _, bright = phantom.traits(np.random.default_rng((0, int(case.name[-5:]))))
    low, high = brain_box(image.any(0))[0]
    from_middle = torch.arange(image.shape[1]) - (low + high - 1) / 2    # grows to the left, which is side +1
    return (from_middle * side < 0)[:, None, None] if bright else None


def draw_case(study, run, size, cases, path):
    """The case of median Dice, truth and prediction in three planes."""
    regions_of = predictor(study, run, size)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            save_volume(Path(folder) / f"{case.name}.nii.gz", regions_to_labels(regions_of(load_case(case)[0])), case.images[0])
        figure.draw(*figure.choose(cases, Path(folder), None), Path(folder), [], path)


def look_at_other_side(study, runs, size, cases):
    """-> rows of other_side.csv, {(run, case's name): the false whole tumour in the healthy half, (D, H, W) bool}"""
    bright = []
    for case in cases:
        image, target, _ = load_case(case)
        half = healthy_half(case, image)
        if half is not None:
            bright.append((case, image, half & ~target[2].bool()))
    rows, spills = [], {}
    for run in runs:
        regions_of = predictor(study, run, size)
        for case, image, where in bright:
            spill = regions_of(image)[2] & where
            rows.append({"cases": run.cases, "arm": run.arm, "seed": run.seed, "case": case.name, "voxels": int(spill.sum())})
            spills[run, case.name] = spill
    return rows, spills


def draw_other_side(study, size, cases, spills, path):
    """Truth and both arms over FLAIR, in the case where most is predicted on the healthy side, mean over all runs, by its worst seed."""
    voxels = {}
    for (_, name), spill in spills.items():
        voxels.setdefault(name, []).append(int(spill.sum()))
    case = next(case for case in cases if case.name == max(voxels, key=lambda name: np.mean(voxels[name])))
    worst = max((run for run, name in spills if name == case.name), key=lambda run: spills[run, case.name].sum())
    runs = [worst._replace(arm=arm) for arm in ("without", "with")]
    image, truth, _ = load_case(case)
    rows = [truth.numpy().astype(bool)] + [predictor(study, run, size)(image).numpy() for run in runs]
    titles = [f"{case.name}, FLAIR: truth"]
    for run in runs:
        count = int(spills[run, case.name].sum())
        titles.append(f"{run.arm.capitalize()} the term, {run.cases} cases, seed {run.seed}: {count} voxels of WT on the other side")
    height, gap = 2.0, 0.3    # of a row, and between rows; inches
    flair = image[3].numpy()
    extents = figure.window(flair)[1]
    fig = plt.figure(figsize=(height * (2 * extents[0] + extents[1]) / max(extents[1:]) + 0.4, 3 * (height + gap) + 0.15))
    bottoms = [0.1 + row * (height + gap) for row in (2, 1, 0)]
    figure.draw_slices(fig, flair, rows, 0.15, bottoms, height, through=spills[worst, case.name].numpy())
    for title, bottom in zip(titles, bottoms):
        fig.text(0.15 / fig.get_figwidth(), (bottom + height + 0.07) / fig.get_figheight(), title, fontsize=9.5, color="#222222")
    figure.save(fig, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "results", help="of the CSVs; the figures go there too")
    parser.add_argument("--study", type=Path, help="OUT of ablation.py on its synthetic cohorts, with its models and cohorts")
    parser.add_argument("--quick", action="store_true", help="it was made with --quick")
    args = parser.parse_args()
    scores, maps = of(read(args.folder, "scores"), fold="-1"), read(args.folder, "maps")
    plot_dice(scores, args.folder / "dice.png")
    plot_differences(scores, args.folder / "differences.png")
    plot_confidence(maps, args.folder / "confidence.png")
    if args.study:
        size = QUICK if args.quick else PHANTOM
        phantom.P_LOOKALIKE = COHORTS["hard"]["P_LOOKALIKE"]
        tested = {row["case"] for row in scores}
        cases = [case for case in find_cases(args.study / "cohorts" / "hard") if case.name in tested]
        runs = [Run(*run) for run in dict.fromkeys((row["cohort"], int(row["cases"]), row["arm"], int(row["seed"]))
                                                   for row in of(scores, cohort="hard", arm=("without", "with")))]
        rows, spills = look_at_other_side(args.study, runs, size, cases)
        write_csv(args.folder / "other_side.csv", rows)
        draw_other_side(args.study, size, cases, spills, args.folder / "other_side.png")
        draw_case(args.study, Run("hard", size.many, "with", 0), size, cases, args.folder / "case.png")


if __name__ == "__main__":
    main()
