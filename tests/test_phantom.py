"""examples/phantom.py: a task that one threshold does not solve. Its five layouts are test_cohorts.py's."""

import nibabel as nib
import numpy as np
import pytest

import phantom
from infer import dice


@pytest.fixture(scope="module")
def twelve():
    """[(images (4, X, Y, Z), labels (X, Y, Z))] of the default cohort, a quarter of BraTS's resolution."""
    return [phantom.make_case((60, 60, 40), 0, number) for number in range(12)]


def test_labels_background_sizes_and_rim(twelve):
    for number, (images, labels) in enumerate(twelve):
        _, enhancing, _ = phantom.traits(np.random.default_rng((0, number)))
        assert set(np.unique(labels)) == ({0, 1, 2, 4} if enhancing else {0, 1, 2})
        brain, whole, core = images[0] > 0, (labels > 0).sum(), np.isin(labels, (1, 4)).sum()
        necrosis, rim = np.argwhere(labels == 1), np.argwhere(labels == 4)
        assert np.array_equal(images > 0, np.stack([brain] * 4)) and images.min() == 0
        assert not labels[~brain].any()
        assert 0.12 < brain.mean() < 0.22  # 0.17 in BraTS2021_00006
        assert 0.05 < whole / brain.sum() < 0.13 and 0.3 < core / whole < 0.65
        assert len(necrosis) > 0.05 * core
        if enhancing:    # the rim lies around the necrosis
            to_rim, inside = (np.linalg.norm(at - necrosis.mean(0), axis=1).mean() for at in (rim, necrosis))
            assert to_rim > inside


def test_tumours_look_as_they_should(twelve):
    def contrast(channel, *inside):
        pairs = [(images[channel][np.isin(labels, inside)], images[channel][(images[0] > 0) & (labels == 0)])
                 for images, labels in twelve]
        return np.mean([tumour.mean() / healthy.mean() for tumour, healthy in pairs if tumour.size])
    assert contrast(3, 2) > 1.2                     # oedema is bright in FLAIR
    assert contrast(2, 1, 2, 4) > 1.2               # the whole tumour is in T2
    assert contrast(1, 4) > 1.4                     # the rim is in T1ce
    assert contrast(1, 4) > 1.5 * contrast(0, 4)    # and not in T1
    assert contrast(1, 1) < 0.9                     # necrosis is dark


def test_shares_of_cases_by_trait():    # sd 0.022, 0.007, 0.011; as many to the left as to the right
    traits = [phantom.traits(np.random.default_rng((0, number))) for number in range(2000)]
    side, enhancing, lookalike = np.mean(traits, axis=0)
    assert abs(side) < 0.1 and abs(enhancing - 0.9) < 0.03 and abs(lookalike - 1 / 3) < 0.05


def otsu(values):
    """The threshold with the largest variance between the two classes (Otsu 1979), to a percentile."""
    def variance(level):
        above = values > level
        return above.mean() * (~above).mean() * (values[above].mean() - values[~above].mean()) ** 2
    return max(np.percentile(values, range(1, 100)), key=variance)


def test_one_threshold_does_not_solve_it(twelve):
    scores = [dice(flair > otsu(flair[flair > 0]), labels > 0) for (*_, flair), labels in twelve]
    assert 0.1 < np.mean(scores) < 0.6, scores  # nor is FLAIR without any trace of it


def test_a_case_is_its_seed_and_number_seen_at_any_shape():
    fine_images, fine = phantom.make_case((96, 96, 64), 0, 3)
    (images, labels), *others = [phantom.make_case((48, 48, 32), *case) for case in [(0, 3), (0, 4), (1, 3)]]
    assert dice(labels > 0, fine[::2, ::2, ::2] > 0) > 0.75
    for image, fine_image in zip(images, fine_images):  # the scanner's gain is drawn from 200 to 3000
        assert 0.9 < image[image > 0].mean() / fine_image[fine_image > 0].mean() < 1.1
    for other_images, other_labels in others:
        assert np.mean((images != other_images)[(images > 0) | (other_images > 0)]) > 0.9
        assert dice(labels > 0, other_labels > 0) < 0.5


def test_a_later_case_alone_with_headers_of_brats_2021(call, tmp_path):
    call("phantom.py", tmp_path, "--cases", 1, "--first", 4, "--shape", 32, 32, 36, ok=0)
    (folder,) = tmp_path.iterdir()
    stored = nib.load(folder / "BraTS2021_00004_seg.nii.gz").dataobj
    assert np.array_equal(stored, phantom.make_case((32, 32, 36), 0, 4)[1])
    for path in folder.iterdir():
        header = (image := nib.load(path)).header    # unit 2: mm
        assert image.get_data_dtype() == (np.uint8 if "_seg" in path.name else np.int16)
        assert image.affine.tolist() == [[-1, 0, 0, 0], [0, -1, 0, 31], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert [header[code] for code in ("sform_code", "qform_code", "xyzt_units")] == [1, 1, 2]
        assert np.array_equal(header.get_qform(), image.affine)
