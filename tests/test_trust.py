"""Nothing let in, nothing torn: hostile checkpoints and scans, full and read-only disks, through the real commands."""

import gzip
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch

from conftest import REPO
from data import find_cases

TINY = ["--folds", 2, "--crop", 16, 16, 16, "--filters", 8, "--pool", 4, "--dim", 4, "--workers", 0, "--amp", "off"]
MEMORY = 4 * 2**30    # of addresses, for a whole process: PyTorch itself wants more than half of it


def limited(script, *arguments, memory=None, file_size=None):
    """A command under limits of the operating system: bytes of memory, bytes a file."""

    def limit():
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if file_size:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)    # so that writing fails as it does on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run([sys.executable, REPO / script, *map(str, arguments)], cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300, preexec_fn=limit)


def one_line(process, *parts, code=2):
    assert process.returncode == code, process.stderr
    (line,) = process.stderr.splitlines()
    assert all(str(part) in line for part in parts), line


# ---- checkpoints ------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("packed", ["pickle", "inside a checkpoint"])
def test_a_checkpoint_that_carries_code_is_refused_and_the_code_does_not_run(run, cohort, checkpoint, tmp_path, packed):
    for name in ("best.pt", "last.pt"):
        if packed == "pickle":
            (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        else:
            torch.save({**torch.load(checkpoint.with_name(name), weights_only=True), "extra": Payload(tmp_path / "ran")}, tmp_path / name)
    torch.load(tmp_path / "last.pt", weights_only=False) if packed != "pickle" else pickle.loads((tmp_path / "last.pt").read_bytes())
    (tmp_path / "ran").unlink()    # it would have run
    one_line(run("infer.py", cohort, "--checkpoints", tmp_path / "best.pt", "--out", tmp_path / "out"), "best.pt")
    one_line(run("train.py", "--data", cohort, "--out", tmp_path, *TINY), "last.pt")
    assert not (tmp_path / "ran").exists()


def doubled(times):
    """A list of two lists that are one, of two that are one and so on: short in a file, and 2**times numbers when it is printed."""
    return [doubled(times - 1)] * 2 if times else 0


@pytest.mark.parametrize("setting, value", [("filters", 10**9), ("filters", "8"), ("norm", "none"), ("crop", [10**9] * 3), ("crop", [32, 32]), ("amp", "x"),
                                            *[(setting, doubled(40)) for setting in ("norm", "crop", "fold")]])
def test_a_checkpoint_with_settings_of_nonsense_takes_no_memory(cohort, checkpoint, tmp_path, setting, value):
    content = torch.load(checkpoint, weights_only=True)
    content["settings"][setting] = value
    torch.save(content, tmp_path / "best.pt")
    one_line(limited("infer.py", cohort, "--checkpoints", tmp_path / "best.pt", "--out", tmp_path / "out", memory=MEMORY), "best.pt")


class Large:
    def __reduce__(self):
        return bytearray, (2**33,)    # one of the few calls that weights_only allows


@pytest.mark.parametrize("extra", [Large(), torch.zeros(1).expand(2**33)], ids=["bytearray", "one number, stored once"])
def test_a_checkpoint_that_asks_for_memory_gets_none(cohort, checkpoint, tmp_path, extra):
    for name in ("best.pt", "last.pt"):
        torch.save({**torch.load(checkpoint.with_name(name), weights_only=True), "extra": extra}, tmp_path / name)
    one_line(limited("infer.py", cohort, "--checkpoints", tmp_path / "best.pt", "--out", tmp_path / "out", memory=MEMORY), "best.pt")
    one_line(limited("train.py", "--data", cohort, "--out", tmp_path, *TINY, memory=MEMORY), "last.pt")


def test_going_on_from_settings_of_nonsense_is_one_line(run, cohort, checkpoint, tmp_path):
    content = torch.load(checkpoint.with_name("last.pt"), weights_only=True)
    content["settings"]["epochs"] = doubled(40)
    torch.save(content, tmp_path / "last.pt")
    one_line(run("train.py", "--data", cohort, "--folds", 2, "--out", tmp_path, *TINY, "--norm", "instance", "--workers", 0), "last.pt", "was trained with epochs [[[")


# ---- scans ------------------------------------------------------------------------------------------------------------


def promise(path):
    """32767 x 32767 x 32767 voxels in a file of some hundred bytes."""
    header = nib.Nifti1Header()
    header.set_data_dtype("int16")
    header["dim"] = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.structarr.tobytes() + bytes(1000)))


def exaggerate(path):
    """8192 x 8192 x 2 voxels, and they are there, all zero: 128 MiB that gzip packs into 130 kB."""
    with gzip.open(path, "wb") as file:
        header = nib.Nifti1Header()
        header.set_data_dtype("uint8")
        header["dim"] = [3, 8192, 8192, 2, 1, 1, 1, 1]
        header["magic"], header["vox_offset"] = b"n+1", 352
        file.write(header.structarr.tobytes() + bytes(4 + 2**27))


