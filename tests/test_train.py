"""train.py: gradients over two processes, the schedule, resuming, what a checkpoint holds, and the command under torchrun."""

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import train
from barlow import Projector, barlow_twins_loss, soft_dice_loss
from data import find_cases, labels_to_regions, load_case, normalize, regions_to_labels, split_folds
from infer import dice, load_checkpoint, predict
from segresnet import SegResNet

SMALL = ("--epochs", 2, "--crop", 32, 32, 32, "--filters", 8, "--pool", 8, "--dim", 4, "--workers", 0, "--folds", 2, "--amp", "off", "--lr", "1e-3")


def read_log(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- two processes ----------------------------------------------------------------------------------------------------


def two_views():
    torch.manual_seed(0)
    return train.TwoViews(SegResNet(filters=8), Projector(8, dim=4, pool=8))


def batch_of(case):
    generator = torch.Generator().manual_seed(case)
    return torch.randn(2, 4, 32, 32, 16, generator=generator), torch.rand(2, 3, 32, 32, 16, generator=generator) < 0.3


def step_loss(model, case):
    x, target = batch_of(case)
    logits, z_a, z_b = model(x)
    return soft_dice_loss(torch.sigmoid(logits), target) + 0.25 * barlow_twins_loss(z_a, z_b)


def gradients_of_one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    views = two_views()
    ddp = DistributedDataParallel(views)    # kept: its hooks, which average the gradients, go with it
    step_loss(ddp, case=rank).backward()
    torch.save({name: p.grad for name, p in views.named_parameters()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_that_averages_both_cases(tmp_path):
    torch.multiprocessing.spawn(gradients_of_one_rank, (str(tmp_path),), nprocs=2)
    views = two_views()
    ((step_loss(views, case=0) + step_loss(views, case=1)) / 2).backward()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, parameter in views.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        for rank in ranks:
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max()) + 1e-9)


# ---- pieces -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_arguments()
    assert (args.epochs, args.lr, args.weight_decay, tuple(args.crop), args.folds) == (300, 1e-4, 1e-5, (192, 192, 144), 5)
    assert (args.lambd, args.pool, args.dim, args.barlow_weight, args.filters, args.norm) == (0.005, 16, 128, 1 / 128, 32, "instance")
    assert args.out == Path("runs/fold0")


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 4), (3, 4), (1, 2)])
def test_an_epoch_is_every_case_once_and_wraps_around_in_its_last_step(n, world):
    cases = list(range(n))
    order = train.epoch_order(cases, seed=0, epoch=3, world=world)
    assert sorted(order[:n]) == cases and len(order) == math.ceil(n / world) * world
    assert all(order[i] == order[i % n] for i in range(len(order)))
    if n == 10:
        assert order != train.epoch_order(cases, seed=0, epoch=4, world=world)


def test_two_views_come_from_one_forward_pass_each_projected_by_itself():
    views, (x, _) = two_views(), batch_of(0)
    logits, z_a, z_b = views(x)
    features = views.network.features(x)
    torch.testing.assert_close(logits, views.network(x))
    torch.testing.assert_close(z_a, views.projector(features[:1]))
    torch.testing.assert_close(z_b, views.projector(features[1:]))


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)])
def test_precision_can_be_forced(flag, dtype):
    assert train.choose_precision(flag, torch.device("cpu")) is dtype


# ---- the command ------------------------------------------------------------------------------------------------------


