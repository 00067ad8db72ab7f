"""barlow.py against MONAI's Dice loss, NumPy, the original Barlow Twins form, finite differences and sums done by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from barlow import Projector, barlow_twins_loss, barlow_twins_terms, cross_correlation, soft_dice_loss


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_views(rows=40, dim=6, dtype=torch.float64):
    """Correlated views, every feature with its own scale and offset, none of it symmetric in A and B."""
    common = draw(rows, dim, seed=0, dtype=dtype)
    z_a = (common + 0.5 * draw(rows, dim, seed=1, dtype=dtype)) * torch.linspace(0.5, 4, dim, dtype=dtype) + torch.linspace(-3, 5, dim, dtype=dtype)
    z_b = (common + 0.5 * draw(rows, dim, seed=2, dtype=dtype)).cumsum(1) - 2
    return z_a, z_b


def batchnorm_form(z_a, z_b, lambd):
    """The original authors' code: c = bn(z_a).T @ bn(z_b) / rows, squares on and off the diagonal."""
    bn = nn.BatchNorm1d(z_a.shape[1], eps=1e-12, affine=False).to(z_a.dtype)
    c = bn(z_a).T @ bn(z_b) / len(z_a)
    off = c[~torch.eye(len(c), dtype=torch.bool)]
    return (c.diagonal() - 1).pow(2).sum() + lambd * off.pow(2).sum()


# ---- Eq. 4 ------------------------------------------------------------------------------------------------------------


def test_dice_equals_monai():
    losses = pytest.importorskip("monai.losses")
    logits, target = 2 * draw(2, 3, 6, 5, 4), (draw(2, 3, 6, 5, 4, seed=1) > 0.7).float()
    expected = losses.DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-5)(logits, target)
    torch.testing.assert_close(soft_dice_loss(torch.sigmoid(logits), target), expected, rtol=0, atol=1e-6)


# Two samples, one class, four voxels: a small region half found, a large one nearly found.
SMALL = [0.5, 0.5, 0.0, 0.0], [1, 0, 0, 0]    # 2 * 0.5 / (1 + 0.5)   = 2/3, loss 1/3
LARGE = [1.0, 1.0, 1.0, 0.0], [1, 1, 1, 1]    # 2 * 3   / (4 + 3)     = 6/7, loss 1/7


def volumes(*rows):
    return torch.tensor(rows).view(2, 1, 1, 2, 2)


def test_dice_by_hand_is_taken_per_sample_and_class_and_then_averaged():
    p, t = volumes(SMALL[0], LARGE[0]), volumes(SMALL[1], LARGE[1])
    expected = (1 / 3 + 1 / 7) / 2    # = 0.2381; both samples in one sum would give 1 - 2 * 3.5 / 8.5 = 0.1765
    assert soft_dice_loss(p, t, eps=0).item() == pytest.approx(expected, abs=1e-6)
    assert soft_dice_loss(p.view(1, 2, 1, 2, 2), t.view(1, 2, 1, 2, 2), eps=0).item() == pytest.approx(expected, abs=1e-6)


def test_dice_has_epsilon_in_the_denominator_only():
    p, t = volumes(SMALL[0], SMALL[0]), volumes(SMALL[1], SMALL[1])
    assert soft_dice_loss(p, t, eps=0.5).item() == pytest.approx(1 - 2 * 0.5 / (1 + 0.5 + 0.5), abs=1e-6)


def test_dice_takes_a_bool_target():
    p, t = volumes(SMALL[0], LARGE[0]), volumes(SMALL[1], LARGE[1])
    assert soft_dice_loss(p, t.bool(), eps=0).item() == pytest.approx((1 / 3 + 1 / 7) / 2, abs=1e-6)


