"""The table of training methods: the one place that knows them by name.

Everything that differs between methods is a field of `Method`. Other modules take
methods from METHODS, in its order, and ask their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.objective.objective import Objective

# Makes the module that is trained, from the method's own objective.
ModuleFactory = Callable[[Backbone, ObjectiveConfig, Catalogue, ParallelState], Objective]


@dataclass(frozen=True)
class Method:
    """A way to train the language model."""

    # The name in train.methods, folders, results and on the command line.
    name: str
    # The name in headings and charts.
    title: str
    # The method's own objective, from the run's section `objective`. Settings without an
    # effect on the method are at their defaults there, so that changing them does not
    # change the training's fingerprint.
    objective: Callable[[ObjectiveConfig], ObjectiveConfig]
    # Makes the module that is trained.
    module: ModuleFactory = CrossLayerObjective.build
    # Methods and baselines that the paired intervals compare this one with, where the run
    # has them.
    compared_with: tuple[str, ...] = ()
    # Reports emphasise this method, and `ilrec recommend` takes its weights by default.
    highlighted: bool = False

    def needs_rewards(self, config: ObjectiveConfig) -> bool:
        """Whether training reads collaborative rewards (METHOD.md §5)."""
        return self.objective(config).crr_lambda > 0

    def needs_intermediate_layers(self, config: ObjectiveConfig) -> bool:
        """Whether the loss reads intermediate layers: plain cross-entropy does not."""
        return not self.objective(config).is_cross_entropy


def _cross_entropy(config: ObjectiveConfig) -> ObjectiveConfig:
    """β = μ = λ = 0 (METHOD.md §6): only the scope and how it is computed remain."""
    return ObjectiveConfig(
        cpo_beta=0.0,
        cpd_mu=0.0,
        crr_lambda=0.0,
        softmax_scope=config.softmax_scope,
        backend=config.backend,
        workspace_mib=config.workspace_mib,
    )


def _as_configured(config: ObjectiveConfig) -> ObjectiveConfig:
    return config


# Tables and charts show the methods in this order.
METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method to the table. Raises ValueError when its name is taken."""
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is registered already")
    METHODS[method.name] = method


def get_method(name: str) -> Method:
    """The method of that name. Raises UserError that lists the known names."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; expected {known_names()}")
    return METHODS[name]


def known_names() -> str:
    """The registered names as an error message lists them: 'a', 'b' or 'c'."""
    *preceding, last = (repr(name) for name in METHODS)
    return f"{', '.join(preceding)} or {last}" if preceding else last


def default_method(trained: Sequence[str]) -> str:
    """The one of the `trained` methods to recommend with where none is named."""
    highlighted = (name for name in trained if name in METHODS and METHODS[name].highlighted)
    return next(highlighted, trained[0])


register(Method("sft", "SFT", _cross_entropy))
register(
    Method(
        "ilrec",
        "ILRec",
        _as_configured,
        compared_with=("sft", "transitions"),
        highlighted=True,
    )
)

# The methods of a run that names none.
DEFAULT_METHODS = tuple(METHODS)
