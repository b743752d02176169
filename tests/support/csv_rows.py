"""Small CSV files and what is read from them."""

from __future__ import annotations

from ilrec_dist.data.config import DataConfig


def unfiltered(**settings) -> DataConfig:
    return DataConfig(min_user_interactions=1, min_item_interactions=1, **settings)


def write_csv(path, rows, names=("user", "item", "timestamp")):
    path.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return unfiltered(format="csv", path=str(path))


def histories_of(dataset):
    return {
        dataset.user_ids[user]: [int(dataset.item_ids[item]) for item in dataset.sequence(user)]
        for user in range(dataset.num_users)
    }


GOOD = [("u", item, item) for item in range(4)]
