"""Training that is stopped, killed, or runs out of something: it ends soon, says why, and goes on to the weights of a run left alone."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import nibabel
import pytest
import torch
import torch.distributed as dist

from conftest import REPO
from data import find_cases, split_folds
from infer import load_checkpoint

TORCHRUN = ["-m", "torch.distributed.run"]
# five cases to train on, one to validate: 5 steps an epoch on one process, 3 on two, validated after epochs 2 and 3
SMALL = ["--folds", 6, "--fold", 0, "--epochs", 3, "--lr", "1e-3", "--crop", 16, 16, 16, "--filters", 8, "--pool", 4, "--dim", 4,
         "--validate-every", 2, "--workers", 1, "--amp", "off"]

# train.py, but as rank RANK computes its loss for the N-th time, it gets SIGNAL. With "validation" for N: as it first validates.
SIGNALLED = """
import os, signal, sys
import train
name, rank, when = sys.argv[1:4]
sys.argv[1:4] = []
calls = []
def and_signal(function):
    def signalled(*arguments):
        calls.append(1)
        if os.environ.get("RANK", "0") == rank and when in (str(len(calls)), "validation") and not os.path.exists("SENT"):
            open("SENT", "w").close()
            os.kill(os.getpid(), getattr(signal, name))
        return function(*arguments)
    return signalled
if when == "validation":
    train.dice = and_signal(train.dice)
else:
    train.soft_dice_loss = and_signal(train.soft_dice_loss)
train.SAVE_EVERY = float(os.environ.get("SAVE_EVERY", 600))
train.main()
"""


@pytest.fixture(scope="module")
def uninterrupted(run, cohort, tmp_path_factory):
    """{processes: (last.pt, best.pt) of the run left alone}"""
    ends = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp("uninterrupted")
        launcher = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else []
        run(*launcher, "train.py", "--data", cohort, "--out", out, *SMALL, ok=0)
        ends[processes] = [torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt")]
    return ends


def assert_same(found, expected, where="last.pt"):
    """Every tensor, number and string, but the log's two columns of time."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            if key not in ("seconds", "cases_per_second"):
                assert_same(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{where} {i}")
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected, where


def assert_ends_like(out, ends):
    for name, expected in zip(("last.pt", "best.pt"), ends):
        assert_same(torch.load(out / name, weights_only=True), expected, name)
    assert not [path.name for path in out.iterdir() if path.name not in ("last.pt", "best.pt", "log.csv", "SENT")]


def signalled(run, out, *arguments, launcher=(), ok, **environment):
    """Runs train.py under SIGNALLED in `out`."""
    script = out / "signalled.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n" + SIGNALLED.replace("SENT", str(out / "SENT")))
    os.environ.update(environment)
    try:
        return run(*launcher, script, *arguments, ok=ok)
    finally:
        script.unlink()
        for name in environment:
            del os.environ[name]


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_saves_and_leaves(run, cohort, uninterrupted, tmp_path, name, code):
    arguments = ["--data", cohort, "--out", tmp_path, *SMALL]
    done = signalled(run, tmp_path, name, 0, 8, *arguments, ok=code)
    assert f"{name}: stopped in epoch 2, after step 3, and saved" in done.stdout and not done.stderr
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"], last["finished"]) == (1, 3, False)
    done = run("train.py", *arguments, ok=0)
    assert "epochs 2 to 3 of 5 steps, 3 steps of epoch 2 done before" in done.stdout
    assert_ends_like(tmp_path, uninterrupted[1])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["finished"] is True


def test_a_signal_during_validation_loses_no_step(run, cohort, uninterrupted, tmp_path):
    arguments = ["--data", cohort, "--out", tmp_path, *SMALL]
    done = signalled(run, tmp_path, "SIGTERM", 0, "validation", *arguments, ok=143)
    assert "stopped before the validation of epoch 2" in done.stdout
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (1, 5)
    run("train.py", *arguments, ok=0)
    assert_ends_like(tmp_path, uninterrupted[1])


def test_a_signal_to_one_of_two_processes_stops_both(run, cohort, uninterrupted, tmp_path):
    arguments = ["--data", cohort, "--out", tmp_path, *SMALL]
    launcher = [*TORCHRUN, "--nproc_per_node=2"]
    done = signalled(run, tmp_path, "SIGTERM", 1, 5, *arguments, launcher=launcher, ok=1)
    assert done.stdout.count("SIGTERM: stopped in epoch 2, after step 2") == 1
    run(*launcher, "train.py", *arguments, ok=0)
    assert_ends_like(tmp_path, uninterrupted[2])


