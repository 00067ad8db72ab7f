"""SegResNet: the backbone of section 3, Table 1.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs", arXiv:2111.00742. Code: MIT licence.
An encoder-decoder of pre-activation residual blocks. `print(SegResNet())` reads as Table 1, row by row.
The file stands alone: it needs PyTorch and nothing else.

    model = SegResNet()                            # the paper's: 4 modalities in, 3 regions out, 32 filters
    probabilities = torch.sigmoid(model(image))    # (B, 4, D, H, W) -> (B, 3, D, H, W), regions ET, TC, WT
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

NORMS = ("instance", "instance_affine", "group")


def make_norm(norm, channels):
    """The layer that Table 1 calls IN.

    Paper: Table 1's caption says "IN stands for group normalization", section 3 that instance normalisation replaced it.
    Here: instance normalisation without affine parameters or running statistics, eps 1e-5.
    Why: section 3 says so at length; affine and eps are as MONAI has them when its SegResNet is asked for "instance".
    "instance_affine" and "group" (8 groups, MONAI's default) are there to load other people's weights.
    """
    if norm == "group":
        return nn.GroupNorm(8, channels)
    return nn.InstanceNorm3d(channels, affine=norm == "instance_affine")


RECOMPUTE_ON_CPU = False


def activate_and_convolve(x, norm, relu, conv):
    """conv(relu(norm(x))). In training on a GPU only x is kept for the backward pass; norm and ReLU are computed again there.

    That nearly halves the memory, and costs little: the convolution is not computed again, its own input being the last thing missing.
    """
    if not (torch.is_grad_enabled() and (x.is_cuda or RECOMPUTE_ON_CPU)):
        return conv(relu(norm(x)))
    return checkpoint(lambda x: conv(relu(norm(x))), x, use_reentrant=False, preserve_rng_state=False)


class ResBlock(nn.Module):
    """IN, ReLU, Conv, IN, ReLU, Conv, AddId: (B, C, D, H, W) -> the same shape."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm1 = make_norm(norm, channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        y = activate_and_convolve(x, self.norm1, self.relu1, self.conv1)
        y = activate_and_convolve(y, self.norm2, self.relu2, self.conv2)
        return x + y


def up_conv(in_channels, out_channels):
    """UpConv: (B, C, D, H, W) -> (B, C/2, 2D, 2H, 2W).

    Paper: "UpConv", "upsizing". Here: a 1x1x1 convolution, then trilinear interpolation. Why: MONAI's SegResNet does so.
    """
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 1, bias=False),
        nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
    )


class DecoderEnd(nn.Sequential):
    """IN, ReLU, Conv1x1x1: Table 1's last row without its sigmoid."""

    def forward(self, x):
        return activate_and_convolve(x, *self)


