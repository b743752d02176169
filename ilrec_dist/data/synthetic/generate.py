"""`data.format: synthetic`: a generated shop whose true next-item distribution is
known.

So results can be held against the best possible.

Items. Every category holds kinds of about twenty items; items have Zipf popularity
pop(v) ∝ 1/(rank + 5)^0.9, ranks dealt out at random. A title names maker, finish, kind
and model; the text adds words of the category and the kind. q_G(v) is popularity within
kind G.

Histories. With last item i of kind g, the item before it j of kind f in category
c(f), and S the items already in the history, the next item is drawn from

    p(v | history) = 0.40 · q[ companion(g, mood(c(f))) ]
                   + 0.30 · q[ f ]
                   + 0.15 · q[ a kind of the history ]
                   + 0.15 · pop

The first term says that what goes with the last item depends on what came before it;
the second takes up the interest before last again; the kind of the third is drawn from
the whole history with weight 0.8^(age in items). Each q and pop is restricted to items
not in S and renormalised; a kind with no such item left gives its weight to pop. mood
maps categories to three moods; companion(·, mood) is a permutation of kinds for each
mood. The first item is drawn from pop; for the second, f = g.

So no item repeats, the distribution is a function of the history alone
(`bayes_scores`), and counting consecutive pairs sees companions only averaged over
moods, and the return to the interest before last not at all. A user's number of items,
independent of which they are, is 5 plus a geometric variable, at most 50.

Times. They are drawn for a split in time only, from a seed of their own, so that the
items are the same with and without them. A user's first item comes at any second of a
year, and each next one after an exponentially distributed time of ten days in the mean.
The law above is the same at all times.

The generator is part of the data's definition: another one needs another
GENERATOR_VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.manifest import verified
from ilrec_dist.data.config import SyntheticConfig
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.synthetic.words import item_words

GENERATOR_VERSION = 1
COMPANION, RETURN, HABIT, ANYTHING = 0.40, 0.30, 0.15, 0.15
HABIT_DECAY = 0.8
MOODS = 3
KIND_SIZE = 20
ZIPF_SHIFT, ZIPF_EXPONENT = 5.0, 0.9
SHORTEST, LONGEST = 5, 50
DAY = 24 * 60 * 60
# Seconds in which users begin, and the mean of the seconds from one item to the next.
BEGIN_WITHIN, MEAN_GAP = 365 * DAY, 10 * DAY
# Users that are scored at once.
SCORE_ROWS = 512


@dataclass(frozen=True)
class TrueModel:
    """The generator's parameters; everything that p(next | history) depends on."""

    # float64 [n], sums to 1.
    popularity: np.ndarray
    # int64 [n]: the kind of an item.
    kind: np.ndarray
    # int64 [K]: the mood of the category that a kind belongs to.
    mood: np.ndarray
    # int64 [MOODS, K]: the kind that goes with a kind.
    companion: np.ndarray

    def save(self, path: str | Path) -> None:
        np.savez(
            path,
            popularity=self.popularity,
            kind=self.kind,
            mood=self.mood,
            companion=self.companion,
        )

    @staticmethod
    def load(path: str | Path) -> TrueModel:
        with np.load(path) as arrays:
            return TrueModel(
                **{name: arrays[name] for name in ("popularity", "kind", "mood", "companion")}
            )

    def next_probabilities(self, histories: list[np.ndarray]) -> np.ndarray:
        """float64 [len(histories), n]: p(v | history); rows sum to 1.

        A history is a non-empty array of item numbers, oldest first.
        """
        members = self._members()
        result = np.empty((len(histories), len(self.popularity)))
        for row, history in zip(result, histories, strict=True):
            unseen = self.popularity.copy()
            unseen[history] = 0.0
            anything = ANYTHING
            row[:] = 0.0
            for kind, weight in self._kinds(history):
                within = members[kind]
                mass = unseen[within].sum()
                if mass > 0:
                    row[within] += weight / mass * unseen[within]
                else:
                    anything += weight
            row += anything / unseen.sum() * unseen
        return result

    def _members(self) -> list[np.ndarray]:
        order = np.argsort(self.kind, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.kind, minlength=len(self.mood)))[:-1])

    def _kinds(self, history: np.ndarray) -> list[tuple[int, float]]:
        kinds = self.kind[history]
        last, before = kinds[-1], kinds[max(len(kinds) - 2, 0)]
        habit = HABIT_DECAY ** np.arange(len(kinds) - 1, -1, -1.0)
        habit *= HABIT / habit.sum()
        return [
            (int(self.companion[self.mood[before], last]), COMPANION),
            (int(before), RETURN),
            *((int(kind), float(weight)) for kind, weight in zip(kinds, habit, strict=True)),
        ]


