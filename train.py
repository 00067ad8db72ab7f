"""Training: the paper's step, section 3.3's optimisation, section 4's epochs. The defaults are the paper's.

    torchrun --nproc_per_node=4 train.py --fold 0    # the paper's run, for each fold; four cases a step
    python train.py --fold 0                         # on one GPU or the CPU; one case a step
    python train.py --data DIR --fold all            # on every case, none held out

Writes OUT/last.pt and OUT/log.csv every epoch, OUT/best.pt when the mean Dice of the held-out cases is the
best so far. The same command goes on from last.pt, and ends like a run left alone, on a CPU bit for bit.
"""

import argparse
import json
import math
import os
import reprlib
import shutil
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow import Projector, barlow_twins_terms, soft_dice_loss
from data import (InputError, add_cohort_flags, augment, cache_entry, describe, find_cases, folder,
                  labels_to_regions, match, prepare, random_crop, random_flip, regions_to_labels, run_command,
                  save_tensors, show_progress, split_folds)
from infer import (AMP, choose_precision, choose_window, dice, move_to, predict, read_ahead, read_case,
                   start_ranks, write_csv)
from segresnet import NORMS, SegResNet

# ---- the paper's step -------------------------------------------------------------------------------------

class TwoViews(nn.Module):
    """What DDP wraps: network and projection branch in one forward pass; one backward synchronises both.

    (2, 4, D, H, W), view A then view B of one crop -> logits (2, 3, D, H, W), z_a and z_b (cells, dim).
    """

    def __init__(self, network, projector):
        super().__init__()
        self.network, self.projector = network, projector

    def forward(self, x):
        features = self.network.features(x)    # (2, filters, D, H, W)
        return self.network.decoder_end(features), self.projector(features[:1]), self.projector(features[1:])


def compute_losses(model, image, labels, seed, barlow_weight, lambd, autocast):
    """Section 3.1 in its own order -> (5,) float32: loss, Eq. 4, Eq. 3, and Eq. 1's two terms.

    model: `TwoViews`, or DDP around it. image (4, D, H, W) float16 and labels (1, D, H, W) uint8: a cropped
    and flipped sample, on the model's device. seed: of its two views.
    """
    # "we copy it and augment it each copy independently, forming a batch of 2"
    x = image.float().expand(2, -1, -1, -1, -1)    # (2, 4, D, H, W)
    y = labels.expand(2, -1, -1, -1, -1)           # (2, 1, D, H, W)
    x, y = augment(x, y, torch.Generator(x.device).manual_seed(seed))
    p_true = labels_to_regions(y[:, 0])            # (2, 3, D, H, W)
    with autocast:
        logits, z_a, z_b = model(x)
    dice_loss = soft_dice_loss(torch.sigmoid(logits.float()), p_true)    # Eq. 4
    invariance, redundancy = barlow_twins_terms(z_a, z_b, lambd)         # Eq. 2, 3; each GPU on its own image
    barlow = invariance + redundancy                                     # Eq. 1
    # Paper: "in additional to the main soft Dice loss". Here: weighted, by 1/dim unless a flag says else.
    # Why: Eq. 3 sums over dim entries, which would drown the Dice loss.
    loss = dice_loss + barlow_weight * barlow
    return torch.stack([loss, dice_loss, barlow, invariance, redundancy])


def cosine(lr, step, steps):
    """Section 3.3: "progressively decrease it according to Cosine schedule". Here: every step, to zero."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---- samples ----------------------------------------------------------------------------------------------

def case_generator(seed, epoch, name):
    """A sample's one random generator: seed, epoch and the case's name decide, and nothing else."""
    state = np.random.SeedSequence((seed, epoch, zlib.crc32(os.fsencode(name)))).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def draw_sample(turn, crop, seed, cache=None):
    """`turn`, (epoch, case) -> image (4, *crop) float16, labels (1, *crop) uint8, the views' seed, doubt.

    Raises InputError and OSError for what cannot be read, or kept in the cache.
    """
    epoch, case = turn
    generator = case_generator(seed, epoch, case.name)
    whole = prepare(case, cache)
    box = whole["image"], whole["labels"]
    image, labels = random_crop(*box, crop, generator, whole["corner"], whole["shape"])
    image, labels = random_flip(image, labels, generator)
    if torch.cuda.is_available():    # page-locked: a GPU fetches them by itself
        image, labels = image.pin_memory(), labels.pin_memory()
    return image, labels, int(torch.randint(2**31, (), generator=generator)), whole["doubtful"]


def epoch_order(cases, seed, epoch, world):
    """The epoch's cases in random order, the first ones again at its end until every rank has as many."""
    order = [cases[i] for i in torch.randperm(len(cases), generator=case_generator(seed, epoch, "order"))]
    return [order[i % len(order)] for i in range(math.ceil(len(cases) / world) * world)]