def extend(path):
    """An extension that says to be -1 bytes long, which nibabel reads to the end of the file, behind a whole small volume: here 4 GiB of zeros."""
    header = nib.Nifti1Header()
    header.set_data_dtype("uint8")
    header["dim"] = [3, 32, 32, 32, 1, 1, 1, 1]
    header["magic"], header["vox_offset"], header["pixdim"][1:4] = b"n+1", 384, 1
    path.write_bytes(gzip.compress(header.structarr.tobytes() + bytes([1, 0, 0, 0, 7, 0, 0, 0]) + bytes(28)) + gzip.compress(bytes(2**26)) * 64)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage, why", [(promise, "header promises 32767x32767x32767 voxels"), (cut_off, "cannot be read"), (exaggerate, "expected at most 33,554,432")])
@pytest.mark.parametrize("modality", [1, "seg"])
def test_a_scan_that_is_not_what_it_says_is_refused_before_memory_is_taken(cohort, checkpoint, tmp_path, damage, why, modality):
    shutil.copytree(cohort, tmp_path / "cohort")
    case = find_cases(tmp_path / "cohort")[0]
    bad = case.label if modality == "seg" else case.images[modality]
    damage(bad)
    done = limited("data.py", tmp_path / "cohort", memory=MEMORY)
    assert done.returncode == 1 and bad.name in done.stdout and why in done.stdout and "1 of 6 cases cannot be used" in done.stdout and not done.stderr
    one_line(limited("train.py", "--data", tmp_path / "cohort", "--fold", "all", "--out", tmp_path / "run", *TINY, memory=MEMORY), bad.name, why)
    done = limited("infer.py", tmp_path / "cohort", "--checkpoints", checkpoint, "--out", tmp_path / "out", memory=MEMORY)
    assert done.returncode == 1 and f"error: {bad}" in done.stdout and "5 of 6 cases done" in done.stdout and not done.stderr


def test_an_extension_of_any_length_is_not_read(run, cohort, checkpoint, tmp_path):
    shutil.copytree(cohort, tmp_path / "cohort")
    extend(find_cases(tmp_path / "cohort")[0].label)    # read as far as its affine, which is not the images'
    done = limited("data.py", tmp_path / "cohort", memory=MEMORY)
    assert done.returncode == 1 and not done.stderr and "seg.nii.gz: its affine differs" in done.stdout and "1 of 6 cases cannot be used" in done.stdout
    (tmp_path / "maps").mkdir()
    extend(tmp_path / "maps" / "a.nii.gz")
    one_line(limited("ensemble.py", "--out", tmp_path / "out", tmp_path / "maps", memory=MEMORY), "a.nii.gz: shape (32, 32, 32)")


def test_what_a_case_is_called_cannot_lead_out_of_the_folder(run, cohort, checkpoint, tmp_path):
    folder = tmp_path / "cohort" / "..odd.." / "%2e%2e"
    folder.mkdir(parents=True)
    case = find_cases(cohort)[0]
    for path in (*case.images, case.label):
        shutil.copy(path, folder / path.name.replace("BraTS2021_00000", "a..b -rf $(x)"))
    run("infer.py", tmp_path / "cohort", "--checkpoints", checkpoint, "--out", tmp_path / "out", ok=0)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and "cohort" not in path.parts) == [
        "out.csv", "out/a..b -rf $(x).nii.gz"]


# ---- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_training_in_one_line_and_keeps_the_last_checkpoint(run, cohort, tmp_path):
    arguments = ["--data", cohort, "--out", tmp_path, "--fold", "all", *TINY]
    run("train.py", *arguments, "--epochs", 2, ok=0)
    before = (tmp_path / "last.pt").read_bytes()
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content["epoch"], content["finished"] = 1, False    # so that one epoch is left to do
    torch.save(content, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    done = limited("train.py", *arguments, "--epochs", 2, file_size=len(before) // 2)
    one_line(done, tmp_path / "last.pt", "File too large")
    assert (tmp_path / "last.pt").read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "log.csv"]
    run("train.py", *arguments, "--epochs", 2, ok=0)


def test_a_full_disk_ends_prediction_in_one_line_and_leaves_nothing_torn(run, cohort, checkpoint, tmp_path):
    arguments = [cohort, "--checkpoints", checkpoint, "--out", tmp_path / "out", "--probabilities"]
    done = limited("infer.py", *arguments, file_size=20_000)
    one_line(done, tmp_path / "out" / "probabilities" / "BraTS2021_00000.nii.gz", "File too large")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["probabilities"]
    run("infer.py", *arguments, ok=0)
    merge = ["--out", tmp_path / "merged", tmp_path / "out" / "probabilities"]
    one_line(limited("ensemble.py", *merge, file_size=100), tmp_path / "merged", "File too large")
    assert not list((tmp_path / "merged").iterdir())


@pytest.mark.parametrize("script", ["train.py", "infer.py", "ensemble.py"])
def test_a_folder_that_cannot_be_written_is_one_line(run, cohort, checkpoint, tmp_path, script):
    """/proc is read-only to everybody, also to an administrator."""
    out = Path("/proc/self/out")
    if not out.parent.is_dir():
        pytest.skip("no /proc here")
    nib.save(nib.Nifti1Image(torch.zeros(4, 4, 4, 3).numpy(), torch.eye(4).numpy()), tmp_path / "case.nii.gz")
    arguments = {"train.py": ["--data", cohort, *TINY], "infer.py": [cohort, "--checkpoints", checkpoint], "ensemble.py": [tmp_path]}[script]
    one_line(run(script, *arguments, "--out", out), "/proc/self/out")
