"""Speed beside MONAI, and beside what the machine can do.

    python benchmarks/speed.py [--data DIR] [--quick] [--memory-kept ours | both | neither] [--csv FILE]

Ours and the rival's run in turn, A B A B, in one process, medians with minimum and maximum; where both compute the same thing, that is checked
first. On a CPU train.py and infer.py keep the memory of large tensors (infer.keep_memory): so ours runs, and the rival's as a process starts, unless
--memory-kept says otherwise. DIR holds real cases (the first is used); without it a synthetic one of 240x240x155 is made. On a GPU the rows of the paper's step are added.
Needs benchmarks/requirements.txt.
"""

import argparse
import ctypes
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
warnings.filterwarnings("ignore")
logging.getLogger().setLevel(logging.ERROR)
import monai  # noqa: E402
from monai import transforms as mt  # noqa: E402
from monai.inferers import sliding_window_inference  # noqa: E402
from monai.losses import DiceLoss  # noqa: E402
from monai.metrics import compute_hausdorff_distance  # noqa: E402
from monai.networks.nets import SegResNet as MonaiSegResNet  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import phantom  # noqa: E402
import segresnet  # noqa: E402
from barlow import barlow_twins_loss, soft_dice_loss  # noqa: E402
from data import augment, find_cases, labels_to_regions, load_case, normalize, prepare  # noqa: E402
from infer import choose_precision, choose_window, hausdorff95, keep_memory, move_to, predict, write_csv  # noqa: E402
from segresnet import SegResNet, to_monai  # noqa: E402
from train import Crops, Projector, TwoViews  # noqa: E402

CROP = (192, 192, 144)
MEMORY_KEPT = "ours"    # --memory-kept


