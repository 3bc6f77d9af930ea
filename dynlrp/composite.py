"""Composites: ordered maps from places in a graph to rules, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from dynlrp.errors import InputError
from dynlrp.rules.addition import Magnitude
from dynlrp.rules.attention import Attention
from dynlrp.rules.linear import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZPlus
from dynlrp.rules.operation import REGISTRY, Gradient, Hold, Rule
from dynlrp.rules.product import Ungated
from dynlrp.rules.submodule import SUBMODULE

ROLES = ("attention", "gate", "self gate", "softmax", "transition")


class Site(NamedTuple):
    """Where a rule is wanted."""

    family: str
    name: str
    roles: frozenset[str]
    modules: tuple[str, ...]
    """Paths of the modules that were running, innermost last."""
    first: bool
    last: bool


def innermost(modules: tuple[str, ...]) -> str:
    """Path of the innermost of running modules; the model's own where none ran."""
    return modules[-1] if modules else ""


@dataclass(frozen=True)
class When:
    """A condition on a place in the graph; what is left out always holds.

    ``family``: an operation family (``dense``, ``convolution``, ``product``, ``attention``, ``softmax``,
    ``elementwise``, ``normalization``, ``addition`` ...). ``role``: ``attention``, ``gate``, ``self gate``,
    ``softmax`` or ``transition``. ``path``: a glob over
    module paths, of the innermost module that an operation runs in. ``first`` / ``last``: linear operations with no
    other between them and the input / the output. ``name``: the exact node name.

    ``module``, a glob over module paths too, goes alone: it selects every call of a module as a whole, with all that
    runs inside. Its rule explains the call as one step, a :class:`Composite` in place of a rule what runs inside.
    """

    family: str | None = None
    role: str | None = None
    path: str | None = None
    first: bool | None = None
    last: bool | None = None
    name: str | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        others = (self.family, self.role, self.path, self.first, self.last, self.name)
        if self.module is not None and any(condition is not None for condition in others):
            raise InputError(f"When(module={self.module!r}) selects modules as a whole and takes no other condition")
        families = {operation.family for operation in REGISTRY.values()} | {"product"}
        if self.family is not None and self.family not in families:
            raise InputError(f"there is no operation family {self.family!r}; there are {', '.join(sorted(families))}")
        if self.role is not None and self.role not in ROLES:
            raise InputError(f"there is no role {self.role!r}; there are {', '.join(ROLES)}")

    def __call__(self, site: Site) -> bool:
        return (
            self.module is None
            and (self.family is None or self.family == site.family)
            and (self.name is None or self.name == site.name)
            and (self.role is None or self.role in site.roles)
            and (self.first is None or self.first == site.first)
            and (self.last is None or self.last == site.last)
            and (self.path is None or fnmatchcase(innermost(site.modules), self.path))
        )


