"""Training that is killed or interrupted: the weights of a run left alone in the end, or one line."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import REPO, TINIER, free_port
from data import find_cases, run_command, split_folds

# three cases to train on: 3 steps an epoch on one process, 2 on two; three to validate after epochs 2 and 3
SMALL = [*TINIER, "--folds", 2, "--epochs", 3, "--lr", "1e-3", "--validate-every", 2]
FORKS = multiprocessing.get_context("forkserver")    # has train.py loaded: a start takes 0.1 s
FORKS.set_forkserver_preload(["train"])


def command(arguments, environment, log, change):
    """train.py with its output in the file `log`. change(): what is done to it first."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *map(str, arguments)]
    if change:
        change()
    run_command(train.main)


def start(out, *arguments, world=1, change=None):
    """Starts train.py on `world` processes -> these. Rank N prints into OUT.N.txt."""
    meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = *SMALL, "--out", out, *arguments
    started = [FORKS.Process(target=command, args=(arguments, {**meeting, "RANK": rank, "LOCAL_RANK": rank},
                                                   out.with_name(f"{out.name}.{rank}.txt"), change))
               for rank in map(str, range(world))]
    for process in started:
        process.start()
    return started


def ended(out, started):
    """Waits for all ranks -> their exit codes, and rank 0's output."""
    for process in started:
        process.join(300)
    return [process.exitcode for process in started], out.with_name(f"{out.name}.0.txt").read_text()


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def assert_one_line(output, *parts):
    """The last line is train.py's error with all `parts` in it, and no traceback was printed."""
    line = output.splitlines()[-1]
    assert line.startswith("train.py: error: ") and all(part in line for part in parts), output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def alone(cohort, tmp_path_factory):
    """{processes: OUT of the run left alone}"""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp("alone") / "out"
        started = start(folders[world], "--data", cohort, "--cache", "none", world=world)
        assert ended(folders[world], started)[0] == [0] * world
    return folders


def same(found, expected):
    """Whether every tensor, number and string is equal, but for the log's seconds."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            same(found[key], value) for key, value in expected.items() if key != "seconds")
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def assert_ends_like(out, alone):
    for name in ("last.pt", "best.pt"):
        found, expected = (torch.load(folder / name, weights_only=True) for folder in (out, alone))
        assert same(found, expected), name
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.csv"]


# ---- killed -----------------------------------------------------------------------------------------------


def test_killed_at_a_random_moment_it_ends_equal(alone, cohort, tmp_path):
    """With a cache and one reader a rank at first, then without and two. test_fuzz.py kills one process."""
    out, arguments = tmp_path / "out", ("--data", cohort, "--workers")
    started = start(out, *arguments, 1, "--cache", tmp_path / "cache", world=2)
    wait_for(out / "last.pt")
    log = torch.load(alone[2] / "last.pt", weights_only=True)["log"]
    time.sleep(random.uniform(0, float(log[1]["seconds"])))
    for process in started:
        process.kill()
    ended(out, started)
    codes, output = ended(out, start(out, *arguments, 2, "--cache", "none", world=2))
    assert codes == [0, 0] and "; 0 of 3 epochs" not in output
    assert_ends_like(out, alone[2])


def killed_before_last_pt_is_renamed():
    replace = os.replace

    def kill(part, path):
        if path.name == "last.pt" and path.exists():    # epoch 2's; its best.pt and log.csv are in place
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
    os.replace = kill


def test_killed_while_it_saves_it_ends_equal(alone, cohort, tmp_path):
    out, arguments = tmp_path / "out", ("--data", cohort, "--cache", "none")
    codes, _ = ended(out, start(out, *arguments, change=killed_before_last_pt_is_renamed))
    found = {path.name: torch.load(path, weights_only=True)["epoch"] for path in out.glob("[!.]*.pt")}
    assert codes == [-signal.SIGKILL] and found == {"last.pt": 1, "best.pt": 2}
    assert (out / ".part-last.pt").exists()
    codes, output = ended(out, start(out, *arguments))
    assert codes == [0] and "; 1 of 3 epochs" in output
    assert_ends_like(out, alone[1])


@pytest.mark.parametrize("agents", [1, 2])
def test_torchrun_starts_a_killed_rank_again(alone, cohort, tmp_path, agents):
    """Two agents on the loopback, one rank each, stand for two machines."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={agents}", f"--nproc_per_node={2 // agents}",
                "--max-restarts=1", *(meeting if agents == 2 else [])]
    arguments = [REPO / "train.py", "--data", cohort, "--out", out, *SMALL, "--cache", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "w") as file:
        started = [subprocess.Popen([sys.executable, *map(str, [*torchrun, *arguments])], env=environment,
                                    stdout=file, stderr=file) for _ in range(agents)]
    wait_for(out / "last.pt")
    agent = started[-1].pid
    rank = int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[-1])
    environment = Path(f"/proc/{rank}/environ").read_text().split("\0")    # from which a run without is told
    assert {"TORCHELASTIC_MAX_RESTARTS=1", "TORCHELASTIC_USE_AGENT_STORE=False"} <= {*environment}
    os.kill(rank, signal.SIGKILL)
    assert [agent.wait(300) for agent in started] == [0] * agents, log.read_text()
    starts = re.findall("; [0-2] of 3 epochs of 2 steps", log.read_text())
    assert len(starts) == 2, "it was over before the rank was killed"
    assert_ends_like(out, alone[2])


