"""What a forward pass must leave as it was: buffers and random states; and models that would not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from dynlrp.buffers import Buffer, Kept
from dynlrp.errors import CompiledModuleError, InputError, TrainingModeError, kind
from dynlrp.randomness import Draws, alone, sources


def survey(model: Any, allow_training: bool) -> tuple[list[nn.Parameter], list[Buffer]]:
    """Look over the modules once. Returns the parameters without ``requires_grad`` that could have it, and the buffers;
    raises for what cannot be explained: compiled modules, active dropout, batch statistics."""
    if hasattr(model, "_orig_mod") or hasattr(model, "_torchdynamo_orig_callable"):
        raise CompiledModuleError(
            "this module went through torch.compile, so its graph is one opaque node: explain the original, "
            "model._orig_mod, which shares its weights"
        )
    if not callable(model) or isinstance(model, type):
        what = f"the class {model.__name__}, not one of its instances" if isinstance(model, type) else kind(model)
        raise InputError(f"the model is {what}: give an nn.Module or a function of tensors")
    frozen: dict[nn.Parameter, None] = {}
    buffers: list[Buffer] = []
    if not isinstance(model, nn.Module):
        return [], buffers
    active: set[nn.Module] = set()
    for module in modules(model):
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise CompiledModuleError(
                f"{type(module).__name__} in this model went through torch.compile, so its graph is one opaque node: "
                f"explain the model without compiling that part"
            )
        if not allow_training and _is_random(module):
            active.add(module)
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.requires_grad and _is_differentiable(parameter):
                frozen[parameter] = None
        buffers += [(module, name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
    if active:
        places = [f"{name or 'the model'} ({type(m).__name__})" for name, m in model.named_modules() if m in active]
        raise TrainingModeError(
            f"dropout or batch statistics are active in {', '.join(places[:5])}{' ...' if len(places) > 5 else ''}. "
            f"Call model.eval() before explaining, or pass allow_training=True to explain one random draw."
        )
    return list(frozen), buffers


def _is_differentiable(parameter: nn.Parameter) -> bool:
    return (parameter.is_floating_point() or parameter.is_complex()) and not parameter.is_inference()


def _is_random(module: nn.Module) -> bool:
    """Whether a module draws random numbers or mixes the samples of a batch."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    if isinstance(module, _NormBase):  # instance norm: per sample, but it may update statistics
        return module.training and module.track_running_stats
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    dropout = getattr(module, "dropout", None)
    return isinstance(dropout, float) and dropout > 0


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, without the cost of their names."""
    stack, seen = [model], {model}
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


class State:
    """``keep`` it, once all is well, where the forward pass was the caller's own."""

    keep = False


@contextmanager
def same_state(
    buffers: Sequence[Buffer], allow_training: bool, again: Callable[[], object] | None = None
) -> Iterator[State]:
    """Put buffers and random states back. A forward that draws random numbers is an error unless that is allowed.

    Other threads draw from the same generators, and what they drew stays drawn. So where there are such and a state
    changed, ``again`` repeats the forward pass under observation; without it, all draws count as this thread's.
    """
    before, only, kept, state = [(source, source.get()) for source in sources()], alone(), Kept(buffers), State()
    drawn = False
    try:
        yield state
    finally:
        changed = {source: value for source, value in before if not source.same(value, source.get())}
        keep = state.keep and allow_training
        if changed and again is not None and not only and not keep:
            now = Kept(buffers)
            draws = Draws(changed, again)
            now.put_back(allow_training)
            drawn = bool(draws.ours)
            changed = {source: changed[source] for source in draws.ours - draws.others}
        else:
            drawn = bool(changed)
        if not state.keep or (drawn and not allow_training):
            for source, value in changed.items():
                source.put(value)
            kept.put_back(allow_training)
    if drawn and not allow_training:
        raise TrainingModeError(
            "the forward pass drew random numbers (dropout as a function, sampling): its explanation would be of one "
            "random draw. Call model.eval(), or pass allow_training=True."
        )