def draw_model(config: SyntheticConfig) -> TrueModel:
    """The catalogue's parameters from the seed.

    Raises UserError when there are fewer items than categories.
    """
    fewest = max(config.categories, 2 * SHORTEST)
    if config.items < fewest:
        raise UserError(
            f"data.synthetic.items: {config.items} items for {config.categories} categories; "
            f"expected at least {fewest}"
        )
    random = np.random.default_rng([config.seed, GENERATOR_VERSION, 0])
    kinds_per_category = max(1, config.items // config.categories // KIND_SIZE)
    kinds = config.categories * kinds_per_category
    popularity = (random.permutation(config.items) + 1 + ZIPF_SHIFT) ** -ZIPF_EXPONENT
    mood_of_category = random.permutation(np.arange(config.categories) % MOODS)
    return TrueModel(
        popularity=popularity / popularity.sum(),
        kind=random.permutation(np.arange(config.items) % kinds),
        mood=mood_of_category[np.arange(kinds) // kinds_per_category],
        companion=np.stack([random.permutation(kinds) for _ in range(MOODS)]),
    )


def draw_histories(model: TrueModel, config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """(items int32 [T], offsets int64 [users + 1]).

    All users are drawn one step at a time: the component,
    then the kind, then items until an unseen one comes.
    """
    random = np.random.default_rng([config.seed, GENERATOR_VERSION, 1])
    users, n = config.users, len(model.popularity)
    shortest = min(SHORTEST, int(config.mean_length))
    extra = random.geometric(1 / (config.mean_length - shortest + 1), users) - 1
    lengths = np.minimum(shortest + extra, min(LONGEST, n // 2))
    history = np.full((users, lengths.max()), -1, np.int64)
    draw = _KindSampler(model)
    history[:, 0] = draw.anything(random, users)
    for t in range(1, history.shape[1]):
        active = np.flatnonzero(lengths > t)
        past = history[active, :t]
        last, before = model.kind[past[:, -1]], model.kind[past[:, max(t - 2, 0)]]
        weights = HABIT_DECAY ** np.arange(t - 1, -1, -1.0)
        habit = model.kind[
            past[np.arange(len(active)), random.choice(t, len(active), p=weights / weights.sum())]
        ]
        component = random.choice(4, len(active), p=[COMPANION, RETURN, HABIT, ANYTHING])
        kind = np.choose(
            component,
            [model.companion[model.mood[before], last], before, habit, np.full(len(active), -1)],
        )
        seen_of_kind = (model.kind[past] == kind[:, None]).sum(axis=1)
        # Of a kind of which nothing is left, anything is drawn.
        kind[(kind >= 0) & (seen_of_kind == draw.sizes[kind])] = -1
        chosen = np.full(len(active), -1, np.int64)
        while (open_ := np.flatnonzero(chosen < 0)).size:
            candidate = draw.of_kind(random, kind[open_])
            fresh = (past[open_] != candidate[:, None]).all(axis=1)
            chosen[open_[fresh]] = candidate[fresh]
        history[active, t] = chosen
    offsets = np.zeros(users + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return history[history >= 0].astype(np.int32), offsets


def draw_times(offsets: np.ndarray, config: SyntheticConfig) -> np.ndarray:
    """int64 [T]: seconds since the shop opened, increasing within a user.

    offsets: as `draw_histories` returns them.
    """
    random = np.random.default_rng([config.seed, GENERATOR_VERSION, 2])
    begin = random.integers(BEGIN_WITHIN, size=len(offsets) - 1)
    # Two items of a user are at least a second apart.
    steps = 1 + random.exponential(MEAN_GAP, offsets[-1]).astype(np.int64)
    steps[offsets[:-1]] = 0
    since_all = np.cumsum(steps)
    return np.asarray(since_all + np.repeat(begin - since_all[offsets[:-1]], np.diff(offsets)))


class _KindSampler:
    """Items by popularity within a kind, by inverting one cumulative sum that is sorted
    by kind.
    """

    def __init__(self, model: TrueModel) -> None:
        self.sizes = np.bincount(model.kind, minlength=len(model.mood))
        self.order = np.argsort(model.kind, kind="stable")
        self.cumulative = np.cumsum(model.popularity[self.order])
        self.stops = np.cumsum(self.sizes)

    def anything(self, random: np.random.Generator, count: int) -> np.ndarray:
        return self.of_kind(random, np.full(count, -1))

    def of_kind(self, random: np.random.Generator, kind: np.ndarray) -> np.ndarray:
        """int64 item per row; kind -1 is the whole catalogue."""
        first = np.where(kind < 0, 0, self.stops[kind] - self.sizes[kind])
        last = np.where(kind < 0, len(self.order), self.stops[kind]) - 1
        low = np.where(first > 0, self.cumulative[first - 1], 0.0)
        point = low + random.random(len(kind)) * (self.cumulative[last] - low)
        position = np.clip(np.searchsorted(self.cumulative, point, side="right"), first, last)
        return np.asarray(self.order[position])


def item_table(model: TrueModel, config: SyntheticConfig) -> pa.Table:
    """Ids, titles and texts; see synthetic_words."""
    kinds_per_category = len(model.mood) // config.categories
    titles, texts = item_words(model.kind, kinds_per_category, config.seed)
    return pa.table(
        {"id": [str(item) for item in range(len(model.kind))], "title": titles, "text": texts}
    )


def bayes_scores(
    folder: str | Path, dataset: InteractionDataset, users: np.ndarray, split: str = "test"
) -> np.ndarray:
    """float32 [len(users), num_items]: the generator's probability of every item.

    It is that after the history which `split` ("validation", "test")
    may see; items in the history have probability 0. Raises
    UserError when the folder was not prepared with format synthetic.
    """
    path = Path(folder) / "true_model.npz"
    if not path.exists():
        raise UserError(
            f"{path}: no such file; only data.format synthetic has a known true distribution"
        )
    model = TrueModel.load(verified(folder, path.name))
    stops = dataset.history_stop(split, users)
    scores = np.empty((len(users), dataset.num_items), np.float32)
    for start in range(0, len(users), SCORE_ROWS):
        batch = users[start : start + SCORE_ROWS]
        scores[start : start + len(batch)] = model.next_probabilities(
            [
                dataset.items[dataset.offsets[user] : stop]
                for user, stop in zip(batch, stops[start:], strict=False)
            ]
        )
    return scores
