"""What the tests share: running a command, a synthetic cohort, checkpoints of networks for it."""

import csv
import gzip
import importlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]
from segresnet import SegResNet  # noqa: E402

torch.set_num_threads(1)    # two threads on two busy cores wait for each other, ten times as long
# flags of train.py for networks and steps as small as they go
TINY = "--epochs 1 --crop 32 32 32 --filters 8 --pool 8 --dim 4 --amp off --workers 1".split()
TINIER = [*TINY, *"--crop 16 16 16 --pool 4".split()]


@pytest.fixture(scope="session")
def run():
    def run_script(*command, ok=None, stdout=subprocess.PIPE):
        """Runs `python script argument ...` -> its CompletedProcess, stdout and stderr as text.

        script: as seen from the repository's root, an absolute path, or an option of python's such as "-m".
        ok: the exit code that is asserted, if given. stdout: where that goes.
        """
        script, *arguments = map(str, command)
        script = script if script.startswith("-") else REPO / script
        # A script finds what lies beside it and nothing else; tests side by side do not fight for the cores.
        unset = ("PYTHONPATH", "PYTHONUNBUFFERED", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment["OMP_NUM_THREADS"] = "1"
        process = subprocess.run([sys.executable, script, *arguments], cwd=REPO, env=environment, timeout=600,
                                 stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                                 encoding="utf-8")
        output = f"\n{process.stdout}\n{process.stderr}"
        assert ok is None or process.returncode == ok, f"exit code {process.returncode}, not {ok}{output}"
        return process
    return run_script


@pytest.fixture(scope="session")
def call():
    def call_script(script, *arguments, ok=None, encoding="utf-8"):
        """The same in this process, which spares the import of PyTorch -> exit code, stdout, stderr."""
        main = importlib.import_module(script.removesuffix(".py")).main
        streams, code = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)], None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            patch.setattr(os, "_exit", sys.exit)    # run_command's way out is ours to catch
            try:
                main() if script == "ensemble.py" else importlib.import_module("data").run_command(main)
            except SystemExit as end:
                code = end.code
        [stream.seek(0) for stream in streams]
        result = code or 0, *(stream.read() for stream in streams)
        assert ok is None or result[0] == ok, result
        return result
    return call_script


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_header(path, shape, voxels=b"", **fields):
    """A .nii.gz whose header says what `shape` and `fields` do, and the bytes that follow it."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    for field, value in {"magic": b"n+1", "vox_offset": 352, **fields}.items():
        header[field] = value
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4) + voxels)


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def cohort(call, tmp_path_factory):
    """The folder of 6 synthetic cases, BraTS2021_00000 to 00005, 32x32x32. Tests only read it."""
    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    call("phantom.py", folder, "--cases", 6, "--shape", 32, 32, 32, ok=0)
    return folder


@pytest.fixture(scope="session")
def checkpoint(call, cohort, tmp_path_factory):
    """best.pt of one epoch of fold 0 of 2 on `cohort`, log.csv and last.pt beside it. Tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "fold0"
    call("train.py", "--data", cohort, "--folds", 2, "--out", out, *TINY, ok=0)
    return out / "best.pt"


@pytest.fixture(scope="session")
def networks(checkpoint, tmp_path_factory):
    """Checkpoints of fold 0 and fold 1 of 2 on `cohort`, whose random weights paint all regions."""
    paths, content = [], torch.load(checkpoint, weights_only=True)
    for fold in "01":
        torch.manual_seed(int(fold))
        weights = SegResNet(filters=8).state_dict()
        weights["decoder_end.2.bias"] = torch.tensor([-0.1, 0.0, 0.1])
        content |= {"model": weights, "settings": content["settings"] | {"fold": fold}}
        paths.append(tmp_path_factory.mktemp("networks") / f"fold{fold}.pt")
        torch.save(content, paths[-1])
        content |= {"train_cases": content["val_cases"], "val_cases": content["train_cases"]}
    return paths
