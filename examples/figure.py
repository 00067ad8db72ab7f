"""Truth above prediction, in the colours of the paper's Figure 1, and the curves of the runs that led there.

    python examples/figure.py --cohort DIR --predictions DIR [--case NAME] [--runs RUN ...] --out figure.png

The slices go through the largest extent of the necrosis, over T1c.
Axial and coronal ones are radiological: the patient's left is on the right.
Without --case the figure shows the case whose mean Dice is the median of all that have a prediction.
Needs matplotlib besides the project's own packages.
"""
import argparse
import csv
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import REGIONS, InputError, brain_box, find_cases, folder, labels_to_regions, load_case, run_command
from infer import dice, read_case

# From the innermost region out: ET, what is left of TC outside it, what is left of WT outside that.
COLOURS = {"enhancing tumour: ET": (1.00, 0.86, 0.10), "necrosis: TC, with yellow": (0.86, 0.13, 0.15),
           "oedema: WT, with yellow and red": (0.20, 0.72, 0.32)}
LINES = (("#c99700", "o"), ("#b71c2b", "s"), ("#2c8c4a", "^"))    # the same on white
DICE_LOSS, BARLOW = "#0060a8", "#d06000"    # hues that colour-blind readers can tell apart
# The LPS axes across and down the picture, the one it is perpendicular to, what lies left and right in it.
PLANES = {"axial": (0, 1, 2, "RL"), "sagittal": (1, 2, 0, "AP"), "coronal": (0, 2, 1, "RL")}
COLUMNS = ["epoch", "dice_loss", "barlow", *(f"dice_{region.lower()}" for region in REGIONS)]    # of log.csv

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.edgecolor": "#999999", "xtick.color": "#666666", "ytick.color": "#666666",
                     "axes.titlelocation": "left", "axes.titlesize": 10, "legend.frameon": False})


def read_regions(case, predictions):
    """-> the truth and what the folder `predictions` holds for a case, regions (3, D, H, W) bool each."""
    labels, truth, *_ = read_case(case, predictions)
    return truth, labels_to_regions(labels)


