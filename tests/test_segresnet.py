"""segresnet.py against Table 1, known numbers of parameters, and MONAI's SegResNet with the same weights."""

import inspect
import re

import pytest
import torch
from torch import nn

from segresnet import SegResNet, from_monai, to_monai

# As the paper prints it: name, ops, repeat.
TABLE_1 = """
InitConv        Conv                                1
EncoderBlock0   IN,ReLU,Conv,IN,ReLU,Conv, AddId    1
EncoderDown1    Conv stride 2                       1
EncoderBlock1   IN,ReLU,Conv,IN,ReLU,Conv, AddId    2
EncoderDown2    Conv stride 2                       1
EncoderBlock2   IN,ReLU,Conv,IN,ReLU,Conv, AddId    2
EncoderDown3    Conv stride 2                       1
EncoderBlock3   IN,ReLU,Conv,IN,ReLU,Conv, AddId    4
DecoderUp2      UpConv, +EncoderBlock2              1
DecoderBlock2   IN,ReLU,Conv,IN,ReLU,Conv, AddId    1
DecoderUp1      UpConv, +EncoderBlock1              1
DecoderBlock1   IN,ReLU,Conv,IN,ReLU,Conv, AddId    1
DecoderUp0      UpConv, +EncoderBlock0              1
DecoderBlock0   IN,ReLU,Conv,IN,ReLU,Conv, AddId    1
DecoderEnd      IN,ReLU, Conv1, Sigmoid             1
"""
MONAI_NORMS = {"instance": ("instance", {}), "instance_affine": ("instance", {"affine": True}),
               "group": ("group", {"num_groups": 8})}


def random_image(*sides):
    return torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(1))


