"""How much of a model can be explained, and how well: :func:`coverage` of one model, as plain data."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from dynlrp.composite import Composite
from dynlrp.errors import DynLRPError, InputError
from dynlrp.explain import settle
from dynlrp.fake import faked
from dynlrp.graph import LEAF
from dynlrp.inputs import as_dicts
from dynlrp.plan import StepPlan
from dynlrp.roles import roles
from dynlrp.rules.operation import REGISTRY
from dynlrp.run import Settled
from dynlrp.target import Target
from dynlrp.verification import Balances, Unbalanced, Verification, verification


@dataclass(frozen=True)
class OperationCount:
    """One operation of a model's graph."""

    name: str
    family: str
    rules: tuple[str, ...]
    """The rules at the nodes that relevance reaches; none where it reaches no such node."""
    nodes: int
    reached: int
    """Nodes that relevance passes through. It does not reach what only makes coefficients or weights."""
    covered: int


@dataclass(frozen=True)
class Uncovered:
    """Nodes of one operation in one module that have no rule of their own."""

    operation: str
    path: str
    nodes: int
    reached: bool
    reason: str
    """Why it is blocked on purpose; else empty."""
    nearest: str
    """The operation of the most similar name that has a rule; may be empty."""


@dataclass(frozen=True)
class Idle:
    """A module in which no operation of the graph lies, and none of whose parameters is in it."""

    path: str
    parameters: int
    ran: bool
    """It was called, but the graph of the explained output does not go through it: a head for another output, a choice
    of codes, something under ``torch.no_grad`` or inside of a custom function."""

    def __str__(self) -> str:
        return "ran, but the output's graph does not go through it" if self.ran else "did not run"


