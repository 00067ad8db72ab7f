"""BraTS cases: finding, reading, normalising, augmenting, writing. Section 3.4, and section 4 for the crop and the folds.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs", arXiv:2111.00742. Code: MIT licence.
In memory every volume is LPS (axis 0 towards the patient's left, 1 posterior, 2 superior), BraTS's own orientation, whatever
the file's is; channels are t1, t1ce, t2, flair; regions are ET, TC, WT, the order of the paper's tables.
The file stands alone: PyTorch, NumPy and nibabel. As a command it checks a cohort:

    python data.py DIR
"""

import argparse
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

REGIONS = ("ET", "TC", "WT")

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)    # it logs what it then raises


class InputError(ValueError):
    """What the user can mend. The message is one printable line: file or flag, what was found, what was expected, what to do."""

    def __init__(self, message):    # file names and other programs' messages may hold anything
        super().__init__("".join(c if c.isprintable() else "?" for c in " ".join(message.split()))[:1000])


# ---- cases ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str       # BraTS2021_00000, BraTS-GLI-00000-000
    patient: str    # the name, less the time point in BraTS 2023 and later
    images: tuple   # four paths: t1, t1ce, t2, flair; each where it should be, whether or not it is there
    label: Path     # or None
    et_label: int   # the label of the enhancing tumour: 4, or 3 in BraTS 2023 and later


# The generations differ in their files' names: (separator, the four modalities, ET's label)
GENERATIONS = {
    "BraTS 2018-2021": ("_", ("t1", "t1ce", "t2", "flair"), 4),
    "BraTS 2023 and later": ("-", ("t1n", "t1c", "t2w", "t2f"), 3),
}


def find_cases(root):
    """The cases anywhere below the folder `root`, sorted by name; nothing is read but folder listings.

    A case is what shares a folder and a prefix: <case>_t1.nii.gz and so on, .nii or .nii.gz. One unmatched *seg*.nii* beside a
    case is its segmentation (BraTS20_Training_355 has such a name). Raises InputError for no case and for a name found twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: {'a file' if root.exists() else 'no such folder'}{_HOW_TO_GET_DATA}")
    cases = {}
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):    # data sets are often folders of links
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for case in _cases_of_folder(Path(folder), sorted(file for file in files if not file.startswith("."))):
            if not case.name.isprintable():
                raise InputError(f"{folder}: a case is named {case.name!r}, expected printable characters")
            if case.name in cases:
                raise InputError(f"{folder}: case {case.name} is also in {cases[case.name].images[0].parent}, expected each case once")
            cases[case.name] = case
    if not cases:
        raise InputError(f"{root}: no case found{_HOW_TO_GET_DATA}")
    return [cases[name] for name in sorted(cases)]


_HOW_TO_GET_DATA = (
    ", expected folders such as BraTS2021_00000 with BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz; BraTS 2021 is free after "
    "registration at https://www.synapse.org/brats2021, or make a synthetic cohort: python examples/phantom.py data/phantom"
)


def _cases_of_folder(folder, files):
    for separator, modalities, et_label in GENERATIONS.values():
        pattern = re.compile(rf"(.+){separator}({'|'.join(modalities)}|seg)\.nii(?:\.gz)?")
        found = {}    # prefix -> {modality: path}
        for file in files:
            match = pattern.fullmatch(file)
            if match:
                found.setdefault(match[1], {})[match[2]] = folder / file
        imaged = {name: paths for name, paths in found.items() if set(paths) != {"seg"}}
        if len(imaged) == 1:    # so that manual_seg.nii beside a case's images is a segmentation of another name, no case of its own
            found = imaged
        taken = {path.name for paths in found.values() for path in paths.values()}
        for name, paths in found.items():
            images = tuple(paths.get(m, folder / f"{name}{separator}{m}.nii.gz") for m in modalities)
            unmatched = [f for f in files if re.search(r"seg.*\.nii", f.lower()) and f not in taken]
            if "seg" not in paths and len(found) == 1 and len(unmatched) == 1:
                paths["seg"] = folder / unmatched[0]
            patient = re.sub(r"-\d+$", "", name) if et_label == 3 else name
            yield Case(name, patient, images, paths.get("seg"), et_label)


def describe(cases):
    """One line about a cohort: cases, patients, generation, ET's label."""
    labels = {case.et_label for case in cases}
    names = " and ".join(f"{name} (ET is label {et})" for name, (_, _, et) in GENERATIONS.items() if et in labels)
    cavity = "; its label 4, the resection cavity of 2024, counts as background" if 3 in labels else ""
    patients = len({case.patient for case in cases})
    return f"{len(cases)} case{'s' * (len(cases) > 1)} of {patients} patient{'s' * (patients > 1)}, file names of {names}{cavity}"