def pair(norm, filters=8):
    """Ours and MONAI's with the same weights."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    ours = SegResNet(filters=filters, norm=norm)
    theirs = nets.SegResNet(init_filters=filters, in_channels=4, out_channels=3, norm=MONAI_NORMS[norm],
                            blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    with torch.no_grad():    # norms start alike in every layer: one carried to the wrong layer would not show
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(from_monai(theirs.state_dict()))
    return ours, theirs


# ---- Table 1 -----------------------------------------------------------------------------------------------


def op(layer):
    """A layer in the words of Table 1."""
    if isinstance(layer, nn.Conv3d):
        kinds = {(3, 1): "Conv", (3, 2): "Conv stride 2", (1, 1): "Conv1"}
        return kinds[layer.kernel_size[0], layer.stride[0]]
    return {nn.InstanceNorm3d: "IN", nn.ReLU: "ReLU", nn.Upsample: "Up"}[type(layer)]


def test_the_network_runs_the_rows_of_table_1():
    network, ran, expected = SegResNet(filters=8), [], []
    for name, layer in network.named_modules():
        if not list(layer.children()):
            row = name.split(".")[0]
            layer.register_forward_hook(lambda layer, x, y, row=row: ran.append((row, op(layer))))
    network(random_image(24, 16, 8))
    for name, ops, repeat in re.findall(r"(\w+)  +(.+?)  +(\d)", TABLE_1):
        row = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()    # EncoderBlock0: encoder_block0
        layers = re.sub(r"AddId|Sigmoid|\+\w+", "", ops).replace("UpConv", "Conv1,Up").split(",")
        expected += [(row, layer.strip()) for layer in layers * int(repeat) if layer.strip()]
    assert ran == expected


@pytest.mark.parametrize("filters, plain, affine", [    # as MONAI's; 32 are the paper's
    (8, 1_175_163, 1_176_843), (16, 4_698_867, 4_702_227), (32, 18_791_907, 18_798_627)])
def test_number_of_parameters(filters, plain, affine):
    for norm, expected in ("instance", plain), ("instance_affine", affine), ("group", affine):
        with torch.device("meta"):
            assert sum(p.numel() for p in SegResNet(filters=filters, norm=norm).parameters()) == expected
    assert inspect.signature(SegResNet).parameters["filters"].default == 32


@pytest.mark.parametrize("norm, filters, sides", [
    ("instance", 32, (24, 16, 8)), ("instance_affine", 8, (24, 16, 8)), ("group", 8, (24, 16, 8)),
    ("instance", 8, (8, 16, 8)), ("group", 8, (8, 8, 8)),    # the smallest
])
def test_outputs_gradients_and_features_equal_monais(norm, filters, sides):
    (ours, theirs), x = pair(norm, filters), random_image(*sides)
    found, expected = ours(x), theirs(x)
    assert torch.equal(found, expected)
    weight = torch.randn_like(expected)    # of each output voxel: the last norm would cancel a plain sum
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = from_monai({name: p.grad for name, p in theirs.named_parameters()})
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    assert [name for name, p in ours.named_parameters() if not torch.equal(p.grad, gradients[name])] == []
    assert torch.equal(ours.eval()(x), expected)    # no dropout, no running statistics
    theirs.use_conv_final = False    # MONAI's own switch: stop before the final norm
    features = ours.features(x)
    assert torch.equal(ours.decoder_end(features), expected)
    assert torch.equal(features, theirs(x))    # the projection branch reads them too: no ReLU in place


# ---- where the paper is silent -----------------------------------------------------------------------------


def test_the_one_bias_starts_at_a_probability_of_0_27():
    biases = {name: p.tolist() for name, p in SegResNet(filters=8).named_parameters() if p.ndim == 1}
    assert biases == {"decoder_end.2.bias": [-1, -1, -1]}    # sigmoid(-1) = 0.27


@pytest.mark.parametrize("norm", MONAI_NORMS)
def test_a_gpu_keeps_half_the_memory_and_the_same_gradients(norm, monkeypatch):
    network, x, found = SegResNet(filters=8, norm=norm), random_image(24, 16, 16), []
    own = {parameter.data_ptr() for parameter in network.parameters()}
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
        kept = {}    # what autograd holds for the backward pass, by address

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = network(x)
        nbytes = sum(kept[address].untyped_storage().nbytes() for address in kept.keys() - own)
        found.append((nbytes, y, torch.autograd.grad(y.square().mean(), network.parameters())))
    (plain, *expected), (less, *values) = found
    assert plain / less >= 1.6
    torch.testing.assert_close(values, expected, atol=0, rtol=0)


@pytest.mark.parametrize("shape, words", [
    ((1, 4, 32, 24, 12), "multiples of 8"), ((1, 4, 30, 24, 16), "multiples of 8"),
    ((1, 4, 8, 8, 8), "more than 1 spatial"),    # instance norm of one voxel is undefined
    ((4, 16, 16, 16), r"\(B, C, D, H, W\)"), ((16, 16), r"\(B, C, D, H, W\)")])
def test_shapes_that_table_1_cannot_take_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        SegResNet(filters=8).features(torch.zeros(shape))


@pytest.mark.parametrize("norm, filters, words", [
    ("batch", 8, "'batch'.*instance, instance_affine, group"), ("group", 12, "12.*divisible by")])
def test_arguments_that_make_no_network_are_refused(norm, filters, words):
    with pytest.raises(ValueError, match=words):
        SegResNet(norm=norm, filters=filters)


# ---- MONAI's weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", MONAI_NORMS)
def test_weights_go_to_monai_and_back(norm):
    (_, theirs), weights = pair(norm), SegResNet(filters=8, norm=norm).state_dict()
    theirs.load_state_dict(to_monai(weights))
    saved = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    for checkpoint in (theirs.state_dict(), saved, {"state_dict": saved, "epoch": 300}):    # as scripts do
        back = from_monai(checkpoint)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("key", ["convInit.conv.bias", "down_layers.1.3.conv1.conv.weight", "dropout.weight"])
def test_a_key_that_table_1_does_not_have_is_named(key):
    with pytest.raises(ValueError, match=re.escape(key)):
        from_monai(to_monai(SegResNet(filters=8).state_dict()) | {key: torch.zeros(8)})
