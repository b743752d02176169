"""A tiny random Llama with a real tokenizer,
learned from a shop's titles, and runs that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from tests.support.tiny_run import tiny_config

END, BEGIN = "<|end|>", "<|begin|>"
# Rows of the embedding beyond the tokenizer's tokens.
SPARE_ROWS = 5
MODEL_SETTINGS = {"trainable", "lora", "new_rows_learning_rate"}


def make_language_model(
    folder: Path,
    titles: Sequence[str],
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    positions: int = 128,
) -> Path:
    """Save a Llama of 3 layers with 4 heads on
    2, and byte-pair encoding with a start token.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    learned.train_from_iterator(
        titles,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[END, BEGIN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=END, bos_token=BEGIN)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def model_config(
    runs_dir: Path,
    source: Path | str,
    backbone: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    name: str = "tiny",
    **sections: Any,
) -> Config:
    """The tiny run with the model at `source` in place of its own decoder."""
    train = sections.pop("train", {})
    # Settings that are refused without a model.
    of_model = {key: train[key] for key in MODEL_SETTINGS & train.keys()}
    sections["train"] = {key: value for key, value in train.items() if key not in of_model}
    tree = config_to_dict(tiny_config(runs_dir, **sections)) | {"name": name}
    own = {"backbone": {"from": str(source)} | (backbone or {}), "prompts": prompts or {}}
    return config_from_dict(tree | own | {"train": tree["train"] | of_model})
