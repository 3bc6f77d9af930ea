"""The table of operations is complete and true of the PyTorch that is installed; the command line shows it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from dynlrp import UnknownOperationError, __main__, explain
from dynlrp.catalogue import CLASSES, TABLE, Entry, catalogue, table_version
from dynlrp.cli import app
from dynlrp.rules import REGISTRY, linear_operation
from tests.test_readme import ROOT

LINES = TABLE.read_text("utf-8").splitlines(keepends=True)
ROWS = {row["node"]: row for row in csv.DictReader(LINES[1:])}
INSTALLED = torch.__version__.partition("+")[0]

OUTSIDE = {
    "ActQuantBackward",  # to YosoCumulationBackward: Functions of transformers
    "GeLUFunctionBackward",
    "ReverseSortBackward",
    "SqrtBoundDerivativeBackward",
    "WeightQuantBackward",
    "XSoftmaxBackward",
    "YosoCumulationBackward",
    "_ReversibleFunctionBackward",
    "MatMul4BitBackward",  # to MatMul8bitLtBackward: Functions of bitsandbytes
    "MatMul8bitFpBackward",
    "MatMul8bitLtBackward",
    "submodule",  # calls of modules
    "ModuleOutputBackward",  # what modules return
    "BackwardHookFunctionBackward",  # Functions of torch.nn and torch.utils
    "CheckpointFunctionBackward",
    "_DDPSinkBackward",
    "ContiguousBackward0",  # of earlier releases
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_defaultBackward",  # written in Python
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_defaultBackward",
    "torch::autograd::AccumulateGrad",
    "torch::autograd::CopyBackwards",
    "torch::autograd::CopySlices",
    "torch::autograd::DelayedError",
    "torch::autograd::Error",
    "torch::autograd::NotImplemented",
    "torch::autograd::UndefinedGrad",
    "torch::autograd::UndefinedGradBackward",
    "torch::autograd::WarnNotImplemented",
    "torch::distributed::autograd::RecvRpcBackward",
    "torch::distributed::autograd::SendRpcBackward",
}
"""Node types that PyTorch's table of derivatives does not know."""


def entries() -> dict[str, Entry]:
    return {entry.node: entry for entry in catalogue()}


# The table


def test_the_table_has_every_node_type_of_this_torch() -> None:
    listed = {node.rpartition("::")[2] for node in ROWS}
    assert {name for name in dir(torch._C._functions) if not name.startswith("_")} - listed == set()


@pytest.mark.skipif(
    table_version() != INSTALLED, reason=f"the table is of PyTorch {table_version()}, installed is {INSTALLED}"
)
def test_the_table_is_what_the_script_makes() -> None:
    script = subprocess.run([sys.executable, "-m", "dynlrp.catalogue"], capture_output=True, text=True, check=True)
    made = script.stdout.splitlines(keepends=True)
    stale = [line for line in made if line not in LINES] + [line for line in LINES if line not in made]
    assert stale == [], "run: python -m dynlrp.catalogue --write"
    assert made == LINES


def test_every_operation_has_a_class() -> None:
    assert [node for node, row in ROWS.items() if row["class"] == "unclassified"] == []
    assert [(node, row["family"]) for node, row in ROWS.items() if row["class"] not in CLASSES] == []
    assert [(node, row["family"]) for node, row in ROWS.items() if row["class"] == "custom"] == []


def test_no_family_has_two_classes() -> None:
    families = [family for members in CLASSES.values() for family in members]
    assert len(set(families)) == len(families)


def test_every_registered_name_is_one_that_torch_gives() -> None:
    assert {node for node, row in ROWS.items() if not row["schema"]} == OUTSIDE


def test_blocked_operations_and_no_others_give_a_reason() -> None:
    assert [node for node, row in ROWS.items() if (row["class"] == "blocked") != bool(row["reason"])] == []


# The registry against the classes of the nodes


def test_what_the_registry_reads_is_there_to_read() -> None:
    wrong = []
    for node in ROWS.keys() & REGISTRY.keys():
        cls = getattr(torch._C._functions, node, None)
        operation = REGISTRY[node]
        for attribute in [*operation.saved.values(), operation.result, operation.lookup]:
            if cls is not None and attribute and not hasattr(cls, f"_saved_{attribute}"):
                wrong.append((node, attribute))
    assert sorted(wrong) == []


def test_operands_are_saved_under_their_own_names() -> None:
    """A wrong number in ``saved`` would give one operand's value to another."""
    wrong = []
    for node, row in ROWS.items():
        names = row["operands"].split()
        for number, attribute in REGISTRY[node].saved.items() if node in REGISTRY else ():
            if row["schema"] and not (number < len(names) and names[number] == attribute):
                wrong.append((node, number, attribute, names))
    assert wrong == []


def test_operands_are_named_in_the_order_of_the_node() -> None:
    x = torch.rand(3, 3, requires_grad=True)
    for y, operands in (
        (torch.addmm(x, x.detach(), x), ("self", None, "mat2")),
        (torch.where(x > 0, x.detach(), x), (None, "other")),
        (F.layer_norm(x, (3,), x[0], x[1]), ("input", "weight", "bias")),
    ):
        assert y.grad_fn is not None
        expected = entries()[y.grad_fn.name()].operands
        assert len(y.grad_fn.next_functions) == len(expected)
        for name, (edge, _), own in zip(operands, y.grad_fn.next_functions, expected, strict=True):
            assert (name is None) == (edge is None)
            assert name in (None, own)


