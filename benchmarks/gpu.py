"""What an explanation costs on a CUDA device beside forward + input gradient: time, peak memory, share of kernels.

    python -m benchmarks.gpu [--dtypes float32 bfloat16] [--batches 1 8 32] [--lengths 512] [--only NAME ...]
                             [--ways explain graph compiled] [--rival lxt|zennit] [--json ROWS] [--write ROWS]

Medians of interleaved calls that wait for the device at their end. *kernels* is the time that kernels run, by the
profiler, over the time of the call: what is missing to 1 are gaps, in which the device waits for Python.
*CUDA graph* is the program of ``trace``, captured: its memory is that of the graph and stays with it. *compiled* is
the same with kernels of ``torch.compile``, which takes a minute to make them; ``--ways compiled`` asks for it, and for
the gradient of the compiled model beside it.
``--rival`` measures another library's explanation instead of ours: zennit 1.0 (EpsilonPlus, batch norm not merged, as
its way to merge it sets an epsilon that PyTorch refuses) on convolutional nets, LXT 2.1 (efficient AttnLRP; needs
transformers 4.52) on transformers.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.architectures import Case, _image, resnet50, vgg16
from benchmarks.goals import Goal, table_of_goals
from benchmarks.results import RESULTS, table, write_section
from benchmarks.rivals import METHODS
from benchmarks.rivals.plain import gradient
from benchmarks.timing import interleaved, nothing
from dynlrp import DynLRPError
from dynlrp.program import recorded

Build = Callable[[int, int], Case]


def _text(model: str, config: Callable[[int], Any], width: int) -> Build:
    def build(batch: int, length: int) -> Case:
        made = getattr(transformers, model)(config(length))
        return Case(made, {"inputs_embeds": torch.randn(batch, length, width)})

    return build


def _llama(width: int, layers: int, heads: int, inner: int) -> Callable[[int], Any]:
    return lambda length: transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        intermediate_size=inner, vocab_size=128256, use_cache=False, pad_token_id=0,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip


MODELS: dict[str, Build] = {
    "VGG16": lambda batch, _: Case(vgg16(), _image(batch)),
    "ResNet-50": lambda batch, _: Case(resnet50(), _image(batch)),
    "ViT-B/16": lambda batch, _: Case(
        transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), {"pixel_values": _image(batch)}
    ),
    "BERT-base": _text(
        "BertForSequenceClassification",
        lambda length: transformers.BertConfig(max_position_embeddings=max(512, length)),
        768,
    ),
    "GPT-2": _text(
        "GPT2ForSequenceClassification",
        lambda length: transformers.GPT2Config(n_positions=max(1024, length), use_cache=False, pad_token_id=0),
        768,
    ),
    "Llama 3.2 1B": _text("LlamaForSequenceClassification", _llama(2048, 16, 32, 8192), 2048),
    "Llama 3.2 3B": _text("LlamaForSequenceClassification", _llama(3072, 28, 24, 8192), 3072),
    "Qwen3 0.6B": _text(
        "Qwen3ForSequenceClassification",
        lambda length: transformers.Qwen3Config(
            hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            intermediate_size=3072, vocab_size=151936, use_cache=False, pad_token_id=0, max_position_embeddings=40960,
        ),
        1024,
    ),
    "Mamba 130M": lambda batch, length: Case(
        transformers.MambaModel(transformers.MambaConfig(hidden_size=768, num_hidden_layers=24, use_cache=False)),
        {"inputs_embeds": torch.randn(batch, length, 768)},
        "last_hidden_state",
    ),
}  # fmt: skip
COMPOSITES = {"VGG16": ("epsilon", "epsilon_plus", "auto"), "ResNet-50": ("epsilon", "epsilon_plus", "auto")}
NOTE = """Commands: `python -m benchmarks.gpu --json ROWS` for float32 and bfloat16 at 512 tokens; with `--dtypes
float16`; with `--batches 1 --lengths 4096 32768`; with `--only "Mamba 130M" --lengths 64`; with `--ways explain
graph compiled`; with `--rival zennit`, and with `--rival lxt` where transformers is 4.52; then `--write ROWS`.
Medians of 3 to 7 interleaved rounds. *kernels* is the share of the time in which kernels run; the rest are gaps, in
which the device waits for Python. *CUDA graph* is the program of `trace`, captured; its memory is that of the graph
and stays with it. *Compiled* has kernels of `torch.compile` besides. *First peak* is that of a kind's first
explanation, *later* that of others. zennit's batch norms are not merged into convolutions here, so its ResNet-50 is
not that of the other tables. Ratios of two rows are of two runs, whose gradients differ by up to 60 % where they
wait for Python. Goals, and where they are met, at 512 tokens where there are such:""".replace("\n", " ")
MULTIPLIERS, GAMMA = ("epsilon", "attnlrp"), ("epsilon_plus", "auto")
IMAGES = ("VGG16", "ResNet-50", "ViT-B/16")
WITHOUT_GRAPH = ("Mamba 130M",)
"""Its scan is a loop in Python, with more operations than a trace should have."""
WAYS = {"explain": ("", "dynlrp"), "graph": (", CUDA graph", "CUDA graph"), "compiled": (", compiled", "compiled")}
"""What is put behind the composite's name in the table, and which of the methods it is."""
COMPILED = {"graph": {"backend": "cudagraphs"}, "compiled": {"mode": "reduce-overhead"}}
"""How the gradient is compiled beside them."""


