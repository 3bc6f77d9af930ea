"""Tiny models and layers, for the scripts that make the reference numbers and the tests that read them.

Importing this file needs torch alone. Weights are drawn in float32, so that they are exact in float64 too;
the `.npz` files hold them, and a test should load them from there.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Name: how to build it, the shape of its input.
Table = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]


def randomise(model: nn.Module, seed: int, std: float | None = None) -> nn.Module:
    """Draw every parameter and running statistic of a float32 `model`, by name, and put it in eval mode.

    Matrices and kernels have the deviation `std`, or one that keeps activations of order one.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    statistics = [(name, buffer) for name, buffer in model.named_buffers() if "running_" in name]
    state = sorted((*model.named_parameters(), *statistics), key=operator.itemgetter(0))
    with torch.no_grad():
        for name, tensor in state:
            if name.endswith("running_var"):
                tensor.copy_(0.5 + 1.5 * draw(tensor).sigmoid())
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.1 * draw(tensor))
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.copy_(1 + 0.3 * draw(tensor))
            elif name.endswith("weight"):
                tensor.copy_(draw(tensor) * (std or 1.6 * tensor[0].numel() ** -0.5))
    return model.eval()


def inputs(shape: tuple[int, ...], seed: int, sign: str = "mixed") -> Tensor:
    """Normal float64 inputs, of mixed sign or `sign="nonnegative"` (then with some exact zeros)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    return x if sign == "mixed" else x.clamp(min=0)


# Whole networks ---------------------------------------------------------------------------------------------


def dense() -> nn.Module:
    """Three dense layers with ReLU."""
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


def vgg() -> nn.Module:
    """Convolutions, ReLU, max and (adaptive) average pooling, dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def conv_bn() -> nn.Module:
    """Batch norm after convolutions with and without bias, after a transposed one and after a dense layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(45, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block. `add` is plain addition; a library that needs a module there replaces it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.add: Callable[[Tensor, Tensor], Tensor] = operator.add
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.add(self.skip(x), self.bn2(self.conv2(h))))


def resnet() -> nn.Module:
    """A stem, a block with an identity skip, a block with a downsampling skip, a dense head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        Block(6, 6, 1), Block(6, 10, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
    )  # fmt: skip


def conv1d() -> nn.Module:
    """Convolutions along one dimension: padded, dilated, strided, pooled."""
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, dilation=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(6, 8, 3, stride=2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def mixed_conv() -> nn.Module:
    """Strided, grouped, dilated, depthwise and transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


NETWORKS: Table = {
    "dense": (dense, (2, 10)),
    "vgg": (vgg, (2, 3, 16, 16)),
    "conv_bn": (conv_bn, (2, 3, 12, 12)),
    "resnet": (resnet, (2, 3, 10, 10)),
    "conv1d": (conv1d, (2, 2, 32)),
    "mixed_conv": (mixed_conv, (2, 3, 12, 12)),
}


# Single layers ----------------------------------------------------------------------------------------------

LAYERS: Table = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear_nobias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 2, dilation=2, groups=2), (2, 4, 6, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), (2, 3, 4, 4)),
    "conv_transpose2d_grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 3, 3)),
}
# Layers without a weight, or that act on each element.
PLAIN_LAYERS: Table = {
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1), (2, 3, 6, 6)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 3, 5, 5)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "relu": (nn.ReLU, (3, 6)),
    "gelu": (nn.GELU, (3, 6)),
    "tanh": (nn.Tanh, (3, 6)),
}


def build(name: str, table: Table, seed: int = 0) -> nn.Module:
    """The float64 model or layer `name` of `table` with its weights drawn, in eval mode."""
    return randomise(table[name][0](), seed).double()


# Transformers -----------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    """Llama with 2 layers of width 32, 4 heads, 2 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config), 1, std=0.25)


def gpt2() -> nn.Module:
    """GPT-2 with 2 layers of width 32, 4 heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=64, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(GPT2LMHeadModel(config), 2, std=0.25)


def bert() -> nn.Module:
    """BERT with 2 layers of width 32, 4 heads, pooled output and a head of 5 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, num_labels=5, attn_implementation="sdpa",
    )  # fmt: skip
    return randomise(BertForSequenceClassification(config), 5, std=0.25)


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


def token_ids(shape: tuple[int, int] = (2, 7), seed: int = 4) -> Tensor:
    """Token ids below 40 for the transformers above; 0, BERT's padding, does not occur."""
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))
