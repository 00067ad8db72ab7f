"""The ablation that the paper lacks: the Barlow Twins term, and merging by confidence, against their absence.

    python benchmarks/ablation.py                        # phantoms of 4 mm, an easy and a hard cohort
    python benchmarks/ablation.py --data DIR             # your cases made smaller, 4 mm; needs no GPU
    python benchmarks/ablation.py --data DIR --scale 1   # your cases at the paper's size; wants a GPU
    python benchmarks/ablation.py --quick                # every part in miniature, with or without --data
    python benchmarks/tables.py OUT                      # the tables again, out of the CSVs

A network takes a fixed number of train.py's steps, and its last weights are judged: nothing is selected on
the cases it is tested on. All arms of a seed start from the same weights and see the same crops and views.
A cohort is one case a patient, at most 100, in an order that names decide. Of every seven cases five are to
train on, at most 60; the rest is held out. A quarter of the former, at most 10, are the few training cases:
56 cases are 40 or 10 to train on, and 16 held out.

Started again, it skips the networks that OUT has. At the end OUT/scores.csv has a row a network and case,
OUT/maps.csv a row a map and region, OUT/ensembles.csv a row a case, region and way to merge. On a CPU,
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 in front of the command saves time.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import nibabel as nib
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import barlow
import data
import ensemble
import infer
import phantom
import tables
import train
from segresnet import SegResNet

# ---- what is compared --------------------------------------------------------------------------------------

# Seeds: of the term and its absence; of its variants, where 0 leaves out few training cases as well; of the
# ensemble, five networks each.
Size = namedtuple("Size", "crop filters pool dim steps lr seeds variant_seeds fold_seeds")
SIZES = {4: Size((48, 48, 40), 8, 6, 32, 300, 3e-3, 5, 3, 2),    # of --scale
         2: Size((96, 96, 80), 8, 8, 128, 300, 3e-3, 3, 0, 1),
         1: Size((192, 192, 144), 32, 16, 128, 18_000, 1e-4, 5, 3, 2)}
QUICK = Size((24, 24, 16), 8, 4, 16, 4, 5e-3, 2, 1, 1)
PHANTOMS = {    # cohorts, by the knobs of phantom.py
    "easy": {"NOISE": (0.01, 0.03), "BIAS": (0.03, 0.08), "P_LOOKALIKE": 0.0},
    "hard": {"NOISE": (0.06, 0.12), "BIAS": (0.20, 0.35), "P_LOOKALIKE": 0.6}}


def view_a_twice(images, targets, generator):
    """`augment`, whose second view is the first once more: loss and gradient are those of one view."""
    return tuple(views[:1].expand_as(views) for views in data.augment(images, targets, generator))


def uncentred_correlation(z_a, z_b):
    """Eq. 2 to the letter: z is not centred over the rows."""
    return F.normalize(z_a, dim=0).T @ F.normalize(z_b, dim=0)


class Arm(NamedTuple):
    """What a network is trained with."""

    weight: float       # of Eq. 3
    pool: int
    dim: int
    lambd: float = 0.005
    mlp: bool = True    # False: Eq. 2 on the pooled features themselves
    instead: tuple = (train, "augment", data.augment)    # module, name, and what stands there


def arms(size):
    """name -> Arm: the two of the primary comparison, then the term's variants."""
    weight, usual = 1 / size.dim, (size.pool, size.dim)
    return {
        "without": Arm(0, *usual),
        "with": Arm(weight, *usual),
        "one view": Arm(0, *usual, instead=(train, "augment", view_a_twice)),
        "weight 1/(4 dim)": Arm(weight / 4, *usual),
        "weight 4/dim": Arm(4 * weight, *usual),
        "weight 1": Arm(1, *usual),
        "lambda 0": Arm(weight, *usual, lambd=0),
        "uncentred": Arm(weight, *usual, instead=(barlow, "cross_correlation", uncentred_correlation)),
        "no MLP": Arm(1 / size.filters, *usual, mlp=False),
        "finer cells": Arm(weight / 4, size.pool * 2 // 3, 4 * size.dim)}    # 1/dim of its own


class Run(NamedTuple):
    """One network."""

    cohort: str
    cases: int
    arm: str
    seed: int
    fold: int = -1    # which fifth of the cases it validates on; -1: none

    @property
    def name(self):
        return "_".join(map(str, self)).replace(" ", "_").replace("/", "_")    # of files


def plan(size, cohorts):
    """All runs on {name: (held out, rest)}, so ordered that what is done first already makes pairs."""
    runs, last = [], list(cohorts)[-1]    # variants and ensembles are of the last cohort
    many = len(cohorts[last][1])
    numbers = [min(math.ceil(many / 4), 10), many] if size.variant_seeds else [many]
    for seed in range(size.seeds):
        runs += [Run(*which, seed) for which in itertools.product(cohorts, numbers, ("without", "with"))]
        if seed < size.fold_seeds:
            runs += [Run(last, many, "with", seed, fold) for fold in range(5)]
        if seed < size.variant_seeds:
            runs += [Run(last, many, arm, seed) for arm in list(arms(size))[2:]]
    return runs


# ---- cases -------------------------------------------------------------------------------------------------


def shuffled(cases, seed):
    """Cases of different patients in the order in which `split_folds` deals them out."""
    return sorted(cases, key=lambda case: sha256(f"{seed} {case.patient}".encode()).digest())


def choose_cases(cases):
    """A cohort's cases -> those held out, the rest. Raises InputError for fewer than seven patients."""
    first = {case.patient: case for case in reversed(cases) if case.label}    # its first time point
    if len(first) < 7:
        raise data.InputError(f"--data: {len(first)} patients with a segmentation, expected at least 7")
    chosen = shuffled(first.values(), 0)[:100]
    held_out = len(chosen) - min(len(chosen) // 7 * 5, 60)
    return chosen[:held_out], chosen[held_out:]


def divide(cases, run):
    """The cases that are not held out -> to train on, to validate."""
    if run.fold >= 0:
        val = data.split_folds(cases, 5, run.seed)[run.fold]
        return [case for case in cases if case not in val], val
    return shuffled(cases, run.seed + 1)[: run.cases], []


def make_smaller(image, target, factor):
    """(4, D, H, W) float32 and (3, D, H, W) bool -> the same, each side divided by `factor` and rounded up.

    Zeros fill a last block. An image's block is the mean of its non-zero voxels if at least half are, else 0.
    A region's block is true where more than half of its voxels are.
    """
    pad = [n for side in reversed(image.shape[1:]) for n in (0, -side % factor)]
    image, filled, share = (F.avg_pool3d(F.pad(volume.float(), pad), factor)
                            for volume in (image, image != 0, target))
    return torch.where(filled >= 0.5, image / filled, 0), share > 0.5


def reduce_case(case, scale, target_folder):
    """A case -> its smaller one, in LPS, with BraTS 2021's names and labels."""
    image, target, affine = data.load_case(case)
    image, target = make_smaller(image, target, scale)
    affine[:3, :3] *= scale
    part = target_folder.with_name(f".{case.name}")
    part.mkdir(parents=True, exist_ok=True)
    for kind, volume in zip((*data.MODALITIES, "seg"), (*image, data.regions_to_labels(target))):
        nib.save(nib.Nifti1Image(volume.numpy(), affine), part / f"{case.name}_{kind}.nii.gz")
    os.replace(part, target_folder)


def make_phantom(number, shape, knobs, target_folder):
    for knob, value in knobs.items():
        setattr(phantom, knob, value)
    part = target_folder.parent / ".part"
    phantom.save_case(part, "brats2021", number, *phantom.make_case(shape, 0, number))
    os.replace(part / target_folder.name, target_folder)


def make_cohorts(args, pool):
    """Writes what OUT/cohorts lacks. -> {name: (held out, rest)}. Raises InputError for another's OUT."""
    root = args.out / "cohorts"
    if args.data:
        cases = data.find_cases(args.data, args.names, args.labels)
        print(data.describe(cases))
        tasks = {root / "real" / case.name: (reduce_case, case, args.scale)
                 for case in sum(choose_cases(cases), [])}
    else:
        number = 14 if args.quick else 100
        shape = (32, 32, 32) if args.quick else [side // args.scale for side in (240, 240, 160)]
        tasks = {root / cohort / f"BraTS2021_{i:05}": (make_phantom, i, shape, knobs)
                 for cohort, knobs in PHANTOMS.items() for i in range(number)}
    note, study = args.out / "study.txt", f"--data {args.data} --scale {args.scale} --quick {args.quick}"
    if note.exists() and note.read_text() != study:
        raise data.InputError(f"--out {args.out}: holds that of {note.read_text()}, expected a new folder")
    note.write_text(study)
    do_all(pool, tasks, "cases")
    folders = dict.fromkeys(path.parent for path in tasks)
    return {folder.name: choose_cases(data.find_cases(folder)) for folder in folders}


def perturb(image, condition, generator):
    """A case as stored, (4, D, H, W), under what no training sample had, each channel by itself.

    bias field: times exp(0.35 s), s smooth with sd 1. contrast: a power of 4 to 5 or its inverse. noise: 2 sd
    of the brain's voxels. Zeros stay zero.
    """
    brain = image != 0
    image = image.clone()
    for channel, inside in zip(image, brain):
        u, v = torch.rand(2, generator=generator).tolist()
        if condition == "bias field":
            s = torch.randn(1, 1, 3, 3, 3, generator=generator)
            s = F.interpolate(s, channel.shape, mode="trilinear", align_corners=True)[0, 0]
            channel *= torch.exp(0.35 * s / s.std())
        elif condition == "contrast":
            power = 4 + u if v < 0.5 else 1 / (4 + u)
            channel.copy_(channel.max() * (channel.clamp_min(0) / channel.max()) ** power)
        elif condition == "noise":
            channel += 2 * channel[inside].std() * torch.randn(channel.shape, generator=generator)
    return image * brain


# ---- one network -------------------------------------------------------------------------------------------


def choose_device():
    """-> device, precision, autocast, as train.py would."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = infer.choose_precision("auto", device)
    return device, precision, torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def fit(run, size, cases, cache):
    """`size.steps` of train.py's steps over `cases`, changed as the run's arm says. -> `train.TwoViews`"""
    arm, (device, precision, autocast) = arms(size)[run.arm], choose_device()
    torch.manual_seed(run.seed)
    network = infer.move_to(device, SegResNet(filters=size.filters))
    views = train.TwoViews(network, barlow.Projector(size.filters, arm.dim, arm.pool)).to(device)
    if not arm.mlp:
        views.projector.mlp = nn.Identity()
    optimizer = torch.optim.AdamW(views.parameters(), lr=size.lr, weight_decay=1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    schedule = [(epoch, case) for epoch in range(math.ceil(size.steps / len(cases)))
                for case in train.epoch_order(cases, run.seed, epoch, 1)]
    with patch.object(*arm.instead):
        for step, turn in zip(range(size.steps), schedule):
            image, labels, views_seed, _ = train.draw_sample(turn, size.crop, run.seed, cache)
            for group in optimizer.param_groups:
                group["lr"] = train.cosine(size.lr, step, size.steps)
            losses = train.compute_losses(views, image.to(device), labels.to(device), views_seed, arm.weight,
                                          arm.lambd, autocast)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(losses[0]).backward()
            scaler.step(optimizer)
            scaler.update()
    return views.eval()


@torch.no_grad()
def effective_rank(network, image, target, crop, generator):
    """How many features a held-out crop has, 1 to `filters`.

    exp of the entropy of the eigenvalues of their correlation over the brain.
    """
    device, _, autocast = choose_device()
    crops = data.random_crop(image, target, crop, generator)
    pair = [volume.to(device).expand(2, -1, -1, -1, -1) for volume in crops]
    x, _ = data.augment(*pair, torch.Generator(device).manual_seed(1))
    with autocast:
        features = network.features(x[:1])[0].float()
    inside = features[:, (x[0] != 0).any(0)]    # (C, voxels)
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(inside.double()).nan_to_num()).clamp_min(1e-12)
    spectrum = spectrum / spectrum.sum()
    return float(torch.exp(-(spectrum * spectrum.log()).sum()))


def save_rows(path, rows):
    infer.write_csv(path, [{key: f"{value:.5g}" if isinstance(value, float) else value
                            for key, value in row.items()} for row in rows])


def do_run(run, size, held_out, rest, out, path):
    """Trains and tests one network: its weights to OUT/models, its rows to `path`."""
    train_cases, val_cases = divide(rest, run)
    views, rows = fit(run, size, train_cases, out / "cache"), []
    tests = [("validation", case) for case in val_cases] + [*itertools.product(tables.CONDITIONS, held_out)]
    for condition, case in tests:
        image, target, affine = data.load_case(case)
        image = perturb(image, condition, train.case_generator(0, 0, f"{case.name} {condition}"))
        image, rank = data.normalize(image), ""
        with choose_device()[2]:
            p = infer.predict(views.network, image, infer.choose_window(image, size.crop))
        scores = infer.score(data.regions_to_labels(p > 0.5), target, nib.affines.voxel_sizes(affine))
        if condition == "as trained":
            generator = train.case_generator(0, 0, case.name)
            rank = effective_rank(views.network, image, target, size.crop, generator)
        rows.append({**run._asdict(), "condition": condition, "case": case.name,
                     **dict(zip(infer.COLUMNS, scores)), "effective_rank": rank})
    data.save_tensors(out / "models" / f"{run.name}.pt", views.network.state_dict())
    save_rows(path, rows)


# ---- the ensemble ------------------------------------------------------------------------------------------


def weighted_ensemble(maps):
    """All maps, weighted by their confidence: section 3.2 drops it. (N, C, D, H, W) -> (C, D, H, W)"""
    weights = ensemble.confidence(maps).nan_to_num(0.0)    # (N, C), empty maps count nothing
    weights = torch.where(weights.sum(0) > 0, weights, 1.0)
    return ((weights / weights.sum(0))[..., None, None, None] * maps).sum(0)


WAYS = {"mean": ensemble.mean_ensemble, "geometric mean": ensemble.geometric_mean_ensemble,
        "top N/2 by confidence": ensemble.confidence_ensemble, "weighted by confidence": weighted_ensemble}


def validation_dice(run, out):
    """The Dice of the cases that a fold held out, summed: they are as many in every fold."""
    rows = tables.of(tables.read(out / "scores" / f"{run.name}.csv"), condition="validation")
    return sum(float(row[column]) for row in rows for column in tables.DICE)


def rows_of_maps(maps, target):
    """(5, 8, 3, D, H, W), of networks and mirrorings -> a row a map and region"""
    for model, flip, r in itertools.product(range(5), range(8), range(3)):
        p = maps[model, flip, r]
        yield {"model": model, "flip": flip, "region": data.REGIONS[r],
               "dice": infer.dice(p > 0.5, target[r]),
               "confidence": ensemble.confidence(p[None, None]).item(),
               "voxels": int((p > 0.5).sum()), "truth": int(target[r].sum())}


def rows_of_ensembles(maps, best, target):
    """The same, and which network validates best -> a row a way to merge and region"""
    for name, those in {"5 maps": maps[:, 0], "5 maps, flips averaged": maps.mean(1),
                        "40 maps": maps.flatten(0, 1)}.items():
        merged = {way: method(those) for way, method in WAYS.items()}
        if len(those) == 5:
            merged |= {"best single": those[best], **dict(zip(tables.SINGLES, those))}
        for way, p in merged.items():
            painted = data.labels_to_regions(data.regions_to_labels(p > 0.5))
            for region, mask, truth in zip(data.REGIONS, painted, target):
                yield {"maps": name, "way": way, "region": region, "dice": infer.dice(mask, truth)}


def do_ensembles(runs, size, out, case):
    """Merges the maps that five folds' networks make of a held-out case -> rows of maps, of ways to merge."""
    networks = []
    for run in runs:
        network = SegResNet(filters=size.filters)
        network.load_state_dict(torch.load(out / "models" / f"{run.name}.pt", weights_only=True))
        networks.append(infer.move_to(choose_device()[0], network).eval())
    best = max(range(5), key=lambda fold: validation_dice(runs[fold], out))
    mirrorings = [axes for k in range(4) for axes in itertools.combinations((1, 2, 3), k)]
    image, target, _ = data.load_case(case)
    image = data.normalize(image)
    roi = infer.choose_window(image, size.crop)
    with choose_device()[2]:
        maps = [infer.predict(network, image.flip(axes), roi).flip(axes)
                for network in networks for axes in mirrorings]
    maps = torch.stack(maps).unflatten(0, (5, 8))    # (5, 8, 3, D, H, W)
    about = {"cohort": runs[0].cohort, "seed": runs[0].seed, "case": case.name}
    return ([about | row for row in rows_of_maps(maps, target)],
            [about | row for row in rows_of_ensembles(maps, best, target)])


# ---- the command -------------------------------------------------------------------------------------------


def do_all(pool, tasks, what):
    """{path: (function, its arguments but the last, the path)}: does those whose path is not there."""
    left, start = {path: task for path, task in tasks.items() if not path.exists()}, time.monotonic()
    print(f"{len(tasks)} {what}, {len(left)} to do", flush=True)
    futures = [pool.submit(*task, path) for path, task in left.items()]
    for done, future in enumerate(as_completed(futures), 1):
        if future.exception():
            pool.shutdown(cancel_futures=True)
        future.result()
        data.show_progress(what, done, len(left), start)


def do_study(args, pool):
    size, cohorts, out = QUICK if args.quick else SIZES[args.scale], make_cohorts(args, pool), args.out
    runs, maps, ensembles = plan(size, cohorts), [], []
    networks = {out / "scores" / f"{run.name}.csv": (do_run, run, size, *cohorts[run.cohort], out)
                for run in runs}
    do_all(pool, networks, "networks")
    for seed in range(size.fold_seeds):
        five = [run for run in runs if run.seed == seed and run.fold >= 0]
        held_out, _ = cohorts[five[0].cohort]
        for of_maps, of_ways in pool.map(partial(do_ensembles, five, size, out), held_out):
            maps += of_maps
            ensembles += of_ways
    infer.write_csv(out / "scores.csv", [row for path in networks for row in tables.read(path)])
    save_rows(out / "maps.csv", maps)
    save_rows(out / "ensembles.csv", ensembles)
    tables.print_all([tables.load(out / "*.csv")])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=data.folder, help="a cohort of any naming that data.py reads; None: phantoms")
    data.add_cohort_flags(parser)
    add("--scale", type=int, choices=SIZES, default=4, help="mm a voxel; a case's sides are divided by it")
    add("--out", type=data.folder, default=Path("runs/ablation"), help="what is done there is kept")
    add("--quick", action="store_true", help="every part, but small, short and with few seeds")
    add("--jobs", type=train.at_least(1), help="processes",
        default=1 if torch.cuda.is_available() else os.cpu_count())
    args = parser.parse_args()
    for name in ("cache", "models", "scores"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    # Of one thread each: processes beside each other use cores better than threads within one.
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        do_study(args, pool)


if __name__ == "__main__":
    data.run_command(main)