def split_folds(cases, folds=5, seed=0):
    """The folds' validation lists, a partition of `cases`. All time points of a patient are in one fold.

    Paper: "our own 5-fold splits", not published. Here: patients in the order of a hash of seed and name, dealt out in turn.
    Why: the split depends on names and seed alone, not on a library's random generator.
    Raises InputError for fewer patients than folds.
    """
    patients = sorted({case.patient for case in cases}, key=lambda patient: sha256(f"{seed} {patient}".encode()).digest())
    if len(patients) < folds:
        raise InputError(f"--folds {folds}: the cohort has {len(patients)} patients, expected at least one a fold")
    fold_of = {patient: i % folds for i, patient in enumerate(patients)}
    return [[case for case in cases if fold_of[case.patient] == fold] for fold in range(folds)]


# ---- reading and writing ----------------------------------------------------------------------------------------------


def _to_lps(affine):
    """The nibabel orientation transform from a file's axes to LPS."""
    return nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))


MOST_VOXELS = 2**25    # of a volume; BraTS's have 2**23, and four of this size in float32 are half a GiB


def open_nifti(path):
    """A NIfTI as nibabel opens it, its voxels still on the disk; without its extensions, which nibabel reads whatever length they claim.

    Raises ValueError where the header promises more voxels than the file can hold, InputError for more than MOST_VOXELS; no memory is taken then.
    """
    with nib.openers.ImageOpener(path) as file:
        start = file.read(540)
    kind = next((kind for kind in (nib.Nifti1Image, nib.Nifti2Image) if kind.header_class.may_contain_header(start)), None)
    if kind is None:
        raise ValueError("no NIfTI header")
    header = kind.header_class(start[: kind.header_class.template_dtype.itemsize])
    shape, offset = [int(side) for side in header.get_data_shape()], float(header["vox_offset"])
    promised = math.prod(shape) * header.get_data_dtype().itemsize
    held = os.path.getsize(path) * (1032 if str(path).endswith(".gz") else 1)    # what deflate packs into a byte at most
    if not shape or min(shape) < 1 or not 0 <= offset <= MOST_VOXELS or promised + offset > held:
        raise ValueError(f"its header promises {'x'.join(map(str, shape))} voxels from byte {offset:g} on, more than such a file holds")
    if math.prod(shape) > MOST_VOXELS:
        raise InputError(f"{path}: {'x'.join(map(str, shape))} voxels, expected at most {MOST_VOXELS:,}, four times BraTS's; crop or resample it")
    return kind(nib.arrayproxy.ArrayProxy(path, header), header.get_best_affine(), header)


