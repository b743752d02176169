"""The chronological split against its definition.

Nothing after its first cut reaches anything that trains.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.cf.sasrec.fit import TrainingSequences
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.data.config import DataConfig, SyntheticConfig
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.split import time_at
from ilrec_dist.data.synthetic.generate import bayes_scores
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.baselines.table import BaselineInputs
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import baseline_predictions
from ilrec_dist.export.interactions import export_data
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.evaluate_baselines import evaluate_baselines
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.stages.evaluate import predictions_file
from ilrec_dist.samples.windows import training_windows
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.masks import train_mask

RNG = np.random.default_rng(4)
ROWS = sorted({tuple(row) for row in RNG.integers(0, [40, 25, 90], (500, 3)).tolist()})


def load(tmp_path, rows=ROWS, **settings) -> InteractionDataset:
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    )
    config = {
        "format": "csv",
        "path": str(tmp_path / "rows.csv"),
        "min_user_interactions": 1,
        "min_item_interactions": 1,
        "split": "chronological",
    }
    prepare(config_from_dict({"data": config | settings}).data, tmp_path / "out")
    return load_dataset(tmp_path / "out")


def expected(rows, validation, test):
    """user → (training items, validation target or None, test target or None)."""
    by_user = defaultdict(list)
    for user, item, time in sorted(rows, key=lambda row: (row[0], row[2])):
        by_user[str(user)].append((item, time))

    def target(history, low, high):
        inside = [
            place for place, (_, time) in enumerate(history) if low <= time < high and place > 0
        ]
        return (
            (history[inside[-1]][0], [item for item, _ in history[: inside[-1]]])
            if inside
            else None
        )

    return {
        user: (
            [item for item, time in history if time < validation],
            target(history, validation, test),
            target(history, test, np.inf),
        )
        for user, history in by_user.items()
    }


def found(dataset: InteractionDataset):
    result = {}
    for user in range(dataset.num_users):
        items = [int(dataset.item_ids[item]) for item in dataset.sequence(user)]
        at = {split: int(dataset.target_positions(split)[user]) for split in ("validation", "test")}
        targets = [(items[place], items[:place]) if place >= 1 else None for place in at.values()]
        result[dataset.user_ids[user]] = (items[: int(dataset.train_lengths()[user])], *targets)
    return result


def test_the_generated_shop_is_split_as_a_table_of_its_rows_is(tmp_path):
    shop = DataConfig(
        split="chronological", synthetic=SyntheticConfig(users=200, items=60, categories=3)
    )
    manifest = prepare(shop, tmp_path / "shop")
    generated = load_dataset(tmp_path / "shop")
    table = pq.read_table(tmp_path / "shop/interactions.parquet")
    rows = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    assert found(generated) == found(load(tmp_path, rows))
    written = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["split"] == written["split"] and manifest["timestamps"] == "seconds"
    # The same items as without times, and the truth after the history that a target has.
    prepare(replace(shop, split="leave_one_out"), tmp_path / "whole")
    whole = load_dataset(tmp_path / "whole")
    assert (generated.items == whole.items).all() and (generated.offsets == whole.offsets).all()
    users = np.flatnonzero(generated.target_positions("test") >= 0)
    scores = bayes_scores(tmp_path / "shop", generated, users)
    assert (scores[np.arange(len(users)), generated.targets("test")[users]] > 0).all()


def test_by_date_is_the_definition(tmp_path):
    dataset = load(tmp_path, split_dates=[50, 70])
    assert found(dataset) == expected(ROWS, 50, 70)
    assert any(targets[1] is None for targets in found(dataset).values()), (
        "the sample has users without a validation target"
    )
    assert train_mask(dataset).sum() == sum(time < 50 for *_, time in ROWS)


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_dates_are_read_in_the_unit_of_the_file(tmp_path, unit):
    day = 86400
    rows = [(user, item, (1_500_000_000 + time * day) * unit) for user, item, time in ROWS]
    # The times are midnights.
    cuts = [
        (1_500_000_000 // day + 51) * day * unit,
        (1_500_000_000 // day + 71) * day * unit,
    ]
    dataset = load(tmp_path, rows, split_dates=["2017-09-03", "2017-09-23T00:00:00+00:00"])
    assert found(dataset) == expected(rows, *cuts)


@pytest.mark.parametrize("unit", [1, 1000])
def test_dates_where_decimal_numbers_are_kept_in_thousandths(tmp_path, unit):
    rows = [(user, item, f"{(1_500_000_000 + time * 86400) * unit}.0") for user, item, time in ROWS]
    dataset = load(tmp_path, rows, split_dates=["2017-09-03", "2017-09-23"])
    assert found(dataset) == expected(ROWS, 51, 71), (
        "midnights as above: a day is a unit of these rows"
    )


def test_by_ratio_never_parts_rows_of_one_time(tmp_path):
    times = np.sort([time for *_, time in ROWS])
    dataset = load(tmp_path, split_ratio=[0.7, 0.2, 0.1])
    assert found(dataset) == expected(
        ROWS, times[int(0.7 * len(times))], times[int(0.9 * len(times))]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 5), min_size=1, max_size=40), st.data()
)
def test_time_at_is_the_order_statistic(values, data):
    place = data.draw(st.integers(0, len(values) - 1))
    parts = np.array_split(np.array(values, np.int64), 3)
    assert time_at(lambda: iter(parts), place, min(values), max(values)) == sorted(values)[place]


def test_what_cannot_be_split_is_refused(tmp_path):
    for settings_, message in (
        (
            {"split_dates": [50, 900]},
            r"data.split_dates \['50', '900'\]: cuts at times 50 and 900 leave training, "
            "validation or test without",
        ),
        ({"split_dates": ["soon", 70]}, "'soon' is neither an ISO 8601 date"),
        ({"split_dates": [50, "--5"]}, "'--5' is neither an ISO 8601 date"),
        (
            {"split_ratio": [0.7, 0.2, 0.3]},
            "key 'data.split_ratio': the shares .* add up to 1.2, expected 1",
        ),
        ({"time_column": None}, r"rows.csv: data.split chronological needs times"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path, **settings_)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="leave no test users"):
        load(
            tmp_path,
            [(user, item, item) for user in range(4) for item in range(4)] + [(9, 1, 7)],
            split_dates=[2, 5],
        )
    load(tmp_path, split_dates=[50, 70])
    with pytest.raises(UserError, match="files of lcrec are split by leave-one-out"):
        export_data(tmp_path / "out", "lcrec", tmp_path / "Shop", "Shop")


@pytest.mark.parametrize(("history", "chunk"), [(50, 50_000), (3, 7)])
def test_recbole_files_carry_the_split(tmp_path, monkeypatch, history, chunk):
    """What RecBole reads by benchmark_filename.

    Every training item with what comes before it, and one target a user.
    """
    monkeypatch.setattr("ilrec_dist.data.formats.recbole.HISTORY_ITEMS", history)
    monkeypatch.setattr("ilrec_dist.data.formats.recbole.CHUNK_TARGETS", chunk)
    split = found(load(tmp_path, split_dates=[50, 70]))
    files = export_data(tmp_path / "out", "recbole", tmp_path / "Shop", "Shop")
    assert files == [
        *("Shop.inter", "Shop.item"),
        *("Shop.test.inter", "Shop.train.inter", "Shop.valid.inter"),
    ]

    def read(part):
        header, *rows = (
            line.split("\t")
            for line in (tmp_path / "Shop" / f"Shop.{part}.inter").read_text().splitlines()
        )
        assert header == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
        return [(user, before.split(" "), item) for user, before, item in rows]

    training = [
        (user, train[:place][-history:], train[place])
        for user, (train, *_) in split.items()
        for place in range(1, len(train))
    ]
    assert read("train") == [
        (user, list(map(str, before)), str(item)) for user, before, item in training
    ]
    for index, part in ((1, "valid"), (2, "test")):
        targets = [
            (user, *parts[index]) for user, parts in split.items() if parts[index] is not None
        ]
        assert len(targets) > 0 and read(part) == [
            (user, list(map(str, before[-history:])), str(item)) for user, item, before in targets
        ]


def test_items_with_a_space_do_not_fit_into_recbole_lists(tmp_path):
    load(
        tmp_path, [(user, f"item {item}", time) for user, item, time in ROWS], split_dates=[50, 70]
    )
    with pytest.raises(
        UserError,
        match="item 'item 0': RecBole's files cannot hold ids with a space, a tab or a line break",
    ):
        export_data(tmp_path / "out", "recbole", tmp_path / "Shop", "Shop")


def test_nothing_after_the_first_cut_reaches_what_trains(tmp_path):
    dataset = load(tmp_path, split_dates=[50, 70])
    later = ~train_mask(dataset)
    assert 0 < later.sum() < len(later)
    items = dataset.items.copy()
    items[later] = (
        items[later] + 1 + RNG.integers(0, dataset.num_items - 1, later.sum())
    ) % dataset.num_items
    other = InteractionDataset(
        items,
        dataset.offsets,
        dataset.user_ids,
        dataset.item_ids,
        split_positions=dataset.split_positions,
    )
    for targets in ("all", "last"):
        windows = training_windows(other, 5, targets)
        part = windows.slices(np.arange(len(windows)))
        for user, start, stop in zip(part.user, part.start, part.stop, strict=True):
            assert (
                other.sequence(user)[start:stop].tolist()
                == dataset.sequence(user)[start:stop].tolist()
            )
        assert part.num_targets == sum(
            max(0, len(train) - 1) for train, *_ in found(dataset).values()
        )
    ours, theirs = count_training(dataset), count_training(other)
    assert (ours.popularity == theirs.popularity).all() and (
        ours.transitions != theirs.transitions
    ).nnz == 0
    histories = [
        TrainingSequences(
            data.items, data.offsets[:-1], data.train_lengths(), data.target_positions("validation")
        )
        for data in (dataset, other)
    ]
    assert (histories[0].known_items(25) == histories[1].known_items(25)).all()
    for data in histories:
        row, position = data.training_targets(10**6)
        assert not later[data.starts[row] + position].any()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_baselines_rank_the_split_s_targets_after_its_histories(tmp_path, split):
    dataset = load(tmp_path, split_dates=[50, 70])
    users = dataset.evaluated(split)
    assert 0 < len(users) < dataset.num_users
    predictions = baseline_predictions(
        "transitions", BaselineInputs(dataset, split), users=users, exclude_seen=True
    )
    wanted = found(dataset)
    for user, target, listed in zip(
        predictions.users, predictions.targets, predictions.items, strict=True
    ):
        item, history = wanted[dataset.user_ids[int(user)]][1 if split == "validation" else 2]
        assert int(dataset.item_ids[int(target)]) == item
        assert not {int(dataset.item_ids[int(seen)]) for seen in listed if seen >= 0} & set(history)


def rank_by_baselines(mesh: Mesh, tree: dict) -> None:
    config = config_from_dict(tree)
    evaluate_baselines(config, RunArtifacts(config), defaultdict(str))


@pytest.mark.slow
def test_the_stages_stand_on_a_chronological_split(tmp_path):
    load(tmp_path)
    config = config_from_dict(
        {
            "runs_dir": str(tmp_path / "runs"),
            "data": {
                "format": "csv",
                "path": str(tmp_path / "rows.csv"),
                "split": "chronological",
                "min_user_interactions": 2,
            },
            "items": {"form": "atomic"},
            "cf": {"epochs": 1, "hidden_size": 8, "num_layers": 1},
        }
    )
    for stage in ("prepare", "index", "cf"):
        execute(config, stage)
    artifacts = RunArtifacts(config)
    dataset = artifacts.dataset
    targets = np.maximum(dataset.train_lengths() - 1, 0).sum()
    assert (
        json.loads((artifacts.folders.cf / "report.json").read_text())["log_p"]["cross_fitted"][
            "targets"
        ]
        == targets
    )
    assert artifacts.validation_users(0).tolist() == dataset.evaluated("validation").tolist()
    run_distributed(rank_by_baselines, 1, 1, config_to_dict(config))
    predictions = Predictions.load(predictions_file(config, "sasrec", None, True))
    assert predictions.users.tolist() == dataset.evaluated("test").tolist()
    assert predictions.targets.tolist() == [
        dataset.sequence(user)[-1] for user in predictions.users
    ]