def test_ctrl_c_reaches_all_processes_of_the_terminal_and_the_run_goes_on_with_other_workers(run, cohort, uninterrupted, tmp_path):
    command = [sys.executable, REPO / "train.py", "--data", cohort, "--out", tmp_path, *SMALL]
    process = subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("epoch 1/3"):
            break
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGINT: stopped" in output and "Traceback" not in output
    run("train.py", "--data", cohort, "--out", tmp_path, *SMALL, "--workers", 0, ok=0)
    assert_ends_like(tmp_path, uninterrupted[1])


def test_a_validation_that_fails_each_time_saves_nothing_new(run, cohort, tmp_path):
    """A batch system that starts a run again for as long as it saves something would do so for ever."""
    shutil.copytree(cohort, tmp_path / "cohort")
    arguments = ["--data", tmp_path / "cohort", "--out", tmp_path / "out", *SMALL]
    (held_out,) = split_folds(find_cases(cohort), 6)[0]
    scan = tmp_path / "cohort" / held_out.images[1].relative_to(cohort)
    scan.write_bytes(scan.read_bytes()[:1000])
    saved = []
    for _ in range(2):
        done = run("train.py", *arguments, ok=2)
        assert scan.name in done.stderr
        saved.append((tmp_path / "out" / "last.pt").stat().st_mtime_ns)
    assert saved[0] == saved[1]
    shutil.copytree(cohort, tmp_path / "cohort", dirs_exist_ok=True)
    run("train.py", *arguments, ok=0)


def test_a_run_is_saved_within_an_epoch_too(run, cohort, uninterrupted, tmp_path):
    arguments = ["--data", cohort, "--out", tmp_path, *SMALL]
    signalled(run, tmp_path, "SIGKILL", 0, 9, *arguments, ok=-signal.SIGKILL, SAVE_EVERY="0")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (1, 3)
    run("train.py", *arguments, ok=0)
    assert_ends_like(tmp_path, uninterrupted[1])


def test_torchrun_starts_a_killed_rank_again_and_the_run_ends_equal(run, cohort, uninterrupted, tmp_path):
    arguments = ["--data", cohort, "--out", tmp_path, *SMALL]
    launcher = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1"]
    done = signalled(run, tmp_path, "SIGKILL", 1, 5, *arguments, launcher=launcher, ok=0)
    assert "epochs 2 to 3 of 3 steps" in done.stdout
    assert_ends_like(tmp_path, uninterrupted[2])


def test_a_killed_rank_ends_the_run_within_a_minute(run, cohort, tmp_path):
    start = time.monotonic()
    done = signalled(run, tmp_path, "SIGKILL", 1, 5, "--data", cohort, "--out", tmp_path, *SMALL, launcher=[*TORCHRUN, "--nproc_per_node=2"], ok=1)
    assert "SIGKILL" in done.stderr and time.monotonic() - start < 60
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_two_machines_go_on_when_a_rank_is_killed(run, cohort, uninterrupted, tmp_path):
    """Two torchrun agents on the loopback, one process each, as two machines would have them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "signalled.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n" + SIGNALLED.replace("SENT", str(tmp_path / "SENT")))
    command = [sys.executable, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv-backend=c10d",
               f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", script, "SIGKILL", 1, 5, "--data", cohort, "--out", tmp_path, *SMALL]
    agents = [subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True) for _ in range(2)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    script.unlink()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert len(re.findall("epochs 2 to 3 of 3 steps", "".join(outputs))) == 1
    assert_ends_like(tmp_path, uninterrupted[2])


def test_ranks_meet_although_their_machines_have_counted_other_restarts():
    """What the last start left in the store is still there, and rank 0 comes last."""
    code = "import time, torch, torch.distributed as dist, data\ntime.sleep(3 * (rank == 0))\ndata.join_ranks('gloo', rank, 3)\n" \
           "total = torch.tensor([10.0**rank])\ndist.all_reduce(total)\nprint(total.item())\ndist.destroy_process_group()"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restarts in ((0, 0, 0), (1, 0, 2)):
        started = []
        for rank in range(3):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts[rank]), "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen([sys.executable, "-c", f"rank = {rank}\n{code}"], cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True))
        assert [process.communicate(timeout=60)[0].strip() for process in started] == ["111.0"] * 3


def test_a_scheduler_that_signals_every_process_takes_none_from_the_run(run, cohort, uninterrupted, tmp_path):
    """The readers too, as a batch system does, and while the step under way is still without its samples."""
    command = [sys.executable, REPO / "train.py", "--data", cohort, "--out", tmp_path, *SMALL]
    process = subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/3"):
            break
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        readers = [int(reader) for reader in file.read().split()]
    assert readers
    for pid in (*readers, process.pid):
        os.kill(pid, signal.SIGTERM)
    start = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: stopped" in output and "Traceback" not in output and time.monotonic() - start < 10
    assert not any(os.path.exists(f"/proc/{reader}") for reader in readers)
    run("train.py", "--data", cohort, "--out", tmp_path, *SMALL, ok=0)
    assert_ends_like(tmp_path, uninterrupted[1])


def test_machines_that_do_not_share_a_folder_are_told_so(run, cohort, tmp_path):
    """Each rank with an OUT of its own, of which only rank 0's holds a checkpoint."""
    out = tmp_path / "of0"
    script = tmp_path / "apart.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(REPO)!r})\nimport train\nsys.argv += ['--out', {str(tmp_path)!r} + '/of' + os.environ['RANK']]\ntrain.main()")
    arguments = [*TORCHRUN, "--nproc_per_node=2", script, "--data", cohort, *SMALL]
    run(*TORCHRUN, "--nproc_per_node=2", "train.py", "--data", cohort, "--out", out, *SMALL, ok=0)
    done = run(*arguments, ok=1)
    assert f"{tmp_path / 'of1'}: rank 1 finds 0 epochs and 0 steps done in it, rank 0 [3, 0], expected one folder" in done.stderr
    assert not list((tmp_path / "of1").glob("*.pt"))


