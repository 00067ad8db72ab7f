"""The whole paper in miniature, on a synthetic cohort: some minutes on two cores, no data to download.

    python examples/quickstart.py [--out quickstart] [--seed 0]

Runs the project's own commands one after the other and prints each before it runs; they can be typed by hand just as well.
Settings that are not the paper's, to be done in minutes on a CPU: 32 synthetic cases of 64x64x48 voxels for 1,251 real ones
of 240x240x155, 2 folds for 5, 15 epochs for 300, --lr 5e-3 for 1e-4 (there are 120 steps for 75,000), crops of 48x48x40
for 192x192x144 (0.75 to 0.83 of a side for 0.80 to 0.93), 8 filters for 32; --pool 8 and --dim 16 follow from the crop (180 rows, eleven
a dimension; the paper's crop gives ten). The scores say that the pieces fit together, and nothing about BraTS.
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
FOLDS = (0, 1)
METHODS = ("mean", "geometric", "confidence")


def run(command):
    """Prints a command line and runs it in the project's folder; `python` and `torchrun` are this interpreter's own."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    settings = dict(word.split("=") for word in words if "=" in word and not word.startswith("-"))
    program, *arguments = words[len(settings):]
    launcher = [sys.executable] if program == "python" else [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env={**os.environ, **settings})
    if done.returncode:
        sys.exit(done.returncode)


def summary(folders):
    """One line a folder of scored predictions: mean Dice and HD95 by region, out of FOLDER.csv."""
    columns = [f"{score}_{region}" for score in ("dice", "hd95") for region in ("et", "tc", "wt")]
    print(f"\n{'test cohort':<24}{'Dice':<32}Hausdorff95, mm")
    print(f"{'':<24}{'ET':<8}{'TC':<8}{'WT':<8}{'mean':<8}{'ET':<8}{'TC':<8}{'WT':<8}cases")
    for name, folder in folders.items():
        with open(folder.with_name(f"{folder.name}.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        et, tc, wt, *distances = (sum(float(row[column]) for row in rows) / len(rows) for column in columns)
        dices = "".join(f"{value:<8.4f}" for value in (et, tc, wt, (et + tc + wt) / 3))
        print(f"{name:<24}{dices}" + "".join(f"{value:<8.2f}" for value in distances) + str(len(rows)))


def main():
    parser = argparse.ArgumentParser(description="The whole paper in miniature, on a synthetic cohort.")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="gets cohorts, runs, predictions and figure (default: quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of cohorts, weights and samples; another seed wants another --out")
    args = parser.parse_args()
    out, start = args.out.resolve(), time.monotonic()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    quoted = shlex.quote(str(out))
    print(__doc__.split("\n\n")[2])

    # two cohorts that share neither seed nor names
    run(f"python examples/phantom.py {quoted}/train --cases 32 --shape 64 64 48 --seed {args.seed}")
    run(f"python examples/phantom.py {quoted}/test --cases 10 --shape 64 64 48 --seed {args.seed + 1000} --first 500")
    run(f"python data.py {quoted}/train")

    for fold in FOLDS:
        run(f"OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py --data {quoted}/train --folds 2 --fold {fold} --out {quoted}/fold{fold} "
            f"--epochs 15 --lr 5e-3 --crop 48 48 40 --filters 8 --pool 8 --dim 16 --workers 1 --seed {args.seed}")

    checkpoints = " ".join(f"{quoted}/fold{fold}/best.pt" for fold in FOLDS)
    run(f"python infer.py {quoted}/train --checkpoints {checkpoints} --held-out --out {quoted}/held-out")    # Table 2

    for fold in FOLDS:
        run(f"python infer.py {quoted}/test --checkpoints {quoted}/fold{fold}/best.pt --probabilities --out {quoted}/test-fold{fold}")
    maps = " ".join(f"{quoted}/test-fold{fold}/probabilities" for fold in FOLDS)
    for method in METHODS:
        run(f"python ensemble.py --method {method} --out {quoted}/test-{method} {maps}")
        run(f"python infer.py --score {quoted}/test-{method} --truth {quoted}/test")

    runs = " ".join(f"{quoted}/fold{fold}" for fold in FOLDS)
    run(f"python examples/figure.py --cohort {quoted}/test --predictions {quoted}/test-confidence --runs {runs} --out {quoted}/figure.png")

    folders = {f"fold {fold} alone": f"test-fold{fold}" for fold in FOLDS} | {f"{method} of both": f"test-{method}" for method in METHODS}
    summary({name: ROOT / out / folder for name, folder in folders.items()})
    print(f"\n{out}/figure.png shows a case of the test cohort; done in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