def seconds(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_as_it_starts():
    """keep_memory undone: glibc's own limits, where a process with large tensors has brought them."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)    # M_MMAP_MAX
    libc.mallopt(-3, 2**25)    # M_MMAP_THRESHOLD: from 32 MiB on, straight from the system
    libc.mallopt(-1, 2**26)    # M_TRIM_THRESHOLD
    libc.malloc_trim(0)    # else the rival works in what ours has left


def race(ours, rival, times, alike=False):
    """In turn, each once untimed and once timed. -> two lists of seconds. `alike`: the rival's memory is kept where ours is."""
    found = [], []
    for _ in range(times):
        for side, (function, keep) in enumerate([(ours, MEMORY_KEPT != "neither"), (rival, MEMORY_KEPT == "both" or alike and MEMORY_KEPT == "ours")]):
            if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
                keep_memory() if keep else memory_as_it_starts()
            function()
            found[side].append(seconds(function))
    return found


def ceilings(path):
    """What the machine does at best, measured now: {name: (value, unit)}"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 2048
    found = {}
    for name, dtype in (("float32 matrix product", torch.float32), ("bfloat16 matrix product", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        found[name] = (2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5)) / 1e9, "GFLOP/s")
    block, other = torch.empty(2**27, device=device, dtype=torch.uint8), torch.zeros(2**27, device=device, dtype=torch.uint8)
    found["memory copy"] = (2**27 / min(seconds(lambda: block.copy_(other)) for _ in range(5)) / 1e9, "GB/s")
    size = path.stat().st_size

    def read():
        return path.read_bytes()

    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)    # out of the page cache, if the system obeys
    os.close(file)
    found["cold file read"] = (size / seconds(read) / 1e9, "GB/s")
    found["warm file read"] = (size / min(seconds(read) for _ in range(5)) / 1e9, "GB/s")
    return found


# ---- the rows: each yields (what, rival, our seconds, the rival's, at least, work and the ceiling it is held against) ----


def make_phantom(folder):
    folder.mkdir()
    images, labels = phantom.make_case((240, 240, 155), 0, 0)
    for suffix, volume in zip((*phantom.MODALITIES, "seg"), (*images, labels)):
        phantom.save(folder / f"{folder.name}_{suffix}.nii.gz", volume)
    return folder


def tutorial(files):
    """The transforms of MONAI's BraTS tutorial, with the paper's crop. -> those that never change, those that are drawn"""
    keys = ["image", "label"]
    fixed = [mt.LoadImaged(keys), mt.EnsureChannelFirstd("image"), mt.EnsureTyped(keys), mt.ConvertToMultiChannelBasedOnBratsClassesd("label"),
             mt.Orientationd(keys, axcodes="RAS"), mt.Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode=("bilinear", "nearest"))]
    drawn = [mt.RandSpatialCropd(keys, roi_size=CROP, random_size=False), *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
             mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True), mt.RandScaleIntensityd("image", factors=0.1, prob=1.0),
             mt.RandShiftIntensityd("image", offsets=0.1, prob=1.0)]
    return fixed, drawn, {"image": [str(path) for path in files.images], "label": str(files.label)}


def sample_rows(case, times, scratch):
    torch.set_num_threads(1)
    cache = scratch / "cache"
    cache.mkdir()
    crops = Crops([(epoch, case) for epoch in range(1000)], CROP, 0, cache)
    fixed, drawn, files = tutorial(case)
    index = iter(range(1000))
    nbytes = 9 * np.prod(CROP)
    ours, rival = race(lambda: crops[next(index)], lambda: mt.Compose(fixed + drawn)(files), times)
    yield "a sample, 192x192x144, warm, one core", "MONAI's BraTS tutorial", ours, rival, 40, (nbytes / 1e9, "memory copy")
    persistent = monai.data.PersistentDataset([files], mt.Compose(fixed + drawn), cache_dir=scratch / "persistent")
    ours, rival = race(lambda: crops[next(index)], lambda: persistent[0], times)
    yield "the same", "MONAI PersistentDataset", ours, rival, 4, (nbytes / 1e9, "memory copy")
    uncached = Crops(crops.schedule, CROP, 0)

    def fill():
        for entry in cache.iterdir():
            entry.unlink()
        return crops[0]

    yield "a sample that fills the cache", "the same, uncached", *race(fill, lambda: uncached[0], times, alike=True), None, None
    torch.set_num_threads(os.cpu_count())


def augment_row(case, crop, times):
    image, labels, _, _ = Crops([(0, case)], crop, 0)[0]
    image = image.float()
    keys = ["image", "label"]
    theirs = mt.Compose([mt.RandAffined(keys, prob=1.0, rotate_range=(0.1,) * 3, scale_range=(0.1,) * 3, mode=("bilinear", "nearest"), padding_mode="zeros"),
                         mt.RandScaleIntensityd("image", factors=0.3, prob=0.5, channel_wise=True),
                         mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
                         mt.RandGaussianNoised("image", prob=0.2, std=0.1)])
    regions = labels_to_regions(labels[0])
    draws = iter(range(1000))

    def ours():
        x, views = augment(image.expand(2, -1, -1, -1, -1), labels.expand(2, -1, -1, -1, -1), torch.Generator().manual_seed(next(draws)))
        return x, labels_to_regions(views[:, 0])

    mine, rival = race(ours, lambda: [theirs({"image": image, "label": regions.float()}) for _ in range(2)], times)
    size = "x".join(map(str, crop))
    yield f"both augmented views, {size}", "MONAI RandAffined, scale, shift, noise", mine, rival, 3, None


def two_networks(filters, device):
    """Ours, laid out as train.py does, and MONAI's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = SegResNet(filters=filters), MonaiSegResNet(init_filters=filters, in_channels=4, out_channels=3, norm="INSTANCE")
    theirs.load_state_dict(to_monai(ours.state_dict()))
    x = torch.randn(1, 4, 32, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)
    return move_to(device, ours), theirs.to(device)


def our_step(network, dim, pool, x, target, precision, compiled=False):
    """One step of train.py: two views, Dice and Barlow Twins, AdamW."""
    views = TwoViews(network, Projector(network.init_conv.out_channels, dim, pool).to(x.device))
    optimizer = torch.optim.AdamW(views.parameters(), lr=1e-4, weight_decay=1e-5)
    model = torch.compile(views) if compiled else views

    def step():
        with torch.autocast(x.device.type, dtype=precision, enabled=precision is not None):
            logits, z_a, z_b = model(x)
        loss = soft_dice_loss(torch.sigmoid(logits.float()), target) + barlow_twins_loss(z_a, z_b) / dim
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def monai_step(network, x, target, precision=None, projector=None):
    """The same with MONAI's network and loss; with a projector also with our second term."""
    loss_function = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True)
    optimizer = torch.optim.AdamW([*network.parameters(), *(projector.parameters() if projector else [])], lr=1e-4, weight_decay=1e-5)
    tapped = []
    if projector:
        network.conv_final.register_forward_pre_hook(lambda _, inputs: tapped.append(inputs[0]))

    def step():
        with torch.autocast(x.device.type, dtype=precision, enabled=precision is not None):
            logits = network(x)
        loss = loss_function(logits.float(), target.float())
        if projector:
            features = tapped.pop()
            loss = loss + barlow_twins_loss(projector(features[:1]), projector(features[1:])) / projector.mlp[0].out_features
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def step_rows(filters, crop, times):
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    x, target = torch.randn(2, 4, *crop), torch.rand(2, 3, *crop) < 0.2
    size = f"{filters} filters, {'x'.join(map(str, crop))}"
    for rival, projected, wanted in (("MONAI's network and DiceLoss, float32", False, {16: 2.5, 32: 3}.get(filters)), ("the same in our precision, with both terms", True, 1.05)):
        ours, theirs = two_networks(filters, device)
        rival_step = monai_step(theirs, x, target, precision, Projector(filters, 32, 8)) if projected else monai_step(theirs, x, target)
        steps = our_step(ours, 32, 8, x, target, precision), rival_step
        with FlopCounterMode(display=False) as flops:
            steps[0]()
        work = (flops.get_total_flops() / 1e9, "float32 matrix product" if precision is None else "bfloat16 matrix product")
        yield f"a training step, {size}, {str(precision or torch.float32)[6:]}", rival, *race(*steps, times, alike=projected), wanted, work