@dataclass(frozen=True)
class Composite:
    """Rules by place: the first entry that holds wins; where none does, the operation's own rule is used. Entries for
    whole modules, ``When(module=...)``, go before all others.

    >>> Composite.of("mine", {When("convolution", first=True): Flat(), "convolution": Gamma(0.25)})
    """

    name: str
    entries: tuple[tuple[When, Rule | Composite], ...] = ()

    def __post_init__(self) -> None:
        for when, value in self.entries:
            if isinstance(value, Composite) and when.module is None:
                raise InputError(
                    f"composite {value.name!r} inside of {self.name!r} needs the modules it is for: When(module=...)"
                )

    @classmethod
    def of(cls, name: str, rules: Mapping[str | When, Rule | Composite]) -> Composite:
        """A composite from a mapping; a string key is a family."""
        return cls(name, tuple((When(key) if isinstance(key, str) else key, rule) for key, rule in rules.items()))

    def pick(self, site: Site) -> Rule | None:
        """The rule of the first entry that holds at ``site``."""
        scope, rule = self.scope(site.modules) if self.modules else (self, None)
        if site.family == SUBMODULE:
            return rule
        return next((rule for when, rule in scope.entries if isinstance(rule, Rule) and when(site)), None)

    def scope(self, modules: tuple[str, ...], met: set[When] | None = None) -> tuple[Composite, Rule | None]:
        """The composite for what runs in the innermost of running modules, and the rule for that one as one step.

        Entries that select one of the modules are added to ``met``.
        """
        scope = self
        for path in modules:
            for when, value in scope.entries:
                if when.module is not None and fnmatchcase(path, when.module):
                    if met is not None:
                        met.add(when)
                    if isinstance(value, Rule):
                        return scope, value
                    scope = value
                    break
        return scope, None

    @cached_property
    def conditions(self) -> tuple[When, ...]:
        """All conditions, those of inner composites among them."""
        return tuple(
            condition
            for when, value in self.entries
            for condition in (when, *(value.conditions if isinstance(value, Composite) else ()))
        )

    @cached_property
    def modules(self) -> tuple[When, ...]:
        """Those that select modules as a whole."""
        return tuple(when for when in self.conditions if when.module is not None)

    @property
    def positional(self) -> bool:
        """Whether first and last linear operations must be known."""
        return any(when.first is not None or when.last is not None for when in self.conditions)

    @property
    def by_path(self) -> bool:
        """Whether the module paths of every node must be known."""
        return any(when.path is not None or when.module is not None for when in self.conditions)


def _zennit(name: str, convolution: Rule, first: Mapping[str | When, Rule] | None = None) -> Composite:
    return Composite.of(name, {**(first or {}), "convolution": convolution, "dense": Epsilon(1e-6)})


def epsilon_gamma_box(
    low: float | Sequence[float] | None = None, high: float | Sequence[float] | None = None
) -> Composite:
    """z-box on the first layer, gamma 0.25 on other convolutions, epsilon 1e-6 on dense layers.

    ``low`` and ``high`` bound the inputs, all of them or each channel's; None takes each sample's own minimum and
    maximum.
    """
    return _zennit("epsilon_gamma_box", Gamma(0.25), {When("convolution", first=True): ZBox(low, high)})


FLAT_FIRST: dict[str | When, Rule] = {When(family, first=True): Flat() for family in ("convolution", "dense")}

COMPOSITES: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        # Operations' own rules are AttnLRP's: epsilon -> 0 on linear layers, equal shares, softmax by its VJP.
        # Gamma 1 is what most networks choose for one that is left out (benchmarks/faithfulness).
        Composite.of("auto", {"convolution": Gamma(1.0)}),
        Composite("attnlrp"),
        Composite("epsilon"),
        Composite.of(
            "cplrp",
            {
                When("softmax", role="attention"): Hold(),
                When("product", role="gate"): Ungated(),
                "attention": Attention(scores=0.0),
            },
        ),
        _zennit("epsilon_plus", ZPlus()),
        _zennit("epsilon_alpha2_beta1", AlphaBeta(2.0, 1.0)),
        _zennit("epsilon_plus_flat", ZPlus(), FLAT_FIRST),
        _zennit("epsilon_alpha2_beta1_flat", AlphaBeta(2.0, 1.0), FLAT_FIRST),
        epsilon_gamma_box(),
        Composite.of("dynamiclrp", {"addition": Magnitude(), "convolution": Gamma(125.0)}),
        Composite.of("gradient_x_input", {"convolution": Epsilon(), "dense": Epsilon(), When(): Gradient()}),
    )
}
"""Composites by name."""


def composite_named(composite: str | Composite) -> Composite:
    """A composite, looked up by name if need be."""
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, Rule):
        raise InputError(
            f"{composite!r} is a rule; a composite says where it is used, as in "
            f"Composite.of('mine', {{'convolution': {type(composite).__name__}()}})"
        )
    try:
        return COMPOSITES[composite]
    except (KeyError, TypeError):
        raise InputError(f"no composite is called {composite!r}; there are {', '.join(COMPOSITES)}") from None
