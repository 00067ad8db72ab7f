"""Cases: section 3.4's preprocessing and augmentation, section 4's crop and folds; then their files.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs",
arXiv:2111.00742. Code: MIT licence.
In memory every volume is LPS (axis 0 towards the patient's left, 1 posterior, 2 superior), whatever its file
is; channels are t1, t1ce, t2, flair; labels 1 necrosis, 2 oedema, 4 enhancing; regions ET, TC, WT.
The file stands alone: PyTorch, NumPy and nibabel. As a command it checks a cohort:

    python data.py DIR
"""

import argparse
import gzip
import io
import math
import os
import re
import sys
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch.nn import functional as F

MODALITIES, REGIONS = ("t1", "t1ce", "t2", "flair"), ("ET", "TC", "WT")


def _check_rank(ndim, form, *tensors):
    if any(tensor.ndim != ndim for tensor in tensors):
        raise ValueError(f"shapes {[tuple(tensor.shape) for tensor in tensors]}, expected {form}")


# ---- section 3.4: normalisation; section 4: crop; section 3.4: flip ---------------------------------------

def normalize(image):
    """"Zero mean and unit std (based on non-zero voxels only)", each channel by itself; zeros stay zero.

    (C, D, H, W) float32 on the CPU -> the same. The sd is the population's; a constant channel becomes 0.
    Paper: silent on the order. Here: the whole volume, before any crop.
    Why: training and prediction see the same numbers. See `cache_entry` before a change.
    Raises ValueError for another rank.
    """
    _check_rank(4, "(C, D, H, W)", image)
    image = image.clone()
    for channel in image:
        background = channel == 0
        voxels = channel.numpy()[~background.numpy()]    # NumPy's sums are the same on any number of threads
        if len(voxels):
            mean, sd = float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64))
            channel.sub_(mean).div_(max(sd, 1e-8)).masked_fill_(background, 0)
    return image


def random_crop(image, target, size, generator, corner=(0, 0, 0), shape=None):
    """"A random crop of size 192x192x144": the same box of `size` out of image and target, drawn evenly.

    image (4, D, H, W) and target (C, D, H, W) are a whole volume, or the box at `corner` of a volume of
    `shape` that is zero outside it. A side that is shorter than the crop's gets zeros, half before it.
    """
    _check_rank(4, "(C, D, H, W)", image, target)
    inside, pads = [slice(None)], []
    for n, side, first, s in zip(image.shape[1:], shape or image.shape[1:], corner, size):
        drawn = int(torch.randint(max(side - s, 0) + 1, (), generator=generator))
        start = drawn - max(s - side, 0) // 2 - first    # in the image
        lo, hi = (min(max(end, 0), n) for end in (start, start + s))
        before = min(max(-start, 0), s)
        inside.append(slice(lo, hi))
        pads = [before, s - before - (hi - lo), *pads]    # F.pad begins with the last axis
    return tuple(F.pad(volume[tuple(inside)], pads) for volume in (image, target))    # (4, *size), (C, *size)


def random_flip(image, target, generator):
    """"A random axis mirror flip (for all 3 axes) with a probability 0.5", of image and target alike."""
    _check_rank(4, "(C, D, H, W)", image, target)
    axes = [axis for axis in (1, 2, 3) if torch.rand((), generator=generator) < 0.5]
    return tuple(torch.from_numpy(np.flip(volume.numpy(), axes).copy()) for volume in (image, target))


# ---- section 3.4: "After this we copy the image, and apply the intensity and spatial transforms" ----------

def augment(images, targets, generator):
    """Both views of a crop, each augmented by itself: affine, then intensity. Where the batch is, CPU or GPU.

    images: (B, 4, D, H, W) float32, normalised, zero outside the brain.
    targets: (B, C, D, H, W), regions or labels (C = 1); the same dtype back. generator: on the same device.
    Paper: no order. Here: the affine first. Why: it would smooth noise that was drawn before it.
    """
    _check_rank(5, "(B, C, D, H, W)", images, targets)
    images, targets = random_affine(images, targets, generator)
    return random_intensity(images, generator), targets


