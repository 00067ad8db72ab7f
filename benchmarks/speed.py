"""Speed beside what one would use instead: MONAI, TorchIO, batchgeneratorsv2, medpy, surface-distance.

    python benchmarks/speed.py [--data DIR] [--quick] [--write]

Each side of a row runs in a process of its own. They take turns: once untimed, then five times.
Ours has KEPT in its environment, as README tells users of a CPU; a rival runs as a process starts.
DIR holds real cases, of which the first is used; without it a synthetic one is made. A GPU adds rows.
--quick tries the script out. --write writes results/speed.csv, and the table into both README.md.
Needs benchmarks/requirements.txt; a rival is imported where it runs.
"""

import argparse
import itertools
import math
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import phantom  # noqa: E402
from barlow import Projector  # noqa: E402
from data import augment, find_cases, labels_to_regions, load_case, normalize  # noqa: E402
from infer import choose_precision, choose_window, hausdorff95, move_to, predict, write_csv  # noqa: E402
from segresnet import SegResNet, to_monai  # noqa: E402
from train import TwoViews, compute_losses, draw_sample  # noqa: E402

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}    # glibc keeps tensors' memory
SAME = "MONAI's network, all else as ours"    # KEPT too
CPU = torch.device("cpu")
IN_README = "a sample", "both views", "HD95", "a training step, 32", "a case"    # how its rows begin

# ---- sides: each function sets one up and returns what is timed -------------------------------------------


def our_sample(case, crop):
    torch.set_num_threads(1)    # of one reader
    epochs, cache = itertools.count(), Path(tempfile.mkdtemp())
    return lambda: draw_sample((next(epochs), case), crop, 0, cache)


def monai_sample(case, crop, persistent=False):
    """MONAI's BraTS tutorial. persistent: what its transforms make before the first that draws is kept."""
    from monai import transforms as mt
    from monai.data import PersistentDataset
    torch.set_num_threads(1)
    keys = ["image", "label"]
    chain = mt.Compose([
        mt.LoadImaged(keys), mt.EnsureChannelFirstd("image"), mt.EnsureTyped(keys),
        mt.ConvertToMultiChannelBasedOnBratsClassesd("label"), mt.Orientationd(keys, axcodes="RAS"),
        mt.Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
        mt.RandSpatialCropd(keys, roi_size=crop, random_size=False),
        *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
        mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        mt.RandScaleIntensityd("image", factors=0.1, prob=1.0),
        mt.RandShiftIntensityd("image", offsets=0.1, prob=1.0)])
    files = {"image": [str(path) for path in case.images], "label": str(case.label)}
    dataset = PersistentDataset([files], chain, cache_dir=tempfile.mkdtemp())
    return lambda: dataset[0] if persistent else chain(files)


def our_views(image, labels):
    seeds, pair = itertools.count(), [volume.expand(2, -1, -1, -1, -1) for volume in (image, labels)]
    return lambda: augment(*pair, torch.Generator().manual_seed(next(seeds)))[1][:, 0]


def monai_views(image, labels):
    from monai import transforms as mt
    keys = ["image", "label"]
    chain = mt.Compose([
        mt.RandAffined(keys, prob=1.0, rotate_range=(0.1,) * 3, scale_range=(0.1,) * 3,
                       mode=("bilinear", "nearest"), padding_mode="zeros"),
        mt.RandScaleIntensityd("image", factors=0.3, prob=0.5, channel_wise=True),
        mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
        mt.RandGaussianNoised("image", prob=0.2, std=0.1)])
    return lambda: [chain({"image": image, "label": labels.float()})["label"][0] for _ in range(2)]


def torchio_views(image, labels):
    import torchio as tio
    channels = {f"channel{i}": tio.ScalarImage(tensor=channel[None]) for i, channel in enumerate(image)}
    subject = tio.Subject(**channels, label=tio.LabelMap(tensor=labels))
    chain = tio.Compose([
        tio.RandomAffine(scales=0.1, degrees=math.degrees(0.1), isotropic=True, default_pad_value=0),
        *(tio.RandomBlur(std=(0.5, 1), p=0.2, include=[channel]) for channel in channels),
        *(tio.RandomNoise(std=(0, 0.1), p=0.2, include=[channel]) for channel in channels)])
    return lambda: [chain(subject)["label"].data[0] for _ in range(2)]


