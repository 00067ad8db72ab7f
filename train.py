"""The training loop: sections 3.3 and 4. The defaults are the paper's; where it is silent, the README's table of choices has them.

    torchrun --nproc_per_node=4 train.py --fold 0      # the paper's run, once for each of the folds 0 to 4; four cases a step
    python train.py --fold 0                           # the same program on one GPU or the CPU; one case a step
    python train.py --data DIR --fold all              # on every case, none held out

Writes OUT/last.pt every epoch and every ten minutes, OUT/best.pt whenever the mean Dice of the fold's validation cases is the best so far,
and OUT/log.csv. The same command with an OUT that holds last.pt goes on where that stopped, and ends with the weights of a run that was
never stopped. SIGTERM and SIGINT finish the step, save and leave, with exit code 143 and 130. last.pt's "finished" says whether all epochs are done.
"""

import argparse
import atexit
import io
import math
import multiprocessing
import os
import reprlib
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from barlow import Projector, barlow_twins_terms, soft_dice_loss
from data import (REGIONS, InputError, Parser, augment, case_generator, check_cache, cut, describe, exit_with, find_cases, is_out_of_memory, join_ranks,
                  labels_to_regions, load_case, make_folder, normalize, prepare, random_axes, random_corner, regions_to_labels, show_progress, split_folds,
                  whole_file)
from infer import AMP, choose_precision, choose_window, dice, keep_memory, move_to, predict, read_checkpoint, write_csv
from segresnet import NORMS, SegResNet


UNTOLD = "%(default).0s"    # argparse adds no default of its own to a help text that has this