def read_volume(path):
    """A 3-D NIfTI -> array (D, H, W) in LPS, its dtype the file's, and its LPS affine. Raises InputError."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file, expected the case's four modalities beside each other")
    try:
        with np.errstate(all="ignore"):    # a damaged affine or scale
            image = open_nifti(path)
            shape = image.shape
            volume = image.as_reoriented(_to_lps(image.affine)) if len(shape) == 3 else None
            array = np.asarray(volume.dataobj) if volume else None
    except InputError:
        raise
    except Exception as error:    # nibabel, gzip and zlib each raise their own kinds for a damaged file
        raise InputError(f"{path}: cannot be read ({str(error) or type(error).__name__}), "
                         "expected a NIfTI volume; the file is damaged or incomplete, fetch it again") from None
    if volume is None:
        raise InputError(f"{path}: shape {shape}, expected three axes: one volume a file")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {array.dtype}, expected one real number each, no colours")
    return array, volume.affine


def read_labels(path, et_label):
    """A BraTS segmentation (uint8, int16 or float) -> uint8 tensor (D, H, W) in LPS, and its affine. Raises InputError."""
    array, affine = read_volume(path)
    allowed = [0, 1, 2, 4] if et_label == 4 else [0, 1, 2, 3, 4]
    with np.errstate(invalid="ignore"):
        labels = array.astype(np.uint8)
    known = np.zeros(256, bool)
    known[allowed] = True
    wrong = (labels != array) | ~known[labels]
    if wrong.any():
        found = ", ".join(f"{value:g}" for value in np.unique(array[wrong])[:3])
        raise InputError(f"{path}: has label {found}, expected {', '.join(map(str, allowed))}: the file names' generation has no other")
    return torch.from_numpy(labels), affine


def load_case(case):
    """Reads a case: image (4, D, H, W) float32 as stored, target (3, D, H, W) bool or None without a segmentation, affine (4, 4).

    Raises InputError for a missing or damaged file, volumes of different shapes or affines, NaN or infinite voxels, a modality
    of all zeros, and labels outside the generation's set.
    """
    image, labels, affine = load_volumes(case)
    return image, None if labels is None else labels_to_regions(labels, case.et_label), affine


def load_volumes(case):
    """As `load_case`, with the labels (D, H, W) uint8 as they are stored."""
    image, affine = None, None
    for channel, path in enumerate(case.images):
        volume, volume_affine = read_volume(path)
        if image is None:
            image, affine = torch.empty(4, *volume.shape), volume_affine
        _check_same_grid(path, volume.shape, volume_affine, case.images[0], image.shape[1:], affine)
        with np.errstate(over="ignore"):    # too large for float32 becomes infinite, refused below
            image[channel] = torch.from_numpy(volume.astype(np.float32))
        if volume.dtype.kind == "f" and not image[channel].isfinite().all():
            raise InputError(f"{path}: has NaN or infinite voxels, expected numbers")
        if not image[channel].any():
            raise InputError(f"{path}: all voxels are zero, expected a brain")
    if case.label is None:
        return image, None, affine
    labels, label_affine = read_labels(case.label, case.et_label)
    _check_same_grid(case.label, labels.shape, label_affine, case.images[0], image.shape[1:], affine)
    return image, labels, affine


def _check_same_grid(path, shape, affine, other_path, other_shape, other_affine):
    if tuple(shape) != tuple(other_shape):
        raise InputError(f"{path}: shape {tuple(shape)}, expected {tuple(other_shape)} as in {other_path}")
    if not np.allclose(affine, other_affine, atol=1e-2):
        raise InputError(f"{path}: its affine differs from that of {other_path}, expected one space for all files of a case")


def save_volume(path, volume, like, note=None):
    """Writes a volume in LPS, (D, H, W) labels or (3, D, H, W) maps, as the file `like` is: its orientation, affine and units.

    The dtype is the volume's; maps become X, Y, Z, 3. `note`, of at most 79 letters, becomes the header's description; without one
    that of `like` stays. `path` is never half a file.
    """
    like, path = open_nifti(like), Path(path)
    array = np.moveaxis(np.asarray(volume), 0, -1) if volume.ndim == 4 else np.asarray(volume)
    from_lps = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.io_orientation(like.affine))
    array = nib.orientations.apply_orientation(array, from_lps)
    header = like.header.copy()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0    # the display range of `like` means nothing here
    if note is not None:
        header["descrip"] = note.encode()
    with whole_file(path) as beside:
        nib.save(nib.Nifti1Image(array, like.affine, header), beside)


@contextmanager
def whole_file(path):
    """Gives a path to write to; once that is on the disk, it is renamed to `path`, which is the old file or the new one, never half.

    Raises OSError with the path in it.
    """
    beside = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.{path.name}")    # on two machines processes may share a number
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)    # a write does not say to which file
        raise
    finally:
        beside.unlink(missing_ok=True)


# ---- labels <-> regions -----------------------------------------------------------------------------------------------


def labels_to_regions(labels, et_label=4):
    """Labels (..., D, H, W): 1 necrotic core, 2 oedema, `et_label` enhancing -> nested regions (..., 3, D, H, W) bool: ET, TC, WT."""
    et = labels == et_label
    tc = et | (labels == 1)
    wt = tc | (labels == 2)
    return torch.stack([et, tc, wt], dim=-4)


def regions_to_labels(regions, et_label=4):
    """Regions (3, D, H, W) bool: ET, TC, WT -> labels (D, H, W) uint8, painted in the order WT, TC, ET."""
    et, tc, wt = regions
    labels = wt.to(torch.uint8) * 2
    labels[tc] = 1
    labels[et] = et_label
    return labels


# ---- section 3.4: normalisation and augmentation ----------------------------------------------------------------------


def normalize(image):
    """Zero mean and unit (population) sd for each channel "based on non-zero voxels only"; zeros stay zero. (C, D, H, W) float32, on the CPU.

    On the whole volume, before any crop, so that training and prediction see the same numbers.
    """
    image = image.clone()
    for channel in image:
        background = channel == 0
        voxels = channel[~background].numpy()    # NumPy's sums do not depend on the number of threads, which readers have fewer of
        if len(voxels):
            channel.sub_(float(voxels.mean(dtype=np.float64))).div_(max(float(voxels.std(dtype=np.float64)), 1e-8)).masked_fill_(background, 0)
    return image


def case_generator(seed, epoch, name):
    """The one random generator of a sample: what it looks like depends on seed, epoch and the case's name, on nothing else."""
    state = np.random.SeedSequence((seed, epoch, zlib.crc32(name.encode()))).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def brain_box(brain):
    """[(first, last + 1)] along D, H and W of what is True in (D, H, W) bool; the volume's own where nothing is."""
    brain = np.asarray(brain)    # NumPy, and not along W first: many times as fast
    along_hw = brain.any(0)
    box = []
    for line in (brain.any((1, 2)), along_hw.any(1), along_hw.any(0)):
        (inside,) = line.nonzero()
        box.append((int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, len(line)))
    return box


