"""The ablation that the paper lacks: does the Barlow Twins term help, does the confidence ensemble help, on held-out cases.

    python benchmarks/ablation.py                   # the synthetic study of RESULTS.md; hours, --jobs runs beside each other
    python benchmarks/ablation.py --quick           # all of it in miniature, some minutes
    python benchmarks/ablation.py --data DIR        # the same study on BraTS, at the paper's size; wants a GPU
    python benchmarks/tables.py OUT                 # the tables again, out of the CSVs; figures.py for the plots

A run is one network trained by this file's own loop over the project's functions, on one device, for a fixed number of steps, and
judged by its last weights: nothing is selected on the cases it is tested on. Both arms of a pair start from the same weights and see the
same crops and the same views. Writes OUT/runs/<run>.csv and OUT/models/<run>.pt as runs end; started again, it skips those. At the end
OUT/scores.csv has a row a run and case, OUT/maps.csv one a map and region, OUT/ensembles.csv one a case, region and way to merge.
"""

import argparse
import csv
import itertools
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import phantom  # noqa: E402
import tables  # noqa: E402
from barlow import Projector, barlow_twins_loss, cross_correlation, soft_dice_loss  # noqa: E402
from data import (REGIONS, augment, case_generator, find_cases, labels_to_regions, load_case, normalize, random_crop,  # noqa: E402
                  regions_to_labels, show_progress, split_folds)
from ensemble import METHODS, confidence  # noqa: E402
from infer import COLUMNS, choose_window, dice, move_to, predict, score, write_csv  # noqa: E402
from segresnet import SegResNet  # noqa: E402
from train import Crops, choose_precision, epoch_order, save_checkpoint  # noqa: E402


class Size(NamedTuple):
    """How large the study is."""

    shape: tuple        # of a synthetic case
    crop: tuple
    filters: int
    pool: int           # of the projector, and its width: about ten rows a dimension, the paper's ratio
    dim: int
    steps: int
    lr: float
    few: int            # training cases; "many" are all that are not tested on, at most
    many: int
    test: int           # held-out cases
    seeds: int          # of the primary comparison
    secondary_seeds: int
    fold_seeds: int     # five networks each


# The paper's 240x240x155 volumes and 192x192x144 crops at a quarter of the resolution; 384 rows, twelve a dimension.
PHANTOM = Size((60, 60, 40), (48, 48, 40), 8, 6, 32, 300, 3e-3, 10, 60, 40, 5, 3, 2)
QUICK = Size((36, 36, 32), (32, 32, 24), 8, 4, 32, 12, 5e-3, 4, 10, 4, 2, 1, 1)
BRATS = Size(None, (192, 192, 144), 32, 16, 128, 18_000, 1e-4, 10, 60, 40, 5, 3, 2)

# Two synthetic cohorts, by the phantom's knobs
COHORTS = {
    "easy": {"NOISE": (0.01, 0.03), "BIAS": (0.03, 0.08), "P_LOOKALIKE": 0.0},
    "hard": {"NOISE": (0.06, 0.12), "BIAS": (0.20, 0.35), "P_LOOKALIKE": 0.6},
}


class Arm(NamedTuple):
    weight: float           # of the Barlow Twins term; 0: no projector
    views: int = 2
    lambd: float = 0.005
    centred: bool = True    # False: Eq. 2 as printed
    mlp: bool = True        # False: Eq. 2 on the pooled features themselves
    pool: int = 0           # 0: the study's
    dim: int = 0


