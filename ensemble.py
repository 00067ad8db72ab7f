"""Confidence-based ensembling: section 3.2. Mean, geometric mean, and the mean of the N/2 most confident maps.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs", arXiv:2111.00742. Code: MIT licence.
Maps are sigmoid probabilities, (N, C, D, H, W): N maps of one case, C regions, each region ensembled by itself.
The file stands alone: PyTorch, NumPy and nibabel. As a command it merges folders of saved maps, `infer.py --probabilities`'s
or any other tool's of the same form (one <case>.nii.gz a case, float, X, Y, Z, 3 in the order ET, TC, WT), case by case,
and writes label maps <case>.nii.gz:

    python ensemble.py --method confidence --out merged FOLDER FOLDER ...
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch


def confidence(maps):
    """The heuristic of section 3.2, "the average probability value of the segmented region".

    It compares maps of about the same region; "not true when different models produce substantially different region sizes".
    maps: (N, C, D, H, W) float, in [0, 1]. Returns (N, C) float32: the mean probability over each map's own region, the
    voxels above 0.5, hence in (0.5, 1]; NaN where a map has no such voxel.
    """
    scores = []
    for p in maps:    # (C, D, H, W), one by one, to need no second copy of all maps
        region = p > 0.5
        inside = torch.where(region, p, 0).sum((1, 2, 3), dtype=torch.float32)
        scores.append(inside / region.sum((1, 2, 3)))    # (C,); 0 / 0 = NaN: an empty map has no confidence
    return torch.stack(scores)


def mean_ensemble(maps):
    """(N, C, D, H, W) probabilities -> their mean (C, D, H, W) float32."""
    return maps.mean(0, dtype=torch.float32)


def geometric_mean_ensemble(maps):
    """(N, C, D, H, W) probabilities -> their geometric mean (C, D, H, W) float32.

    In log space, so that a product of many small numbers does not vanish; one exact 0 makes the voxel 0: exp(log 0) = 0.
    """
    return maps.float().log().mean(0).exp()


def confidence_ensemble(maps):
    """Section 3.2: "the top N/2 probabilities (with equal weights)", chosen by `confidence` for each region by itself.

    (N, C, D, H, W) probabilities -> (C, D, H, W) float32.

    The paper names the weighted mean of all maps as an alternative and found the top N/2 better.
    Paper: silent on odd N, ties and empty maps. Here: N counts every map, N/2 is rounded up, ties go by the order of the
    maps. An empty map is never ranked; where at least half of the maps are empty, the plain mean of all is taken.
    Why: the confidence of an empty map is 0/0, and half of the maps being empty is itself a vote for "absent".
    """
    scores = confidence(maps)    # (N, C)
    top = (len(maps) + 1) // 2
    merged = []
    for region, score in enumerate(scores.T):
        empty = score.isnan()
        if 2 * empty.sum() >= len(maps):
            chosen = torch.arange(len(maps), device=maps.device)
        else:
            chosen = score.masked_fill(empty, -1).sort(descending=True, stable=True).indices[:top]
        merged.append(maps[chosen, region].mean(0, dtype=torch.float32))
    return torch.stack(merged)


METHODS = {"confidence": confidence_ensemble, "geometric": geometric_mean_ensemble, "mean": mean_ensemble}


# ---- the command ------------------------------------------------------------------------------------------------------


logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)    # it logs what it then raises


class InputError(ValueError):
    """What the user can mend. The message is one printable line: file or flag, what was found, what was expected."""

    def __init__(self, message):    # file names and other programs' messages may hold anything
        super().__init__("".join(c if c.isprintable() else "?" for c in " ".join(message.split()))[:1000])


def list_cases(folders):
    """Folders -> the sorted names of their *.nii.gz files, which must be the same in every folder."""
    names = [{path.name for path in folder.glob("*.nii.gz") if not path.name.startswith(".")} for folder in folders]
    for folder, found in zip(folders, names):
        if not found:
            what = "no *.nii.gz file in it" if folder.is_dir() else "no such folder"
            raise InputError(f"{folder}: {what}, expected one probability map <case>.nii.gz a case")
        missing = sorted(set.union(*names) - found)
        if missing:
            raise InputError(f"{folder / missing[0]}: missing ({len(missing)} in all), expected every case in every folder")
    return sorted(names[0])


def open_nifti(path):
    """A NIfTI as nibabel opens it, its voxels still on the disk; without its extensions, which nibabel reads whatever length they claim.

    Raises ValueError where the header promises more than the file can hold, InputError for more than three large maps; no memory is taken then.
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
    if not shape or min(shape) < 1 or not 0 <= offset <= 2**25 or promised + offset > held:
        raise ValueError(f"its header promises {'x'.join(map(str, shape))} voxels from byte {offset:g} on, more than such a file holds")
    if math.prod(shape) > 3 * 2**25:
        raise InputError(f"{path}: {'x'.join(map(str, shape))}, expected at most three maps of {2**25:,} voxels; crop or resample them")
    return kind(nib.arrayproxy.ArrayProxy(path, header), header.get_best_affine(), header)