def pad_to(volume, size):
    """Zeros around (C, D, H, W), half on either side, until no side is smaller than `size`."""
    missing = [max(s - n, 0) for s, n in zip(size, volume.shape[1:])]
    return F.pad(volume, [p for m in reversed(missing) for p in (m // 2, m - m // 2)])    # F.pad counts axes from the last


def random_crop(image, target, size, generator):
    """The same random box of `size` out of image (4, D, H, W) and target (C, D, H, W), zero-padded where the volume is smaller."""
    corner = random_corner(image.shape[1:], size, generator)
    return cut(image, corner, size), cut(target, corner, size)


def random_corner(shape, size, generator):
    """Where a random box of `size` starts in a volume of `shape`; negative where the volume is smaller, and lies amid zeros then."""
    return [int(torch.randint(max(n - s, 0) + 1, (), generator=generator)) - max(s - n, 0) // 2 for n, s in zip(shape, size)]


def cut(volume, corner, size, mirrored=()):
    """The box of `size` that starts at `corner` out of (C, D, H, W) on the CPU, mirrored along the axes given; zeros outside the volume."""
    lo = [max(c, 0) for c in corner]
    hi = [max(min(c + s, n), l) for c, s, n, l in zip(corner, size, volume.shape[1:], lo)]
    box = np.zeros((len(volume), *size), volume.numpy().dtype)    # NumPy: it takes memory zeroed, and mirrors as it copies
    inside = tuple(slice(l - c, h - c) for c, l, h in zip(corner, lo, hi))
    np.flip(box, mirrored)[(slice(None), *inside)] = volume.numpy()[(slice(None), *(slice(l, h) for l, h in zip(lo, hi)))]
    return torch.from_numpy(box)


def random_axes(generator):
    """"A random axis mirror flip (for all 3 axes) with a probability 0.5": the axes of (C, D, H, W) to mirror."""
    return tuple(axis for axis in (1, 2, 3) if torch.rand((), generator=generator) < 0.5)


def random_flip(image, target, generator):
    """Image and target mirrored along the same `random_axes`, before the crop is copied into two views."""
    axes = random_axes(generator)
    return image.flip(axes), target.flip(axes)


def augment(images, targets, generator):
    """Both views of a crop, each augmented by itself: affine, then intensity. Where the batch is, CPU or GPU.

    images: (B, 4, D, H, W) float32, normalised, zero outside the brain. targets: (B, C, D, H, W), regions or labels (C = 1); the same
    dtype back. generator: on the same device.
    Paper: "intensity modifications or spatial transforms". Here: the affine first. Why: it would smooth noise drawn before it.
    """
    images, targets = random_affine(images, targets, generator)
    return random_intensity(images, generator), targets


def random_affine(images, targets, generator):
    """Rotation by up to 0.1 rad about each axis and isotropic scaling by 0.9 to 1.1, about the centre; drawn once a view.

    Paper: no ranges. Here: both views move, so 90 voxels from the centre they differ by about 13 voxels (rms).
    Why: less than one cell of the 16-voxel pooling, so that pooled cells still pair up (section 3.1).
    Images are sampled linearly, targets by nearest neighbour, both with zeros from outside.
    """
    u = 2 * torch.rand(len(images), 4, generator=generator, device=generator.device) - 1    # (B, 4) in [-1, 1)
    (cx, cy, cz), (sx, sy, sz) = torch.cos(0.1 * u[:, :3]).T, torch.sin(0.1 * u[:, :3]).T
    one, zero = torch.ones_like(cx), torch.zeros_like(cx)
    rx = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], -1).view(-1, 3, 3)
    ry = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], -1).view(-1, 3, 3)
    rz = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], -1).view(-1, 3, 3)
    matrix = rx @ ry @ rz / (1 + 0.1 * u[:, 3]).view(-1, 1, 1)    # (B, 3, 3), output voxel -> input voxel, axes W, H, D
    # grid_sample counts in half sides from the centre: a voxel along an axis of n is 2/n there.
    n = torch.tensor(images.shape[:1:-1], device=matrix.device)    # W, H, D
    columns = (matrix * 2 / n.view(3, 1)).mT[:, :, None]    # (B, 3, 1, 3): what a voxel's step along W, H, D adds to W, H, D
    w, h, d = ((torch.arange(side, device=matrix.device) - (side - 1) / 2).view(1, -1, 1) for side in images.shape[:1:-1])    # from the centre
    grid = ((d * columns[:, 2])[:, :, None, None] + (h * columns[:, 1])[:, None, :, None]) + (w * columns[:, 0])[:, None, None]    # (B, D, H, W, 3)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = F.grid_sample(targets.to(images.dtype), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return images, moved.to(targets.dtype)