def arms(size):
    """name -> Arm: the two of the primary comparison, then the secondary ones."""
    w = 1 / size.dim
    finer = max(size.pool * 2 // 3, 1)
    return {
        "without": Arm(0.0),
        "with": Arm(w),
        "one view": Arm(0.0, views=1),
        "weight 1/(4 dim)": Arm(w / 4),
        "weight 4/dim": Arm(4 * w),
        "weight 1": Arm(1.0),
        "lambda 0": Arm(w, lambd=0.0),
        "uncentred": Arm(w, centred=False),
        "no MLP": Arm(1 / size.filters, mlp=False),
        "finer cells": Arm(w / 4, pool=finer, dim=4 * size.dim),    # 1/dim of its own
    }


class Run(NamedTuple):
    """One network. `fold` is -1 but for the ensemble's, which hold a fifth of `cases` out."""

    cohort: str
    cases: int
    arm: str
    seed: int
    fold: int = -1

    @property
    def name(self):
        words = [self.cohort, self.cases, self.arm, f"seed {self.seed}"] + ([f"fold {self.fold}"] if self.fold >= 0 else [])
        return "-".join(map(str, words)).replace(" ", "_").replace("/", "_over_")


def plan(size, cohorts):
    """All runs, so ordered that what is done first already makes pairs."""
    runs = []
    hard = list(cohorts)[-1]
    for seed in range(size.seeds):
        runs += [Run(cohort, cases, arm, seed) for cohort in cohorts for cases in (size.few, size.many) for arm in ("without", "with")]
        if seed < size.fold_seeds:
            runs += [Run(hard, size.many, "with", seed, fold) for fold in range(5)]
        if seed < size.secondary_seeds:
            runs += [Run(hard, size.many, arm, seed) for arm in list(arms(size))[2:]]
    return runs


# ---- cases ------------------------------------------------------------------------------------------------------------


def make_cohorts(folder, size):
    """The synthetic cohorts as NIfTI files -> {name: folder}."""
    for name, knobs in COHORTS.items():
        if (folder / name).is_dir():
            continue
        for knob, value in knobs.items():
            setattr(phantom, knob, value)
        partial = folder / f".{name}.{os.getpid()}"
        for number in range(size.many + size.test):
            images, labels = phantom.make_case(size.shape, 0, number)
            case = partial / f"BraTS2021_{number:05d}"
            case.mkdir(parents=True)
            for suffix, volume in zip((*phantom.MODALITIES, "seg"), (*images, labels)):
                phantom.save(case / f"{case.name}_{suffix}.nii.gz", volume)
        os.replace(partial, folder / name)
    return {name: folder / name for name in COHORTS}


def divide(folder, run, size):
    """-> the cases to train on, to validate (a fold's run alone) and to test on, the last the same for every run of a cohort."""
    order = split_folds(find_cases(folder), folds=1, seed=0)[0]
    order = [case for fold in split_folds(order, folds=len({case.patient for case in order}), seed=0) for case in fold]    # shuffled
    test, rest = order[: size.test], order[size.test : size.test + size.many]
    if run.fold >= 0:
        val = split_folds(rest, folds=5, seed=run.seed)[run.fold]
        return [case for case in rest if case not in val], val, test
    mine = [case for fold in split_folds(rest, folds=len({case.patient for case in rest}), seed=run.seed + 1) for case in fold]
    return mine[: run.cases], [], test


CONDITIONS = ("as trained", "bias field", "contrast", "noise")


def perturb(image, condition, generator):
    """A case as stored, (4, D, H, W), under what no training sample had; zeros stay zero. Every channel by itself.

    bias field: times exp(0.35 s), s smooth with sd 1. contrast: a power of 4 to 5 or its inverse. noise: 2 sd of the brain's voxels.
    """
    brain = image != 0
    image = image.clone()
    for channel, inside in zip(image, brain):
        u, v = torch.rand(2, generator=generator).tolist()
        if condition == "bias field":
            s = F.interpolate(torch.randn(1, 1, 3, 3, 3, generator=generator), channel.shape, mode="trilinear", align_corners=True)[0, 0]
            channel *= torch.exp(0.35 * s / s.std())
        elif condition == "contrast":
            most = channel.max()
            power = 4 + u
            channel.copy_(most * (channel.clamp_min(0) / most) ** (power if v < 0.5 else 1 / power))
        elif condition == "noise":
            channel += 2 * channel[inside].std() * torch.randn(channel.shape, generator=generator)
    return image * brain


# ---- one run ----------------------------------------------------------------------------------------------------------


def redundancy_reduction(z_a, z_b, arm):
    if arm.centred:
        return barlow_twins_loss(z_a, z_b, arm.lambd)
    c = F.normalize(z_a, dim=0).T @ F.normalize(z_b, dim=0)    # Eq. 2 to the letter
    on_diagonal = c.diagonal()
    return ((1 - on_diagonal) ** 2).sum() + arm.lambd * ((c - torch.diag(on_diagonal)) ** 2).sum()


def train(run, arm, size, cases, device):
    """The loop of train.py in short. -> network, projector or None, autocast"""
    torch.manual_seed(run.seed)
    network = move_to(device, SegResNet(filters=size.filters))
    projector = None
    if arm.weight:
        projector = Projector(size.filters, arm.dim or size.dim, arm.pool or size.pool).to(device)
        if not arm.mlp:
            projector.mlp = nn.Identity()
    parameters = [*network.parameters(), *(projector.parameters() if projector else [])]
    optimizer = torch.optim.AdamW(parameters, lr=size.lr, weight_decay=1e-5)
    precision = choose_precision("auto", device)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

    epochs = math.ceil(size.steps / len(cases))
    schedule = [(epoch, case) for epoch in range(epochs) for case in epoch_order(cases, run.seed, epoch, 1)][: size.steps]
    workers = min(8, os.cpu_count()) if device.type == "cuda" else 0
    for step, (image, labels, views_seed, _) in enumerate(DataLoader(Crops(schedule, size.crop, run.seed), batch_size=None, num_workers=workers)):
        for group in optimizer.param_groups:
            group["lr"] = size.lr * 0.5 * (1 + math.cos(math.pi * step / size.steps))
        x = image.to(device).float().expand(arm.views, -1, -1, -1, -1)
        labels = labels.to(device).expand(arm.views, -1, -1, -1, -1)
        x, labels = augment(x, labels, torch.Generator(device).manual_seed(views_seed))
        p_true = labels_to_regions(labels[:, 0], cases[0].et_label)
        with autocast:
            features = network.features(x)
            logits = network.decoder_end(features)
        loss = soft_dice_loss(torch.sigmoid(logits.float()), p_true)
        if projector is not None:
            loss = loss + arm.weight * redundancy_reduction(projector(features[:1]), projector(features[1:]), arm)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return network.eval(), projector, autocast


def diagonal_and_rest(c):
    """Of a correlation matrix: the mean of its diagonal and the root mean square of what is off it."""
    on_diagonal = c.diagonal()
    rest = c - torch.diag(on_diagonal)
    return float(on_diagonal.mean()), float((rest**2).sum() / (c.numel() - len(c))) ** 0.5


@torch.no_grad()
def look_at_features(network, projector, image, target, crop, pool, generator, device):
    """Two augmented views of a held-out crop: Eq. 2 on the pooled features and on z, and the features' effective rank over the brain.

    Effective rank: exp of the entropy of the eigenvalues of the features' correlation matrix; 1 to `filters`.
    """
    image, target = random_crop(image, target, crop, generator)
    x = image.to(device).expand(2, -1, -1, -1, -1)
    x, _ = augment(x, target.to(device).expand(2, -1, -1, -1, -1), torch.Generator(device).manual_seed(1))
    f = network.features(x).float()    # (2, C, D, H, W)
    rows = F.avg_pool3d(f, pool).flatten(2).transpose(1, 2)    # (2, cells, C)
    on, off = diagonal_and_rest(cross_correlation(*rows))
    z_on = z_off = ""
    if projector is not None:
        z_on, z_off = diagonal_and_rest(cross_correlation(projector(f[:1]), projector(f[1:])))
    inside = f[0][:, (x[0] != 0).any(0)]    # (C, voxels)
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(inside.double()).nan_to_num()).clamp_min(1e-12)
    spectrum = spectrum / spectrum.sum()
    return {"c_diagonal": on, "c_off_diagonal": off, "z_diagonal": z_on, "z_off_diagonal": z_off,
            "effective_rank": float(torch.exp(-(spectrum * spectrum.log()).sum()))}


