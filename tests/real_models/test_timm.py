"""Image models of timm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator

from tests.real_models.reference import Case, check, each, fresh, prepared
from tests.real_models.standin import provide_torchvision

provide_torchvision()
timm = pytest.importorskip("timm", reason="tox -e models installs it")


def images(dtype, size=32, counts=(3, 2)):
    return [
        (torch.randn(n, 3, size, size).to(dtype), torch.randint(3, (n,))) for n in counts
    ]


def classifier(model, dtype, size=32, loss=None):
    loss = nn.CrossEntropyLoss() if loss is None else loss
    return Case(prepared(model, dtype), loss, images(dtype, size))


def resnet(dtype):
    block = timm.models.resnet.Bottleneck
    model = timm.models.ResNet(
        block, [1, 1, 1, 1], num_classes=3, channels=(4, 4, 6, 6), stem_width=4
    )
    return classifier(model, dtype)


def _by_stages(kind, stages, **options):
    decoded = timm.models._efficientnet_builder.decode_arch_def(stages)
    return kind(decoded, num_classes=3, round_chs_fn=lambda n: n, **options)


def efficientnet(dtype):
    stages = [["ds_r1_k3_s1_e1_c4_se0.25"], ["ir_r2_k3_s2_e2_c6_se0.25"]]
    model = _by_stages(
        timm.models.EfficientNet, stages, stem_size=4, num_features=8, act_layer=nn.SiLU
    )
    return classifier(model, dtype, loss=nn.CrossEntropyLoss(label_smoothing=0.1))


def mobilenet(dtype):
    """Hardswish, and hardsigmoid, which PyTorch differentiates only once."""
    stages = [
        ["ds_r1_k3_s2_e1_c4_se0.25_nre"],
        ["ir_r2_k5_s2_e3_c6_se0.25"],
        ["cn_r1_k1_s1_c8"],
    ]
    model = _by_stages(
        timm.models.MobileNetV3,
        stages,
        stem_size=4,
        num_features=8,
        act_layer=nn.Hardswish,
        se_layer=lambda *args, **kw: timm.models._efficientnet_blocks.SqueezeExcite(
            *args, gate_layer="hard_sigmoid", **kw
        ),
    )
    return replace(classifier(model, dtype), by_differences=True)


def convnext(dtype):
    model = timm.models.ConvNeXt(
        num_classes=3,
        depths=(1, 2, 1, 1),
        dims=(4, 6, 6, 8),
        ls_init_value=0.1,
        drop_path_rate=0.1,
    )
    return classifier(model, dtype)


def vision_transformer(dtype, **options):
    model = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        num_classes=3,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        init_values=0.1,
        drop_path_rate=0.1,
        **options,
    )
    return classifier(model, dtype, 16)


def vision_transformer_normed(dtype):
    """Queries and keys normalized, a pooled token by attention."""
    return vision_transformer(dtype, qk_norm=True, global_pool="map", class_token=False)


def mixer(dtype):
    model = timm.models.MlpMixer(
        img_size=16, patch_size=8, num_classes=3, embed_dim=8, num_blocks=2
    )
    return classifier(model, dtype, 16)


def swin(dtype):
    model = timm.models.SwinTransformer(
        img_size=16,
        patch_size=2,
        window_size=4,
        num_classes=3,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
    )
    return classifier(model, dtype, 16)


def regnet(dtype):
    config = timm.models.regnet.RegNetCfg(
        depth=4, w0=8, wa=8.0, wm=1.4, group_size=4, se_ratio=0.25, stem_width=4
    )
    return classifier(timm.models.RegNet(config, num_classes=3), dtype)


def densenet(dtype):
    model = timm.models.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=3)
    return classifier(model, dtype)


def nfnet(dtype):
    """Standardized weights and scaled activations."""
    config = timm.models.nfnet.NfCfg(
        depths=(1, 1, 1, 1),
        channels=(8, 8, 8, 16),
        stem_type="3x3",
        stem_chs=8,
        group_size=4,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5, "rd_divisor": 4},
        act_layer="silu",
        num_features=16,
    )
    return classifier(timm.models.NormFreeNet(config, num_classes=3), dtype)


CASES = [
    resnet,
    efficientnet,
    mobilenet,
    convnext,
    vision_transformer,
    vision_transformer_normed,
    mixer,
    swin,
    regnet,
    densenet,
    nfnet,
]


@each(CASES)
def test_hessian(build):
    check("Hessian", build)


@each(CASES)
def test_ggn(build):
    check("GGN", build)


@each([resnet, mobilenet, vision_transformer])
def test_jacobian(build):
    check("Jacobian", build)


@each([resnet, efficientnet, mixer])
def test_float32(build):
    check("Hessian", build, torch.float32)
    check("GGN", build, torch.float32)


@pytest.mark.parametrize("rate", [0.5, 1e-4])
@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
def test_stochastic_depth_in_training_mode_is_refused(operator, rate):
    """Also where it is so rare that two evaluations agree."""
    case = fresh(vision_transformer, torch.float64)
    for module in case.model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = rate
    case.model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        operator(*case.arguments)