def random_affine(images, targets, generator):
    """Rotation by up to 0.1 rad about each axis, scaling by 0.9 to 1.1, about the centre, drawn once a view.

    Paper: no ranges. Here: these. Why: within 110 voxels of the centre both views differ by less than 16
    (rms), a cell of section 3.1's pooling, so that their cells still pair up.
    Images are sampled linearly, targets by nearest neighbour, both with zeros from outside.
    """
    u = 2 * torch.rand(len(images), 4, generator=generator, device=generator.device) - 1    # in [-1, 1)
    (cx, cy, cz), (sx, sy, sz) = torch.cos(0.1 * u[:, :3]).T, torch.sin(0.1 * u[:, :3]).T
    one, zero = torch.ones_like(cx), torch.zeros_like(cx)
    rx = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], -1).view(-1, 3, 3)
    ry = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], -1).view(-1, 3, 3)
    rz = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], -1).view(-1, 3, 3)
    matrix = rx @ ry @ rz / (1 + 0.1 * u[:, 3]).view(-1, 1, 1)    # (B, 3, 3), output -> input voxel, W, H, D
    # grid_sample counts in half sides from the centre: a voxel along an axis of n is 2/n there.
    sides = images.shape[:1:-1]    # W, H, D
    n = torch.tensor(sides, device=matrix.device)
    columns = (matrix * 2 / n.view(3, 1)).mT[:, :, None]    # (B, 3, 1, 3): what a step along W, H, D adds
    w, h, d = ((torch.arange(side, device=matrix.device) - (side - 1) / 2).view(1, -1, 1) for side in sides)
    plane = (d * columns[:, 2])[:, :, None, None] + (h * columns[:, 1])[:, None, :, None]
    grid = plane + (w * columns[:, 0])[:, None, None]    # (B, D, H, W, 3)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = F.grid_sample(targets.to(images.dtype), grid, mode="nearest", align_corners=False)
    return images, moved.to(targets.dtype)


def random_intensity(images, generator):
    """For each view and channel by itself; background stays zero. (B, 4, D, H, W) float32, same shape back.

    Paper: "intensity modifications". Here: blur, sd U(0.5, 1) voxels, p 0.2; scale by U(0.7, 1.3), p 0.5;
    shift by U(-0.1, 0.1), p 0.5; noise, sd U(0, 0.1), p 0.2.
    Why: adapted from the authors' later Auto3DSeg, in MONAI; noise comes last, or the blur would remove it.
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
                noise = torch.randn(channel.shape, generator=generator, device=channel.device)
                channel.add_(noise, alpha=0.1 * u[7])
    return images.masked_fill_(background, 0)


def gaussian_blur(volume, sd):
    """(D, H, W) smoothed by a Gaussian of `sd` voxels, cut off at 4 voxels, with zeros from outside."""
    total = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * sd**2)).sum()
    for side in volume.shape:
        x = torch.arange(side, device=volume.device)
        distance = (x[:, None] - x).abs()
        weights = torch.where(distance <= 4, torch.exp(-(distance**2) / (2 * sd**2)), 0) / total
        volume = torch.tensordot(volume, weights, ([0], [0]))    # puts its first axis last
    return volume


# ---- labels <-> regions -----------------------------------------------------------------------------------

def labels_to_regions(labels, et_label=4):
    """Labels (..., D, H, W), 1 necrosis, 2 oedema, `et_label` enhancing -> (..., 3, D, H, W) bool."""
    if labels.ndim < 3:
        raise ValueError(f"shape {tuple(labels.shape)}, expected (..., D, H, W)")
    et = labels == et_label
    tc = et | (labels == 1)
    wt = tc | (labels == 2)
    return torch.stack([et, tc, wt], dim=-4)


def regions_to_labels(regions, et_label=4):
    """Regions (3, D, H, W) bool: ET, TC, WT -> labels (D, H, W) uint8, painted in the order WT, TC, ET."""
    _check_rank(4, "(3, D, H, W)", regions)
    et, tc, wt = regions
    labels = wt.to(torch.uint8) * 2
    labels[tc] = 1
    labels[et] = et_label
    return labels


# ---- cohorts: what files are called, and what labels mean -------------------------------------------------

class Naming(NamedTuple):
    """A cohort's files and labels. A template is the end of a path, less .nii or .nii.gz; {} is the case."""
    cohort: str
    images: tuple          # templates of t1, t1ce, t2, flair; t1ce's, with `case`, tells namings apart
    segmentation: str      # its template
    labels: tuple          # of background, necrosis, oedema, enhancing; the first of several is written
    case: str = "[^/]+"    # pattern of {}
    channels: tuple = (None, None, None, None)    # of t1, t1ce, t2, flair in a 4-D file


