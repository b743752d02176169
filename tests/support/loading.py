"""A file of any format → what its data set holds, as plain dicts."""

from __future__ import annotations

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare


def load(tmp_path, form, path, **settings):
    """(manifest, user → item ids, item → title, item → text) of a file without a
    k-core.
    """
    manifest = prepare(
        DataConfig(
            format=form,
            path=str(path),
            min_user_interactions=1,
            min_item_interactions=1,
            **settings,
        ),
        tmp_path / "out",
    )
    dataset = load_dataset(tmp_path / "out")
    histories = {
        dataset.user_ids[user]: [dataset.item_ids[item] for item in dataset.sequence(user)]
        for user in range(dataset.num_users)
    }
    titles = dict(zip(dataset.item_ids, dataset.titles or [None] * dataset.num_items, strict=True))
    texts = dict(zip(dataset.item_ids, dataset.texts or [None] * dataset.num_items, strict=True))
    return manifest, histories, titles, texts