def random_intensity(images, generator):
    """For each view and channel by itself; background stays zero. (B, 4, D, H, W) float32, same shape back.

    Paper: "intensity modifications". Here: blur, sd U(0.5, 1) voxels, p 0.2; scale by U(0.7, 1.3), p 0.5; shift by U(-0.1, 0.1), p 0.5;
    noise, sd U(0, 0.1), p 0.2. Why: adapted from the authors' later open code; noise comes last, or the blur would remove it.
    """
    background = images == 0
    images = images.clone()
    draws = torch.rand(*images.shape[:2], 8, generator=generator, device=generator.device).tolist()
    for channels, channels_draws in zip(images, draws):
        for channel, u in zip(channels, channels_draws):    # (D, H, W) and eight numbers in [0, 1)
            if u[0] < 0.2:
                channel.copy_(gaussian_blur(channel, 0.5 + 0.5 * u[1]))
            if u[2] < 0.5:
                channel.mul_(0.7 + 0.6 * u[3])
            if u[4] < 0.5:
                channel.add_(-0.1 + 0.2 * u[5])
            if u[6] < 0.2:
                channel.add_(torch.randn(channel.shape, generator=generator, device=channel.device), alpha=0.1 * u[7])
    return images.masked_fill_(background, 0)


def gaussian_blur(volume, sd):
    """(D, H, W) smoothed by a Gaussian of `sd` voxels (cut off at 4 voxels), one axis after the other, with zeros from outside."""
    total = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * sd**2)).sum()
    for side in volume.shape:
        x = torch.arange(side, device=volume.device)
        distance = (x[:, None] - x).abs()
        weights = torch.where(distance <= 4, torch.exp(-(distance**2) / (2 * sd**2)), 0) / total    # (side, side)
        volume = torch.tensordot(volume, weights, ([0], [0]))    # takes the first axis and puts it last: after three they are in order
    return volume


