"""The cache of prepared cases: samples are the same with and without it, and an entry is believed only if it is one."""

import os
import pickle
import random
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.multiprocessing

import data
from data import InputError, brain_box, case_generator, check_cache, find_cases, labels_to_regions, load_case, load_volumes, normalize, prepare, random_crop, random_flip
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


def change_voxel(path, voxel, value):
    file = nib.load(path)
    volume = np.asarray(file.dataobj).copy()
    volume[voxel] = value
    nib.save(nib.Nifti1Image(volume, file.affine, file.header), path)


# smaller than the brain, larger along some axes, and larger than the volume (32x32x32, the brain about 19x24x29, or up to two corners)
@pytest.mark.parametrize("to_the_border", [False, True])
@pytest.mark.parametrize("size", [(16, 16, 16), (24, 32, 16), (40, 32, 48)])
def test_samples_are_the_same_without_a_cache_while_it_fills_and_when_it_is_warm(case, tmp_path, size, to_the_border):
    if to_the_border:
        change_voxel(case.images[1], (0, 0, 31), 500)
        change_voxel(case.images[3], (31, 31, 0), 500)
    schedule = [(epoch, case) for epoch in range(6)]
    uncached, cached = Crops(schedule, size, 3), Crops(schedule, size, 3, tmp_path)
    filling = cached[0]
    assert len(list(tmp_path.glob("*.case"))) == 1
    for index in range(6):
        image, labels, seed, name = cached[index]
        whole, whole_labels, whole_seed, _ = uncached[index]
        assert image.dtype == torch.float16 and torch.equal(image, whole)
        assert labels.dtype == torch.uint8 and torch.equal(labels, whole_labels) and seed == whole_seed and name == case.name
        # against the parts that stand in section 3.4's order
        stored, target, _ = load_case(case)
        generator = case_generator(3, index, case.name)
        crop = random_crop(normalize(stored), target, size, generator)
        expected, expected_target = random_flip(*crop, generator)
        assert torch.equal(whole, expected.half()) and torch.equal(labels_to_regions(whole_labels[0]), expected_target)
    assert all(torch.equal(one, other) for one, other in zip(filling[:2], cached[0][:2]))


def test_labels_beyond_the_brain_are_kept(case, tmp_path):
    change_voxel(case.label, (0, 0, 0), 2)
    (labels, whole), (cached, _) = Crops([(0, case)], (32, 32, 32), 0)[0][1::-1], Crops([(0, case)], (32, 32, 32), 0, tmp_path)[0][1::-1]
    assert torch.equal(labels, cached) and labels.sum() == load_volumes(case)[1].sum()


def test_an_entry_holds_the_brain_and_no_more(case, tmp_path):
    entry = prepare(case, tmp_path / "data" / "BraTS2021_00002")
    box = brain_box(load_case(case)[0].any(0))
    assert entry.corner == tuple(lo for lo, _ in box) and entry.image.shape[1:] == tuple(hi - lo for lo, hi in box) and entry.shape == (32, 32, 32)
    size = next((tmp_path / "data" / "BraTS2021_00002").glob("*.case")).stat().st_size
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


@pytest.mark.parametrize("damage", ["cut off", "a byte more", "empty", "text", "an archive", "pickle", "a folder"])
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
    else:
        path.write_bytes({"cut off": content[:-1], "a byte more": content + b"0", "empty": b"", "text": b"hello " * 100, "an archive": b"PK\3\4" + content[4:],
                          "pickle": pickle.dumps(Payload(tmp_path / "ran"))}[damage])
    for _ in range(2):
        found = prepare(case, cache)
        assert torch.equal(found.image, expected.image) and torch.equal(found.labels, expected.labels) and found[2:] == expected[2:]
    assert not (tmp_path / "ran").exists() and (damage == "a folder" or path.read_bytes() == content)


def test_no_byte_of_what_an_entry_says_of_itself_can_change_unseen(case, tmp_path):
    prepare(case, tmp_path)
    path = next(tmp_path.glob("*.case"))
    content = path.read_bytes()
    with open(path, "r+b") as file:    # the same file throughout: a rename would cost most of the time
        stamp = np.frombuffer(content[:80], np.int64).tolist()
        for position in range(8 * data.FACTS):
            file.seek(position)
            file.write(bytes([content[position] ^ random.Random(position).randrange(1, 256)]))
            file.flush()
            with pytest.raises(ValueError):
                data.map_entry(path, stamp)
            file.seek(position)
            file.write(content[position : position + 1])
    assert data.map_entry(path, stamp).shape == (32, 32, 32)


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


def set_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": free}))


def fill(rank, folder, together):
    case = find_cases(folder / "data")[0]
    for _ in range(20):
        together.wait()
        prepared = prepare(case, folder / "cache")
        assert prepared.image.isfinite().all()
        together.wait()
        if rank == 0:
            entry_of(folder / "cache").unlink()


