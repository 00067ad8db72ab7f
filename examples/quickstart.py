"""The whole paper in miniature, on a synthetic cohort: no data to download, no GPU.

    python examples/quickstart.py [--out quickstart] [--seed 0]

Runs the project's own commands one after the other and prints each before it runs.
Settings that are not the paper's, so that a CPU will do, with the paper's in brackets:
32 synthetic cases [1,251 patients] of 48x48x40 voxels [240x240x155], 4 folds [5],
40 epochs of 12 steps [300 of 250], crops of 32x40x40 [192x192x144], 8 filters [32],
--lr 5e-3 [1e-4], --norm instance_affine [instance].
--pool 4 [16] and --dim 64 [128] follow from the crop: 800 rows [1,296], 12 a dimension [10].
The scores say that the pieces fit together, and nothing about patients.
"""
import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDS = range(4)
METHODS = "mean", "geometric", "confidence"
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}    # glibc keeps what was freed
PATH = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}    # this python's torchrun


def run(command):
    """Prints a line of shell and runs it in the project's folder; ends with its exit code if it fails."""
    print(f"\n$ {command}", flush=True)
    code = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | PATH | MEMORY).returncode
    if code:
        sys.exit(code)


def print_scores(rows):
    """One line for each (name, CSV of infer.py): mean Dice and HD95 over its cases."""
    regions = "".join(f"{region:<8}" for region in ("ET", "TC", "WT"))
    columns = [f"{measure}_{region}" for measure in ("dice", "hd95") for region in ("et", "tc", "wt")]
    print(f"\n{'test cohort':<24}{'Dice':<32}Hausdorff95, mm\n{'':<24}{regions}{'mean':<8}{regions}cases")
    for name, path in rows:
        with open(path, newline="") as file:
            cases = list(csv.DictReader(file))
        et, tc, wt, *distances = (sum(float(case[key]) for case in cases) / len(cases) for key in columns)
        dices = "".join(f"{value:<8.4f}" for value in (et, tc, wt, (et + tc + wt) / 3))
        print(f"{name:<24}{dices}" + "".join(f"{value:<8.2f}" for value in distances) + str(len(cases)))


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
    for fold in FOLDS:
        run(f"OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py --data {at}/train --folds {len(FOLDS)} "
            f"--fold {fold} --out {at}/fold{fold} --epochs 40 --lr 5e-3 --crop 32 40 40 --filters 8 "
            f"--norm instance_affine --pool 4 --dim 64 --workers 1 --seed {seed}")
    all_four = f"--checkpoints {at}/fold?/best.pt"
    run(f"python infer.py {at}/train {all_four} --held-out --out {at}/held-out")    # Table 2
    for fold in FOLDS:
        run(f"python infer.py {at}/test --checkpoints {at}/fold{fold}/best.pt --out {at}/test-fold{fold}")
    for method in METHODS:    # section 3.2
        run(f"python infer.py {at}/test {all_four} --ensemble {method} --out {at}/test-{method}")
    run(f"python examples/figure.py --cohort {at}/test --predictions {at}/test-confidence --runs {at}/fold? "
        f"--out {at}/figure.png")

    print_scores([(f"fold {fold} alone", out / f"test-fold{fold}.csv") for fold in FOLDS]
                 + [(f"{method} of all four", out / f"test-{method}.csv") for method in METHODS])
    print("Rounding and the seed move these figures too: --seed 1 with another --out shows how far.")
    minutes = (time.monotonic() - start) / 60
    print(f"\n{at}/figure.png shows a case of the test cohort; done in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
