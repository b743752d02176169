"""Training sequences in both directions: where the order is partly arbitrary, reading backwards too tells a model more of what goes together."""

from __future__ import annotations

import dataclasses

import numpy as np

from ilrec_dist.data.prepared import SPLITS, Prepared


def both_directions(prepared: Prepared) -> Prepared:
    """The same data with as many users again: user num_users + u has the training items of user u, latest first, all of them for training.

    Neither validation nor test items are read backwards, and the added users are evaluated in no split. They carry the ids of the users they repeat, so
    that whatever is decided by id, such as the fold that a user is in (METHOD.md §5), is the same for both. Held in memory: 8 bytes an interaction.
    """
    lengths = prepared.train_lengths()
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    last = np.repeat(prepared.offsets[:-1] + lengths - 1, lengths)
    places = np.full((1 + len(SPLITS), 2 * prepared.num_users), -1, np.int32)
    places[0] = np.tile(lengths, 2)
    for row, split in enumerate(SPLITS, start=1):
        places[row, : prepared.num_users] = prepared.target_places(split)
    return dataclasses.replace(
        prepared,
        items=np.concatenate([prepared.items, prepared.items[last - place]]),
        offsets=np.concatenate([prepared.offsets, prepared.offsets[-1] + ends]),
        user_ids=[*prepared.user_ids, *prepared.user_ids],
        places=places,
    )