def listed_folds(path, cases):
    """Folds of a MONAI data list, {"training": [{"fold": 0, "label": "<case>/<case>_seg.nii.gz"}, ...]}.

    -> {fold: its cases to validate}, and a line on what list and `cases` do not share.
    """
    try:
        entries = json.loads(path.read_text())["training"]
        fold_of = {Path(entry["label"]): int(entry["fold"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"--fold-list {path}: {type(error).__name__}, expected a list of folds") from None
    by_name, folds = {case.name: case for case in cases}, {fold: [] for fold in fold_of.values()}
    for label, fold in fold_of.items():
        case = by_name.pop(match(cases[0].naming, cases[0].naming.segmentation, label), None)
        folds[fold] += [case] if case else []
    here = sum(map(len, folds.values()))
    return folds, (f"{path}: {len(fold_of) - here} of its cases are not in --data, {len(by_name)} of --data "
                   "are not in it and are left out")


def divide(args):
    """--data and its folds -> cases to train on, cases to validate, lines to print. Raises InputError."""
    cases = find_cases(args.data, args.names, args.labels)
    lines, labelled = [describe(cases)], [case for case in cases if case.label]
    if not labelled:
        raise InputError(f"--data {args.data}: no segmented case, expected some to train on")
    if len(labelled) < len(cases):
        lines.append(f"{len(cases) - len(labelled)} cases have no segmentation and are left out")
    if missing := [path for case in labelled for path in case.images if not path.exists()]:
        raise InputError(f"{missing[0]}: no such file, expected four modalities of every case to train on")
    folds = {}
    if args.fold_list:
        folds, line = listed_folds(args.fold_list, labelled)
        lines.append(line)
        labelled = sorted(sum(folds.values(), []))
    elif args.fold != "all":
        folds = dict(enumerate(split_folds(labelled, args.folds, args.seed)))
    folds = {str(fold): those for fold, those in folds.items() if those} | {"all": []}
    if args.fold not in folds:
        raise InputError(f"--fold {args.fold}: expected one of {', '.join(folds)}")
    val_cases = folds[args.fold]
    train_cases = [case for case in labelled if case not in val_cases]
    if not train_cases:
        raise InputError(f"--fold {args.fold}: no case is left to train on, expected more folds")
    return train_cases, val_cases, lines


@torch.no_grad()
def validate(network, cases, crop, autocast, rank, world, device):
    """The mean Dice of ET, TC, WT over whole cases, predicted and painted as `infer.py` would."""
    network.eval()
    total, share = torch.zeros(3, dtype=torch.float64, device=device), cases[rank::world]
    for future in read_ahead(read_case, share):
        image, truth, *_ = future.result()
        with autocast:
            probabilities = predict(network, image, choose_window(image, crop))
        painted = labels_to_regions(regions_to_labels(probabilities > 0.5))
        total += total.new_tensor([dice(p, t) for p, t in zip(painted, truth)])
    if world > 1:
        dist.all_reduce(total)
    network.train()
    return (total / len(cases)).tolist()


# ---- the run ----------------------------------------------------------------------------------------------

NO_SETTINGS = ("data", "fold_list", "out", "cache", "workers")    # may differ between starts of one run


def check_room(args, precision, device, train_cases):
    """Raises InputError for a crop that cannot be trained on, and for too little room on the disk."""
    crop = " ".join(map(str, args.crop))
    if any(side % 8 for side in args.crop):
        raise InputError(f"--crop {crop}: expected multiples of 8; Table 1 halves three times")
    if device.type == "cpu" and precision and args.crop[0] == 16:    # seen in PyTorch 2.13
        raise InputError(f"--crop {crop}: PyTorch's 16-bit gradients on a CPU are wrong for it, expected at "
                         "least 24 as the first, or --amp off")
    if math.prod(side // args.pool for side in args.crop) < 2:
        raise InputError(f"--pool {args.pool}: leaves less than two cells of --crop {crop}, expected less")
    if args.norm == "group" and args.filters % 8:
        raise InputError(f"--filters {args.filters}: expected a multiple of 8, the groups of --norm group")
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        missing = sum(not cache_entry(case, args.cache).exists() for case in train_cases)
        free = shutil.disk_usage(args.cache).free
        if missing * 30e6 > free:
            raise InputError(f"--cache {args.cache}: {free / 1e9:.1f} GB are free, expected "
                             f"{missing * 0.03:.1f} for {missing} cases; --cache none reads them every epoch")


def resume(path, expected, parts):
    """Puts last.pt's state into `parts` (views, optimizer, scaler) -> epochs done, best Dice, log.

    0, -1 and [] without the file. Raises InputError where its settings or cases are not the `expected` ones.
    """
    if not path.exists():
        return 0, -1.0, []
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        found = last["settings"] | {name: last[name] for name in ("train_cases", "val_cases")}
        wrong = [name for name, value in expected.items() if found.get(name) != value]
        if not wrong:
            for name, part in parts.items():
                part.load_state_dict(last[name])
            return last["epoch"], last["best"], last["log"]
    except Exception as error:    # whatever the unpickler and the zip reader meet
        raise InputError(f"{path}: not a checkpoint to go on from ({type(error).__name__}), expected the "
                         "last.pt of a run; move it away") from None
    theirs, ours = (reprlib.repr(values.get(wrong[0])) for values in (found, expected))
    raise InputError(f"{path}: was trained with {wrong[0]} {theirs}, expected {ours} as in this call; "
                     "use another --out")


def log_row(epoch, lr, means, scores, seconds):
    """A row of log.csv: an epoch's losses, means over all steps and ranks, and the held-out cases' Dice."""
    losses = dict(zip(("loss", "dice_loss", "barlow", "invariance", "redundancy"), means))
    dices = dict(zip((f"dice_{name}" for name in ("et", "tc", "wt", "mean")), [*scores, sum(scores) / 3]
                     if scores else [""] * 4))
    row = {"epoch": epoch, "lr": lr, **losses, **dices, "seconds": seconds}
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def train(args, rank, world, device):
    train_cases, val_cases, lines = divide(args)
    precision = choose_precision(args.amp, device)
    args.out.mkdir(parents=True, exist_ok=True)
    check_room(args, precision, device, train_cases)

    torch.manual_seed(args.seed)
    network = move_to(device, SegResNet(filters=args.filters, norm=args.norm))
    views = TwoViews(network, Projector(args.filters, args.dim, args.pool)).to(device)
    # section 3.3: "AdamW optimizer with initial learning rate of 1e-4", "1e-5 weight decay and no dropout"
    optimizer = torch.optim.AdamW(views.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)    # it alone can underflow

    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    settings |= {"world": world, "precision": str(precision or torch.float32).removeprefix("torch.")}
    case_names = {name: [case.name for case in those]
                  for name, those in (("train_cases", train_cases), ("val_cases", val_cases))}
    parts = {"views": views, "optimizer": optimizer, "scaler": scaler}
    first, best, log = resume(args.out / "last.pt", settings | case_names, parts)
    model = views
    if world > 1:
        firsts = [None] * world
        dist.all_gather_object(firsts, first)
        if len(set(firsts)) > 1:
            raise InputError(f"--out {args.out}: ranks find {firsts} epochs done, expected one folder of all")
        model = DistributedDataParallel(views, device_ids=[device.index] if device.type == "cuda" else None)

    steps = math.ceil(len(train_cases) / world)    # of an epoch
    if rank == 0:
        print(*lines, f"{len(train_cases)} cases to train on, {len(val_cases)} to validate; {device.type} x "
              f"{world}, {settings['precision']}; {first} of {args.epochs} epochs of {steps} steps are done",
              sep="\n")
    schedule = [(epoch, case) for epoch in range(first, args.epochs)
                for case in epoch_order(train_cases, args.seed, epoch, world)[rank::world]]
    draw = partial(draw_sample, crop=args.crop, seed=args.seed, cache=args.cache)
    samples = read_ahead(draw, schedule, args.workers)    # of all epochs: it reads on while one ends
    for epoch in range(first, args.epochs):
        start, sums = time.monotonic(), torch.zeros(6, dtype=torch.float64, device=device)
        for step, sample in zip(range(steps), samples):
            image, labels, seed, doubtful = sample.result()
            image, labels = (volume.to(device, non_blocking=True) for volume in (image, labels))
            lr = optimizer.param_groups[0]["lr"] = cosine(args.lr, epoch * steps + step, args.epochs * steps)
            losses = compute_losses(model, image, labels, seed, args.barlow_weight, args.lambd, autocast)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(losses[0]).backward()
            scaler.step(optimizer)
            scaler.update()
            sums[:5] += losses.detach()
            sums[5] += doubtful
            if rank == 0:
                show_progress(f"epoch {epoch + 1}/{args.epochs}, step", step + 1, steps, start)
        seconds = time.monotonic() - start
        if world > 1:
            dist.all_reduce(sums)
        *means, doubtful = (sums / (steps * world)).tolist()    # doubtful: a share
        # The weights tell, not the loss: float16's scaler leaves out a step that overflows.
        if not all(weight.isfinite().all() for weight in views.parameters()):
            raise InputError(f"epoch {epoch + 1}: weights are not finite, expected numbers; "
                             f"loss {means[0]:g}; it is not saved; try a lower --lr or --amp off")
        scores, better = [], False
        if val_cases and ((epoch + 1) % args.validate_every == 0 or epoch + 1 == args.epochs):
            scores = validate(network, val_cases, args.crop, autocast, rank, world, device)
            better = sum(scores) / 3 > best
            best = max(best, sum(scores) / 3)
        log.append(log_row(epoch + 1, lr, means, scores, seconds))
        if rank == 0:
            saved = {"model": network.state_dict(), "settings": settings, "epoch": epoch + 1, **case_names}
            if better:
                save_tensors(args.out / "best.pt", saved)
            write_csv(args.out / "log.csv", log)
            saved |= {name: part.state_dict() for name, part in parts.items()}
            saved |= {"finished": epoch + 1 == args.epochs, "best": best, "log": log}
            save_tensors(args.out / "last.pt", saved)    # last: a restart trusts it
            print("  ".join(f"{name} {value}" for name, value in log[-1].items() if value != ""))
            if doubtful and epoch == first:
                print(f"warning: {doubtful * len(train_cases):.0f} cases look unsuitable; data.py says which "
                      "and how")


# ---- the command ------------------------------------------------------------------------------------------

def at_least(least, kind=int):
    """An argparse type: a finite number of at least `least`."""
    def number(text):
        if not least <= kind(text) < 2**63:    # false for NaN too
            raise argparse.ArgumentTypeError(f"{text}, expected a number of at least {least}")
        return kind(text)
    return number


def parse_arguments():
    parser = argparse.ArgumentParser(description="Trains SegResNet with soft Dice and the Barlow Twins term.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("the paper's").add_argument
    add("--fold", default="0", help="which fold is held out, or 'all': none is")
    add("--folds", type=at_least(2), default=5, help="how many")
    add("--epochs", type=at_least(1), default=300, help="of one crop of every training case")
    add("--crop", type=at_least(16), nargs=3, default=[192, 192, 144], metavar=("D", "H", "W"), help="voxels")
    add("--lr", type=at_least(0, float), default=1e-4, help="of AdamW at the start")
    add("--weight-decay", type=at_least(0, float), default=1e-5, help="of AdamW")
    add("--lambd", type=at_least(0, float), default=0.005, help="lambda of Eq. 3")
    add("--pool", type=at_least(1), default=16, help="the projection branch's average pooling")
    add = parser.add_argument_group("where the paper is silent").add_argument
    add("--filters", type=at_least(1), default=32, help="channels of the first level")
    add("--norm", choices=NORMS, default="instance", help="Table 1's IN")
    add("--dim", type=at_least(1), default=128, help="the projection branch's width")
    add("--barlow-weight", type=at_least(0, float), help="of Eq. 3 beside Eq. 4; None is 1/dim, 0 is without")
    add("--validate-every", type=at_least(1), default=5, metavar="EPOCHS", help="and after the last")
    add("--amp", choices=AMP, default="auto", help="mixed precision; auto: where the device has it")
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--data", type=folder, default=Path("data/BraTS2021_Training_Data"), help="folder of cases")
    add_cohort_flags(group)
    add("--fold-list", type=folder, metavar="FILE.json", help="a MONAI data list's folds in place of --folds")
    add("--out", type=folder, help="gets checkpoints and log; None is runs/fold<F> or runs/all")
    add("--cache", type=folder, help="of prepared cases, 30 MB each, or none; None is cache beside OUT")
    add("--workers", type=at_least(1), help="threads a GPU that read and crop",
        default=min(8, max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    add("--seed", type=at_least(0), default=0, help="of weights, folds and samples")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / ("all" if args.fold == "all" else f"fold{args.fold}")
    args.cache = None if args.cache == Path("none") else args.cache or args.out.parent / "cache"
    args.barlow_weight = 1 / args.dim if args.barlow_weight is None else args.barlow_weight
    return args


def main():
    args = parse_arguments()
    rank, world, device = start_ranks()
    torch.backends.cudnn.benchmark = True    # all training steps have one shape
    train(args, rank, world, device)
    if world > 1:
        dist.destroy_process_group()    # not in train(), whose DDP holds it


if __name__ == "__main__":
    run_command(main)
