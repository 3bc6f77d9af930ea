"""What was asked of a model: its forward pass, and the runs that answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp.aliases import Aliases
from dynlrp.capture import Recording
from dynlrp.condition import Condition
from dynlrp.errors import InputError, NonFiniteError, TargetError
from dynlrp.inputs import Inputs, as_dicts, call
from dynlrp.names import matching
from dynlrp.options import Options
from dynlrp.places import ATTENTION, parse
from dynlrp.recorder import EVERYTHING, Recorder, Wanted
from dynlrp.rules.operation import REGISTRY
from dynlrp.run import Run
from dynlrp.target import Seed, Target, all_targets, find_output, make_seed
from dynlrp.unread import Unread


@dataclass
class Request:
    """What was asked, so that a forward pass can be repeated."""

    model: Any
    inputs: Any
    targets: list[Target] | Literal["all"]
    conditions: list[Condition]
    options: Options
    frozen: Sequence[nn.Parameter]
    """Parameters that stand-ins take the place of."""
    record: Wanted | None = None
    """Tensors whose values are kept in the forward pass, as promises lack them."""

    def unread(self) -> Unread | None:
        """What watches, or knows, which saved tensors nobody reads."""
        options, targets = self.options, self.targets
        if options.create_graph or options.audit or self.record is not None:
            return None
        leaves = pytree.tree_leaves(as_dicts(self.inputs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = (
            options.composite, options.on_unknown, options.output, options.layers, options.parameters, len(self.frozen),
            options.wide and options.wide.dtype,
            targets if isinstance(targets, str) else frozenset([type(target) for target in targets]),
            tuple([tuple(condition) for condition in self.conditions]),
            tuple([leaf.dtype if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]),
        )  # fmt: skip
        try:
            number = hash(kind)
        except TypeError:  # an option that is none
            return None
        return Unread.of(self.model, number, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def forward(self, release: bool = True, unread: Unread | None = None) -> list[tuple[Run, list[int]]]:
        """Run the model and gather what is wanted. ``unread`` follows what is saved.

        Returns a run for every tensor that relevance starts from, with the numbers of the pairs it is for.
        """
        options = self.options
        attached = options.create_graph and release  # else it is only to be looked at
        with torch.inference_mode(False), torch.enable_grad():
            inputs = Inputs(self.inputs, attached)
            places = list(dict.fromkeys([*options.layers, *(name for c in self.conditions for name in c)]))
            recording = Recording(self.model, places, options.composite, attached)
            parameters = self._parameters()
            aliases = None
            if self.frozen:
                aliases = Aliases(self.frozen, parameters, attached)
            wanted = EVERYTHING if options.audit else self.record
            recorder = None if wanted is None else Recorder(wanted)
            saving = nullcontext() if unread is None else unread.saving()
            if options.wide is not None:
                saving = options.wide.saving(unread)
            with recording.watching(), saving, aliases or nullcontext(), recorder or nullcontext():
                result = call(self.model, inputs.arguments())
            found = find_output(result, options.output)
            targets, conditions = self._pairs(found, inputs.sizes())
            groups: dict[tuple[int, bool], list[tuple[int, Seed]]] = {}
            with recorder or nullcontext():
                for number, target in enumerate(targets):
                    seed = make_seed(found, target)
                    groups.setdefault((id(seed.root), seed.relevance), []).append((number, seed))
            output = result if attached else None
            del result, found
            calls = recording.take_calls()
            runs = []
            for group in groups.values():
                numbers = [number for number, _ in group]
                run = Run(
                    [seed for _, seed in group], options, attached=attached, release=release and not attached,
                    recording=recording, calls=calls,
                )  # fmt: skip
                runs.append((run, numbers))
                run.output, run.aliases = output, aliases
                if recorder is not None:
                    run.keep(recorder, self.record)
                inputs.want(run)
                for pair in recording.shared:
                    run.tell_apart(pair)
                run.taps = {name: [] for name in recording.requested()}
                for name, returned in recording.outputs.items():
                    for kept in returned:
                        run.tap(name, kept)
                heads = [pattern for pattern in map(parse, places) if pattern[1] in ATTENTION]
                if heads:
                    run.tap_attention(heads)
                run.place([conditions[number] for number in numbers])
                for name, parameter in parameters.items():
                    run.observe(name, parameter if aliases is None else aliases.stand_in(parameter))
            recording.outputs.clear()
            recording.shared.clear()
        return runs

    def record_more(self, runs: Sequence[tuple[Run, list[int]]]) -> None:
        """Record in the next forward pass what the promises of ``runs`` lacked, or after that everything. Two passes of
        a model number their operations in the same way, or lack more."""
        lacking = [run for run, _ in runs if run.missing]
        if self.record is not None or len(lacking) != 1:  # several graphs have numbers of their own
            self.record = EVERYTHING
            return
        (run,) = lacking
        assert run.recording is not None
        start = run.recording.start
        self.record = {(number - start, edge.output) for edge, number in run.missing.items()}

    def look(self) -> None:
        """Run again for what the model does meanwhile."""
        self.forward(release=False)

    def diagnose(self, wanted: int) -> None:
        """Run again with every value looked at, and raise for the first that is not finite."""
        for place, leaf in enumerate(pytree.tree_leaves(as_dicts(self.inputs))):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise NonFiniteError(f"input {place} holds NaN or infinity")
        run, numbers = next(
            pair for pair in replace(self, record=EVERYTHING).forward(release=False) if wanted in pair[1]
        )
        found = _first_infinite(run)  # no frame of a traceback may hold a node longer than the run, which frees them
        if found:
            raise NonFiniteError(f"an activation is not finite first behind {found}")
        place = numbers.index(wanted)
        if not bool(torch.isfinite(run.values[place]).all()):
            raise NonFiniteError("the explained output is not finite")
        run.explain([place], check=True)
        raise NonFiniteError("relevance is not finite")

    def _pairs(self, output: Tensor, sizes: set[int]) -> tuple[list[Target], list[Condition]]:
        """Targets and conditions, of the same length."""
        targets = all_targets(output) if self.targets == "all" else self.targets
        plain = any(target is None or isinstance(target, int) for target in targets)
        if plain and output.ndim == 1 and sizes and len(output) not in sizes:
            raise TargetError(
                f"the output of shape {tuple(output.shape)} has no batch dimension that fits the inputs; add one in "
                f"front of the inputs (x.unsqueeze(0)) so that the output is (batch, ...)"
            )
        if not targets or not self.conditions:
            raise InputError("there are no targets" if not targets else "there are no conditions")
        count = max(len(targets), len(self.conditions))
        if {len(targets), len(self.conditions)} - {1, count}:
            raise InputError(f"{len(targets)} targets do not pair with {len(self.conditions)} conditions")
        return _repeated(targets, count), _repeated(self.conditions, count)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose relevance is wanted, by name."""
        wanted = self.options.parameters
        if not wanted:
            return {}
        if not isinstance(self.model, nn.Module):
            raise InputError("parameters= needs an nn.Module")
        everything = dict(self.model.named_parameters(remove_duplicate=False))
        names: dict[str, nn.Parameter] = {}
        found_once: set[int] = set()
        for pattern in wanted:
            for name in matching(pattern, everything, "parameter"):
                if name == pattern or id(everything[name]) not in found_once:  # a glob finds a tied one once
                    names[name] = everything[name]
                    found_once.add(id(everything[name]))
        return names


def _first_infinite(run: Run) -> str:
    """Name and place of the first operation whose result is not finite."""
    assert run.recording is not None
    for node, number, value in run.recorded:
        operation = REGISTRY.get(node.name())
        if number < 0 or (operation is not None and operation.copies):
            continue
        if bool((torch.isnan(value) | (value == torch.inf)).any()):  # scores may be masked with -inf
            return f"{node.name()} in {run.recording.path(node._sequence_nr()) or 'the model'}"
    return ""


def _repeated(given: Sequence[Any], count: int) -> list[Any]:
    return [given[n % len(given)] for n in range(count)]
