"""Cohorts as they come: one cohort in five namings, what names and labels mean, what is refused or said.

The tables here follow the datasets' own descriptions; data.py's table is what they test.
"""

import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import infer
import phantom
import train
from conftest import TINIER, read_rows, voxels
from data import InputError, find_cases, load_case

LABELS = {"brats2021": (1, 2, 4), "brats2023": (1, 2, 3), "ucsf": (1, 2, 4), "upenn": (1, 2, 4),
          "decathlon": (2, 1, 3)}    # of necrosis, oedema, enhancing tumour
SMALL = *TINIER, "--cache", "none"
OLD, NEW = "_t1 _t1ce _t2 _flair _seg", "-t1n -t1c -t2w -t2f -seg"


def number(name):
    """Which of the phantom's cases it is, whatever the layout: UPENN-GBM-00003_11 is 3."""
    return int(re.search(r"[-_](\d+)", name)[1])


def regions_by_hand(labels, necrosis=1, oedema=2, enhancing=4):
    et, tc = labels == enhancing, (labels == enhancing) | (labels == necrosis)
    return np.stack([et, tc, tc | (labels == oedema)])


def recoded(labels, necrosis, oedema, enhancing):
    """Labels 1, 2, 4 as another cohort's."""
    return np.array([0, necrosis, oedema, 0, enhancing], np.uint8)[labels]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A folder for each layout of the same four cases, 32x32x32."""
    root = tmp_path_factory.mktemp("layouts")
    for i in range(4):
        case = phantom.make_case((32, 32, 32), 0, i)
        [phantom.save_case(root / like, like, i, *case) for like in LABELS]
    return root


# ---- the same voxels in five layouts ----------------------------------------------------------------------


@pytest.mark.parametrize("like", LABELS)
def test_images_and_targets_are_those_the_phantom_drew(layouts, like):
    cases = find_cases(layouts / like)
    assert [number(case.name) for case in cases] == [0, 1, 2, 3] == [number(case.patient) for case in cases]
    for case in cases:
        image, target, affine = load_case(case)
        images, labels = phantom.make_case((32, 32, 32), 0, number(case.name))
        assert np.array_equal(voxels(case.label), recoded(labels, *LABELS[like]))
        assert np.array_equal(image, images) and np.array_equal(target, regions_by_hand(labels))
        assert affine.tolist() == [[-1, 0, 0, 0], [0, -1, 0, 31], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_an_epoch_of_training_is_the_same_in_each(layouts, tmp_path, monkeypatch, call):
    # A sample depends on its case's name; here on its number alone, so that the five runs draw alike.
    ends, draw = [], train.case_generator
    monkeypatch.setattr(train, "case_generator", lambda seed, epoch, name: draw(
        seed, epoch, name if name == "order" else str(number(name))))
    for like in LABELS:
        entries = [{"fold": number(case.name) % 2, "label": str(case.label.relative_to(layouts))}
                   for case in find_cases(layouts / like)]
        (tmp_path / f"{like}.json").write_text(json.dumps({"training": entries}))
        call("train.py", "--data", layouts / like, "--fold-list", tmp_path / f"{like}.json", "--fold", 1,
             "--out", tmp_path / like, *SMALL, ok=0)
        ends.append(torch.load(tmp_path / like / "last.pt", weights_only=True))
        assert [[*map(number, ends[-1][names])] for names in ("train_cases", "val_cases")] == [[0, 2], [1, 3]]
        assert all(torch.equal(weight, ends[0]["views"][name]) for name, weight in ends[-1]["views"].items())
        assert all(ends[-1]["log"][0][key] == ends[0]["log"][0][key] for key in ("loss", "barlow", "dice_wt"))


def test_predictions_are_in_the_layouts_own_labels(layouts, networks, tmp_path, call):
    tables, painted = [], {}    # {number: what brats2021 holds}
    for like in LABELS:
        out, table = tmp_path / like, tmp_path / f"{like}.csv"
        call("infer.py", layouts / like, "--checkpoints", networks[0], "--out", out, ok=0)
        for case in find_cases(layouts / like):
            written, source = nib.load(out / f"{case.name}.nii.gz"), nib.load(case.images[0])
            same = painted.setdefault(number(case.name), np.asarray(written.dataobj))
            assert set(np.unique(same)) == {0, 1, 2, 4} and written.shape == (32, 32, 32)
            assert np.array_equal(written.dataobj, recoded(same, *LABELS[like]))
            assert np.array_equal(written.affine, source.affine) and written.header["xyzt_units"] == 2    # mm
        rows = read_rows(table)    # brats2021's are test_infer.py's
        tables.append([[row[column] for column in infer.COLUMNS] for row in rows])
        assert tables[-1] == tables[0] and len(rows) == 4
        table.unlink()
        call("infer.py", layouts / like, "--score", out, ok=0)    # from the files as from memory
        assert read_rows(table) == rows


def test_predictions_in_another_years_labels_are_refused(layouts, tmp_path, call):
    """4 is background in BraTS 2023's own segmentations, but in a prediction it is BraTS 2021's ET."""
    case = find_cases(layouts / "brats2023")[0]
    truth = np.array([0, 1, 2, 4], np.uint8)[voxels(case.label)]
    phantom.save(tmp_path / "out" / f"{case.name}.nii.gz", truth)
    _, printed, _ = call("infer.py", case.label.parent, "--score", tmp_path / "out", ok=1)
    assert f"{case.name}.nii.gz: has label 4, expected 0, 1, 2, 3" in printed
    assert not (tmp_path / "out.csv").exists()


# ---- names, patients, folds -------------------------------------------------------------------------------


def touch(folder, *names):
    """Empty files: finding cases reads listings only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


