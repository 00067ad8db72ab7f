"""A synthetic cohort in the layout of BraTS 2021: to try every command of this project without the real data.

    python examples/phantom.py DIR [--cases 12] [--shape 240 240 155] [--seed 0] [--first 0]

writes DIR/BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz and so on. Each case is a skull-stripped head
with cortex, white matter, ventricles and vessels, and one tumour: oedema around a core whose rim enhances around
necrosis. Scanner gain, contrast, bias field, resolution and noise differ from case to case. About one case in ten does
not enhance, and about one in three is bright in FLAIR on the healthy side as well (the failure of the paper's Figure 2).
Nothing here comes from a patient, and no figure measured on it says anything about one.

A case depends on the seed and its number alone. Anatomy is laid out in fractions of the volume: a small shape is the
same head seen coarsely, drawn from the same random numbers; only noise and rounding differ.
"""
import argparse
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

MODALITIES = "t1", "t1ce", "t2", "flair"
OUTSIDE, GREY, WHITE, CSF, VESSEL, LOOKALIKE, OEDEMA, NECROSIS, RIM = range(9)
LABELS = {NECROSIS: 1, OEDEMA: 2, RIM: 4}
MEANS = np.array([  # brightness of each tissue, white matter being 1; rows are MODALITIES
    # outside grey white  csf vessel lookalike oedema necrosis rim
    [0.00,    0.76, 1.00, 0.40, 0.65, 0.95,    0.66,  0.50,    0.74],
    [0.00,    0.76, 1.00, 0.40, 1.70, 0.95,    0.68,  0.45,    1.75],
    [0.00,    1.20, 0.90, 2.50, 0.60, 1.05,    1.85,  2.15,    1.55],
    [0.00,    1.15, 0.95, 0.35, 0.60, 1.60,    1.60,  1.20,    1.45]])

# The knobs of difficulty: ranges to draw from, case by case.
P_NO_ENHANCEMENT, P_LOOKALIKE = 0.1, 1 / 3
WHOLE_TUMOUR = 0.055, 0.12  # of the brain's volume
CORE = 0.35, 0.60           # of the whole tumour's
NECROTIC = 0.10, 0.35       # of the core's, where it enhances
LOOKALIKE_SIZE = 0.02, 0.06  # of the brain's
CONTRAST = 0.80, 1.15       # exponent on MEANS, for each modality: below 1 the tissues look more alike
JITTER = 0.05               # sd of the log of each tissue's brightness
BIAS = 0.08, 0.18           # sd of the log of the bias field
NOISE = 0.02, 0.06          # sd, white matter being 1


def axes(shape):
    """-> x (left), y (posterior), z (superior), each from -1 to 1 across `shape`; they broadcast to it, float32."""
    return np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)


def smooth(rng, shape, cells):
    """A smooth random field, mean about 0, sd 1: cells x cells x cells numbers, interpolated. -> `shape`, float32."""
    field = rng.standard_normal((cells,) * 3, dtype=np.float32)
    for size in shape:
        # Zooming an identity matrix gives the interpolation weights of one axis; an axis at a time is fast. Each
        # product takes the first axis and puts it last, so after three they are in order again.
        weights = ndimage.zoom(np.eye(cells, dtype=np.float32), (size / cells, 1))  # (size, cells)
        field = np.tensordot(field, weights, (0, 1))
    return field / field.std()


def radius(coordinates, centre, semiaxes):
    """Distance from `centre` in units of `semiaxes`, so that the ellipsoid's surface is at 1."""
    return np.sqrt(sum(((u - c) / s) ** 2 for u, c, s in zip(coordinates, centre, semiaxes)))


def grow(distance, where, voxels):
    """The `voxels` (a count) voxels of the mask `where` with the smallest distance. -> mask"""
    voxels = min(max(int(voxels), 1), int(where.sum()))
    return where & (distance <= np.partition(distance[where], voxels - 1)[voxels - 1])


def traits(rng):
    """The first three draws of a case. -> side (+1 left, -1 right), does it enhance, is there a lookalike"""
    side, enhancing, lookalike = rng.random(3)
    return (1 if side < 0.5 else -1), enhancing < 1 - P_NO_ENHANCEMENT, lookalike < P_LOOKALIKE


