"""Prediction, segmentations, Dice, HD95 and the tables: section 4.

    python infer.py CASE_OR_COHORT ... --checkpoints runs/fold*/best.pt    # ensembled as in section 3.2
    python infer.py COHORT --checkpoints runs/fold*/best.pt --held-out     # Table 2
    torchrun --nproc_per_node=4 infer.py ...                               # cases shared out over four GPUs
    python infer.py COHORT --score PREDICTIONS                             # any folder of <case>.nii.gz

Writes OUT/<case>.nii.gz, in the labels of the case's cohort, and with --probabilities OUT/probabilities/
<case>.nii.gz, float32, X, Y, Z, 3 in ET, TC, WT. Cases with a segmentation are scored: OUT.csv, or
PREDICTIONS.csv, and a table.
Exit code 0: done, 1: some cases failed (listed at the end), 2: a mistake in the call.
"""

import argparse
import csv
import io
import itertools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from scipy.spatial import KDTree
from torch.nn import functional as F

from data import (REGIONS, InputError, add_cohort_flags, brain_box, check_same_grid, describe, doubts,
                  find_cases, folder, labels_to_regions, load_case, normalize, read_labels, regions_to_labels,
                  run_command, save_volume, show_progress, write_whole)
from ensemble import METHODS
from segresnet import SegResNet

HD95_ONE_EMPTY = 373.13    # mm, BraTS's penalty, about the diagonal of its volume


