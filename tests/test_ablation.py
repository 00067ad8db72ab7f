"""The ablation: what its arms change, who is held out, cases made smaller, and all of it in miniature."""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import ablation
from ablation import QUICK, Run, arms, data, infer, tables, train


@pytest.fixture(scope="module")
def seven(call, tmp_path_factory):
    """The folder of as few cases as a study can have, 32x32x32."""
    folder = tmp_path_factory.mktemp("seven")
    call("phantom.py", folder, "--cases", 7, "--shape", 32, 32, 32, ok=0)
    return folder


def test_with_is_trained_as_train_py_trains(call, seven, tmp_path):
    call("train.py", "--data", seven, "--fold", "all", "--epochs", 2, "--crop", *QUICK.crop, "--filters", 8,
         "--pool", 4, "--dim", 16, "--lr", 5e-3, "--seed", 3, "--workers", 1, "--out", tmp_path, ok=0)
    theirs = torch.load(tmp_path / "last.pt", weights_only=True)["views"]
    views = ablation.fit(Run("", 7, "with", 3), QUICK._replace(steps=14), data.find_cases(seven), None)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in views.state_dict().items())


def test_arms_start_alike_and_see_the_same_samples(seven, monkeypatch):
    def train_on(arm, seed=0):
        seen = []

        def look(views, image, labels, views_seed, *_):
            numbers = [*views.network.parameters(), image, labels, torch.tensor(views_seed)]
            seen.append(torch.cat([tensor.detach().flatten().double() for tensor in numbers]))
            return torch.zeros(5, requires_grad=True)

        monkeypatch.setattr(train, "compute_losses", look)
        ablation.fit(Run("", 7, arm, seed), QUICK, data.find_cases(seven), None)
        return torch.stack(seen)

    first = train_on("without")
    assert all(torch.equal(train_on(arm), first) for arm in arms(QUICK))
    assert len(first.unique(dim=0)) == 4 and not torch.equal(train_on("with", seed=1), first)


def test_one_view_is_view_a_of_the_other_arms():
    images, labels = torch.rand(2, 4, 8, 8, 8), torch.ones(2, 1, 8, 8, 8)
    expected = data.augment(images, labels, torch.Generator().manual_seed(0))
    with patch.object(*arms(QUICK)["one view"].instead):
        views = train.augment(images, labels, torch.Generator().manual_seed(0))
    assert all(torch.equal(view, a) for pair, (a, _) in zip(views, expected) for view in pair)


def test_uncentred_is_equation_2_to_the_letter():
    z_a, z_b = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]])
    with patch.object(*arms(QUICK)["uncentred"].instead):
        invariance, redundancy = train.barlow_twins_terms(z_a, z_b)
    assert (invariance.item(), redundancy.item()) == pytest.approx(((1 - 8 / 80**0.5) ** 2, 0))


def test_56_patients_are_16_held_out_and_40_or_10():
    names = [f"BraTS-GLI-{i:05}-00{time}" for i in range(56) for time in range(2)]
    cases = [data.Case(name, name[:-4], (), Path(name), None) for name in names]
    held_out, rest = ablation.choose_cases(cases)
    assert held_out + rest == sum(data.split_folds(cases[::2], 56, 0), [])    # of a patient the first
    assert (len(held_out), len(rest)) == (16, 40)
    runs, few_runs = (ablation.plan(ablation.SIZES[scale], {"real": (held_out, rest)}) for scale in (4, 2))
    assert (len(runs), len(few_runs)) == (54, 11) and {run.cases for run in runs} == {10, 40}
    for each in runs:
        to_train, to_validate = map(set, ablation.divide(rest, each))
        assert (len(to_train), len(to_validate)) == ((each.cases, 0) if each.fold < 0 else (32, 8))
        assert not to_train & to_validate and to_train | to_validate <= set(rest)


