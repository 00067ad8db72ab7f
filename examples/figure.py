"""Truth beside prediction, as in the paper's Figure 1, and the curves of the runs that led there.

    python examples/figure.py --cohort DIR --predictions DIR [--case NAME] [--runs runs/fold0 runs/fold1 ...] --out figure.png

The slices go through the largest extent of the tumour, over T1c. Axial and coronal ones are radiological: the patient's left
is on the right. Without --case the figure shows the case whose mean Dice is the median of all that have a prediction.
Needs matplotlib besides the project's own packages.
"""
import argparse
import csv
import io
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import REGIONS, InputError, find_cases, labels_to_regions, load_case, read_labels
from infer import dice

# The paper's colours, from the innermost region out: what is left of TC outside ET, and of WT outside TC.
OVERLAY = {"ET": (1.00, 0.86, 0.10), "TC": (0.86, 0.13, 0.15), "WT": (0.20, 0.72, 0.32)}
LEGEND = {"ET": "ET, enhancing tumour", "TC": "TC, tumour core: with yellow", "WT": "WT, whole tumour: with red and yellow"}
# The same on white, told apart by marker as well; the two losses in hues that colour-blind readers can tell apart.
LINES = {"ET": ("#c99700", "o"), "TC": ("#b71c2b", "s"), "WT": ("#2c8c4a", "^")}
DICE_LOSS, BARLOW = "#0060a8", "#d06000"
GAP = 0.05  # between slices, inches
PLANES = {"Axial": 2, "Sagittal": 0, "Coronal": 1}  # the LPS axis that a slice is perpendicular to
SIDES = {"Axial": "RL", "Sagittal": "AP", "Coronal": "RL"}

plt.rcParams.update({"font.family": "sans-serif", "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.edgecolor": "#999999", "axes.labelcolor": "#333333", "axes.linewidth": 0.7, "xtick.color": "#666666",
                     "ytick.color": "#666666", "xtick.major.width": 0.7, "ytick.major.width": 0.7, "legend.frameon": False})


def prediction_of(case, folder):
    """The regions (3, D, H, W) bool that were predicted for a case."""
    return labels_to_regions(read_labels(folder / f"{case.name}.nii.gz", case.et_label)[0], case.et_label)


def scores_of(case, folder):
    """Dice of ET, TC and WT."""
    truth = labels_to_regions(read_labels(case.label, case.et_label)[0], case.et_label)
    prediction = prediction_of(case, folder)
    if prediction.shape != truth.shape:
        raise InputError(f"{folder / case.name}.nii.gz: shape {tuple(prediction.shape[1:])}, expected {tuple(truth.shape[1:])}")
    return [dice(p, t) for p, t in zip(prediction, truth)]