def test_an_empty_target_has_loss_one_and_no_gradient():
    p = torch.rand(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = soft_dice_loss(p, torch.zeros(2, 3, 4, 4, 4))
    loss.backward()
    assert loss.item() == 1
    assert p.grad.abs().max().item() == 0


def test_an_empty_target_and_an_empty_prediction_are_no_nan():
    assert soft_dice_loss(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dice_of_16_bit_probabilities_is_summed_in_float32(dtype):
    p = torch.full((1, 1, 48, 48, 48), 0.9, dtype=dtype)    # the sum of p, 1e5, is beyond float16's 65504
    t = torch.ones(1, 1, 48, 48, 48, dtype=dtype)
    loss = soft_dice_loss(p, t)
    v = float(p.flatten()[0])    # 0.9 as 16 bits store it
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 - 2 * v / (1 + v * v), abs=1e-5)


def test_dice_gradient_equals_finite_differences():
    p = torch.sigmoid(draw(2, 2, 2, 2, 1, dtype=torch.float64)).requires_grad_()
    t = draw(2, 2, 2, 2, 1, seed=1) > 0
    assert torch.autograd.gradcheck(lambda p: soft_dice_loss(p, t), p)


# ---- Eq. 2 ------------------------------------------------------------------------------------------------------------


def test_cross_correlation_equals_numpy():
    z_a, z_b = two_views()
    expected = np.corrcoef(z_a.numpy().T, z_b.numpy().T)[:6, 6:]    # the block of A's features with B's
    np.testing.assert_allclose(cross_correlation(z_a, z_b).numpy(), expected, atol=1e-12)


def test_cross_correlation_ignores_shift_and_positive_scale():
    z_a, z_b = two_views(dtype=torch.float32)
    torch.testing.assert_close(cross_correlation(z_a * 7 + 3, z_b * 0.01 - 5), cross_correlation(z_a, z_b), rtol=0, atol=1e-4)


def test_cross_correlation_of_small_features_is_not_damped():
    z_a, z_b = two_views(dtype=torch.float32)
    torch.testing.assert_close(cross_correlation(1e-6 * z_a, 1e-6 * z_b), cross_correlation(z_a, z_b), rtol=0, atol=1e-5)


def test_identical_views_have_diagonal_one_and_opposite_views_minus_one():
    z, _ = two_views()
    ones = torch.ones(6, dtype=z.dtype)
    torch.testing.assert_close(cross_correlation(z, z).diagonal(), ones)
    torch.testing.assert_close(cross_correlation(z, -z).diagonal(), -ones)


@pytest.mark.parametrize("shape_a, shape_b", [((1, 4), (1, 4)), ((0, 4), (0, 4)), ((5, 4), (6, 4)), ((5, 4), (5, 3)), ((5,), (5,))])
def test_what_cannot_be_correlated_is_refused(shape_a, shape_b):
    with pytest.raises(ValueError, match="at least 2 rows"):
        cross_correlation(torch.randn(shape_a), torch.randn(shape_b))


# 0.1 and 1e6/3 are no exact floats: subtracting their mean over 1,296 rows leaves a residue of rounding that must not count as a feature.
CONSTANTS = [0.0, 0.1, -7e-3, 1e6 / 3]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_feature_is_uncorrelated(constant):
    z_a, z_b = two_views(rows=1296, dtype=torch.float32)
    z_a[:, 2] = z_b[:, 2] = constant
    c = cross_correlation(z_a, z_b)
    assert c[2].abs().max() < 1e-4 and c[:, 2].abs().max() < 1e-4    # NaN would fail as well


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_feature_leaves_the_others_alone(constant):
    z_a, z_b = two_views(rows=1296, dtype=torch.float32)
    expected = cross_correlation(z_a, z_b)
    z_a[:, 2] = constant
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(cross_correlation(z_a, z_b)[others], expected[others], rtol=0, atol=1e-5)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_feature_has_a_gradient_that_training_survives(constant, both):
    z_a, z_b = two_views(rows=1296, dtype=torch.float32)
    z_a[:, 2] = constant
    if both:
        z_b[:, 2] = constant
    z_a.requires_grad_(), z_b.requires_grad_()
    barlow_twins_loss(z_a, z_b).backward()
    for gradient in (z_a.grad, z_b.grad):
        assert gradient.square().sum().isfinite()    # AdamW squares it: 1e20 would be as bad as infinity


# ---- Eq. 1 and 3 ------------------------------------------------------------------------------------------------------


def hand_example():
    """C = [[1/sqrt(2), 0], [1/sqrt(2), 1]], from columns u = (1, 1, -1, -1) and v = (1, -1, 1, -1), which are orthogonal."""
    u, v = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    return torch.stack([u, v], 1), torch.stack([u + v, v], 1)


def test_cross_correlation_by_hand():
    s = 0.5**0.5
    torch.testing.assert_close(cross_correlation(*hand_example()), torch.tensor([[s, 0], [s, 1]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lambd", [0.0, 0.005, 1.0])
def test_loss_by_hand_is_a_sum_and_lambda_weighs_the_off_diagonal(lambd):
    expected = (1 - 0.5**0.5) ** 2 + lambd * 0.5
    assert barlow_twins_loss(*hand_example(), lambd=lambd).item() == pytest.approx(expected, abs=1e-6)


def test_lambda_is_the_papers_by_default():
    assert barlow_twins_loss(*hand_example()).item() == pytest.approx((1 - 0.5**0.5) ** 2 + 0.005 * 0.5, abs=1e-6)


def test_the_terms_are_those_of_eq_1_before_lambda():
    invariance, redundancy = barlow_twins_terms(*hand_example())
    assert (invariance.item(), redundancy.item()) == pytest.approx(((1 - 0.5**0.5) ** 2, 0.5), abs=1e-6)


def test_loss_and_gradient_equal_the_batchnorm_form():
    z_a, z_b = two_views()
    z_a.requires_grad_(), z_b.requires_grad_()
    ours, original = barlow_twins_loss(z_a, z_b), batchnorm_form(z_a, z_b, 0.005)
    torch.testing.assert_close(ours, original)
    for found, expected in zip(torch.autograd.grad(ours, (z_a, z_b)), torch.autograd.grad(original, (z_a, z_b))):
        torch.testing.assert_close(found, expected)


def test_loss_gradient_equals_finite_differences():
    z_a, z_b = (z.requires_grad_() for z in two_views(rows=7, dim=3))
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, lambd=0.1), (z_a, z_b))


def test_16_bit_z_give_the_float32_loss():
    z_a, z_b = (300 * z.half() for z in two_views(dtype=torch.float32))    # squares beyond float16's 65504
    loss = barlow_twins_loss(z_a, z_b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), batchnorm_form(z_a.double(), z_b.double(), 0.005), rtol=1e-4, atol=0)


def test_autocast_outside_changes_no_bit_of_the_losses():
    z_a, z_b = two_views(dtype=torch.float32)
    p, t = torch.sigmoid(draw(1, 3, 4, 4, 4)), draw(1, 3, 4, 4, 4, seed=1) > 0
    expected = barlow_twins_loss(z_a, z_b), soft_dice_loss(p, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (barlow_twins_loss(z_a, z_b), soft_dice_loss(p, t)) == expected


# ---- the projection branch --------------------------------------------------------------------------------------------


def projector_and_features():
    torch.manual_seed(0)
    projector = Projector(in_channels=3, dim=5, pool=2)
    for layer in projector.mlp:
        if isinstance(layer, nn.BatchNorm1d):    # away from scale 1, shift 0
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return projector, draw(2, 3, 4, 6, 9)    # 2 x 3 x 4 cells and a ninth plane that fills no cell


def test_projector_by_hand():
    projector, features = projector_and_features()
    f = features.double().numpy()
    rows = np.array([f[b, :, 2 * d:2 * d + 2, 2 * h:2 * h + 2, 2 * w:2 * w + 2].mean((1, 2, 3))
                     for b in range(2) for d in range(2) for h in range(3) for w in range(4)])
    linear1, norm1, _, linear2, norm2, _, linear3 = (
        [p.detach().double().numpy() for p in layer.parameters()] for layer in projector.mlp)
    for (weight,), (scale, shift) in ((linear1, norm1), (linear2, norm2)):
        rows = rows @ weight.T
        rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale + shift
        rows = np.maximum(rows, 0)
    np.testing.assert_allclose(projector(features).detach().numpy(), rows @ linear3[0].T, atol=1e-5)


def test_a_full_size_crop_gives_the_1296_cells_in_the_order_d_h_w():
    # A feature that says which cell it is in, every cell 16x16x16: row r must be cell r.
    cells = torch.arange(12 * 12 * 9.0).view(1, 1, 12, 12, 9)
    features = cells.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)    # (1, 1, 192, 192, 144)
    projector = Projector(in_channels=1)
    projector.mlp = nn.Identity()
    assert torch.equal(projector(features), torch.arange(1296.0).view(1296, 1))


def test_three_linear_layers_without_bias():
    linear = [layer for layer in Projector().mlp if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features, layer.bias) for layer in linear] == [(32, 128, None), (128, 128, None), (128, 128, None)]


