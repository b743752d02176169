"""Memory of a node's host by part; docs/scaling.md
derives what grows with the catalogue.
"""

from __future__ import annotations

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.plan.workload import DataSizes, ItemTokens

# Catalogues up to this size are scanned where cf.reward_index is auto.
SCANNED_ITEMS = 65_536
TRIE_BYTES = 24
# Index numbers and codes of an item of an ivf_pq index besides d / 4 bytes of its vector.
INDEX_BYTES, MASK_BYTES = 8, 8


def host_bytes(
    data: DataSizes,
    tokens: ItemTokens,
    cf: CFConfig,
    weights_file: int,
    checkpoint_part: int,
    gpus_per_node: int,
    needs_rewards: bool,
    all_write_weights: bool,
) -> dict[str, float] | None:
    """Bytes of one node that holds all of it; None where the data's size is not known.

    weights_file, checkpoint_part: bytes that a worker
    copies to host memory to write weights and checkpoints. Unless `all_write_weights`
    only one does the former.
    What is mapped from files is shared by all processes of the node, and
    the system may drop it again; the rest is counted for each process.
    """
    if data.items is None or data.users is None or data.interactions is None:
        return None
    parts: dict[str, float] = {
        "mapped histories": 4 * data.interactions + 8 * data.users,
        "mapped catalogue and trie": data.items * (4 * tokens.depth + 8 + TRIE_BYTES),
        "order of the windows, each worker": gpus_per_node * (8 + 4) * data.users,
    }
    if all_write_weights:
        parts["copy of a file of best or final, each worker"] = weights_file * gpus_per_node
    else:
        parts["copy of a file of best or final"] = weights_file
    parts["copy of a checkpoint's part, each worker"] = checkpoint_part * gpus_per_node
    if needs_rewards:
        rows = data.items * cf.cf_folds
        scans = cf.reward_index == "scan" or (
            cf.reward_index == "auto" and data.items <= SCANNED_ITEMS
        )
        vector = 4 if cf.reward_index == "flat" else 2
        parts["mapped item vectors"] = rows * vector * cf.hidden_size
        processes = cf.reward_replicas if cf.rewards == "actor" else gpus_per_node
        index = 0.0 if scans else rows * (cf.hidden_size / 4 + INDEX_BYTES) / cf.reward_shards
        what = "reward actors" if cf.rewards == "actor" else "rewards, each worker"
        parts[what] = processes * (index + rows * MASK_BYTES)
    return parts
