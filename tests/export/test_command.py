"""`ilrec export`: transformers loads the folder, gives our logits and generates our beams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilrec_dist.cli import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.export.constrained_decoding import ItemTrie, prefix_allowed_tokens_fn
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.serving.backend import LocalBackend
from tests.training.conftest import tiny_config

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
    """A small finished run with a decoder of Llama's form, and the folder it was exported to."""
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
    catalogue = pq.read_table(folder / "catalogue.parquet")
    ids = catalogue.column("item").to_pylist()
    history = [ids[3], ids[40], ids[7]]
    table = pa.table({"user": ["u"], "items": pa.array([history], pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "histories.parquet")
    out = tmp_path / "out.parquet"
    words = ["recommend", str(run), "--histories", str(tmp_path / "histories.parquet")]
    assert main([*words, "--top", "10", "--out", str(out)]) == 0
    expected = pq.read_table(out).to_pylist()

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    codes = dict(zip(ids, catalogue.column("codes").to_pylist(), strict=True))
    prompt = tokenizer("".join(codes[item] for item in history), return_tensors="pt").input_ids
    trie = ItemTrie(folder)
    beams = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        num_return_sequences=20,
        output_scores=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(trie, prompt.shape[1]),
    )
    found = [
        (ids[row], float(score))
        for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True)
        for row in trie.items(sequence[prompt.shape[1] :].tolist())
    ]
    assert [item for item, _ in found[:10]] == [row["item"] for row in expected]
    np.testing.assert_allclose(
        [score for _, score in found[:10]], [row["score"] for row in expected], atol=1e-4
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
    ids = pq.read_table(folder / "catalogue.parquet").column("item").to_pylist()
    histories = [[ids[3], ids[40], ids[7]], [ids[1]]]
    table = pa.table({"user": ["u", "v"], "items": pa.array(histories, pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "histories.parquet")
    out = tmp_path / "out.parquet"
    words = ["recommend", str(run), "--histories", str(tmp_path / "histories.parquet")]
    assert main([*words, "--top", "5", "--exclude-seen", "--out", str(out)]) == 0
    with open_trained_model(run) as trained:
        backend = LocalBackend(
            trained.backbone,
            trained.artifacts.dataset,
            trained.artifacts.trie,
            beam=trained.config.evaluation.beam,
            batch_size=trained.config.evaluation.batch_size,
            softmax_scope=trained.softmax_scope,
            inputs=trained.inputs,
            parallel=trained.parallel,
        )
        lists = backend.recommend(histories, 5, True)
        with pytest.raises(UserError, match="history 1 has the item 'none'"):
            backend.recommend([[ids[0]], ["none"]], 5, False)
        with pytest.raises(UserError, match="history 0 is empty"):
            backend.recommend([[]], 5, False)
    served = [(item.item, item.score) for items in lists for item in items]
    written = [(row["item"], row["score"]) for row in pq.read_table(out).to_pylist()]
    assert served == written and len(served) == 10
