"""Runs on prompts: trained, evaluated and served
in one form, and asked by transformers too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from ilrec_dist.cli import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.samples.windows import training_windows
from tests.support.exported import asked, catalogue_ids, ranked
from tests.support.language_models import END, make_language_model, model_config
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow

SHARES = {
    "next_item": 0.6,
    "titles_to_next_codes": 0.1,
    "codes_to_next_title": 0.1,
    "title_to_codes": 0.1,
    "codes_to_title": 0.1,
}
TRAIN = {"epochs": 1, "learning_rate": 2e-3, "targets": "last", "validation_users": 20}
CHAT = (
    "{% for message in messages %}[{{ message.role }}: {{ message.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, Path]:
    """(the folder of runs with one whose data
    are prepared, a language model's folder).
    """
    root = tmp_path_factory.mktemp("shop")
    config = tiny_config(root)
    execute(config, "prepare")
    titles = load_dataset(config.run_dir / "data").titles
    assert titles is not None
    model = make_language_model(root / "llama", titles, positions=256)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    return root, model


def run_config(shop: tuple[Path, Path], **sections) -> Config:
    return model_config(shop[0], shop[1], train=TRAIN | sections.pop("train", {}), **sections)


@pytest.fixture(scope="module")
def finished(shop) -> Config:
    """A whole run on LC-Rec's tasks, SFT and ILRec, an epoch each."""
    prompts = {"templates": "lcrec", "shares": SHARES, "max_tokens": 200}
    config = run_config(shop, prompts=prompts)
    execute(config, "run")
    return config


@pytest.fixture(scope="module")
def titles_run(shop) -> Config:
    """Titles as items, asked in the model's chat template."""
    config = run_config(
        shop,
        name="titles",
        items={"form": "titles"},
        prompts={"templates": "titles", "chat": True},
        train={"methods": ["ilrec"]},
    )
    for stage in ("prepare", "index", "cf", "train"):
        execute(config, stage)
    return config


def test_the_run_has_the_samples_and_rows_of_all_tasks(finished) -> None:
    folder = finished.run_dir / "train/ilrec-seed0"
    lines = [line for line in read_metrics(folder) if "loss/total" in line]
    data = load_dataset(finished.run_dir / "data")
    windows = len(training_windows(data, finished.train.max_history, "last"))
    per_task = {name: round(windows * share / 0.6) for name, share in SHARES.items()}
    assert lines[-1]["step"] == math.ceil(sum(per_task.values()) / finished.train.batch_size)
    words = sum(line["rows/words"] for line in lines)
    items = sum(line["rows"] for line in lines) - words
    answers = ("next_item", "titles_to_next_codes", "title_to_codes")
    assert items == 2 * sum(per_task[name] for name in answers)
    assert lines[-1]["loss/words"] < lines[0]["loss/words"]
    for line in lines:
        total = line["loss/cpo"] + 0.1 * line["loss/cpd"] + 0.02 * line["loss/crr"]
        total = (line["rows"] - line["rows/words"]) * total
        total += line["rows/words"] * line["loss/words"]
        assert line["loss/total"] == pytest.approx(total / line["rows"], rel=1e-6)
        assert line["rewards/coverage"] > 0.9
    results = json.loads((finished.run_dir / "results.json").read_text())
    assert {"sft", "ilrec", "popularity", "sasrec"} <= {row["method"] for row in results["rows"]}


def test_recommendations_are_those_of_the_validated_form(finished, tmp_path: Path) -> None:
    """Test users' histories give the lists of
    the evaluation, whoever else is in the batch.
    """
    predictions = pq.read_table(
        finished.run_dir / "evaluation/ilrec-seed0/predictions.parquet"
    ).to_pylist()
    data = load_dataset(finished.run_dir / "data")
    chosen = [row for row in predictions if row["user"] in (0, 3, 77)]
    histories = {
        f"u{row['user']}": [data.item_ids[item] for item in data.sequence(row["user"])[:-1]]
        for row in chosen
    }
    found = recommend(finished, histories, tmp_path, "--exclude-seen")
    for row in chosen:
        own = [line for line in found if line["user"] == f"u{row['user']}"]
        assert [line["item"] for line in own] == [data.item_ids[i] for i in row["items"][:10]]
        np.testing.assert_allclose([line["score"] for line in own], row["scores"][:10], atol=1e-4)


@pytest.mark.parametrize(("run", "top"), [("finished", 10), ("titles_run", 60)])
def test_generate_finds_what_recommend_finds(run: str, top: int, request, tmp_path: Path) -> None:
    """Titles in a beam of the whole catalogue:
    beams of generate that have ended take no place.
    """
    config = request.getfixturevalue(run)
    out = tmp_path / "exported"
    assert main(["export", str(config.run_dir), str(out), "--method", "ilrec"]) == 0
    ids = catalogue_ids(out)
    history = [ids[3], ids[40], ids[7]]
    expected = recommend(config, {"u": history}, tmp_path, top=top)
    found = ranked(out, asked(out, history), top)
    assert [item for item, _ in found[:top]] == [row["item"] for row in expected]
    np.testing.assert_allclose(
        [score for _, score in found[:top]], [row["score"] for row in expected], atol=1e-4
    )


def recommend(
    config: Config, histories: dict[str, list[str]], folder: Path, *flags: str, top: int = 10
) -> list[dict]:
    table = {"user": list(histories), "items": pa.array(list(histories.values()))}
    pq.write_table(pa.table(table), folder / "histories.parquet")
    out = folder / "out.parquet"
    words = ["recommend", str(config.run_dir), "--method", "ilrec", "--top", str(top), *flags]
    words += ["--histories", str(folder / "histories.parquet"), "--out", str(out)]
    assert main(words) == 0
    return pq.read_table(out).to_pylist()


def test_titles_are_spelt_in_the_models_tokens_and_end_with_its_end(shop, titles_run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shop[1])
    with open_trained_model(titles_run.run_dir, "ilrec") as trained:
        catalogue, dataset = trained.artifacts.catalogue, trained.artifacts.dataset
        assert trained.backbone.vocab_size == len(tokenizer) + 5
    assert dataset.titles is not None
    for item in (0, 17, 59):
        own = catalogue.item_tokens(np.array(item))
        title = tokenizer(dataset.titles[item], add_special_tokens=False).input_ids
        assert own[own >= 0].tolist() == [*title[:32], tokenizer.convert_tokens_to_ids(END)]


def test_show_prompts_prints_text_and_tokens(finished, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(finished))
    assert main(["show-prompts", str(path), "--users", "2"]) == 0
    shown = capsys.readouterr().out
    for name in SHARES:
        assert shown.count(f"{name}, ") == 2
    assert "next_item, user 0, item " in shown and "template lcrec/1." in shown
    (line,) = [line for line in shown.splitlines() if "The index of the product" in line][:1]
    assert line.startswith('  text: The index of the product called "') and "[[<a_" in line
    assert shown.count(" [[ ") == 10 and shown.count(" ]]\n") == 10
    short = ["prompts.max_tokens=90"]
    assert main(["show-prompts", str(path), *short, "--users", "20"]) == 0
    assert "oldest items are left out" in capsys.readouterr().out
    for overrides, message in (
        (["name=other"], "stage prepare has not been made; run `ilrec prepare CONFIG`"),
        (["prompts.max_tokens=12"], "template lcrec/1.1: the prompt without any history"),
        (["prompts.max_tokens=1000"], "prompts.max_tokens: 1000 tokens, and .* 256 positions"),
    ):
        assert main(["show-prompts", str(path), *overrides]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        with pytest.raises(UserError, match=message):
            raise UserError(error)


def test_what_cannot_be_asked_ends_the_training_before_it_begins(shop, finished, capsys) -> None:
    before = sorted(path.name for path in (finished.run_dir / "train").iterdir())
    prompts = {"templates": "lcrec", "shares": SHARES, "max_tokens": 12}
    with pytest.raises(UserError, match="without any history and its response have"):
        execute(run_config(shop, prompts=prompts), "train")
    assert sorted(path.name for path in (finished.run_dir / "train").iterdir()) == before
    assert main(["recommend", str(finished.run_dir), "--histories", "none.parquet"]) == 2


def test_templates_that_do_not_fit_the_items_are_refused(shop, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("- {templates: ['{history} then ']}\n")
    lcrec = {"templates": "lcrec", "shares": SHARES}
    titles = {"form": "titles"}
    for sections, message in (
        ({"prompts": lcrec, "train": {"targets": "all"}}, "'train.targets': a prompt has one"),
        ({"prompts": {"templates": "lcrec", "shares": {"codes_to_title": 0.2}}}, "add up to 1.2"),
        (
            {"prompts": {"templates": str(file), "shares": SHARES}},
            "'prompts.shares.titles_to_next_codes': .* no template of that task",
        ),
        (
            {"prompts": {"templates": "titles"}},
            "template titles/1.1 answers with titles, and items",
        ),
        ({"prompts": {"templates": "lcrec"}, "items": titles}, "answers with codes, and items are"),
        ({"prompts": {"chat": True}}, "'prompts.chat': has no effect here: it needs prompts.templ"),
        ({"items": titles, "prompts": {"max_tokens": 5}}, "'prompts.max_tokens': has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            run_config(shop, **sections)
    with pytest.raises(UserError, match="none.yaml: no such file of templates"):
        execute(run_config(shop, prompts={"templates": "none.yaml"}), "train")
    with pytest.raises(UserError, match="'prompts.templates': has no effect .* backbone.from"):
        tiny_config(tmp_path, prompts={"templates": "lcrec"}, train={"targets": "last"})
