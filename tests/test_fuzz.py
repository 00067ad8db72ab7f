"""Damaged inputs through the real readers, and a killed run: a few of those of benchmarks/torture.py."""

import re


def test_damaged_inputs_load_or_are_refused_in_one_line(run):
    done = run("benchmarks/torture.py", "fuzz", "--inputs", 100, "--seed", 5, ok=0)
    counts = [int(re.search(rf"'{verdict}': (\d+)", done.stdout)[1])
              for verdict in ("loaded", "refused in one line")]
    assert sum(counts) == 100 and min(counts) > 20    # neither all whole nor all rubbish


def test_a_run_killed_at_a_random_moment_ends_equal(run):
    done = run("benchmarks/torture.py", "kill", "--kills", 1, ok=0)
    assert re.search("1 kills, . runs ended, 0 unlike", done.stdout)
