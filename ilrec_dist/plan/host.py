"""Memory of a node's host by part; docs/scaling.md
derives what grows with the catalogue.
"""

from __future__ import annotations

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.cell_moments import RANK
from ilrec_dist.plan.workload import DataSizes, ItemTokens

# As in cf.rewards, whose modules load FAISS. Catalogues up to SCANNED_ITEMS are scanned where
# cf.reward_index is auto; nodes below prefixes of more than PREFIX_ITEMS have moments; the rewards
# of a scanned catalogue are kept where those of the first codes take at most KEPT_REWARDS.
SCANNED_ITEMS, PREFIX_ITEMS, KEPT_REWARDS = 65_536, 16_384, 512 << 20
TRIE_BYTES = 24
# FAISS's id of an item in an inverted list, and an item's links, levels and offset in HNSW32.
ID_BYTES, LINK_BYTES = 8, 272
# Known items of a fold: a bias in fp32 and, in the shard that holds the item, its position.
BIAS_BYTES, POSITION_BYTES = 4, 4
FP32 = 4
# Of a user: offsets in int64 and three positions in int32 of two sequences.
BOTH_DIRECTIONS_BYTES = 2 * (8 + 3 * 4)


def host_bytes(
    data: DataSizes,
    tokens: ItemTokens,
    cf: CFConfig,
    weights_file: int,
    checkpoint_part: int,
    nodes: int,
    gpus_per_node: int,
    tp: int,
    needs_rewards: bool,
    all_write_weights: bool,
    both_directions: bool,
) -> dict[str, float] | None:
    """Bytes of the node that holds most; None where the data's size is not known.

    weights_file, checkpoint_part: bytes that a worker
    copies to host memory to write weights and checkpoints. Unless `all_write_weights`
    only one does the former. `both_directions` as in the `data` section.
    What is mapped from files is shared by all processes of the node, and
    the system may drop it again; the rest is counted for each process.
    """
    if data.items is None or data.users is None or data.interactions is None:
        return None
    sequences = (2 if both_directions else 1) * data.users
    parts: dict[str, float] = {
        "mapped histories": 4 * data.interactions + 8 * data.users,
        "mapped catalogue and trie": data.items * (4 * tokens.depth + 8 + TRIE_BYTES),
        "order of the windows, each worker": gpus_per_node * (8 + 4) * sequences,
    }
    if both_directions:
        parts["sequences in both directions, each worker"] = (
            gpus_per_node * BOTH_DIRECTIONS_BYTES * data.users
        )
    if all_write_weights:
        parts["copy of a file of best or final, each worker"] = weights_file * gpus_per_node
    else:
        parts["copy of a file of best or final"] = weights_file
    parts["copy of a checkpoint's part, each worker"] = checkpoint_part * gpus_per_node
    if not needs_rewards:
        return parts
    kind = reward_index(cf, data.items)
    vector = FP32 if kind in ("scan", "flat") else 2
    parts["mapped item vectors"] = cf.cf_folds * data.items * vector * cf.hidden_size
    if cf.rewards == "actor":
        # Ray spreads them over the nodes. An actor sees no GPU (cf.rewards.service).
        processes = -(-cf.reward_replicas * cf.reward_shards // nodes)
        shards, what = cf.reward_shards, f"reward actors ({processes} on a node)"
    else:
        # One worker of each tensor-parallel group reads rewards, of all shards.
        processes, shards = gpus_per_node // tp, 1
        what = f"rewards in workers ({processes} on a node)"
    process = reward_process_bytes(data.items, tokens, cf, shards)
    if keeps_index_on_gpu(cf):
        # FAISS reads one shard of a fold at a time, and copies it to the GPU.
        del process["index"]
        process["a flat index that is loaded"] = (
            FP32 * cf.hidden_size * data.items / cf.reward_shards
        )
    # The fold of each user.
    process["users"] = 8.0 * sequences
    if both_directions and cf.rewards == "actor":
        process["sequences in both directions"] = BOTH_DIRECTIONS_BYTES * data.users
    if kind == "scan":
        process["kept rewards"] = kept_rewards(
            data.items, data.users, data.interactions, tokens, both_directions
        )
    for name, value in process.items():
        if value > 0:
            parts[f"{what}: {name}"] = processes * value
    return parts


def reward_index(cf: CFConfig, items: int) -> str:
    """The kind of index that `reward_index: auto` means."""
    if cf.reward_index != "auto":
        return cf.reward_index
    return "scan" if items <= SCANNED_ITEMS else "ivf_pq"


def keeps_index_on_gpu(cf: CFConfig) -> bool:
    """Whether a worker's index lies on its GPU, as it does under a FAISS for GPUs."""
    return cf.rewards == "in_process" and cf.reward_index == "flat"


def reward_process_bytes(
    items: int, tokens: ItemTokens, cf: CFConfig, shards: int
) -> dict[str, float]:
    """What a process that answers for one of `shards` keeps of all folds' scorers.

    All items are taken to be known to the models but one, without which
    they need no bias, and all codes to be used evenly.
    """
    rows, width, kind = cf.cf_folds * items, cf.hidden_size, reward_index(cf, items)
    if kind == "scan":
        # A copy of the table in the order of the codes.
        return {"item vectors": FP32 * width * rows, "known items": BIAS_BYTES * rows}
    index = {
        # Two dimensions of four bits each in a byte, or one.
        "ivf_pq": (width / 4 if width % 2 == 0 else width / 2) + ID_BYTES,
        "flat": FP32 * width,
        "hnsw": 2 * width + LINK_BYTES,
    }[kind]
    # Mean, diagonal and factor in fp32, the node's number and its count.
    cell = FP32 * width * (2 + min(RANK, width)) + 8 + 4
    return {
        "index": rows * index / shards,
        "known items": rows * (BIAS_BYTES + POSITION_BYTES / shards),
        "cell moments": cf.cf_folds * moment_cells(items, tokens.level_sizes) * cell,
    }


def moment_cells(items: int, level_sizes: tuple[int, ...]) -> int:
    """Nodes of the trie that have moments: all first codes,
    and the children of prefixes of many items.
    """
    nodes = min(items, level_sizes[0])
    cells = nodes
    for size in level_sizes[1:]:
        if items / nodes <= PREFIX_ITEMS:
            break
        nodes = min(items, nodes * size)
        cells += nodes
    return cells


def kept_rewards(
    items: int, users: int, interactions: int, tokens: ItemTokens, both_directions: bool
) -> float:
    """Bytes of all training targets' rewards where a process keeps them, else 0."""
    # All but the validation item and the test item of a user are read backwards too.
    read = interactions + (interactions - 2 * users if both_directions else 0)
    if FP32 * min(items, tokens.level_sizes[0]) * read > KEPT_REWARDS:
        return 0.0
    # Without the first item of each sequence.
    targets = max(0, interactions - 3 * users) * (2 if both_directions else 1)
    # With three int64 numbers of each target: how many rewards, where they end, covered rows.
    return targets * (FP32 * tokens.candidates(items) + 3 * 8.0)
