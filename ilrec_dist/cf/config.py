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
    max_history: Positive = 50  # items
    epochs: Positive = 30
    patience: Positive = 3  # epochs without a better validation NDCG@10
    batch_size: Positive = 128  # users
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    cf_folds: Annotated[Int, Ge(1)] = (
        2  # 1 = no cross-fitting: rewards leak the target; for the leakage test only
    )
    split_table: Bool = False  # the item table and its optimizer are split over the launch.workers
    rewards: Literal["in_process", "actor"] = "in_process"
    reward_index: Literal["auto", "scan", "flat", "ivf_pq", "hnsw"] = (
        "auto"  # scan: the whole catalogue, exact; auto: scan up to 65,536 items, else ivf_pq
    )
    reward_shards: Positive = 1  # ranges of the catalogue that separate reward actors may hold
    reward_replicas: Positive = 1  # reward actors (of each shard) that share the requests
    reward_retries: NonNegative = 16  # of a request, after an actor's death or silence
    reward_cache: Bool = False  # keep rewards on disk per (user, position)
    seed: NonNegative = 0


CF_SERVING = (
    "rewards",
    "reward_index",
    "reward_shards",
    "reward_replicas",
    "reward_retries",
    "reward_cache",
)  # of CFConfig: change no model