IN_MEMORY = ((0,), (1,), (2,), (4,))    # our labels, whatever a file's are
_BRATS_2023 = ("{}-t1n", "{}-t1c", "{}-t2w", "{}-t2f")
NAMINGS = (
    Naming("BraTS 2017-2021", ("{}_t1", "{}_t1ce", "{}_t2", "{}_flair"), "{}_seg", IN_MEMORY),
    Naming("BraTS 2023 and later", _BRATS_2023, "{}-seg", ((0, 4), (1,), (2,), (3,)), "(?!BraTS-PED)[^/]+"),
    Naming("BraTS-PED", _BRATS_2023, "{}-seg", ((0,),), "BraTS-PED[^/]+"),    # labels by year
    Naming("UCSF-PDGM", ("{}_T1", "{}_T1c", "{}_T2", "{}_FLAIR"), "{}_tumor_segmentation", IN_MEMORY),
    Naming("UPENN-GBM", ("{}_T1", "{}_T1GD", "{}_T2", "{}_FLAIR"), "images_segm/{}_segm", IN_MEMORY),
    Naming("Decathlon Task01_BrainTumour", ("imagesT[rs]/{}",) * 4, "labelsTr/{}", ((0,), (2,), (1,), (3,)),
           r"BRATS_\d+", (1, 2, 3, 0)),
)
TIME_POINT = r"(?<=-\d{5})-\d{3}$|(?<=^UCSF-PDGM-\d{4})_FU.*$|(?<=^UPENN-GBM-\d{5})_\d\d$"    # of a case


class Case(NamedTuple):
    name: str        # BraTS2021_00000, BraTS-GLI-00000-000
    patient: str     # the name less its TIME_POINT
    images: tuple    # four paths: t1, t1ce, t2, flair, each where it should be
    label: Path      # or None
    naming: Naming


class InputError(ValueError):
    """What the user can mend: the file or flag, what was found, what was expected."""


def match(naming, template, path):
    """The case's name in a path, or None."""
    pattern = rf"(?:.*/)?{template.replace('{}', f'({naming.case})')}\.nii(?:\.gz)?"
    return (found := re.fullmatch(pattern, path.as_posix())) and found[1]


def choose_naming(root, paths, names, labels):
    """The one naming that the paths follow, with --names and --labels in place of it. Raises InputError."""
    namings = NAMINGS
    if names:
        *images, segmentation = ["{}" + re.escape(name) for name in names]
        namings = [Naming("these --names", tuple(images), segmentation, ((0,),))]
    found = [naming for naming in namings if any(match(naming, naming.images[1], path) for path in paths)]
    if len(found) != 1:
        what = " and ".join(f"files of {naming.cohort}" for naming in found) or "no case"
        raise InputError(f"{root}: {what}, expected <case>_{{t1,t1ce,t2,flair,seg}}.nii.gz, another naming "
                         "of README's, or --names; python examples/phantom.py DIR makes a cohort")
    background, *theirs = found[0].labels
    theirs = tuple(labels or theirs)
    known = sum(theirs, ())
    if not theirs or len({*known} & {*range(1, 256)}) < len(known):
        raise InputError(f"{root}: labels {theirs or 'unknown'} of {found[0].cohort}, expected --labels, "
                         "different numbers up to 255 (BraTS-PED: 1 2 3 in 2023, 2,3 4 1 from 2024 on)")
    background = tuple(label for label in background if label not in known)
    return found[0]._replace(labels=(background, *theirs))