# ---- the cache of prepared cases --------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A case up to its crop: the box of its brain and labels, and no more of it. Its tensors may be mapped from the disk.

    Paper: no precision. Here: float16 from here to the device, out of the cache or not. Why: half the bytes; and a sample is the same
    with a cache, without one, and on a disk that fills up meanwhile. The rounding, 1 in 2,000 at most, is far below the scans' noise.
    """

    image: torch.Tensor     # (4, d, h, w) float16, normalised
    labels: torch.Tensor    # (1, d, h, w) uint8
    corner: tuple           # of the box in the volume
    shape: tuple            # of the volume


def prepare(case, cache=None):
    """Reads and normalises a case with a segmentation, or maps what an earlier call left in the folder `cache`.

    Raises InputError as `load_case` does. An entry is made anew where its sources' sizes or times of change differ from those it holds,
    and where it is no whole entry. A disk without room leaves the case out of the cache.
    """
    if cache is not None:
        try:
            stamp = [number for file in map(os.stat, (*case.images, case.label)) for number in (file.st_size, file.st_mtime_ns)]
            return map_entry(entry_path(cache, case), stamp)
        except (OSError, ValueError):    # none yet, or something else
            pass
    image, labels, _ = load_volumes(case)
    box = brain_box(image.any(0) | (labels > 0))    # of the labels too, which might reach beyond the brain
    inside = tuple(slice(lo, hi) for lo, hi in box)
    image = normalize(image[(slice(None), *inside)])    # over the same voxels as the whole volume
    prepared = Prepared(image.half(), labels[inside][None].contiguous(), tuple(lo for lo, _ in box), tuple(labels.shape))
    if cache is not None:
        try:
            if shutil.disk_usage(cache).free > SPARE:
                write_entry(entry_path(cache, case), stamp, prepared)
        except OSError:    # full by now: the case is read again each time
            pass
    return prepared


SPARE = 10**9    # bytes that the cache leaves free: a full disk would end the run at its next checkpoint
FACTS = 20       # int64 numbers that an entry starts with: stamp (10), corner, shape, box (3 each), their checksum


def entry_path(cache, case):
    return cache / f"{case.name}-{zlib.crc32(os.path.realpath(case.images[0]).encode()):08x}.case"    # cohorts may share names


def write_entry(path, stamp, prepared):
    """One file, written whole: FACTS, then image and labels as they lie in memory. Raises OSError."""
    facts = np.array([*stamp, *prepared.corner, *prepared.shape, *prepared.labels.shape[1:]], np.int64)
    with whole_file(path) as beside, open(beside, "wb") as file:
        for part in (facts, np.array([zlib.crc32(facts)]), prepared.image.numpy(), prepared.labels.numpy()):
            file.write(part)


def map_entry(path, stamp):
    """What `write_entry` has written, mapped: a crop of it reads its own bytes alone. Raises OSError, and ValueError for anything else."""
    content = np.memmap(path, mode="c")    # copy on write: torch wants writable memory
    head = FACTS * 8
    *facts, checksum = content[:head].view(np.int64).tolist()
    if facts[:10] != stamp or checksum != zlib.crc32(content[: head - 8]):
        raise ValueError(f"{path}: no entry of these sources")
    corner, shape, box = facts[10:13], facts[13:16], facts[16:]
    image, labels = np.split(content[head:], [8 * math.prod(box)])
    return Prepared(torch.from_numpy(image.view(np.float16).reshape(4, *box)), torch.from_numpy(labels.reshape(1, *box)), tuple(corner), tuple(shape))


def check_cache(folder, cases):
    """Makes the folder and the first case's entry. -> whether there is room for the entries still missing, and a line that says so"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prepare(cases[0], folder)
        free = max(shutil.disk_usage(folder).free - SPARE, 0)
        sizes = [path.stat().st_size for path in (entry_path(folder, case) for case in cases) if path.exists()]
    except OSError:
        sizes = []
    if not sizes:
        return False, f"--cache {folder}: no room, or cannot be written; samples are read from the cases' files"
    needed = (len(cases) - len(sizes)) * sum(sizes) / len(sizes)
    told = f"--cache {folder}: {needed / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB can be had"
    return needed <= free, told + ("" if needed <= free else "; too little, so samples are read from the cases' files")