COHORTS = [    # patient and time point; where a case's files start, and how they end
    ("Brats18_2013_10_1", "", "HGG/{0}/{0}_", "t1 t1ce t2 flair seg"),
    ("BraTS20_Training_001", "", "{0}/{0}_", "t1 t1ce t2 flair seg"),
    ("BraTS2021_00000", "", "images/{0}_", "t1 t1ce t2 flair a/tree/of/its/own/{0}_seg"),
    ("BraTS-GLI-00005", "-101", "{0}/{0}-", "t1n t1c t2w t2f seg"),
    ("BraTS-MET-00086", "-000", "{0}/{0}-", "t1n t1c t2w t2f seg"),
    ("BraTS-GoAT-00001", "", "{0}/{0}-", "t1n t1c t2w t2f seg"),
    ("UCSF-PDGM-0004", "", "{0}_nifti/{0}_", "T1 T1c T2 FLAIR tumor_segmentation"),
    ("UCSF-PDGM-0431", "_FU003d", "{0}_nifti/{0}_", "T1 T1c T2 FLAIR tumor_segmentation"),
    ("UPENN-GBM-00002", "_21", "images_structural/{0}/{0}_", "T1 T1GD T2 FLAIR images_segm/{0}_segm"),
    ("Patient_FUJI_001", "", "{0}/{0}_", "t1 t1ce t2 flair seg")]    # not UCSF's follow-up


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("patient, time, start, ends", COHORTS)
def test_every_cohort_is_found(tmp_path, patient, time, start, ends, ending):
    paths = [(end if "/" in end else start + end).format(patient + time) + ending for end in ends.split()]
    touch(tmp_path, *paths, "survival.csv", "notes.nii.gz", *[f"{Path(path).parent}/._fork_{Path(path).name}"
                                                              for path in paths])
    (case,) = find_cases(tmp_path)
    assert (case.name, case.patient) == (patient + time, patient)
    assert [*case.images, case.label] == [tmp_path / path for path in paths]