def find_cases(root, names=None, labels=None):
    """The cases anywhere below the folder `root`, sorted by name; nothing is read but folder listings.

    names: the endings of t1, t1ce, t2, flair, segmentation; labels: ((1,), (2,), (4,)), say, of necrosis,
    oedema, enhancing; both in place of a naming's own.
    Raises InputError for a folder that cannot be listed, no case, two namings, labels of unknown meaning, a
    file that is there twice.
    """
    def refuse(error):
        raise InputError(f"{error.filename}: {error.strerror}, expected a folder that can be listed")

    volume, paths, found, cases = re.compile(r".*/[^./][^/]*\.nii(\.gz)?"), [], {}, []
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if not volume.fullmatch(place):    # some archives have a folder x.nii, which reading refuses
            paths += [os.path.join(place, name) for name in files + folders]
    paths = sorted(map(Path, filter(volume.fullmatch, paths)))
    naming = choose_naming(root, paths, names, labels)
    for kind, template in zip((*MODALITIES, "seg"), (*naming.images, naming.segmentation)):
        for path in paths:
            name = match(naming, template, path)
            if name and found.setdefault(name, {}).setdefault(kind, path) != path:
                raise InputError(f"{path}: {found[name][kind]} is there too, expected one {kind} a case")
    for name, files in sorted(found.items()):
        place = next(iter(files.values())).parent
        if naming.cohort == NAMINGS[0].cohort and place.name == name:
            odd = [*place.glob("[!.]*_Segm.nii*")]    # BraTS20_Training_355's
            files |= {"seg": files.get("seg", odd[0])} if len(odd) == 1 else {}
        ends = [template.replace("\\", "").replace("{}", name).split("/")[-1] for template in naming.images]
        images = tuple(files.get(kind, place / f"{end}.nii.gz") for kind, end in zip(MODALITIES, ends))
        patient = re.sub(TIME_POINT, "", name)
        if set(files) != {"seg"}:
            cases.append(Case(name, patient, images, files.get("seg"), naming))
    return cases


def describe(cases):
    """One line about a cohort."""
    text = f"{len(cases)} case(s) of {len({case.patient for case in cases})} patient(s)"
    for naming in sorted({case.naming for case in cases}):
        background, *labels = (",".join(map(str, label)) for label in naming.labels)
        text += (f", named as {naming.cohort}; labels {' '.join(labels)} are necrosis, oedema, enhancing, "
                 f"{background} background")
    return text


def split_folds(cases, folds=5, seed=0):
    """The folds' validation lists, a partition of `cases`. All cases of a patient are in one fold.

    Paper: "our own 5-fold splits", not published. Here: patients in the order of a hash of seed and name,
    dealt out in turn. Why: names and seed alone decide. Raises InputError for fewer patients than folds.
    """
    patients = {case.patient for case in cases}
    order = sorted(patients, key=lambda patient: sha256(f"{seed} {patient}".encode()).digest())
    if len(order) < folds:
        raise InputError(f"--folds {folds}: there are {len(order)} patients, expected at least one a fold")
    return [[case for case in cases if order.index(case.patient) % folds == fold] for fold in range(folds)]


# ---- reading and writing ----------------------------------------------------------------------------------

