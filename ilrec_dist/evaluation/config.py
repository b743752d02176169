"""The configuration section `evaluation`: beam search and what the report shows."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from ilrec_dist.common.config_fields import Bool, Int, NonNegative, Positive, section


@section
class EvaluationConfig:
    beam: Annotated[Int, Ge(10)] = 20  # Hit@10 needs ten
    exclude_seen: Bool = True
    batch_size: Positive = 64  # users
    examples: NonNegative = 5  # users shown in the report
