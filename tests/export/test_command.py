"""`ilrec export`: transformers loads the folder,
gives our logits and generates our beams.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ilrec_dist.cli import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.serving.backend import LocalBackend
from tests.support.exported import catalogue_ids, generated, recommended
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
LLAMA = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "bias": False,
    "num_kv_heads": 2,
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """A small finished run with a decoder of
    Llama's form, and the folder it was exported to.
    """
    root = tmp_path_factory.mktemp("export")
    config = tiny_config(root, backbone=LLAMA, train={"methods": ["sft"], "epochs": 1})
    for stage in ("prepare", "index", "train"):
        execute(config, stage)
    assert main(["export", str(config.run_dir), str(root / "model")]) == 0
    return config.run_dir, root / "model"


def test_transformers_gives_our_logits(exported) -> None:
    run, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder)
    with open_trained_model(run) as trained:
        tokens = torch.randint(1, trained.artifacts.catalogue.vocab_size, (3, 9))
        rows = torch.arange(tokens.numel())
        with torch.no_grad():
            hidden = trained.backbone(tokens, rows, 1).final
            head = trained.backbone.gpt.shared_embedding_or_output_weight()
            ours = hidden @ head.t()
            theirs = model(tokens).logits.flatten(0, 1)
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=1e-5, atol=1e-5)


def test_generate_finds_what_recommend_finds(exported, tmp_path: Path) -> None:
    run, folder = exported
    ids = catalogue_ids(folder)
    history = [ids[3], ids[40], ids[7]]
    expected = recommended(run, [history], tmp_path, "--top", "10")
    found = generated(folder, history, beams=20)[:10]
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], atol=1e-4
    )


def test_refusals_are_one_line_and_leave_nothing(exported, tmp_path: Path, capsys) -> None:
    run, folder = exported
    for words, message in (
        ([str(run), str(folder)], "already exists"),
        ([str(tmp_path), str(tmp_path / "new")], "not a run folder"),
        ([str(run), str(tmp_path / "new"), "--method", "none"], "unknown method 'none'"),
        ([str(run), str(tmp_path / "new"), "--seed", "9"], "no such weights"),
    ):
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_without_a_hugging_face_form_is_refused(tmp_path: Path, capsys) -> None:
    config = tiny_config(tmp_path, train={"methods": ["sft"], "epochs": 1})
    for stage in ("prepare", "index", "train"):
        execute(config, stage)
    assert main(["export", str(config.run_dir), str(tmp_path / "model")]) == 2
    assert "normalization" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_the_local_backend_serves_what_recommend_writes(exported, tmp_path: Path) -> None:
    run, folder = exported
    ids = catalogue_ids(folder)
    histories = [[ids[3], ids[40], ids[7]], [ids[1]]]
    written = recommended(run, histories, tmp_path, "--top", "5", "--exclude-seen")
    with open_trained_model(run) as trained:
        backend = LocalBackend(trained.ranker, trained.artifacts.dataset)
        lists = backend.recommend(histories, 5, True)
        with pytest.raises(UserError, match="history 1 has the item 'none'"):
            backend.recommend([[ids[0]], ["none"]], 5, False)
        with pytest.raises(UserError, match="history 0 is empty"):
            backend.recommend([[]], 5, False)
    served = [(item.item, item.score) for items in lists for item in items]
    assert served == written and len(served) == 10
