"""The whole paper in miniature, on a synthetic cohort: no data to download, no GPU.

    python examples/quickstart.py [--out quickstart] [--seed 0]

Prints each of the project's own commands and runs it, two trainings at a time.
Settings that are not the paper's, so that a CPU will do, with the paper's in brackets:
32 synthetic cases [1,251 patients] of 48x48x40 voxels [240x240x155], 4 folds [5],
32 epochs of 24 steps [300 of 250] of one case [4], crops of 32x32x32 [192x192x144], 4 filters [32],
--lr 5e-3 [1e-4], --norm instance_affine [instance].
--pool 4 [16] and --dim 48 [128] follow from the crop: 512 rows [1,296], 11 a dimension [10].
The scores say that the pieces fit together, and nothing about patients.
"""
import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDS = range(4)
METHODS = "mean", "geometric", "confidence"
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}    # glibc keeps what was freed
PATH = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}    # this python's torchrun


def run(*commands):
    """Prints lines of shell and runs them at the same time, in the project's folder.

    Of several, output comes line by line in turn, numbered. Ends with the exit code of one that fails.
    """
    print("", *(f"$ {command}" for command in commands), sep="\n", flush=True)
    alone = len(commands) == 1
    settings = {"shell": True, "cwd": ROOT, "env": os.environ | PATH | MEMORY, "text": True,
                "stdout": None if alone else subprocess.PIPE}
    processes = [subprocess.Popen(command, **settings) for command in commands]
    for lines in () if alone else zip_longest(*(process.stdout for process in processes), fillvalue=""):
        print(*(f"{i}: {line}" for i, line in enumerate(lines, 1) if line), sep="", end="", flush=True)
    if failed := [code for process in processes if (code := process.wait())]:
        sys.exit(failed[0])


def print_scores(rows, header=True):
    """One line for each (name, CSV of infer.py), means over its cases -> the mean Dice of each."""
    regions = "".join(f"{region:<8}" for region in ("ET", "TC", "WT"))
    columns = [f"{measure}_{region}" for measure in ("dice", "hd95") for region in ("et", "tc", "wt")]
    if header:
        print(f"\n{'test cohort':<24}{'Dice':<32}Hausdorff95, voxels")
        print(f"{'':<24}{regions}{'mean':<8}{regions}cases")
    means = []
    for name, path in rows:
        with open(path, newline="") as file:
            cases = list(csv.DictReader(file))
        et, tc, wt, *distances = (sum(float(case[key]) for case in cases) / len(cases) for key in columns)
        means.append((et + tc + wt) / 3)
        dices = "".join(f"{value:<8.4f}" for value in (et, tc, wt, means[-1]))
        print(f"{name:<24}{dices}" + "".join(f"{value:<8.2f}" for value in distances) + str(len(cases)))
    return means


def main():
    parser = argparse.ArgumentParser(description="The whole paper in miniature, on a synthetic cohort.")
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart",
                        help="gets cohorts, runs, predictions and figure (default: quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of cohorts, weights and samples")
    args = parser.parse_args()
    start, seed = time.monotonic(), args.seed
    out = args.out.resolve()
    if out.exists():
        parser.error(f"--out {out}: is there, expected a new folder")
    at = shlex.quote(str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out))
    print(__doc__.split("\n\n")[2])
    print("\n$ export", *(f"{name}={value}" for name, value in MEMORY.items()))

    # Two cohorts that share neither seed nor names.
    run(f"python examples/phantom.py {at}/train --cases 32 --shape 48 48 40 --seed {seed}")
    run(f"python examples/phantom.py {at}/test --cases 10 --shape 48 48 40 --seed {seed + 1000} --first 500")
    run(f"python data.py {at}/train")
    for pair in (0, 1), (2, 3):    # two networks at a time, each on a core of its own
        run(*(f"OMP_NUM_THREADS=1 python train.py --data {at}/train --folds {len(FOLDS)} --fold {fold} "
              f"--out {at}/fold{fold} --epochs 32 --lr 5e-3 --crop 32 32 32 --filters 4 "
              f"--norm instance_affine --pool 4 --dim 48 --workers 1 --seed {seed}" for fold in pair))
    all_four = f"--checkpoints {at}/fold?/best.pt"
    run(f"OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 infer.py {at}/train {all_four} --held-out "
        f"--out {at}/held-out")    # Table 2
    for fold in FOLDS:
        run(f"python infer.py {at}/test --checkpoints {at}/fold{fold}/best.pt --out {at}/test-fold{fold}")
    for method in METHODS:    # section 3.2
        run(f"python infer.py {at}/test {all_four} --ensemble {method} --out {at}/test-{method}")
    run(f"python examples/figure.py --cohort {at}/test --predictions {at}/test-confidence --runs {at}/fold? "
        f"--out {at}/figure.png")

    alone = print_scores([(f"fold {fold} alone", out / f"test-fold{fold}.csv") for fold in FOLDS])
    print_scores([(f"{method} of all four", out / f"test-{method}.csv") for method in METHODS], header=False)
    print(f"Chance moves every row: the four networks differ by up to {max(alone) - min(alone):.4f} in mean "
          "Dice, and but for their folds they are trained alike; another --seed or machine moves rows too.")
    minutes = (time.monotonic() - start) / 60
    print(f"\n{at}/figure.png shows a case of the test cohort; done in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