def built(build: Build, batch: int, length: int, dtype: torch.dtype, device: str) -> Case:
    """The case on the device; its parameters require grad, as after loading."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            case = build(batch, length)
    finally:
        torch.set_default_dtype(before)
    case.model.eval()
    return case


def peak(function: Callable[[], object]) -> int:
    """Peak of allocated device memory during a call, in bytes above its start."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(function: Callable[[], object]) -> float:
    """Seconds that kernels run during a call."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6


def compiled_gradient(case: Case, **options: str) -> Callable[[], Tensor]:
    """Forward and input gradient, recorded and compiled as our programs are."""
    program, _ = recorded(lambda x: gradient(case.at(x)), [case.x])
    compiled = torch.compile(program.forward, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]

    def run() -> Tensor:
        with torch.no_grad():
            found: Tensor = compiled(case.x).clone()
        return found

    return run


RIVALS = {
    "lxt": ("LXT AttnLRP", ("GPT-2", "BERT-base", "Llama 3.2 1B", "Qwen3 0.6B")),
    "zennit": ("zennit EpsilonPlus", ("VGG16", "ResNet-50")),
}


def measure(
    name: str, dtype: str, batch: int, length: int, rounds: int, device: str, rival: str | None, ways: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per composite and way, or one for a rival."""
    case = built(MODELS[name], batch, length, getattr(torch, dtype), device)
    cuda = device == "cuda"
    composites = COMPOSITES.get(name, ("attnlrp",))
    labels = [WAYS[way] for way in ways if way == "explain" or name not in WITHOUT_GRAPH]
    methods = {f"{c}{label}": METHODS[f"{way} {c}"] for c in composites for label, way in labels}
    if rival is not None:
        methods = {RIVALS[rival][0]: METHODS[RIVALS[rival][0]]}
    functions: list[Callable[[], object]] = [partial(gradient, case)]
    functions += [partial(method, case) for method in methods.values()]
    for way, options in COMPILED.items():
        if way in ways and rival is None and name not in WITHOUT_GRAPH:
            methods[f"gradient{WAYS[way][0]}"] = METHODS["gradient"]
            functions.append(compiled_gradient(case, **options))
    wait = torch.cuda.synchronize if cuda else nothing
    gradient(case)  # which sets the libraries up
    first = [peak(f) if cuda else 0 for f in functions]
    seconds = [timing.median for timing in interleaved(functions, rounds, warm=2, wait=wait)]
    later = [peak(f) if cuda else 0 for f in functions]
    running = [kernels(f) if cuda else 0.0 for f in functions]
    rows = []
    for place, composite in enumerate(methods, 1):
        rows.append(
            {
                "versions": f"{datetime.date.today()}; torch {torch.__version__}, "
                f"transformers {transformers.__version__}",
                "device": torch.cuda.get_device_name() if cuda else "CPU",
                "model": name, "dtype": dtype, "batch": batch, "length": length, "composite": composite,
                "gradient_ms": seconds[0] * 1e3, "time": seconds[place] / seconds[0],
                "gradient_MiB": later[0] / 2**20,
                "memory": math.nan if "," in composite else first[place] / max(later[0], 1),
                "later": math.nan if "," in composite else later[place] / max(later[0], 1),
                "gradient_kernels": running[0] / seconds[0], "kernels": running[place] / seconds[place],
                "kernel_time": running[place] / max(running[0], 1e-12),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=["explain", "graph"], choices=list(WAYS))
    parser.add_argument("--rival", choices=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the rows there, one per line")
    parser.add_argument(
        "--write", type=Path, metavar="ROWS", help="put rows written by --json into RESULTS.md, no more"
    )
    options = parser.parse_args()
    if options.write:
        write([json.loads(line) for line in options.write.read_text("utf-8").splitlines()])
        return
    torch.manual_seed(0)
    for name in options.only:
        if options.rival and name not in RIVALS[options.rival][1]:
            continue
        for dtype in options.dtypes:
            for batch in options.batches:
                for length in options.lengths:
                    if length != options.lengths[0] and (name in IMAGES or batch != options.batches[0]):
                        continue
                    try:
                        found = measure(
                            name, dtype, batch, length, options.rounds, options.device, options.rival, options.ways
                        )
                    except (RuntimeError, DynLRPError) as error:  # out of memory among them
                        print(name, dtype, batch, length, f"{type(error).__name__}: {error}", flush=True)
                        continue
                    finally:
                        gc.collect()
                        torch.cuda.empty_cache()
                    for row in found:
                        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), sep="  ", flush=True)
                        if options.json:
                            with options.json.open("a", encoding="utf-8") as file:
                                file.write(json.dumps(row) + "\n")


