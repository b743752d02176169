"""The configuration section `evaluation`: beam search and what the report shows."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from ilrec_dist.common.config_fields import Bool, Int, NonNegative, Positive, section


@section
class EvaluationConfig:
    # Beams kept at every step; Hit@10 needs ten.
    beam: Annotated[Int, Ge(10)] = 20
    # Whether items of the history are taken out of every method's list.
    exclude_seen: Bool = True
    # Users whose beams are searched together.
    batch_size: Positive = 64
    # Whether mixtures of each trained model with the CF model and transitions are evaluated too.
    fusion: Bool = False
    # Items of each source that are candidates of a fusion.
    fusion_candidates: Positive = 100
    # Users whose lists the report shows.
    examples: NonNegative = 5
