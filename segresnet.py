"""SegResNet: the backbone of section 3, Table 1.

Paper: Siddiquee and Myronenko, "Redundancy Reduction in Semantic Segmentation of 3D Brain Tumor MRIs",
arXiv:2111.00742. Code: MIT licence.
An encoder-decoder of pre-activation residual blocks, whose attributes are Table 1's rows.
The file stands alone: it needs PyTorch and nothing else.

    model = SegResNet()                            # the paper's: 4 modalities in, 3 regions out, 32 filters
    probabilities = torch.sigmoid(model(image))    # (B, 4, D, H, W) -> (B, 3, D, H, W), regions ET, TC, WT
"""

import re

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

NORMS = ("instance", "instance_affine", "group")


def make_norm(norm, channels):
    """The layer that Table 1 calls IN.

    Paper: Table 1's caption says "IN stands for group normalization", section 3 says instance norm.
    Here: instance norm without affine parameters or running statistics, eps 1e-5, as MONAI's "instance".
    Why: section 3 gives its reason. "instance_affine" and "group" (8 groups) load other people's weights.
    """
    if norm == "group":
        return nn.GroupNorm(8, channels)
    return nn.InstanceNorm3d(channels, affine=norm == "instance_affine")


def norm_relu_conv(x, norm, relu, conv):
    """conv(relu(norm(x))). In training on a GPU x alone is kept; norm and ReLU are computed again backwards.

    That nearly halves the memory. The convolution is not computed again: backwards it needs its input alone.
    """
    if torch.is_grad_enabled() and x.is_cuda:
        return checkpoint(lambda x: conv(relu(norm(x))), x, use_reentrant=False, preserve_rng_state=False)
    return conv(relu(norm(x)))


class ResBlock(nn.Module):
    """IN, ReLU, Conv, IN, ReLU, Conv, AddId: (B, C, D, H, W) -> the same shape."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm1 = make_norm(norm, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = norm_relu_conv(x, self.norm1, self.relu, self.conv1)
        y = norm_relu_conv(y, self.norm2, self.relu, self.conv2)
        return x + y


class UpConv(nn.Sequential):
    """UpConv: (B, C, D, H, W) -> (B, C/2, 2D, 2H, 2W).

    Paper: "UpConv", "upsizing". Here: a 1x1x1 convolution, then trilinear interpolation, as MONAI's.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(nn.Conv3d(in_channels, out_channels, 1, bias=False),
                         nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))


class DecoderEnd(nn.Sequential):
    """IN, ReLU, Conv1: Table 1's last row without its sigmoid. (B, f, D, H, W) -> (B, regions, D, H, W)."""

    def forward(self, x):
        return norm_relu_conv(x, *self)