def _figure(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


def write(rows: list[dict[str, Any]]) -> None:
    """Put the table into the results."""
    header = [
        "device", "model", "dtype", "batch", "length", "composite", "forward + gradient", "explanation", "time / that",
        "gradient's peak", "first peak / that", "later", "kernels: gradient", "kernels: explanation",
        "kernel time / gradient's",
    ]  # fmt: skip
    body = [
        [
            row["device"].removeprefix("NVIDIA ").partition(" ")[0], row["model"], row["dtype"], str(row["batch"]),
            "" if row["model"] in IMAGES else str(row["length"]), row["composite"],
            f"{row['gradient_ms']:.1f} ms", f"{row['gradient_ms'] * row['time']:.1f} ms", f"{row['time']:.2f}",
            f"{row['gradient_MiB']:.0f} MiB", _figure(row["memory"]), _figure(row.get("later", math.nan)),
            f"{row['gradient_kernels']:.2f}", f"{row['kernels']:.2f}", f"{row['kernel_time']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    versions = " and ".join(sorted({row["versions"] for row in rows}))
    note = f"{versions}. {NOTE}"
    write_section(RESULTS, "GPU", "\n\n".join([note, table_of_goals(goals(rows)), table(header, body)]))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """The goals with what was measured; the last are what the DynamicLRP paper reports of itself."""
    own = [row for row in rows if row["length"] == 512 and row["composite"] not in METHODS]

    def figures(value: str, way: str, composites: tuple[str, ...] = MULTIPLIERS, **wanted: Any) -> dict[str, float]:
        names = [f"{name}{WAYS[way][0]}" for name in composites]
        return {
            f"{row['model']}, {row['dtype']}, batch {row['batch']}, {row['composite']}": row[value]
            for row in own
            if row["composite"] in names and all(row[name] == of for name, of in wanted.items())
        }

    def beside(way: str, batch: int) -> dict[str, float]:
        """The same beside the gradient that is compiled in the same way."""
        gradients = {place(row): row["time"] for row in own if row["composite"] == f"gradient{WAYS[way][0]}"}
        names = [f"{name}{WAYS[way][0]}" for name in MULTIPLIERS]
        return {
            f"{row['model']}, {row['dtype']}, batch {row['batch']}": row["time"] / gradients[place(row)]
            for row in own
            if row["composite"] in names and row["batch"] == batch and place(row) in gradients
        }

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["device"], row["model"], row["dtype"], row["batch"]

    found = []
    for batch, bound in ((1, 1.3), (32, 1.05)):
        for way, what in (("explain", "by explain"), ("graph", "as CUDA graphs"), ("compiled", "compiled")):
            text = f"epsilon and AttnLRP at batch {batch} take at most {bound} of forward + gradient, {what}"
            found.append(Goal(text, bound, figures("time", way, batch=batch)))
            if way in COMPILED:
                text = f"epsilon and AttnLRP at batch {batch}, {what}: at most {bound} of the gradient {what}"
                found.append(Goal(text, bound, beside(way, batch)))
    found.append(Goal("their peak of memory is at most 1.05 of the gradient's", 1.05, figures("memory", "explain")))
    for model, bound in (("ViT-B/16", 6.0), ("VGG16", 7.0)):
        text = f"less than the paper's {bound:.0f} times the gradient on {model}, with any composite"
        found.append(Goal(text, bound, figures("time", "explain", (*MULTIPLIERS, *GAMMA), model=model)))
    return found


if __name__ == "__main__":
    main()
