"""`ilrec index add` takes a language model's tokenizer along, with the tokens that are
new.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ilrec_dist.common.manifest import verify
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.add import add_items
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.language_model import LANGUAGE_MODEL, LanguageModel
from ilrec_dist.model.hf.config import read_config
from tests.support.item_words import words
from tests.support.language_models import make_language_model

pytestmark = pytest.mark.slow
CODES = {"levels": 2, "codes_per_level": 16, "collisions": "resolve", "embedding_dim": 16}


@pytest.mark.parametrize("settings", [CODES, {"form": "atomic"}])
def test_the_longer_index_has_a_tokenizer_for_all_its_tokens(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    texts = words(48)
    model = make_language_model(tmp_path / "llama", texts)
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32),
        np.array([0, 3]),
        ["u"],
        [f"i{item}" for item in range(48)],
        texts,
    )
    old, new = tmp_path / "old", tmp_path / "new"
    rows = read_config(model).vocab_size
    build_catalogue(ItemsConfig(**settings), dataset, old, model=LanguageModel(model, rows))
    add_items(old, dataset, ["n0", "n1"], new, texts[:2])
    verify(new)
    names = Catalogue.load(new).token_names()
    tokenizer = AutoTokenizer.from_pretrained(new / LANGUAGE_MODEL)
    assert [tokenizer.convert_tokens_to_ids(name) for name in names.values()] == list(names)
    for name, token in (("a code", max(names)), ("another", min(names))):
        assert tokenizer(names[token], add_special_tokens=False).input_ids == [token], name
    config = f"{LANGUAGE_MODEL}/config.json"
    assert (new / config).read_bytes() == (old / config).read_bytes()
