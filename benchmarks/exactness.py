"""How far other libraries are from dynlrp with the same rules, and which of the two is right where they differ.

    python -m benchmarks.exactness [--only NAME ...] [--quick] [--write]

Every model is explained in float64 by each library that is made for it and by the composite of ours with the same
rules. ``--write`` puts the tables into ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from benchmarks.architectures import Case
from benchmarks.comparison import MODELS
from benchmarks.faults import FAULTS, Finding
from benchmarks.results import RESULTS, setting, table, write_section
from benchmarks.rivals import METHODS, Method
from dynlrp import explain

EQUAL = 1e-5
"""Largest difference of what counts as equal: stabilisers of 1e-6, and RMSNorm, which transformers has in float32."""
QUICK = ("VGG16", "GPT-2, 12 layers")


@dataclass(frozen=True)
class Comparison:
    """One method on one model."""

    model: str
    method: str
    difference: float
    """Largest, relative to the largest relevance."""
    exact: float | None
    """The same without the library's stabiliser where dynlrp has none."""
    cosine: float
    theirs: float
    """Sum of relevance."""
    ours: float
    residual: float
    """What our ledger leaves open, relative to the output."""

    @property
    def equal(self) -> bool:
        """Whether the same rules give the same numbers, but for a stabiliser."""
        return self.difference < EQUAL or (self.exact is not None and self.exact < EQUAL)


REASONS = (
    (
        "captum",
        "ResNet",
        "sums",
        "captum is wrong. It counts each of 16 sums that are written as `+` twice, and divides by what is near 0. "
        "Below are sums with a known answer.",
    ),
    (
        "autoLRP",
        "VGG16",
        "biases",
        "By design: autoLRP gives a bias a share by its magnitude and leaves it out of the sum. Without biases both "
        "are equal.",
    ),
    (
        "autoLRP",
        "",
        "magnitudes",
        "By design: autoLRP shares out products, biases and what normalisation subtracts by magnitude, and batch norm "
        "passes relevance on unchanged. On transformers these are not the rules of AttnLRP, which LXT and dynlrp agree "
        "on; where relevance explodes (`composite`) dynlrp's ledger closes.",
    ),
)
"""Why a library differs on a model, with a name for it: the first entry whose parts of names fit."""


def reason(row: Comparison) -> tuple[str, str]:
    """Why a row differs: a name, and the whole of it."""
    fits = ((name, text) for method, model, name, text in REASONS if method in row.method and model in row.model)
    return next(fits, ("unexplained", "No reason is known."))


def reading(row: Comparison) -> str:
    """What a row says, in a word or two."""
    if row.difference < EQUAL:
        return "equal"
    return "equal but for a stabiliser" if row.equal else reason(row)[0]


def compare(name: str, case: Case, method: Method) -> Comparison:
    """A method beside the composite of ours with the same rules."""
    assert method.composite is not None
    explanation = explain(case.model, case.inputs, None, composite=method.composite, output=case.output)
    mine: Tensor = explanation.relevance if case.name is None else explanation.relevance[case.name]

    def off(found: Tensor) -> float:
        return float((found.detach() - mine).abs().max() / mine.abs().max())

    found = method(case)
    return Comparison(
        name,
        method.name,
        off(found),
        off(method.exact(case, None)) if method.exact else None,
        float(torch.cosine_similarity(found.flatten(), mine.flatten(), 0)),
        float(found.sum()),
        float(mine.sum()),
        abs(explanation.ledger.residual / explanation.ledger.output),
    )


def comparisons(models: Iterable[str]) -> Iterator[Comparison]:
    """Every library on every model that it is made for."""
    for name in models:
        case = MODELS[name]().to(torch.float64)
        for method in METHODS.values():
            if method.package is not None and method.installed and method.fits(case):
                yield compare(name, case, method)


def table_of_rules(rows: Iterable[Comparison]) -> str:
    """The same rules by other libraries."""
    header = ["model", "library", "largest difference", "without stabiliser", "cosine", "sum: theirs", "sum: ours"]
    body = [
        [
            row.model, row.method, f"{row.difference:.0e}", "" if row.exact is None else f"{row.exact:.0e}",
            f"{row.cosine:.4f}", f"{row.theirs:.4g}", f"{row.ours:.4g}", f"{row.residual:.0e}", reading(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table([*header, "ledger leaves", "reading"], body)


def reasons(rows: Iterable[Comparison]) -> str:
    """A list of the reasons for which rows differ."""
    found = dict(reason(row) for row in rows if not row.equal)
    return "\n".join(f"* *{name}*: {text}" for name, text in found.items())


def table_of_faults(findings: Iterable[Finding]) -> str:
    """What goes wrong, on models of a few lines."""
    header = ["library", "what", "figure", "theirs", "true", "dynlrp"]
    return table(header, [[f.library, f.fault, f.figure, f.theirs, f.truth, f.ours] for f in findings])


def text(rows: list[Comparison], findings: list[Finding], quick: bool) -> str:
    """The section."""
    packages = dict.fromkeys(method.package for method in METHODS.values() if method.package and method.installed)
    return "\n\n".join(
        [
            setting(f"python -m benchmarks.exactness{' --quick' * quick} --write", [str(name) for name in packages]),
            "Each library beside dynlrp with the same rules, in float64: the largest difference, relative to the "
            "largest relevance; the same with the library's stabiliser in sums and pooling, where dynlrp needs none, "
            "a millionth of what it is; the cosine of both maps; their sums over the inputs (what is missing to the "
            "output is the share of biases and other constants); what dynlrp's ledger leaves open, relative to the "
            "output. Models are narrow and of the depth that is published; weights are random, except EfficientNet's. "
            "transformers computes RMSNorm in float32 whatever the precision of a model, which shows in the ledger. "
            "No row: zennit and captum are for convolutional nets, and captum has no rule for ReLU6 and for padding; "
            "LXT has patches for the transformers shown. "
            f"{sum(row.equal for row in rows)} of {len(rows)} rows are equal.",
            table_of_rules(rows),
            reasons(rows),
            "Models of a few lines on which libraries go wrong. What is true is the model's own output, the sum that "
            "relevance must have where nothing has a bias, or a product of matrices (`benchmarks/faults.py`).",
            table_of_faults(findings),
        ]
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="a convolutional net and a transformer: about a minute")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # libraries' own
    rows, findings = [], []
    for row in comparisons(options.only or (QUICK if options.quick else MODELS)):
        rows.append(row)
        print(f"{row.model}  {row.method}  {row.difference:.1e}  {row.cosine:.4f}  {reading(row)}", flush=True)
    there = {method.package for method in METHODS.values() if method.installed}
    for package, find in FAULTS:
        if package in there:
            findings.append(find())
            print(findings[-1], flush=True)
    if options.write:
        write_section(RESULTS, "Exactness", text(rows, findings, options.quick))


if __name__ == "__main__":
    main()
