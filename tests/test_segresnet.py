"""segresnet.py against Table 1, the known parameter counts, and MONAI's SegResNet with the same weights."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import segresnet
from segresnet import ResBlock, SegResNet, from_monai, to_monai

# Table 1 as the paper prints it: name, repeat.
TABLE_1 = [
    ("InitConv", 1),
    ("EncoderBlock0", 1), ("EncoderDown1", 1), ("EncoderBlock1", 2), ("EncoderDown2", 1), ("EncoderBlock2", 2), ("EncoderDown3", 1),
    ("EncoderBlock3", 4),
    ("DecoderUp2", 1), ("DecoderBlock2", 1), ("DecoderUp1", 1), ("DecoderBlock1", 1), ("DecoderUp0", 1), ("DecoderBlock0", 1),
    ("DecoderEnd", 1),
]
MONAI_NORMS = {"instance": ("instance", {}), "instance_affine": ("instance", {"affine": True}), "group": ("group", {"num_groups": 8})}


def monai_segresnet(filters, norm):
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.SegResNet(init_filters=filters, in_channels=4, out_channels=3, norm=MONAI_NORMS[norm], blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    # Norms start as scale 1, shift 0, the same in every layer: randomised, so that one carried to the wrong layer shows.
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def pair(filters, norm):
    torch.manual_seed(0)
    monai = monai_segresnet(filters, norm)
    ours = SegResNet(filters=filters, norm=norm)
    ours.load_state_dict(from_monai(monai.state_dict()))
    return ours, monai


def image():
    # No two sides alike, so that swapped axes show.
    return torch.randn(1, 4, 24, 16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm, filters, expected", [
    ("instance", 8, 1_175_163), ("instance", 16, 4_698_867), ("instance", 32, 18_791_907),
    ("instance_affine", 8, 1_176_843), ("instance_affine", 16, 4_702_227), ("instance_affine", 32, 18_798_627),
    ("group", 8, 1_176_843), ("group", 16, 4_702_227), ("group", 32, 18_798_627),
])
def test_number_of_parameters(norm, filters, expected):
    assert sum(p.numel() for p in SegResNet(filters=filters, norm=norm).parameters()) == expected


def test_defaults_are_the_papers():
    assert sum(p.numel() for p in SegResNet().parameters()) == 18_791_907


def test_rows_of_the_model_are_the_rows_of_table_1():
    rows = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name, _ in TABLE_1]
    assert [name for name, _ in SegResNet(filters=8).named_children()] == rows


def test_repeats_are_those_of_table_1():
    found = {name: sum(isinstance(m, ResBlock) for m in row.modules()) for name, row in SegResNet(filters=8).named_children() if "block" in name}
    assert list(found.values()) == [repeat for name, repeat in TABLE_1 if "Block" in name]


def test_rows_run_in_the_order_of_table_1():
    model, ran = SegResNet(filters=8), []
    for name, row in model.named_children():
        row.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(image())
    assert ran == [name for name, _ in model.named_children()]


@pytest.mark.parametrize("filters, norm", [
    (8, "instance"), (16, "instance"), (32, "instance"), (8, "group"), (16, "group"), (32, "group"), (8, "instance_affine"),
])
def test_outputs_and_gradients_equal_monai(filters, norm):
    ours, monai = pair(filters, norm)
    expected, found = monai(image()), ours(image())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    # Weights of its own for every output voxel: a plain sum would hide whatever the next norm cancels.
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = from_monai({name: p.grad for name, p in monai.named_parameters()})
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-4 * scale, msg=lambda m: f"{name}: {m}")


def kept_for_backward(network, x):
    """The output, and the bytes of tensors that autograd keeps, parameters apart, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)    # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = network(x)
    return y, sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("norm", ["instance", "instance_affine", "group"])
def test_what_is_computed_again_on_a_gpu_changes_no_gradient_runs_no_convolution_twice_and_saves_memory(monkeypatch, norm):
    torch.manual_seed(0)
    network, x = SegResNet(filters=8, norm=norm), torch.randn(2, 4, 32, 24, 16)
    found = []
    for again in (False, True):
        monkeypatch.setattr(segresnet, "RECOMPUTE_ON_CPU", again)
        network.zero_grad()
        _, nbytes = kept_for_backward(network, x)
        with FlopCounterMode(display=False) as flops:
            y = network(x)
            y.square().mean().backward()
        found.append((nbytes, flops.get_total_flops(), y.detach(), [p.grad.clone() for p in network.parameters()]))
    (plain, plain_flops, *plain_values), (less, flops, *values) = found
    assert plain / less >= 1.6 and flops == plain_flops
    torch.testing.assert_close(values, plain_values, atol=0, rtol=0)


