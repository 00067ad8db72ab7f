"""Bad input: one line that names file or flag, exit code 2, nothing half-written, nothing run that came in.

In prediction and in the cohort check the other cases go on: a bad one is listed at the end, exit code 1.
"""

import os
import resource
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
from conftest import REPO, TINY, read_rows, voxels, write_header
from segresnet import SegResNet


def is_one_line(result, script, *words):
    """The end that a user's mistake has: (exit code, stdout, stderr)."""
    code, _, printed = result
    lines = printed.splitlines()
    assert code == 2 and len(lines) == 1 and len(printed) < 500 and lines[0].isprintable(), printed
    assert lines[0].startswith(f"{script}: error: ")
    assert all(str(word).lower() in lines[0].lower() for word in words), (words, printed)
    return True


def files(folder):
    """All files below the folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- damaged cases ----------------------------------------------------------------------------------------


def change(edit, affine=None):
    """Damage that a valid file has: its array edited, its affine replaced."""
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


def first_bytes(end):
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def folder_instead(path):
    path.unlink()
    path.mkdir()


def header(shape, content=b"", **fields):
    return lambda path: write_header(path, shape, content, **fields)


SHIFTED = np.array([[-1.0, 0, 0, 5], [0, -1, 0, 31], [0, 0, 1, 0], [0, 0, 0, 1]])
# case: its damaged file, the damage, what the line says was found
BAD_IMAGES = {
    "missing": ("t2", Path.unlink, "no such file"),
    "folder": ("t2", folder_instead, "directory"),
    "truncated": ("t1", first_bytes(-2000), "cannot be read"),
    "header_only": ("t1ce", first_bytes(100), "cannot be read"),
    "empty": ("flair", first_bytes(0), "cannot be read"),
    "text": ("t1", lambda path: path.write_text("not an image\n"), "cannot be read"),
    "unknown_type": ("t2", header((32, 32, 32), bytes(2**17), datatype=9999), "cannot be read"),
    "complex": ("t2", change(lambda array: array.astype(np.complex64)), "complex64"),
    "two_axes": ("t1", change(lambda array: array[:, :, 16]), "shape (32, 32)"),
    "four_axes": ("t2", change(lambda array: np.stack([array, array], -1)), "shape (32, 32, 32, 2)"),
    "promise": ("t1ce", header((32767, 32767, 32767)), "32767, 32767, 32767"),
    # These are there, all zero: 128 MiB in 130 kB.
    "exaggerate": ("t1", header((8192, 8192, 2), bytes(2**27), datatype=2, bitpix=8), "8192, 8192, 2"),
    "other_shape": ("flair", change(lambda array: array[:, :, :-1]), "(32, 32, 31), expected (32, 32, 32)"),
    "other_affine": ("t1ce", change(lambda array: array, SHIFTED), "affine differs"),
    "nan": ("t2", one_voxel(np.nan, np.float32), "NaN or infinite"),
    "infinite": ("t1", one_voxel(-np.inf, np.float32), "NaN or infinite"),
    "zeros": ("flair", change(np.zeros_like), "zeros"),
}
BAD_LABELS = {
    "label_3": ("seg", one_voxel(3, np.uint8), "has label 3, expected 0, 1, 2, 4"),    # 2023's in 2021's
    "label_between": ("seg", one_voxel(1.5, np.float32), "has label 1.5, expected 0, 1, 2, 4"),
    "label_near_4": ("seg", one_voxel(3.98, np.float64), "has label 3.98"),
    "label_nan": ("seg", one_voxel(np.nan, np.float32), "has label nan"),
    "label_negative": ("seg", one_voxel(-252, np.int16), "has label -252"),    # 4, were it cut to eight bits
    "seg_truncated": ("seg", first_bytes(-200), "cannot be read"),
    "seg_shape": ("seg", change(lambda array: array[:-1]), "shape (31, 32, 32)"),
    "seg_promise": ("seg", header((32767, 32767, 32767)), "32767, 32767, 32767"),
}
BAD = BAD_IMAGES | BAD_LABELS


@pytest.fixture(scope="module")
def damaged(cohort, tmp_path_factory):
    """A case for each damage, and two without: `good`, and `unlabelled`, which has no segmentation."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("good", "unlabelled", *BAD):
        (folder / name).mkdir()
        for path in (cohort / "BraTS2021_00000").iterdir():
            shutil.copy(path, folder / name / path.name.replace("BraTS2021_00000", name))
    (folder / "unlabelled/unlabelled_seg.nii.gz").unlink()
    for name, (suffix, damage, _) in BAD.items():
        damage(folder / name / f"{name}_{suffix}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def goes_on(run, damaged, checkpoint, tmp_path_factory):
    """A folder with predictions, what data.py did and what infer.py did."""
    folder = tmp_path_factory.mktemp("predicted")
    flags = "--checkpoints", checkpoint, "--out", folder / "out", "--probabilities"
    alone = shutil.copy(REPO / "data.py", folder / "data.py")
    return folder, run(alone, damaged, ok=1), run("infer.py", damaged, *flags, ok=1)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_case_is_listed_at_the_end_and_stops_training(goes_on, call, damaged, tmp_path, case):
    suffix, _, found = BAD[case]
    path = damaged / case / f"{case}_{suffix}.nii.gz"
    for process in goes_on[1:]:
        lines = process.stdout.splitlines()
        errors = [line.strip() for line in lines if line.strip().startswith("error: ")]
        (mine,) = [line for line in errors if f"{path}: " in line]
        assert found.lower() in mine.lower() and "expected" in mine
        assert errors == [line.strip() for line in lines[-1 - len(errors):-1]] and len(errors) == len(BAD)
    result = call("train.py", "--data", damaged / case, "--fold", "all", "--out", tmp_path / "out", *TINY)
    assert is_one_line(result, "train.py", path, found, "expected") and files(tmp_path) == []


def test_the_others_are_checked_and_predicted(goes_on, damaged):
    folder, checked, predicted = goes_on
    assert not checked.stderr and f"2 of {len(BAD) + 2} cases can be used" in checked.stdout.splitlines()[-1]
    whole = (voxels(damaged / "good/good_seg.nii.gz") > 0).sum()
    assert f"WT: mean {whole:,} voxels, empty in 0 of 1" in checked.stdout and "unlabelled" in checked.stdout
    assert not predicted.stderr and files(folder) == sorted(["data.py", "out.csv", *(
        f"out/{place}{name}.nii.gz" for name in ("good", "unlabelled") for place in ("", "probabilities/"))])
    assert [row["case"] for row in read_rows(folder / "out.csv")] == ["good"]
    for path in (folder / "out").rglob("*.nii.gz"):
        assert np.isfinite(voxels(path)).all()    # whole files


def test_training_stops_at_a_bad_validation_case(call, damaged, tmp_path):
    for name in ("good", "four_axes"):
        shutil.copytree(damaged / name, tmp_path / "data" / name)
    folds = [case.name for (case,) in data.split_folds(data.find_cases(tmp_path / "data"), 2)]
    result = call("train.py", "--data", tmp_path / "data", "--folds", 2, "--fold", folds.index("four_axes"),
                  "--out", tmp_path / "out", "--cache", "none", *TINY)
    assert is_one_line(result, "train.py", "four_axes_t2.nii.gz", "shape (32, 32, 32, 2)")
    assert files(tmp_path / "out") == []


# ---- checkpoints ------------------------------------------------------------------------------------------


LAST_BIAS = "decoder_end.2.bias"


class Payload:
    """Makes the file `ran` in the current folder where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_payload_in_a_checkpoint_does_not_run(call, cohort, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("best.pt", "last.pt"):
        torch.save(torch.load(checkpoint.with_name(name)) | {"more": Payload()}, tmp_path / name)
    torch.load(tmp_path / "best.pt", weights_only=False)
    (tmp_path / "ran").unlink()    # so it would have run
    result = call("infer.py", cohort, "--checkpoints", tmp_path / "best.pt", "--out", tmp_path / "out")
    assert is_one_line(result, "infer.py", tmp_path / "best.pt", "expected")
    result = call("train.py", "--data", cohort, "--folds", 2, "--out", tmp_path, "--cache", "none", *TINY)
    assert is_one_line(result, "train.py", tmp_path / "last.pt", "not a checkpoint", "expected")
    assert files(tmp_path) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("edit", [
    lambda content: "not a checkpoint",
    lambda content: content["model"],
    lambda content: content | {"model": SegResNet(filters=16).state_dict()},    # its settings still say 8
    lambda content: content | {"model": SegResNet(in_channels=1, filters=8).state_dict()},
    lambda content: content | {"settings": content["settings"] | {"filters": 10**9}},
    lambda content: content | {"settings": content["settings"] | {"norm": "none"}},
    lambda content: content | {"model": content["model"] | {LAST_BIAS: torch.tensor([0, float("nan"), 0])}},
    lambda content: content | {"model": content["model"] | {LAST_BIAS: torch.tensor([0, 1, -float("inf")])}},
], ids=["text", "weights alone", "other filters", "other channels", "too many filters", "another norm", "NaN",
        "infinite"])
def test_another_checkpoint_is_refused(call, cohort, checkpoint, tmp_path, edit):
    path = tmp_path / "best.pt"
    torch.save(edit(torch.load(checkpoint)), path)
    result = call("infer.py", cohort, "--checkpoints", checkpoint, path, "--out", tmp_path / "out")
    assert is_one_line(result, "infer.py", f"--checkpoints {path}", "expected", "4 channels and 3 regions")
    assert files(tmp_path) == ["best.pt"]


def test_a_network_that_gives_nan_is_an_error_of_its_cases(call, cohort, checkpoint, tmp_path):
    content = torch.load(checkpoint)
    content["model"] = {name: weight * 1e36 for name, weight in content["model"].items()}    # still finite
    path, out = tmp_path / "best.pt", tmp_path / "out"
    torch.save(content, path)
    code, printed, error = call("infer.py", cohort, "--checkpoints", path, "--out", out)
    assert code == 1 and not error and printed.count("error: ") == 6 and "BraTS2021_00005" in printed
    assert files(tmp_path) == ["best.pt"]


def test_training_does_not_go_on_from_best_pt(call, cohort, checkpoint, tmp_path):
    last = shutil.copy(checkpoint, tmp_path / "last.pt")    # has no optimizer and no log
    result = call("train.py", "--data", cohort, "--folds", 2, "--out", tmp_path, "--cache", "none", *TINY)
    assert is_one_line(result, "train.py", last, "not a checkpoint", "expected")
    assert files(tmp_path) == ["last.pt"] and last.read_bytes() == checkpoint.read_bytes()


# ---- mistakes in the call ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(cohort, checkpoint, tmp_path_factory):
    """What the calls below name in braces."""
    folder, first = tmp_path_factory.mktemp("places"), cohort / "BraTS2021_00000"
    for name in ("empty", "maps"):
        (folder / name).mkdir()
    for name in ("copy", "bare"):
        shutil.copytree(first, folder / name)
    (folder / "bare/BraTS2021_00000_seg.nii.gz").unlink()
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 3), np.float32), np.eye(4)), folder / "maps/map.nii.gz")
    return {path.name: path for path in folder.iterdir()} | {
        "cohort": cohort, "file": first / "BraTS2021_00000_t1.nii.gz", "best": checkpoint,
        "run": checkpoint.parent, "log": checkpoint.with_name("log.csv"),
        "seen": cohort / torch.load(checkpoint)["train_cases"][0]}


@pytest.mark.parametrize("line, found", [
    ("data.py", "DIR"), ("data.py DIR --names _t1", "--names: invalid five_endings"),
    ("train.py --crop 32 32", "--crop: expected 3 arguments"),
    ("train.py --folds 0", "--folds: 0"),
    ("train.py --seed 18446744073709551616", "--seed: 18446744073709551616"),
    ("train.py --lr nan", "--lr: nan"),
    ("infer.py {cohort}", "--checkpoints"),
    ("infer.py --checkpoints {best} {cohort}", "CASE_OR_COHORT"),
    ("infer.py {cohort} --checkpoints {best} --ensemble max", "--ensemble: invalid choice: 'max'"),
    ("infer.py --score {run}", "CASE_OR_COHORT"),
    ("infer.py {cohort} --score {run} --checkpoints {best}", "not allowed with argument --score"),
    ("ensemble.py {maps}", "--out"),
    ("ensemble.py --out out", "FOLDER"),
    ("phantom.py out --like brats2020", "--like"),
    *((f"phantom.py out {flag}", flag.split()[0]) for flag in ("--cases 0", "--shape 32 31 32", "--seed -1")),
])
def test_what_argparse_refuses(call, places, tmp_path, monkeypatch, line, found):
    monkeypatch.chdir(tmp_path)
    script, *arguments = line.format(**places).split()
    code, printed, error = call(script, *arguments)
    assert code == 2 and not printed and error.startswith(f"usage: {script}")
    assert error.splitlines()[-1].startswith(f"{script}: error: ") and found in error.splitlines()[-1]
    assert files(tmp_path) == []


@pytest.mark.parametrize("line, found", [
    ("data.py {file}", "{file}: Not a directory, expected a folder"),
    ("data.py {empty}", "{empty}: no case, expected <case>_"),
    ("data.py {cohort} --labels 1 2 2", "--labels"),
    ("train.py", "data/BraTS2021_Training_Data: No such file or directory, expected"),
    ("train.py --data {bare} --fold all", "{bare}: no segmented case"),
    ("train.py --data {cohort} --fold 7", "--fold 7: expected"),
    ("train.py --data {cohort} --fold first", "--fold first: expected"),
    ("train.py --data {cohort} --fold-list {file}", "--fold-list {file}"),
    ("train.py --data {cohort} --fold-list nothing.json", "nothing.json: No such file"),
    ("train.py --data {cohort} --crop 30 32 32", "--crop 30 32 32: expected multiples of 8"),
    ("train.py --data {cohort} --crop 16 32 32 --amp bf16", "--crop 16 32 32"),
    ("train.py --data {cohort} --pool 32", "--pool"),
    ("train.py --data {cohort} --norm group --filters 4", "--filters 4"),
    ("train.py --data {cohort} --cache {file}", "{file}: File exists"),
    ("infer.py {empty} --checkpoints {best}", "{empty}: no case"),
    ("infer.py {cohort} {copy} --checkpoints {best}", "{copy}/BraTS2021_00000_t1.nii.gz"),
    ("infer.py {cohort} --checkpoints {run}", "--checkpoints {run}: cannot be loaded (Is a directory)"),
    ("infer.py {cohort} --checkpoints nothing.pt", "--checkpoints nothing.pt: cannot be loaded (No such"),
    ("infer.py {cohort} --checkpoints {log}", "--checkpoints {log}"),
    ("infer.py {cohort} --checkpoints {best} {run}/./best.pt", "--checkpoints: one is given twice"),
    ("infer.py {seen} --checkpoints {best} --held-out", "--held-out: no case"),
    ("infer.py {bare} --score {run}", "{bare}: no case has a segmentation"),
    ("ensemble.py --out out {maps} {maps}/../maps", "FOLDER: one folder is given twice"),
    ("ensemble.py --out {maps} {maps}", "--out {maps}: {maps}/map.nii.gz is there, expected an empty"),
    ("infer.py {cohort} --score {file}", "--score {file}: no such folder"),
    ("ensemble.py --out out {maps} --labels 1 2 300", "--labels"),
    ("ensemble.py --out out {maps} --labels 1 1 1", "--labels"),
])
def test_a_mistake_in_the_call_is_one_line(call, places, tmp_path, monkeypatch, line, found):
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(line.format(**places))
    usual = {"train.py": ["--out", "out", *TINY], "infer.py": ["--out", "out"]}.get(script, [])
    assert is_one_line(call(script, *usual, *arguments), script, found.format(**places))
    assert files(tmp_path) == []


# ---- where results go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    f"train.py --data {{cohort}} --out {{out}} {' '.join(TINY)}", "ensemble.py --out {out} {maps}",
    "infer.py {cohort} --checkpoints {best} --out {out}", "phantom.py --shape 32 32 32 {out}"])
@pytest.mark.parametrize("out", ["{tmp}/file/out", "{tmp}/file", "/proc/self/out"])
def test_a_folder_that_cannot_be_written_is_one_line(call, places, tmp_path, line, out):
    """/proc is read-only to everybody; permissions would not stop an administrator."""
    (tmp_path / "file").write_text("in the way\n")
    out = out.format(tmp=tmp_path)
    script, *arguments = line.format(out=out, **places).split()
    result = call(script, *arguments)
    assert is_one_line(result, script, out) and not result[1], "found out after the work"
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "in the way\n"


@pytest.mark.parametrize("line, size, named", [
    ("infer.py {cohort} --checkpoints {best} --out {tmp}/out --probabilities", 20_000, "out/probabilities/"),
    ("infer.py {cohort} --checkpoints {best} --out {tmp}/out", 100, "out/BraTS2021_00000.nii.gz"),
    ("infer.py {copy} --score {tmp}/scored", 20, "scored.csv"),
    (f"train.py --data {{copy}} --fold all --out {{tmp}}/out {' '.join(TINY)}", 20_000, "cache/BraTS2021_"),
    (f"train.py --data {{copy}} --fold all --out {{tmp}}/out --cache none {' '.join(TINY)}", 20_000,
     "out/last.pt"),
    ("ensemble.py --out {tmp}/out {maps}", 20, "out/map.nii.gz"),
])
def test_a_full_disk_leaves_nothing_torn(call, places, tmp_path, line, size, named):
    (tmp_path / "scored").mkdir()
    shutil.copy(places["copy"] / "BraTS2021_00000_seg.nii.gz", tmp_path / "scored/BraTS2021_00000.nii.gz")
    script, *arguments = line.format(tmp=tmp_path, **places).split()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        result = call(script, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert is_one_line(result, script, tmp_path / named, "File too large")
    left = [name for name in files(tmp_path) if name != "out/log.csv"]    # small enough
    assert left == ["scored/BraTS2021_00000.nii.gz"]


# ---- habits of the shell ----------------------------------------------------------------------------------


def test_a_flag_with_a_home_folder_goes_there(call, cohort, places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))    # the shell expands ~/folder, but not --flag=~/folder
    call("ensemble.py", "--out=~/merged", places["maps"], ok=0)
    assert files(tmp_path) == ["merged/map.nii.gz"]
    assert is_one_line(call("infer.py", cohort, "--score=~/none"), "infer.py", f"--score {tmp_path}/none: no")
    assert is_one_line(call("train.py", "--data=~/none", "--out=~/out", *TINY), "train.py", tmp_path / "none")


@pytest.mark.parametrize("line", ["data.py {cohort}", "ensemble.py --out {out} {maps}"])
def test_a_pipe_that_closes_early_ends_a_command_quietly(run, places, tmp_path, line):
    reader, writer = os.pipe()
    os.close(reader)    # as `| head -1` does, but surely before the first line
    process = run(*line.format(out=tmp_path, **places).split(), stdout=writer, ok=141)
    os.close(writer)
    assert process.stderr == ""


def test_a_log_on_a_full_disk_is_one_line(run, places):
    with open("/dev/full", "w") as full:
        process = run("data.py", places["cohort"], stdout=full)
    assert is_one_line((process.returncode, "", process.stderr), "data.py", "output: No space left")


def test_a_log_that_is_not_utf8_gets_the_table(call, places, tmp_path):
    shutil.copy(places["copy"] / "BraTS2021_00000_seg.nii.gz", tmp_path / "BraTS2021_00000.nii.gz")
    _, printed, error = call("infer.py", places["copy"], "--score", tmp_path, encoding="ascii")
    assert not error and "mean      1.0000 ? 0.000" in printed