nib.imageglobals.logger.setLevel("CRITICAL")    # it logs what it then raises
MOST_VOXELS = 2**25    # of a volume, four times BraTS's
LPS = nib.orientations.axcodes2ornt("LPS")


def read_volume(path, channel=None):
    """A 3-D NIfTI, or a channel of a 4-D one -> (D, H, W) and affine, both in LPS. Raises InputError."""
    try:
        path.open("rb").close()    # nibabel does not say why a file cannot be opened
        with np.errstate(all="ignore"):    # a damaged affine or scale
            image = nib.load(path)
            if len(image.shape) != (3 if channel is None else 4) or math.prod(image.shape[:3]) > MOST_VOXELS:
                raise ValueError(f"shape {image.shape}, expected one volume, at most {MOST_VOXELS:,} voxels")
            image = image if channel is None else image.slicer[..., channel]
            to_lps = nib.orientations.ornt_transform(nib.io_orientation(image.affine), LPS)
            image = image.as_reoriented(to_lps)
            array = np.asarray(image.dataobj)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"voxels of type {array.dtype}, expected one real number each")
    except Exception as error:    # nibabel, gzip and zlib each raise their own kinds for a damaged file
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({what}), expected a NIfTI volume") from None
    return array, image.affine


def read_labels(path, labels=IN_MEMORY):
    """A file whose `labels` are a naming's -> 0, 1, 2, 4 (D, H, W) uint8, and the affine; both in LPS.

    A number within 0.01 of an integer counts as that. Raises InputError for any other label.
    """
    array, affine = read_volume(path)
    found = np.full_like(array, 255, np.uint8)    # 255: none of those we know
    for ours, theirs in zip((0, 1, 2, 4), labels):
        for label in theirs:
            found[abs(array - np.int16(label)) < 0.01] = ours
    if (found == 255).any():
        wrong = ", ".join(f"{value:.7g}" for value in np.unique(array[found == 255])[:3])
        expected = ", ".join(map(str, sorted(sum(labels, ()))))
        raise InputError(f"{path}: has label {wrong}, expected {expected}, or --labels for what others mean")
    return torch.from_numpy(np.ascontiguousarray(found)), affine


def load_case(case):
    """Reads a case: image (4, D, H, W) float32 as stored, target (3, D, H, W) bool or None, affine of LPS.

    Raises InputError for a missing or damaged file, unequal shapes or affines, NaN or infinite voxels, a
    modality of zeros, and labels that the naming does not have.
    """
    volumes = [read_volume(path, channel) for path, channel in zip(case.images, case.naming.channels)]
    if case.label:
        volumes.append(read_labels(case.label, case.naming.labels))
    affine = volumes[0][1]
    for path, (volume, its_affine) in zip((*case.images, case.label), volumes):
        check_same_grid(path, volume, its_affine, case.images[0], volumes[0][0], affine)
    image = np.empty((4, *volumes[0][0].shape), np.float32)    # C order, whatever the files' is
    with np.errstate(over="ignore"):    # too large for float32 becomes infinite
        np.stack([volume for volume, _ in volumes[:4]], out=image, casting="unsafe")
    for path, channel in zip(case.images, image):
        if not (np.isfinite(channel).all() and channel.any()):
            raise InputError(f"{path}: holds NaN or infinite voxels, or zeros alone, expected a brain")
    return torch.from_numpy(image), labels_to_regions(volumes[4][0]) if case.label else None, affine


def check_same_grid(path, volume, affine, other_path, other_volume, other_affine):
    """Raises InputError unless two volumes have one shape and one affine."""
    shape, expected = tuple(volume.shape), tuple(other_volume.shape)
    if shape != expected:
        raise InputError(f"{path}: shape {shape}, expected {expected} as in {other_path}")
    if not np.allclose(affine, other_affine, atol=1e-2):
        raise InputError(f"{path}: its affine differs, expected that of {other_path}")