@pytest.mark.parametrize("norm", MONAI_NORMS)
def test_features_are_the_decoders_output_before_the_last_norm(norm):
    ours, monai = pair(8, norm)
    monai.use_conv_final = False    # MONAI's own switch: stop before the final norm
    torch.testing.assert_close(ours.features(image()), monai(image()), rtol=1e-4, atol=1e-5)


def test_features_then_decoder_end_is_forward_and_leaves_the_features_alone():
    # The projection branch and the last row read the same features: an in-place ReLU must not reach them.
    model = SegResNet(filters=8)
    features = model.features(image())
    before = features.clone()
    assert torch.equal(model.decoder_end(features), model(image()))
    assert torch.equal(features, before)


@pytest.mark.parametrize("filters, norm", [(8, "instance"), (16, "instance"), (32, "instance"), (8, "group"), (16, "group"), (8, "instance_affine")])
def test_weights_go_to_monai_and_back(filters, norm):
    monai = monai_segresnet(filters, norm)
    torch.manual_seed(2)
    weights = SegResNet(filters=filters, norm=norm).state_dict()
    monai.load_state_dict(to_monai(weights), strict=True)
    back = from_monai(monai.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def group_norm_weights():
    return to_monai(SegResNet(filters=8, norm="group").state_dict())


@pytest.mark.parametrize("key", ["convInit.conv.bias", "down_layers.1.3.conv1.conv.weight", "dropout.weight", "state_dict"])
def test_from_monai_names_an_unknown_key(key):
    with pytest.raises(ValueError, match=re.escape(key)):
        from_monai({**group_norm_weights(), key: torch.zeros(8)})


@pytest.mark.parametrize("key", ["down_layers.3.4.conv2.conv.weight", "conv_final.2.conv.bias", "up_layers.1.0.norm2.weight", "conv_final.0.bias"])
def test_from_monai_names_a_missing_key(key):
    weights = group_norm_weights()
    del weights[key]
    with pytest.raises(ValueError, match=re.escape(key)):
        from_monai(weights)


def test_to_monai_names_a_key_that_is_not_ours():
    with pytest.raises(ValueError, match="module.init_conv"):
        to_monai({f"module.{key}": value for key, value in SegResNet(filters=8).state_dict().items()})


@pytest.mark.parametrize("sides", [(32, 24, 12), (30, 24, 16), (32, 4, 16), (32, 24)])
def test_a_side_that_cannot_be_halved_three_times_is_refused(sides):
    with pytest.raises(ValueError, match=r"multiples of 8.*pad or crop"):
        SegResNet(filters=8)(torch.zeros(1, 4, *sides))


@pytest.mark.parametrize("norm", ["instance", "instance_affine"])
def test_one_voxel_at_the_lowest_level_is_refused_with_instance_norm(norm):
    with pytest.raises(ValueError, match="at least 16"):
        SegResNet(filters=8, norm=norm)(torch.zeros(1, 4, 8, 8, 8))


@pytest.mark.parametrize("norm, sides", [("group", (8, 8, 8)), ("instance", (8, 16, 8))])
def test_the_smallest_volumes_that_work_equal_monai(norm, sides):
    ours, monai = pair(8, norm)
    x = torch.randn(1, 4, *sides)
    torch.testing.assert_close(ours(x), monai(x), rtol=1e-4, atol=1e-4)


def test_8x8x8_works_with_group_norm():
    assert SegResNet(filters=8, norm="group")(torch.randn(1, 4, 8, 8, 8)).isfinite().all()


@pytest.mark.parametrize("arguments, words", [
    ({"norm": "batch"}, "'batch'.*instance, instance_affine, group"),
    ({"norm": "group", "filters": 12}, "filters is 12.*multiple of 8"),
])
def test_arguments_that_make_no_network_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        SegResNet(**arguments)


def test_the_file_works_alone(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "segresnet.py", tmp_path)
    script = """
import sys
sys.modules.update(dict.fromkeys(["barlow", "data", "ensemble", "infer", "train", "monai", "nibabel", "scipy"]))   # None: cannot be imported
import torch
from torch.utils.flop_counter import FlopCounterMode
from segresnet import SegResNet
torch.manual_seed(3)
print(SegResNet(filters=8)(torch.randn(1, 4, 16, 8, 24)).double().abs().sum().item())
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(3)
    expected = SegResNet(filters=8)(torch.randn(1, 4, 16, 8, 24)).double().abs().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)
