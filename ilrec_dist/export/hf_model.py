"""A trained model as a folder of its own:
weights, tokenizer, catalogue, trie, decoding.

`transformers` loads the folder. Its files need neither this project nor remote code:
`constrained_decoding.py` is copied beside them and reads `trie.csr` with Python alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, write_json
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.export import constrained_decoding
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import SHARD_BYTES, write_config
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.peft import CONFIG_FILE, WEIGHTS_FILE, adapter_config
from ilrec_dist.model.hf.tensor_files import TensorRows, write_tensors

# What `generate` does unless it is told otherwise. Every field is written: an unset one would be
# filled from defaults of the library, and a repetition penalty acts on the codes of the history.
GENERATION = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 0.0,
}
PADDING_NAME = "<pad>"
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PADDING_NAME,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Decoding:
    """How `ilrec recommend` finds a model's items, which `generate` is to do alike."""

    beam: int = 20
    # What log p is over (METHOD.md §9).
    softmax_scope: SoftmaxScope = "all"

    @property
    def is_masked(self) -> bool:
        """Whether a token competes with the trie's other continuations only."""
        return self.softmax_scope == "valid_next"


@dataclass(frozen=True)
class ModelParts:
    """What a model's folder has besides its weights."""

    dataset: InteractionDataset
    catalogue: Catalogue
    trie: Trie
    decoding: Decoding
    # The folder with the extended tokenizer and the config.json of the pretrained model that the
    # training began with; None for one trained from scratch.
    language_model: Path | None = None
    # What is written to prompt.json, where the model answers prompts in words.
    prompt: Mapping[str, Any] | None = None


def export_model(
    out: Path, backbone: Backbone, tensors: TensorRows, parts: ModelParts, dtype: torch.dtype
) -> None:
    """Write the folder `out`, whole or not at all.

    backbone: of the architecture, without values. tensors: by the checkpoint's names;
    they are written in `dtype`, in files of at most SHARD_BYTES, one after the other. A
    weight that has that dtype comes out byte for byte.

    Raises UserError when `out` exists, when no Hugging Face family has the backbone's
    architecture, and for items that are titles in a vocabulary of their own.
    """
    padding = parts.catalogue.vocabulary.padding
    token_ids = {"pad_token_id": padding, "bos_token_id": None, "eos_token_id": None}
    if parts.language_model is not None:
        token_ids |= read_config(parts.language_model).token_ids
    with _new_folder(out, parts) as staged:
        write_config(staged, backbone, dtype, token_ids)
        write_tensors(tensors, staged, dtype, SHARD_BYTES)


def export_adapter(
    out: Path,
    backbone: Backbone,
    tensors: TensorRows,
    parts: ModelParts,
    dtype: torch.dtype,
    base: str,
) -> None:
    """Write the adapters for PEFT in place of the
    weights, otherwise as `export_model` does.

    base: the folder or name of the pretrained
    model, as PEFT's configuration records it.
    """
    with _new_folder(out, parts) as staged:
        write_json(staged / CONFIG_FILE, adapter_config(backbone, base))
        write_tensors(tensors, staged, dtype, single_file=WEIGHTS_FILE)