def test_a_view_does_not_depend_on_the_view_before():
    projector, features = projector_and_features()
    alone = projector(features)
    projector(100 * features.flip(0) + 50)
    assert torch.equal(projector(features), alone)


def test_projector_has_no_buffers():
    # Running statistics would be buffers: DDP would broadcast them, and one view's would reach the other.
    projector = Projector()
    assert projector.state_dict().keys() == dict(projector.named_parameters()).keys()


def test_projector_is_the_same_in_evaluation_mode():
    projector, features = projector_and_features()
    assert torch.equal(projector.eval()(features), projector.train()(features))


def test_projector_computes_in_float32_inside_autocast():
    projector, features = projector_and_features()
    expected = projector(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = projector(features)
    assert z.dtype == torch.float32 and torch.equal(z, expected)


def test_projector_pools_16_bit_features_in_float32():
    projector, features = projector_and_features()
    assert torch.equal(projector(features.bfloat16()), projector(features.bfloat16().float()))


@pytest.mark.parametrize("pool", [8, 16])    # one cell; none at all
def test_a_pool_that_leaves_fewer_than_two_rows_is_refused(pool):
    with pytest.raises(ValueError, match="smaller pool"):
        Projector(in_channels=3, dim=4, pool=pool)(torch.randn(1, 3, 8, 8, 8))


def test_the_file_works_alone(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "barlow.py", tmp_path)
    script = """
import sys
sys.modules.update(dict.fromkeys(["data", "ensemble", "infer", "segresnet", "train", "monai", "nibabel", "scipy"]))   # None: cannot be imported
import torch
from barlow import Projector, barlow_twins_loss, soft_dice_loss
torch.manual_seed(3)
projector, features, target = Projector(4, 8, 2), torch.rand(2, 4, 8, 8, 6), torch.rand(2, 4, 8, 8, 6) > 0.5
print((soft_dice_loss(features, target) + barlow_twins_loss(projector(features[:1]), projector(features[1:]))).item())
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(3)
    projector, features, target = Projector(4, 8, 2), torch.rand(2, 4, 8, 8, 6), torch.rand(2, 4, 8, 8, 6) > 0.5
    expected = soft_dice_loss(features, target) + barlow_twins_loss(projector(features[:1]), projector(features[1:]))
    assert float(done.stdout) == pytest.approx(expected.item(), rel=1e-5)
