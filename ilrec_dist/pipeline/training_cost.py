"""What each training of a run cost in FLOPs, from what its log counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ilrec_dist.common.config_fields import section_from_dict
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.run_layout import RESULT
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.flops import Trained, Work, forward_flops, training_flops
from ilrec_dist.objective.config import ObjectiveConfig, num_intermediate_layers
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.prompting import epoch_samples
from ilrec_dist.reporting.metrics_log import read_metrics

# Items whose candidates are counted at once.
CHUNK_ITEMS = 1 << 20


@dataclass(frozen=True)
class ScopeSizes:
    """How many columns of the head each scope
    of METHOD.md §2 has for a row, on average.
    """

    all: float
    item_tokens: float
    valid_next: float

    @staticmethod
    def of(artifacts: RunArtifacts) -> ScopeSizes:
        """Counted over the training's interactions."""
        catalogue = artifacts.catalogue
        popularity = count_training(artifacts.dataset).popularity
        return ScopeSizes(
            catalogue.vocab_size,
            len(catalogue.used_tokens()),
            mean_candidates(artifacts.trie, popularity),
        )


def mean_candidates(trie: Trie, popularity: np.ndarray) -> float:
    """The mean number of valid_next candidates
    of a row, with items weighted by popularity.
    """
    total = rows = 0.0
    for first in range(0, len(popularity), CHUNK_ITEMS):
        items = np.arange(first, min(first + CHUNK_ITEMS, len(popularity)))
        lengths = trie.catalogue.item_lengths(items)
        weights = popularity[items]
        rows += float((weights * lengths).sum())
        for p in range(trie.depth):
            nodes = trie.item_node(p, items)
            children = trie.child_start[p][nodes + 1] - trie.child_start[p][nodes]
            total += float((weights * children * (p < lengths)).sum())
    return total / max(rows, 1.0)


def head_columns(config: ObjectiveConfig, num_layers: int, sizes: ScopeSizes) -> list[float]:
    """Columns of the head for a row of each
    stream: the final layer's, then the others'.
    """
    size = {"all": sizes.all, "item_tokens": sizes.item_tokens, "valid_next": sizes.valid_next}
    intermediate = 0.0
    if config.cpd_mu > 0:
        intermediate = size[config.distill_scope]
    reads_negatives = config.beta > 0 or config.crr_lambda > 0
    if reads_negatives and config.negatives_from != "final":
        intermediate = max(intermediate, size[config.negative_scope])
    layers = num_intermediate_layers(config, num_layers)
    return [size[config.softmax_scope], *[intermediate] * layers]


def training_costs(config: Config, artifacts: RunArtifacts) -> dict[tuple[str, int | None], float]:
    """`training_cost` of every training of the
    run, by (method, seed), where it is known.
    """
    sizes = ScopeSizes.of(artifacts)
    costs = {
        (method, seed): training_cost(config, artifacts, sizes, method, seed)
        for method in config.train.methods
        for seed in config.train.seeds
    }
    return {training: cost for training, cost in costs.items() if cost is not None}


def training_cost(
    config: Config, artifacts: RunArtifacts, sizes: ScopeSizes, name: str, seed: int
) -> float | None:
    """FLOPs of the finished training of one method
    and seed, and of those that it stands on.

    It stands on the training of the method that it starts from, and on the
    forward pass of its reference. The collaborative model's training is no
    part of it. None where the curves that count the tokens were deleted.
    """
    method, folder = get_method(name), artifacts.folders.training(name, seed)
    model = read_json_object(folder / RESULT)["model"]
    backbone = section_from_dict(BackboneConfig, model["backbone"])
    trained = trained_parts(model, artifacts)
    columns = head_columns(method.objective(config.objective), backbone.num_layers, sizes)
    lines = [line for line in read_metrics(folder) if "tokens" in line]
    if not lines:
        return None
    tokens, rows = (sum(line[key] for line in lines) for key in ("tokens", "rows"))
    epochs = lines[-1]["epoch"]
    # A token of a sequence attends to half of it on average.
    work = Work(tokens, tokens / (epoch_samples(config, artifacts) * epochs) / 2, rows)
    cost = training_flops(backbone, work, columns, trained)
    if method.needs_reference:
        # Each round of self-play has a reference of its own.
        self_play = method.samples == "self_play_pairs"
        passes = method.preference(config.preference).rounds if self_play else 1
        cost += passes * forward_flops(backbone, work, columns, trained.lora) / epochs
    if method.starts_from is not None:
        start = training_cost(config, artifacts, sizes, method.starts_from, seed)
        return None if start is None else cost + start
    return cost


def trained_parts(model: Mapping[str, Any], artifacts: RunArtifacts) -> Trained:
    """What a training trained, from the entry "model" of its result."""
    trainable = model.get("trainable", "full")
    first, last = artifacts.catalogue.vocabulary.added_tokens
    return Trained(
        all_weights=trainable == "full",
        lora=section_from_dict(LoraConfig, model["lora"]) if "lora" in model else None,
        new_rows=last - first if trainable.endswith("new_rows") else 0,
    )