def test_a_device_of_another_precision_is_refused(run, cohort, tmp_path):
    run("train.py", "--data", cohort, "--out", tmp_path, *SMALL, "--crop", 24, 16, 16, "--epochs", 1, "--amp", "auto", ok=0)
    before = (tmp_path / "last.pt").read_bytes()
    code = "import torch, train\ntrain.choose_precision = lambda amp, device: torch.float16\ntrain.main()"
    done = run("-c", code, "--data", cohort, "--out", tmp_path, *SMALL, "--crop", 24, 16, 16, "--epochs", 1, "--amp", "auto", ok=2)
    (line,) = done.stderr.splitlines()
    assert "last.pt: was trained with precision " in line and "expected float16 as in this call" in line
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_crop_that_does_not_fit_is_one_line(run, cohort, tmp_path):
    code = """
import torch, train
def forward(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")
train.TwoViews.forward = forward
train.main()
"""
    done = run("-c", code, "--data", cohort, "--out", tmp_path, *SMALL, ok=2)
    (line,) = done.stderr.splitlines()
    assert "--crop 16 16 16 with --filters 8 does not fit" in line


# ---- prediction -------------------------------------------------------------------------------------------------------


def test_a_window_that_does_not_fit_is_one_line_and_leaves_nothing(run, cohort, checkpoint, tmp_path):
    code = """
import torch, infer
def forward(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
infer.SegResNet.forward = forward
infer.main()
"""
    done = run("-c", code, cohort, "--checkpoints", checkpoint, "--out", tmp_path / "out", ok=2)
    (line,) = done.stderr.splitlines()
    assert "--crop" in line and "--filters" in line and "2.00 GiB" in line
    assert not list((tmp_path / "out").iterdir())


def test_prediction_stopped_while_it_writes_leaves_whole_files_and_goes_on(run, cohort, checkpoint, tmp_path):
    code = """
import os, signal, nibabel, infer
save, saved = nibabel.save, []
def save_and_signal(image, path):
    save(image, path)
    saved.append(path)
    if len(saved) == 3:
        os.kill(os.getpid(), signal.SIGTERM)    # the third file is written, but not under its name yet
nibabel.save = save_and_signal
infer.main()
"""
    run("-c", code, cohort, "--checkpoints", checkpoint, "--out", tmp_path / "out", ok=143)
    left = sorted((tmp_path / "out").iterdir())
    assert 2 <= len(left) <= 4 and [path.name for path in left] == [f"BraTS2021_0000{i}.nii.gz" for i in range(len(left))]
    assert all(nibabel.load(path).get_fdata().shape == (32, 32, 32) for path in left)
    done = run("infer.py", cohort, "--checkpoints", checkpoint, "--out", tmp_path / "out", ok=0)
    assert f"{len(left)} cases were predicted before and kept" in done.stdout and len(list((tmp_path / "out").iterdir())) == 6