def load_maps(paths):
    """Paths of one case's maps -> (N, 3, X, Y, Z) float32 and the first map's image, for affine and header."""
    images, maps = [], None
    for n, path in enumerate(paths):
        try:
            with np.errstate(all="ignore"):    # a damaged affine or scale
                image = open_nifti(path)
                volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
        except InputError:
            raise
        except Exception as error:    # nibabel, gzip and zlib each raise their own kinds for a damaged file
            raise InputError(f"{path}: cannot be read ({str(error) or type(error).__name__}), expected a NIfTI file; make it again") from None
        images.append(image)
        if volume.ndim != 4 or volume.shape[3] != 3:
            raise InputError(f"{path}: shape {image.shape}, expected (X, Y, Z, 3): the probabilities of ET, TC and WT")
        if image.shape != images[0].shape or not np.allclose(image.affine, images[0].affine, atol=1e-2):
            raise InputError(f"{path}: shape {image.shape} or its affine differs from {paths[0]} with {images[0].shape}, "
                             "expected maps on the same voxels")
        if not (volume.min() > -1e-3 and volume.max() < 1.001):    # true for NaN; resampling may overshoot a little
            raise InputError(f"{path}: values from {volume.min():g} to {volume.max():g}, expected probabilities in [0, 1]")
        if maps is None:
            maps = torch.empty(len(paths), 3, *image.shape[:3])
        maps[n] = volume.clamp(0, 1).movedim(3, 0)    # (X, Y, Z, 3) -> (3, X, Y, Z)
    return maps, images[0]


def paint(probabilities, et_label):
    """(3, X, Y, Z) ET, TC, WT -> uint8 labels (X, Y, Z): WT as 2, over it TC as 1, over it ET as `et_label`, each where p > 0.5."""
    et, tc, wt = probabilities > 0.5
    labels = wt.to(torch.uint8) * 2
    labels[tc] = 1
    labels[et] = et_label
    return labels.numpy()


def save_labels(path, labels, like):
    """Writes uint8 labels (X, Y, Z) with the affine, codes and units of the image `like`; never half a file under `path`."""
    header = like.header.copy()
    header.set_data_shape(labels.shape)
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header.set_intent("none")    # "vector" in maps of some tools
    image = type(like)(labels, like.affine, header)
    beside = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.{path.name}")
    try:
        nib.save(image, beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Merges folders of probability maps into segmentations (section 3.2).")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="one <case>.nii.gz a case: float, X, Y, Z, 3 in ET, TC, WT")
    parser.add_argument("--method", choices=METHODS, default="confidence", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="gets one <case>.nii.gz a case: uint8 labels")
    parser.add_argument("--et-label", type=int, choices=(3, 4), default=4, help="4 up to BraTS 2021, 3 from 2023 on")
    parser.error = lambda message: parser.exit(2, f"ensemble.py: error: {message}; --help lists what there is\n")    # without the usage: one line
    args = parser.parse_args()
    try:
        names = list_cases(args.folders)
        if len({folder.resolve() for folder in args.folders}) < len(args.folders):
            raise InputError("FOLDER: one is given twice and would count twice, expected each once")
        if args.out.resolve() in [folder.resolve() for folder in args.folders]:
            raise InputError(f"--out {args.out}: is one of the folders to merge, expected another one")
        args.out.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names, 1):
            maps, first = load_maps([folder / name for folder in args.folders])
            save_labels(args.out / name, paint(METHODS[args.method](maps), args.et_label), first)
            del maps    # before the next case's are read
            print(f"\r{i}/{len(names)} {name}\033[K" if sys.stdout.isatty() else f"{i}/{len(names)} {name}",
                  end="" if sys.stdout.isatty() and i < len(names) else "\n", flush=True)
    except InputError as error:
        parser.exit(2, f"ensemble.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"ensemble.py: error: {error.filename or args.out}: {error.strerror or error}, expected a folder that can be written\n")
    print(f"{len(names)} cases, {args.method} of {len(args.folders)} maps each, in {args.out}")


if __name__ == "__main__":
    main()