def batchgenerators_views(image, labels):
    from batchgeneratorsv2.transforms.intensity import brightness, gaussian_noise
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    chain = ComposeTransforms([
        SpatialTransform(image.shape[1:], 0, False, p_rotation=1, rotation=(-0.1, 0.1), p_scaling=1,
                         scaling=(0.9, 1.1), p_synchronize_scaling_across_axes=1, mode_seg="nearest"),
        GaussianBlurTransform((0.5, 1), p_per_channel=0.2),
        brightness.MultiplicativeBrightnessTransform((0.7, 1.3), False, 0.5),
        brightness.BrightnessAdditiveTransform(0, 0.06, False, 0.5),
        gaussian_noise.GaussianNoiseTransform((0, 0.1), 0.2)])
    return lambda: [chain(image=image, segmentation=labels)["segmentation"][0] for _ in range(2)]


def regions_of(views, case, crop):
    """`views` of a crop, and the regions that follow from them."""
    image, labels, _, _ = draw_sample((0, case), crop, 0)
    two_labels = views(image.float(), labels)
    return lambda: tuple(labels_to_regions(view) for view in two_labels())


def monai_hd95(p, t):
    from monai.metrics import compute_hausdorff_distance
    masks = torch.from_numpy(p)[None, None], torch.from_numpy(t)[None, None]
    return compute_hausdorff_distance(*masks, include_background=True, percentile=95).item()


def medpy_hd95(p, t):
    from medpy.metric.binary import hd95
    hd95(p, t)    # of both directions together: another number than ours, so not given


def surface_distance_hd95(p, t):
    from surface_distance import compute_robust_hausdorff, compute_surface_distances
    compute_robust_hausdorff(compute_surface_distances(t, p, (1, 1, 1)), 95)    # weighed by area: neither


def of_masks(hd95, case, holes):
    """`hd95` of the case's regions moved by 3 and 2 voxels, the share `holes` of their voxels left out."""
    truth = load_case(case)[1].numpy()
    kept = np.random.default_rng(0).random(truth.shape) >= holes
    prediction = np.roll(truth, (3, 2), (1, 2)) & kept
    return lambda: [hd95(p, t) for p, t in zip(prediction, truth)]


def our_network(filters):
    torch.manual_seed(0)
    return move_to(CPU, SegResNet(filters=filters))


def monai_network(filters):
    """MONAI's with our weights, and with `features` and `decoder_end` as `TwoViews` wants them."""
    from monai.networks.nets import SegResNet as MonaiSegResNet
    network = MonaiSegResNet(init_filters=filters, in_channels=4, out_channels=3, norm="INSTANCE")
    network.load_state_dict(to_monai(our_network(filters).state_dict()))
    network.use_conv_final = False
    network.features, network.decoder_end = network.forward, network.conv_final
    return network


def step(network, filters, crop, precision, device=CPU, dim=32, pool=8, compiled=False):
    """A training step: train.compute_losses, backward, AdamW. It gives its loss."""
    torch.backends.cudnn.benchmark = True
    views = TwoViews(network(filters), Projector(filters, dim, pool)).to(device)
    optimizer = torch.optim.AdamW(views.parameters(), lr=1e-4, weight_decay=1e-5)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    image = torch.randn(4, *crop).half().to(device)
    labels = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)[torch.randint(4, (1, *crop))].to(device)
    model = torch.compile(views) if compiled else views

    def take():
        loss = compute_losses(model, image, labels, 0, 1 / dim, 0.005, autocast)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return [loss.item()]

    return take


def gpu_peak(*which):
    """The MB that a step allocates on the GPU at most."""
    take = step(*which)

    def peak():
        torch.cuda.reset_peak_memory_stats()
        take()
        return [torch.cuda.max_memory_allocated() / 1e6]

    return peak


def kept_for_backward(network):
    """The MB of tensors that autograd keeps of two views, parameters apart, on the path that GPUs take."""
    torch.Tensor.is_cuda, network, kept = True, network(16), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor    # held, or another may get its address
        return tensor

    def count():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.decoder_end(network.features(torch.randn(2, 4, 64, 64, 48)))
        return [sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own) / 1e6]

    return count