def choose(cases, folder, name):
    """-> the case, its Dice scores, and the words that say why this one."""
    if name and name not in {case.name for case in cases}:
        raise InputError(f"--case {name}: not in the cohort, expected one of {cases[0].name} ... {cases[-1].name}")
    wanted = [case for case in cases if name in (None, case.name)]
    found = [case for case in wanted if case.label and (folder / f"{case.name}.nii.gz").exists()]
    if not found:
        raise InputError(f"{folder}: no prediction {name or '<case>'}.nii.gz for a case with a segmentation")
    scored = sorted(((scores_of(case, folder), case) for case in found), key=lambda pair: sum(pair[0]))
    scores, case = scored[(len(scored) - 1) // 2]
    return case, scores, "" if name else f": the median mean Dice of {len(scored)} cases"


def read_logs(folders):
    """-> for each run its log.csv as {column: array}, NaN where an epoch was not validated."""
    logs = []
    for path in (folder / "log.csv" for folder in folders):
        try:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            columns = ["epoch", "dice_loss", "barlow", *(f"dice_{region.lower()}" for region in REGIONS)]
            logs.append({c: np.array([float(row[c] or "nan") for row in rows]) for c in columns})
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a log of train.py ({error})") from None
        if not rows:
            raise InputError(f"{path}: no epoch in it yet")
    return logs


def window(t1c):
    """The brain's bounding box with a little air. -> centre and size along each axis, voxels"""
    brain = t1c != 0
    inside = [np.flatnonzero(brain.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    return [(i[0] + i[-1]) / 2 for i in inside], [1.06 * i.size + 1 for i in inside]


def draw_slices(fig, t1c, rows, left, bottoms, height, through=None):
    """Three slices a row, through the largest extent of the tumour, or of `through`, (D, H, W) bool.

    t1c: (D, H, W); rows: truth and predictions, each (3, D, H, W) bool; left, bottoms, height: inches.
    """
    centre, size = window(t1c)
    tallest = max(size[1:])
    low, high = np.percentile(t1c[t1c != 0], (0.5, 99))
    if through is None:
        through = rows[0][2] if rows[0].any() else rows[1][2]
    for plane, axis in PLANES.items():
        across, down = (other for other in range(3) if other != axis)
        extent = through.sum(axis=(across, down))
        index = int(extent.argmax()) if extent.any() else int(centre[axis])
        width = height * size[across] / tallest
        for regions, bottom in zip(rows, bottoms):
            ax = fig.add_axes(inches(fig, left, bottom, width, height), facecolor="black", xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            # .T: down the picture runs the second axis. Axial: towards posterior, face up. Else superior is up.
            options = {"origin": "upper" if plane == "Axial" else "lower", "aspect": "auto"}
            ax.imshow(t1c.take(index, axis).T, cmap="gray", vmin=low, vmax=high, interpolation="bicubic", **options)
            et, tc, wt = (region.take(index, axis).T for region in regions)
            for mask, colour in zip((et, tc & ~et, wt & ~tc), OVERLAY.values()):
                ax.imshow(np.dstack([np.broadcast_to(colour, (*mask.shape, 3)), 0.5 * mask]), interpolation="nearest", **options)
            ax.set_xlim(centre[across] - size[across] / 2, centre[across] + size[across] / 2)
            limits = centre[down] - tallest / 2, centre[down] + tallest / 2
            ax.set_ylim(limits[::-1] if plane == "Axial" else limits)
            for letter, at in zip(SIDES[plane], (0.04, 0.96)):
                ax.text(at, 0.5, letter, transform=ax.transAxes, color="#aaaaaa", fontsize=7, ha="center", va="center")
            if regions is rows[0]:
                ax.text(0.5, 0.97, plane, transform=ax.transAxes, color="#dddddd", fontsize=7.5, ha="center", va="top")
        left += width + GAP


def curve(ax, logs, column, colour, **style):
    """One quantity by epoch: every run thin, their mean thick. Only epochs where it was measured."""
    for log in logs:
        known = ~np.isnan(log[column])
        ax.plot(log["epoch"][known], log[column][known], color=colour, lw=0.7, alpha=0.4 if len(logs) > 1 else 0)
    pairs = np.concatenate([np.stack([log["epoch"], log[column]]) for log in logs], axis=1)
    epochs = np.unique(pairs[0, ~np.isnan(pairs[1])])
    means = [np.nanmean(pairs[1, pairs[0] == epoch]) for epoch in epochs]
    return ax.plot(epochs, means, color=colour, lw=1.7, **style)[0]


def draw_curves(fig, logs, left, bottoms, width, height):
    """Both training losses above, the validation Dice of each region below; inches."""
    top, below = (fig.add_axes(inches(fig, left, bottom, width, height)) for bottom in bottoms)
    curve(top, logs, "dice_loss", DICE_LOSS)
    top.set_ylabel("soft Dice loss", color=DICE_LOSS)
    top.set_ylim(0, 1)
    top.tick_params(labelbottom=False)
    if any(log["barlow"].any() for log in logs):  # all zeros where the run had no such term
        second = top.twinx()
        curve(second, logs, "barlow", BARLOW, ls=(0, (4, 1.2)))
        second.set_ylabel("Barlow Twins loss, unweighted", color=BARLOW)
        second.set_ylim(0, None)
    for region, (colour, marker) in LINES.items():
        line = curve(below, logs, f"dice_{region.lower()}", colour, marker=marker, ms=3.5)
        last = f"  {line.get_ydata()[-1]:.3f}" if len(line.get_ydata()) else ""
        line.set_label(region + last)
    below.set_ylim(0, 1)
    below.set_ylabel("validation Dice")
    below.set_xlabel("epoch")
    below.legend(loc="lower right", title="at the end", title_fontsize=8, alignment="left", handlelength=1.6)
    of = f", mean of {len(logs)} runs" if len(logs) > 1 else ""
    for ax, title in ((top, "Training losses" + of), (below, "Validation" + of)):
        ax.set_title(title, loc="left", fontsize=9.5, color="#222222", pad=7)
        ax.set_xlim(0, max(log["epoch"].max() for log in logs))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)


def inches(fig, left, bottom, width, height):
    """A rectangle in inches -> the fractions of the figure that add_axes takes."""
    w, h = fig.get_size_inches()
    return left / w, bottom / h, width / w, height / h


def draw(case, scores, why, folder, logs, out):
    """The whole figure, into the file `out`."""
    image, truth, _ = load_case(case)
    t1c, rows = image[1].numpy(), [truth.numpy(), prediction_of(case, folder).numpy()]
    _, size = window(t1c)
    height, left, base = 2.5, 0.15, 0.55  # of a row; margins; inches
    slices = height * (2 * size[0] + size[1]) / max(size[1:]) + 2 * GAP
    bottoms = base + height + 0.32, base
    fig = plt.figure(figsize=(left + slices + (4.6 if logs else 0.15), bottoms[0] + height + 0.65))
    total = fig.get_size_inches()
    draw_slices(fig, t1c, rows, left, bottoms, height)
    found = "   ".join(f"{region} {score:.3f}" for region, score in zip(REGIONS, scores))
    for words, bottom in zip(("Truth", f"Prediction      Dice   {found}"), bottoms):
        fig.text(left / total[0], (bottom + height + 0.08) / total[1], words, fontsize=9.5, color="#222222")
    fig.text(left / total[0], 1 - 0.15 / total[1], case.name + why, fontsize=12, weight="bold", color="#111111", va="top")
    patches = [Patch(color=(*OVERLAY[region], 0.85), label=LEGEND[region]) for region in REGIONS]
    fig.legend(handles=patches, loc="lower left", bbox_to_anchor=(left / total[0], 0.1 / total[1]), ncols=3, borderpad=0,
               borderaxespad=0, handlelength=1.1, handleheight=1.1, columnspacing=1.8)
    if logs:
        draw_curves(fig, logs, left + slices + 0.75, bottoms, 3.1, height)
    save(fig, out)


def save(fig, out):
    if out.suffix == ".png":  # a palette of 256 colours: a third of the size
        fig.savefig(buffer := io.BytesIO(), format="png", dpi=150)
        Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True, dpi=(150, 150))
    else:
        fig.savefig(out)


def main():
    parser = argparse.ArgumentParser(prog="figure.py", description="Truth beside prediction, and the curves of the runs.")
    parser.add_argument("--cohort", type=Path, required=True, help="folder of the cases")
    parser.add_argument("--predictions", type=Path, required=True, help="folder of <case>.nii.gz, as infer.py writes it")
    parser.add_argument("--case", help="its name (default: the case of median mean Dice)")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders with a log.csv: adds the training curves")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .pdf or .svg")
    args = parser.parse_args()
    try:
        logs = read_logs(args.runs)
        draw(*choose(find_cases(args.cohort), args.predictions, args.case), args.predictions, logs, args.out)
    except (InputError, OSError, ValueError) as error:
        print(f"figure.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