def doubts(image, affine):
    """What looks unsuitable in a case that can be read, a string each. image: (4, D, H, W) as stored."""
    sides = nib.affines.voxel_sizes(affine)
    filled = np.array([np.count_nonzero(channel != 0) / channel.size for channel in image.numpy()])    # (4,)
    least = f"{MODALITIES[filled.argmin()]} in {filled.min():.0%}"
    found = [f"{name} is not zero in {share:.0%} of the volume, {least}, expected zeros outside the brain"
             for name, share in zip(MODALITIES, filled) if share > 0.95 or share > 2 * filled.min()]
    if filled.min() * image[0].numel() * sides.prod() > 2.5e6:
        found.append("more than 2.5 litres are not zero, expected a brain without its skull")
    if sides.min() < 0.8 or sides.max() > 1.25:
        found.append(f"voxels of {'x'.join(f'{side:.3g}' for side in sides)} mm, expected 1x1x1")
    return found


def save_volume(path, volume, like, labels=IN_MEMORY):
    """Writes labels (D, H, W) uint8 or maps (3, D, H, W) float32, both LPS, in the space of the file `like`.

    Maps become X, Y, Z, 3; a naming's `labels` are written for IN_MEMORY. Raises OSError.
    """
    like, array = nib.load(like), np.asarray(volume)
    if array.ndim == 3:
        array = np.array([0, labels[1][0], labels[2][0], 0, labels[3][0]], np.uint8)[array]
    else:
        array = np.moveaxis(array, 0, -1)    # (D, H, W, 3)
    from_lps = nib.orientations.ornt_transform(LPS, nib.io_orientation(like.affine))
    array = nib.orientations.apply_orientation(array, from_lps)
    image = nib.Nifti1Image(array, like.affine, like.header, dtype=array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0    # the display range of `like` means nothing here
    write_whole(path, gzip.compress(image.to_bytes(), 1))


def write_whole(path, content, prefix=".part"):
    """Writes bytes to a file: all of them or nothing, by a rename. Raises OSError, which names `path`."""
    part = path.with_name(f"{prefix}-{path.name}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)    # a write does not say to which file
        raise
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path, content, prefix=".part"):
    """torch.save, all of it or nothing. Raises OSError, unlike torch.save, which to a full disk does not."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer(), prefix)


# ---- the prepared case, and its cache ---------------------------------------------------------------------

def brain_box(brain):
    """[(first, last + 1)] along D, H, W of what is True in (D, H, W) bool; all of it where nothing is."""
    brain = np.asarray(brain)    # NumPy, and W last: many times as fast
    along_hw = brain.any(0)
    inside = [line.nonzero()[0] for line in (brain.any((1, 2)), along_hw.any(1), along_hw.any(0))]
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, n) for i, n in zip(inside, brain.shape)]


def cache_entry(case, cache):
    """Where `prepare` keeps a case. Changed sources, other labels and another format are another file."""
    files = [path.resolve(strict=True) for path in (*case.images, case.label)]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    facts = 2, case.naming, stats    # 2: to be raised when what `prepare` makes of a case's files changes
    return cache / f"{case.name}-{sha256(repr(facts).encode()).hexdigest()[:16]}.pt"


def prepare(case, cache=None):
    """A segmented case up to its crop: out of the folder `cache`, or else computed and kept there.

    "image" (4, d, h, w) float16, normalised, and "labels" (1, d, h, w) uint8: the box of brain and labels,
    which starts at "corner" in a volume of "shape"; "doubtful" bool. Raises InputError and OSError.
    Paper: no precision. Here: float16 up to the device. Why: half the bytes; rounding is far below the noise.
    """
    entry = cache and cache_entry(case, cache)
    if entry and entry.exists():
        return torch.load(entry, mmap=True, weights_only=True)    # a crop reads its own bytes alone
    image, target, affine = load_case(case)
    box = brain_box(image.any(0) | target[2])    # labels may reach beyond the brain
    inside = (slice(None), *(slice(lo, hi) for lo, hi in box))
    prepared = {"image": normalize(image[inside]).half(), "labels": regions_to_labels(target[inside])[None],
                "corner": [lo for lo, _ in box], "shape": list(image.shape[1:]),
                "doubtful": bool(doubts(image, affine))}
    if entry:
        save_tensors(entry, prepared, f".{uuid.uuid4().hex}")    # another run may be making the same one
    return prepared


# ---- the command ------------------------------------------------------------------------------------------

def show_progress(what, done, total, start):
    """In a terminal, one line that rewrites itself: count, rate, time left. `start` is a time.monotonic()."""
    if sys.stdout.isatty():
        rate = done / max(time.monotonic() - start, 1e-9)
        left = timedelta(seconds=int((total - done) / rate))
        end = "\r\033[K" * (done == total)
        print(f"\r{what} {done}/{total}, {rate:.2f}/s, {left} left\033[K", end=end, flush=True)


def folder(text):
    """An argparse type: the shell does not expand --flag=~/folder."""
    return Path(os.path.expanduser(text))


def add_cohort_flags(parser):
    def five_endings(text):
        t1, t1ce, t2, flair, seg = text.split()
        return t1, t1ce, t2, flair, seg

    def label_list(text):
        return tuple(map(int, text.split(",")))    # "2,3" -> (2, 3)

    parser.add_argument("--names", type=five_endings, help="of another cohort: '_T1 _T1c _T2 _FLAIR _seg'")
    parser.add_argument("--labels", nargs=3, type=label_list, metavar=("NECROSIS", "OEDEMA", "ENHANCING"),
                        help="comma lists, if names do not tell")


def run_command(main):
    """Runs main() and exits with its code. What the user can mend is one line and code 2; Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)    # a log need not be UTF-8
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:    # a reader such as `head` has left
        code = 141
    except Exception as error:
        left = isinstance(error, RuntimeError) and "onnection" in str(error)    # to a rank that has left
        told = left or isinstance(error, (InputError, OSError))
        if isinstance(error, OSError):
            error = f"{error.filename or 'output'}: {error.strerror or error}"
        if told:
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if told else 1
    os._exit(code or 0)    # an exit that waits for nothing: not for readers, nor the threads of libraries


