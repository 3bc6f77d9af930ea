"""``dynlrp allocate`` and ``dynlrp allocate-activations``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn

from dynlrp.allocation import operand_scores
from dynlrp.allocation.scores import DEFAULT
from dynlrp.terminal import CompositeName, errors, numbers, show

if TYPE_CHECKING:
    from dynlrp.allocation import Activations, Allocation, Divergence

Model = Annotated[
    str,
    typer.Argument(help="A folder of transformers with weights, or package.module:attribute.", show_default=False),
]
CalibrationFiles = Annotated[
    list[Path],
    typer.Argument(
        help="A .npy, .npz, .parquet or .txt file, images, or a folder of images; several are joined.",
        show_default=False,
    ),
]
BitOps = Annotated[float | None, typer.Option(help="Operations on bits for one sample, in units of 10^9.")]
Layers = Annotated[
    list[str] | None, typer.Option(help="Globs of layers that take part, by default all; may be repeated.")
]
DivergenceKind = Annotated[
    str, typer.Option(help="What a change of the output is: softmax, sigmoid, cosine or squared.")
]
TargetIndex = Annotated[int | None, typer.Option(help="Output to explain; by default the largest.")]
Seed = Annotated[int, typer.Option(help="Of random draws.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Use so many of the calibration.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples of a batch.")]
ImageSize = Annotated[int, typer.Option(min=1, help="Height and width of images.")]
Mean = Annotated[str, typer.Option(help="What is subtracted from colours in 0..1.")]
Std = Annotated[str, typer.Option(help="What they are divided by.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of a text.")]
Out = Annotated[list[Path] | None, typer.Option("-o", "--out", help="Write .json or .png; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Bits by name, as JSON.")]
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


def allocate(
    model: Model,
    calibration: CalibrationFiles,
    budget: Annotated[
        float | None, typer.Option(help="Average bits of a weight, with scales; 4 where no limit is given.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="MiB of the whole model.")] = None,
    bitops: BitOps = None,
    activation_bits: Annotated[int, typer.Option(min=1, help="Of activations, in operations on bits.")] = 16,
    candidates: Annotated[str, typer.Option(help="Bits that a layer may get.")] = "2,3,4,5,6,8",
    score: Annotated[str, typer.Option(help="What decides: a name in dynlrp.allocation.SCORES.")] = DEFAULT,
    group: Annotated[
        list[str] | None, typer.Option(help="Layers that share bits, as in '*.query,*.key,*.value'; may be repeated.")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="Bits of a layer, as in head=8, or head=keep; may be repeated.")
    ] = None,
    layers: Layers = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Quantize with zero points.")] = False,
    group_size: Annotated[int | None, typer.Option(min=1, help="Inputs that share a scale; by default all.")] = None,
    per_tap: Annotated[
        bool, typer.Option("--per-tap", help="A scale for each tap of a filter, as torchao has it.")
    ] = False,
    divergence: DivergenceKind = "softmax",
    target: TargetIndex = None,
    composite: CompositeName = "auto",
    seed: Seed = 0,
    samples: Samples = None,
    batch: Batch = 8,
    image_size: ImageSize = 224,
    mean: Mean = MEAN,
    std: Std = STD,
    length: Length = 128,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Decide how many bits the weights of every layer get, within a budget."""
    from dynlrp import allocation

    _check_endings(out)
    if budget is size is bitops is None:
        budget = 4.0
    pins, widths = _pins(pin or ()), numbers(candidates, "--candidates", int)
    images = (image_size, numbers(mean, "--mean", float), numbers(std, "--std", float))
    with errors(model), _given(model, calibration, score, samples, batch, images, length) as (net, data, advance):
        found = allocation.allocate(
            net,
            data,
            allocation.Budget(budget, size and size * 2**20, bitops and bitops * 1e9, activation_bits),
            widths,
            score=score,
            groups=_groups(group),
            pinned=pins,
            layers=layers or "*",
            quantizer=allocation.Quantizer(not asymmetric, group_size, per_tap),
            divergence=_divergence(divergence, data),
            target=target,
            composite=composite,
            batch_size=batch,
            samples=samples,
            seed=seed,
            progress=advance,
        )
        _write(found, model, out)
    if as_json:
        typer.echo(json.dumps(found.bits, indent=1))
    else:
        _print_layers(found)
    _tell(out)


