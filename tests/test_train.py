"""train.py: the paper's step, its mean over ranks, schedule and epochs; the command's log and checkpoints."""

import inspect
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import infer
import train
from barlow import Projector
from conftest import TINIER, TINY, read_rows
from data import augment, find_cases, split_folds
from segresnet import SegResNet

FLOAT32 = torch.autocast("cpu", enabled=False)
# three cases to train on, three to validate
SMALL = *TINIER, "--folds", 2, "--epochs", 2, "--lr", "1e-3", "--validate-every", 1


def two_views(pool=8):
    torch.manual_seed(0)
    return train.TwoViews(SegResNet(filters=8), Projector(8, 4, pool))


# ---- section 3.1 ------------------------------------------------------------------------------------------


def test_the_step_is_the_papers_equations_one_by_one():
    views, image = two_views(), torch.randn(4, 32, 32, 16).half()
    labels = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)[torch.randint(4, (1, 32, 32, 16))]
    image[:, :4] = labels[:, :4] = 0    # background
    found = train.compute_losses(views, image, labels, 7, 0.25, 0.005, FLOAT32)

    x, y = torch.stack([image, image]).float(), torch.stack([labels, labels])    # "we copy it"
    x, y = augment(x, y, torch.Generator().manual_seed(7))
    assert not torch.equal(x[0], x[1]) and not torch.equal(y[0], y[1])
    p_true = torch.cat([y == 4, (y == 4) | (y == 1), y > 0], 1).float()    # ET, TC, WT
    p_pred = torch.sigmoid(views.network(x))
    products, squares = (p_true * p_pred).sum((2, 3, 4)), (p_true**2 + p_pred**2).sum((2, 3, 4))
    eq4 = (1 - 2 * products / (squares + 1e-5)).mean()
    features = views.network.features(x)
    z_a, z_b = (z - z.mean(0) for z in (views.projector(features[:1]), views.projector(features[1:])))
    c = torch.stack([torch.stack([(z_a[:, i] * z_b[:, j]).sum() / (z_a[:, i].norm() * z_b[:, j].norm())
                                  for j in range(4)]) for i in range(4)])    # Eq. 2
    invariance = sum((1 - c[i, i])**2 for i in range(4))
    redundancy = 0.005 * sum(c[i, j]**2 for i in range(4) for j in range(4) if i != j)
    eq3 = invariance + redundancy
    expected = torch.stack([eq4 + 0.25 * eq3, eq4, eq3, invariance, redundancy])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, [*views.parameters()]) for loss in (found[0], expected[0])]
    for (name, _), gradient, by_hand in zip(views.named_parameters(), *gradients):
        most = float(by_hand.abs().max())
        assert most > 0, name
        torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-5 * most + 1e-9)

    losses = train.compute_losses(views, image, labels, 7, 0.0, 0.005, FLOAT32)    # at weight 0 Eq. 4 is left
    alone = torch.autograd.grad(losses[1], [*views.network.parameters()], retain_graph=True)
    losses[0].backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(views.network.parameters(), alone))
    assert not any(p.grad.any() for p in views.projector.parameters())


# ---- section 3.3, section 4 -------------------------------------------------------------------------------


def test_the_learning_rate_is_pytorchs_cosine_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    for step in range(12):
        assert train.cosine(1e-4, step, 12) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert train.cosine(1e-4, 0, 12) == 1e-4 and train.cosine(1e-4, 12, 12) == pytest.approx(0)