@dataclass(frozen=True)
class Coverage:
    """The report on one model. A node is an operation of its autograd graph; leaves (parameters) are counted apart."""

    model: str
    title: str = ""
    published: int = 0
    """Parameters, as the model's authors give them."""
    modality: str = ""
    composite: str = ""
    parameters: int = 0
    nodes: int = 0
    leaves: int = 0
    reached: int = 0
    """Nodes that relevance passes through."""
    covered: int = 0
    """Nodes with a rule of their own: registered, not blocked, and no fallback."""
    operations: tuple[OperationCount, ...] = ()
    uncovered: tuple[Uncovered, ...] = ()
    roles: dict[str, int] = field(default_factory=dict)
    idle: tuple[Idle, ...] = ()
    """Modules that take no part in the explained output, outermost: a tower for images where only text was given."""
    promises: int = 0
    replayed: int = 0
    delta: int = 0
    """Operations on the longest chain that each promise waits for, summed over promises."""
    rho: float = 0.0
    """Promises per node that relevance visits."""
    runs: int = 1
    """Runs of the model that an explanation takes: 2 where it has to record activations that nobody kept."""
    fake: bool = True
    """The graph was captured without numbers; else the model ran."""
    seconds: float = 0.0
    """What this report took, without the verification."""
    verification: Verification | None = None
    error: str = ""
    """Why there is no report."""

    @property
    def verified(self) -> int:
        """Of the nodes that relevance reaches and that are covered, those whose own balance closes."""
        return sum(self.verified_by_operation().values())

    def verified_by_operation(self) -> dict[str, int]:
        """Verified nodes of every operation.

        The explained model may be a smaller one: where all of its nodes of an operation balance, so do those of this
        one; else as many as do there.
        """
        balances = {} if self.verification is None else self.verification.balances
        gaps = Counter[str]()
        for gap in self.uncovered:
            gaps[gap.operation] += gap.nodes * gap.reached
        found = {}
        for operation in self.operations:
            balance = balances.get(operation.name, Balances(0, 0))
            most = operation.reached - gaps[operation.name]
            found[operation.name] = most if balance.closed == balance.nodes > 0 else min(most, balance.closed)
        return found

    @property
    def operations_covered(self) -> int:
        """Operations all of whose nodes are covered."""
        return sum(operation.covered == operation.nodes for operation in self.operations)

    @property
    def status(self) -> str:
        """``covered``, ``verified`` where that was asked for, or what is wrong."""
        if self.error:
            return "failed"
        if self.covered < self.nodes:
            return "gaps"
        if self.verification is None:
            return "covered"
        return "verified" if self.verification.passed else "not verified"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with what follows from it."""
        derived = {name: getattr(self, name) for name in ("status", "verified", "operations_covered")}
        return {**asdict(self), **derived, "verified_by_operation": self.verified_by_operation()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Coverage:
        """What :meth:`to_dict` made."""
        own = {f.name: data[f.name] for f in fields(cls)}
        own["operations"] = tuple(OperationCount(**{**o, "rules": tuple(o["rules"])}) for o in own["operations"])
        own["uncovered"] = tuple(Uncovered(**u) for u in own["uncovered"])
        own["idle"] = tuple(Idle(**one) for one in own["idle"])
        if own["verification"] is not None:
            made = dict(own["verification"])
            made["balances"] = {name: Balances(*numbers) for name, numbers in made["balances"].items()}
            made["unbalanced"] = tuple(Unbalanced(**one) for one in made["unbalanced"])
            own["verification"] = Verification(**made)
        return cls(**own)

    def __str__(self) -> str:
        if self.error:
            return f"{self.model}: failed: {self.error}"
        text = f"{self.model}: {self.covered} of {self.nodes} nodes covered"
        text += f", {self.operations_covered} of {len(self.operations)} operations"
        if self.verification is not None:
            text += f", {self.verified} of the {self.reached} that relevance reaches verified"
            text += f", ledger open by {self.verification.residual:.1e}"
        return text


def coverage(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    verify: bool = False,
    allow_training: bool = False,
    name: str = "",
) -> Coverage:
    """Report which operations of a model have rules, before anything is explained.

    The graph is captured with fake tensors, so nothing is computed and a model on the ``meta`` device needs no memory
    for its weights. Only a model that reads numbers of its tensors runs for real. The model is not touched; its hooks
    run on a copy.

    Args:
        model, inputs, target, composite, output, allow_training: as for :func:`dynlrp.explain`.
        verify: explain it too, to see that the ledger closes, and take the times.
        name: what the report calls the model; by default its class.

    Raises:
        DynLRPError: as :func:`dynlrp.explain` does, but operations without a rule are what the report is about.
    """
    start = time.perf_counter()
    options: dict[str, Any] = {"composite": composite, "output": output, "allow_training": allow_training}
    captured = capture(model, inputs, target, **options)
    made = replace(
        _report(captured.settled, captured.runs),
        model=name or type(model).__name__,
        modality=modality(inputs),
        composite=composite if isinstance(composite, str) else composite.name,
        parameters=sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0,
        idle=idle(captured),
        fake=captured.fake,
        seconds=time.perf_counter() - start,
    )
    return replace(made, verification=verification(model, inputs, target, **options)) if verify else made


class Captured(NamedTuple):
    """The graph of a model ready for relevance."""

    settled: Settled
    runs: int
    """Runs of the model that an explanation takes."""
    fake: bool
    """It was captured with fake tensors."""
    model: Callable[..., Any]
    """What ran: the model or a copy in fake tensors."""
    ran: Set[int]
    """Its modules that were called, by ``id``."""


def capture(model: Callable[..., Any], inputs: Any, target: Target = None, **options: Any) -> Captured:
    """Capture the graph of a model, without numbers if that is possible. ``options`` are those of
    :func:`dynlrp.explain.settle`."""
    try:
        with faked(model, as_dicts(inputs)) as (copied, given), _called() as ran:
            return Captured(*settle(copied, given, target, **options), True, copied, ran)
    except Exception as error:
        if not _has_weights(model):
            if isinstance(error, DynLRPError):
                raise
            raise InputError(
                f"a model without weights is looked at with fake tensors, and this one needs numbers: "
                f"{type(error).__name__}: {error}. Build it with weights, smaller if need be."
            ) from error
    with _called() as ran:
        return Captured(*settle(model, inputs, target, **options), False, model, ran)  # else the same goes wrong again


@contextmanager
def _called() -> Iterator[set[int]]:
    """The modules that this thread calls, by ``id``."""
    found, thread = set[int](), threading.get_ident()

    def called(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            found.add(id(module))

    handle = register_module_forward_pre_hook(called)
    try:
        yield found
    finally:
        handle.remove()


def idle(captured: Captured) -> tuple[Idle, ...]:
    """The outermost modules none of whose parameters and operations are in the graph."""
    model, (graph, path) = captured.model, (captured.settled.graph, captured.settled.path)
    if not isinstance(model, nn.Module):
        return ()
    leaves = {id(node.variable) for name, node in zip(graph.names, graph.nodes, strict=True) if name == LEAF}
    places = {path(node._sequence_nr()) for name, node in zip(graph.names, graph.nodes, strict=True) if name != LEAF}
    places |= {name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in leaves}
    busy = {""}
    for place in places:
        while place not in busy:
            busy.add(place)
            place = place.rpartition(".")[0]
    found = []
    for name, module in model.named_modules():
        parameters = sum(p.numel() for p in module.parameters())
        # Where frozen numbers of a mere container are used, nothing tells.
        told = type(module).forward is not nn.Module.forward or any(p.requires_grad for p in module.parameters())
        if name not in busy and name.rpartition(".")[0] in busy and parameters and told:
            found.append(Idle(name, parameters, any(id(part) in captured.ran for part in module.modules())))
    return tuple(found)


def copies(settled: Settled) -> set[int]:
    """Nodes that are no part of the model: the copies of its floating point inputs that an explanation makes."""
    graph = settled.graph
    return {
        edge.node
        for edge in settled.structure.sources
        if graph.names[edge.node] == "CloneBackward0"
        and all(below is not None and graph.names[below.node] == LEAF for below in graph.operands[edge.node])
    }


KINDS = {
    "text": ("input_ids", "bbox", "qformer_input_ids", "task_inputs"),
    "vision": ("pixel_values", "pixel_values_videos", "video", "image", "flattened_patches", "visual_feats"),
    "audio": ("input_values", "input_features", "speech_input_features", "spectrogram", "audio_codes"),
    "time series": ("past_values",),
    "actions": ("states",),
}
"""Names of inputs by what they are."""


def modality(inputs: Any) -> str:
    """What kind of data a model takes, by the names and shapes of its inputs; empty where they do not tell."""
    if isinstance(inputs, Tensor):
        return "vision" if inputs.ndim in (4, 5) else ""
    given = inputs if isinstance(inputs, Mapping) else {}
    found = [kind for kind, names in KINDS.items() if any(name in given for name in names)]
    return "multimodal" if len(found) > 1 else "".join(found)


def _has_weights(model: Any) -> bool:
    return not isinstance(model, nn.Module) or not any(
        p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()
    )


MOVES = {"ReshapeAliasBackward0": "ViewBackward0"}
"""One movement has two names: where tensors are fake or recorded, as in an audit, ``reshape`` makes a view."""


def _report(settled: Settled, runs: int) -> Coverage:
    graph, steps, facts = settled.graph, settled.steps(), settled.facts()
    counts: dict[str, list[int]] = {}
    rules: dict[str, Counter[str]] = {}
    gaps: Counter[tuple[str, str, bool, str]] = Counter()
    ours = copies(settled)
    for index, (node_name, node) in enumerate(zip(graph.names, graph.nodes, strict=True)):
        if node_name == LEAF or index in ours:
            continue
        node_name = MOVES.get(node_name, node_name)
        step = steps.get(index)
        reason, covered = covers(node_name, facts.get(index), step)
        count = counts.setdefault(node_name, [0, 0, 0])
        count[0] += 1
        count[1] += step is not None
        count[2] += covered
        if step is not None and covered:
            rules.setdefault(node_name, Counter())[type(step.rule).__name__] += 1
        if not covered:
            gaps[node_name, settled.path(node._sequence_nr()), step is not None, reason] += 1
    promises = settled.promises.report(len(steps))
    found = Counter(role for index, r in roles(settled.structure).items() if index in steps for role in r.names)
    return Coverage(
        model="",
        nodes=sum(count[0] for count in counts.values()),
        leaves=graph.names.count(LEAF) - len(ours),
        reached=len(steps.keys() - ours),
        covered=sum(count[2] for count in counts.values()),
        operations=tuple(
            OperationCount(
                operation,
                REGISTRY[operation].family if operation in REGISTRY else "",
                tuple(rule for rule, _ in rules.get(operation, Counter()).most_common()),
                *counts[operation],
            )
            for operation in sorted(counts, key=lambda operation: (-counts[operation][0], operation))
        ),
        uncovered=tuple(
            Uncovered(operation, path, number, reached, reason, _nearest(operation))
            for (operation, path, reached, reason), number in gaps.items()
        ),
        roles=dict(sorted(found.items())),
        promises=promises.count,
        replayed=promises.internal,
        delta=promises.delta,
        rho=promises.density,
        runs=runs,
    )


def covers(name: str, facts: Any, step: StepPlan | None) -> tuple[str, bool]:
    """Whether a node has a rule of its own, and the reason where it is blocked."""
    operation = REGISTRY.get(name)
    if operation is None:
        return "", False
    reason = operation.obstacle(facts)
    return reason, not reason and (step is None or not step.fallback)


def _nearest(name: str) -> str:
    known = [other for other, operation in REGISTRY.items() if other != name and operation.family != "blocked"]
    return next(iter(get_close_matches(name, known, 1)), "")
