"""What many targets cost together beside one explanation for each: time and peak memory.

    python -m benchmarks.many [--rounds 9] [--targets 10] [--write]

All ways run interleaved in one process; the table gives medians and ratios. ``--write`` puts the table into
``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.architectures import Case, vgg16
from benchmarks.results import RESULTS, setting, table, write_section
from benchmarks.timing import interleaved, peak_memory
from dynlrp import explain, explain_many


def _vgg() -> Case:
    """VGG16, a quarter as wide, for 64 by 64 pixels."""
    layers: list[nn.Module] = []
    channels = 3
    for module in vgg16():
        if isinstance(module, nn.Conv2d):
            layers.append(nn.Conv2d(channels, module.out_channels // 4, 3, padding=1))
            channels = module.out_channels // 4
        elif isinstance(module, nn.MaxPool2d) or (isinstance(module, nn.ReLU) and len(layers) < 31):
            layers.append(module)
    head = [nn.Flatten(), nn.Linear(4 * channels, 256), nn.ReLU(), nn.Linear(256, 10)]
    return Case(nn.Sequential(*layers, *head), torch.randn(1, 3, 64, 64))


def _transformer(model: type, config: type, **options: Any) -> Case:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    return Case(
        model(config(**sizes, num_labels=10, pad_token_id=0, **options)), {"inputs_embeds": torch.randn(1, 64, 128)}
    )


CASES: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {
    "VGG16, a quarter as wide, 64 by 64 pixels": (_vgg, ("epsilon", "epsilon_plus", "auto")),
    "BERT, 4 layers, 128 wide, 64 tokens": (
        partial(_transformer, transformers.BertForSequenceClassification, transformers.BertConfig),
        ("attnlrp", "cplrp"),
    ),
    "Llama, 4 layers, 128 wide, 64 tokens": (
        partial(_transformer, transformers.LlamaForSequenceClassification, transformers.LlamaConfig, use_cache=False),
        ("attnlrp",),
    ),
}
"""How a model is made, and composites."""


def alone(case: Case, targets: list[Any], composite: str) -> None:
    """One explanation after the other."""
    for target in targets:
        explain(case.model, case.inputs, target, composite=composite, output=case.output)


def together(case: Case, targets: list[Any], composite: str, chunk: int | None = None) -> None:
    """One forward pass for all."""
    explain_many(case.model, case.inputs, targets, composite=composite, output=case.output, chunk=chunk)


def rows(rounds: int, count: int) -> list[list[str]]:
    """Rows of the table."""
    found = []
    for name, (build, composites) in CASES.items():
        case = build()
        case.model.eval()
        targets = list(range(count))
        for composite in composites:
            functions: list[Callable[[], object]] = [
                partial(alone, case, targets, composite),
                partial(together, case, targets, composite),
                partial(together, case, targets, composite, 1),
            ]
            seconds = [timing.median for timing in interleaved(functions, rounds)]
            memory = [peak_memory(f) for f in functions]
            found.append(
                [
                    name,
                    composite,
                    f"{seconds[0] * 1e3:.0f} ms",
                    f"{seconds[1] / seconds[0]:.2f}",
                    f"{seconds[2] / seconds[0]:.2f}",
                    f"{memory[0] / 2**20:.0f} MiB",
                    f"{memory[1] / memory[0]:.2f}",
                    f"{memory[2] / memory[0]:.2f}",
                ]
            )
            print(*found[-1], sep="  ", flush=True)
    return found


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    count = options.targets
    header = ["model", "composite", f"{count} explanations", "together / that", "one by one / that"]
    header += ["peak", "together / that", "one by one / that"]
    text = table(header, rows(options.rounds, count))
    if options.write:
        note = (
            f"{count} targets of one sample from one forward pass, in one traversal (*together*) or one for each "
            f"(*one by one*, `chunk=1`), beside {count} calls of `explain`; float32."
        )
        write_section(RESULTS, "Many targets", f"{setting('python -m benchmarks.many --write')}\n\n{note}\n\n{text}")


if __name__ == "__main__":
    main()
