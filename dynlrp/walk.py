"""The pass itself: multipliers travel from the output to the sources, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dynlrp.auditor import Auditor
from dynlrp.errors import (
    BrokenPromiseError,
    DynLRPError,
    FreedGraphError,
    NonFiniteError,
    NotDifferentiableError,
    RuleError,
)
from dynlrp.graph import CHANGED, FREED, Edge, Graph, fit, next_number, saved, vjp
from dynlrp.ledger import ACCOUNTS, Ledger
from dynlrp.plan import Link, Plan, StepPlan
from dynlrp.precision import Wide
from dynlrp.promise import SINCE, Promises, intact, plain
from dynlrp.rules.operation import Account, Grads, Replay, Writes, divide, dot, inner, masked_product, product
from dynlrp.there import there
from dynlrp.twice import has_dead_end, loses

SMALL = 8192
"""Largest multiplier of a leaf that is kept as it is, to be summed to the leaf's shape when somebody asks."""


class Expand(Protocol):
    """How an operation is explained by others, and the module path of an operation by its sequence number."""

    def __call__(
        self, step: LiveStep, function: Replay, values: Sequence[Tensor | None], grads: Grads
    ) -> Sequence[Tensor | None]: ...

    def path(self, sequence: int) -> str: ...


class LiveStep:
    """A :class:`StepPlan` joined with its node: what rules see (:class:`~dynlrp.rules.operation.Step`)."""

    __slots__ = (
        "_values", "_walk", "balanced", "merged", "met", "node", "operation", "plan", "present", "signals", "wants"
    )  # fmt: skip

    def __init__(self, plan: StepPlan, walk: Walk) -> None:
        self.plan = plan
        self.node = walk.graph.nodes[plan.index]
        self._walk = walk
        self.operation = plan.operation
        self.wants, self.signals, self.present = plan.wants, plan.signals, plan.present
        self.met: dict[tuple[int | None, int], bool] = {}
        """Activations that somebody keeps, and whether by promise and not by the node itself: of an operand and 0, or
        of None and the number of an output."""
        self._values: dict[tuple[int | None, int], Tensor] = {}
        """What was taken, for a rule that asks again."""
        self.balanced = False
        """The activations on both sides are promised."""
        self.merged = None if plan.merged is None else LiveStep(plan.merged, walk)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def nonnegative(self) -> bool:
        return self.plan.nonnegative

    @property
    def gated(self) -> bool:
        return self.plan.gated

    @property
    def hidden(self) -> bool:
        return self.plan.hidden

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.plan.outputs

    def saved(self, name: str | int) -> Any:
        wide = self._walk.wide
        return saved(self.node, name) if wide is None else wide.saved(self.node, name)

    def operand(self, index: int) -> Tensor:
        key = (index, 0)
        value = self._values.get(key)
        if value is None:
            attribute = self.operation.saved.get(index)
            if self.met.get(key):
                value = self._walk.promises.take(self._edge(index))
            elif attribute is not None:
                value = plain(self.saved(attribute))
            else:
                raise RuleError(f"a rule for {self.name} took operand {index} without needs=[Need({index})]")
            self._values[key] = value
        return value

    def there(self, index: int) -> Tensor | None:
        return there(self._walk.graph, self.plan.operands[index])

    def output(self, number: int = 0) -> Tensor:
        key = (None, number)
        value = self._values.get(key)
        if value is None:
            result = self._result(number)
            if self.met.get(key):
                value = self._walk.promises.take(*self._head(number))
            elif result:
                value = plain(self.saved(result))
            else:
                raise RuleError(f"a rule for {self.name} took the output without needs=[Need(None)]")
            self._values[key] = value
        return value

    def zeros(self, like: Tensor) -> Tensor:
        return self._walk.zeros(like)

    def forget(self) -> None:
        """Let go of what was taken."""
        self._values.clear()
        if self.merged is not None:
            self.merged.forget()

    def book(self, account: Account, amount: Tensor) -> None:
        if account not in ACCOUNTS:
            raise RuleError(f"a rule for {self.name} books into {account!r}; there are {', '.join(ACCOUNTS)}")
        if self.plan.travels:
            self._walk.ledger.book(account, self.name, self.node._sequence_nr(), amount)

    def vjp(self, grads: Grads) -> Sequence[Tensor | None]:
        return self._walk.vjp(self.node, grads)

    def expand(self, function: Replay, values: Sequence[Tensor | None], grads: Grads) -> Sequence[Tensor | None]:
        return self._walk.expand(self, function, values, grads)

    @property
    def auditor(self) -> Auditor | None:
        """Who watches this operation."""
        return self._walk.auditor if self.plan.travels else None

    def settle(self, operand: int | None, number: int = 0) -> str:
        """Find a keeper for an operand, or for an output of this number; returns why there is none."""
        key = (operand, number)
        if key in self.met:
            return ""
        attribute = self._result(number) if operand is None else self.operation.saved.get(operand)
        promises, own = self._walk.promises, None
        if attribute is not None:
            own = intact(self.node, attribute)
        if own:
            problem = ""
        elif operand is None:
            problem = promises.settle(*self._head(number), waiter=self.plan.index)
        elif own is False and self.plan.operands[operand] is None:
            problem = f"the constant that it {SINCE}"
        else:
            problem = promises.settle(self._edge(operand), waiter=self.plan.index)
        if not problem:
            self.met[key] = not own
        return problem

    def settle_bias(self) -> str:
        """The bias of an absorbed batch norm, where it has one."""
        return self.settle(2) if self.present[2] or self.saved("weight") is not None else ""

    def _edge(self, operand: int) -> Edge:
        edge = self.plan.operands[operand]
        return Edge(self.plan.index, ~operand) if edge is None else edge

    def _result(self, number: int) -> str | None:
        """The attribute that holds an output."""
        return self.operation.result if self.merged is None and number == 0 else None

    def _head(self, number: int) -> tuple[Edge, bool]:
        carrier = self.plan if self.merged is None else self.merged.plan
        return Edge(carrier.index, number), self.gated and number == 0