# ---- what commands share ----------------------------------------------------------------------------------------------


def show_progress(what, done, total, start):
    """In a terminal, one line that rewrites itself: count, rate, time left. In a log, nothing. `start` is a time.monotonic()."""
    if sys.stdout.isatty():
        rate = done / max(time.monotonic() - start, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate)) if done else "?"
        print(f"\r{what} {done}/{total}, {rate:.2f}/s, {left} left\033[K", end="\r\033[K" if done == total else "", flush=True)


def make_folder(path):
    """Makes a folder to write into and tries it, before any work is done for it. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}), expected a folder on a disk with room") from None


def join_ranks(backend, rank, world, timeout=None):
    """Under torchrun, the process group. `timeout`: how long, as a timedelta, one rank may wait for another in a collective.

    torchrun keeps its store when it starts the ranks again, so each start needs a part of it to itself: the last start's addresses are dead.
    Its count of restarts does not name that part, since each machine counts for itself; rank 0 makes up a name and tells it to every rank.
    Raises InputError where a rank is missing after five minutes.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    name, deadline = os.urandom(8).hex(), time.monotonic() + 300
    if rank == 0:
        while (joined := 1 + store.add(f"{name} joined", 0)) < world:
            if time.monotonic() > deadline:
                raise InputError(f"torchrun: {joined} of {world} processes have started within five minutes, expected all; see what the others say")
            for asking in (f"rank {other}" for other in range(1, world)):
                if store.check([asking]):    # perhaps one of the last start still, which nobody reads the answer to
                    store.set(store.get(asking).decode(), name)
            time.sleep(0.1)
    else:
        store.set(f"rank {rank}", name)
        name = store.get(name).decode()
        store.add(f"{name} joined", 1)
    # Imported by DDP once the group is there, its default arguments would keep the group, and Gloo's threads, past destroy_process_group;
    # such a thread aborts the process if it lets go of a tensor after the interpreter has begun to end.
    import torch.distributed.nn.functional
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def is_out_of_memory(error):
    """Of a RuntimeError or MemoryError. On a CPU PyTorch has no exception of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class Parser(argparse.ArgumentParser):
    """A mistake in the call ends like any other: one line, and under torchrun once."""

    def error(self, message):
        exit_with(f"{message}; --help lists what there is", int(os.environ.get("RANK", 0)))


def exit_with(error, rank=0):
    """Ends a command for an InputError, an OSError or a message: one line, exit code 2."""
    if rank:    # under torchrun every rank has the same error: rank 0 prints it, and torchrun ends the others meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if isinstance(error, OSError):
        error = f"{error.filename or 'output'}: {error.strerror or error}, expected a disk that can be written and has room"
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---- the command ------------------------------------------------------------------------------------------------------


def check_case(case):
    """What the cohort's report needs of a case; the InputError itself where it cannot be used."""
    try:
        image, target, affine = load_case(case)
    except InputError as error:
        return error
    spacing = "x".join(f"{side:g}" for side in np.round(nib.affines.voxel_sizes(affine), 3))
    voxels = None if target is None else target.sum((1, 2, 3)).tolist()
    return "x".join(map(str, image.shape[1:])), spacing, float((image == 0).float().mean()), voxels