def test_a_case_made_smaller_by_hand():
    image, target = torch.zeros(4, 5, 2, 2), torch.zeros(3, 5, 2, 2, dtype=torch.bool)
    image[0, :2] = torch.arange(1.0, 9).view(2, 2, 2)
    image[:2, 2] = torch.tensor([[10, 20], [30, 40]])   # half of a block
    image[1, 2, 1, 1] = 0                               # less
    image[0, 4] = torch.tensor([[1, 2], [3, 6]])        # at the border, where half of a block is missing
    target[2, :2] = True
    target[1].view(-1)[:5] = True                       # five of eight
    target[0, 0] = target[2, 2] = target[2, 4] = True   # exactly half
    image, target = ablation.make_smaller(image, target, 2)
    assert image.flatten(1).tolist() == [[4.5, 25, 3], [0] * 3, [0] * 3, [0] * 3]
    assert target.flatten(1).tolist() == [[False] * 3, [True, False, False], [True, False, False]]


def test_perturbations_do_what_they_say_to_the_brain():
    image, drawn = torch.zeros(4, 24, 24, 24), torch.Generator().manual_seed(0)
    image[:, 4:20, 4:20, 4:20] = 100 + 10 * torch.randn(4, 16, 16, 16, generator=drawn)
    brain = image != 0
    perturbed = {condition: ablation.perturb(image, condition, drawn) for condition in tables.CONDITIONS}
    assert torch.equal(perturbed.pop("as trained"), image)
    assert not any(volume[~brain].any() for volume in perturbed.values())
    assert (perturbed["noise"] - image)[brain].std().item() == pytest.approx(20, rel=0.05)
    assert 0.2 < torch.log(perturbed["bias field"][brain] / image[brain]).std() < 0.5
    for before, after in zip(image, perturbed["contrast"]):
        most, inside = before.max(), (before != 0) & (before < before.max())
        power = torch.log(after[inside] / most) / torch.log(before[inside] / most)
        assert power.std() < 0.01 and 4 < max(power.mean(), 1 / power.mean()) < 5


def test_the_whole_study_in_miniature(run, call, seven, tmp_path):
    study = "--data", seven, "--quick", "--out", tmp_path
    done = run("benchmarks/ablation.py", *study, ok=0).stdout
    assert "21 networks, 21 to do" in done and "\nanswers\n" in done and "\nterm, noise\n" in done
    assert done.endswith(run("benchmarks/tables.py", tmp_path, ok=0).stdout)
    scores = (tmp_path / "scores.csv").read_bytes()
    rows = tables.read(tmp_path / "scores.csv")
    row, _ = tables.of(rows, cases="2", arm="with", seed="1", condition="as trained")
    small, original = (next(case for case in data.find_cases(root) if case.name == row["case"])
                       for root in (tmp_path / "cohorts", seven))
    image, truth, affine = data.load_case(small)
    _, whole, its_affine = data.load_case(original)
    assert np.array_equal(truth, whole.numpy().reshape(3, 8, 4, 8, 4, 8, 4).mean((2, 4, 6)) > 0.5)
    assert np.array_equal(affine, its_affine * [4, 4, 4, 1])
    network = ablation.SegResNet(filters=8).eval()
    network.load_state_dict(torch.load(tmp_path / "models" / "real_2_with_1_-1.pt", weights_only=True))
    with ablation.choose_device()[2]:
        labels = data.regions_to_labels(infer.predict(network, data.normalize(image), QUICK.crop) > 0.5)
    found = [float(row[column]) for column in infer.COLUMNS]
    assert found == pytest.approx(infer.score(labels, truth, (4, 4, 4)), rel=1e-3)
    assert run("benchmarks/ablation.py", *study, ok=0).stdout.count(" 0 to do") == 2
    assert (tmp_path / "scores.csv").read_bytes() == scores
    assert "--scale 4" in call("ablation.py", *study, "--scale", 2, ok=2)[2]