class Walk:
    """One pass over one graph."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        promises: Promises,
        ledger: Ledger,
        expand: Expand,
        *,
        masks: Mapping[Edge, Tensor] | None = None,
        check: bool = False,
        release: bool = False,
        wide: Wide | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self.plan = plan
        self.graph = graph
        self.promises = promises
        self.ledger = ledger
        self.expand = expand
        self.masks = masks or {}
        """What passes through some tensors, by a factor for every entry; the rest is held back."""
        self.check = check
        self.release = release
        self.wide = wide
        self.vjp = vjp if wide is None else wide.vjp
        self.auditor = auditor
        self._looks = check or auditor is not None
        self.twice = torch.is_grad_enabled()
        """Relevance itself is recorded, to be differentiated."""
        self._begun = 0
        """The first sequence number of what the current step records."""
        self._live: dict[int, LiveStep] = {}
        self._slots: dict[int, list[Tensor | None]] = {}
        self._zeros: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def settle(self, edges: Sequence[Edge]) -> None:
        """Find a keeper for every promise, those for the values of ``edges`` among them, or raise
        :class:`BrokenPromiseError` naming each that is broken."""
        if self.auditor is not None:
            self.auditor.settle()
        broken: list[str] = []
        for step in self.plan.settling:
            live = self._step(step)
            if live.merged is not None:
                problem = live.merged.settle_bias()
                if problem:
                    broken.append(f"{self._place(step.index)} absorbs a batch norm: {problem}")
            for need in step.needs:
                problem = live.settle(need.operand, need.output)
                if problem and not need.optional:
                    what = "the output" if need.operand is None else f"operand {need.operand}"
                    broken.append(f"{self._rule(step)} needs {what}: {problem}")
            for output in step.converts:
                problem = self.promises.settle(Edge(step.index, output), step.gated, step.index)
                if problem:
                    broken.append(f"{self._rule(step)} needs the output: {problem}")
            for position, edge in enumerate(step.operands):
                if edge is None:
                    continue
                if step.scaled[position]:
                    problem = self.promises.settle(edge, waiter=step.index)
                    if problem:
                        broken.append(f"{self._place(step.index)} needs operand {position} as relevance: {problem}")
                elif step.promised[position] and live.settle(position):
                    self._unresolved(step)
            if step.balances:
                wanted: list[tuple[int | None, int]] = [(None, output) for output in step.outputs]
                if step.operation.writes is None:
                    wanted += [(position, 0) for position, counts in enumerate(step.counted) if counts]
                if any(live.settle(*activation) for activation in wanted):
                    self._unresolved(step)
                else:
                    live.balanced = True
            if step.unshared:
                self.ledger.without_share.append((step.name, self._path(step.index)))
            if step.fallback:
                self.ledger.fallbacks.append((step.name, self._path(step.index)))
        for edge in edges:
            problem = self.promises.settle(edge)
            if problem:
                name = self.graph.names[edge.node]
                broken.append(f"the relevance of the tensor made by {name} needs its value: {problem}")
        self.promises.close()
        if broken:
            self.forget()
            raise BrokenPromiseError(
                "\n".join(dict.fromkeys(broken)) + "\nA graph alone does not know its constants: explain() the model, "
                "which records them in a second run (but not inside vmap); beside a graph of your own, let parameters "
                "require grad and give buffers and other constants as copies that do (x.clone().requires_grad_()). "
                "Write operations out of place (x = x + 1, not x += 1). Or name a composite whose rules need no "
                "activations here ('attnlrp')."
            )

    def run(self, seed: Tensor, root: Edge, keep: Sequence[Edge]) -> dict[Edge, Tensor]:
        """Send ``seed`` from ``root``; returns what arrived at each edge of ``keep``, in the edge's gauge."""
        if self.plan.apart and is_batchedtensor(seed):
            raise RuleError(f"{self.plan.apart} takes one multiplier at a time")
        try:
            return self._run(seed, root, keep)
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of what was settled, which knows this walk."""
        self._live.clear()
        self._slots.clear()
        self._zeros.clear()

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros that nobody writes into, made once for each shape."""
        key = (like.shape, like.dtype, like.device)
        if key not in self._zeros:
            self._zeros[key] = like.new_zeros(like.shape)
        return self._zeros[key]

    def _run(self, seed: Tensor, root: Edge, keep: Sequence[Edge]) -> dict[Edge, Tensor]:
        arrived: dict[Edge, Tensor] = {}
        slots, nodes, looks, auditor, twice = self._slots, self.graph.nodes, self._looks, self.auditor, self.twice
        self._receive(root.node, root.output, seed, nodes[root.node]._input_metadata)
        for step in self.plan.steps:
            grads = slots.pop(step.index, None)
            chain = step.chain
            if grads is not None:
                if auditor is not None:
                    auditor.arrive(step, grads)
                if step.kept:
                    self._hold_back(step.index, grads, step.travels)
                    arrived.update((Edge(step.index, n), g) for n, g in enumerate(grads) if g is not None)
                index = step.index
                if twice:
                    self._begin(step)
                try:
                    if not chain:
                        self._visit(step, grads)
                    elif not step.exact:
                        self._hand_on(step, None, step.links[0], self.vjp(nodes[index], grads)[0])
                    else:
                        value = cast(Tensor, grads[0])
                        for index in chain:
                            if self.wide is None:
                                value = nodes[index](value)
                            else:
                                value = cast(Tensor, self.vjp(nodes[index], [value])[0])
                            if looks:
                                self._look(step, index, 0, value)
                        place, output = cast(Edge, step.target)
                        self._receive(place, output, value, nodes[place]._input_metadata)
                        del value
                except (DynLRPError, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    raise self._explained(error, step, index) from error
            if self.release:
                self._live.pop(step.index, None)
                for index in chain or (step.index,):
                    nodes[index] = None
        for index in {edge.node for edge in keep}:
            row = slots.get(index)
            if row is not None:
                if auditor is not None:
                    auditor.end(index, row)
                self._hold_back(index, row, any(Edge(index, n) in self.plan.ends for n in range(len(row))))
                arrived.update((Edge(index, n), g) for n, g in enumerate(row) if g is not None)
        self.ledger.settle()
        if auditor is not None:
            auditor.close()
        return arrived

    def _hold_back(self, index: int, grads: list[Tensor | None], travels: bool) -> None:
        """Let through what the masks of a node's outputs let through."""
        for output, g in enumerate(grads):
            edge = Edge(index, output)
            mask = self.masks.get(edge)
            if mask is None or g is None:
                continue
            grads[output] = passed = g * mask
            held = g - passed
            activation = self.plan.activation(edge)
            amount = held.sum() if activation is None else inner(held, self.promises.take(activation))
            if travels:
                self.ledger.book("held back", self.graph.names[index], self.graph.nodes[index]._sequence_nr(), amount)

    def _visit(self, step: StepPlan, grads: list[Tensor | None]) -> None:
        for output in step.converts:
            grads[output] = self._convert(step, output, grads[output])
        booked = len(self.ledger) if step.balances else 0
        live = None
        if step.plain:
            results = self.vjp(self.graph.nodes[step.index], grads)
        else:
            live = self._live.get(step.index) or LiveStep(step, self)
            results = step.rule(live, grads)
            if not isinstance(results, Sequence) or len(results) != len(step.operands):
                count = f"{len(results)} values" if isinstance(results, Sequence) else type(results).__name__
                raise RuleError(f"{self._rule(step)} returned {count} for {len(step.operands)} operands")
            if step.balances:
                self._balance(step, live, grads, results, booked)
        for link in step.links:
            self._hand_on(step, live, link, results[link.position])
        if live is not None:
            live.forget()

    def _hand_on(self, step: StepPlan, live: LiveStep | None, link: Link, value: Tensor | None) -> None:
        """Bring a result to the operand's shape and dtype, as autograd's engine would, and to its next node."""
        if value is None:
            return
        if not isinstance(value, Tensor):
            raise RuleError(
                f"{self._rule(step)} returned {type(value).__name__} for operand {link.position}, not a tensor"
            )
        if link.account and value.numel() <= SMALL and self._unsummed(step, link, value):
            self._book(step, live, link, value, link.account)
            return
        metadata = self.graph.nodes[link.node]._input_metadata
        expected = metadata[link.output]
        dtype = expected.dtype if self.wide is None else self.wide.of(expected.dtype)
        if value.dtype is not dtype or expected.is_nested_tensor or list(value.shape) != expected.shape:
            value = self._fit(step, link.position, value, expected, dtype)
        if self._looks:
            self._look(step, step.index, link.position, value)
        if self.twice and has_dead_end(value, self._begun):
            raise NotDifferentiableError(
                f"relevance cannot be differentiated through {self._place(step.index)}: PyTorch has no derivative of "
                f"its backward pass. Write it in other operations, or explain without create_graph."
            )
        if link.account:
            self._book(step, live, link, value, link.account)
        if link.passes:
            if link.scaled:
                value = product(value, self.promises.take(Edge(link.node, link.output)))
            self._receive(link.node, link.output, value, metadata)

    def _unsummed(self, step: StepPlan, link: Link, value: Tensor) -> bool:
        """Whether a multiplier ends at a leaf of fewer dimensions: it may be summed together with others."""
        if not link.leaf or link.passes or step.emits_relevance or self.check:
            return False
        shape = self.graph.nodes[link.node].variable.shape
        return value.ndim > len(shape) and value.shape[value.ndim - len(shape) :] == shape

    def _begin(self, step: StepPlan) -> None:
        self._begun = next_number()
        problem = loses(self.graph.nodes[step.index])
        if problem:
            raise NotDifferentiableError(
                f"relevance cannot be differentiated through {self._place(step.index)}: {problem}"
            )

    def _look(self, step: StepPlan, index: int, position: int, value: Tensor) -> None:
        if self.auditor is not None:
            self.auditor.leave(step, index, position, value)
        if self.check and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"relevance is not finite first behind operand {position} of {self._place(index)} "
                f"(rule {type(step.rule).__name__})"
            )

    def _receive(self, index: int, output: int, value: Tensor, metadata: Sequence[Any]) -> None:
        row = self._slots.get(index)
        if row is None:
            row = self._slots[index] = [None] * len(metadata)
        present = row[output]
        row[output] = value if present is None else present + value

    def _book(self, step: StepPlan, live: LiveStep | None, link: Link, value: Tensor, account: Account) -> None:
        """Relevance of a parameter, or of a coefficient, leaves the graph."""
        if step.emits_relevance:
            amount = value.sum()
        elif link.leaf:
            leaf = self.graph.nodes[link.node].variable
            self.ledger.book_later(account, step.name, self._sequence(step), value, leaf)
            return
        elif live is not None and (link.position, 0) in live.met:
            amount = dot(value, live.operand(link.position))
        else:
            return
        self.ledger.book(account, step.name, self._sequence(step), amount)

    def _convert(self, step: StepPlan, output: int, value: Tensor | None) -> Tensor | None:
        """Change the gauge of what arrives at one output."""
        if value is None:
            return None
        activation = self.promises.take(Edge(step.index, output), step.gated)
        if step.relevance_in:
            if step.hidden:  # masked scores may be infinite
                return masked_product(value, activation)
            return product(value, activation)
        multiplier = divide(value, activation.conj(), 0.0)
        if step.travels:
            lost = value.sum() - dot(multiplier, activation)
            self.ledger.book("absorbed", step.name, self._sequence(step), lost)
        return multiplier

    def _balance(
        self, step: StepPlan, live: LiveStep, grads: Grads, results: Sequence[Tensor | None], booked: int
    ) -> None:
        """Book what went in and neither came out nor was booked by the rule, where only the activations tell."""
        if not live.balanced:
            return
        if step.operation.writes is not None:
            lost = self._written(step, live, grads[0], step.operation.writes)
        else:
            lost = self._kept_back(step, live, grads, results) - self.ledger.since(booked)
        if isinstance(lost, Tensor):
            live.book("held back" if step.fallback else step.aside or "constants", lost)

    def _written(self, step: StepPlan, live: LiveStep, g: Tensor | None, writes: Writes) -> Tensor | float:
        """Relevance of the number that the operation writes itself."""
        if g is None or not g.numel():
            return 0.0
        number, wide = None, torch.promote_types(g.dtype, torch.float32)
        places = writes(live, g if step.relevance_in else live.output())
        if not places:
            return 0.0
        if not step.relevance_in:
            number = places[0][(0,) * places[0].ndim]
            if number.device.type == "cpu" and get_proxy_mode() is None and not number.item():
                return number.new_zeros((), dtype=wide.to_real())  # on a GPU, or for a program, it is not known yet
            places = writes(live, g)
        total = sum((place.sum(dtype=wide) for place in places[1:]), places[0].sum(dtype=wide))
        return total if number is None else inner(total, number)

    def _kept_back(
        self, step: StepPlan, live: LiveStep, grads: Grads, results: Sequence[Tensor | None]
    ) -> Tensor | float:
        """Relevance of the outputs that is not that of the operands."""
        amount: Tensor | float = 0.0
        for output, g in enumerate(grads):
            if g is not None:
                amount = amount + (g.sum() if step.relevance_in else inner(g, live.output(output)))
        for position, counts in enumerate(step.counted):
            value = results[position]
            if counts and value is not None:
                amount = amount - (value.sum() if step.emits_relevance else inner(value, live.operand(position)))
        return amount

    def _fit(self, step: StepPlan, position: int, value: Tensor, expected: Any, dtype: torch.dtype) -> Tensor:
        try:
            return fit(value, expected, dtype)
        except RuntimeError as error:
            raise RuleError(
                f"{self._rule(step)} returned shape {tuple(value.shape)} for operand "
                f"{position}, which has shape {tuple(expected.shape)}"
            ) from error

    def _step(self, step: StepPlan) -> LiveStep:
        live = self._live.get(step.index)
        if live is None:
            live = self._live[step.index] = LiveStep(step, self)
        return live

    def _unresolved(self, step: StepPlan) -> None:
        self.ledger.unresolved.append((step.name, self._path(step.index)))

    def _path(self, index: int) -> str:
        return self.expand.path(self.graph.nodes[index]._sequence_nr())

    def _place(self, index: int) -> str:
        return f"{self.graph.names[index]} in {self._path(index) or 'the model'}"

    def _sequence(self, step: StepPlan) -> int:
        number: int = self.graph.nodes[step.index]._sequence_nr()
        return number

    def _rule(self, step: StepPlan) -> str:
        return f"{type(step.rule).__name__} on {self._place(step.index)}"

    def _explained(self, error: Exception, step: StepPlan, index: int) -> DynLRPError:
        text = str(error)
        if FREED in text or "backward through the graph a second time" in text:
            return FreedGraphError(
                f"the saved tensors of {self._place(index)} are gone: a backward pass freed this graph. Explain before "
                f"backward(), or call backward(retain_graph=True)."
            )
        if CHANGED in text:
            return BrokenPromiseError(
                f"{type(step.rule).__name__} on {self._place(index)}: what it {SINCE}. Write operations out of place "
                f"(x = x + 1, not x += 1), or explain before anything is changed. {text}"
            )
        return RuleError(f"{type(step.rule).__name__} failed on {self._place(index)}: {type(error).__name__}: {text}")