def our_prediction(case, roi):
    image, network, precision = normalize(load_case(case)[0]), our_network(8), choose_precision("auto", CPU)
    autocast = torch.autocast("cpu", dtype=precision, enabled=precision is not None)
    return autocast(lambda: predict(network, image, choose_window(image, roi)))    # as infer.py


def monai_prediction(case, roi):
    from monai.inferers import sliding_window_inference
    image, network = normalize(load_case(case)[0]), monai_network(8)
    network.use_conv_final = True
    sliding = torch.inference_mode()(sliding_window_inference)
    return lambda: torch.sigmoid(sliding(image[None], roi, 1, network, overlap=0.5, mode="gaussian"))


# ---- rows: what, {side: (function, its arguments)} with ours first, how often, unit ------------------------


def rows(case, quick):
    crop, small, times = ((96, 96, 96), (32, 32, 32), 1) if quick else ((192, 192, 144), (64, 64, 48), 5)
    long, short = ("x".join(map(str, sides)) for sides in (crop, small))
    yield f"a sample of {long}, one core", {
        "ours": (our_sample, case, crop), "MONAI's BraTS tutorial": (monai_sample, case, crop),
        "MONAI's PersistentDataset": (monai_sample, case, crop, True)}, times, "s"
    yield f"both views of {long}", {
        "ours": (regions_of, our_views, case, crop), "MONAI": (regions_of, monai_views, case, crop),
        "TorchIO": (regions_of, torchio_views, case, crop),
        "batchgeneratorsv2": (regions_of, batchgenerators_views, case, crop)}, times, "s"
    for what, holes in (("HD95 of three regions", 0.0), ("the same, 3 % of voxels missing", 0.03)):
        yield what, {
            "ours": (of_masks, hausdorff95, case, holes), "MONAI": (of_masks, monai_hd95, case, holes),
            "medpy": (of_masks, medpy_hd95, case, holes),
            "surface-distance": (of_masks, surface_distance_hd95, case, holes)}, times, "s"
    yield "kept for backward, 16 filters, 64x64x48, float32", {
        "ours": (kept_for_backward, our_network), "MONAI": (kept_for_backward, monai_network)}, 1, "MB"
    precision = choose_precision("auto", CPU)
    for filters in (16, 32):
        yield f"a training step, {filters} filters, {short}", {
            "ours": (step, our_network, filters, small, precision),
            "MONAI's network, float32": (step, monai_network, filters, small, None),
            SAME: (step, monai_network, filters, small, precision)}, times, "s"
    yield "a case to probabilities, 8 filters", {
        "ours": (our_prediction, case, crop), f"MONAI, windows of {long}": (monai_prediction, case, crop),
        "MONAI, one of 240x240x160": (monai_prediction, case, (240, 240, 160))}, min(times, 3), "s"
    if torch.cuda.is_available():
        gpu, name = torch.device("cuda"), torch.cuda.get_device_name()
        paper = 32, (192, 192, 144), choose_precision("auto", gpu), gpu, 128, 16
        for what, compiled in ((name, False), (f"{name}, ours compiled", True)):
            ours, rival = (our_network, *paper, compiled), (monai_network, *paper)
            for of_it, function, unit in (("", step, "s"), ("memory of ", gpu_peak, "MB")):
                yield f"{of_it}the paper's step, {what}", {
                    "ours": (function, *ours), "MONAI's network, autocast": (function, *rival)}, 5, unit


# ---- running them -----------------------------------------------------------------------------------------


def prepare(function, *arguments):
    """In a side's process, as it starts."""
    global take
    take = function(*arguments)


def measure():
    """One call -> seconds, and the list of numbers that it gives, or None."""
    begin = time.perf_counter()
    found = take()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, found if isinstance(found, list) and found[0] is not None else None