def check(case):
    """-> what is wrong with a case, the voxels of ET, TC, WT or None, and whether it can be used"""
    try:
        image, target, affine = load_case(case)
    except InputError as error:
        return [f"error: {error}"], None, False
    sizes = None if target is None else target.sum((1, 2, 3)).tolist()
    return [f"warning: {case.name}: {doubt}" for doubt in doubts(image, affine)], sizes, True


def main():
    parser = argparse.ArgumentParser(description="Checks a cohort.")
    parser.add_argument("root", type=folder, metavar="DIR", help="searched with all folders below it")
    add_cohort_flags(parser)
    args = parser.parse_args()
    cases, results, start = find_cases(args.root, args.names, args.labels), [], time.monotonic()
    print(f"{args.root}: {describe(cases)}")
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:    # unpacking releases the interpreter's lock
        for result in pool.map(check, cases):
            results.append(result)
            show_progress("checking", len(results), len(cases), start)
    for region, sizes in zip(REGIONS, zip(*(sizes for _, sizes, _ in results if sizes))):
        print(f"  {region}: mean {np.mean(sizes):,.0f} voxels, empty in {sizes.count(0)} of {len(sizes)}")
    if bare := [case.name for case in cases if case.label is None]:
        print(f"  {len(bare)} cases have no segmentation: {', '.join(bare[:3])}{' ...' * (len(bare) > 3)}")
    good = sum(usable for _, _, usable in results)
    print(*(f"  {line}" for lines, _, _ in results for line in lines),
          f"{good} of {len(cases)} cases can be used", sep="\n")
    return int(good < len(cases))


if __name__ == "__main__":
    run_command(main)