def parse_arguments():
    parser = Parser(description="Trains SegResNet with soft Dice and the Barlow Twins term.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/BraTS2021_Training_Data"), help="folder of cases")
    add("--fold", default="0", help="which fold is held out, or 'all': none is")
    add("--folds", type=int, default=5)
    add("--out", type=Path, help="folder of checkpoints and log; resumed if it holds last.pt (default: runs/fold<F> or runs/all)" + UNTOLD)
    add("--cache", type=Path, help="folder of prepared cases, 37 GB for BraTS 2021, or 'none'; samples are the same (default: cache beside OUT: runs/cache)" + UNTOLD)
    add("--epochs", type=int, default=300, help="an epoch is one crop of every training case")
    add("--lr", type=float, default=1e-4)
    add("--weight-decay", type=float, default=1e-5)
    add("--crop", type=int, nargs=3, default=(192, 192, 144), metavar=("D", "H", "W"))
    add("--filters", type=int, default=32, help="channels of the first level")
    add("--norm", choices=NORMS, default="instance")
    add("--barlow-weight", type=float, help="of the Barlow Twins term; 0 trains without it, 1 is the literal sum (default: 1/dim)" + UNTOLD)
    add("--lambd", type=float, default=0.005, help="lambda of Eq. 3")
    add("--pool", type=int, default=16, help="the projector's average pooling")
    add("--dim", type=int, default=128, help="the projector's width")
    add("--validate-every", type=int, default=5, metavar="EPOCHS")
    add("--amp", choices=AMP, default="auto", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the network: minutes at the start; slower than without on a CPU, not measured on a GPU")
    add("--workers", type=int, default=min(8, max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
        help="processes a GPU that read and crop; 0: none")
    add("--seed", type=int, default=0, help="of weights, folds and samples")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / ("all" if args.fold == "all" else f"fold{args.fold}")
    args.cache = None if str(args.cache) == "none" else args.cache or args.out.parent / "cache"
    args.barlow_weight = 1 / args.dim if args.barlow_weight is None else args.barlow_weight
    return args


def check_arguments(args):
    for flag in ("folds", "epochs", "filters", "pool", "dim", "validate_every"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    for flag in ("lr", "weight_decay", "barlow_weight", "lambd", "workers", "seed"):
        if not 0 <= getattr(args, flag) < math.inf:    # also NaN
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number of at least 0")
    if args.seed >= 2**64:
        raise InputError(f"--seed {args.seed}: expected less than 2**64")
    if args.fold != "all" and args.fold not in map(str, range(args.folds)):
        raise InputError(f"--fold {args.fold}: expected 0 to {args.folds - 1}, or all")
    if any(side < 16 or side % 8 for side in args.crop):
        raise InputError(f"--crop {' '.join(map(str, args.crop))}: expected multiples of 8, at least 16; Table 1 halves three times")
    if args.barlow_weight and math.prod(side // args.pool for side in args.crop) < 2:
        raise InputError(f"--pool {args.pool}: leaves fewer than two cells of a crop of {args.crop}, expected a smaller one")
    if args.norm == "group" and args.filters % 8:
        raise InputError(f"--filters {args.filters}: expected a multiple of 8, the number of groups")


class Crops(Dataset):
    """Samples for a schedule of (epoch, case): a crop of the case, flipped; image (4, *crop) float16, labels (1, *crop) uint8, a seed for its
    two views, its name. The same with a cache, without one, and while it fills.

    A case that cannot be read gives its InputError instead: raised in a worker process it would arrive as a traceback.
    """

    def __init__(self, schedule, crop, seed, cache=None):
        self.schedule, self.crop, self.seed, self.cache = schedule, crop, seed, cache

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, index):
        epoch, case = self.schedule[index]
        generator = case_generator(self.seed, epoch, case.name)
        try:
            prepared = prepare(case, self.cache)
        except InputError as error:
            return error
        corner = random_corner(prepared.shape, self.crop, generator)    # in the whole volume, cached or not
        corner = [c - of_box for c, of_box in zip(corner, prepared.corner)]
        axes = random_axes(generator)
        image, labels = (cut(volume, corner, self.crop, axes) for volume in (prepared.image, prepared.labels))
        return image, labels, int(torch.randint(2**31, (), generator=generator)), case.name


class TwoViews(nn.Module):
    """What DDP wraps: network and projection branch in one forward pass, so that one backward synchronises both.

    (2, 4, D, H, W), view A then view B of one crop -> logits (2, 3, D, H, W) and z_a, z_b (cells, dim), or None without the term:
    at weight 0 there is no projector, since DDP cannot have parameters that the loss does not reach.
    """

    def __init__(self, network, projector):
        super().__init__()
        self.network, self.projector = network, projector

    def forward(self, x):
        features = self.network.features(x)
        logits = self.network.decoder_end(features)
        if self.projector is None:
            return logits, None, None
        return logits, self.projector(features[:1]), self.projector(features[1:])


def cosine(lr, step, steps):
    """Section 3.3: "progressively decrease it according to Cosine schedule". Here: every step, down to zero, no warm-up."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def epoch_order(cases, seed, epoch, world):
    """The epoch's cases in random order, the first ones again at its end until every rank has as many."""
    generator = case_generator(seed, epoch, "order")
    order = [cases[i] for i in torch.randperm(len(cases), generator=generator)]
    steps = math.ceil(len(cases) / world)
    return [order[i % len(order)] for i in range(steps * world)]


SAVE_EVERY = 600    # seconds, within an epoch


def outlive_signals(_):
    """For the processes that read: neither Ctrl-C nor a scheduler's SIGTERM to all shall end them before the step under way has its samples."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_readers():
    """At the end of the main process, however it came: those that read would outlive it too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch's own handler would complain of their end
    for reader in multiprocessing.active_children():
        reader.kill()


def agree(failure, wish, world):
    """Ends every rank if one has a `failure` (or None): that one prints it, and no other is left waiting for it in a collective.

    Otherwise the largest `wish` of all ranks: 0 go on, 1 save, 128 + a signal's number: save and leave with this exit code.
    """
    told = torch.tensor([float(failure is not None), wish])    # on the CPU: Gloo notices a rank that is gone, NCCL may wait for it
    if world > 1:
        dist.all_reduce(told, dist.ReduceOp.MAX)
    failed, wish = told.tolist()
    if failure is not None:
        exit_with(failure)
    if failed:
        time.sleep(10)    # torchrun ends this rank as soon as the other one has left
        sys.exit(2)
    return int(wish)


@torch.no_grad()
def validate(network, cases, crop, autocast, device, rank, world, epoch, signals):
    """The mean Dice of ET, TC, WT (3,) over whole cases, predicted and painted as `infer.py` would. Each case on one rank, once.

    Leaves when a signal has come: what precedes validation is saved.
    """
    network.eval()
    total, failure = torch.zeros(3, dtype=torch.float64, device=device), None
    for case in cases[rank::world]:
        if signals:
            break
        try:
            image, target, _ = load_case(case)
        except InputError as error:
            failure = error
            break
        image = normalize(image)
        with autocast:
            probabilities = predict(network, image, choose_window(image, crop))
        painted = labels_to_regions(regions_to_labels(probabilities > 0.5))
        total += torch.tensor([dice(p, t) for p, t in zip(painted, target)], dtype=torch.float64, device=device)
    wish = agree(failure, 128 + signals[0] if signals else 0, world)
    if wish:
        leave(wish, rank, f"before the validation of epoch {epoch}")
    if world > 1:
        dist.all_reduce(total)
    network.train()
    return (total / len(cases)).tolist()


def leave(wish, rank, where):
    if rank == 0:
        print(f"{signal.Signals(wish - 128).name}: stopped {where}, and saved; the same command goes on from there", flush=True)
    sys.exit(wish)


def save_checkpoint(path, checkpoint):
    """Tensors, numbers and strings only; `path` is never half a checkpoint. Raises OSError."""
    buffer = io.BytesIO()    # torch.save to a file hides a full disk behind an error of its own
    torch.save(checkpoint, buffer)
    with whole_file(path) as beside:
        beside.write_bytes(buffer.getbuffer())


def load_last(path, expected, views, optimizer, scaler):
    """last.pt to go on from, its state put into network, optimizer and scaler.

    Raises InputError where it is of another run: its settings and case lists must be those of this one.
    """
    try:
        last = read_checkpoint(path)
        found = {**last["settings"], "train_cases": last["train_cases"], "val_cases": last["val_cases"]}
        for name, value in expected.items():
            if found.get(name) != value:
                if name.endswith("_cases"):
                    raise InputError(f"{path}: was trained on other cases ({name} differ), expected the same --data; use another --out")
                raise InputError(f"{path}: was trained with {name} {reprlib.repr(found.get(name))}, expected {value} as in this call; use another --out")
        for part, name in ((views, "views"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(last[name])
        return [last[name] for name in ("epoch", "step", "best", "log", "seconds", "sums")]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}), expected a disk that answers; try again") from None
    except Exception as error:    # whatever the unpickler and the zip reader meet
        raise InputError(f"{path}: not a checkpoint of train.py's to go on from ({type(error).__name__}), "
                         "expected the last.pt of a run; move it away") from None


def train(args, rank, world, device):
    check_arguments(args)
    precision = choose_precision(args.amp, device)
    if device.type == "cpu" and precision and args.crop[0] == 16:    # seen in PyTorch 2.13: NaN, from memory that nothing was written to
        raise InputError(f"--crop {' '.join(map(str, args.crop))}: PyTorch's 16-bit gradients on a CPU are wrong for it, "
                         "expected at least 24 as the first, or --amp off")
    cases = find_cases(args.data)
    for case in cases:
        missing = [path for path in case.images if not path.exists()]
        if missing or case.label is None:
            what = f"{missing[0]}: missing" if missing else f"{case.images[0].parent}: no segmentation in it"
            raise InputError(f"{what}, expected four modalities and a segmentation for every case to train on")
    if len({case.et_label for case in cases}) > 1:
        raise InputError(f"--data {args.data}: {describe(cases)}; expected one generation")
    et_label = cases[0].et_label
    val_cases = [] if args.fold == "all" else split_folds(cases, args.folds, args.seed)[int(args.fold)]
    train_cases = [case for case in cases if case not in val_cases]
    if not train_cases:
        raise InputError(f"--folds {args.folds}: leaves no case to train on, expected at least 2, or --fold all")
    make_folder(args.out)
    room, told = (False, "") if args.cache is None else check_cache(args.cache, train_cases)

    torch.manual_seed(args.seed)
    network = SegResNet(filters=args.filters, norm=args.norm)
    projector = Projector(args.filters, args.dim, args.pool) if args.barlow_weight else None
    views, scores = TwoViews(move_to(device, network), projector).to(device), None
    # section 3.3: "AdamW optimizer with initial learning rate of 1e-4", "1e-5 weight decay and no dropout"
    optimizer = torch.optim.AdamW(views.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)    # float16 alone can underflow

    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "cache", "workers")}
    settings.update(crop=list(args.crop), world=world, precision=str(precision or torch.float32).removeprefix("torch."))
    about = {"train_cases": [case.name for case in train_cases], "val_cases": [case.name for case in val_cases]}
    first, done, best, log = 0, 0, -1.0, []    # epochs done, and steps of the next one
    sums, seconds = torch.zeros(5, dtype=torch.float64, device=device), 0.0    # over those steps: the loss and its terms
    if (args.out / "last.pt").exists():
        first, done, best, log, seconds, so_far = load_last(args.out / "last.pt", {**settings, **about}, views, optimizer, scaler)
        if rank == 0:    # they are those of all ranks
            sums += torch.tensor(so_far, dtype=sums.dtype, device=device)
    if world > 1:
        from_rank_0 = torch.tensor([first, done])
        dist.broadcast(from_rank_0, 0)
        agree(None if from_rank_0.tolist() == [first, done] else InputError(
            f"{args.out}: rank {rank} finds {first} epochs and {done} steps done in it, rank 0 {from_rank_0.tolist()}, "
            "expected one folder that all machines see"), 0, world)
    # views.network, not model.module: checkpoints carry no "module." prefix
    model = torch.compile(views) if args.compile else views
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    steps = math.ceil(len(train_cases) / world)    # an epoch
    if rank == 0:
        print(f"{describe(cases)}\nfold {args.fold}: {len(train_cases)} cases to train on, {len(val_cases)} to validate; "
              f"{world} process{'es' * (world > 1)} on {device.type}, {settings['precision']}; "
              f"{sum(p.numel() for p in network.parameters()):,} parameters; "
              + (f"epochs {first + 1} to {args.epochs} of {steps} steps" if first < args.epochs else f"all {first} epochs were done before")
              + (f", {done} steps of epoch {first + 1} done before" if done else ""), flush=True)
        if told:
            print(told, flush=True)
        for leftover in args.out.glob(".[0-9]*"):    # of a run killed while it wrote
            leftover.unlink()

    def save(epoch, step, better=False):
        """last.pt, from which everything else follows, comes last. Every rank calls it: a disk that fails ends them all."""
        total, failure = sums.clone(), None
        if world > 1:
            dist.all_reduce(total)
        if rank == 0:
            checkpoint = {"model": network.state_dict(), "settings": settings, **about, "et_label": et_label, "epoch": epoch,
                          "dice": scores or []}
            try:
                if better:
                    save_checkpoint(args.out / "best.pt", checkpoint)
                if log:
                    write_csv(args.out / "log.csv", log)
                save_checkpoint(args.out / "last.pt", {
                    **checkpoint, "views": views.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "step": step, "finished": epoch == args.epochs, "best": best, "log": log, "sums": total.tolist(), "seconds": seconds})
            except OSError as error:
                failure = error
        agree(failure, 0, world)

    # One loader for all epochs, so that its workers read on while an epoch ends.
    schedule = [(epoch, case) for epoch in range(first, args.epochs)
                for case in epoch_order(train_cases, args.seed, epoch, world)[rank::world]][done:]
    samples = iter(DataLoader(Crops(schedule, args.crop, args.seed, args.cache if room else None), batch_size=None, num_workers=args.workers,
                              pin_memory=device.type == "cuda", worker_init_fn=outlive_signals))
    atexit.register(end_readers)
    signals, saved = [], time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    for epoch in range(first, args.epochs):
        start = time.monotonic() - seconds
        for i in range(done, steps):
            sample = next(samples)
            wish = 128 + signals[0] if signals else int(time.monotonic() - saved > SAVE_EVERY)
            wish = agree(sample if isinstance(sample, InputError) else None, wish, world)
            if wish:
                save(epoch, i)
                saved = time.monotonic()
            if wish > 1:
                leave(wish, rank, f"in epoch {epoch + 1}, after step {i}")
            image, labels, views_seed, name = sample

            for group in optimizer.param_groups:
                group["lr"] = cosine(args.lr, epoch * steps + i, args.epochs * steps)

            # section 3.1: "we copy it and augment it each copy independently, forming a batch of 2"
            x = image.to(device, non_blocking=True).float().expand(2, -1, -1, -1, -1)    # (2, 4, D, H, W)
            labels = labels.to(device, non_blocking=True).expand(2, -1, -1, -1, -1)      # (2, 1, D, H, W)
            x, labels = augment(x, labels, torch.Generator(device).manual_seed(views_seed))
            p_true = labels_to_regions(labels[:, 0], et_label)                           # (2, 3, D, H, W)

            with autocast:
                logits, z_a, z_b = model(x)
            dice_loss = soft_dice_loss(torch.sigmoid(logits.float()), p_true)        # Eq. 4
            invariance = redundancy = torch.zeros((), device=device)
            if projector is not None:
                invariance, redundancy = barlow_twins_terms(z_a, z_b)                # Eq. 1 and 2, each GPU on its own images
            barlow = invariance + args.lambd * redundancy                            # Eq. 3
            loss = dice_loss + args.barlow_weight * barlow
            terms = torch.stack([loss, dice_loss, barlow, invariance, redundancy]).detach()
            agree(None if loss.isfinite() else InputError(
                f"{name}: loss is not finite in epoch {epoch + 1}, step {i + 1} (Dice {dice_loss:g}, Barlow Twins {barlow:g}), "
                "expected a number; try a lower --lr or --amp off"), 0, world)

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            sums += terms
            seconds = time.monotonic() - start
            if rank == 0:
                show_progress(f"epoch {epoch + 1}/{args.epochs}, loss {loss:.4f}, step", i + 1, steps, start)

        means = sums / (steps * world)
        if world > 1:
            dist.all_reduce(means)
        means = means.tolist()
        if val_cases and ((epoch + 1) % args.validate_every == 0 or epoch + 1 == args.epochs):
            if done < steps:    # validation takes long, and a scan that cannot be read ends it
                save(epoch, steps)
            scores = validate(network, val_cases, args.crop, autocast, device, rank, world, epoch + 1, signals)
        lr = cosine(args.lr, (epoch + 1) * steps - 1, args.epochs * steps)    # the last step's
        row = {"epoch": epoch + 1, "lr": lr, **dict(zip(("loss", "dice_loss", "barlow", "invariance", "redundancy"), means)),
               **{f"dice_{region.lower()}": scores[r] if scores else "" for r, region in enumerate(REGIONS)},
               "dice_mean": sum(scores) / 3 if scores else "", "seconds": seconds, "cases_per_second": steps * world / seconds}
        log.append({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        if rank == 0:
            left = time.strftime("%H:%M:%S", time.gmtime((args.epochs - epoch - 1) * seconds))
            dices = "  Dice " + ", ".join(f"{region} {score:.4f}" for region, score in zip(REGIONS, scores)) if scores else ""
            print(f"epoch {epoch + 1}/{args.epochs}  loss {means[0]:.4f} (Dice {means[1]:.4f}, Barlow Twins {means[2]:.3f})  lr {lr:.2e}  "
                  f"{steps * world / seconds:.2f} cases/s  {left} left{dices}", flush=True)
        better = scores is not None and sum(scores) / 3 > best
        best = sum(scores) / 3 if better else best
        sums, seconds, done = torch.zeros_like(sums), 0.0, 0
        save(epoch + 1, 0, better)
        scores, saved = None, time.monotonic()
        if rank == 0 and room and epoch == first:    # by now every entry is made, unless the disk has filled up
            room, told = check_cache(args.cache, train_cases)
            if not room:
                print(told, flush=True)


def main():
    args = parse_arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun sets them
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True    # every step has the same shape
    else:
        keep_memory()
    code = 0
    try:
        if world > 1:
            join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, world)
        train(args, rank, world, device)
    except SystemExit as left:    # all ranks together, as they have agreed
        code = left.code
    except KeyboardInterrupt:    # before the first step
        sys.exit(128 + signal.SIGINT)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error = InputError(f"--crop {' '.join(map(str, args.crop))} with --filters {args.filters} does not fit into the memory of "
                           f"{device}, expected a smaller --crop or fewer --filters")
        exit_with(error, rank)
    except (InputError, OSError) as error:
        exit_with(error, rank)
    if world > 1:
        dist.destroy_process_group()    # outside of `train`, whose DDP holds the group
    sys.exit(code)


if __name__ == "__main__":
    main()
