"""Where a run's token rewards come from: its Ray actors or this process, and its disk
cache.
"""

from __future__ import annotations

from ilrec_dist.cf.rewards.disk_cache import CachedRewards, cache_folder
from ilrec_dist.cf.rewards.futures import RewardSource
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.pipeline.artifacts import RunArtifacts


def open_reward_source(artifacts: RunArtifacts) -> RewardSource:
    """The source that `cf.rewards` names, behind the disk cache where `cf.reward_cache`
    is set.
    """
    config, folders, training = artifacts.config.cf, artifacts.folders, artifacts.training
    source: RewardSource
    if config.rewards == "actor":
        # Ray takes a second to load, and rewards of this process do not need it.
        from ilrec_dist.cf.rewards.service import reward_client

        source = reward_client(config, folders, artifacts.config.launch.timeout_seconds)
    else:
        source = TokenRewards.open(folders.cf, training, artifacts.catalogue, artifacts.trie)
    if config.reward_cache:
        cache = cache_folder(folders.cf, training)
        source = CachedRewards(source, cache, training, artifacts.trie)
    return source
