"""A synthetic cohort: to try every command of this project without the real data.

    python examples/phantom.py DIR [--like COHORT] [--cases 12] [--shape 240 240 155] [--seed 0] [--first 0]

writes DIR/BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz and so on.
--like brats2023, ucsf, upenn or decathlon writes the same voxels in that cohort's names, folders and labels.

A case is a skull-stripped head with cortex, white matter, ventricles and vessels.
Its one tumour is oedema around a core whose rim enhances around necrosis.
Scanner gain, contrast, bias field, resolution and noise differ from case to case.
About one case in ten does not enhance.
About one in three is bright in FLAIR on the healthy side as well (the failure of the paper's Figure 2).
Nothing here comes from a patient, and no figure measured on it says anything about one.

A case depends on the seed and its number alone.
Anatomy is laid out in fractions of the volume, so a small shape is the same head seen coarsely.
It is drawn from the same random numbers; only noise and rounding differ.
"""
import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

MODALITIES = "t1", "t1ce", "t2", "flair"
LAYOUTS = {  # case; images, suffix: index in MODALITIES; segmentation, labels of necrosis, oedema, enhancing
    "brats2021": ("BraTS2021_{:05}", "{0}/{0}_{1}", {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3},
                  "{0}/{0}_seg", (1, 2, 4)),
    "brats2023": ("BraTS-GLI-{:05}-000", "{0}/{0}-{1}", {"t1n": 0, "t1c": 1, "t2w": 2, "t2f": 3},
                  "{0}/{0}-seg", (1, 2, 3)),
    "ucsf": ("UCSF-PDGM-{:04}", "{0}_nifti/{0}_{1}", {"T1": 0, "T1c": 1, "T2": 2, "FLAIR": 3},
             "{0}_nifti/{0}_tumor_segmentation", (1, 2, 4)),
    "upenn": ("UPENN-GBM-{:05}_11", "images_structural/{0}/{0}_{1}",
              {"T1": 0, "T1GD": 1, "T2": 2, "FLAIR": 3}, "images_segm/{0}_segm", (1, 2, 4)),
    "decathlon": ("BRATS_{:03}", "imagesTr/{0}", {"": [3, 0, 1, 2]}, "labelsTr/{0}", (2, 1, 3))}  # 4-D images
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
NECROTIC = 0.25, 0.55       # of the core's, where it enhances; 0.16 to 0.51 in five cases of BraTS 2021
LOOKALIKE_SIZE = 0.02, 0.06  # of the brain's
CONTRAST = 0.80, 1.15       # exponent on MEANS, for each modality: below 1 the tissues look more alike
JITTER = 0.05               # sd of the log of each tissue's brightness
BIAS = 0.08, 0.18           # sd of the log of the bias field
NOISE = 0.02, 0.06          # sd, white matter being 1


def axes(shape):
    """-> x (left), y (posterior), z (superior), each from -1 to 1; they broadcast to `shape`, float32."""
    return np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)


