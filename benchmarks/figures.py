"""The ablation's figures.

    python benchmarks/figures.py                           # Dice by arm, and confidence against Dice, out of the CSVs in benchmarks/results
    python benchmarks/figures.py --study runs/ablation     # also what needs the networks: a case in three planes, the failure of the
                                                           # paper's Figure 2, and other_side.csv, which counts it
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]
import ablation  # noqa: E402
import figure  # noqa: E402
import tables  # noqa: E402
from data import REGIONS, find_cases, labels_to_regions, load_case, normalize, regions_to_labels  # noqa: E402
from figure import LINES, plt  # noqa: E402
from infer import brain_box, choose_window, dice, predict, write_csv  # noqa: E402
from segresnet import SegResNet  # noqa: E402

ARMS = {"without": ("#666666", "o"), "with": ("#0060a8", "s")}
NAMES = {"without": "without the term", "with": "with the term"}


def save(fig, path):
    """PNG with a palette of 256 colours, a third of the size."""
    fig.savefig(buffer := io.BytesIO(), format="png", dpi=130)
    plt.close(fig)
    picture = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, optimize=True, dpi=(130, 130))


def dice_by_arm(scores, path):
    """Mean Dice of both arms with intervals, a panel a setting; beside it every paired difference."""
    settings = tables.settings_of(scores)
    fig, axes = plt.subplots(1, len(settings) + 1, figsize=(2.3 * len(settings) + 3.4, 3.2), width_ratios=[1] * len(settings) + [1.5],
                             layout="constrained")
    for ax, (cohort, cases) in zip(axes, settings):
        for shift, (arm, (colour, marker)) in zip((-0.1, 0.1), ARMS.items()):
            values = [tables.matrix(tables.of(scores, cohort=cohort, cases=cases, arm=arm, condition=c, fold="-1"), tables.DICE) for c in tables.CONDITIONS]
            means = np.array([tables.interval(tables.paired(dict.fromkeys(v, 0.0), v)) for v in values])
            ax.errorbar(np.arange(len(values)) + shift, means[:, 0], [means[:, 0] - means[:, 1], means[:, 2] - means[:, 0]], fmt=marker, ms=4,
                        color=colour, lw=1, capsize=2, label=NAMES[arm])
        ax.set_title(f"{cohort}, {cases} training cases", loc="left", fontsize=9)
        ax.set_xticks(range(4), [c.replace(" ", "\n") for c in tables.CONDITIONS], fontsize=7.5)
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
        ax.set_ylim(0.2, 1)
        ax.set_yticks(np.arange(0.2, 1.01, 0.2), [f"{v:.1f}" for v in np.arange(0.2, 1.01, 0.2)] if ax is axes[0] else [""] * 5)
    axes[0].set_ylabel("mean Dice, 95 % interval")
    axes[0].legend(loc="upper right", fontsize=7.5)
    forest, labels = axes[-1], []
    for cohort, cases in settings:
        for condition in tables.CONDITIONS:
            arms = [tables.matrix(tables.of(scores, cohort=cohort, cases=cases, arm=arm, condition=condition, fold="-1"), tables.DICE) for arm in ARMS]
            mean, low, high = tables.interval(tables.paired(*arms))
            forest.plot([low, high], [-len(labels)] * 2, color="#0060a8", lw=1)
            forest.plot(mean, -len(labels), "s", ms=3.5, color="#0060a8")
            labels.append(f"{cohort}, {cases}, {condition}")
    forest.axvline(0, color="#999999", lw=0.8)
    forest.set_yticks(-np.arange(len(labels)), labels, fontsize=6.5)
    forest.set_title("with minus without, mean Dice", loc="left", fontsize=9)
    save(fig, path)


def confidence_against_dice(maps, path):
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.1), sharey=True, layout="constrained")
    for ax, region in zip(axes, REGIONS):
        rows = [row for row in tables.of(maps, region=region, flip="0") if int(row["voxels"])]
        colour, marker = LINES[region]
        ax.plot([float(row["confidence"]) for row in rows], [float(row["dice"]) for row in rows], marker, ms=2.5, color=colour, alpha=0.6, mew=0)
        ax.set_title(f"{region}: {len(rows)} maps", loc="left", fontsize=9)
        ax.set_xlabel("confidence, section 3.2")
        ax.grid(color="#e6e6e6", lw=0.6)
    axes[0].set_ylabel("true Dice")
    save(fig, path)


# ---- what needs the networks ------------------------------------------------------------------------------------------


def painted(study, run, size, case):
    """What a run's network predicts for a case, (3, D, H, W) bool."""
    model = SegResNet(filters=size.filters)
    model.load_state_dict(torch.load(study / "models" / f"{run.name}.pt", weights_only=True)["model"])
    image = normalize(load_case(case)[0])
    return labels_to_regions(regions_to_labels(predict(model.eval(), image, choose_window(image, size.crop)) > 0.5))


