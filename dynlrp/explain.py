"""The ways in: :func:`explain` and :func:`explain_many` run a model, :func:`relevance` takes a graph that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dynlrp.buffers import Buffer
from dynlrp.composite import Composite
from dynlrp.condition import Condition
from dynlrp.errors import BrokenPromiseError, InputError, NonFiniteError, NoPathError, kind
from dynlrp.explanation import Explanation
from dynlrp.options import Names, OnUnknown, Options
from dynlrp.recorder import EVERYTHING
from dynlrp.request import Request
from dynlrp.run import Run, Settled
from dynlrp.state import same_state, survey
from dynlrp.target import Seed, Target, make_seed
from dynlrp.unread import LetGoError


def explain(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    condition: Condition | None = None,
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
    audit: bool = False,
    create_graph: bool = False,
) -> Explanation:
    """Explain one output of a model per sample by Layer-wise Relevance Propagation.

    The model runs once; once more, recording what is missing, where a rule or the ledger needs an activation that the
    graph did not keep and that cannot be recomputed, or that was let go as earlier explanations did not read it. Its
    parameters, gradients, buffers, flags, hooks, mode and the random state stay as they are.

    Args:
        model: an ``nn.Module`` or any function of tensors.
        inputs: a tensor; a tuple or list of positional arguments; a mapping of keyword arguments (a tokenizer's
            output). Floating point tensors get relevance of their shape; integer tensors that index an embedding, or a
            parameter (``self.table[ids]``), get one number per id; others are passed through and get None.
        target: what to explain of an output of shape ``(batch, ...)``: None, the largest output of each sample; an
            int, or one per sample; an index tuple such as ``(position, token)``, or a list of one per sample; a
            floating point tensor of the output's shape, the initial relevance; a function from the output to one
            number per sample; a :class:`Contrast` of two outputs.
        composite: which rules, as a name in ``dynlrp.COMPOSITES`` or a :class:`Composite`.
        layers: names or globs of modules whose output's relevance is wanted, in ``explanation.layers``; ``"name:1"`` is
            the second of several that a module returns. ``"name:input"`` is what the module was given, with all that
            uses it; ``:query``, ``:key``, ``:value``,
            ``:weights`` and ``:heads`` (the output of each head) are what attention in that module makes, ``(batch,
            heads, ...)``.
        parameters: names or globs of parameters, for ``explanation.parameters``; relevance is summed over all uses. A
            glob finds a tied parameter once, by its first name.
        condition: what relevance may pass through, by name as in ``layers``: channel numbers, a :class:`Part`, several
            of them, or a mask. The rest is held back, as the ledger shows (Achtibat et al. 2023).
        output: which entry of a structured output, by key, attribute or position. By default ``logits``, else the
            first floating point tensor.
        precision: ``torch.float32`` or ``torch.float64``, where relevance shall be computed in at least this dtype,
            whatever the model's. The model itself runs as it is.
        on_unknown: ``"gradient"`` explains operations without a rule by their gradient and lists them in the ledger.
        allow_training: explain although dropout or batch statistics are active.
        audit: balance every operation and module, in ``explanation.audit``. Every tensor is recorded for that, so it
            takes more memory and time; relevance stays the same.
        create_graph: relevance (of inputs, layers and parameters) becomes part of a graph of its own, as a function of
            the parameters and of inputs that require grad, so that it may stand in a loss. What the model returned is
            in ``explanation.output``, and one ``backward()`` serves both. The forward pass is then the caller's own:
            where the model trains, batch statistics and random state are left as one call of it leaves them.

    Raises:
        DynLRPError: one of its subclasses, saying what is wrong, where, and the cure.
    """
    options = Options(
        composite, layers=layers, parameters=parameters, output=output, precision=precision, on_unknown=on_unknown,
        allow_training=allow_training, audit=audit, create_graph=create_graph,
    )  # fmt: skip
    ((_, explanation),) = explanations(model, inputs, [target], [condition or {}], options)
    return explanation


def explain_many(
    model: Callable[..., Any],
    inputs: Any,
    targets: Iterable[Target] | Literal["all"] = (None,),
    *,
    conditions: Iterable[Condition] = ({},),
    chunk: int | None = None,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
    audit: bool = False,
) -> list[Explanation]:
    """Explain many outputs of a model, or one under many conditions, from one forward pass.

    Targets and conditions are paired; one alone goes with all of the others. Multipliers get a dimension for the
    pairs, so that one traversal of the graph serves ``chunk`` of them; each gets what :func:`explain` gives it alone.
    Targets that are functions are graphs of their own and take a traversal each, as do graphs with an operation that
    cannot take several multipliers at once.

    Args:
        targets: each as in :func:`explain`; ``"all"`` for every output of a sample.
        conditions: each as in :func:`explain`; ``{}`` for none.
        chunk: pairs per traversal; by default as many as some 1 GiB holds multipliers for.

    Returns:
        An explanation per pair. Other arguments and errors are those of :func:`explain`.
    """
    options = Options(
        composite, layers=layers, parameters=parameters, output=output, precision=precision, on_unknown=on_unknown,
        allow_training=allow_training, audit=audit,
    )  # fmt: skip
    found = dict(explanations(model, inputs, targets, conditions, options, chunk))
    return [found[number] for number in sorted(found)]


def explanations(
    model: Callable[..., Any],
    inputs: Any,
    targets: Iterable[Target] | Literal["all"],
    conditions: Iterable[Condition],
    options: Options,
    chunk: int | None = None,
) -> Iterator[tuple[int, Explanation]]:
    """The explanations of :func:`explain_many` one by one, each with the number of its pair, as they are ready."""
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be positive, not {chunk}")
    everything = isinstance(targets, str) and targets == "all"
    if not everything and (isinstance(targets, str) or not isinstance(targets, Iterable)):
        raise InputError(f"targets is a sequence of targets, such as [3] or [None], or 'all', not {targets!r:.80}")
    frozen, buffers = survey(model, options.allow_training)
    asked: list[Target] | Literal["all"] = "all" if everything else list(targets)
    conditions = list(conditions)
    if options.create_graph:
        _are_constants((asked, conditions))
    yield from answers(Request(model, inputs, asked, conditions, options, frozen), buffers, chunk)


def answers(request: Request, buffers: Sequence[Buffer], chunk: int | None = None) -> Iterator[tuple[int, Explanation]]:
    """The explanations that were asked for. The request then knows what its forward pass must record."""
    options = request.options
    done: set[int] = set()
    unread = request.unread()
    while True:
        try:
            with same_state(buffers, options.allow_training, request.look) as state:
                runs = request.forward(unread=unread)
                if unread is not None and unread.missed:  # which the model may have passed over
                    raise LetGoError(unread)
                found = _explained(runs, chunk, done, request.record is EVERYTHING)
                if options.create_graph:  # the state is kept if all is well
                    ready = list(found)
                    state.keep = bool(ready) and all(explanation.finite() for _, explanation in ready)
                    found = iter(ready)
            for number, explanation in found:
                if unread is not None and unread.missed:
                    raise LetGoError(unread)
                if not explanation.finite():
                    with same_state(buffers, options.allow_training, request.look):
                        request.diagnose(number)
                done.add(number)
                yield number, explanation
        except LetGoError as error:
            if unread is None or error.unread is not unread:  # of a graph that is older
                raise
            unread, runs, found = unread.again(), [], iter(())  # and with them the graph
            continue
        if len(done) == sum(len(numbers) for _, numbers in runs):
            if unread is not None:
                unread.learn()
            return
        request.record_more(runs)
        if unread is not None:  # what runs twice reads other tensors
            unread.leave()
            unread = None
        del runs, found  # their graph


def _explained(
    runs: Sequence[tuple[Run, list[int]]], chunk: int | None, done: Set[int], final: bool
) -> Iterator[tuple[int, Explanation]]:
    """What ``runs`` explain and is not yet ``done``; stops where a value is missing that another run could record,
    unless this is the ``final`` one."""
    for run, numbers in runs:
        places = [place for place, number in enumerate(numbers) if number not in done]
        size = chunk or run.room()
        for first in range(0, len(places), size):
            some = places[first : first + size]
            try:
                found = run.explain(some)
            except BrokenPromiseError:
                if final or not run.missing:
                    raise
                return
            if run.missing and not final and any(explanation.ledger.unresolved for explanation in found):
                return
            yield from zip([numbers[place] for place in some], found, strict=True)


def relevance(
    output: Tensor,
    wrt: Tensor | Sequence[Tensor],
    *,
    initial: Tensor | None = None,
    composite: str | Composite = "auto",
    on_unknown: OnUnknown = "error",
    audit: bool = False,
    create_graph: bool = False,
) -> Explanation:
    """Explain a tensor that autograd already has a graph for, beside ordinary backprop.

    The graph stays as it is: a later ``backward()`` gives the gradients it would have given. Leaves are read as they
    are now, so ask before an optimiser step. Where an operation saved a leaf, a change in place is an error; nothing
    tells what a bias was.

    Args:
        output: the tensor to explain.
        wrt: a tensor, or several, that ``output`` depends on; ``.relevance`` of the result mirrors it. A tensor that
            does not take part gets None. Parameters beside other tensors are weights whose own relevance is read on
            the way, as with ``explain(parameters=...)``: they change nothing for the others.
        initial: relevance of ``output``, of its shape; by default the output itself.
        composite, on_unknown: as in :func:`explain`.
        audit: balance every operation, in ``explanation.audit``; those whose activations are neither in the graph nor
            to be recomputed are listed as unresolved.
        create_graph: relevance becomes part of a graph of its own, so that it may stand in a loss beside ``output``.
    """
    options = Options(composite, on_unknown=on_unknown, audit=audit, create_graph=create_graph)
    if create_graph:
        _are_constants(initial)
    if not isinstance(output, Tensor):
        raise InputError(f"output must be a tensor, not {kind(output)}: of a structured one, name the tensor (.logits)")
    tensors = [wrt] if isinstance(wrt, Tensor) else list(wrt)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise InputError("wrt must be a tensor or a sequence of tensors")
    for number, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise InputError(
                f"tensor {number} of wrt does not require grad, so the graph does not know it: x.requires_grad_() "
                f"before the model runs"
            )
    if all(isinstance(t, nn.Parameter) for t in tensors):
        raise InputError("wrt holds parameters alone; name an input beside them, whose relevance they pass on")
    if initial is None:
        if not output.requires_grad:
            raise NoPathError("the output does not require grad: it was computed without a graph")
        batch = output.shape[0] if output.ndim else 1
        seed = Seed(
            output, torch.ones_like(output), output.detach().reshape(batch, output.shape[1:].numel()).sum(1), False
        )
    elif isinstance(initial, Tensor) and initial.is_floating_point():
        seed = make_seed(output, initial)
    else:
        raise InputError("initial must be a floating point tensor of the output's shape")
    run = Run([seed], options, attached=create_graph)
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            run.observe(str(number), tensor)
        else:
            run.want(*get_gradient_edge(tensor)[:2], tensor if create_graph else tensor.detach())
    changed = run.changed()
    if changed:
        raise BrokenPromiseError(
            f"a leaf was changed in place after {changed} saved it, so it is not what was explained: ask before "
            f"anything is changed, such as by an optimiser step"
        )
    (explanation,) = run.explain([0])
    if not explanation.finite():
        run.explain([0], check=True)
        raise NonFiniteError("relevance is not finite")
    attributed = iter(explanation.relevance)
    found = [
        explanation.parameters.pop(str(number)) if str(number) in run.leaves else next(attributed)
        for number in range(len(tensors))
    ]
    explanation.relevance = (
        found[0] if isinstance(wrt, Tensor) else type(wrt)(found) if isinstance(wrt, list) else tuple(found)
    )
    return explanation


def settle(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    allow_training: bool = False,
) -> tuple[Settled, int]:
    """What :func:`explain` does up to the point where relevance moves, and the runs of the model that it takes.

    Operations without a rule are no error: their steps are marked as fallbacks.
    """
    frozen, buffers = survey(model, allow_training)
    options = Options(composite, output=output, on_unknown="gradient", allow_training=allow_training)
    request = Request(model, inputs, [target], [{}], options, frozen)
    fake = active_fake_mode() is not None  # draws nothing, and the model is a copy
    for count in range(1, 4):
        with nullcontext() if fake else same_state(buffers, allow_training, request.look):
            runs = request.forward(release=False)
        ((run, _),) = runs
        final = request.record is EVERYTHING
        try:
            settled = run.settle({})
            settled.walk.forget()
            if not settled.ledger.unresolved or not run.missing or final:
                return settled, count
        except BrokenPromiseError:
            if not run.missing or final:
                raise
        request.record_more(runs)
    raise AssertionError("the last run records everything")


def _are_constants(given: Any) -> None:
    """Relevance that is to be differentiated is not differentiated by what it starts with or passes through."""
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given)):
        raise InputError(
            "with create_graph=True, initial relevance and masks are constants: detach() those that require grad, or "
            "make them a function of the output (target=lambda y: ...)"
        )