FEATURES = ("c_diagonal", "c_off_diagonal", "z_diagonal", "z_off_diagonal", "effective_rank")


def do_run(run, size, folder, out, device):
    """Trains and tests one network; its rows go to OUT/runs, its weights to OUT/models."""
    arm, start = arms(size)[run.arm], time.monotonic()
    train_cases, val_cases, test_cases = divide(folder, run, size)
    network, projector, autocast = train(run, arm, size, train_cases, device)
    seconds = time.monotonic() - start
    rows = []
    for condition, cases in [("validation", val_cases)] + [(condition, test_cases) for condition in CONDITIONS]:
        for case in cases:
            stored, target, affine = load_case(case)
            image = normalize(perturb(stored, condition, case_generator(0, 0, f"{case.name} {condition}")))
            with autocast:
                probabilities = predict(network, image, choose_window(image, size.crop))
            labels = regions_to_labels(probabilities > 0.5, case.et_label)
            scores = score(labels, target, case.et_label, torch.tensor(affine[:3, :3]).norm(dim=0).tolist())
            features = dict.fromkeys(FEATURES, "")
            if condition == "as trained":
                with autocast:
                    features = look_at_features(network, projector, image, target, size.crop, arm.pool or size.pool,
                                                case_generator(0, 0, case.name), device)
            row = {**run._asdict(), "condition": condition, "case": case.name, **dict(zip(COLUMNS, scores)), **features}
            rows.append({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
    save_checkpoint(out / "models" / f"{run.name}.pt", {"model": network.state_dict(), "seconds": seconds})
    write_csv(out / "runs" / f"{run.name}.csv", rows)
    return seconds


# ---- the ensemble -----------------------------------------------------------------------------------------------------


def weighted_ensemble(maps):
    """Section 3.2's alternative, which the paper drops: all maps, weighted by their confidence. (N, C, D, H, W) -> (C, D, H, W)"""
    weights = confidence(maps).nan_to_num(0.0)    # (N, C), empty maps count nothing
    weights = torch.where(weights.sum(0) > 0, weights, 1.0)
    return ((weights / weights.sum(0))[..., None, None, None] * maps).sum(0)


def do_ensembles(cohort, seed, size, folder, out, device):
    """Merges the five folds' networks in every way, for each test case; rows to OUT/runs/ensembles-<seed>.csv and maps-<seed>.csv."""
    runs = [Run(cohort, size.many, "with", seed, fold) for fold in range(5)]
    models, validation = [], []
    for run in runs:
        model = SegResNet(filters=size.filters)
        model.load_state_dict(torch.load(out / "models" / f"{run.name}.pt", weights_only=True)["model"])
        models.append(model.eval().to(device))
        with open(out / "runs" / f"{run.name}.csv", newline="") as file:
            held_out = [row for row in csv.DictReader(file) if row["condition"] == "validation"]
        validation.append(sum(float(row[column]) for row in held_out for column in COLUMNS[:3]) / len(held_out) / 3)
    best = max(range(5), key=validation.__getitem__)
    ways = {"mean": METHODS["mean"], "geometric mean": METHODS["geometric"], "top N/2 by confidence": METHODS["confidence"],
            "weighted by confidence": weighted_ensemble}
    precision = choose_precision("auto", device)
    mirrorings = [axes for k in range(4) for axes in itertools.combinations((1, 2, 3), k)]
    map_rows, rows = [], []
    for case in divide(folder, runs[0], size)[2]:
        stored, target, _ = load_case(case)
        image = normalize(stored)
        roi = choose_window(image, size.crop)
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            all_maps = torch.stack([torch.stack([predict(model, image.flip(axes), roi).flip(axes) for axes in mirrorings])
                                    for model in models])    # (5, 8, 3, D, H, W)
        about = {"cohort": cohort, "seed": seed, "case": case.name}
        for model, mirrored in enumerate(all_maps):
            scores = confidence(mirrored)    # (8, 3)
            for flip, r in itertools.product(range(8), range(3)):
                region = mirrored[flip, r] > 0.5
                map_rows.append({**about, "model": model, "flip": flip, "region": REGIONS[r], "dice": f"{dice(region, target[r]):.5g}",
                                 "confidence": f"{float(scores[flip, r]):.5g}", "voxels": int(region.sum()), "truth": int(target[r].sum())})
        candidates = {"5 maps": all_maps[:, 0], "5 maps, flips averaged": all_maps.mean(1), "40 maps": all_maps.flatten(0, 1)}
        for maps_name, maps in candidates.items():
            merged = {way: merge(maps) for way, merge in ways.items()}
            if len(maps) == 5:
                merged["best single"] = maps[best]
                merged |= {f"single {i}": maps[i] for i in range(5)}
            for way, probabilities in merged.items():
                painted = labels_to_regions(regions_to_labels(probabilities > 0.5))
                for r, region in enumerate(REGIONS):
                    rows.append({**about, "maps": maps_name, "way": way, "region": region, "dice": f"{dice(painted[r], target[r]):.5g}"})
    write_csv(out / "runs" / f"maps-{seed}.csv", map_rows)
    write_csv(out / "runs" / f"ensembles-{seed}.csv", rows)
    return 0.0


# ---- the command ------------------------------------------------------------------------------------------------------


def work(task):
    """One task in a process of its own: (function, its arguments)."""
    function, arguments = task
    if arguments[-1].type == "cpu":
        torch.set_num_threads(1)    # runs beside each other use cores better than threads within one
    return function(*arguments)


def gather(paths, target):
    """The rows of many CSVs into one."""
    rows = []
    for path in paths:
        with open(path, newline="") as file:
            rows += csv.DictReader(file)
    write_csv(target, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help="a BraTS cohort of at least 50 cases, trained on at the paper's size (default: synthetic)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="runs that are finished there are not done again")
    parser.add_argument("--quick", action="store_true", help="every part, but small, short and with few seeds")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(), help="runs at a time")
    args = parser.parse_args()
    size = QUICK if args.quick else BRATS if args.data else PHANTOM
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in ("runs", "models"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    cohorts = {"BraTS": args.data} if args.data else make_cohorts(args.out / "cohorts", size)
    runs, hard = plan(size, cohorts), list(cohorts)[-1]

    def finish(tasks, what):
        """Does the tasks that no file of OUT/runs says are done."""
        open_tasks = [task for name, task in tasks.items() if not (args.out / "runs" / f"{name}.csv").exists()]
        start = time.monotonic()
        print(f"{len(tasks)} {what}, {len(open_tasks)} to do, {args.jobs} at a time on {device}", flush=True)
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            for done, future in enumerate(as_completed([pool.submit(work, task) for task in open_tasks]), 1):
                future.result()
                show_progress(what, done, len(open_tasks), start)

    finish({run.name: (do_run, (run, size, cohorts[run.cohort], args.out, device)) for run in runs}, "networks")
    finish({f"ensembles-{seed}": (do_ensembles, (hard, seed, size, cohorts[hard], args.out, device)) for seed in range(size.fold_seeds)},
           "ensembles")
    gather([args.out / "runs" / f"{run.name}.csv" for run in runs], args.out / "scores.csv")
    for name in ("maps", "ensembles"):
        gather([args.out / "runs" / f"{name}-{seed}.csv" for seed in range(size.fold_seeds)], args.out / f"{name}.csv")
    tables.print_all(args.out)


if __name__ == "__main__":
    main()
