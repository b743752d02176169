"""The configuration section `cf`: the collaborative-filtering model and its rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Fraction,
    Int,
    NonNegative,
    NonNegativeFloat,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


def _by_actors(config: Any) -> bool:
    return bool(config.cf.rewards == "actor")


# The baselines' sequence models are trained with these keys too.
_BASELINES = Affects("cf", "baseline")


@section(affects="cf")
class CFConfig:
    """SASRec with full-softmax cross-entropy (METHOD.md §5)."""

    hidden_size: Annotated[Positive, _BASELINES] = 64
    num_layers: Positive = 2
    num_heads: Positive = 2
    dropout: Annotated[Fraction, _BASELINES] = 0.2
    # Items that the model reads at most.
    max_history: Annotated[Positive, _BASELINES] = 50
    epochs: Annotated[Positive, _BASELINES] = 30
    # Epochs without a better validation NDCG@10 before the training stops.
    patience: Annotated[Positive, _BASELINES] = 3
    # Windows in a batch: most users have one.
    batch_size: Annotated[Positive, _BASELINES] = 128
    learning_rate: Annotated[PositiveFloat, _BASELINES] = 1e-3
    weight_decay: Annotated[NonNegativeFloat, _BASELINES] = 0.0
    # Models for cross-fitting. With 1 the rewards leak the target: for the leakage test only.
    cf_folds: Annotated[Int, Ge(1)] = 2
    # Shard the item table and its optimizer state over the launch.workers.
    split_table: Bool = False
    rewards: Annotated[Literal["in_process", "actor"], Affects()] = "in_process"
    # `scan` reads the whole catalogue and is exact; `auto` scans up to 65,536 items and takes
    # `ivf_pq` above.
    reward_index: Annotated[
        Literal["auto", "scan", "flat", "ivf_pq", "hnsw"], Affects("rewards")
    ] = "auto"
    # Ranges of the catalogue that separate reward actors may hold.
    reward_shards: Annotated[
        Positive,
        Affects("rewards"),
        OnlyIf(
            "cf.reward_index flat, ivf_pq or hnsw, or auto above 65,536 items",
            lambda config: config.cf.reward_index != "scan",
        ),
    ] = 1
    # Reward actors (of each shard) that share the requests.
    reward_replicas: Annotated[Positive, Affects(), OnlyIf("cf.rewards actor", _by_actors)] = 1
    # Times that a request is sent again after an actor's death or silence.
    reward_retries: Annotated[NonNegative, Affects(), OnlyIf("cf.rewards actor", _by_actors)] = 16
    # Keep rewards on disk per (user, position).
    reward_cache: Annotated[Bool, Affects()] = False
    seed: Annotated[NonNegative, _BASELINES] = 0
