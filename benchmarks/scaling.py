"""How the cost grows: with the crop, the filters, the cores, the ranks and the maps to ensemble; what the paper's run would take; and
whether predicting the brain's window alone loses anything.

    python benchmarks/scaling.py [--quickstart quickstart] [--csv FILE]

Six minutes on two cores. A median of five each, after a warm-up; everything is measured on this machine but the rows marked as a model.
--quickstart is the folder of a run of examples/quickstart.py: with it, the last question is answered by that run's networks on its test cases.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import speed
from data import find_cases, labels_to_regions, load_case, normalize, regions_to_labels
from ensemble import METHODS
from infer import choose_precision, choose_window, dice, keep_memory, load_checkpoint, predict, write_csv

STEPS_OF_A_FOLD = 300 * 1001 / 4    # section 4: 300 epochs of four fifths of 1,251 cases, four a step
TFLOP_OF_A_STEP = 17.7              # counted: 32 filters, two views of 192x192x144, forward and backward


def median(function):
    function()
    return statistics.median(speed.seconds(function) for _ in range(5))


def step(filters, crop):
    """-> seconds and TFLOP of a training step, as benchmarks/speed.py times it"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, _ = speed.two_networks(filters, device)
    x, target = torch.randn(2, 4, *crop, device=device), torch.rand(2, 3, *crop, device=device) < 0.2
    take = speed.our_step(network, 32, 8, x, target, choose_precision("auto", device))
    with speed.FlopCounterMode(display=False) as flops:
        take()
    return median(take), flops.get_total_flops() / 1e12


def step_rows():
    voxels = {}
    for crop in ((32, 32, 32), (64, 64, 48), (96, 96, 80), (128, 128, 96)):
        voxels[crop] = took, tflop = step(16, crop)
        yield "crop, 16 filters", "x".join(map(str, crop)), took, f"{tflop / took:.2f} TFLOP/s"
    for filters in (8, 16, 32):
        took, tflop = step(filters, (64, 64, 48))
        yield "filters, 64x64x48", filters, took, f"{tflop / took:.2f} TFLOP/s"
    rate = tflop / took
    yield "the paper's step: a model", "32 filters, 192x192x144", TFLOP_OF_A_STEP / rate, f"at {rate:.2f} TFLOP/s, the row above's"
    fold = TFLOP_OF_A_STEP / rate * STEPS_OF_A_FOLD
    yield "the paper's fold: a model", "300 epochs on four such machines", fold, f"{fold / 86400:.0f} days"
    for cores in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(cores)
        yield "cores, 16 filters, 64x64x48", cores, step(16, (64, 64, 48))[0], ""


def rank_rows():
    """train.py itself, a core a rank: seconds a case in the second of two epochs."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, speed.ROOT / "examples" / "phantom.py", f"{scratch}/cohort", "--cases", "12", "--shape", "64", "64", "48"], check=True,
                       stdout=subprocess.DEVNULL)
        for ranks in range(1, os.cpu_count() + 1):
            subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", speed.ROOT / "train.py", "--data", f"{scratch}/cohort",
                            "--fold", "all", "--out", f"{scratch}/{ranks}", "--epochs", "2", "--crop", "64", "64", "48", "--filters", "16", "--pool", "8",
                            "--dim", "32", "--workers", "1"], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            with open(f"{scratch}/{ranks}/log.csv", newline="") as file:
                rate = float(list(csv.DictReader(file))[1]["cases_per_second"])
            yield "ranks of one core, 16 filters, 64x64x48", ranks, 1 / rate, "seconds a case"


def ensemble_rows():
    for n in (2, 5, 10, 20):
        maps = torch.rand(n, 3, 240, 240, 155)
        for name, method in METHODS.items():
            yield f"maps of 240x240x155, {name}", n, median(lambda: method(maps)), ""


def window_rows(folder):
    """Dice over the brain's window against Dice over the whole volume, by the same network."""
    for path in sorted(folder.glob("**/best.pt")):
        checkpoint, precision = load_checkpoint(path), choose_precision("auto", torch.device("cpu"))
        scores = []
        for case in find_cases(folder / "test"):
            image, target, _ = load_case(case)
            image = normalize(image)
            whole = tuple(-(-side // 8) * 8 for side in image.shape[1:])
            for roi in (choose_window(image, checkpoint["settings"]["crop"]), whole):
                with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
                    painted = labels_to_regions(regions_to_labels(predict(checkpoint["model"], image, roi) > 0.5))
                scores.append(sum(dice(p, t) for p, t in zip(painted, target)) / 3)
        window, volume = (statistics.mean(scores[which::2]) for which in (0, 1))
        yield f"mean Dice, {path.parent.name}", "the brain's window", window, f"whole volume {volume:.4f}, difference {window - volume:+.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quickstart", type=Path, help="folder of a run of examples/quickstart.py")
    parser.add_argument("--csv", type=Path, default=Path("scaling.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        keep_memory()    # as train.py and infer.py do
    rows = []
    for generator in (step_rows(), rank_rows(), ensemble_rows(), window_rows(args.quickstart) if args.quickstart else ()):
        for what, size, value, note in generator:
            rows.append({"what": what, "size": size, "seconds": f"{value:.4g}", "note": note})
            print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