def test_a_published_data_list_is_followed(layouts, tmp_path, call):
    path, listed = "TrainingData/BraTS2021_{0:05}/BraTS2021_{0:05}_{1}.nii.gz".format, tmp_path / "list.json"
    entries = [{"fold": fold, "image": [path(i, "flair")], "label": path(i, "seg")}
               for i, fold in [(2, 4), (1467, 0), (0, 0), (3, 4), (1651, 4)]]    # 1467 and 1651 are not here
    listed.write_text(json.dumps({"training": entries}))
    flags = "--data", layouts / "brats2021", "--fold-list", listed, "--fold", 4, "--out", tmp_path, *SMALL
    _, printed, _ = call("train.py", *flags, ok=0)
    assert f"{listed}: 2 of its cases are not in --data, 1 of --data are not in it and are left" in printed
    call("train.py", *flags, "--fold", "all", "--out", tmp_path / "all", ok=0)
    for out, divided in (tmp_path, [[0], [2, 3]]), (tmp_path / "all", [[0, 2, 3], []]):
        last = torch.load(out / "last.pt", weights_only=True)
        assert [[*map(number, last[names])] for names in ("train_cases", "val_cases")] == divided
    for text in ("{", "[]", '{"training": [{"label": "a_seg.nii.gz"}]}', '{"training": [{"fold": 0}]}'):
        listed.write_text(text)
        assert f"error: --fold-list {listed}: " in call("train.py", *flags, ok=2)[2]


def test_other_names_are_told_by_names_and_labels(layouts, networks, tmp_path, call):
    root, names, labels = layouts / "upenn", "_T1 _T1GD _T2 _FLAIR _segm", ((1,), (2,), (4,))
    for told, case in zip(find_cases(root, names.split(), labels), find_cases(root), strict=True):
        assert told[:4] == case[:4] and all(map(np.array_equal, load_case(told), load_case(case)))
    for line in (["data.py", root], ["train.py", "--data", root, "--fold", "all", "--out", tmp_path, *SMALL],
                 ["infer.py", root, "--checkpoints", networks[0], "--out", tmp_path / "out"]):
        printed = call(*line, "--names", names, "--labels", 1, 2, 4, ok=0)[1]
        assert "named as these --names; labels 1 2 4" in printed
    for names, labels in (names.split(), None), (None, ((0,), (1,), (4,))):
        with pytest.raises(InputError, match="--labels"):
            find_cases(root, names, labels)


# ---- nothing is taken for something else ------------------------------------------------------------------


def write_case(folder, suffixes, labels):
    """A case of random images of the shape of `labels`, in `folder` and of its name -> the folder."""
    images = np.random.default_rng(0).integers(1, 1000, (4, *labels.shape), np.int16)
    for suffix, volume in zip(suffixes.split(), (*images, labels), strict=True):
        phantom.save(folder / f"{folder.name}{suffix}.nii.gz", volume)
    return folder


@pytest.mark.parametrize("flag, meaning", [("1 2 3", ((1,), (2,), (3,))), ("2,3 4 1", ((2, 3), (4,), (1,)))])
def test_pediatric_labels_are_told_or_refused(tmp_path, call, flag, meaning):
    stored = np.random.default_rng(1).choice(np.array([0, *sum(meaning, ())], np.uint8), (8, 8, 8))
    root = write_case(tmp_path / "BraTS-PED-00001-000", NEW, stored)
    assert "expected --labels" in call("data.py", root, ok=2)[2]
    masks = [np.isin(stored, labels) for labels in (meaning[2], meaning[2] + meaning[0], sum(meaning, ()))]
    assert f"ET: mean {masks[0].sum()} voxels" in call("data.py", root, "--labels", *flag.split(), ok=0)[1]
    (case,) = find_cases(root, labels=meaning)
    assert np.array_equal(load_case(case)[1], masks)
    painted, out = np.array([[[0, 1, 2, 4]]], np.uint8), tmp_path / "out.nii.gz"
    data.save_volume(out, painted, case.images[0], case.naming.labels)
    assert voxels(out).flatten().tolist() == [0, *(labels[0] for labels in meaning)]


@pytest.mark.parametrize("name, suffixes, values, enhancing", [
    ("a", OLD, [0, 0.9999, 2.0001, 3.9999], 4),    # integers that were scaled
    ("BraTS-GLI-00001-000", NEW, [0, 1, 2, 3, 4], 3)])    # 4 is the resection cavity: background
def test_labels_are_the_integers_that_they_are_near(tmp_path, name, suffixes, values, enhancing):
    labels = np.resize(np.array(values, np.float32), (5, 5, 5))
    (case,) = find_cases(write_case(tmp_path / name, suffixes, labels))
    assert np.array_equal(load_case(case)[1], regions_by_hand(labels.round(), enhancing=enhancing))


