"""The rewards stage: what rewards are computed from, for the codes that the items have.

The CF models know items, not codes; this puts what they know in code order.
"""

from __future__ import annotations

from ilrec_dist.cf.rewards.index import write_code_order
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.stage import Stage


def rewards_stage(config: Config) -> Stage:
    return Stage(
        "rewards",
        # It runs with the second of the two stages that it stands on.
        "index" if config.items.from_cf else "cf",
        after=("index", "cf"),
        settings=stage_settings(config, "rewards"),
        output=RunFolders(config.run_dir).rewards,
        run=lambda: rewards(config),
    )


def rewards(config: Config) -> str | None:
    artifacts = RunArtifacts(config)
    write_code_order(config.cf, artifacts.folders.cf, artifacts.catalogue)
    return None