# ---- ranks ------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_says_why_and_ends_the_run(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "cohort")
    cases = find_cases(tmp_path / "cohort")
    scan = train.epoch_order(split_folds(cases, 2)[1], 0, 0, 2)[1].images[2]    # rank 1's first
    scan.write_bytes(scan.read_bytes()[:2000])
    out = tmp_path / "out"
    assert ended(out, start(out, "--data", tmp_path / "cohort", "--workers", 1, world=2))[0] == [2, 2]
    assert_one_line((tmp_path / "out.1.txt").read_text(), str(scan))
    assert_one_line((tmp_path / "out.0.txt").read_text(), "onnection")    # Gloo's, that the other has left


def out_of_its_own():
    sys.argv += ["--out", f"{sys.argv[sys.argv.index('--out') + 1]}{os.environ['RANK']}"]


def test_ranks_that_see_different_folders_refuse(alone, cohort, tmp_path):
    shutil.copytree(alone[2], tmp_path / "out0")
    out = tmp_path / "out"
    codes, output = ended(out, start(out, "--data", cohort, world=2, change=out_of_its_own))
    assert codes == [2, 2]
    assert_one_line(output, f"--out {tmp_path / 'out0'}", "[3, 0]")
    assert not list((tmp_path / "out1").iterdir())


def test_another_number_of_ranks_is_refused(alone, cohort, tmp_path):
    out = shutil.copytree(alone[2], tmp_path / "out")
    codes, output = ended(out, start(out, "--data", cohort))
    assert codes == [2]
    assert_one_line(output, str(out / "last.pt"), "world 2, expected 1")


# ---- interrupted ------------------------------------------------------------------------------------------


def reader_hangs():
    def hang(*_):
        Path(sys.argv[sys.argv.index("--out") + 1], "last.pt").touch()    # it hangs from now on
        time.sleep(3600)
    train.prepare = hang


@pytest.mark.parametrize("change", [None, reader_hangs])
def test_ctrl_c_leaves_quietly(cohort, tmp_path, change):
    started = start(tmp_path / "out", "--data", cohort, "--epochs", 1000, change=change)    # not over before
    wait_for(tmp_path / "out" / "last.pt")
    os.kill(started[0].pid, signal.SIGINT)
    codes, output = ended(tmp_path / "out", started)
    assert codes == [130] and "Traceback" not in output and "error" not in output
    if not change:
        assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["finished"] is False


def reader_fails():
    begun = []

    def prepare(*_):
        begun.append(None)
        return 1 / 0 if len(begun) == 1 else time.sleep(3600)    # the next are still being read
    train.prepare = prepare


def test_a_bug_ends_the_run_with_its_traceback(cohort, tmp_path):
    codes, output = ended(tmp_path / "out", start(tmp_path / "out", "--data", cohort, change=reader_fails))
    assert codes == [1] and output.splitlines()[-1] == "ZeroDivisionError: division by zero"


# ---- examples/slurm.sh ------------------------------------------------------------------------------------

STAND_INS = {
    "date": "echo 1000",
    "scontrol": 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "requeued $2" ;; esac',
    "srun": '[ "$1 $2" = "--cpus-per-task=32 --kill-on-bad-exit=1" ] && shift 2 && exec "$@"',
    # saves the checkpoint SAVES, if there is one, and goes on until it is ended, if that is unfinished
    "torchrun": '[ $TORCH_DISABLE_SHARE_RDZV_TCP_STORE = 1 ] || exit\n'
                'while [ $1 != train.py ]; do shift; done\n'
                'cp "$SAVES" "$3/last.pt" && [ "$SAVES" = stopped.pt ] && exec sleep 300',
    "python": f'exec {sys.executable} "$@"'}


def test_a_slurm_job_queues_again_until_it_is_finished(alone, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    last = torch.load(alone[1] / "last.pt", weights_only=True)
    for name, finished in (("stopped.pt", False), ("finished.pt", True)):
        torch.save({**last, "finished": finished}, tmp_path / name)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NNODES": "1",
                   "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_NODELIST": "here",
                   "SLURM_JOB_END_TIME": "1062"}    # two seconds of work
    stopped, failed, finished = [
        subprocess.run(["bash", REPO / "examples" / "slurm.sh", "--fold", "0"], cwd=tmp_path, text=True,
                       env={**environment, "SAVES": saves}, capture_output=True, timeout=200)
        for saves in ("stopped.pt", "nothing.pt", "finished.pt")]
    assert (stopped.returncode, stopped.stdout) == (0, "requeued 42\n"), stopped
    assert failed.returncode == 1 and failed.stdout == "" and "nothing was saved" in failed.stderr
    assert (finished.returncode, finished.stdout) == (0, "finished: runs/slurm-42\n")
