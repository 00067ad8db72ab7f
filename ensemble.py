"""Confidence-based ensembling, section 3.2: mean, geometric mean, the mean of the N/2 most confident maps.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs",
arXiv:2111.00742. Code: MIT licence.
Maps are sigmoid probabilities (N, C, D, H, W): N maps of one case, C regions, each ensembled by itself.
The file stands alone: PyTorch, NumPy and nibabel. As a command it merges folders of maps, of
`infer.py --probabilities` or any other tool: one <case>.nii.gz a case, X, Y, Z, 3 in the order ET, TC, WT:

    python ensemble.py --method confidence --out merged FOLDER FOLDER ...
"""

import argparse
import gzip
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch


def _check(maps):
    if maps.ndim != 5 or maps.isnan().any():
        raise ValueError(f"maps are {tuple(maps.shape)} or hold NaN, expected probabilities (N, C, D, H, W)")


def confidence(maps):
    """Section 3.2's heuristic, "the average probability value of the segmented region".

    maps: (N, C, D, H, W) float, in [0, 1]. Returns (N, C) float32, in (0.5, 1]: the mean over the voxels
    above 0.5; NaN where a map has none.
    Paper: one score an image. Here: one a region. Why: WT would drown ET, and the heuristic is "not true
    when different models produce substantially different region sizes".
    This and the three functions below raise ValueError for NaN and other ranks.
    """
    _check(maps)
    scores = []
    for p in maps:    # (C, D, H, W), one at a time, which spares a second copy of all maps
        region = p > 0.5
        inside = torch.where(region, p, 0).sum((1, 2, 3), dtype=torch.float32)
        scores.append(inside / region.sum((1, 2, 3)))    # (C,); 0 / 0 = NaN
    return torch.stack(scores)


def mean_ensemble(maps):
    """(N, C, D, H, W) probabilities -> their mean (C, D, H, W) float32."""
    _check(maps)
    return maps.mean(0, dtype=torch.float32)


def geometric_mean_ensemble(maps):
    """(N, C, D, H, W) probabilities -> their geometric mean (C, D, H, W) float32; logs do not underflow."""
    _check(maps)
    return maps.float().log().mean(0).exp()    # an exact 0 makes the voxel 0: exp(log 0) = 0


def confidence_ensemble(maps):
    """Section 3.2: "the top N/2 probabilities (with equal weights)" by `confidence`, each region by itself.

    (N, C, D, H, W) probabilities -> (C, D, H, W) float32.

    Paper: silent on odd N, ties and empty maps. Here: N counts every map, N/2 is rounded up, ties go by the
    order of the maps. Empty maps are not ranked; where half or more are empty, the mean of all is taken.
    Why: an empty map's confidence is 0/0, and half of the maps being empty is itself a vote for "absent".
    """
    scores = confidence(maps)    # (N, C)
    top, merged = (len(maps) + 1) // 2, []
    for region, score in enumerate(scores.T):
        empty = score.isnan()
        if 2 * empty.sum() >= len(maps):
            chosen = torch.arange(len(maps), device=maps.device)
        else:
            chosen = score.masked_fill(empty, -1).sort(descending=True, stable=True).indices[:top]
        merged.append(maps[chosen, region].mean(0, dtype=torch.float32))    # (D, H, W)
    return torch.stack(merged)


METHODS = {"confidence": confidence_ensemble, "geometric": geometric_mean_ensemble, "mean": mean_ensemble}


# ---- the command -------------------------------------------------------------------------------------------

nib.imageglobals.logger.setLevel("CRITICAL")    # it logs what it then raises


def lies_outside(inner, outer):
    """Whether most of a region lies outside the next larger one, as where the order is another.

    A few stray voxels, less than a tenth of the larger one, do not count.
    """
    stray, largest = (inner & ~outer).sum(), max(inner.sum(), outer.sum())
    return bool(outer.any()) and stray > max(inner.sum() / 2, largest / 10)