def test_processes_may_fill_the_same_entry_at_once(case, tmp_path):
    (tmp_path / "cache").mkdir()
    context = torch.multiprocessing.get_context("spawn")
    torch.multiprocessing.spawn(fill, (tmp_path, context.Barrier(2)), nprocs=2)
    assert not list((tmp_path / "cache").iterdir())


def test_two_that_write_one_file_do_not_meet_even_with_the_same_process_number(tmp_path):
    path = tmp_path / "a.case"
    with data.whole_file(path) as one:
        one.write_text("one")
        with data.whole_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_room_is_counted_for_the_missing_cases_and_too_little_is_said(cohort, tmp_path, monkeypatch):
    cases, cache = find_cases(cohort), tmp_path / "cache"
    cache.mkdir()
    for case in cases[3:]:    # another fold's
        prepare(case, cache)
    check_cache(cache, cases[:3])    # leaves the first case's entry
    missing = 2 * data.entry_path(cache, cases[0]).stat().st_size
    for free, enough in ((missing, True), (missing - 1, False), (-data.SPARE, False)):
        set_free(monkeypatch, data.SPARE + free)
        room, told = check_cache(cache, cases[:3])
        assert room is enough and ("too little" in told) is not enough
    set_free(monkeypatch, 0)
    assert check_cache(cache, cases[3:])[0], "complete: nothing more is needed"
    room, told = check_cache(tmp_path / "other", cases)
    assert not room and "no room" in told and len(told.splitlines()) == 1 and not list((tmp_path / "other").iterdir())


def test_the_cache_leaves_room_for_checkpoints(case, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    for free, entries in ((data.SPARE, 0), (data.SPARE + 1, 1)):
        set_free(monkeypatch, free)
        prepare(case, cache)
        assert len(list(cache.iterdir())) == entries


def test_a_run_is_the_same_while_the_cache_fills_and_when_it_is_warm_without_it_and_without_room(run, cohort, tmp_path):
    arguments = ["--data", cohort, *SMALL, "--epochs", 1]
    (tmp_path / "in the way").touch()
    ends = {}
    for out, cache in (("filling", tmp_path / "cache"), ("warm", tmp_path / "cache"), ("uncached", "none"), ("no folder", tmp_path / "in the way")):
        done = run("train.py", *arguments, "--out", tmp_path / out, "--cache", cache, ok=0)
        assert done.stdout.count("read from the cases' files") == (out == "no folder")
        assert done.stdout.count("more are needed") == (out in ("filling", "warm"))
        ends[out] = torch.load(tmp_path / out / "last.pt", weights_only=True)["views"]
    for out in ("warm", "uncached", "no folder"):
        assert all(torch.equal(tensor, ends["filling"][name]) for name, tensor in ends[out].items()), out
    assert len(list((tmp_path / "cache").glob("*.case"))) == len(torch.load(tmp_path / "warm" / "last.pt", weights_only=True)["train_cases"])


# train.py on a disk that is full once two entries are in the cache
FULL_SOON = f"""
import shutil, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(data.__file__)!r})
import train
cache, real = Path(sys.argv[sys.argv.index("--cache") + 1]), shutil.disk_usage
shutil.disk_usage = lambda path: real(path)._replace(free=0 if len(list(cache.glob("*.case"))) == 2 else 10**12)
train.main()
"""


def test_a_disk_that_fills_up_during_the_first_epoch_is_said_once_and_changes_nothing(run, cohort, tmp_path):
    (tmp_path / "full_soon.py").write_text(FULL_SOON)
    ends = []
    for script, cache in ((tmp_path / "full_soon.py", tmp_path / "cache"), ("train.py", "none")):
        done = run(script, "--data", cohort, *SMALL, "--out", tmp_path / f"run{len(ends)}", "--cache", cache, ok=0)
        ends.append(torch.load(tmp_path / f"run{len(ends)}" / "last.pt", weights_only=True)["views"])
        lines = done.stdout.splitlines()
        said = [i for i, line in enumerate(lines) if "too little" in line]
        assert (len(said) == 1 and lines[said[0] - 1].startswith("epoch 1/")) if len(ends) == 1 else not said
    assert len(list((tmp_path / "cache").glob("*.case"))) == 2
    assert all(torch.equal(tensor, ends[0][name]) for name, tensor in ends[1].items())


def test_a_disk_that_is_full_while_the_cache_fills_leaves_no_torn_entry(case, tmp_path):
    # the data command's process limit stands in for the disk: entries of this case are larger than it, its checkpoint is not written at all
    code = (f"import sys; sys.path.insert(0, {os.getcwd()!r}); from pathlib import Path; from data import *; "
            f"entry = prepare(find_cases(Path({str(tmp_path / 'data')!r}))[0], Path({str(tmp_path)!r})); print(entry.image.dtype)")
    (tmp_path / "code.py").write_text(code)
    done = limited(tmp_path / "code.py", file_size=20_000)
    assert done.stdout.strip() == "torch.float16" and not list(tmp_path.glob("*.case")) and not list(tmp_path.glob(".*"))
