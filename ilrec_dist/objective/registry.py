"""The table of training methods: the one place that knows them by name.

Everything that differs between methods is a field of `Method`. Other modules take
methods from METHODS, in its order, and ask their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ilrec_dist.common.errors import UserError
from ilrec_dist.objective.config import ObjectiveConfig, PreferenceConfig

# What a method's batches hold: targets alone, or pairs with negatives that are drawn uniformly,
# that are near the target in text and popular, or that the model itself would recommend.
Samples = Literal["targets", "uniform_pairs", "hard_pairs", "self_play_pairs"]


def _reads_nothing(_: PreferenceConfig) -> PreferenceConfig:
    return PreferenceConfig()


def _reads(
    *names: str, beta: float, negatives: int = 1
) -> Callable[[PreferenceConfig], PreferenceConfig]:
    """The schedule and β, whose default is the method's own, and the named settings."""

    def settings(config: PreferenceConfig) -> PreferenceConfig:
        read = {"epochs", "learning_rate", *names}
        values = {f.name: getattr(config, f.name) for f in fields(config) if f.name in read}
        return PreferenceConfig(**{"negatives": negatives} | values | {"beta": config.beta or beta})

    return settings


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
    # Makes the module that is trained, from the backbone, the method's own sections `objective`
    # and `preference`, the catalogue and the process layout. A function by its name,
    # "package.module:function", since the table is read where no model is.
    module: str = "ilrec_dist.objective.ilrec:cross_layer"
    # The method's own section `preference`, like `objective`.
    preference: Callable[[PreferenceConfig], PreferenceConfig] = _reads_nothing
    samples: Samples = "targets"
    # The method whose best weights of the same seed this one begins with; None: none.
    starts_from: str | None = None
    # Whether the loss reads log π_ref, that of the weights that the training begins with.
    needs_reference: bool = False
    # Whether the loss reads ε, how likely the collaborative model gives the negative above the
    # target.
    needs_flips: bool = False
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
register(
    Method(
        "dpo",
        "DPO",
        _cross_entropy,
        module="ilrec_dist.objective.preference:dpo",
        preference=_reads(beta=0.1),
        samples="uniform_pairs",
        starts_from="sft",
        needs_reference=True,
        compared_with=("sft",),
    )
)
register(
    Method(
        "sdpo",
        "S-DPO",
        _cross_entropy,
        module="ilrec_dist.objective.preference:softmax_dpo",
        preference=_reads("negatives", beta=0.1),
        samples="uniform_pairs",
        starts_from="sft",
        needs_reference=True,
        compared_with=("sft",),
    )
)
register(
    Method(
        "simpo",
        "SimPO",
        _cross_entropy,
        module="ilrec_dist.objective.preference:simpo",
        preference=_reads("gamma", beta=2.0),
        samples="uniform_pairs",
        starts_from="sft",
        compared_with=("sft",),
    )
)
register(
    Method(
        "rosepo",
        "RosePO",
        _cross_entropy,
        module="ilrec_dist.objective.preference:smoothed_dpo",
        preference=_reads(beta=0.1),
        samples="hard_pairs",
        starts_from="sft",
        needs_reference=True,
        needs_flips=True,
        compared_with=("sft",),
    )
)
register(
    Method(
        "sprec",
        "SPRec",
        _cross_entropy,
        module="ilrec_dist.objective.preference:dpo",
        preference=_reads("rounds", beta=0.1),
        samples="self_play_pairs",
        starts_from="sft",
        needs_reference=True,
        compared_with=("sft",),
    )
)
