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
STYLES = [{"color": "#003f7f", "marker": "o"}, {"color": "#0080c0", "marker": "s"},
          {"color": "#c05a00", "marker": "D", "mfc": "white"}]
PANELS = [("The Barlow Twins term", "change of mean Dice", ["unperturbed", "perturbed"]),
          ("Top N/2 by confidence, not all", "change of mean Dice", ["5 maps", "40 maps"]),
          ("Ranking the maps of a case", "rho of confidence and Dice", REGIONS)]


def differences(study):
    """For each panel its rows' values, (seeds, cases)."""
    pairs = [[term(study), term(study, condition=PERTURBED)], [merged(study), merged(study, maps="40 maps")]]
    return [[other - one for one, other in panel] for panel in pairs] + [
        [grid(ranks(maps_of(study, region))) for region in REGIONS]]


def main():
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    for study, style, shift in zip(load_committed(), STYLES, (-0.24, 0, 0.24)):
        for ax, rows in zip(axes, differences(study)):
            mean, low, high = np.transpose([interval(values) for values in rows])
            ax.errorbar(mean, np.arange(len(rows)) + shift, xerr=[mean - low, high - mean], ls="", ms=6.5,
                        lw=1.6, capsize=3, label=study.name, **style)
    for ax, (title, unit, rows) in zip(axes, PANELS):
        ax.set_title(title, loc="left", fontsize=13)
        ax.set_xlabel(unit)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.axvline(0, color="#888888", lw=1, zorder=0)
        ax.grid(axis="x", color="#e4e4e4", lw=0.7)
        ax.set_axisbelow(True)
        ax.locator_params(axis="x", nbins=5)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(HERE / "results" / "differences.png", dpi=120)


if __name__ == "__main__":
    main()