def shorten(names):
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def check_cohort(root):
    """Reads every case below `root` and prints a report. Returns the number of cases that cannot be used."""
    cases = find_cases(root)
    print(f"{root}: {describe(cases)}")
    start, results = time.monotonic(), []
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:    # unpacking, most of the work, releases the interpreter lock
        for result in pool.map(check_case, cases):
            results.append(result)
            show_progress("checking", len(results), len(cases), start)
    good = [result for result in results if not isinstance(result, InputError)]
    shapes, spacings, zeros, voxels = zip(*good) if good else ((), (), (), ())
    labelled = [v for v in voxels if v is not None]
    counts = {"shape": Counter(shapes), "spacing, mm": Counter(spacings)}
    for what, counter in counts.items():
        print(f"  {what:<16}" + ", ".join(f"{value} ({n})" for value, n in counter.most_common(5)) + (" ..." if len(counter) > 5 else ""))
    bare = [case.name for case in cases if case.label is None]
    print(f"  {'segmentation':<16}{len(cases) - len(bare)} of {len(cases)}" + (f", not {shorten(bare)}" if 0 < len(bare) < len(cases) else ""))
    for region, sizes in zip(REGIONS, zip(*labelled)):
        print(f"  {region + ', voxels':<16}{np.mean(sizes):,.0f} on average, empty in {sizes.count(0)} of {len(sizes)}")
        if not any(sizes):
            print(f"  warning: {region} is empty in every case; are these BraTS labels, and of this generation?")
    stripped = [case.name for case, result in zip(cases, results) if not isinstance(result, InputError) and result[2] < 0.05]
    if stripped:
        print(f"  warning: almost no voxel is zero in {len(stripped)} of them ({shorten(stripped)}); expected skull-stripped brains on zeros")
    known = {path for case in cases for path in (*case.images, case.label)}
    strangers = [str(path.relative_to(root)) for path in sorted(root.rglob("*.nii*")) if path not in known and not path.name.startswith(".")]
    if strangers:
        print(f"  warning: {len(strangers)} NIfTI files belong to no case ({shorten(strangers)}); expected names such as <case>_t1.nii.gz")
    try:
        print(f"  {'5 folds, seed 0':<16}" + ", ".join(str(len(fold)) for fold in split_folds(cases)) + " cases for validation")
    except InputError:
        print(f"  {'5 folds, seed 0':<16}none: fewer patients than folds")
    failures = [result for result in results if isinstance(result, InputError)]
    for failure in failures:
        print(f"  error: {failure}")
    print(f"{len(failures)} of {len(cases)} cases cannot be used" if failures else f"all {len(cases)} cases can be read")
    return len(failures)


def main():
    parser = Parser(description="Checks a BraTS cohort.")
    parser.add_argument("root", type=Path, metavar="DIR", help="searched for cases, with all folders below it")
    args = parser.parse_args()
    try:
        failures = check_cohort(args.root)
    except InputError as error:
        exit_with(error)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
