"""The configuration section `cf`: the collaborative-filtering model and its rewards."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from ilrec_dist.common.config_fields import (
    Bool,
    Fraction,
    Int,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    section,
)


@section
class CFConfig:
    """SASRec with full-softmax cross-entropy (METHOD.md §5)."""

    hidden_size: Positive = 64
    num_layers: Positive = 2
    num_heads: Positive = 2
    dropout: Fraction = 0.2
    # Items that the model reads at most.
    max_history: Positive = 50
    epochs: Positive = 30
    # Epochs without a better validation NDCG@10 before the training stops.
    patience: Positive = 3
    # Windows in a batch: most users have one.
    batch_size: Positive = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    # Models for cross-fitting. With 1 the rewards leak the target: for the leakage test only.
    cf_folds: Annotated[Int, Ge(1)] = 2
    # Shard the item table and its optimizer state over the launch.workers.
    split_table: Bool = False
    rewards: Literal["in_process", "actor"] = "in_process"
    # `scan` reads the whole catalogue and is exact; `auto` scans up to 65,536 items and takes
    # `ivf_pq` above.
    reward_index: Literal["auto", "scan", "flat", "ivf_pq", "hnsw"] = "auto"
    # Ranges of the catalogue that separate reward actors may hold.
    reward_shards: Positive = 1
    # Reward actors (of each shard) that share the requests.
    reward_replicas: Positive = 1
    # Times that a request is sent again after an actor's death or silence.
    reward_retries: NonNegative = 16
    # Keep rewards on disk per (user, position).
    reward_cache: Bool = False
    seed: NonNegative = 0


# The fields of CFConfig that change no model, only how its rewards are served.
CF_SERVING = (
    "rewards",
    "reward_index",
    "reward_shards",
    "reward_replicas",
    "reward_retries",
    "reward_cache",
)