CASE, ODD = "BraTS20_Training_355_", "W39_1998.09.19_Segm.nii"
HERE, FAMOUS = f"{CASE[:-1]}/{CASE}", f"{CASE[:-1]}/{ODD}"
GLI, UCSF, UPENN = "BraTS-GLI-00001-000", "UCSF-PDGM-0004_", "UPENN-GBM-00002_11_"


@pytest.mark.parametrize("image, others, truth", [
    (f"{HERE}t1ce.nii", [FAMOUS], 0), (f"{CASE}t1ce.nii", [ODD], None),    # in the case's own folder alone
    (f"{HERE}t1ce.nii", [FAMOUS, f"{HERE}seg.nii"], 1),
    (f"{HERE}t1ce.nii", [FAMOUS, f"{CASE[:-1]}/old_Segm.nii"], None),
    (f"{CASE}t1ce.nii", ["brain_mask_seg.nii.gz"], None), (f"{CASE}t1ce.nii", ["aparc+aseg.nii.gz"], None),
    (f"{GLI}/{GLI}-t1c.nii.gz", [f"{GLI}/{ODD}"], None),
    ("imagesTs/BRATS_005.nii.gz", ["imagesTs/BRATS_005_seg.nii.gz"], None),
    (f"{UCSF}T1c.nii", [f"{UCSF}brain_segmentation.nii"], None),
    (f"{UCSF}T1c.nii", [f"{UCSF}T1c_bias.nii", f"{UCSF}tumor_segmentation.nii"], 1),
    (f"images_structural/{UPENN}T1GD.nii", [f"automated_segm/{UPENN}segm.nii"], None),
    (f"images_structural/{UPENN}T1GD.nii",
     [f"automated_segm/{UPENN}segm.nii", f"images_segm/{UPENN}segm.nii"], 1)])
def test_only_the_rows_own_suffix_is_the_truth(tmp_path, image, others, truth):
    labels = {case.label for case in find_cases(touch(tmp_path, image, *others))}
    assert labels == {None if truth is None else tmp_path / others[truth]}


@pytest.mark.parametrize("names, found", [
    (["one/a_t1ce.nii", "two/a_t1ce.nii"], ["one/a_t1ce.nii", "two/a_t1ce.nii"]),
    (["a_t1ce.nii", "UCSF-PDGM-0004_T1c.nii"], ["BraTS 2017-2021", "UCSF"]),
    (["BraTS-GLI-00001-000-t1c.nii", "BraTS-PED-00001-000-t1c.nii"], ["BraTS 2023", "PED"]),
    (["a_T1ce.nii"], ["no case", "{t1,t1ce,t2,flair,seg}", "--names", "examples/phantom.py"])])
def test_what_is_not_one_cohort_is_refused(tmp_path, names, found):
    with pytest.raises(InputError) as error:
        find_cases(touch(tmp_path, *names))
    assert all(word in str(error.value) for word in (str(tmp_path), *found))


def test_a_folder_that_may_not_be_listed_is_said(tmp_path, monkeypatch):
    """Its cases would be missing without a word. Permissions would not stop an administrator."""
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=f"{tmp_path}: Permission denied, expected"):
        find_cases(tmp_path)


# ---- what looks unsuitable, what is left out, what is bad -------------------------------------------------


@pytest.mark.parametrize("side, sides, background, found", [
    (130, (1, 1, 1), 160, []), (140, (1, 1, 1), 160, ["skull"]),    # 2.2 and 2.7 litres are not zero
    (60, (0.5, 0.5, 1), 160, ["0.5x0.5x1"]), (60, (1, 1, 5), 160, ["1x1x5"]),
    (60, (1, 1, 1), 80, ["t2"]), (130, (1, 1, 1), 0, ["t2"])])    # t2 in its background: in part, and all
def test_what_looks_unsuitable_is_doubted(side, sides, background, found):
    image = torch.zeros(4, 160, 160, 160)
    image[:, :side, :side, :side] = 1
    image[2, background:] = 1
    doubts = data.doubts(image, np.diag([*sides, 1]))
    assert len(doubts) == len(found) and all(word in doubt for word, doubt in zip(found, doubts))


