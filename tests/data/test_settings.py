"""Keys of the section `data` that have no effect are named, with what has
one instead.
"""

from __future__ import annotations

import re

import pytest

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats import NAMES
from ilrec_dist.data.reading.source import load_format
from ilrec_dist.data.settings import ineffective_settings


@pytest.mark.parametrize(
    ("settings", "key", "why"),
    [
        ({"format": "recbole", "time_column": "time"}, "data.time_column", "timestamp:float"),
        ({"format": "amazon", "time_column": None}, "data.time_column", "of the reviews"),
        ({"format": "lcrec", "items_path": "x.csv"}, "data.items_path", "amazon, csv, parquet, "),
        ({"format": "sequences", "user_column": "u"}, "data.user_column", "csv, parquet$"),
        ({"format": "csv", "split_dates": ["1", "2"]}, "data.split_dates", "split=chronological"),
        ({"min_user_interactions": 1}, "data.min_user_interactions", "reads no file"),
    ],
)
def test_a_key_without_effect_is_named_with_what_has_one(settings, key, why):
    ((found, reason),) = ineffective_settings(DataConfig(**settings))
    assert found == key
    assert re.search(why, reason), reason


def test_keys_with_an_effect_and_defaults_are_not_named():
    for name in NAMES:
        assert list(ineffective_settings(DataConfig(format=name))) == []
    table = {"user_column": "u", "item_column": "i", "time_column": None, "items_path": "x"}
    for name in ("csv", "parquet"):
        assert list(ineffective_settings(DataConfig(format=name, path="p", **table))) == []
    dates = {"split": "chronological", "split_dates": ["1", "2"]}
    assert list(ineffective_settings(DataConfig(format="recbole", path="p", **dates))) == []


def test_every_module_of_the_formats_is_one():
    assert {"amazon", "csv", "lcrec", "recbole", "synthetic"} < set(NAMES)
    for name in NAMES:
        format_ = load_format(name)
        assert (format_.read is None) == (name == "synthetic") == (format_.generate is not None)
        assert format_.settings <= {field for field in DataConfig.__dataclass_fields__}
    assert [name for name in NAMES if load_format(name).write] == ["lcrec", "recbole"]
