"""A run's folder, and what is loaded from it: the data set, the catalogue, the trie and
the rewards. Nothing here loads the libraries of the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.manifest import manifest_hashes, verify
from ilrec_dist.common.run_layout import BEST, MODELS, RESULT, RunFolders
from ilrec_dist.config.tree import Config, check_together
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.items.catalogue import REPAIR, Catalogue, catalogue_hash
from ilrec_dist.items.language_model import LANGUAGE_MODEL
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.decoder import max_positions
from ilrec_dist.model.hf.hub import hub_folder, is_hub_id
from ilrec_dist.model.hf.source import is_gguf, model_folder
from ilrec_dist.pipeline.records import check_stands_on, verify_descriptions
from ilrec_dist.pipeline.stage import training_name
from ilrec_dist.prompts.template import template_file
from ilrec_dist.samples.windows import Windows, training_windows
from ilrec_dist.training.config import TrainConfig

# The fixed samples of users are drawn with these.
VALIDATION_SEED, TEST_SEED, TRAINING_SEED = 20, 21, 22


@dataclass(frozen=True)
class RunArtifacts:
    config: Config

    @cached_property
    def folders(self) -> RunFolders:
        return RunFolders(self.config.run_dir)

    @cached_property
    def dataset(self) -> InteractionDataset:
        verify_descriptions(self.folders, "prepare")
        return load_dataset(self.folders.data)

    @cached_property
    def training(self) -> InteractionDataset:
        """What the CF model and the language model are trained on."""
        return both_directions(self.dataset) if self.config.data.both_directions else self.dataset

    @cached_property
    def catalogue(self) -> Catalogue:
        verify_descriptions(self.folders, "index")
        return Catalogue.load(self.folders.items)

    @cached_property
    def trie(self) -> Trie:
        return Trie.load(self.folders.items, self.catalogue)

    @cached_property
    def language_model(self) -> Path:
        """The extended tokenizer and the config.json of the model in `backbone.from`.

        Raises UserError that names the first of these files that is missing or damaged.
        """
        verify_descriptions(self.folders, "index")
        files = manifest_hashes(self.folders.items, REPAIR)
        verify(
            self.folders.items,
            [name for name in files if name.startswith(f"{LANGUAGE_MODEL}/")],
            REPAIR,
        )
        return self.folders.items / LANGUAGE_MODEL

    def trained_model(self, method: str, seed: int) -> dict[str, Any]:
        """The result.json of a finished training
        that fits the data and codes of this folder.

        Raises UserError where the training is not finished, and where it was trained
        on other data or other item codes than those that lie in the folder now.
        """
        weights = self.folders.training(method, seed) / BEST
        stage = training_name(method, seed)
        # Where the training is finished, a missing or damaged file is named.
        verify_descriptions(self.folders, stage)
        if not weights.exists() or not weights.with_name(RESULT).exists():
            raise UserError(
                f"{weights}: no such weights; the run's training is not finished, or it trained "
                f"other methods than {method} or other seeds than {seed}"
            )
        result = read_json_object(weights.with_name(RESULT))
        if "model" not in result or result["catalogue"] != catalogue_hash(self.catalogue):
            raise UserError(
                f"{weights}: trained with other item codes than those in {self.folders.items}; "
                "train again (`ilrec run`), or restore the codes"
            )
        check_stands_on(self.folders, stage, ("index", "prepare"))
        return result

    def validation_users(self, count: int) -> np.ndarray:
        """A fixed seeded sample of `count` users who
        have a validation target, int64 ascending.

        All of them where `count` is 0 or more than there are.
        """
        return _sample(self.dataset.evaluated("validation"), count, VALIDATION_SEED)

    def test_users(self, count: int) -> np.ndarray:
        """Those who have a test target, likewise."""
        return _sample(self.dataset.evaluated("test"), count, TEST_SEED)

    def training_windows(self, train: TrainConfig) -> Windows:
        """The windows of `training` in an epoch, of the
        users whose items are targets (train.users).
        """
        lengths = self.dataset.train_lengths()
        # A user's first item is no target.
        users = _sample(np.flatnonzero(lengths > 1), train.users, TRAINING_SEED)
        chosen = np.zeros(self.dataset.num_users, np.bool_)
        chosen[users] = True
        # A user who is read backwards too stands behind all others (`both_directions`).
        repeats = self.training.num_users // max(1, self.dataset.num_users)
        return training_windows(
            self.training, train.max_history, train.targets, np.tile(chosen, repeats)
        )


def _sample(users: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the users int64 [n], ascending; all where it is 0 or above n."""
    if count == 0 or count >= len(users):
        return users
    return np.sort(users[np.random.default_rng(seed).permutation(len(users))[:count]])