class SegResNet(nn.Module):
    """Table 1 without its last sigmoid, which is in `train.compute_losses` and `infer.predict`.

    in_channels: image channels; the paper stacks 4 modalities.
    out_channels: regions; the paper's are ET, TC, WT.
    filters: channels after InitConv, doubled at each level down. Paper: silent. Here: 32, as in [13].
    norm: "instance" (the paper's), "instance_affine" or "group".

    Only the last convolution has a bias (the paper is silent; MONAI's are so). No dropout (section 3.3).
    Raises ValueError for another norm, and for "group" with `filters` that 8 does not divide.
    """

    def __init__(self, in_channels=4, out_channels=3, filters=32, norm="instance"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
        f = filters
        # Table 1: Name = Ops; the decoder's "+EncoderBlock" stands in features()                Repeat
        self.init_conv = nn.Conv3d(in_channels, f, 3, padding=1, bias=False)                      # 1
        self.encoder_block0 = ResBlock(f, norm)                                                   # 1
        self.encoder_down1 = nn.Conv3d(f, 2 * f, 3, stride=2, padding=1, bias=False)              # 1
        self.encoder_block1 = nn.Sequential(*[ResBlock(2 * f, norm) for _ in range(2)])           # 2
        self.encoder_down2 = nn.Conv3d(2 * f, 4 * f, 3, stride=2, padding=1, bias=False)          # 1
        self.encoder_block2 = nn.Sequential(*[ResBlock(4 * f, norm) for _ in range(2)])           # 2
        self.encoder_down3 = nn.Conv3d(4 * f, 8 * f, 3, stride=2, padding=1, bias=False)          # 1
        self.encoder_block3 = nn.Sequential(*[ResBlock(8 * f, norm) for _ in range(4)])           # 4
        self.decoder_up2 = UpConv(8 * f, 4 * f)                                                   # 1
        self.decoder_block2 = ResBlock(4 * f, norm)                                               # 1
        self.decoder_up1 = UpConv(4 * f, 2 * f)                                                   # 1
        self.decoder_block1 = ResBlock(2 * f, norm)                                               # 1
        self.decoder_up0 = UpConv(2 * f, f)                                                       # 1
        self.decoder_block0 = ResBlock(f, norm)                                                   # 1
        self.decoder_end = DecoderEnd(make_norm(norm, f), nn.ReLU(inplace=True),
                                      nn.Conv3d(f, out_channels, 1))                              # 1
        # Paper: silent on initialisation. Here: PyTorch's, but a last bias of -1: probabilities near 0.27.
        # Why: most voxels are background. From 1/2, short runs spend most steps on learning that alone.
        nn.init.constant_(self.decoder_end[2].bias, -1.0)

    def features(self, x):
        """(B, in_channels, D, H, W) -> (B, filters, D, H, W): "one level before the final normalization".

        Section 3.1's projection branch starts here. Raises ValueError unless sides are multiples of 8.
        """
        if x.ndim != 5 or any(side % 8 for side in x.shape[2:]):
            raise ValueError(f"input is {tuple(x.shape)}, expected (B, C, D, H, W) with sides that are "
                             "multiples of 8: Table 1 halves them three times")
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


# ---- weights of MONAI's SegResNet --------------------------------------------------------------------------
# Its published BraTS bundle predicts TC, WT, ET from T1c, T1, T2, FLAIR. To get ET, TC, WT from t1, t1ce, t2,
# flair out of it, permute as well: init_conv.weight[:, [1, 0, 2, 3]], decoder_end.2.{weight,bias}[[2, 0, 1]].

_MODULES = {"init_conv": "convInit.conv", "encoder_block0": "down_layers.0.1",
            "decoder_end.0": "conv_final.0", "decoder_end.2": "conv_final.2.conv"}
for _level, _repeat in ((1, 2), (2, 2), (3, 4)):
    _MODULES[f"encoder_down{_level}"] = f"down_layers.{_level}.0.conv"
    _MODULES |= {f"encoder_block{_level}.{i}": f"down_layers.{_level}.{i + 1}" for i in range(_repeat)}
    _MODULES[f"decoder_up{3 - _level}.0"] = f"up_samples.{_level - 1}.0.conv"
    _MODULES[f"decoder_block{3 - _level}"] = f"up_layers.{_level - 1}.0"


def to_monai(state_dict):
    """Our state dict under the names of MONAI's SegResNet."""
    renamed = {}
    for key, tensor in state_dict.items():
        module, rest = re.fullmatch(r"(\w+(?:\.\d)?)\.(.+)", key).groups()    # encoder_block1.0, conv1.weight
        renamed[_MODULES[module] + "." + re.sub("^(conv.)", r"\1.conv", rest)] = tensor
    return renamed


def from_monai(state_dict):
    """A state dict of MONAI's SegResNet (default blocks) under our names, for `load_state_dict`.

    It may stand under "state_dict", its keys may begin with "module.". Raises ValueError for unknown keys.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    theirs = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    with torch.device("meta"):
        ours = SegResNet(filters=8, norm="instance_affine").state_dict()
    names = dict(zip(to_monai(ours), ours))
    if unknown := theirs.keys() - names.keys():
        raise ValueError(f"unknown {sorted(unknown)[:3]}, expected a SegResNet of Table 1's shape")
    return {names[key]: tensor for key, tensor in theirs.items()}