def healthy_side(image, truth):
    """(D, H, W) bool: the half of the volume, left or right of the brain's middle, that holds less of the tumour."""
    (first, last), *_ = brain_box(image)
    left = torch.arange(image.shape[1]) >= (first + last) / 2
    if truth[2][left].sum() > truth[2][~left].sum():
        left = ~left
    return left[:, None, None].expand(image.shape[1:])


def count_other_side(study, size, test_cases, cohort):
    """Rows of other_side.csv: voxels called whole tumour on the healthy side that are none, by arm, seed and held-out case."""
    rows = []
    for cases in (size.few, size.many):
        for seed in range(size.seeds):
            for arm in ARMS:
                run = ablation.Run(cohort, cases, arm, seed)
                for case in test_cases if (study / "models" / f"{run.name}.pt").exists() else ():
                    image, truth, _ = load_case(case)
                    false = painted(study, run, size, case)[2] & ~truth[2] & healthy_side(image, truth)
                    rows.append({"cohort": cohort, "cases": cases, "arm": arm, "seed": seed, "case": case.name, "voxels": int(false.sum())})
    return rows


def three_rows(image, rows, words, title, path, background=1):
    """Axial, sagittal and coronal slices, a row a segmentation, in the paper's colours. background: the channel, 1 T1c, 3 FLAIR."""
    picture = image[background].numpy()
    _, side = figure.window(picture)
    height, left, base = 2.0, 0.15, 0.5
    bottoms = [base + (len(rows) - 1 - i) * (height + 0.3) for i in range(len(rows))]
    fig = plt.figure(figsize=(left + height * (2 * side[0] + side[1]) / max(side[1:]) + 2 * figure.GAP + 0.15, bottoms[0] + height + 0.6))
    total = fig.get_size_inches()
    figure.draw_slices(fig, picture, [row.numpy() for row in rows], left, bottoms, height)
    for word, bottom in zip(words, bottoms):
        fig.text(left / total[0], (bottom + height + 0.07) / total[1], word, fontsize=9)
    fig.text(left / total[0], 1 - 0.12 / total[1], title, fontsize=9.5, weight="bold", va="top")
    patches = [Patch(color=(*figure.OVERLAY[region], 0.85), label=region) for region in REGIONS]
    fig.legend(handles=patches, loc="lower left", bbox_to_anchor=(left / total[0], 0.08 / total[1]), ncols=3, borderaxespad=0)
    save(fig, path)


def scored(prediction, truth):
    return ", ".join(f"{region} {dice(p, t):.3f}" for region, p, t in zip(REGIONS, prediction, truth))


def from_networks(study, size, results):
    cohort = "hard"
    folder = study / "cohorts" / cohort
    test_cases = ablation.divide(folder, ablation.Run(cohort, size.many, "with", 0), size)[2]
    rows = count_other_side(study, size, test_cases, cohort)
    write_csv(results / "other_side.csv", rows)
    runs = {arm: ablation.Run(cohort, size.many, arm, 0) for arm in ARMS}

    def draw(case, background, title, path):
        image, truth, _ = load_case(case)
        predictions = {NAMES[arm]: painted(study, run, size, case) for arm, run in runs.items()}
        words = ["Truth", *(f"{name}: Dice {scored(p, truth)}" for name, p in predictions.items())]
        three_rows(image, [truth, *predictions.values()], words, f"{case.name}, {title}", path, background)

    def mean_dice(case):
        truth = load_case(case)[1]
        return np.mean([dice(p, t) for p, t in zip(painted(study, runs["with"], size, case), truth)])

    by_dice = sorted(test_cases, key=mean_dice)
    draw(by_dice[len(by_dice) // 2], 1, "the median held-out case, on T1c", results / "case.png")
    wrong = {}
    for row in rows:
        if row["cases"] == size.many:
            wrong[row["case"]] = wrong.get(row["case"], 0) + row["voxels"]
    worst = max(find_cases(folder), key=lambda case: wrong.get(case.name, -1))
    draw(worst, 3, "most tumour on the other side, on FLAIR", results / "other_side.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSVs; gets the figures")
    parser.add_argument("--study", type=Path, help="ablation.py's OUT, with its networks and cohorts")
    args = parser.parse_args()
    if args.study:
        from_networks(args.study, ablation.PHANTOM, args.results)
    dice_by_arm(tables.read(args.results, "scores"), args.results / "dice.png")
    confidence_against_dice(tables.read(args.results, "maps"), args.results / "confidence.png")


if __name__ == "__main__":
    main()