def config_for_workers(config: Config) -> dict[str, Any]:
    """The configuration as the workers read it, who have another working directory."""
    runs_dir = str(Path(config.runs_dir).resolve())
    source, templates = config.backbone.from_, config.prompts.templates
    if source is not None:
        backbone = dataclasses.replace(config.backbone, from_=str(Path(source).resolve()))
        config = dataclasses.replace(config, backbone=backbone)
    if templates is not None:
        file = str(template_file(templates).resolve())
        prompts = dataclasses.replace(config.prompts, templates=file)
        config = dataclasses.replace(config, prompts=prompts)
    return config_to_dict(dataclasses.replace(config, runs_dir=runs_dir))


def worker_inputs(config: Config) -> list[str]:
    """The files and folders outside of the run's
    folder that the workers read, as absolute paths.

    The model of `backbone.from` is a folder here. What `data` and `items`
    name is read by the command alone: the workers read the run's folder.
    """
    model = config.backbone.from_
    templates = config.prompts.templates
    paths = [] if model is None else [Path(model)]
    paths += [] if templates is None else [template_file(templates)]
    return [str(path.resolve()) for path in paths]


def known_worker_inputs(config: Config) -> list[str]:
    """`worker_inputs` of a configuration as it is given; a GGUF file's
    are there once the file is dequantised, in `dequantised_models`.
    """
    source = config.backbone.from_
    if source is None or not is_gguf(source):
        return worker_inputs(with_local_model(config))
    backbone = dataclasses.replace(config.backbone, from_=None)
    return worker_inputs(dataclasses.replace(config, backbone=backbone))


def dequantised_models(config: Config) -> Path | None:
    """The folder for what is made of a GGUF file; None where there is none."""
    source = config.backbone.from_
    return Path(config.runs_dir) / MODELS if source is not None and is_gguf(source) else None


def with_hub_model(config: Config) -> Config:
    """The configuration with the folder of a model
    that `backbone.from` names by its id on the hub.

    The model is downloaded where it is not in the hub's cache. Raises UserError where
    that fails, and where the model does not fit the configuration.
    """
    source = config.backbone.from_
    if source is None or not is_hub_id(source):
        return config
    backbone = dataclasses.replace(config.backbone, from_=str(hub_folder(source)))
    config = dataclasses.replace(config, backbone=backbone)
    check_together(config, f"backbone.from {source}")
    return config


def with_local_model(config: Config) -> Config:
    """The configuration with the model's folder
    in `backbone.from`, if it names one at all.

    A GGUF file is dequantised once into a folder beside the runs; one
    process calls this. Raises UserError where there is no such model.
    """
    source = config.backbone.from_
    if source is None:
        return config
    folder = model_folder(source, Path(config.runs_dir) / MODELS)
    backbone = dataclasses.replace(config.backbone, from_=str(folder))
    return dataclasses.replace(config, backbone=backbone)


def longest_input(config: Config, catalogue: Catalogue) -> int:
    """Tokens of the longest input, or the limit
    of prompts; 1 where the model's own is theirs.
    """
    if config.prompts.templates is not None:
        return config.prompts.max_tokens or 1
    return max_positions(config.train.max_history, catalogue.depth)


def item_titles(artifacts: RunArtifacts) -> Sequence[str]:
    """The titles by item index; UserError where the data have none."""
    titles = artifacts.dataset.titles
    if titles is None or not any(title.strip() for title in titles):
        raise UserError(
            "backbone.new_tokens: text needs the items' titles, and the data have none; bring "
            "titles (data.items_path), or set it to moments"
        )
    return titles