def healthy(rng, shape):
    """A head without a tumour. -> tissue (uint8), and where a tumour may grow: the cerebrum without its ventricles."""
    x, y, z = axes(shape)
    x = x + 0.02 * smooth(rng, shape, 5)  # the midline wobbles: no head is its own mirror image
    width, height = rng.uniform(0.90, 0.98), rng.uniform(0.86, 0.94)
    egg, flat = x / (1 + 0.1 * y), np.where(z > 0.05, z, 1.3 * z - 0.015)  # narrower in front, flatter below
    lobes = radius((egg, y, flat), (0, 0, 0.05), (width, 0.97, height))
    cerebrum = 1 - lobes - 0.02 * smooth(rng, shape, 12)  # depth below the surface: 0 there, 1 at the centre
    cerebellum = 0.5 * (1 - radius((x, y, z), (0, 0.46, -0.52), (0.66, 0.43, 0.42)))
    stem = 0.4 * (1 - radius((x, y, z), (0, 0.10, -0.60), (0.19, 0.20, 0.40)))
    depth = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    fold, other = smooth(rng, shape, 22), smooth(rng, shape, 22)  # sulci lie where `fold` crosses zero

    tissue = np.where(depth > 0, WHITE, OUTSIDE).astype(np.uint8)
    brain = depth > 0
    tissue[brain & ((depth < 0.07) | (np.abs(fold) < 1 - depth / 0.36)) & (stem < 0)] = GREY
    tissue[brain & (np.abs(fold) < 0.22 * (1 - depth / 0.22))] = CSF
    tissue[radius((np.abs(x), y, z), (0.27, 0.02, 0.02), (0.12, 0.24, 0.17)) < 1] = GREY  # basal ganglia, thalamus
    tissue[brain & (np.abs(cerebrum - cerebellum) < 0.02)] = CSF  # under the tentorium
    tissue[brain & (np.abs(x) < 0.02) & (z > 0) & (depth < 0.4)] = CSF  # between the hemispheres
    tissue[brain & (np.abs(x) < 0.05) & (z > -0.2) & (y > -0.5) & (depth < 0.06)] = VESSEL  # sagittal sinus
    # Two fields near zero at once make curves: vessels, as bright as an enhancing rim.
    tissue[brain & (np.abs(fold) < 0.2) & (np.abs(other) < 0.12) & (depth < 0.25)] = VESSEL
    size = rng.uniform(0.8, 1.5)
    apart = np.abs(x) - 0.08 - 0.7 * (y - 0.02) ** 2  # the horns diverge, to the front and to the back
    ventricles = radius((apart, y, z), (0, 0.02, 0.16), (0.07 * size, 0.46, 0.12 * size)) < 1
    tissue[ventricles] = CSF
    return tissue, (cerebrum > 0.04) & ~ventricles


def add_tumour(rng, tissue, cerebrum, side, enhancing, lookalike):
    """Draw a tumour, and a lookalike on the other side if the case has one, into `tissue` (changed in place)."""
    shape, (x, y, z), brain = tissue.shape, axes(tissue.shape), (tissue > OUTSIDE).sum()
    centre = side * rng.uniform(0.35, 0.60), rng.uniform(-0.55, 0.50), rng.uniform(0, 0.45)
    stretch = rng.uniform(0.8, 1.25, 3) * (1.25, 1, 1.25)  # y spans more millimetres than x and z do
    whole, core, necrotic = (rng.uniform(*limits) for limits in (WHOLE_TUMOUR, CORE, NECROTIC))
    distance = radius((x, y, z), centre, stretch)
    # Volumes are set by counting voxels, so that they hold wherever the skull or a ventricle cuts the tumour off.
    oedema = grow(distance + 0.08 * smooth(rng, shape, 9), cerebrum & (side * x > 0.01), whole * brain)
    core = grow(distance + 0.04 * smooth(rng, shape, 9), oedema, core * oedema.sum())
    necrosis = grow(distance + 0.03 * smooth(rng, shape, 12), core, necrotic * core.sum())

    middle = -side * rng.uniform(0.25, 0.40), rng.uniform(-0.4, 0.4), rng.uniform(0.1, 0.35)
    distance = radius((x, y, z), middle, (0.8, 1.5, 0.8)) + 0.06 * smooth(rng, shape, 9)
    bright = grow(distance, cerebrum & (side * x < -0.01), rng.uniform(*LOOKALIKE_SIZE) * brain)
    if lookalike:  # decided here, after all the draws, so that this knob changes nothing else
        tissue[bright] = LOOKALIKE
    tissue[oedema] = OEDEMA
    tissue[core] = RIM if enhancing else NECROSIS
    tissue[necrosis] = NECROSIS


