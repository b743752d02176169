"""The configuration section `evaluation`: beam search and what the report shows."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import AfterValidator

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Int,
    NonNegative,
    OnlyIf,
    Positive,
    distinct,
    section,
)


@section(affects="evaluate")
class EvaluationConfig:
    # Beams kept at every step; Hit@10 needs ten.
    beam: Annotated[Int, Ge(10), Affects("train", "evaluate")] = 20
    # Whether items of the history are taken out of every method's list.
    exclude_seen: Annotated[Bool, Affects("train", "evaluate")] = True
    # Test users that are ranked, a fixed seeded sample; 0: all.
    users: NonNegative = 0
    # Users whose beams are searched together.
    batch_size: Annotated[Positive, Affects()] = 64
    # Whether mixtures of each trained model with the CF model and transitions are evaluated too.
    fusion: Bool = False
    # Items of each source that are candidates of a fusion.
    fusion_candidates: Annotated[
        Positive, OnlyIf("evaluation.fusion true", lambda config: bool(config.evaluation.fusion))
    ] = 100
    # Sequence models that are trained as further baselines, like the CF model.
    baselines: Annotated[list[Literal["gru4rec", "caser"]], AfterValidator(distinct), Affects()] = (
        field(default_factory=list)
    )
    # Users whose lists the report shows.
    examples: Annotated[NonNegative, Affects()] = 5