class SegResNet(nn.Module):
    """Table 1, with its last sigmoid left to the caller.

    Args:
        in_channels: image channels; the paper stacks 4 modalities.
        out_channels: regions; the paper's are ET, TC, WT.
        filters: channels after InitConv, doubled at each of three levels down. The paper does not say; its reference [13] has 32.
        norm: "instance" (the paper's), "instance_affine" or "group" (`filters` must then be a multiple of 8).

    Convolutions have no bias but the last (the paper is silent; MONAI's have none). There is no dropout (section 3.3).
    Raises ValueError for another norm, and in the forward pass for a volume that Table 1 cannot halve three times.
    """

    def __init__(self, in_channels=4, out_channels=3, filters=32, norm="instance"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
        if norm == "group" and filters % 8:
            raise ValueError(f"filters is {filters}, expected a multiple of 8: norm 'group' has 8 groups")
        self.norm = norm
        f = filters
        # Table 1: name              Ops                                                                    Repeat
        self.init_conv = nn.Conv3d(in_channels, f, 3, padding=1, bias=False)                                # 1
        self.encoder_block0 = ResBlock(f, norm)                                                             # 1
        self.encoder_down1 = nn.Conv3d(f, 2 * f, 3, stride=2, padding=1, bias=False)                        # 1
        self.encoder_block1 = nn.Sequential(*[ResBlock(2 * f, norm) for _ in range(2)])                     # 2
        self.encoder_down2 = nn.Conv3d(2 * f, 4 * f, 3, stride=2, padding=1, bias=False)                    # 1
        self.encoder_block2 = nn.Sequential(*[ResBlock(4 * f, norm) for _ in range(2)])                     # 2
        self.encoder_down3 = nn.Conv3d(4 * f, 8 * f, 3, stride=2, padding=1, bias=False)                    # 1
        self.encoder_block3 = nn.Sequential(*[ResBlock(8 * f, norm) for _ in range(4)])                     # 4
        self.decoder_up2 = up_conv(8 * f, 4 * f)    # "+EncoderBlock2" is in features()                      # 1
        self.decoder_block2 = ResBlock(4 * f, norm)                                                         # 1
        self.decoder_up1 = up_conv(4 * f, 2 * f)    # "+EncoderBlock1"                                         # 1
        self.decoder_block1 = ResBlock(2 * f, norm)                                                         # 1
        self.decoder_up0 = up_conv(2 * f, f)        # "+EncoderBlock0"                                         # 1
        self.decoder_block0 = ResBlock(f, norm)                                                             # 1
        self.decoder_end = DecoderEnd(make_norm(norm, f), nn.ReLU(inplace=True), nn.Conv3d(f, out_channels, 1))  # 1
        # Paper: silent on initialisation. Here: PyTorch's default, but the last bias starts at -1, all probabilities near 0.27.
        # Why: most voxels are background; started at 1/2 they take some hundred steps to cross it, and soft Dice hardly pushes.
        nn.init.constant_(self.decoder_end[2].bias, -1.0)

    def features(self, x):
        """(B, in_channels, D, H, W) -> (B, filters, D, H, W): the decoder's output, "one level before the final normalization".

        This is what section 3.1's projection branch is attached to. D, H and W must be multiples of 8.
        """
        sides = tuple(x.shape[2:])
        if len(sides) != 3 or any(side < 8 or side % 8 for side in sides):
            raise ValueError(f"input is {tuple(x.shape)}, expected (B, C, D, H, W) with D, H and W multiples of 8: "
                             "Table 1 halves each side three times; pad or crop the volume")
        if self.norm != "group" and sides == (8, 8, 8):
            raise ValueError("input is 8x8x8, of which one voxel is left at the lowest level and instance norm is undefined; "
                             "expected a side of at least 16")
        x0 = self.encoder_block0(self.init_conv(x))             # (B,  f, D,   H,   W)
        x1 = self.encoder_block1(self.encoder_down1(x0))        # (B, 2f, D/2, H/2, W/2)
        x2 = self.encoder_block2(self.encoder_down2(x1))        # (B, 4f, D/4, H/4, W/4)
        x3 = self.encoder_block3(self.encoder_down3(x2))        # (B, 8f, D/8, H/8, W/8)
        y2 = self.decoder_block2(self.decoder_up2(x3) + x2)     # (B, 4f, D/4, H/4, W/4)
        y1 = self.decoder_block1(self.decoder_up1(y2) + x1)     # (B, 2f, D/2, H/2, W/2)
        return self.decoder_block0(self.decoder_up0(y1) + x0)   # (B,  f, D,   H,   W)

    def forward(self, x):
        """(B, in_channels, D, H, W) -> logits (B, out_channels, D, H, W)."""
        return self.decoder_end(self.features(x))


# ---- weights of MONAI's SegResNet -------------------------------------------------------------------------------------
# Only names differ. Mind that MONAI's published BraTS bundle predicts TC, WT, ET from T1c, T1, T2, FLAIR. To get ET, TC, WT from
# t1, t1ce, t2, flair out of its weights, permute as well: init_conv.weight[:, [1, 0, 2, 3]], decoder_end.2.{weight,bias}[[2, 0, 1]].

_CONVS = {
    "init_conv": "convInit.conv",
    "encoder_down1": "down_layers.1.0.conv",
    "encoder_down2": "down_layers.2.0.conv",
    "encoder_down3": "down_layers.3.0.conv",
    "decoder_up2.0": "up_samples.0.0.conv",
    "decoder_up1.0": "up_samples.1.0.conv",
    "decoder_up0.0": "up_samples.2.0.conv",
    "decoder_end.2": "conv_final.2.conv",
}
_NORMS = {"decoder_end.0": "conv_final.0"}
_BLOCKS = {
    "encoder_block0": "down_layers.0.1",
    "encoder_block1.0": "down_layers.1.1",
    "encoder_block1.1": "down_layers.1.2",
    "encoder_block2.0": "down_layers.2.1",
    "encoder_block2.1": "down_layers.2.2",
    "encoder_block3.0": "down_layers.3.1",
    "encoder_block3.1": "down_layers.3.2",
    "encoder_block3.2": "down_layers.3.3",
    "encoder_block3.3": "down_layers.3.4",
    "decoder_block2": "up_layers.0.0",
    "decoder_block1": "up_layers.1.0",
    "decoder_block0": "up_layers.2.0",
}
for _ours, _theirs in _BLOCKS.items():
    _CONVS |= {f"{_ours}.conv1": f"{_theirs}.conv1.conv", f"{_ours}.conv2": f"{_theirs}.conv2.conv"}
    _NORMS |= {f"{_ours}.norm1": f"{_theirs}.norm1", f"{_ours}.norm2": f"{_theirs}.norm2"}
_WEIGHTS = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _CONVS.items()} | {"decoder_end.2.bias": "conv_final.2.conv.bias"}
_AFFINE = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _NORMS.items() for kind in ("weight", "bias")}


def _rename(state_dict, weights, affine):
    names = weights | affine if affine.keys() & state_dict.keys() else weights    # norms have all of theirs or, without affine, none
    unknown, missing = [key for key in state_dict if key not in names], [key for key in names if key not in state_dict]
    if unknown or missing:
        raise ValueError(f"not the weights of a SegResNet of Table 1's shape: unknown {unknown[:3]}, missing {missing[:3]}")
    return {names[key]: value for key, value in state_dict.items()}


def from_monai(state_dict):
    """A state dict of MONAI's SegResNet (default blocks) under this file's names. Raises ValueError for a key too many or too few."""
    return _rename(state_dict, {m: o for o, m in _WEIGHTS.items()}, {m: o for o, m in _AFFINE.items()})


def to_monai(state_dict):
    """The inverse of `from_monai`."""
    return _rename(state_dict, _WEIGHTS, _AFFINE)