def race(what, sides, times, unit):
    """The sides of a row in turn -> {side: its seconds or MB}. Raises AssertionError where they disagree."""
    pools, found, expected = {}, {side: [] for side in sides}, None
    for side, which in sides.items():
        for name in KEPT:
            os.environ.pop(name, None)
        os.environ.update(KEPT if side in ("ours", SAME) else {})
        pools[side] = ProcessPoolExecutor(1, get_context("spawn"), prepare, which)
        _, numbers = pools[side].submit(measure).result()    # its process starts, in this environment
        if numbers and unit == "s":
            expected = expected or numbers
            np.testing.assert_allclose(numbers, expected, rtol=1e-2, err_msg=f"{what}: {side}")
    for _, (side, pool) in itertools.product(range(times), pools.items()):
        seconds, numbers = pool.submit(measure).result()
        found[side].append(numbers[0] if unit == "MB" else seconds)
    for pool in pools.values():
        pool.shutdown()
    return found


def lines_of(what, found, unit):
    """A line for each rival: medians and ranges of both sides, and the quotient of the medians."""
    (_, ours), *rivals = found.items()
    for rival, theirs in rivals:
        line = {"what": what, "rival": rival, "unit": unit}
        for side, values in (("ours", ours), ("theirs", theirs)):
            line |= {side: statistics.median(values), f"{side}_min": min(values), f"{side}_max": max(values)}
        line["ratio"] = line["theirs"] / line["ours"]
        print(f"{what}, {rival}: {line['ratio']:.3g}", file=sys.stderr)
        yield line


def tflop(filters, crop):
    """Of the network's passes forward and backward over two views, counted from shapes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        SegResNet(filters=filters)(torch.empty(2, 4, *crop)).sum().backward()
    return counter.get_total_flops() / 1e12


def page(lines):
    """The machine and the table, in Markdown."""
    names = "torch", "monai", "torchio", "batchgeneratorsv2", "medpy", "surface-distance"
    precision = str(choose_precision("auto", CPU) or torch.float32).removeprefix("torch.")
    text = [f"{date.today()}: {os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}, "
            f"ours in {precision};", ", ".join(f"{name} {version(name)}" for name in names) + ".",
            f"The paper's step is {tflop(32, (192, 192, 144)):.1f} TFLOP.", "",
            "| what | ours | rival | rival's | times ours |", "|---|---|---|---|---|"]
    for line in lines:
        ours, theirs = (f"{line[side]:.3g} {line['unit']} ({line[side + '_min']:.3g} to "
                        f"{line[side + '_max']:.3g})" for side in ("ours", "theirs"))
        text.append(f"| {line['what']} | {ours} | {line['rival']} | {theirs} | {line['ratio']:.3g} |")
    return "\n".join(text) + "\n"


def in_short(lines):
    """README's five rows: what ours takes, and how many times that the rivals do."""
    text = ["| what | ours | times ours |", "|---|---|---|"]
    lines = [line for line in lines if line["what"].startswith(IN_README)]
    for (what, ours, unit), group in itertools.groupby(lines, itemgetter("what", "ours", "unit")):
        rivals = "; ".join(f"{line['rival']} {line['ratio']:.3g}" for line in group)
        text.append(f"| {what} | {ours:.3g} {unit} | {rivals} |")
    return "\n".join(text) + "\n"


def write(lines):
    write_csv(ROOT / "benchmarks" / "results" / "speed.csv", lines)
    block = re.compile("(?<=<!-- speed -->\n).*?(?=<!-- end -->)", re.DOTALL)
    for name, table in ("benchmarks/README.md", page(lines)), ("README.md", in_short(lines)):
        text = block.sub(lambda _: table, (ROOT / name).read_text(encoding="utf-8"))
        (ROOT / name).write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="real cases (default: a synthetic one)")
    parser.add_argument("--quick", action="store_true", help="every row once, and smaller")
    parser.add_argument("--write", action="store_true", help="results/speed.csv, and into both README.md")
    args = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"    # the rivals' own
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch
        if not args.data:
            args.data = Path(scratch, "phantom")
            shape = (128, 128, 96) if args.quick else (240, 240, 155)
            phantom.save_case(args.data, "brats2021", 0, *phantom.make_case(shape, 0, 0))
        lines = [line for what, sides, times, unit in rows(find_cases(args.data)[0], args.quick)
                 for line in lines_of(what, race(what, sides, times, unit), unit)]
    print(page(lines))
    if args.write:
        write(lines)


if __name__ == "__main__":
    main()
