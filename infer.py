"""Prediction, segmentations, Dice, HD95 and the tables: section 4.

    python infer.py CASE_OR_COHORT ... --checkpoints runs/fold*/best.pt [--out predictions]      # ensembled as in section 3.2
    python infer.py data/BraTS2021_Training_Data --checkpoints runs/fold*/best.pt --held-out    # Table 2: by the fold it was kept from
    torchrun --nproc_per_node=4 infer.py ...                                                     # the cases shared out over four GPUs
    python infer.py --score PREDICTIONS --truth COHORT                                           # anybody's folder of <case>.nii.gz

Writes OUT/<case>.nii.gz, labels as the challenge server takes them, and with --probabilities OUT/probabilities/<case>.nii.gz, float32,
X, Y, Z, 3 in ET, TC, WT. Cases with a segmentation are scored: a row each in OUT.csv, and a closing table. A case whose output exists
is not predicted again, but scored. Exit code 0: done, 1: some cases failed (listed at the end), 2: a mistake in the call.
"""

import csv
import ctypes
import itertools
import math
import os
import pickle
import pickletools
import re
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.spatial import KDTree

from data import (REGIONS, InputError, Parser, brain_box, describe, exit_with, find_cases, is_out_of_memory, join_ranks, labels_to_regions, load_case,
                  make_folder, normalize, open_nifti, pad_to, read_labels, regions_to_labels, save_volume, show_progress, whole_file)
from ensemble import METHODS
from segresnet import SegResNet

HD95_ONE_EMPTY = 373.13    # mm, BraTS's penalty, about the diagonal of its volume


