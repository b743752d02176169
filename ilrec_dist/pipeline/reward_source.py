"""Where a run's token rewards come from: its Ray actors or this process, and its disk
cache.
"""

from __future__ import annotations

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.disk_cache import CachedRewards, cache_folder
from ilrec_dist.cf.rewards.futures import RewardSource
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie


def open_reward_source(
    config: CFConfig,
    folders: RunFolders,
    training: InteractionDataset,
    catalogue: Catalogue,
    trie: Trie,
) -> RewardSource:
    """The source that `cf.rewards` names, behind the disk cache where `cf.reward_cache`
    is set.

    `training` is what the CF models were trained on.
    """
    source: RewardSource
    if config.rewards == "actor":
        # Ray takes a second to load, and rewards of this process do not need it.
        from ilrec_dist.cf.rewards.service import reward_client

        source = reward_client(config, folders)
    else:
        source = TokenRewards.open(folders.cf, training, catalogue, trie)
    if config.reward_cache:
        source = CachedRewards(source, cache_folder(folders.cf, training), training, trie)
    return source
