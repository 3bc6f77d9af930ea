"""The project's exceptions: every one says what went wrong, where, and what helps."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


class DynLRPError(Exception):
    """Base of every error that dynlrp raises on purpose."""


class UnknownOperationError(DynLRPError):
    """Relevance reaches operations that no rule covers. ``operations`` holds ``(name, module path)`` pairs.

    ``reasons`` says, by name, why an operation is blocked on purpose.
    """

    def __init__(self, operations: Sequence[tuple[str, str]], reasons: Mapping[str, str] | None = None) -> None:
        self.operations = list(dict.fromkeys(operations))
        self.reasons = {name: reason for name, reason in (reasons or {}).items() if reason}
        places = "\n".join(
            f"  {name} in {path or 'the model itself'}" + (f": {self.reasons[name]}" if name in self.reasons else "")
            for name, path in self.operations
        )
        first = next((name for name, _ in self.operations if name not in self.reasons), "")
        register = (
            f"Register a rule with @dynlrp.rules.rule('{first}'). Only if the operation is linear in all its\n"
            f"operands, one line is enough: dynlrp.rules.linear_operation('{first}').\nOr pass"
        )
        super().__init__(
            f"{len(self.operations)} operation(s) have no rule:\n{places}\n{register if first else 'Or pass'} "
            f"on_unknown='gradient' to treat these operations as their gradient (the ledger then lists them)."
        )


def described(error: BaseException) -> str:
    """What an error says; of one that is not this project's also where it was raised."""
    text = f"{type(error).__name__}: {error}"
    trace = traceback.extract_tb(error.__traceback__)
    if isinstance(error, DynLRPError) or not trace:
        return text
    return f"{text} ({Path(trace[-1].filename).name}:{trace[-1].lineno})"


@contextmanager
def told(note: Callable[[], str]) -> Iterator[None]:
    """Errors of a function that was given to us also tell what it was called with (from Python 3.11 on)."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(note())
        raise


def kind(value: object) -> str:
    """What something is, in few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


class UnsupportedOperatorError(DynLRPError):
    """An ONNX file has operators that are not read. ``nodes`` are the names of their nodes, by operator."""

    def __init__(self, nodes: Mapping[str, Sequence[str]]) -> None:
        self.nodes = {kind: list(names) for kind, names in nodes.items()}
        lines = "".join(
            f"\n  {kind}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for kind, names in self.nodes.items()
        )
        super().__init__(
            f"{len(self.nodes)} operator(s) of this file are not read:{lines}\n"
            f"Enter what one does with dynlrp.onnx.operator(name), a function of the node and its inputs."
        )


class BrokenPromiseError(DynLRPError):
    """A rule needs an activation that the graph did not keep and that cannot be recomputed."""


class NotDifferentiableError(DynLRPError):
    """Relevance was to be differentiated (``create_graph=True``) through an operation that cannot be differentiated
    twice."""


class FreedGraphError(DynLRPError):
    """The graph's saved tensors are gone: a backward pass without ``retain_graph=True`` went before."""


class NoPathError(DynLRPError):
    """The output has no graph, or no relevance can travel from it to any of the inputs."""


class TrainingModeError(DynLRPError):
    """Dropout, batch statistics or other random draws are active during the forward pass."""


class TargetError(DynLRPError):
    """The target does not fit the model's output."""


class InputError(DynLRPError, ValueError):
    """The inputs, composite, option or numbers given cannot be used."""


class CompiledModuleError(DynLRPError):
    """A ``torch.compile``d module was given; its graph is one opaque node."""


class NonFiniteError(DynLRPError):
    """NaN or infinity in an activation or in relevance."""


class TraceError(DynLRPError):
    """An explanation cannot be a program: what the model computes depends on numbers in its inputs."""


class RuleError(DynLRPError):
    """A rule returned something of the wrong number, shape or type, or failed."""


class BudgetError(DynLRPError):
    """No allocation is within the budget."""


class ConversionError(DynLRPError):
    """A tool cannot give some layers the bits that were chosen. ``reasons`` says why, by layer."""

    def __init__(self, tool: str, layers: int, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = "".join(f"\n  {name}: {reason}" for name, reason in self.reasons.items())
        super().__init__(
            f"{tool} cannot take {len(self.reasons)} of {layers} layer(s):{lines}\n"
            f"Leave them out of bits, or allocate again with these layers pinned to None."
        )
