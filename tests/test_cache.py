"""The cache of prepared cases: its samples are the uncached ones in float16, and an entry is believed only if it is one."""

import os
import pickle
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from data import InputError, check_cache, find_cases, load_case, load_volumes, normalize, prepare, random_crop, random_flip, case_generator, labels_to_regions
from infer import brain_box
from test_interrupted import SMALL
from test_trust import Payload, limited
from train import Crops


@pytest.fixture
def case(cohort, tmp_path):
    """A case of its own, so that its files may be changed."""
    shutil.copytree(cohort / "BraTS2021_00002", tmp_path / "data" / "BraTS2021_00002")
    return find_cases(tmp_path / "data")[0]


def entry_of(cache):
    (path,) = cache.iterdir()
    return path


# smaller than the brain, within it along one axis, and larger than the volume (32x32x32, the brain about 19x24x29)
@pytest.mark.parametrize("size", [(16, 16, 16), (24, 32, 16), (40, 32, 48)])
def test_samples_are_the_uncached_ones_rounded_to_float16_when_the_cache_fills_and_when_it_is_warm(case, tmp_path, size):
    schedule = [(epoch, case) for epoch in range(6)]
    uncached, cached = Crops(schedule, size, 3), Crops(schedule, size, 3, tmp_path)
    filling = cached[0]
    assert entry_of(tmp_path / "data").name and len(list(tmp_path.glob("*.npy"))) == 1
    for index in range(6):
        image, labels, seed, name = cached[index]
        whole, whole_labels, whole_seed, _ = uncached[index]
        assert image.dtype == torch.float16 and torch.equal(image, whole.half())
        assert labels.dtype == torch.uint8 and torch.equal(labels, whole_labels) and seed == whole_seed and name == case.name
        # against the parts that stand in section 3.4's order
        stored, target, _ = load_case(case)
        generator = case_generator(3, index, case.name)
        crop = random_crop(normalize(stored), target, size, generator)
        expected, expected_target = random_flip(*crop, generator)
        assert torch.equal(whole, expected) and torch.equal(labels_to_regions(whole_labels[0]), expected_target)
    assert all(torch.equal(one, other) for one, other in zip(filling[:2], cached[0][:2]))


def test_labels_beyond_the_brain_are_kept(case, tmp_path):
    file = nib.load(case.label)
    labels = np.asarray(file.dataobj).copy()
    labels[0, 0, 0] = 2
    nib.save(nib.Nifti1Image(labels, file.affine, file.header), case.label)
    (labels, whole), (cached, _) = Crops([(0, case)], (32, 32, 32), 0)[0][1::-1], Crops([(0, case)], (32, 32, 32), 0, tmp_path)[0][1::-1]
    assert torch.equal(labels, cached) and labels.sum() == load_volumes(case)[1].sum()


def test_an_entry_holds_the_brain_and_no_more(case, tmp_path):
    entry = prepare(case, tmp_path / "data" / "BraTS2021_00002")
    box = brain_box(load_case(case)[0])
    assert entry.corner == tuple(lo for lo, _ in box) and entry.image.shape[1:] == tuple(hi - lo for lo, hi in box) and entry.shape == (32, 32, 32)
    size = next((tmp_path / "data" / "BraTS2021_00002").glob("*.npy")).stat().st_size
    assert 9 * entry.labels.numel() < size < 9 * entry.labels.numel() + 1000    # two bytes a channel, one for the label


def test_an_entry_is_made_anew_when_a_source_changes(case, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    prepare(case, cache)
    before, mapped = entry_of(cache).stat().st_mtime_ns, prepare(case, cache)
    assert entry_of(cache).stat().st_mtime_ns == before, "made again without need"
    other = find_cases(tmp_path / "data")[0].images[1]
    shutil.copy(other, case.images[0])
    changed = prepare(case, cache)
    assert torch.equal(changed.image[0], changed.image[1]) and not torch.equal(mapped.image[0], mapped.image[1])
    assert entry_of(cache).stat().st_mtime_ns > before


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "another array", "pickle", "a folder"])
def test_what_is_no_whole_entry_is_made_anew(case, tmp_path, damage):
    cache = tmp_path / "cache"
    cache.mkdir()
    expected = prepare(case, cache)
    expected = expected._replace(image=expected.image.clone(), labels=expected.labels.clone())
    path = entry_of(cache)
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "another array":
        np.save(path, np.zeros((1, 3)))
    else:
        path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "text": b"hello", "pickle": pickle.dumps(Payload(tmp_path / "ran"))}[damage])
    for _ in range(2):
        found = prepare(case, cache)
        assert torch.equal(found.image, expected.image) and torch.equal(found.labels, expected.labels) and found[2:] == expected[2:]
    assert not (tmp_path / "ran").exists() and (damage == "a folder" or path.read_bytes() == content)


def test_a_case_that_cannot_be_read_leaves_no_entry(case, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    case.images[2].write_bytes(b"nothing")
    with pytest.raises(InputError, match="_t2"):
        prepare(case, cache)
    assert not list(cache.iterdir())


def test_cohorts_that_share_names_share_no_entry(cohort, case, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    twin = find_cases(cohort)[2]
    prepare(case, cache), prepare(twin, cache)
    assert twin.name == case.name and len(list(cache.iterdir())) == 2


def test_room_is_counted_and_too_little_is_said(cohort, tmp_path, monkeypatch):
    cases = find_cases(cohort)
    check_cache(tmp_path / "cache", cases)    # leaves the first case's entry
    missing = 5 * entry_of(tmp_path / "cache").stat().st_size
    for free, enough in ((missing + 1, True), (missing, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": free}))
        room, told = check_cache(tmp_path / "cache", cases)
        assert room is enough and ("too little" in told) is not enough


def test_a_run_that_fills_the_cache_equals_one_that_finds_it_warm_and_a_full_disk_only_costs_time(run, cohort, tmp_path):
    arguments = ["--data", cohort, *SMALL, "--epochs", 1]
    (tmp_path / "in the way").touch()
    ends = {}
    for out, cache in (("filling", tmp_path / "cache"), ("warm", tmp_path / "cache"), ("uncached", "none"), ("no folder", tmp_path / "in the way")):
        done = run("train.py", *arguments, "--out", tmp_path / out, "--cache", cache, ok=0)
        assert ("every sample is read from its files" in done.stdout) is (out == "no folder")
        ends[out] = torch.load(tmp_path / out / "last.pt", weights_only=True)["views"]
    for one, other, equal in (("filling", "warm", True), ("uncached", "no folder", True), ("warm", "uncached", False)):
        assert all(torch.equal(ends[one][name], ends[other][name]) for name in ends[one]) is equal, (one, other)
    for name in ends["warm"]:    # float16's rounding apart
        torch.testing.assert_close(ends["warm"][name], ends["uncached"][name], atol=0.02, rtol=0)
    assert os.listdir(tmp_path / "filling").count("last.pt") == 1


def test_a_disk_that_is_full_while_the_cache_fills_leaves_no_torn_entry(case, tmp_path):
    # the data command's process limit stands in for the disk: entries of this case are larger than it, its checkpoint is not written at all
    code = (f"import sys; sys.path.insert(0, {os.getcwd()!r}); from pathlib import Path; from data import *; "
            f"entry = prepare(find_cases(Path({str(tmp_path / 'data')!r}))[0], Path({str(tmp_path)!r})); print(entry.image.dtype)")
    (tmp_path / "code.py").write_text(code)
    done = limited(tmp_path / "code.py", file_size=20_000)
    assert done.stdout.strip() == "torch.float16" and not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))
