"""The index stage: every item gets its code tuple; the catalogue is stored in code
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ilrec_dist.cf.sasrec.checkpoint import item_vectors
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.console import print_plain
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.items.build import build_catalogue, input_files
from ilrec_dist.items.index_report import index_summary
from ilrec_dist.items.language_model import LanguageModel
from ilrec_dist.items.ray_tasks import ray_tasks
from ilrec_dist.items.spread import FEW_FOR_A_MODEL, FEW_TEXTS, Spread, local_spread
from ilrec_dist.launch.cluster import is_on_named_cluster, ray_session
from ilrec_dist.launch.cluster_check import check_nodes
from ilrec_dist.launch.task_places import task_places
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.source import vocabulary_files
from ilrec_dist.pipeline.artifacts import RunArtifacts, with_local_model
from ilrec_dist.pipeline.stage import Stage


def index_stage(config: Config) -> Stage:
    return Stage(
        "index",
        "index",
        # Codes that are built from the CF model's item vectors stand on that model.
        after=("cf",) if config.items.from_cf else ("prepare",),
        settings=stage_settings(config, "index") | {"given": config.items.index is not None},
        inputs=lambda: input_files(config.items) + _model_files(config),
        output=RunFolders(config.run_dir).items,
        run=lambda: index(config),
    )


def index(config: Config) -> str | None:
    artifacts = RunArtifacts(config)
    vectors = item_vectors(artifacts.folders.cf) if config.items.from_cf else None
    with text_workers(config, artifacts.dataset.num_items) as spread:
        report = build_catalogue(
            config.items,
            artifacts.dataset,
            artifacts.folders.items,
            vectors,
            _language_model(config),
            spread,
        )
    if report["warning"]:
        print_plain(f"index: warning: {report['warning']}")
    return index_summary(report)


@contextmanager
def text_workers(config: Config, num_items: int) -> Iterator[Spread | None]:
    """Who turns texts into vectors: the cores or GPUs of a named Ray cluster, else
    processes of this machine; None: this process alone, as for few items.
    """
    items = config.items
    by_model = items.text_model is not None
    if not items.from_texts or num_items < (FEW_FOR_A_MODEL if by_model else FEW_TEXTS):
        yield None
    elif not is_on_named_cluster(config.launch):
        yield local_spread(num_items, by_model)
    else:
        with ray_session(config.launch):
            root = RunFolders(config.run_dir).root
            check_nodes(root, [str(Path(items.text_model).resolve())] if items.text_model else [])
            take = partial(
                task_places,
                stage="index",
                seconds=config.launch.timeout_seconds,
                on_gpus=by_model and config.launch.device != "cpu",
            )
            yield Spread(partial(ray_tasks, take_places=take))


def _model_files(config: Config) -> list[Path]:
    return [] if config.backbone.from_ is None else vocabulary_files(config.backbone.from_)


def _language_model(config: Config) -> LanguageModel | None:
    """The model whose tokenizer the codes enter; None for a decoder trained from
    scratch.
    """
    folder = with_local_model(config).backbone.from_
    return None if folder is None else LanguageModel(Path(folder), read_config(folder).vocab_size)
