"""What a preference training needs besides a
targets' training: its start, pairs, reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.distributed as dist

from ilrec_dist.cf.sasrec.pairwise import PairwiseProbabilities
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_array
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.items.text_embeddings import document_vectors, item_documents
from ilrec_dist.items.text_neighbours import nearest_items
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.objective import Objective
from ilrec_dist.objective.preference import PreferenceObjective
from ilrec_dist.objective.registry import Method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import empty_backbone, initial_backbone
from ilrec_dist.pipeline.method_settings import training_settings
from ilrec_dist.pipeline.prompting import batch_source
from ilrec_dist.pipeline.self_play import SelfPlay
from ilrec_dist.samples.negatives import HardNegatives, Negatives, NoNegatives, UniformNegatives
from ilrec_dist.samples.preference_pairs import PreferenceBatch, PreferenceBatchMaker
from ilrec_dist.samples.prefetch import BatchSource
from ilrec_dist.training.kept_arrays import kept_array
from ilrec_dist.training.phases import Phases
from ilrec_dist.training.reference import known_of_targets
from ilrec_dist.training.spec import TrainingSpec

# Items near a target in text, of which the popular ones are drawn more often.
NEIGHBOURS = 50


def first_weights(config: Config, artifacts: RunArtifacts, method: Method, seed: int) -> Backbone:
    """The backbone as the method's training begins.

    Freshly made, or with the best weights of the method that this one starts from.
    """
    if method.starts_from is None:
        return initial_backbone(config, artifacts, seed)
    weights = artifacts.folders.training(method.starts_from, seed) / BEST
    return load_training_weights(empty_backbone(config, artifacts, seed), weights)


def sample_source(
    config: Config,
    artifacts: RunArtifacts,
    method: Method,
    spec: TrainingSpec,
    objective: Objective,
    parallel: ParallelState,
) -> tuple[BatchSource, Phases | None]:
    """What makes the method's batches, and its phases where it has some.

    `objective` has the weights that the training begins with:
    where the loss reads a reference, its log-probabilities are
    computed here, unless they are kept. Collective over all ranks.
    """
    dataset, catalogue, trie = artifacts.training, artifacts.catalogue, artifacts.trie
    if method.samples == "targets":
        return batch_source(config, artifacts, spec.seed), None
    windows = artifacts.training_windows(config.train)
    assert isinstance(objective, PreferenceObjective)
    spec.folder.mkdir(parents=True, exist_ok=True)
    negatives = _negatives(config, artifacts, method, spec, parallel)
    maker = PreferenceBatchMaker(dataset, catalogue, trie, windows, negatives)
    if method.samples == "self_play_pairs":
        rounds = method.preference(config.preference).rounds
        train = training_settings(config, method)
        return maker, SelfPlay(rounds, train, config.evaluation, maker, objective, spec, parallel)
    if method.needs_reference and len(windows):
        flips = None
        if method.needs_flips:
            flips = PairwiseProbabilities.open(artifacts.folders.cf, dataset)

        def flip_column(batch: PreferenceBatch) -> np.ndarray:
            assert flips is not None
            pairs = batch.negatives[:, 0], batch.items
            return flips(batch.users, batch.positions, *pairs)[:, None]

        maker.known = known_of_targets(
            objective.to(parallel.device),
            maker,
            spec.folder,
            "reference",
            spec.fingerprint,
            config.train.batch_size // (parallel.dp * config.train.accumulation_steps),
            parallel,
            None if flips is None else flip_column,
        )
    return maker, None


def _negatives(
    config: Config,
    artifacts: RunArtifacts,
    method: Method,
    spec: TrainingSpec,
    parallel: ParallelState,
) -> Negatives:
    dataset, trie = artifacts.training, artifacts.trie
    if method.samples == "self_play_pairs":
        return NoNegatives()
    if method.samples == "hard_pairs":
        neighbours = _text_neighbours(config, artifacts, spec, parallel)
        popularity = count_training(artifacts.dataset).popularity
        return HardNegatives(dataset, trie, neighbours, popularity, spec.seed)
    count = method.preference(config.preference).negatives
    return UniformNegatives(dataset, trie, count, spec.seed)


def _text_neighbours(
    config: Config, artifacts: RunArtifacts, spec: TrainingSpec, parallel: ParallelState
) -> np.ndarray:
    """int32 [I, NEIGHBOURS]; rank 0 computes them once for the training."""
    dataset = artifacts.dataset
    documents = item_documents(dataset)
    if documents is None:
        raise UserError(
            f"{spec.method}: its negatives are near the target in text, and the items have "
            f"neither titles nor texts; bring an item table (data.items_path), or leave "
            f"{spec.method} out of train.methods"
        )

    def write(path: Path) -> None:
        if dist.get_rank() == 0:
            vectors = document_vectors(config.items, documents, dataset.item_ids, path.parent)
            nearest = nearest_items(vectors, NEIGHBOURS, parallel.device)
            write_array(path, nearest)

    return kept_array(spec.folder, "neighbours", spec.fingerprint, write)