# ---- prediction -------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(model, image, roi=(192, 192, 144), flips=False):
    """A whole case: (4, D, H, W) normalised, zero outside the brain -> probabilities (3, D, H, W) float32.

    Image and result are on the CPU; the model is on its device, under whatever autocast is on outside.
    Paper: silent. Here: a window of `roi` over the brain's box. Where the brain is longer than the window by
    up to 16 voxels, the window grows to the next multiple of 8; where by more, half-overlapping windows are
    blended with a Gaussian. Outside the windows is zero. A smaller volume is padded as in training.
    Why: instance norm's statistics depend on the window; see `choose_window`. A brain fits the paper's.
    flips: the mean over all 8 mirrorings. Raises ValueError for another rank, and as SegResNet does.
    """
    if image.ndim != 4:
        raise ValueError(f"image is {tuple(image.shape)}, expected (4, D, H, W)")
    device, shape = next(model.parameters()).device, image.shape[1:]
    brain = brain_box(image.any(0))
    windows = [axis_windows(lo, hi, n, side) for (lo, hi), n, side in zip(brain, shape, roi)]
    size = tuple(side for _, side in windows)
    missing = [max(side - n, 0) for side, n in zip(size, shape)]
    padded = F.pad(image, [p for m in reversed(missing) for p in (m // 2, m - m // 2)])    # last axis first
    weights, total = gaussian_window(size), torch.zeros(padded.shape[1:])
    probabilities = torch.zeros(3, *padded.shape[1:])
    mirrorings = [axes for k in range(4) for axes in itertools.combinations((2, 3, 4), k)] if flips else [()]
    for corner in itertools.product(*(starts for starts, _ in windows)):
        box = tuple(slice(start, start + side) for start, side in zip(corner, size))
        x = padded[(slice(None), *box)].to(device)[None]    # (1, 4, *size)
        p = torch.zeros(3, *size, device=device)
        for axes in mirrorings:
            p += torch.sigmoid(model(x.flip(axes)).float()).flip(axes)[0] / len(mirrorings)
        probabilities[(slice(None), *box)] += p.cpu() * weights
        total[box] += weights
    probabilities /= total.clamp_min(torch.finfo().tiny)    # outside the windows 0 / tiny = 0
    return probabilities[(slice(None), *(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape)))]


def choose_window(image, crop):
    """The `roi` for an image (4, D, H, W): sides of the brain, at most 192x192x144, but at least `crop`.

    Why: a small window may hold no tumour. Eq. 4 has no gradient for such a crop, so no network learns to
    leave it empty, and instance norm scales up whatever it holds. For the paper's crop this changes nothing.
    """
    extents = [math.ceil((hi - lo) / 8) * 8 for lo, hi in brain_box(image.any(0))]
    return tuple(max(side, min(extent, most)) for side, extent, most in zip(crop, extents, (192, 192, 144)))


def axis_windows(lo, hi, n, side):
    """Where windows start along an axis of `n` voxels with the brain in [lo, hi), and how long they are."""
    extent = hi - lo
    if side < extent <= side + 16:
        side = math.ceil(extent / 8) * 8
    if n <= side:
        return [0], side    # the padded axis is the window
    if extent <= side:
        return [min(max((lo + hi - side) // 2, 0), n - side)], side    # about the brain, within the volume
    steps = math.ceil((extent - side) / (side // 2))
    return [lo + min(i * (side // 2), extent - side) for i in range(steps + 1)], side


def gaussian_window(size):
    """Blending weights of one window (*size): a Gaussian with sd side/8 and maximum 1, at least 1e-3."""
    weights = torch.ones(())
    for side in size:
        x = torch.arange(side) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(-(x**2) / (2 * (side / 8) ** 2))
    return weights.clamp_min(1e-3)


# ---- section 4: Dice and Hausdorff95 ----------------------------------------------------------------------

def dice(prediction, truth):
    """2 |A and B| / (|A| + |B|) of two bool masks of one shape, arrays or tensors.

    Both empty 1, one empty 0, BraTS's convention. Raises ValueError for unequal shapes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"shapes {tuple(prediction.shape)} and {tuple(truth.shape)}, expected one")
    size = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / size if size else 1.0


def surface(mask):
    """The voxels (n, 3) of a bool mask (D, H, W) less its 6-connected erosion; outside it is background."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(3):    # seven times as fast as a general erosion
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere(padded & ~inside) - 1


def hausdorff95(prediction, truth, spacing=(1.0, 1.0, 1.0)):
    """The 95 % Hausdorff distance in mm of two bool masks (D, H, W), arrays or CPU tensors; `spacing` in mm.

    The larger of the two directed 95th percentiles (linear) of the distances from one mask's surface voxels
    to the other's. Both empty 0, one empty 373.13. Raises ValueError for other or unequal shapes.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 3 or prediction.shape != truth.shape:
        raise ValueError(f"shapes {prediction.shape} and {truth.shape}, expected one (D, H, W)")
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else HD95_ONE_EMPTY
    box = tuple(slice(lo, hi) for lo, hi in brain_box(prediction | truth))    # both surfaces lie in it
    p, t = (surface(mask[box]) * spacing for mask in (prediction, truth))    # (surface voxels, 3), mm
    directed = []
    # A k-d tree's time goes with the surfaces, a distance transform's with the box, however far it reaches.
    for here, there in ((p, t), (t, p)):
        tree = KDTree(there, leafsize=32, compact_nodes=False, balanced_tree=False)    # quick to build
        directed.append(np.percentile(tree.query(here)[0], 95))
    return float(max(directed))


def score(labels, truth, spacing):
    """Labels (D, H, W) against regions (3, D, H, W): [Dice of ET, TC, WT, then HD95 in mm of ET, TC, WT]."""
    box = tuple(slice(lo, hi) for lo, hi in brain_box((labels != 0) | truth[2]))    # all regions lie in it
    pairs = list(zip(labels_to_regions(labels[box]), truth[(slice(None), *box)]))
    return [dice(p, t) for p, t in pairs] + [hausdorff95(p, t, spacing) for p, t in pairs]


# ---- tables -----------------------------------------------------------------------------------------------

COLUMNS = [f"{measure}_{region.lower()}" for measure in ("dice", "hd95") for region in REGIONS]


def write_csv(path, rows):
    """Dicts of one set of keys -> CSV, all of it or nothing. Raises OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode(errors="replace"))


def print_table(rows):
    """The scores in the form of the paper's Tables 2 and 3: a line a fold, if cases have one, then all cases.

    The paper does not explain its +-, about 0.01. Here: the sd over cases, which is larger.
    """
    print(f"\n{'':<10}{'Dice':<57}Hausdorff95, mm")
    print(f"{'':<10}" + "".join(f"{region:<19}" for region in REGIONS * 2) + "cases")
    folds = sorted({row["fold"] for row in rows if row["fold"] != ""})
    for name, fold in [*((f"fold {fold}", fold) for fold in folds), ("mean", None)]:
        group = [row for row in rows if fold in (None, row["fold"])]
        values = np.array([[float(row[column]) for column in COLUMNS] for row in group])
        cells = [f"{m:.4f} ± {s:.3f}" for m, s in zip(values.mean(0), values.std(0))]
        print(f"{name:<10}" + "".join(f"{cell:<19}" for cell in cells) + str(len(values)))
    print("(mean ± sd over cases)")


# ---- networks and devices ---------------------------------------------------------------------------------

AMP = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_precision(amp, device):
    """--amp -> the autocast dtype, None for float32. "auto": 16 bits where the device has them natively."""
    if amp != "auto":
        return AMP[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    instructions = getattr(torch.cpu, "get_capabilities", dict)()    # old releases do not tell
    return torch.bfloat16 if instructions.get("avx512_bf16") or instructions.get("amx_bf16") else None


def move_to(device, network):
    """A network onto its device. On a CPU channels last takes 0.66 times as long at 8 filters, 1.5 at 32."""
    if device.type == "cpu" and network.init_conv.out_channels < 16:
        return network.to(device, memory_format=torch.channels_last_3d)
    return network.to(device)


def load_checkpoint(path):
    """Of what train.py saved: {"model": SegResNet, "settings", "train_cases", "val_cases"}.

    Raises InputError for anything else, and for weights that are not finite.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, weights = checkpoint["settings"], checkpoint["model"]
        with torch.device("meta"):    # the file's tensors become the network's own
            model = SegResNet(filters=settings["filters"], norm=settings["norm"])
        model.load_state_dict(weights, assign=True)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("its weights are not finite")
        kept = {name: checkpoint[name] for name in ("settings", "train_cases", "val_cases")}
        return {"model": model.float().eval(), **kept}
    except Exception as error:    # whatever torch.load's unpickler and zip reader meet
        first, *_ = str(error).split(". ")    # torch.load's next sentence advises to run what the file holds
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {first[:150]}"
        raise InputError(f"--checkpoints {path}: cannot be loaded ({what}), expected best.pt or last.pt of "
                         "train.py's, for 4 channels and 3 regions") from None


def start_ranks(backend=None, timeout=None):
    """Joins torchrun's ranks, if there are several -> rank, world, device. Raises InputError."""
    rank, world, local = (int(os.environ.get(name, n))
                          for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: process {local + 1} of a machine with "
                             f"{torch.cuda.device_count()} GPUs, expected at most one for each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise InputError(f"--max-restarts {restarts}: a start would meet what the last one left in the "
                             "store, expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun")
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"), timeout=timeout)
    return rank, world, device


# ---- the loop over cases ----------------------------------------------------------------------------------

def read_case(case, predictions=None):
    """A case's image (4, D, H, W) float32, normalised, truth (3, D, H, W) bool or None, affine, doubt.

    predictions: a folder whose segmentation of the case, labels (D, H, W), takes the image's place.
    Raises InputError for what cannot be read.
    """
    if predictions is None:
        image, truth, affine = load_case(case)
        return normalize(image), truth, affine, bool(doubts(image, affine))
    path = predictions / f"{case.name}.nii.gz"
    labels, affine = read_labels(path, ((0,), *case.naming.labels[1:]))    # without the truth's background
    truth, its_affine = read_labels(case.label, case.naming.labels)
    check_same_grid(path, labels, affine, case.label, truth, its_affine)
    return labels, labels_to_regions(truth), affine, False


def read_ahead(read, items, threads=1):
    """A future of read(item) for each item in turn; `threads` threads read up to two each ahead of it.

    Why threads: unpacking and copying release the interpreter's lock, and images stay where they are.
    """
    readers, futures = ThreadPoolExecutor(threads), []
    for item in items:
        futures.append(readers.submit(read, item))
        if len(futures) > 2 * threads:
            yield futures.pop(0)
    yield from futures


def predict_case(case, image, checkpoints, args):
    """Predicts, ensembles, paints and writes a case; image (4, D, H, W) normalised -> labels (D, H, W)."""
    maps = []
    for checkpoint in checkpoints:
        model, settings = checkpoint["model"], checkpoint["settings"]
        device = next(model.parameters()).device
        precision = choose_precision(settings["amp"], device)    # as its training would choose here
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            maps.append(predict(model, image, choose_window(image, settings["crop"]), args.flips))
    maps = torch.stack(maps)    # (N, 3, D, H, W)
    if maps.sum().isnan():
        raise InputError(f"{case.name}: a network gives NaN, expected probabilities; see its --amp")
    probabilities = METHODS[args.ensemble](maps) if len(maps) > 1 else maps[0]    # (3, D, H, W)
    labels = regions_to_labels(probabilities > 0.5)
    path = args.out / f"{case.name}.nii.gz"
    if args.probabilities:
        save_volume(args.out / "probabilities" / path.name, probabilities, case.images[0])
    save_volume(path, labels, case.images[0], case.naming.labels)
    return labels


def run(cases, chosen, args, rank):
    """Predicts or reads, and scores, one rank's `cases` -> rows of scores, failures, names of doubtful cases.

    chosen: {case's name: the checkpoints that predict it}.
    """
    rows, failures, doubtful, start = [], [], [], time.monotonic()
    read = partial(read_case, predictions=args.score)
    for done, (case, future) in enumerate(zip(cases, read_ahead(read, cases)), 1):
        try:
            volume, truth, affine, doubt = future.result()
            doubtful += [case.name] * doubt
            labels = volume if args.score else predict_case(case, volume, chosen[case.name], args)
            if truth is not None:
                scores = score(labels, truth, nib.affines.voxel_sizes(affine))
                folds = [c["settings"]["fold"] for c in chosen[case.name] if args.held_out]
                rows.append({"case": case.name, "fold": "/".join(sorted(set(folds))),
                             **{column: f"{value:.6g}" for column, value in zip(COLUMNS, scores)}})
        except InputError as error:
            failures.append(str(error))
        if rank == 0:
            show_progress("cases", done, len(cases), start)
            if not sys.stdout.isatty():
                print(f"{done}/{len(cases)} {case.name}")
    return rows, failures, doubtful


# ---- the command ------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description="Predicts, ensembles and scores cases.")
    add = parser.add_argument
    add("cases", nargs="+", type=folder, metavar="CASE_OR_COHORT", help="folders, searched with all below")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--checkpoints", nargs="+", type=folder, default=[], metavar="FILE", help="best.pt or last.pt")
    what("--score", type=folder, metavar="PREDICTIONS", help="a folder of <case>.nii.gz to score instead")
    add("--out", type=folder, default=Path("predictions"), help="gets <case>.nii.gz (default: %(default)s)")
    add("--ensemble", choices=METHODS, default="confidence", help="of several (default: %(default)s)")
    add("--held-out", action="store_true", help="a case by the networks that were validated on it: Table 2")
    add("--flips", action="store_true", help="average over all 8 mirrorings, eight times the work")
    add("--probabilities", action="store_true", help="write the ensembled maps to OUT/probabilities as well")
    add_cohort_flags(parser)
    return parser.parse_args()


def choose(args):
    """-> the call's cases, sorted by name, and {name: the checkpoints that predict it}. Raises InputError."""
    if len({path.resolve() for path in args.checkpoints}) < len(args.checkpoints):
        raise InputError("--checkpoints: one is given twice and would count twice, expected each once")
    cases = {}
    for case in (case for root in args.cases for case in find_cases(root, args.names, args.labels)):
        if cases.setdefault(case.name, case).images != case.images:
            raise InputError(f"{case.images[0]}: {cases[case.name].images[0]} has the same name, expected "
                             "each case once")
    checkpoints = [load_checkpoint(path) for path in args.checkpoints]
    chosen = {name: [c for c in checkpoints if name in c["val_cases"] or not args.held_out] for name in cases}
    cases = [case for name, case in sorted(cases.items()) if chosen[name] or args.score and case.label]
    if not cases and args.score:
        raise InputError(f"{args.cases[0]}: no case has a segmentation, expected some to --score against")
    if not cases:
        raise InputError("--held-out: no case is in a checkpoint's val_cases, expected the cohort it had")
    return cases, chosen


def main():
    args = parse_arguments()
    cases, chosen = choose(args)
    out = (args.score or args.out).resolve()
    table = out.with_name(f"{out.name}.csv")
    if args.score and not args.score.is_dir():
        raise InputError(f"--score {args.score}: no such folder, expected <case>.nii.gz in one")
    if args.score and table.exists():
        if any(row.get("fold") for row in csv.DictReader(table.open(errors="replace"))):
            raise InputError(f"{table}: has scores by fold, expected none that would be lost; move it away")
    if not args.score:
        for place in (args.out, args.out / "probabilities"):    # before ranks meet: none has written yet
            if there := next(place.glob("[!.]*.nii.gz"), None):
                raise InputError(f"--out {args.out}: {there} is there, expected an empty or a new folder")
        (args.out / "probabilities" if args.probabilities else args.out).mkdir(parents=True, exist_ok=True)
    rank, world, device = start_ranks("gloo", timedelta(days=7))    # they meet once more, at the end
    for checkpoint in (c for those in chosen.values() for c in those):
        move_to(device, checkpoint["model"])
    seen = sum(any(name in c["train_cases"] for c in those) for name, those in chosen.items())
    if rank == 0:
        print(describe(cases))
        if seen:
            print(f"warning: {seen} cases were trained on by a network that predicts them; see --held-out")
    ours = run(cases[rank::world], chosen, args, rank)
    found = [ours] * world
    if world > 1:
        dist.all_gather_object(found, ours)
        dist.destroy_process_group()
    rows, failures, doubtful = (sum(lists, []) for lists in zip(*found))
    if rank == 0:
        if rows:
            rows.sort(key=lambda row: row["case"])
            write_csv(table, rows)
            print_table(rows)
        if doubtful:
            print(f"warning: {len(doubtful)} cases look unsuitable, {doubtful[0]} for one; data.py says how")
        print(*(f"error: {failure}" for failure in failures),
              f"{len(cases) - len(failures)} of {len(cases)} cases done, in {out}", sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    run_command(main)
