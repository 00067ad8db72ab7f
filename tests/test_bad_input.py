"""Bad input, with the real commands: one line that names the file or flag, exit code 2, no traceback, no half-written file.

In prediction and in the cohort check a bad case does not stop the others: it is listed at the end, and the exit code is 1.
"""

import csv
import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from data import InputError, find_cases, split_folds
from segresnet import SegResNet
from train import load_last

TINY = ("--epochs", 1, "--crop", 32, 32, 32, "--filters", 8, "--pool", 8, "--dim", 4, "--amp", "off")


# ---- damaged cases ----------------------------------------------------------------------------------------------------


def change(edit, affine=None):
    """Damage that a valid file has: `edit` its array, replace its affine."""
    def damage(path):
        image = nib.load(path)
        array = edit(np.asarray(image.dataobj))
        path.unlink()
        nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)
    return damage


def one_voxel(value, dtype):
    def edit(array):
        array = array.astype(dtype)
        array[16, 16, 16] = value
        return array
    return change(edit)


def unknown_type(path):
    """A header that nibabel does not only refuse but logs as well."""
    header = bytearray(gzip.decompress(path.read_bytes()))
    header[70:72] = (9999).to_bytes(2, "little")    # NIfTI's field `datatype`
    path.write_bytes(gzip.compress(bytes(header)))


SHIFTED = np.array([[-1.0, 0, 0, 5], [0, -1, 0, 31], [0, 0, 1, 0], [0, 0, 0, 1]])