def memory_row(filters, crop):
    from test_segresnet import kept_for_backward

    ours, theirs = two_networks(filters, torch.device("cpu"))
    x = torch.randn(2, 4, *crop)
    segresnet.RECOMPUTE_ON_CPU = True
    mine, rival = kept_for_backward(ours, x)[1], kept_for_backward(theirs, x)[1]
    segresnet.RECOMPUTE_ON_CPU = False
    yield f"MB kept for backward, {filters} filters, {'x'.join(map(str, crop))}, float32", "MONAI SegResNet", [mine / 1e6], [rival / 1e6], 1.6, None


def prediction_rows(case, filters, times):
    image = normalize(load_case(case)[0])
    ours, theirs = (network.eval() for network in two_networks(filters, torch.device("cpu")))

    precision = choose_precision("auto", torch.device("cpu"))

    def mine():
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):    # as infer.py does
            return predict(ours, image, choose_window(image, CROP))

    def whole():
        padded = torch.nn.functional.pad(image, (0, -image.shape[3] % 16, 0, -image.shape[2] % 16, 0, -image.shape[1] % 16))
        return torch.sigmoid(theirs(padded[None]))

    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        mine()
    work = (flops.get_total_flops() / 1e9, "bfloat16 matrix product" if precision else "float32 matrix product")
    with torch.inference_mode():
        sliding = race(mine, lambda: torch.sigmoid(sliding_window_inference(image[None], CROP, 1, theirs, overlap=0.5, mode="gaussian")), times)
        yield f"a case to probabilities, {filters} filters, {str(precision or torch.float32)[6:]}", "sliding_window_inference, overlap 0.5", *sliding, 7, work
        yield "the same", "one window of 240x240x160", *race(mine, whole, times), 2, work


