"""A study file becomes cells, each an ordinary
configuration; what cannot be meant is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.study.cells import Cell, make_cells
from ilrec_dist.study.config import load_study
from ilrec_dist.study.figures import check_against
from tests.support.tiny_study import write_study

STUDIES = sorted((Path(__file__).parents[2] / "configs").glob("study-*.yaml"))


def cells_of(path: Path, *overrides: str) -> list[Cell]:
    study, of_cells = load_study(path, overrides)
    cells = make_cells(study, path, of_cells)
    check_against(study, cells)
    return cells


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_shipped_studies_have_the_methods_with_every_seed_and_each_setting(path):
    study = yaml.safe_load(path.read_text())
    # The file's model, PATH/NAME, is no model of the hub.
    model = ["backbone.from=/models/one"] if path.name == "study-smollm2.yaml" else []
    cells = cells_of(path, *model)
    titles = {cell.title for cell in cells}
    name = next(iter(study["configurations"]))
    assert {f"{name}/{m}-seed{s}" for m in study["methods"] for s in study["seeds"]} <= titles
    assert set(study.get("settings", {})) == {cell.setting for cell in cells} - {""}
    # The baselines are trained once for all cells of a configuration, as data and codes are made.
    for configuration in study["configurations"]:
        shared = [cell for cell in cells if cell.configuration == configuration]
        assert {"baseline gru4rec", "baseline caser", "cf"} <= set(shared[0].shared_stages)
        for stage in shared[0].shared_stages:
            settings = [cell.run.stages[stage].settings for cell in shared]
            assert settings == settings[:1] * len(shared), stage


def test_the_grid_has_methods_before_settings_and_seed_after_seed(tmp_path):
    settings = {
        "no-cpd": {"methods": ["ilrec"], "set": {"objective.cpd_mu": 0.0}},
        "short": {"seeds": [5], "set": {"train.epochs": 1}},
    }
    path = write_study(tmp_path, seeds=[0, 1], settings=settings)
    assert [cell.title for cell in cells_of(path)] == [
        "shop/sft-seed0",
        "shop/ilrec-seed0",
        "shop/sft-seed1",
        "shop/ilrec-seed1",
        "shop/ilrec-no-cpd-seed0",
        "shop/ilrec-no-cpd-seed1",
        "shop/sft-short-seed5",
        "shop/ilrec-short-seed5",
    ]


def test_a_cell_is_a_configuration_that_can_be_run_by_itself(tmp_path):
    # Only the other method reads these two.
    base = {"objective": {"penalty": "multiplicative"}, "cf": {"reward_cache": True}}
    path = write_study(tmp_path, base=base)
    sft, ilrec = cells_of(path, "train.epochs=7", "seeds=[4]")
    assert sft.config.train.epochs == 7 and sft.config.train.seeds == [4]
    assert sft.config.objective.penalty == "additive" and not sft.config.cf.reward_cache
    assert ilrec.config.objective.penalty == "multiplicative" and ilrec.config.cf.reward_cache
    assert sft.folder == tmp_path / "runs/tiny-study/shop/sft-seed4"
    for cell in (sft, ilrec):
        copy = tmp_path / "cell.yaml"
        copy.write_text(cell.run.config_text)
        assert load_config(copy) == cell.config


def test_cells_share_the_stages_before_training(tmp_path):
    settings = {"no-cpd": {"methods": ["ilrec"], "set": {"objective.cpd_mu": 0.0}}}
    cells = cells_of(write_study(tmp_path, settings=settings))
    for stage in ("prepare", "index", "cf", "rewards"):
        assert len({cell.run.fingerprint(stage) for cell in cells}) == 1
    assert len({cell.fingerprint() for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"settings": {"x": {"set": {"objective.cpd_mu": 0.5}}}},
            "cell shop/sft x: key 'objective.cpd_mu' has no effect on sft here",
        ),
        (
            {"settings": {"x": {"set": {"data.synthetic.users": 99}}}},
            "settings.x changes the data",
        ),
        (
            {"settings": {"x": {"set": {"train.seeds": [3]}}}},
            "key 'train.seeds' is the study's",
        ),
        (
            {"settings": {"x": {"set": {"train.epochs": 0}}}},
            "cell shop/sft x: key 'train.epochs': input should be greater than or equal to 1",
        ),
        (
            {"settings": {"x": {"methods": ["ilrec"], "set": {}}}},
            "key 'settings.x.set'",
        ),
        (
            {"settings": {"x": {"configurations": ["shp"], "set": {"train.epochs": 1}}}},
            "unknown configuration 'shp'; expected some of shop",
        ),
        ({"settings": {"a/b": {"set": {"train.epochs": 1}}}}, "should be a name of letters"),
        ({"against": ["sfd"]}, "no row 'sfd'; expected some of .*ilrec.*sft"),
        ({"seed": [0]}, "unknown key 'seed'; the nearest key is 'seeds' .docs/studies.md"),
        ({"methods": ["sft", "dqo"]}, "key 'methods.1': input should be 'sft'"),
        (
            {"methods": ["sft"], "base": {"objective": {"penalty": "multiplicative"}}},
            "configuration shop .*key 'objective.penalty': has no effect here",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        cells_of(write_study(tmp_path, **changes))


def test_a_configuration_that_is_missing_is_named(tmp_path):
    path = write_study(tmp_path)
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(ConfigError, match="base.yaml: no such configuration file"):
        cells_of(path)