def smooth(rng, shape, cells):
    """A smooth random field, mean about 0, sd 1, from cells x cells x cells numbers. -> `shape`, float32."""
    field = rng.standard_normal((cells,) * 3, dtype=np.float32)
    for size in shape:
        # Zooming an identity matrix gives the interpolation weights of one axis; an axis at a time is fast.
        # Each product takes the first axis and puts it last, so after three they are in order again.
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
    """A head without a tumour. -> tissue (uint8), where a tumour may grow: cerebrum less ventricles."""
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
    tissue[radius((np.abs(x), y, z), (0.27, 0.02, 0.02), (0.12, 0.24, 0.17)) < 1] = GREY  # basal ganglia
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
    """Draw a tumour, and a lookalike on the other side where there is one, into `tissue` (in place)."""
    shape, (x, y, z), brain = tissue.shape, axes(tissue.shape), (tissue > OUTSIDE).sum()
    centre = side * rng.uniform(0.35, 0.60), rng.uniform(-0.55, 0.50), rng.uniform(0, 0.45)
    stretch = rng.uniform(0.8, 1.25, 3) * (1.25, 1, 1.25)  # y spans more millimetres than x and z do
    whole, core, necrotic = (rng.uniform(*limits) for limits in (WHOLE_TUMOUR, CORE, NECROTIC))
    distance = radius((x, y, z), centre, stretch)
    # Volumes are set by counting voxels, so that they hold where skull or ventricle cut the tumour off.
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
    """One modality after another, as a scanner might see `tissue`. -> (4, *tissue.shape) int16, 0 outside

    millimetres: size of a voxel along each axis, if the whole volume is 240 x 240 x 155 mm
    """
    images = np.zeros((4, *tissue.shape), np.int16)
    for image, means in zip(images, MEANS):
        means = means ** rng.uniform(*CONTRAST) * np.exp(JITTER * rng.standard_normal(means.size))
        texture = 0.06 * smooth(rng, tissue.shape, 18)
        bias = rng.uniform(*BIAS) * smooth(rng, tissue.shape, 3)
        blur = rng.uniform(0.3, 0.8, 3)  # mm, sd
        if rng.random() < 0.5:
            blur[rng.integers(3)] = rng.uniform(1.0, 2.5)  # thick slices
        gain, noise = np.exp(rng.uniform(np.log(200), np.log(3000))), rng.uniform(*NOISE)
        seen = means.astype(np.float32)[tissue] * np.exp(texture + bias)
        # A voxel averages over its own extent as well: 0.4 voxels.
        seen = ndimage.gaussian_filter(seen, np.hypot(0.4, blur / millimetres), truncate=3)
        seed = rng.integers(2**63)  # noise has its own generator: its length alone depends on the shape
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
    """Write a volume (X, Y, Z) or (X, Y, Z, 4) as a NIfTI file with BraTS 2021's header."""
    affine = np.array([[-1., 0, 0, 0], [0, -1, 0, volume.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def save_case(folder, layout, number, images, labels):
    """Write what `make_case` returned below `folder`, as the row `layout` of LAYOUTS lays a case out."""
    name, image_path, suffixes, labels_path, (necrosis, oedema, enhancing) = LAYOUTS[layout]
    name, images = name.format(number), images.transpose(1, 2, 3, 0)
    for suffix, modality in suffixes.items():
        save(folder / f"{image_path.format(name, suffix)}.nii.gz", images[..., modality])
    recoded = np.array([0, necrosis, oedema, 0, enhancing], np.uint8)[labels]
    save(folder / f"{labels_path.format(name)}.nii.gz", recoded)


def main():
    parser = argparse.ArgumentParser(description="Write a synthetic cohort.")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of the cohort; made if missing")
    parser.add_argument("--like", choices=LAYOUTS, default="brats2021",
                        help="whose naming, layout and labels (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(240, 240, 155), metavar=("X", "Y", "Z"),
                        help="voxels, at least 32 a side (default: 240 240 155)")
    parser.add_argument("--seed", type=int, default=0, help="of the cohort (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first case's number (default: %(default)s)")
    args = parser.parse_args()
    if args.cases < 1 or min(args.shape) < 32 or min(args.seed, args.first) < 0:
        parser.error("--cases is at least 1, a side of --shape at least 32, --seed and --first at least 0")

    numbers = range(args.first, args.first + args.cases)
    try:
        for number in numbers:
            save_case(args.dir, args.like, number, *make_case(args.shape, args.seed, number))
    except OSError as error:
        parser.exit(2, f"phantom.py: error: {error}\n")
    _, enhancing, lookalike = zip(*(traits(np.random.default_rng((args.seed, number))) for number in numbers))
    print(f"{args.dir}: cases {args.cases}, voxels {' x '.join(map(str, args.shape))}, seed {args.seed}; "
          f"without enhancement {args.cases - sum(enhancing)}, bright on the healthy side {sum(lookalike)}")


if __name__ == "__main__":
    main()
