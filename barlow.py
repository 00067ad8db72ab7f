"""The losses of section 3.1: soft Dice (Eq. 4), the Barlow Twins term (Eq. 1-3) and its projection branch.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs",
arXiv:2111.00742. Code: MIT licence.
The file stands alone: it needs PyTorch and nothing else. Two augmented views of one crop, one network:

    projector = Projector(in_channels=32)
    z_a, z_b = projector(features_a), projector(features_b)     # (1, 32, 192, 192, 144) -> (1296, 128) each
    loss = soft_dice_loss(probabilities, target) + weight * barlow_twins_loss(z_a, z_b)

Both losses compute in float32 (float64 stays float64), under autocast too: a sum over 192x192x144 voxels
overflows float16.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_dice_loss(probabilities, target, eps=1e-5):
    """Eq. 4 for each sample and class, then the mean over both: a scalar in [0, 1].

    probabilities: (B, C, D, H, W), any float dtype, in [0, 1], after the sigmoid.
    target: the same shape, 0 or 1, bool or any number.
    A class with an empty target has loss 1 and gradient 0 exactly: its product is 0 for any prediction.
    Raises ValueError for other shapes. Paper: silent on the mean and eps. Here: 1e-5, as MONAI's DiceLoss.
    """
    if probabilities.shape != target.shape or target.ndim != 5:
        raise ValueError(f"probabilities are {tuple(probabilities.shape)}, the target {tuple(target.shape)}, "
                         "expected one shape (B, C, D, H, W)")
    p_pred, p_true = _at_least_float32(probabilities), _at_least_float32(target)
    axes = (2, 3, 4)
    # Eq. 4: L_dice = 1 - 2 * sum(p_true * p_pred) / (sum(p_true^2) + sum(p_pred^2) + eps)
    loss = 1 - 2 * (p_true * p_pred).sum(axes) / ((p_true**2).sum(axes) + (p_pred**2).sum(axes) + eps)
    return loss.mean()    # of (B, C)


class Projector(nn.Module):
    """The projection branch: average pooling, rows, 3-layer MLP. It is "discarded during inference".

    Paper: "average pools the features by a factor of 16", "reshaped to form a large batch of 1D features",
    "3 layer MLP". Here: 16 along each axis; Linear, BatchNorm, ReLU, twice, then Linear, all `dim` wide.
    Why: that is the projector of Barlow Twins [16]. A 192x192x144 crop gives 12x12x9 = 1,296 rows, ten for
    each of 128 dimensions; keep that ratio when the crop is small (64x64x48: pool 8, dim 32).
    BatchNorm has no running statistics: GPUs have nothing to synchronise, and no view leaks into the other.
    """

    def __init__(self, in_channels=32, dim=128, pool=16):
        super().__init__()
        self.pool = pool
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, dim, bias=False), nn.BatchNorm1d(dim, track_running_stats=False),
            nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, track_running_stats=False),
            nn.ReLU(), nn.Linear(dim, dim, bias=False))    # a bias would fall out again when Eq. 2 centres z

    def forward(self, features):
        """One view's features (B, C, D, H, W) -> z (B * cells, dim) float32; cells: D/pool * H/pool * W/pool.

        Each quotient is rounded down. Raises ValueError for fewer than two rows: one has no correlation.
        """
        count = len(features) * math.prod(side // self.pool for side in features.shape[2:])
        if features.ndim != 5 or count < 2:
            raise ValueError(f"features {tuple(features.shape)} pooled by {self.pool} leave {count} rows, "
                             "expected (B, C, D, H, W) and at least 2: use a smaller pool or a larger crop")
        with torch.autocast(features.device.type, enabled=False):
            pooled = F.avg_pool3d(_at_least_float32(features), self.pool)    # (B, C, D/pool, H/pool, W/pool)
            rows = pooled.flatten(2).mT.flatten(0, 1)                        # (B * cells, C)
            return self.mlp(rows)                                            # (B * cells, dim)


def cross_correlation(z_a, z_b):
    """Eq. 2: C, the correlation of each dimension of view A with each of view B over the rows.

    z_a and z_b: (rows, dim); row r of both is the same place of one image. Returns (dim, dim), in [-1, 1].

    Paper: Eq. 2 prints no mean. Here: z is centred over the rows first. Why: [16], its source, assumes it;
    without, a feature that never changes would count as perfectly correlated.
    Paper: the text correlates "all combinations of spatial regions", Eq. 2 features, summed over regions b.
    Here: Eq. 2, whose C has "the dimensionality of the network's output". Regions are the samples.
    A feature that is constant over the rows has correlation 0 and gradient 0. NaN stays NaN.
    Raises ValueError for unequal shapes or fewer than two rows.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2:
        raise ValueError(f"z_a is {tuple(z_a.shape)} and z_b {tuple(z_b.shape)}, expected one (rows, dim), "
                         "rows at least 2")
    with torch.autocast(z_a.device.type, enabled=False):
        # Eq. 2: C_ij = sum_b z^A_bi z^B_bj / (sqrt(sum_b (z^A_bi)^2) sqrt(sum_b (z^B_bj)^2))
        return _centred_unit_columns(z_a).T @ _centred_unit_columns(z_b)


def _centred_unit_columns(z):
    z = _at_least_float32(z)
    centred = z - z.mean(0)
    length = torch.linalg.vector_norm(centred, dim=0)
    # What rounding leaves of a constant column must not be scaled up to length 1: it becomes 0.
    constant = length <= 1e-4 * torch.linalg.vector_norm(z, dim=0)
    return torch.where(constant, 0, centred / torch.where(constant, 1, length))


def barlow_twins_terms(z_a, z_b, lambd=0.005):
    """The two terms of Eq. 1, as Eq. 3 has them: L_invariance and L_redundancy, the second times lambda."""
    c = cross_correlation(z_a, z_b)
    on_diagonal = c.diagonal()
    # Eq. 3: L_BT = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2
    invariance = ((1 - on_diagonal) ** 2).sum()
    redundancy = lambd * ((c - torch.diag(on_diagonal)) ** 2).sum()
    return invariance, redundancy


def barlow_twins_loss(z_a, z_b, lambd=0.005):
    """Eq. 3, the sum as printed, for z_a and z_b (rows, dim). At most 4 dim + lambd dim (dim - 1)."""
    invariance, redundancy = barlow_twins_terms(z_a, z_b, lambd)
    return invariance + redundancy    # Eq. 1: L_BT = L_invariance + L_redundancy