# ---- prediction -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, image, roi=(192, 192, 144), flips=False):
    """A whole case to probabilities: (4, D, H, W) normalised, zero outside the brain -> (3, D, H, W) float32 on the image's device.

    Paper: silent on prediction. Here: a window of `roi` over the brain's bounding box; an axis that exceeds it by up to 16 voxels grows
    to the next multiple of 8; beyond that, half-overlapping windows blended with a Gaussian. Zero outside the windows; a volume
    smaller than the window is padded with zeros as in training.
    Why: instance norm's statistics depend on the window, so for the paper's crop it is that of training; a brain fits it as a rule.
    flips: the mean over all 8 mirrorings. The model runs on its own device, under whatever autocast is on outside.
    """
    device = next(model.parameters()).device
    windows = [axis_windows(lo, hi, n, side) for (lo, hi), n, side in zip(brain_box(image.any(0)), image.shape[1:], roi)]
    size = tuple(side for _, side in windows)
    padded = pad_to(image, size)
    weights = gaussian_window(size).to(image.device)
    probabilities = torch.zeros(3, *padded.shape[1:], device=image.device)
    total = torch.zeros(padded.shape[1:], device=image.device)
    for corner in itertools.product(*(starts for starts, _ in windows)):
        box = tuple(slice(start, start + side) for start, side in zip(corner, size))
        x = padded[(slice(None), *box)].to(device)[None]    # (1, 4, *size)
        p = torch.zeros(3, *size, device=device)
        mirrorings = [axes for k in range(4) for axes in itertools.combinations((2, 3, 4), k)] if flips else [()]
        for axes in mirrorings:
            p += torch.sigmoid(model(x.flip(axes)).float()).flip(axes)[0] / len(mirrorings)
        probabilities[(slice(None), *box)] += p.to(image.device) * weights
        total[box] += weights
    probabilities /= total.clamp_min(torch.finfo().tiny)    # outside the windows 0 / tiny = 0
    undo = tuple(slice((m - n) // 2, (m - n) // 2 + n) for m, n in zip(padded.shape[1:], image.shape[1:]))
    return probabilities[(slice(None), *undo)]


def choose_window(image, crop):
    """The `roi` for an image (4, D, H, W) and a network trained on `crop`: the crop, grown to the brain up to the paper's 192x192x144.

    Why: a small window may hold no tumour. Eq. 4 has no gradient for such a crop, so no network learns to leave it empty, and
    instance norm scales up whatever it holds. For the paper's crop this changes nothing.
    """
    extents = [math.ceil((hi - lo) / 8) * 8 for lo, hi in brain_box(image.any(0))]
    return tuple(max(side, min(extent, most)) for side, extent, most in zip(crop, extents, (192, 192, 144)))


def axis_windows(lo, hi, n, side):
    """Where windows start along one axis of `n` voxels with the brain in [lo, hi), in the padded volume; and how long they are."""
    extent = hi - lo
    if side < extent <= side + 16:
        side = math.ceil(extent / 8) * 8
    if n <= side:
        return [0], side    # the padded axis is the window
    if extent <= side:
        return [min(max((lo + hi - side) // 2, 0), n - side)], side    # centred on the brain, within the volume
    return [lo + min(i * (side // 2), extent - side) for i in range(math.ceil((extent - side) / (side // 2)) + 1)], side


def gaussian_window(size):
    """Blending weights of one window, `size`: a Gaussian with sd side/8 and maximum 1, at least 1e-3."""
    weights = torch.ones(())
    for side in size:
        x = torch.arange(side) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(-(x**2) / (2 * (side / 8) ** 2))
    return weights.clamp_min(1e-3)


# ---- scores -----------------------------------------------------------------------------------------------------------


def dice(prediction, truth):
    """2 |A and B| / (|A| + |B|) of two masks of one shape, bool; both empty 1, one empty 0, BraTS's convention."""
    size = int(prediction.count_nonzero() + truth.count_nonzero())
    return 2 * int((prediction & truth).count_nonzero()) / size if size else 1.0


def surface(mask):
    """The voxels (n, 3) of a bool mask (D, H, W) minus its 6-connected erosion, counted from one; outside the volume is background."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(3):    # seven times as fast as a general erosion
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere(padded & ~inside)


def hausdorff95(prediction, truth, spacing=(1.0, 1.0, 1.0)):
    """The 95 % Hausdorff distance in mm of two bool masks (D, H, W), `spacing` in mm; both empty 0, one empty 373.13.

    The larger of the two directed 95th percentiles (linear) of the distances from one mask's surface voxels to the other's.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else HD95_ONE_EMPTY
    box = tuple(slice(lo, hi) for lo, hi in brain_box(prediction | truth))    # both surfaces lie in it
    p, t = (surface(mask[box]) * spacing for mask in (prediction, truth))    # (surface voxels, 3), mm
    directed = []
    # A k-d tree's time goes with the surfaces, a distance transform's with the box, which one far-off false positive stretches.
    for here, there in ((p, t), (t, p)):
        tree = KDTree(there, leafsize=32, compact_nodes=False, balanced_tree=False)    # quick to build, for a single query
        directed.append(np.percentile(tree.query(here)[0], 95))
    return float(max(directed))


def score(labels, truth, et_label, spacing):
    """Painted labels (D, H, W) against regions (3, D, H, W): [Dice of ET, TC, WT, then HD95 in mm of ET, TC, WT]."""
    regions = labels_to_regions(labels, et_label)
    return [dice(p, t) for p, t in zip(regions, truth)] + [hausdorff95(p, t, spacing) for p, t in zip(regions, truth)]


COLUMNS = [f"dice_{region.lower()}" for region in REGIONS] + [f"hd95_{region.lower()}" for region in REGIONS]


def write_csv(path, rows):
    """Dicts of one set of keys -> CSV; `path` is never half a table."""
    with whole_file(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows):
    """The scores in the form of the paper's Tables 2 and 3: a line a fold (if cases have one) and the mean over all cases.

    The paper does not explain its +-, about 0.01. Here: the sd over cases, which is larger.
    """
    print(f"\n{'':<10}{'Dice':<57}Hausdorff95, mm")
    print(f"{'':<10}" + "".join(f"{region:<19}" for region in REGIONS * 2) + "cases")
    folds = sorted({row["fold"] for row in rows}, key=str)
    groups = [(f"fold {fold}", [row for row in rows if row["fold"] == fold]) for fold in folds if fold != ""]
    for name, group in [*groups, ("mean", rows)]:
        values = np.array([[float(row[column]) for column in COLUMNS] for row in group])
        cells = [f"{m:.4f} ± {s:.3f}" for m, s in zip(values.mean(0), values.std(0))]
        print(f"{name:<10}" + "".join(f"{cell:<19}" for cell in cells) + str(len(group)))
    print("(mean ± sd over cases)")


# ---- the command ------------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """The dict of tensors, numbers and strings that train.py saved. Nothing in it is executed; it takes no more memory than the file's size.

    Raises whatever torch's unpickler and zip reader meet in a file that is none.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as file:    # train.py packs nothing
        if sum(entry.file_size for entry in file.infolist()) > size:
            raise ValueError("it would unpack to more than its size")
        content = file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))
    for opcode, name, _ in pickletools.genops(content):    # weights_only lets more through, a bytearray of any length for one
        if "GLOBAL" in opcode.name and not re.fullmatch(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage", name or ""):
            raise ValueError("it holds more than tensors, numbers and strings")
    try:
        with warnings.catch_warnings():    # of a damaged file, before it is refused
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:    # its own message tells how to run the code
        raise ValueError("it is damaged, or holds more than tensors, numbers and strings") from None
    tensors, pending, seen = 0, [checkpoint], set()    # a container may lie in itself, and one stored number stand for a large tensor
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            tensors += value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
            pending += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if tensors > 2 * size:    # twice, since network and optimizer may share some
        raise ValueError("its tensors are larger than the file")
    return checkpoint


def load_checkpoint(path):
    """A checkpoint of train.py's with its network, {"model": SegResNet, "settings", "train_cases", "val_cases", ...}. Raises InputError."""
    try:
        checkpoint = read_checkpoint(path)
        settings, weights = checkpoint["settings"], checkpoint["model"]
        crop, cases = settings["crop"], checkpoint["train_cases"] + checkpoint["val_cases"]
        if type(settings["filters"]) is not int or settings["filters"] < 1:
            raise ValueError("its filters are no number")
        if len(crop) != 3 or any(type(side) is not int or side % 8 or not 16 <= side <= 512 for side in crop):
            raise ValueError("its crop is not three multiples of 8 from 16 to 512")
        if any(type(text) is not str for text in (*cases, settings["norm"], settings["fold"])) or settings["amp"] not in AMP:
            raise ValueError("its norm, fold, amp or cases are none")
        with torch.device("meta"):    # no memory is taken for what `filters` says
            model = SegResNet(filters=settings["filters"], norm=settings["norm"])
        model.load_state_dict(weights, assign=True)
        checkpoint["model"] = model.float().eval()
        checkpoint["digest"] = sha256(Path(path).read_bytes()).hexdigest()
        return checkpoint
    except IsADirectoryError:
        raise InputError(f"--checkpoints {path}: a folder, expected the file best.pt or last.pt in it") from None
    except FileNotFoundError:
        raise InputError(f"--checkpoints {path}: no such file, expected best.pt or last.pt of a run of train.py") from None
    except Exception as error:    # torch.load raises whatever its unpickler and zip reader meet
        raise InputError(f"--checkpoints {path}: cannot be loaded ({type(error).__name__}: {str(error)[:200]}), "
                         "expected a checkpoint of train.py's for 4 channels and 3 regions") from None


AMP = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_precision(amp, device):
    """--amp -> the autocast dtype, or None for float32. "auto": 16 bits where the device computes in them natively."""
    if amp != "auto":
        return AMP[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    instructions = torch.cpu.get_capabilities()
    return torch.bfloat16 if instructions.get("avx512_bf16") or instructions.get("amx_bf16") else None


def move_to(device, network):
    """A network onto its device, in the layout that is fastest there: on a CPU channels last for few filters, which hurts with more."""
    channels_last = device.type == "cpu" and network.init_conv.out_channels < 16
    return network.to(device, memory_format=torch.channels_last_3d if channels_last else torch.preserve_format)


def keep_memory():
    """For work on a CPU: what large tensors leave is kept for the next ones. Up to twice as fast for large volumes, for half as much memory again.

    As it starts, glibc gives the memory of every large tensor back to the system and takes it anew for the next one, page by page.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):    # another C library
        return
    mallopt(-4, 0)    # M_MMAP_MAX: nothing straight from the system, all from the heap
    mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: of which 2 GiB may lie free


def read_ahead(cases, reader):
    """For each case its normalised image (4, D, H, W) float32, or its InputError. The next one is read while this one is in use."""

    def read(case):
        try:
            return normalize(load_case(case._replace(label=None))[0])
        except InputError as error:
            return error

    coming = None
    for case, following in zip(cases, [*cases[1:], None]):
        image = coming or reader.submit(read, case)
        coming = following and reader.submit(read, following)
        yield image.result()


def predict_case(image, checkpoints, args):
    """The ensemble's probabilities (3, D, H, W) float32 for a normalised image (4, D, H, W)."""
    maps = []
    for checkpoint in checkpoints:
        device = next(checkpoint["model"].parameters()).device
        precision = choose_precision(checkpoint["settings"]["amp"], device)    # as it was trained
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            maps.append(predict(checkpoint["model"], image, choose_window(image, checkpoint["settings"]["crop"]), args.flips))
    return METHODS[args.ensemble](torch.stack(maps))    # (N, 3, D, H, W) -> (3, D, H, W)


def how_predicted(checkpoints, args):
    """By which networks and how: the note in the header of a label file, which tells a prediction to be kept from another call's."""
    networks = sha256("".join(sorted(checkpoint["digest"] for checkpoint in checkpoints)).encode()).hexdigest()[:16]
    return f"{args.ensemble} of {len(checkpoints)}{', flips' if args.flips else ''}, networks {networks}"


def note_of(path):
    """The note in the header of a label file; "" where there is none to be read."""
    try:
        return open_nifti(path).header["descrip"].item().decode("latin-1")
    except Exception:    # nibabel, gzip and zlib each raise their own kinds for a damaged file
        return ""


def finish_case(case, probabilities, note, fold, folder, args):
    """Paints and writes what was predicted, or nothing if that is None, and scores the label map in `folder`: a row, or None without truth.

    The label file, with `note` in its header, comes last: where it exists, the case is finished.
    """
    path = folder / f"{case.name}.nii.gz"
    if probabilities is not None:
        if args.probabilities:
            save_volume(folder / "probabilities" / path.name, probabilities.numpy(), case.images[0])
        save_volume(path, regions_to_labels(probabilities > 0.5, case.et_label).numpy(), case.images[0], note)
    if case.label:
        return {"case": case.name, "fold": fold, **dict(zip(COLUMNS, (f"{value:.6g}" for value in score_case(case, path))))}


def score_case(case, path):
    """The scores of the label map `path` against the case's segmentation, both read in LPS."""
    truth, affine = read_labels(case.label, case.et_label)
    if not path.exists():
        raise InputError(f"{path}: no such file, expected a segmentation for each case of --truth")
    labels, labels_affine = read_labels(path, case.et_label)
    if labels.shape != truth.shape or not np.allclose(labels_affine, affine, atol=1e-2):
        raise InputError(f"{case.label}: shape {tuple(truth.shape)} or its affine differs from {path} with {tuple(labels.shape)}, "
                         "expected a segmentation on the same voxels")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return score(labels, labels_to_regions(truth, case.et_label), case.et_label, spacing)


def run(args, rank, world):
    """Predicts and scores this rank's share of the cases; rank 0 prints and writes the scores. Returns the number of failed cases."""
    cases, checkpoints, notes = find_all(args.cases if args.score is None else [args.truth]), [], {}
    if args.score is None:
        checkpoints = [load_checkpoint(path) for path in args.checkpoints]
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cpu":
            keep_memory()
        for checkpoint in checkpoints:
            move_to(device, checkpoint["model"])
        chosen = {case.name: [c for c in checkpoints if not args.held_out or case.name in c["val_cases"]] for case in cases}
        cases = [case for case in cases if chosen[case.name]]
        if not cases:
            raise InputError("--held-out: none of the cases is in a checkpoint's val_cases, expected the cohort it was trained on")
        make_folder(args.out / "probabilities" if args.probabilities else args.out)
        folder, notes = args.out, {case.name: how_predicted(chosen[case.name], args) for case in cases}
        for path in (folder / f"{case.name}.nii.gz" for case in cases):
            if not args.overwrite and path.exists() and note_of(path) != notes[path.name.removesuffix(".nii.gz")]:
                raise InputError(f"{path}: is there, but not from these checkpoints with this --ensemble, --flips and --held-out "
                                 f"(its header says {note_of(path)!r}), expected another --out, or --overwrite")
    else:
        cases, folder = [case for case in cases if case.label], args.score
        if not folder.is_dir():
            raise InputError(f"--score {folder}: no such folder, expected one of <case>.nii.gz")
        if not cases:
            raise InputError(f"--truth {args.truth}: no case has a segmentation, expected <case>_seg.nii.gz beside its images")
    if rank == 0:
        print(describe(cases) + (f"; {len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}" if checkpoints else ""), flush=True)
        seen = sum(any(case.name in c["train_cases"] for c in chosen[case.name]) for case in cases) if checkpoints else 0
        if seen:
            print(f"warning: {seen} cases were trained on by a checkpoint that predicts them; --held-out would leave it out", flush=True)

    share, start = cases[rank::world], time.monotonic()
    rows, failures, done = [], [], 0

    def collect(finishing):
        try:
            rows.append(finishing.result())
        except InputError as error:
            failures.append(str(error))

    def is_finished(case):
        maps = folder / "probabilities" / f"{case.name}.nii.gz"
        return not checkpoints or (folder / f"{case.name}.nii.gz").exists() and (maps.exists() or not args.probabilities) and not args.overwrite

    to_predict = [case for case in share if not is_finished(case)]
    kept = len(share) - len(to_predict) if checkpoints else 0
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        images, finishing = read_ahead(to_predict, reader), None
        for case in share:
            probabilities, fold = None, ""
            if case in to_predict:
                image = next(images)
                if isinstance(image, InputError):
                    failures.append(str(image))
                    continue
                probabilities = predict_case(image, chosen[case.name], args)
            if checkpoints and args.held_out:
                fold = "/".join(sorted({str(c["settings"]["fold"]) for c in chosen[case.name]}))
            if finishing:
                collect(finishing)    # at most one case waits to be written
            finishing = writer.submit(finish_case, case, probabilities, notes.get(case.name), fold, folder, args)
            done += 1
            if rank == 0:
                show_progress("cases", done, len(share), start)
                if not sys.stdout.isatty():
                    print(f"{done}/{len(share)} {case.name}", flush=True)
        if finishing:
            collect(finishing)
    rows = [row for row in rows if row]

    if world > 1:
        shares = [None] * world
        try:
            dist.all_gather_object(shares, (rows, failures, kept))
        except RuntimeError:    # a rank is gone, and has said why
            sys.exit(2)
        rows, failures = [row for share in shares for row in share[0]], [failure for share in shares for failure in share[1]]
        kept = sum(share[2] for share in shares)
    if rank == 0:
        if kept:
            print(f"{kept} cases were predicted before and kept; --overwrite predicts them again")
        if rows:
            rows.sort(key=lambda row: row["case"])
            folder = folder if folder.name.strip(".") else folder.resolve()    # "." and ".." name no file
            table = folder.with_name(f"{folder.name}.csv")
            write_csv(table, rows)
            print_table(rows)
            print(f"by case: {table}")
        for failure in failures:
            print(f"error: {failure}")
        print(f"{len(cases) - len(failures)} of {len(cases)} cases done, in {folder}")
    return len(failures)


def find_all(roots):
    """The cases of several folders, sorted by name; a name that two of them have is an InputError."""
    cases = {}
    for root in roots:
        for case in find_cases(root):
            if cases.setdefault(case.name, case).images != case.images:
                raise InputError(f"{root}: case {case.name} is also in {cases[case.name].images[0].parent}, expected each case once")
    return [cases[name] for name in sorted(cases)]


def main():
    parser = Parser(description="Predicts, ensembles and scores BraTS cases.")
    parser.add_argument("cases", nargs="*", type=Path, metavar="CASE_OR_COHORT", help="folders, searched with all folders below them")
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], metavar="FILE", help="best.pt or last.pt of any number of runs")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="gets <case>.nii.gz (default: %(default)s)")
    parser.add_argument("--ensemble", choices=METHODS, default="confidence", help="how several checkpoints are merged (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="predict a case only with checkpoints that were validated on it (Table 2)")
    parser.add_argument("--flips", action="store_true", help="average over all 8 mirrorings, eight times the work")
    parser.add_argument("--probabilities", action="store_true", help="write the ensembled maps to OUT/probabilities as well")
    parser.add_argument("--overwrite", action="store_true", help="predict finished cases again")
    parser.add_argument("--score", type=Path, metavar="PREDICTIONS", help="predict nothing, score a folder of <case>.nii.gz")
    parser.add_argument("--truth", type=Path, metavar="COHORT", help="the cases to score PREDICTIONS against")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for number in (signal.SIGTERM, signal.SIGINT):    # what is written just then is taken away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if (args.score is None) != (args.truth is None):
            raise InputError("one of --score PREDICTIONS and --truth COHORT is missing, expected both: what to score, and the folder of the segmentations")
        if args.score is None and not (args.cases and args.checkpoints):
            raise InputError("expected CASE_OR_COHORT and, after it, --checkpoints, which takes all that follows; or --score and --truth")
        if args.score is not None and (args.cases or args.checkpoints):
            raise InputError(f"--score {args.score}: predicts nothing, expected neither CASE_OR_COHORT nor --checkpoints with it")
        if len({path.resolve() for path in args.checkpoints}) < len(args.checkpoints):
            raise InputError("--checkpoints: one is given twice and would count twice, expected each once")
        if world > 1:
            join_ranks("gloo", rank, world, timedelta(days=7))    # only scores are exchanged, at the end, for which a rank may wait long
        failures = run(args, rank, world)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with(InputError(f"--checkpoints: a window of their --crop and --filters, or a map for each of them, does not fit into memory "
                             f"({' '.join(str(error).split())[:80]}), expected smaller or fewer ones"), rank)
    except (InputError, OSError) as error:
        exit_with(error, rank)
    if world > 1:
        dist.destroy_process_group()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
