"""Damaged scans, checkpoints, logs and names through the real readers: 300 of the inputs that benchmarks/torture.py makes."""

import sys

import pytest

from conftest import REPO


def test_damaged_inputs_load_or_are_refused_in_one_line(run):
    pytest.importorskip("matplotlib")    # the figure reads logs
    done = run("benchmarks/torture.py", "fuzz", "--cases", 300, "--seed", 5, ok=0)
    assert " 0 violations" in done.stdout
    loaded, refused = (int(done.stdout.split(word)[0].split()[-1]) for word in (" loaded", " refused"))
    assert loaded + refused == 300 and min(loaded, refused) > 60, "both happen: the inputs are neither all whole nor all rubbish"


@pytest.mark.parametrize("processes, kills", [(1, 3), (2, 2)])
def test_a_run_killed_at_random_moments_ends_like_one_left_alone(processes, kills):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(REPO / "benchmarks"))
    import torture

    assert torture.kill(kills, seed=processes, processes=(processes,)) == 0