def test_defaults_are_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_arguments()
    assert (args.epochs, args.lr, args.weight_decay, args.folds) == (300, 1e-4, 1e-5, 5)
    assert args.validate_every == 5
    assert inspect.signature(infer.predict).parameters["roi"].default == (192, 192, 144)
    assert (args.crop, args.lambd, args.pool) == ([192, 192, 144], 0.005, 16)
    assert (args.dim, args.barlow_weight, args.filters, args.norm) == (128, 1 / 128, 32, "instance")
    assert args.out == Path("runs/fold0") and args.cache == Path("runs/cache")


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 4), (3, 4), (1, 2)])
def test_an_epoch_is_every_case_once_then_the_first_again(n, world):
    cases = list(range(n))
    order = train.epoch_order(cases, seed=0, epoch=3, world=world)
    assert sorted(order[:n]) == cases and len(order) == math.ceil(n / world) * world
    assert order[n:] == order[:len(order) - n]
    if n == 10:
        assert order != train.epoch_order(cases, seed=0, epoch=4, world=world) and order[:n] != cases


# ---- the command ------------------------------------------------------------------------------------------


def test_the_logs_arithmetic_and_what_checkpoints_hold(cohort, checkpoint):
    (row,) = read_rows(checkpoint.with_name("log.csv"))
    value = {name: float(number) for name, number in row.items()}
    assert value["lr"] == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi * 2 / 3)), rel=1e-5)    # the last
    assert value["barlow"] == pytest.approx(value["invariance"] + value["redundancy"], rel=1e-4)
    assert value["loss"] == pytest.approx(value["dice_loss"] + value["barlow"] / 4, rel=1e-4)    # 1/dim
    dices = [value[f"dice_{region}"] for region in ("et", "tc", "wt")]    # infer.py's: test_end_to_end.py
    assert value["dice_mean"] == pytest.approx(sum(dices) / 3, abs=1e-5)

    held_out = split_folds(find_cases(cohort), 2, 0)[0]
    last = torch.load(checkpoint.parent / "last.pt", weights_only=True)
    best = torch.load(checkpoint, weights_only=True)
    assert last["val_cases"] == [case.name for case in held_out] and last["finished"] is True
    assert sorted(last["train_cases"] + last["val_cases"]) == [case.name for case in find_cases(cohort)]
    assert list(best["model"]) == list(SegResNet(filters=8).state_dict()), "no projector, no module. in front"
    assert all(torch.equal(best["model"][name], last["views"][f"network.{name}"]) for name in best["model"])
    assert (last["epoch"], last["log"]) == (1, [{**row, "epoch": 1}])
    assert f"{last['best']:.6g}" == row["dice_mean"]


def test_two_ranks_are_the_mean_of_both_in_one_process(run, cohort, tmp_path):
    """Five cases on two ranks: three steps, the last with a case of the first."""
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SMALL,
        "--data", cohort, "--out", tmp_path / "out", "--folds", 6, "--epochs", 1, ok=0)
    (held_out,) = split_folds(find_cases(cohort), 6, 0)[0]
    order = train.epoch_order([case for case in find_cases(cohort) if case != held_out], 0, 0, world=2)
    samples = [train.draw_sample((0, case), (16, 16, 16), seed=0) for case in order]
    views, sums = two_views(pool=4), torch.zeros(5)
    optimizer = torch.optim.AdamW(views.parameters(), weight_decay=1e-5)
    for step in range(3):
        losses = sum(train.compute_losses(views, *samples[i][:3], 1 / 4, 0.005, FLOAT32)
                     for i in (2 * step, 2 * step + 1))
        optimizer.param_groups[0]["lr"] = train.cosine(1e-3, step, 3)
        optimizer.zero_grad()
        (losses[0] / 2).backward()
        optimizer.step()
        sums += losses.detach()
    (row,) = read_rows(tmp_path / "out/log.csv")
    found = [float(row[name]) for name in ("loss", "dice_loss", "barlow", "invariance", "redundancy")]
    assert found == pytest.approx((sums / 6).tolist(), rel=1e-3)
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    for name, weight in views.state_dict().items():
        assert (last["views"][name] - weight).abs().mean() < 1e-5, name    # three steps are up to 3e-3
    for i, state in optimizer.state_dict()["state"].items():    # weights alone do not tell a sum from a mean
        difference = last["optimizer"]["state"][i]["exp_avg"] - state["exp_avg"]
        assert difference.norm() <= 1e-2 * state["exp_avg"].norm(), i