# The API


def test_an_entry_joins_torch_and_registry() -> None:
    entry = entries()["AddmmBackward0"]
    assert (entry.class_, entry.family, entry.rule) == ("linear", "dense", "Epsilon")
    assert (entry.operands, entry.letters) == (("self", "mat1", "mat2"), "+**")
    assert entry.schema.startswith("addmm(Tensor self, Tensor mat1")
    assert {"mat1", "mat2", "alpha", "beta"} <= set(entry.saved)
    assert entry.reason == ""


def test_entries_follow_the_registry(registry: dict[str, object]) -> None:
    linear_operation("WaveletBackward", family="wavelet")
    linear_operation("MseLossBackward0")
    del registry["AddmmBackward0"]
    found = entries()
    assert (found["WaveletBackward"].class_, found["WaveletBackward"].letters) == ("custom", "+")
    assert (found["MseLossBackward0"].class_, found["MseLossBackward0"].reason) == ("linear", "")
    assert (found["AddmmBackward0"].class_, found["AddmmBackward0"].operands[0]) == ("unclassified", "self")


# Blocked operations

MATRIX = torch.rand(3, 3, dtype=torch.float64)


def _recorded_gradient(x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad(x.tanh().sum(), x, create_graph=True)[0].sum(1)


@pytest.mark.parametrize(
    ("function", "cure"),
    [
        (lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="none").sum(1), "the logits"),
        (lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x))[None], "the logits"),
        (lambda x: torch._foreach_exp([x])[0], "each tensor of the list"),
        (torch.bernoulli, r"call model\.eval\(\)"),
        (torch.linalg.svdvals, r"take them of x\.detach\(\)"),
        (lambda x: torch.heaviside(x, x), "differentiable operations"),
        (_recorded_gradient, "explain the function, not its gradient"),
    ],
)
def test_blocked_operations_say_what_to_do_instead(function: Callable[[Tensor], Tensor], cure: str) -> None:
    with pytest.raises(UnknownOperationError, match=cure):
        explain(function, MATRIX, target=lambda y: y.reshape(len(y), -1).sum(1), allow_training=True)


def test_blocked_operations_may_be_treated_as_their_gradient_on_request() -> None:
    explanation = explain(
        lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="none"),
        MATRIX,
        target=lambda y: y.sum(1),
        on_unknown="gradient",
    )
    torch.testing.assert_close(explanation.relevance, 2 * MATRIX**2)
    assert explanation.ledger.closes


# The command line


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["ops", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_ops_prints_every_operation_and_counts_the_classes() -> None:
    lines = run().splitlines()
    first_words = [line.split()[0] for line in lines[1:] if line]
    assert first_words[: len(ROWS)] == sorted(ROWS)
    total = next(line for line in lines if line.startswith(f"all, in PyTorch {table_version()}"))
    assert int(total.split()[-1]) == len(entries())
    start = lines.index("") + 1
    assert sum(int(line.split()[-1]) for line in lines[start:-1]) == len(entries())


def test_ops_filters() -> None:
    assert {row["class"] for row in csv.DictReader(io.StringIO(run("--class", "blocked", "--csv")))} == {"blocked"}
    found = json.loads(run("addmm*", "MMBackward0", "--json"))
    assert [row["node"] for row in found] == ["AddmmBackward0", "MmBackward0"]
    missing = {row["node"] for row in csv.DictReader(io.StringIO(run("--missing", "--csv")))}
    assert missing == {node for node, entry in entries().items() if entry.class_ == "unclassified"}
    assert "all, in PyTorch" in run("NoSuchOperation")


def test_ops_as_json_and_csv_tell_the_same() -> None:
    as_json = json.loads(run("--json"))
    as_csv = list(csv.DictReader(io.StringIO(run("--csv"))))
    assert [{k: " ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in as_json] == as_csv


def test_ops_cuts_nothing_where_there_is_no_terminal() -> None:
    longest = max(entries().values(), key=lambda entry: len(entry.schema))
    (line,) = [line for line in run("--long", longest.node).splitlines() if line.startswith(longest.node)]
    assert line.rstrip().endswith(longest.schema)
    assert " ".join(longest.saved) in line


@pytest.mark.parametrize("arguments", [["--class", "linera"], ["--json", "--csv"]])
def test_ops_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["ops", *arguments])
    assert result.exit_code == 2
    assert "piecewise linear" in result.output or "not both" in result.output


def test_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dynlrp", "ops", "Addmm*"])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert not left.value.code
    assert "self+ mat1* mat2*" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["dynlrp", "--version"])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert not left.value.code


def test_program_without_its_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "dynlrp.cli")
    assert __main__.main() == 2
    assert "pip install dynlrp[cli]" in capsys.readouterr().err


def test_the_page_explains_every_class() -> None:
    page = (ROOT / "docs" / "pages" / "operations.md").read_text("utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    explained = {cells[1].strip(): cells[2] for cells in rows}
    for name, families in CLASSES.items():
        assert name in explained
        assert all(f"`{family}`" in explained[name] for family in families), name
