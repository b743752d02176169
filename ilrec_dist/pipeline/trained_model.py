"""Opens the trained model of a finished run,
for what is done with it: recommend, export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ilrec_dist.common.config_fields import section_from_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference.inputs import InputForm
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.device import quiet, resolve_device, set_cpu_threads
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.registry import default_method, get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts, with_local_model
from ilrec_dist.pipeline.backbones import empty_backbone
from ilrec_dist.pipeline.prompting import input_form
from ilrec_dist.pipeline.rankers import evaluation_ranker
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.prompts.config import PromptsConfig


@dataclass(frozen=True)
class TrainedModel:
    """A run's best weights of one method and seed: the whole, or this rank's part."""

    # The run's configuration, with the model's settings as they were in its training: a later
    # command may have left another configuration in the folder.
    config: Config
    artifacts: RunArtifacts
    method: str
    seed: int
    backbone: Backbone
    # The folder that the weights come from.
    weights: Path
    softmax_scope: SoftmaxScope
    parallel: ParallelState
    # What the model reads of a history.
    inputs: InputForm

    @property
    def ranker(self) -> ModelRanker:
        """Beam search as the run evaluates."""
        return evaluation_ranker(
            self.config,
            self.artifacts,
            self.backbone,
            softmax_scope=self.softmax_scope,
            inputs=self.inputs,
            parallel=self.parallel,
            model_name=str(self.weights),
        )


@dataclass(frozen=True)
class TrainedWeights:
    """A run's best weights of one method and seed, which are not loaded yet."""

    # As in `TrainedModel`.
    config: Config
    artifacts: RunArtifacts
    method: str
    seed: int
    # The folder of the weights.
    folder: Path
    # The training's result.json.
    result: dict[str, Any]

    @property
    def softmax_scope(self) -> SoftmaxScope:
        """What a token's probability is over."""
        scope: SoftmaxScope = self.result["model"]["softmax_scope"]
        return scope

    @property
    def inputs(self) -> InputForm:
        """As in `TrainedModel`."""
        return input_form(self.config, self.artifacts, self.result["model"]["prompts"])

    @property
    def prompt(self) -> dict[str, Any] | None:
        """What is to be known to ask the model in words elsewhere; None for plain
        sequences.
        """
        prompt = self.result["model"]["prompts"]
        return None if prompt is None else prompt["template"] | {"chat": self.config.prompts.chat}

    def load(self, parallel: ParallelState) -> TrainedModel:
        """The model in eval mode; a collective over `parallel`."""
        config, artifacts = self.config, self.artifacts
        backbone = empty_backbone(config, artifacts, self.seed)
        backbone = load_training_weights(backbone, self.folder).to(parallel.device)
        return TrainedModel(
            config,
            artifacts,
            self.method,
            self.seed,
            backbone,
            self.folder,
            self.softmax_scope,
            parallel,
            self.inputs,
        )


def find_trained(
    config: Config, method: str | None = None, seed: int | None = None
) -> TrainedWeights:
    """The best weights of a run whose configuration is `config`.

    method: a name of train.methods; None takes the project's own where it was trained.
    seed: None takes the run's first. Raises UserError for a folder without such a
    finished training, and where data or codes are not those of the training.
    """
    method = get_method(method or default_method(config.train.methods)).name
    seed = config.train.seeds[0] if seed is None else seed
    artifacts = RunArtifacts(config)
    folder = artifacts.folders.training(method, seed) / BEST
    result = artifacts.trained_model(method, seed)
    config = _as_trained(config, result["model"], folder)
    return TrainedWeights(config, artifacts, method, seed, folder, result)


@contextmanager
def loaded_here(weights: TrainedWeights) -> Iterator[TrainedModel]:
    """The model in this process alone, while the block lasts.

    Raises UserError where the weights are not those of the training.
    """
    with one_process(weights.config.launch) as parallel:
        yield weights.load(parallel)


@contextmanager
def one_process(launch: LaunchConfig) -> Iterator[ParallelState]:
    """What a model needs in this process alone, while the block lasts."""
    quiet()
    device, threads = resolve_device(launch), torch.get_num_threads()
    set_cpu_threads(launch)
    is_own_group = not dist.is_initialized()
    parallel = initialize_parallel(1, device)
    try:
        yield parallel
    finally:
        # Each of Megatron's groups has a thread, which ends with torch.distributed only.
        destroy_parallel(process_group=is_own_group)
        # What runs in this process later computes as if no model had been opened.
        torch.set_num_threads(threads)


@contextmanager
def open_trained_model(
    run: Path, method: str | None = None, seed: int | None = None
) -> Iterator[TrainedModel]:
    """The model of the run in folder `run`, in this process, while the block lasts.

    The rest is as in `find_trained`.
    """
    with loaded_here(find_trained(run_config(run), method, seed)) as trained:
        yield trained


def _as_trained(config: Config, model: Mapping[str, Any], weights: Path) -> Config:
    """The configuration with the model's settings of
    its training, the entry "model" of the result.

    Raises UserError where most weights are those
    of a pretrained model that is no longer there.
    """
    backbone = section_from_dict(BackboneConfig, model["backbone"])
    train = dataclasses.replace(
        config.train,
        max_history=model["max_history"],
        precision=model["precision"],
        trainable=model.get("trainable", "full"),
        lora=section_from_dict(LoraConfig, model.get("lora", {})),
    )
    prompt = model.get("prompts")
    prompts = section_from_dict(PromptsConfig, prompt["settings"]) if prompt else PromptsConfig()
    trained = dataclasses.replace(config, backbone=backbone, train=train, prompts=prompts)
    if train.trainable == "full" or Path(str(backbone.from_)).is_dir():
        return trained
    # The model may have moved with the run, whose configuration then says where it is.
    try:
        moved = with_local_model(config).backbone.from_
    except UserError as error:
        raise UserError(
            f"{weights}: stands on the model that its training began with, {backbone.from_}, which "
            f"is not there; restore it, or set backbone.from in {config.run_dir / 'config.yaml'} "
            f"to where it is ({error})"
        ) from None
    return dataclasses.replace(trained, backbone=dataclasses.replace(backbone, from_=moved))