@contextmanager
def _new_folder(out: Path, parts: ModelParts) -> Iterator[Path]:
    """The folder that becomes `out`, for the weights; the other files follow."""
    catalogue, language_model = parts.catalogue, parts.language_model
    if out.exists():
        raise UserError(f"{out}: already exists; choose a folder to create")
    if catalogue.pieces is not None and language_model is None:
        raise UserError(
            "items.form titles: a model whose vocabulary was learned from the titles has no "
            "Hugging Face tokenizer; expected items.form semantic or atomic"
        )
    try:
        with committed_folder(out) as staged:
            yield staged
            if language_model is None:
                own_tokenizer(catalogue).save(str(staged / "tokenizer.json"))
                write_json(staged / "tokenizer_config.json", TOKENIZER_CONFIG)
            else:
                _copy_tokenizer(language_model, staged)
            write_item_files(staged, parts.dataset, catalogue, parts.trie, parts.decoding)
            if parts.prompt is not None:
                write_json(staged / "prompt.json", parts.prompt)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _copy_tokenizer(language_model: Path, folder: Path) -> None:
    for path in language_model.iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def write_item_files(
    folder: Path,
    dataset: InteractionDataset,
    catalogue: Catalogue,
    trie: Trie,
    decoding: Decoding,
) -> None:
    """Write catalogue.parquet, trie.csr,
    generation_config.json and constrained_decoding.py.
    """
    pq.write_table(catalogue_table(dataset, catalogue), folder / "catalogue.parquet")
    vocabulary = catalogue.vocabulary
    settings = np.array([trie.depth, vocabulary.padding, decoding.is_masked], np.int64)
    arrays = {**trie_arrays(trie), "depth_padding_masked_softmax": settings}
    # Some servers take every file that is named *.safetensors for weights.
    save_file(arrays, folder / "trie.csr")
    generation: dict[str, Any] = {
        **GENERATION,
        "num_beams": decoding.beam,
        "renormalize_logits": decoding.is_masked,
        "pad_token_id": vocabulary.padding,
    }
    if vocabulary.end is None:
        # Codes have a fixed length: nothing ends them but their number.
        generation["max_new_tokens"] = catalogue.depth
    else:
        generation |= {"eos_token_id": vocabulary.end, "max_new_tokens": catalogue.depth}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(constrained_decoding.__file__, folder / "constrained_decoding.py")


def catalogue_table(dataset: InteractionDataset, catalogue: Catalogue) -> pa.Table:
    """A row an item, in code order: item id, title, codes as text, token ids."""
    order = np.asarray(catalogue.items)
    names = catalogue.token_names()
    tokens = [row[row != NO_TOKEN].tolist() for row in np.asarray(catalogue.tokens)]
    titles = dataset.titles
    return pa.table(
        {
            "item": pa.array([dataset.item_ids[item] for item in order], pa.string()),
            "title": pa.array(
                [None if titles is None else titles[item] for item in order], pa.string()
            ),
            "codes": pa.array(["".join(names[token] for token in row) for row in tokens]),
            "token_ids": pa.array(tokens, pa.list_(pa.int32())),
        }
    )


def trie_arrays(trie: Trie) -> dict[str, np.ndarray]:
    """The trie as `constrained_decoding.ItemTrie` reads it, int64.

    Nodes are numbered depth by depth, so that a node's children are neighbours. What
    stands behind the end of a title is no node.
    """
    tokens, children = [np.array([NO_TOKEN])], []
    first_row, last_row = [trie.node_start[0][:-1]], [trie.node_start[0][1:]]
    is_node = np.ones(1, bool)
    for p in range(trie.depth):
        indptr, labels, _ = trie.children(p, np.flatnonzero(is_node))
        parents = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        children.append(np.bincount(parents[labels != NO_TOKEN], minlength=len(indptr) - 1))
        is_node = trie.node_token[p + 1] != NO_TOKEN
        tokens.append(trie.node_token[p + 1][is_node])
        first_row.append(trie.node_start[p + 1][:-1][is_node])
        last_row.append(trie.node_start[p + 1][1:][is_node])
    children.append(np.zeros(int(is_node.sum()), np.int64))
    arrays = {
        "child": 1 + np.append(0, np.cumsum(np.concatenate(children))),
        "tokens": np.concatenate(tokens),
        "first_row": np.concatenate(first_row),
        "last_row": np.concatenate(last_row),
    }
    return {name: array.astype(np.int64) for name, array in arrays.items()}


def own_tokenizer(catalogue: Catalogue) -> Tokenizer:
    """A tokenizer for a model whose whole vocabulary
    is item codes: `<a_3><b_7>` is two tokens.

    Raises ValueError for titles, which have a tokenizer of their own.
    """
    if catalogue.pieces is not None:
        raise ValueError("expected a catalogue of codes, found titles")
    names = catalogue.token_names()
    vocabulary = {name: token for token, name in names.items()}
    vocabulary[PADDING_NAME] = catalogue.vocabulary.padding
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PADDING_NAME))
    # A code ends with its bracket, and blanks between items mean nothing.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(">", behavior="merged_with_previous"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(PADDING_NAME, special=True)])
    return tokenizer
