"""barlow.py against sums done by hand, MONAI's Dice loss, and the original Barlow Twins form."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from barlow import Projector, barlow_twins_loss, barlow_twins_terms, cross_correlation, soft_dice_loss


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Eq. 4 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 1, 2, 2), (1, 2, 1, 2, 2)])    # two samples; two classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_dice_by_hand_is_the_mean_over_samples_and_classes(shape, dtype):
    p_pred = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1, 1, 1, 0]]).view(shape)
    p_true = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]], dtype=dtype).view(shape)
    small, large = 1 - 2 * 0.5 / (1 + 0.5 + 0.5), 1 - 2 * 3 / (4 + 3 + 0.5)    # all in one sum would be 0.22
    assert soft_dice_loss(p_pred, p_true, eps=0.5).item() == pytest.approx((small + large) / 2, abs=1e-6)


def test_dice_and_its_gradient_equal_monai():
    losses = pytest.importorskip("monai.losses")
    monai = losses.DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-5)
    logits, p_true = (2 * draw(2, 3, 6, 5, 4)).requires_grad_(), (draw(2, 3, 6, 5, 4, seed=1) > 0.7).float()
    found, expected = soft_dice_loss(torch.sigmoid(logits), p_true), monai(logits, p_true)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (found,), (expected,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("predicted", [0.0, 0.5, 1.0])
def test_an_empty_target_has_loss_one_and_no_gradient(predicted):
    p_pred = torch.full((2, 3, 4, 4, 4), predicted, requires_grad=True)
    loss = soft_dice_loss(p_pred, torch.zeros(2, 3, 4, 4, 4))
    loss.backward()
    assert (loss.item(), p_pred.grad.abs().max().item()) == (1, 0)


# ---- Eq. 1 to 3 --------------------------------------------------------------------------------------------


def test_correlation_and_loss_of_eq_1_to_3_by_hand():
    u, v = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])    # orthogonal, their means are 0
    z_a, z_b = torch.stack([u, v], 1), torch.stack([u + v, v], 1)
    c = torch.tensor([[0.5**0.5, 0], [0.5**0.5, 1]])
    torch.testing.assert_close(cross_correlation(z_a, z_b), c, rtol=0, atol=1e-6)
    invariance, redundancy = (1 - 0.5**0.5) ** 2, 0.5
    terms = [term.item() for term in barlow_twins_terms(z_a, z_b)]
    assert terms == pytest.approx([invariance, 0.005 * redundancy])
    assert barlow_twins_loss(z_a, z_b).item() == pytest.approx(invariance + 0.005 * redundancy)
    assert barlow_twins_loss(z_a, z_b, lambd=1).item() == pytest.approx(invariance + redundancy)


def two_views(rows=40, dtype=torch.float64):
    """Correlated views, (rows, 6) each: every feature with its own scale and mean, A and B not alike."""
    common, scale = draw(rows, 6, dtype=dtype), torch.linspace(0.5, 4, 6, dtype=dtype)
    z_a = (common + 0.5 * draw(rows, 6, seed=1, dtype=dtype)) * scale + torch.linspace(-3, 5, 6, dtype=dtype)
    z_b = (common + 0.5 * draw(rows, 6, seed=2, dtype=dtype)).cumsum(1) - 2
    return z_a, z_b


def original_form(z_a, z_b):
    """The original: c = bn(z_a).T @ bn(z_b) / rows, then its squares on and off the diagonal."""
    bn = nn.BatchNorm1d(z_a.shape[1], eps=1e-30, affine=False).to(z_a.dtype)
    c = bn(z_a).T @ bn(z_b) / len(z_a)
    off_diagonal = c[~torch.eye(len(c), dtype=torch.bool)]
    return (c.diagonal() - 1).pow(2).sum() + 0.005 * off_diagonal.pow(2).sum()


@pytest.mark.parametrize("scale", [1e-6, 1])    # small features are not damped by an epsilon
def test_loss_and_gradient_equal_the_original_form(scale):
    views = [(scale * z).requires_grad_() for z in two_views()]
    found, expected = barlow_twins_loss(*views), original_form(*views)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, views), torch.autograd.grad(expected, views))


# ---- the projection branch ---------------------------------------------------------------------------------


def projector_and_features():
    torch.manual_seed(0)
    projector = Projector(in_channels=3, dim=5, pool=2)
    for layer in projector.mlp:
        if isinstance(layer, nn.BatchNorm1d):    # away from scale 1, shift 0
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return projector, draw(2, 3, 4, 6, 9)    # 2 x 3 x 4 cells and a ninth plane that fills no cell


def test_the_projector_by_hand():
    projector, features = projector_and_features()
    f = features.double().numpy()
    rows = np.array([f[b, :, 2 * d:2 * d + 2, 2 * h:2 * h + 2, 2 * w:2 * w + 2].mean((1, 2, 3))
                     for b in range(2) for d in range(2) for h in range(3) for w in range(4)])
    *hidden, last = [p.detach().numpy() for p in projector.parameters()]    # Linear, BatchNorm's two; twice
    for weight, scale, shift in (hidden[:3], hidden[3:]):
        rows = rows @ weight.T
        rows = np.maximum((rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale + shift, 0)
    for training in (True, True, False):    # a view by itself: no running statistics
        found = projector.train(training)(features).detach().numpy()
        np.testing.assert_allclose(found, rows @ last.T, atol=1e-5)


def test_the_papers_projector_is_a_3_layer_mlp_over_1296_rows():
    # A feature that says which cell of 16x16x16 it is in: row r must be cell r. (1, 1, 192, 192, 144)
    cells = torch.arange(1296.0).view(1, 1, 12, 12, 9)
    features = cells.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    projector = Projector()
    layers = [tuple(layer.weight.shape) for layer in projector.mlp if isinstance(layer, nn.Linear)]
    assert layers == [(128, 32), (128, 128), (128, 128)]
    projector.mlp = nn.Identity()
    assert torch.equal(projector(features), torch.arange(1296.0).view(1296, 1))


# ---- where the paper is silent -----------------------------------------------------------------------------


# 0.1 and 1e6/3 are no exact floats: less their mean over 1,296 rows, rounding is left, which is no feature.
@pytest.mark.parametrize("constant", [0.0, 0.1, -7e-3, 1e6 / 3])
@pytest.mark.parametrize("both", [True, False])
def test_a_constant_feature_is_uncorrelated_and_harmless(constant, both):
    z_a, z_b = two_views(rows=1296, dtype=torch.float32)
    expected = cross_correlation(z_a, z_b)
    z_a[:, 2], expected[2] = constant, 0
    if both:
        z_b[:, 2], expected[:, 2] = constant, 0
    torch.testing.assert_close(cross_correlation(z_a, z_b), expected, rtol=0, atol=1e-5)
    barlow_twins_loss(z_a.requires_grad_(), z_b).backward()
    assert z_a.grad[:, 2].abs().max() == 0
    assert z_a.grad.square().sum().isfinite()    # AdamW squares it


def test_the_loss_of_nan_is_nan():
    z_a, z_b = two_views(dtype=torch.float32)
    assert barlow_twins_loss(torch.full_like(z_a, torch.nan), torch.full_like(z_b, torch.nan)).isnan()
    z_a[3, 2] = torch.nan
    assert barlow_twins_loss(z_a, z_b).isnan() and barlow_twins_loss(z_b, z_a).isnan()
    p_pred = torch.ones(1, 2, 2, 2, 2)
    p_pred[0, 1, 1, 1, 1] = torch.nan
    assert soft_dice_loss(p_pred, torch.ones_like(p_pred)).isnan()


def test_16_bit_inputs_give_the_float32_losses():
    p_pred = torch.full((1, 1, 48, 48, 48), 0.9, dtype=torch.float16)    # a sum of 1e5, float16 ends at 65504
    loss, p = soft_dice_loss(p_pred, torch.ones_like(p_pred)), p_pred.flatten()[0].item()
    assert loss.item() == pytest.approx(1 - 2 * p / (1 + p * p), abs=1e-5)
    z_a, z_b = (300 * z.half() for z in two_views())    # squares beyond 65504
    loss = barlow_twins_loss(z_a, z_b)
    torch.testing.assert_close(loss.double(), original_form(z_a.double(), z_b.double()), rtol=1e-4, atol=0)
    projector, features = projector_and_features()
    assert torch.equal(projector(features.bfloat16()), projector(features.bfloat16().float()))


def test_autocast_changes_no_bit():
    projector, features = projector_and_features()
    z_a, z_b = two_views(dtype=torch.float32)
    calls = (lambda: projector(features), lambda: barlow_twins_loss(z_a, z_b),
             lambda: soft_dice_loss(torch.sigmoid(features), features > 0))
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(), expected)


@pytest.mark.parametrize("function, calls", [
    (cross_correlation, [[(1, 4)] * 2, [(0, 4)] * 2, [(5, 4), (6, 4)], [(5,)] * 2, [(2, 5, 4)] * 2]),
    (soft_dice_loss, [[(4, 4)] * 2, [(3, 4, 4, 4)] * 2, [(1, 3, 4, 4, 4), (1, 1, 4, 4, 4)]]),
    (Projector(3, 4, pool=8), [[(1, 3, 8, 8, 8)], [(1, 3, 4, 8, 8)], [(3, 16, 16, 16)], [(16, 3)]])])
def test_other_shapes_are_refused(function, calls):
    for shapes in calls:
        with pytest.raises(ValueError, match=re.escape(str(shapes[0]))):
            function(*map(torch.rand, shapes))
