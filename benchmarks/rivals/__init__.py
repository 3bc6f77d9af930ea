"""Other ways to explain a model, behind one interface.

    from benchmarks.rivals import METHODS
    relevance = METHODS["zennit EpsilonPlus"](Case(model, images), target)  # of the shape of the explained input

The libraries are imported when a method is first called; ``method.installed`` says whether they are there.
"""

from benchmarks.rivals import autolrp, captum, lxt, ours, plain, zennit
from benchmarks.rivals.method import Method

METHODS: dict[str, Method] = {
    method.name: method for module in (ours, zennit, lxt, captum, autolrp, plain) for method in module.METHODS
}
"""Every method by name."""

__all__ = ["METHODS", "Method"]