def test_unsuitable_and_unlabelled_cases_are_said(layouts, networks, tmp_path, call):
    root, run, out = (tmp_path / name for name in ("cohort", "run", "out"))
    shutil.copytree(layouts / "brats2021", root)
    flair = root / "BraTS2021_00001" / "BraTS2021_00001_flair.nii.gz"
    nib.save(nib.Nifti1Image(np.maximum(voxels(flair), 7), nib.load(flair).affine), flair)
    for path in (root / "BraTS2021_00003").iterdir():
        nib.save(nib.Nifti1Image(voxels(path), np.diag([-0.5, -0.5, 5, 1])), path)
    (root / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    checked, trained, predicted = (call(*line, ok=0)[1] for line in (
        ["data.py", root], ["train.py", "--data", root, "--fold", "all", "--out", run, *SMALL, "--epochs", 2],
        ["infer.py", root, "--checkpoints", networks[0], "--out", out]))
    background, slices = re.findall("warning: (.*)", checked)
    assert re.search(r"BraTS2021_00001: flair is not zero in 100% of the volume, t1 in \d\d%,", background)
    assert re.search("BraTS2021_00003.*0.5x0.5x5", slices)
    for printed in (trained, predicted):
        (warning,) = re.findall("warning: (.*unsuitable.*)", printed)
        assert warning.startswith("2 cases look") and "data.py" in warning
    assert "1 cases have no segmentation: BraTS2021_00002" in checked and len(os.listdir(out)) == 4
    assert "1 cases have no segmentation and are left out" in trained
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["train_cases"] == ["BraTS2021_00000", "BraTS2021_00001", "BraTS2021_00003"]
    assert last["val_cases"] == [] and last["log"][0]["dice_wt"] == ""
    assert sorted(os.listdir(run)) == ["last.pt", "log.csv"]    # no best.pt


def test_three_channels_where_four_belong_are_refused(layouts, tmp_path):
    bad = find_cases(shutil.copytree(layouts / "decathlon", tmp_path / "cohort"))[0]
    phantom.save(bad.images[0], np.ones((32, 32, 32, 3), np.int16))
    with pytest.raises(InputError, match=f"{bad.images[0]}: cannot be read"):
        load_case(bad)


# ---- real cases -------------------------------------------------------------------------------------------


def lay_out(folder, like, case, i):
    """A BraTS 2021 case as the i-th of another layout: links, but for stacked channels and the labels."""
    name, image, suffixes, label, _ = phantom.LAYOUTS[like]
    paths = [folder / f"{image.format(name.format(i), suffix)}.nii.gz" for suffix in suffixes]
    label = folder / f"{label.format(name.format(i))}.nii"
    [path.parent.mkdir(parents=True, exist_ok=True) for path in (*paths, label)]
    if like == "decathlon":
        stack = np.stack([voxels(case.images[modality]) for modality in (3, 0, 1, 2)], -1)
        nib.save(nib.Nifti1Image(stack, nib.load(case.images[0]).affine), paths[0].with_suffix(""))
    else:
        [path.symlink_to(image) for path, image in zip(paths, case.images)]
    stored = recoded(voxels(case.label).astype(np.uint8), *LABELS[like])
    nib.save(nib.Nifti1Image(stored, nib.load(case.label).affine), label)


@pytest.mark.skipif(not os.environ.get("BRATS_DATA"), reason="BRATS_DATA names no folder of real cases")
def test_real_cases_are_the_same_in_every_layout(tmp_path):
    for i, case in enumerate(find_cases(os.environ["BRATS_DATA"])[:2]):
        images, labels = np.stack([voxels(path) for path in case.images]), voxels(case.label)
        for like in LABELS:
            lay_out(tmp_path / like, like, case, i)
            image, target, affine = load_case(find_cases(tmp_path / like)[i])
            assert np.array_equal(image, images) and np.array_equal(target, regions_by_hand(labels))
            assert np.allclose(affine, nib.load(case.images[0]).affine) and data.doubts(image, affine) == []
