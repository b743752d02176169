"""What a configuration asks of the model: its
sizes, and how long sequences and lists are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.config.tree import Config
from ilrec_dist.items.lcrec_index import read_index
from ilrec_dist.items.titles import FIRST_NUMBER, RESERVED, load_tokenizer
from ilrec_dist.model.decoder import check_positions, decoder_of, max_positions
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.plan.communication import MicroBatch
from ilrec_dist.plan.decoder import DecoderSizes


@dataclass(frozen=True)
class DataSizes:
    """How much data there are; None where nobody has counted yet."""

    items: int | None = None
    users: int | None = None
    interactions: int | None = None


@dataclass(frozen=True)
class ItemTokens:
    """The token sequences of items: C, and the distinct tokens of each level."""

    level_sizes: tuple[int, ...]
    # Tokens that the model learns for them.
    new_tokens: int
    # Where these numbers come from.
    source: str

    @property
    def depth(self) -> int:
        return len(self.level_sizes)

    def candidates(self, items: int | None) -> int:
        """The most candidates that the rows of one item have together."""
        total, nodes = 0, 1
        for size in self.level_sizes:
            below = size if items is None else max(1, min(size, -(-items // nodes)))
            total, nodes = total + below, nodes * size
        return total


def data_sizes(config: Config, stated: DataSizes) -> DataSizes:
    """The sizes of the run's prepared data, else those given, else the generator's.

    Raises UserError where one is given that the prepared data do not have.
    """
    if open_run(config).record("prepare") is not None:
        dataset = RunArtifacts(config).dataset
        counted = DataSizes(dataset.num_items, dataset.num_users, dataset.num_interactions)
        for field in dataclasses.fields(DataSizes):
            wanted, actual = getattr(stated, field.name), getattr(counted, field.name)
            if wanted is not None and wanted != actual:
                raise UserError(
                    f"--{field.name} {wanted}: has no effect, for the data in {config.run_dir} are "
                    f"prepared and have {actual}; leave it out, or set another name"
                )
        return counted
    if config.data.format != "synthetic":
        return stated
    synthetic = config.data.synthetic
    return DataSizes(
        stated.items or synthetic.items,
        stated.users or synthetic.users,
        stated.interactions or int(synthetic.users * synthetic.mean_length),
    )


def item_tokens(config: Config, data: DataSizes) -> ItemTokens:
    """Those of the run's index, where it has one, else what the configuration says.

    Raises UserError where neither tells.
    """
    items = config.items
    run = open_run(config)
    if run.record("prepare") is not None and run.record("index") is not None:
        catalogue = RunArtifacts(config).catalogue
        count = len(catalogue.vocabulary.item_tokens)
        return ItemTokens(catalogue.level_sizes, count, f"the index in {config.run_dir}")
    if items.form == "titles" and config.backbone.from_ is not None:
        # Titles are spelt in the model's own tokens.
        count = read_config(config.backbone.from_).vocab_size
        return ItemTokens((count,) * (items.title_tokens + 1), 0, "titles of the longest kind")
    if items.form == "titles":
        count = items.title_vocab_size - RESERVED
        if items.tokenizer is not None:
            count = load_tokenizer(items.tokenizer, "items.tokenizer").get_vocab_size()
        count += FIRST_NUMBER
        return ItemTokens((count,) * (items.title_tokens + 1), count, "titles of the longest kind")
    if items.form == "atomic":
        if data.items is None:
            raise UserError(
                "items.form atomic: the vocabulary is as large as the catalogue, whose size is not "
                "known yet; give --items N, or run `ilrec prepare` first"
            )
        return ItemTokens((data.items,), data.items, f"{data.items:,} items")
    if items.index is not None:
        sizes = tuple(read_index(require_file(items.index, "items.index")).level_sizes)
        return ItemTokens(sizes, sum(sizes), items.index)
    sizes = (items.codes_per_level,) * items.levels
    return ItemTokens(sizes, sum(sizes), "items.levels × items.codes_per_level")


def decoder_sizes(config: Config, tokens: ItemTokens) -> DecoderSizes:
    """The decoder that the run trains, with the item tokens in its vocabulary.

    Raises UserError where `backbone.from` has no config.json.
    """
    positions = sequence_length(config, tokens)
    source = config.backbone.from_
    if source is None:
        return DecoderSizes.of(config.backbone, tokens.new_tokens + 1, positions)
    pretrained = read_config(source)
    check_positions(pretrained, positions)
    decoder = decoder_of(config.backbone, pretrained)
    vocab = max(pretrained.vocab_size, added_token_range(config, tokens)[1])
    return DecoderSizes.of(decoder, vocab, pretrained.max_positions)


def added_token_range(config: Config, tokens: ItemTokens) -> tuple[int, int]:
    """The range of the item tokens that follow a model's own."""
    source = config.backbone.from_
    if source is None:
        return 0, 0
    base = _tokenizer_size(Path(source)) or read_config(source).vocab_size
    return base, base + tokens.new_tokens


def _tokenizer_size(folder: Path) -> int | None:
    path = folder / "tokenizer.json"
    return load_tokenizer(path, "backbone.from").get_vocab_size() if path.is_file() else None


def sequence_length(config: Config, tokens: ItemTokens) -> int:
    """Tokens of the longest input. Raises UserError for prompts without a limit."""
    if config.prompts.templates is None:
        return max_positions(config.train.max_history, tokens.depth)
    if config.prompts.max_tokens is None:
        raise UserError(
            "prompts.max_tokens: a plan needs the limit of prompts and their responses; set it"
        )
    return config.prompts.max_tokens


def micro_batches(
    config: Config, tokens: ItemTokens, data: DataSizes
) -> tuple[MicroBatch, MicroBatch, int]:
    """A rank's largest micro-batch, one of average size, and how many a step has.

    All sequences are as long as they may be. A prompt has one item as its response, and
    so has a sequence with train.targets last. Under train.micro_batch_tokens the
    largest one is packed with as many tokens as it may have, and the average one with
    those that the rank's sequences have together; of shorter sequences it takes more.
    """
    train, length = config.train, sequence_length(config, tokens)
    one_target = train.targets == "last" or config.prompts.templates is not None
    targets = 1 if one_target else train.max_history
    share = train.batch_size // config.launch.dp

    def batch(sequences: int, packed: int | None = None) -> MicroBatch:
        rows = sequences * targets
        return MicroBatch(
            sequences, length, rows * tokens.depth, rows * tokens.candidates(data.items), packed
        )

    if train.micro_batch_tokens is None:
        even = batch(share // train.accumulation_steps)
        return even, even, train.accumulation_steps
    budget = max(length, train.micro_batch_tokens)
    steps = -(-share // min(share, budget // length))
    most = min(budget, share * length)
    mean = batch(-(-share // steps), -(-share * length // steps))
    return batch(-(-most // length), most), mean, steps
