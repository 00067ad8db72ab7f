"""RESULTS.md's differences with their intervals, patients and phantoms side by side: results/differences.png.

    python benchmarks/figures.py

Needs matplotlib.
"""

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tables import HERE, PERTURBED, REGIONS, grid, interval, load_committed, maps_of, merged, ranks, term

# Told apart without colour too: the patients' markers are filled, the phantoms' open.
STYLES = {"patients, 4 mm": {"color": "#003f7f", "marker": "o"},
          "patients, 2 mm": {"color": "#0080c0", "marker": "s"},
          "phantoms": {"color": "#c05a00", "marker": "D", "mfc": "white"}}
PANELS = {
    "The Barlow Twins term": ("change of mean Dice", {
        "unperturbed": lambda study: np.subtract(*term(study)[::-1]),
        "perturbed": lambda study: np.subtract(*term(study, condition=PERTURBED)[::-1])}),
    "Top N/2 by confidence, not all": ("change of mean Dice", {
        "5 maps": lambda study: np.subtract(*merged(study)[::-1]),
        "40 maps": lambda study: np.subtract(*merged(study, maps="40 maps")[::-1])}),
    "Ranking the maps of a case": ("rho of confidence and Dice", {
        region: lambda study, region=region: grid(ranks(maps_of(study, region))) for region in REGIONS}),
}


def draw(ax, studies, questions):
    """A row a question, a marker and its 95 % interval a study."""
    for y, ask in enumerate(questions.values()):
        for shift, study in zip((-0.24, 0, 0.24), studies):
            mean, low, high = interval(ask(study))
            ax.errorbar(mean, y + shift, xerr=[[mean - low], [high - mean]], ls="", ms=6.5, lw=1.6, capsize=3,
                        label=study.name if not y else None, **STYLES[study.name])
    ax.set_yticks(range(len(questions)), questions)
    ax.set_ylim(len(questions) - 0.5, -0.5)
    ax.axvline(0, color="#888888", lw=1, zorder=0)
    ax.grid(axis="x", color="#e4e4e4", lw=0.7)
    ax.set_axisbelow(True)
    ax.locator_params(axis="x", nbins=5)


def main():
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    studies = load_committed()
    fig, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.8), layout="constrained")
    for ax, (title, (unit, questions)) in zip(axes, PANELS.items()):
        draw(ax, studies, questions)
        ax.set_title(title, loc="left", fontsize=13)
        ax.set_xlabel(unit)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(HERE / "results" / "differences.png", dpi=120)


if __name__ == "__main__":
    main()
