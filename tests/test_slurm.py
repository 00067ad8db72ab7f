"""examples/slurm.sh with stand-ins for Slurm's commands: a stopped run queues again, a finished or a failed one does not."""

import os
import subprocess
import sys

import pytest

from conftest import REPO
from test_interrupted import SIGNALLED, SMALL

SRUN = '#!/bin/sh\n[ "$1 $2" = "--cpus-per-task=32 --kill-on-bad-exit=1" ] && shift 2 && exec "$@"\n'
SCONTROL = '#!/bin/sh\ncase $1 in show) echo 127.0.0.1 ;; requeue) echo "requeued $2" ;; esac\n'
# torchrun with the cluster's flags taken out: one process, and the script that the test wants
TORCHRUN = f'#!/bin/sh\nwhile [ "$1" != train.py ]; do shift; done; shift\nexec {sys.executable} $SCRIPT "$@"\n'


@pytest.fixture
def job(cohort, tmp_path):
    """job(script, argument ...) -> the CompletedProcess of slurm.sh, `script` being run in train.py's place."""
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script, *arguments):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "32",
                       "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1", "SCRIPT": str(script), "PYTHONPATH": str(REPO)}
        return subprocess.run(["bash", REPO / "examples" / "slurm.sh", "--data", cohort, *map(str, (*SMALL, *arguments))], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=300)

    return start


def test_a_job_queues_again_until_it_is_finished(job, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text("import sys\nsys.argv[1:1] = ['SIGTERM', '0', '3']\n" + SIGNALLED.replace("SENT", str(tmp_path / "SENT")))
    first = job(script)
    assert first.returncode == 0 and "stopped in epoch 1" in first.stdout and "requeued 42" in first.stdout
    second = job(REPO / "train.py")
    assert second.returncode == 0 and "finished: runs/slurm-42" in second.stdout and "requeued" not in second.stdout


def test_a_job_that_saves_nothing_is_not_queued_again(job):
    done = job(REPO / "train.py", "--crop", 17, 17, 17)
    assert done.returncode == 1 and "requeued" not in done.stdout and "nothing was saved" in done.stderr