def hd95_rows(case, times):
    truth = load_case(case)[1]
    moved = torch.roll(truth, (3, 2), (1, 2))
    holed = moved & (torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < 0.97)    # a surface around each hole

    for what, prediction in (("HD95 of three regions", moved), ("the same, 3 % of the prediction's voxels missing", holed)):
        def mine():
            return [hausdorff95(p, t) for p, t in zip(prediction, truth)]

        def theirs():
            return compute_hausdorff_distance(prediction[None].float(), truth[None].float(), include_background=True, percentile=95)[0].tolist()

        np.testing.assert_allclose(mine(), theirs(), atol=1e-3)
        yield what, "compute_hausdorff_distance", *race(mine, theirs, times), 5, None


def gpu_rows(times):
    """The paper's step on a GPU: 32 filters, two 192x192x144 copies."""
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    x, target = torch.randn(2, 4, *CROP, device=device), torch.rand(2, 3, *CROP, device=device) < 0.2
    for name, precision, compiled in (("eager bfloat16", torch.bfloat16, False), ("compiled bfloat16", torch.bfloat16, True)):
        ours, theirs = two_networks(32, device)
        step = our_step(ours, 128, 16, x, target, precision, compiled)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() / 1e9
        yield f"the paper's step, {name}, peak {peak:.1f} GB", "MONAI under autocast", *race(step, monai_step(theirs, x, target, precision), times), 1.5, (17_700, "bfloat16 matrix product")


def table(rows, found):
    head = ["what", "rival", "ours", "rival's", "times faster", "wanted", "of the ceiling"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        unit = "" if row["what"].startswith("MB") else " s"
        cells = [f"{row[side]:.4g}{unit} ({row[side + '_min']:.4g} to {row[side + '_max']:.4g})" for side in ("ours", "rival_s")]
        lines.append([row["what"], row["rival"], *cells, f"{row['ratio']:.2f}", row["wanted"], row["of_ceiling"]])
    print(f"{platform.machine()}, {os.cpu_count()} cores" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
          + f"; Python {platform.python_version()}, PyTorch {torch.__version__}, MONAI {monai.__version__}\n")
    print("ceilings: " + ", ".join(f"{name} {value:.4g} {unit}" for name, (value, unit) in found.items()) + "\n")
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of real cases (default: a synthetic one)")
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer and smaller rows")
    parser.add_argument("--memory-kept", choices=("ours", "both", "neither"), default="ours", help="which side runs under infer.keep_memory")
    parser.add_argument("--csv", type=Path, default=Path("speed.csv"))
    args = parser.parse_args()
    global MEMORY_KEPT
    MEMORY_KEPT = args.memory_kept
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        case = find_cases(args.data or make_phantom(scratch / "BraTS2021_00000"))[0]
        found = ceilings(case.images[0])
        times = 3 if args.quick else 5
        generators = [sample_rows(case, times, scratch), augment_row(case, (96, 96, 96) if args.quick else CROP, times), hd95_rows(case, times),
                      memory_row(8, (64, 64, 48)), step_rows(8 if args.quick else 16, (32, 32, 32) if args.quick else (64, 64, 48), times)]
        if not args.quick:
            generators += [step_rows(32, (64, 64, 48), times), prediction_rows(case, 8, 3)]
        if torch.cuda.is_available():
            generators.append(gpu_rows(10))
        rows = []
        for generator in generators:
            for what, rival, ours, theirs, wanted, work in generator:
                ratio = statistics.median(theirs) / statistics.median(ours)
                of_ceiling = f"{work[0] / statistics.median(ours) / found[work[1]][0]:.0%} of {work[1]}" if work else ""
                rows.append({"what": what, "rival": rival, "ours": statistics.median(ours), "ours_min": min(ours), "ours_max": max(ours),
                             "rival_s": statistics.median(theirs), "rival_s_min": min(theirs), "rival_s_max": max(theirs), "ratio": ratio,
                             "wanted": wanted or "", "of_ceiling": of_ceiling})
                print(f"{what} / {rival}: {ratio:.2f}", file=sys.stderr, flush=True)
    write_csv(args.csv, rows)
    table(rows, found)


if __name__ == "__main__":
    main()