# case: (its damaged file, the damage, what its line must say was found)
BAD_IMAGES = {
    "missing": ("t2", lambda path: path.unlink(), "no such file"),
    "truncated": ("t1", lambda path: path.write_bytes(path.read_bytes()[:-2000]), "cannot be read"),
    "header_only": ("t1ce", lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
    "empty": ("flair", lambda path: path.write_bytes(b""), "cannot be read"),
    "text": ("t1", lambda path: path.write_text("not an image\n"), "cannot be read"),
    "unknown_type": ("t2", unknown_type, "cannot be read"),
    "two_axes": ("t1", change(lambda array: array[:, :, 16]), "shape (32, 32)"),
    "four_axes": ("t2", change(lambda array: np.stack([array, array], -1)), "shape (32, 32, 32, 2)"),
    "other_shape": ("flair", change(lambda array: array[:, :, :-1]), "shape (32, 32, 31), expected (32, 32, 32)"),
    "other_affine": ("t1ce", change(lambda array: array, SHIFTED), "affine differs"),
    "nan": ("t2", one_voxel(np.nan, np.float32), "NaN or infinite"),
    "infinite": ("t1", one_voxel(-np.inf, np.float32), "NaN or infinite"),
    "zeros": ("flair", change(np.zeros_like), "all voxels are zero"),
}
BAD_LABELS = {
    "label_7": ("seg", one_voxel(7, np.uint8), "has label 7, expected 0, 1, 2, 4"),
    "label_3": ("seg", one_voxel(3, np.uint8), "has label 3, expected 0, 1, 2, 4"),    # as in 2023, in a cohort named as in 2021
    "label_half": ("seg", one_voxel(1.5, np.float32), "has label 1.5"),
    "label_negative": ("seg", one_voxel(-252, np.int16), "has label -252"),    # 4, were it cut to eight bits
    "seg_truncated": ("seg", lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read"),
    "seg_shape": ("seg", change(lambda array: array[:-1]), "shape (31, 32, 32)"),
}
BAD = BAD_IMAGES | BAD_LABELS


@pytest.fixture(scope="module")
def damaged(cohort, tmp_path_factory):
    """A folder with one case for each damage, and two that are as they should be: `good`, and `unlabelled` without a segmentation."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("good", "unlabelled", *BAD):
        (folder / name).mkdir()
        for path in (cohort / "BraTS2021_00000").iterdir():
            shutil.copy(path, folder / name / path.name.replace("BraTS2021_00000", name))
    (folder / "unlabelled" / "unlabelled_seg.nii.gz").unlink()
    for name, (suffix, damage, _) in BAD.items():
        damage(folder / name / f"{name}_{suffix}.nii.gz")
    return folder


def files(folder):
    """All files below the folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def is_one_line(process, script, *words):
    """The end that a user's mistake must have."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith(f"{script}: error: ")
    for word in (*words, "expected"):
        assert str(word) in process.stderr
    return True


def names_what_is_wrong(process, damaged, case):
    """The one line about a bad case among others, at the end of the output."""
    suffix, _, found = BAD[case]
    lines = [line.strip() for line in process.stdout.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    path = damaged / case / f"{case}_{suffix}.nii.gz"
    mine = [line for line in errors if line.startswith(f"error: {path}: ")]
    assert len(mine) == 1 and found in mine[0] and "expected" in mine[0], errors
    assert errors == lines[-1 - len(errors):-1], "not listed at the end"
    return True


# ---- data.py: a bad case does not stop the others ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(run, damaged):
    return run("data.py", damaged)


@pytest.mark.parametrize("case", BAD)
def test_cohort_check_names_each_bad_case(checked, damaged, case):
    assert names_what_is_wrong(checked, damaged, case)


def test_cohort_check_reports_the_others(checked, damaged):
    assert checked.returncode == 1 and not checked.stderr and "Traceback" not in checked.stdout
    lines = [" ".join(line.split()) for line in checked.stdout.splitlines()]
    assert lines[-1] == f"{len(BAD)} of {len(BAD) + 2} cases cannot be used"
    assert sum(line.startswith("error") for line in lines) == len(BAD)
    whole = int((np.asarray(nib.load(damaged / "good" / "good_seg.nii.gz").dataobj) > 0).sum())
    assert f"WT, voxels {whole} on average, empty in 0 of 1" in lines and "shape 32x32x32 (2)" in lines
    assert f"segmentation {len(BAD) + 1} of {len(BAD) + 2}, not unlabelled" in lines


# ---- infer.py: nor does it there --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(run, damaged, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    return run("infer.py", damaged, "--checkpoints", checkpoint, "--out", folder / "out", "--probabilities"), folder


@pytest.mark.parametrize("case", BAD)
def test_prediction_names_each_bad_case(predicted, damaged, case):
    assert names_what_is_wrong(predicted[0], damaged, case)


def test_prediction_does_the_others(predicted):
    process, folder = predicted
    assert process.returncode == 1 and not process.stderr and "Traceback" not in process.stdout
    done = ["good", "unlabelled", *BAD_LABELS]    # a bad segmentation can be predicted, not scored
    expected = ["out.csv", *[f"out/{name}.nii.gz" for name in done], *[f"out/probabilities/{name}.nii.gz" for name in done]]
    assert files(folder) == sorted(expected)
    assert [row["case"] for row in csv.DictReader(open(folder / "out.csv"))] == ["good"]
    for path in (folder / "out").rglob("*.nii.gz"):
        assert np.isfinite(nib.load(path).get_fdata()).all()    # whole files


# ---- train.py: it stops there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, workers, found", [
    ("missing", 0, "missing_t2.nii.gz: missing"),
    ("unlabelled", 0, "segmentation"),
    ("truncated", 1, "truncated_t1.nii.gz: cannot be read"),    # read in another process, which must not print its own traceback
    ("label_3", 0, "label_3_seg.nii.gz: has label 3, expected 0, 1, 2, 4"),
])
def test_training_stops_at_a_bad_case(run, damaged, tmp_path, case, workers, found):
    process = run("train.py", "--data", damaged / case, "--fold", "all", "--out", tmp_path / "out", "--workers", workers, *TINY)
    assert is_one_line(process, "train.py", damaged / case, found)
    assert files(tmp_path) == []


def test_training_stops_at_a_bad_validation_case(run, damaged, tmp_path):
    for name in ("good", "four_axes"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(damaged / name)
    held_out = [[case.name for case in fold] for fold in split_folds(find_cases(tmp_path / "data"), folds=2)].index(["four_axes"])
    process = run("train.py", "--data", tmp_path / "data", "--folds", 2, "--fold", held_out, "--out", tmp_path / "out", "--workers", 0, *TINY)
    assert is_one_line(process, "train.py", "four_axes_t2.nii.gz: shape (32, 32, 32, 2)")
    assert files(tmp_path / "out") == ["last.pt"], "the epoch that came before is kept"


def test_training_without_data_says_where_it_looked_and_how_to_get_some(run, tmp_path):
    process = run("train.py", cwd=tmp_path)
    assert is_one_line(process, "train.py", "data/BraTS2021_Training_Data: no such folder", "BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz",
                       "https://www.synapse.org/", "python examples/phantom.py")
    assert list(tmp_path.iterdir()) == []


def test_training_needs_a_patient_a_fold(run, cohort, tmp_path):
    process = run("train.py", "--data", cohort, "--folds", 7, "--out", tmp_path / "out", "--workers", 0, *TINY)
    assert is_one_line(process, "train.py", "--folds 7", "6 patients")
    assert files(tmp_path) == []


def test_training_refuses_the_crop_whose_16_bit_gradients_are_wrong_on_a_cpu(run, cohort, tmp_path):
    process = run("train.py", "--data", cohort, "--fold", "all", "--out", tmp_path / "out", "--workers", 0, *TINY, "--amp", "bf16", "--crop", 16, 32, 32)
    assert is_one_line(process, "train.py", "--crop 16 32 32", "at least 24", "--amp off")
    assert files(tmp_path) == []


def test_training_does_not_go_on_from_a_text_file(tmp_path):
    (tmp_path / "last.pt").write_text("not a checkpoint\n")
    with pytest.raises(InputError, match=r"last\.pt: not a checkpoint of train\.py's .*expected"):
        load_last(tmp_path / "last.pt", {}, None, None, None)


def test_training_does_not_go_on_from_best_pt(run, cohort, checkpoint, tmp_path):
    # It is of the same run, but holds the network alone: no optimizer, no log.
    shutil.copy(checkpoint, tmp_path / "last.pt")
    process = run("train.py", "--data", cohort, "--folds", 2, "--out", tmp_path, "--workers", 0, *TINY)
    assert is_one_line(process, "train.py", f"{tmp_path / 'last.pt'}: not a checkpoint")
    assert files(tmp_path) == ["last.pt"] and (tmp_path / "last.pt").read_bytes() == checkpoint.read_bytes()


# ---- infer.py: the call itself is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["text", "of another shape", "of other channels"])
def test_prediction_needs_a_checkpoint(run, cohort, checkpoint, tmp_path, what):
    path = tmp_path / "best.pt"
    saved = torch.load(checkpoint, weights_only=True)
    if what == "text":
        path.write_text("not a checkpoint\n")
    else:    # its settings still say 8 filters
        other = SegResNet(filters=16) if what == "of another shape" else SegResNet(in_channels=1, filters=8)
        torch.save(saved | {"model": other.state_dict()}, path)
    # A good one first: the line must name the other.
    process = run("infer.py", cohort, "--checkpoints", checkpoint, path, "--out", tmp_path / "out")
    assert is_one_line(process, "infer.py", f"--checkpoints {path}: ", "4 channels and 3 regions")
    assert files(tmp_path) == ["best.pt"]


def test_prediction_needs_cases(run, checkpoint, tmp_path):
    (tmp_path / "nothing").mkdir()
    process = run("infer.py", tmp_path / "nothing", "--checkpoints", checkpoint, "--out", tmp_path / "out")
    assert is_one_line(process, "infer.py", f"{tmp_path / 'nothing'}: no case found")
    assert files(tmp_path) == []


# ---- ensemble.py ------------------------------------------------------------------------------------------------------


def write_maps(folder, names=("a", "b"), shape=(8, 8, 8, 3)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in names:
        nib.save(nib.Nifti1Image(rng.random(shape, np.float32), SHIFTED), folder / f"{name}.nii.gz")
    return folder


@pytest.mark.parametrize("damage, found", [
    (lambda two: write_maps(two, shape=(8, 8, 9, 3)), "a.nii.gz: shape (8, 8, 9, 3)"),
    (lambda two: write_maps(two, names=("a",)), "b.nii.gz: missing"),
], ids=["other shape", "case missing"])
def test_merging_needs_the_same_cases_and_shapes_in_every_folder(run, tmp_path, damage, found):
    write_maps(tmp_path / "one")
    damage(tmp_path / "two")
    process = run("ensemble.py", "--out", tmp_path / "out", tmp_path / "one", tmp_path / "two")
    assert is_one_line(process, "ensemble.py", tmp_path / "two", found)
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == []


# ---- the call itself, any command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, arguments, found", [
    ("train.py", ["--crop", 32, 32], "argument --crop: expected 3 arguments"),
    ("train.py", ["--folds", 0], "--folds 0: expected at least 1"),
    ("train.py", ["--seed", 2**64], f"--seed {2**64}: expected less"),
    ("infer.py", ["COHORT", "--checkpoints", "BEST", "--ensemble", "max"], "argument --ensemble: invalid choice: 'max'"),
    ("infer.py", ["--checkpoints", "BEST", "COHORT"], "expected CASE_OR_COHORT and, after it, --checkpoints"),
    ("infer.py", ["COHORT", "--checkpoints", "BEST", "BEST"], "--checkpoints: one is given twice"),
    ("infer.py", ["COHORT", "--checkpoints", "RUN"], "a folder, expected the file best.pt"),
    ("infer.py", ["--score", "RUN"], "--truth COHORT is missing, expected both"),
    ("infer.py", ["--score", "RUN", "--truth", "COHORT", "--checkpoints", "BEST"], "expected neither CASE_OR_COHORT nor --checkpoints"),
    ("data.py", ["BEST"], "best.pt: a file, expected folders"),
    ("data.py", [], "the following arguments are required: DIR"),
    ("ensemble.py", ["COHORT"], "the following arguments are required: --out"),
])
def test_a_mistake_in_the_call_is_one_line(run, cohort, checkpoint, tmp_path, script, arguments, found):
    paths = {"COHORT": cohort, "BEST": checkpoint, "RUN": checkpoint.parent}
    process = run(script, *[paths.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert process.returncode == 2 and not process.stdout and files(tmp_path) == []
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and found in line


def test_a_network_that_does_not_fit_into_memory_is_one_line(run, cohort, tmp_path):
    # Its first block alone is a terabyte, which no CPU gives; the GPU's own exception is tested in test_interrupted.py.
    process = run("train.py", "--data", cohort, "--fold", "all", "--out", tmp_path / "out", "--workers", 0, *TINY, "--filters", 100_000)
    assert is_one_line(process, "train.py", "--filters 100000 does not fit into the memory of cpu")


# ---- every command that writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "infer.py", "ensemble.py"])
def test_an_output_folder_that_cannot_be_written(run, cohort, checkpoint, tmp_path, script):
    (tmp_path / "file").write_text("in the way\n")    # of a folder: permissions would not stop an administrator
    out = tmp_path / "file" / "out"
    arguments = {
        "train.py": ["--data", cohort, "--folds", 2, "--workers", 0, *TINY],
        "infer.py": [cohort, "--checkpoints", checkpoint],
        "ensemble.py": [tmp_path / "maps"],
    }[script]
    write_maps(tmp_path / "maps")
    process = run(script, *arguments, "--out", out)
    assert is_one_line(process, script, out if script == "ensemble.py" else f"--out {out}")
    assert not process.stdout, "found out after the work"
    assert files(tmp_path) == ["file", "maps/a.nii.gz", "maps/b.nii.gz"] and (tmp_path / "file").read_text() == "in the way\n"