def allocate_activations(
    model: Model,
    calibration: CalibrationFiles,
    budget: Annotated[
        float | None, typer.Option(help="Average bits over multiply-accumulates; 6 where no limit is given.")
    ] = None,
    bitops: BitOps = None,
    weights: Annotated[
        Path | None, typer.Option(help="What allocate wrote: bits of weights, for operations on bits.")
    ] = None,
    candidates: Annotated[str, typer.Option(help="Bits that an activation may get.")] = "3,4,5,6,8",
    score: Annotated[
        str, typer.Option(help="What decides: a name in dynlrp.allocation.OPERAND_SCORES.")
    ] = operand_scores.DEFAULT,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Activations that share bits, as in '*.query:input,*.key:input'; may be repeated."),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Bits of an activation, as in head:input=8, or head:input=keep; may be repeated."),
    ] = None,
    layers: Layers = None,
    divergence: DivergenceKind = "softmax",
    target: TargetIndex = None,
    composite: CompositeName = "auto",
    seed: Seed = 0,
    samples: Samples = None,
    batch: Batch = 8,
    image_size: ImageSize = 224,
    mean: Mean = MEAN,
    std: Std = STD,
    length: Length = 128,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Decide how many bits every activation that is multiplied gets, within a budget."""
    from dynlrp import allocation

    _check_endings(out)
    if budget is bitops is None:
        budget = 6.0
    pins, widths = _pins(pin or ()), numbers(candidates, "--candidates", int)
    images = (image_size, numbers(mean, "--mean", float), numbers(std, "--std", float))
    with errors(model), _given(model, calibration, score, samples, batch, images, length) as (net, data, advance):
        found = allocation.allocate_activations(
            net,
            data,
            allocation.Budget(budget, bitops=bitops and bitops * 1e9),
            widths,
            weights=allocation.Allocation.load(weights) if weights else None,
            score=score,
            groups=_groups(group),
            pinned=pins,
            layers=layers or "*",
            divergence=_divergence(divergence, data),
            target=target,
            composite=composite,
            batch_size=batch,
            samples=samples,
            seed=seed,
            progress=advance,
        )
        _write(found, model, out)
    if as_json:
        typer.echo(json.dumps(found.bits, indent=1))
    else:
        _print_activations(found)
    _tell(out)


@contextmanager
def _given(
    model: str,
    calibration: Sequence[Path],
    score: str,
    samples: int | None,
    batch: int,
    images: tuple[int, Sequence[float], Sequence[float]],
    length: int,
) -> Iterator[tuple[nn.Module, Any, Callable[[int], None]]]:
    """The model, its calibration data, and what moves the bar that is shown inside."""
    from dynlrp.allocation import Calibration, sources

    tokenizer = Path(model) if Path(model).is_dir() else None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        net = sources.load_model(model)
        data = sources.load_calibration(calibration, sources.Preparation(*images, tokenizer, length))
        bar = progress.add_task(escape(score), total=len(Calibration(data, batch, samples)))
        yield net, data, lambda count: progress.advance(bar, count)


def _divergence(kind: str, data: Any) -> Divergence:
    """Positions that the model is told to pass over do not count; those of a decoder are not those of its encoder."""
    from dynlrp.allocation import Divergence

    masked = isinstance(data, Mapping) and "attention_mask" in data and "decoder_input_ids" not in data
    return Divergence(kind, (lambda inputs: inputs["attention_mask"]) if masked else None)  # type: ignore[arg-type]


def _groups(texts: Sequence[str] | None) -> list[list[str]]:
    return [names.split(",") for names in texts or ()]


def _pins(texts: Sequence[str]) -> dict[str, int | None]:
    """Bits by name, from texts such as ``head=8``."""
    pins: dict[str, int | None] = {}
    for text in texts:
        name, equals, bits = text.rpartition("=")
        if not equals or not (bits == "keep" or bits.isdecimal()):
            raise typer.BadParameter(f"{text!r} is not like head=8 or head=keep", param_hint="--pin")
        pins[name] = None if bits == "keep" else int(bits)
    return pins


def _check_endings(out: Sequence[Path] | None) -> None:
    for path in out or ():
        if path.suffix not in (".json", ".png"):
            raise typer.BadParameter(f"{path} ends in neither .json nor .png", param_hint="--out")


def _write(found: Allocation | Activations, model: str, out: Sequence[Path] | None) -> None:
    for path in out or ():
        if path.suffix == ".json":
            found.save(path)
        else:
            found.plot(model).savefig(path)


def _tell(out: Sequence[Path] | None) -> None:
    for path in out or ():
        typer.echo(f"written: {path}", err=True)


def _print(
    headings: tuple[str, str, str], rows: Sequence[tuple[str, float, int, float, float, float]], total: str
) -> None:
    """A row has a name, a size, bits, a number and the bounds of its interval."""
    first, second, last = headings
    table = Table(box=None, pad_edge=False)
    for heading, side in {first: "left", second: "right", "bits": "right", "": "left", last: "right"}.items():
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("95 % interval", justify="right")
    for name, size, bits, mean, low, high in rows:
        bounds = f"{low:.3g} .. {high:.3g}" if low < high else ""
        bar = "\N{FULL BLOCK}" * bits
        table.add_row(escape(name), f"{size:,.0f}", str(bits), bar, f"{mean:.3g}", bounds)
    foot = Table(box=None, pad_edge=False, show_header=False)
    foot.add_row(total)
    show(table, foot)


def _print_layers(found: Allocation) -> None:
    rows = [(row.layer, row.weights, row.bits, row.score, row.low, row.high) for row in found.table]
    _print(
        ("layer", "weights", "score"),
        rows,
        f"{found.average_bits:.3f} bits for each weight, {found.size / 2**20:.4g} MiB in all; score "
        f"{found.scores.name}, {found.scores.count} samples; solution: {found.provenance['solver']['method']}.",
    )


def _print_activations(found: Activations) -> None:
    rows = [(row.activation, row.multiplications, row.bits, row.cost, row.low, row.high) for row in found.table]
    _print(
        ("activation", "multiplications", "cost"),
        rows,
        f"{found.average_bits:.3f} bits over multiplications, {found.bitops / 1e9:.4g} 10^9 operations on bits; score "
        f"{found.scores.name}, {found.scores.count} samples; solution: {found.provenance['solver']['method']}.",
    )