def test_the_log_the_schedule_and_the_checkpoints(cohort, checkpoint):
    out = checkpoint.parent
    (row,) = read_log(out)
    # 3 steps of one epoch: the last step's learning rate is the cosine at 2/3 of the way
    assert float(row["lr"]) == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi * 2 / 3)), rel=1e-5)
    assert float(row["barlow"]) == pytest.approx(float(row["invariance"]) + 0.005 * float(row["redundancy"]), rel=1e-4)
    assert float(row["loss"]) == pytest.approx(float(row["dice_loss"]) + float(row["barlow"]) / 4, rel=1e-4)    # weight 1/dim
    held_out = split_folds(find_cases(cohort), 2, 0)[0]
    content = torch.load(out / "last.pt", weights_only=True)
    assert content["val_cases"] == [case.name for case in held_out] and len(content["train_cases"]) == 3
    assert not set(content["val_cases"]) & set(content["train_cases"]) and content["et_label"] == 4
    assert not [key for key in content["model"] if key.startswith("module.")]
    model = load_checkpoint(out / "best.pt")["model"]
    # the logged Dice is that of the painted whole-case prediction, averaged over the held-out cases
    scores = []
    for case in held_out:
        image, target, _ = load_case(case)
        painted = labels_to_regions(regions_to_labels(predict(model, normalize(image), (32, 32, 32)) > 0.5))
        scores.append([dice(p, t) for p, t in zip(painted, target)])
    expected = torch.tensor(scores).mean(0)
    assert [float(row[f"dice_{r}"]) for r in ("et", "tc", "wt")] == pytest.approx(expected.tolist(), abs=1e-5)
    assert float(row["dice_mean"]) == pytest.approx(expected.mean().item(), abs=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(run, cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run("train.py", "--data", cohort, "--out", out, *SMALL, ok=0)
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_weights(found, expected):
    assert found["epoch"] == expected["epoch"]
    for part in ("model", "views"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(found[part][name], tensor), name


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_one_that_was_not(run, cohort, uninterrupted, tmp_path):
    script = Path(train.__file__)
    process = subprocess.Popen([sys.executable, script, "--data", cohort, "--out", tmp_path, *map(str, SMALL)],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1, "the run was over before it was killed"
    run("train.py", "--data", cohort, "--out", tmp_path, *SMALL, ok=0)
    assert_same_weights(torch.load(tmp_path / "last.pt", weights_only=True), uninterrupted)
    assert [row["epoch"] for row in read_log(tmp_path)] == ["1", "2"]


def test_the_number_of_workers_changes_nothing(run, cohort, uninterrupted, tmp_path):
    settings = [2 if before == "--workers" else value for before, value in zip(("", *SMALL), SMALL)]
    run("train.py", "--data", cohort, "--out", tmp_path, *settings, ok=0)
    assert_same_weights(torch.load(tmp_path / "last.pt", weights_only=True), uninterrupted)


def test_other_settings_than_the_checkpoints_are_refused(run, cohort, checkpoint):
    before = (checkpoint.parent / "last.pt").read_bytes()
    done = run("train.py", "--data", cohort, "--out", checkpoint.parent, "--folds", 2, "--epochs", 1, "--crop", 32, 32, 32, "--filters", 8,
               "--pool", 8, "--dim", 4, "--amp", "off", "--lr", "3e-3", ok=2)
    assert "lr 0.0001, expected 0.003" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (checkpoint.parent / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_case(run, cohort, tmp_path):
    done = run("train.py", "--data", cohort, "--out", tmp_path, *SMALL, "--lr", "1e30", ok=2)
    assert "BraTS2021_0000" in done.stderr and "not finite" in done.stderr and "Barlow Twins" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_torchrun_with_an_uneven_last_step_and_fewer_validation_cases_than_processes(run, cohort, tmp_path):
    # six cases in six folds: five to train on by two processes, one to validate
    done = run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data", cohort, "--out", tmp_path / "two", *SMALL,
               "--folds", 6, "--barlow-weight", 0, "--validate-every", 1, ok=0)
    assert "2 processes" in done.stdout and "epochs 1 to 2 of 3 steps" in done.stdout
    log = read_log(tmp_path / "two")
    run("infer.py", cohort, "--checkpoints", tmp_path / "two" / "last.pt", "--held-out", "--out", tmp_path / "predictions", ok=0)
    with open(tmp_path / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert [float(log[-1][f"dice_{r}"]) for r in ("et", "tc", "wt")] == pytest.approx([float(row[f"dice_{r}"]) for r in ("et", "tc", "wt")], abs=1e-5)
    assert float(log[0]["barlow"]) == 0.0 and float(log[0]["loss"]) == pytest.approx(float(log[0]["dice_loss"]))


@pytest.mark.parametrize("mistake", [("--folds", 9), ("--crop", 16)], ids=["in the cohort", "in the call"])
def test_under_torchrun_a_mistake_is_printed_once(run, cohort, tmp_path, mistake):
    done = run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data", cohort, "--out", tmp_path, *mistake, ok=1)
    assert done.stderr.count("train.py: error:") == 1 and "usage:" not in done.stderr


def test_under_torchrun_a_file_that_one_process_cannot_read_ends_both(run, cohort, tmp_path):
    broken = tmp_path / "cohort"
    shutil.copytree(cohort, broken)
    case = find_cases(broken)[0]
    case.images[2].write_bytes(case.images[2].read_bytes()[:2000])
    done = run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data", broken, "--out", tmp_path / "out", *SMALL, "--fold", "all", ok=1)
    assert done.stderr.count("train.py: error:") == 1 and case.images[2].name in done.stderr
    assert done.stderr.count("Traceback") == 1    # torchrun's own


WITH_THREADS_TOLD = """
import atexit, glob, os, signal, sys
sys.path.insert(0, {repository!r})
import train

def tell(when):
    names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    os.write(1, f"{{when}} {{[name for name in names if 'gloo' in name]}}\\n".encode())    # in one piece: the ranks share it

def rate(lr, step, steps):
    tell("at work:")
    {in_a_step}
    return 0.0

train.cosine = rate
atexit.register(tell, "at the end:")
train.main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux alone tells the threads")
@pytest.mark.parametrize("in_a_step, code", [("pass", 0), ("os.kill(os.getpid(), signal.SIGTERM)", 1)], ids=["finished", "stopped"])
def test_no_rank_ends_with_a_thread_of_gloos(run, cohort, tmp_path, in_a_step, code):
    # one that lets go of a tensor while the interpreter ends aborts the process: on busy cores, once in some hundred runs
    script = tmp_path / "script.py"
    script.write_text(WITH_THREADS_TOLD.format(repository=str(Path(train.__file__).parent), in_a_step=in_a_step))
    done = run("-m", "torch.distributed.run", "--nproc_per_node=2", script, "--data", cohort, "--out", tmp_path / "out", *SMALL, ok=code)
    assert "at work: ['" in done.stdout and done.stdout.count("at the end: []") == 2
    assert ("SIGTERM: stopped in epoch 1, after step 1" in done.stdout) == (code == 1)


def test_a_compiled_network_is_trained_and_saved_as_the_plain_one(run, cohort, tmp_path):
    code = "import functools, torch, train\ntorch.compile = functools.partial(torch.compile, backend='eager')\ntrain.main()"    # no C++ compiler is needed
    arguments = ["--data", cohort, "--fold", "all", *SMALL, "--epochs", 1, "--workers", 0]
    run("train.py", *arguments, "--out", tmp_path / "plain", ok=0)
    run("-c", code, *arguments, "--out", tmp_path / "compiled", "--compile", ok=0)
    plain, compiled = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("plain", "compiled"))
    assert (plain["settings"].pop("compile"), compiled["settings"].pop("compile")) == (False, True) and plain["settings"] == compiled["settings"]
    assert list(plain["model"]) == list(compiled["model"])
    assert all(torch.equal(plain["model"][name], compiled["model"][name]) for name in plain["model"])