def choose(cases, predictions, name=None):
    """-> the case `name`, or that of the median mean Dice, and a title that says which. Raises InputError."""
    found = [case for case in cases if name in (None, case.name)
             and case.label and (predictions / f"{case.name}.nii.gz").exists()]
    if not found:
        raise InputError(f"{predictions}: no {name or '<case>'}.nii.gz of a segmented case, expected one")
    if name:
        return found[0], name
    sums = [sum(map(dice, *read_regions(case, predictions))) for case in found]
    case = found[np.argsort(sums, kind="stable")[(len(found) - 1) // 2]]
    return case, f"{case.name}: the median mean Dice of {len(found)} cases"


def read_logs(runs):
    """Folders of runs -> for each its log.csv as {column: array}, NaN where an epoch was not validated."""
    logs = []
    for path in (run / "log.csv" for run in runs):
        try:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            logs.append({name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS})
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: {error!r}, expected a log of train.py") from None
        if not rows:
            raise InputError(f"{path}: no epoch, expected one at least")
    return logs


def draw_slices(axes, t1c, regions, through):
    """Three slices side by side, each where the mask `through` (D, H, W) extends most.

    t1c: (D, H, W); regions: (3, D, H, W) bool.
    """
    box = brain_box(t1c != 0)
    half = 0.53 * max(hi - lo for lo, hi in box)    # all panels are squares of one scale
    low, high = np.percentile(t1c[t1c != 0], (0.5, 99))
    et, tc, wt = regions
    for ax, (plane, (across, down, axis, sides)) in zip(axes, PLANES.items()):
        index = through.sum((across, down)).argmax()
        ax.imshow(t1c.take(index, axis).T, cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
        for mask, colour in zip((et, tc & ~et, wt & ~tc), COLOURS.values()):
            mask = mask.take(index, axis).T
            picture = np.dstack([np.broadcast_to(colour, (*mask.shape, 3)), 0.5 * mask])
            ax.imshow(picture, interpolation="nearest")
        x, y = (sum(box[side]) / 2 for side in (across, down))
        up = -half if plane == "axial" else half    # axial: the face is up, else the top of the head
        ax.set(xlim=(x - half, x + half), ylim=(y - up, y + up), xticks=[], yticks=[], facecolor="black")
        ax.spines[:].set_visible(False)
        for letter, at in zip(sides, (0.04, 0.96)):
            ax.text(at, 0.5, letter, transform=ax.transAxes, color="#cccccc", ha="center", va="center")
        ax.text(0.5, 0.97, plane, transform=ax.transAxes, color="#cccccc", ha="center", va="top")


def curve(ax, logs, column, colour, **style):
    """One quantity by epoch: every run thin, their mean thick. Only epochs where it was measured."""
    for log in logs:
        known = ~np.isnan(log[column])
        ax.plot(log["epoch"][known], log[column][known], color=colour, lw=0.7, alpha=0.4)
    epochs, values = (np.concatenate([log[name] for log in logs]) for name in ("epoch", column))
    known = np.unique(epochs[~np.isnan(values)])
    means = [np.nanmean(values[epochs == epoch]) for epoch in known]
    return ax.plot(known, means, color=colour, lw=1.7, **style)[0]


def draw_curves(top, below, logs):
    """Both training losses above, the validation Dice of each region below."""
    curve(top, logs, "dice_loss", DICE_LOSS)
    top.set_ylabel("soft Dice loss", color=DICE_LOSS)
    second = top.twinx()
    curve(second, logs, "barlow", BARLOW, ls="--")
    second.set_ylabel("Barlow Twins loss, unweighted", color=BARLOW)
    second.set_ylim(0)
    for region, (colour, marker) in zip(REGIONS, LINES):
        line = curve(below, logs, f"dice_{region.lower()}", colour, marker=marker, ms=3.5)
        line.set_label(" ".join([region, *(f"{value:.3f}" for value in line.get_ydata()[-1:])]))
    below.set(ylabel="validation Dice", xlabel="epoch")
    below.legend(loc="lower right", title="at the end")
    for ax, what in ((top, "Training losses"), (below, "Validation")):
        ax.set_title(f"{what}, mean of {len(logs)} run{'s' * (len(logs) > 1)}")
        ax.set(xlim=0, ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)


def draw(case, title, predictions, logs, out):
    """The whole figure, into the file `out`."""
    t1c, (truth, prediction) = load_case(case)[0][1].numpy(), read_regions(case, predictions)
    scores = "   ".join(f"{region} {dice(p, t):.3f}" for region, p, t in zip(REGIONS, prediction, truth))
    truth, prediction = truth.numpy(), prediction.numpy()
    et, tc, wt = truth
    through = next(mask for mask in (tc & ~et, wt, prediction[2], t1c != 0) if mask.any())
    fig = plt.figure(figsize=(11.4 if logs else 7.6, 6), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(2, 1)) if logs else (fig.subfigures(), None)
    axes = left.subplots(2, 3)
    draw_slices(axes[0], t1c, truth, through)
    draw_slices(axes[1], t1c, prediction, through)
    axes[0, 0].set_title("Truth")
    axes[1, 0].set_title(f"Prediction      Dice   {scores}")
    left.suptitle(title, x=0.01, ha="left", weight="bold")
    patches = [Patch(color=(*colour, 0.85), label=label) for label, colour in COLOURS.items()]
    left.legend(handles=patches, loc="outside lower left", ncols=3, handlelength=1.1, handleheight=1.1)
    if logs:
        draw_curves(*right.subplots(2, 1, sharex=True), logs)
    fig.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Truth beside prediction, and the curves of the runs.")
    add = parser.add_argument
    add("--cohort", type=folder, required=True, help="folder of the cases")
    add("--predictions", type=folder, required=True, help="of <case>.nii.gz, as infer.py's --out")
    add("--case", help="its name (default: the case of median mean Dice)")
    add("--runs", type=folder, nargs="+", default=[], help="with a log.csv: adds training curves")
    add("--out", type=folder, required=True, help="the picture: .png, .pdf or .svg")
    args = parser.parse_args()
    case, title = choose(find_cases(args.cohort), args.predictions, args.case)
    draw(case, title, args.predictions, read_logs(args.runs), args.out)


if __name__ == "__main__":
    run_command(main)