def test_two_ranks_share_the_cases_to_validate(cohort, networks, monkeypatch):
    network, cases, shares = infer.load_checkpoint(networks[0])["model"], find_cases(cohort)[:5], []

    def add_up(total):
        shares.append(total.clone())
        total.copy_(sum(shares))

    monkeypatch.setattr(train.dist, "all_reduce", add_up)
    alone, _, both = [train.validate(network, cases, (32, 32, 32), FLOAT32, rank, world, torch.device("cpu"))
                      for rank, world in ((0, 1), (0, 2), (1, 2))]
    assert min(alone) > 0.01 and both == pytest.approx(alone) and (shares[0] != shares[1]).all()


def test_an_epoch_that_ends_in_nan_is_not_saved(call, cohort, tmp_path, monkeypatch):
    compute_losses, steps = train.compute_losses, []

    def poisoned(*arguments):
        steps.append(compute_losses(*arguments))
        if len(steps) == 6:    # epoch 2's last loss is a number, the weights that it leads to are not
            steps[-1].register_hook(lambda gradient: gradient * math.nan)
        return steps[-1]

    arguments = "--data", cohort, "--out", tmp_path, *SMALL, "--cache", "none"
    monkeypatch.setattr(train, "compute_losses", poisoned)
    (line,) = call("train.py", *arguments, ok=2)[2].splitlines()
    assert re.match("train.py: error: epoch 2.* not finite.*--lr", line)
    for name in ("last.pt", "best.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["epoch"] == 1 and all(weight.isfinite().all() for weight in saved["model"].values())
    assert [row["epoch"] for row in read_rows(tmp_path / "log.csv")] == ["1"]
    call("train.py", *arguments, ok=0)    # the same command goes on
    assert torch.load(tmp_path / "last.pt", weights_only=True)["finished"]


@pytest.mark.parametrize("change, message", [
    (("--lr", "3e-3"), "lr 0.0001, expected 0.003"), (("--epochs", 2), "epochs 1, expected 2"),
    (("--filters", 16), "filters 8, expected 16"), (("--fold", 1), "fold '0', expected '1'"),
    (("--data", "fewer"), "train_cases ["), ((), "precision 'float32', expected 'bfloat16'")],
    ids=lambda value: "")
def test_another_runs_checkpoint_is_refused(call, cohort, checkpoint, tmp_path, monkeypatch, change, message):
    shutil.copytree(cohort, tmp_path / "fewer")    # one of the cases it was trained on is gone
    shutil.rmtree(tmp_path / "fewer" / torch.load(checkpoint, weights_only=True)["train_cases"][0])
    monkeypatch.chdir(tmp_path)
    before = (checkpoint.parent / "last.pt").read_bytes()
    run = "--data", cohort, "--out", checkpoint.parent, "--folds", 2, *TINY
    if not change:    # a machine that has it
        monkeypatch.setattr(train, "choose_precision", lambda *_: torch.bfloat16)
    assert message in call("train.py", *run, *change, ok=2)[2]
    assert (checkpoint.parent / "last.pt").read_bytes() == before


@pytest.mark.parametrize("variables, message", [
    ({"LOCAL_RANK": "3"}, "nproc_per_node.* 2 GPUs"),
    ({"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
     "--max-restarts 1.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")], ids=["more ranks than GPUs", "one store"])
def test_ranks_that_could_not_meet_are_refused(call, cohort, tmp_path, monkeypatch, variables, message):
    for name, value in {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "TORCHELASTIC_MAX_RESTARTS" not in variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (line,) = call("train.py", "--data", cohort, "--out", tmp_path / "out", *TINY, ok=2)[2].splitlines()
    assert re.search(message, line) and not (tmp_path / "out").exists()