def scan(rng, tissue, millimetres):
    """One modality after another, as a scanner might see `tissue`. -> int16 images (4, *tissue.shape), 0 outside

    millimetres: size of a voxel along each axis, if the whole volume is 240 x 240 x 155 mm
    """
    images = np.zeros((4, *tissue.shape), np.int16)
    for image, means in zip(images, MEANS):
        means = means ** rng.uniform(*CONTRAST) * np.exp(JITTER * rng.standard_normal(means.size))
        texture, bias = 0.06 * smooth(rng, tissue.shape, 18), rng.uniform(*BIAS) * smooth(rng, tissue.shape, 3)
        blur = rng.uniform(0.3, 0.8, 3)  # mm, sd
        if rng.random() < 0.5:
            blur[rng.integers(3)] = rng.uniform(1.0, 2.5)  # thick slices
        gain, noise = np.exp(rng.uniform(np.log(200), np.log(3000))), rng.uniform(*NOISE)
        seen = means.astype(np.float32)[tissue] * np.exp(texture + bias)
        # A voxel averages over its own extent as well: 0.4 voxels.
        seen = ndimage.gaussian_filter(seen, np.hypot(0.4, blur / millimetres), truncate=3)
        seed = rng.integers(2**63)  # noise has its own generator: its length depends on the shape, nothing else may
        seen += noise * np.random.default_rng(seed).standard_normal(tissue.shape, dtype=np.float32)
        image[:] = np.where(tissue > OUTSIDE, np.clip(gain * seen, 1, 32767), 0)
    return images


def make_case(shape, seed, number):
    """Case `number` of the cohort `seed`. -> images (4, X, Y, Z) int16, labels (X, Y, Z) uint8

    images: t1, t1ce, t2, flair; positive in the brain, 0 outside; axes to the left, posterior, superior
    labels: 0 none, 1 necrotic core, 2 oedema, 4 enhancing; shape: three sides of at least 32
    """
    rng = np.random.default_rng((seed, number))
    shape = np.array(shape)
    box = np.round(shape * (0.60, 0.74, 0.90)).astype(int)  # the share of a BraTS volume that a brain fills
    side, enhancing, lookalike = traits(rng)
    tissue, cerebrum = healthy(rng, box)
    add_tumour(rng, tissue, cerebrum, side, enhancing, lookalike)
    corner = np.round((shape - box) * rng.uniform(0.35, 0.65, 3)).astype(int)
    where = tuple(slice(c, c + b) for c, b in zip(corner, box))
    images, labels = np.zeros((4, *shape), np.int16), np.zeros(shape, np.uint8)
    images[(slice(None), *where)] = scan(rng, tissue, np.array([240, 240, 155]) / shape)
    for kind, label in LABELS.items():
        labels[where][tissue == kind] = label
    return images, labels


def save(path, volume):
    """Write a NIfTI file with BraTS 2021's header. It appears under its name only once it is complete."""
    affine = np.array([[-1., 0, 0, 0], [0, -1, 0, volume.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f".partial_{path.name}")
    try:
        nib.save(image, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fail(message):
    print(f"phantom.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(prog="phantom.py", description="Write a synthetic cohort in BraTS 2021's layout.")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of the cohort; made if missing")
    parser.add_argument("--cases", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(240, 240, 155), metavar=("X", "Y", "Z"),
                        help="voxels, at least 32 a side (default: 240 240 155)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another cohort (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.error = fail  # a mistake is one line, without the usage
    args = parser.parse_args()
    if args.cases < 1:
        fail(f"--cases {args.cases}: at least 1 is needed")
    if min(args.shape) < 32:
        fail(f"--shape {' '.join(map(str, args.shape))}: every side must be at least 32")
    if min(args.seed, args.first) < 0:
        fail("--seed and --first cannot be negative")

    plain = bright = 0
    for number in range(args.first, args.first + args.cases):
        images, labels = make_case(args.shape, args.seed, number)
        name = f"BraTS2021_{number:05d}"
        try:
            (args.dir / name).mkdir(parents=True, exist_ok=True)
            for suffix, volume in zip((*MODALITIES, "seg"), (*images, labels)):
                save(args.dir / name / f"{name}_{suffix}.nii.gz", volume)
        except OSError as error:
            fail(f"cannot write {args.dir / name}: {error.strerror or error}")
        _, enhancing, lookalike = traits(np.random.default_rng((args.seed, number)))
        plain, bright = plain + (not enhancing), bright + lookalike
        if sys.stdout.isatty():
            print(f"\r{number - args.first + 1}/{args.cases} cases", end="", flush=True)
    print(f"{chr(13) if sys.stdout.isatty() else ''}{args.cases} case{'s' * (args.cases > 1)} of {' x '.join(map(str, args.shape))} voxels, "
          f"seed {args.seed}, in {args.dir}: {plain} without enhancement, {bright} bright in FLAIR on the healthy side")


if __name__ == "__main__":
    main()