def load_maps(paths):
    """Paths of one case's maps -> (N, 3, X, Y, Z) float32, and the first one's image. Raises ValueError."""
    maps, first = [], None
    for path in paths:
        try:
            image = nib.load(path)
            first = first or image
            if image.shape[3:] != (3,) or np.prod(image.shape) > 3 * 2**25 or image.shape != first.shape:
                raise ValueError(f"shape {image.shape}, not (X, Y, Z, 3), the same in every FOLDER")
            if not (np.isfinite(image.affine).all() and np.allclose(image.affine, first.affine, atol=1e-2)):
                raise ValueError(f"an affine that is not finite, or unlike that of {paths[0]}")
            volume = torch.from_numpy(np.asarray(image.dataobj, np.float32)).movedim(3, 0)    # (3, X, Y, Z)
            if not (volume.min() > -1e-3 and volume.max() < 1.001):    # so NaN too; resampling overshoots
                raise ValueError(f"values {volume.min():g} to {volume.max():g}, not [0, 1]")
            et, tc, wt = volume > 0.5
            if lies_outside(tc, wt):
                raise ValueError("most of TC lies outside WT")
        except Exception as error:    # nibabel, gzip and zlib each raise their own kinds for a damaged file
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ValueError(f"{path}: {what}; expected ET, TC, WT as maps in NIfTI, in [0, 1]") from None
        if lies_outside(et, tc):    # as in maps of a young network, so it is not refused
            print(f"warning: {path}: most of ET lies outside TC, expected the order ET, TC, WT")
        maps.append(volume.clamp(0, 1))
    return torch.stack(maps), first


def labels_of(name):
    """The labels of necrosis, oedema and enhancing tumour that a case's name tells."""
    if "-PED-" in name:
        raise ValueError(f"{name}: what BraTS-PED's labels mean depends on the year, expected --labels")
    if name.startswith("BRATS_"):    # Decathlon's
        return 2, 1, 3
    return (1, 2, 3) if name.startswith("BraTS-") else (1, 2, 4)


def save_labels(path, regions, labels, like):
    """Paints regions (3, X, Y, Z) bool, WT, TC, ET in turn, as uint8 `labels`, in the space of `like`."""
    painted = np.zeros(regions.shape[1:], np.uint8)
    for region, label in zip(reversed(regions.numpy()), (labels[1], labels[0], labels[2])):
        painted[region] = label
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header.set_intent("none")    # some tools' maps are "vector"
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(gzip.compress(type(like)(painted, like.affine, header).to_bytes(), 1))
        part.replace(path)    # whole or not there
    except OSError as error:
        error.filename = str(path)    # a write does not say to which file
        raise
    finally:
        part.unlink(missing_ok=True)


def merge(folders, out, method, labels):
    """Merges every case of `folders` into `out`, a line each. Raises ValueError and OSError."""
    names = sorted({path.name for folder in folders for path in folder.glob("[!.]*.nii.gz")})
    for path in (folder / name for folder in folders for name in names or ["*.nii.gz"]):
        if not path.exists():
            raise ValueError(f"{path}: no such file, expected every case in every FOLDER")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("FOLDER: one folder is given twice and would count twice, expected each once")
    if there := next(out.glob("[!.]*.nii.gz"), None):
        raise ValueError(f"--out {out}: {there} is there, expected an empty or a new folder")
    if labels and len({*labels} & {*range(1, 256)}) < 3:
        raise ValueError(f"--labels {labels}: expected three different numbers from 1 to 255")
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names, 1):
        maps, first = load_maps([folder / name for folder in folders])
        save_labels(out / name, METHODS[method](maps) > 0.5, labels or labels_of(name), first)
        del maps    # before the next case's are read
        print(f"{i}/{len(names)} {name}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    print(f"{len(names)} cases, {method} of {len(folders)} maps each, in {out}")


def main():
    parser = argparse.ArgumentParser(description="Merges folders of probability maps into segmentations.")
    folder = lambda text: Path(text).expanduser()
    parser.add_argument("folders", nargs="+", type=folder, metavar="FOLDER",
                        help="one <case>.nii.gz a case: float, X, Y, Z, 3 in the order ET, TC, WT")
    parser.add_argument("--method", choices=METHODS, default="confidence", help="(default: %(default)s)")
    parser.add_argument("--out", type=folder, required=True, help="gets <case>.nii.gz: uint8 labels")
    parser.add_argument("--labels", type=int, nargs=3, metavar=("NECROSIS", "OEDEMA", "ENHANCING"),
                        help="to write (default: by name, BraTS-* 1 2 3, BRATS_* 2 1 3, any other 1 2 4)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")    # for a name that the log's encoding lacks
    try:
        with np.errstate(all="ignore"):    # of damaged headers, which are refused
            merge(**vars(args))
    except BrokenPipeError:    # a reader such as `head` has left
        os._exit(141)
    except (ValueError, OSError) as error:
        text = f"{error.filename or 'output'}: {error.strerror}" if isinstance(error, OSError) else str(error)
        parser.exit(2, f"ensemble.py: error: {' '.join(text.split())}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
