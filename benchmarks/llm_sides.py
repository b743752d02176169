"""What one process of llm.py measures: a side of a comparison, by its name in SIDES."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import NumberedIds
from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.distributed.process_groups import initialize_parallel
from ilrec_dist.export.constrained_decoding import ItemTrie, prefix_allowed_tokens_fn
from ilrec_dist.export.hf_model import Decoding, write_item_files
from ilrec_dist.inference.beam_search import beam_search, read_prefixes
from ilrec_dist.inference.inputs import Prefixes
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.lcrec_index import IndexFile, read_index
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import Vocabulary
from ilrec_dist.model.build import build_pretrained, load_pretrained
from ilrec_dist.model.config import BackboneConfig, LoraConfig, Trainable
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.layers import Precision
from ilrec_dist.model.partial import train_partially
from ilrec_dist.objective import ilrec
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.registry import get_method
from ilrec_dist.samples.collate import Batch, BatchMaker, ItemRows
from ilrec_dist.samples.micro_batches import within_budget
from ilrec_dist.samples.prefetch import micro_batch_plan
from ilrec_dist.samples.windows import StepOrder, training_windows
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import build_engine

LEVELS, CODES, ITEMS, BEAM = 4, 256, 5000, 20
# 7 items of 4 tokens each are the 28 tokens of a usual history.
USERS, MEAN_ITEMS, LONGEST = 512, 8, 20
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPERATOR_ROWS = 1024
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class PromptForm:
    """How a system writes a training prompt: words, the history as codes, and the item.

    What the words say costs nothing, so they are drawn. Their number was counted with
    SmolLM2's tokenizer over the system's own templates.
    """

    words: int
    # Between two items of the history.
    separator: int
    # Of a micro-batch, in which every prompt is padded to the longest.
    batch: int
    padded_to: int = 1


FORMS = {
    # zhengbw0324/LC-Rec: the mean of its 17 templates of the next item, 45 to 65 tokens.
    "lcrec": PromptForm(words=53, separator=2, batch=8),
    # AkaliKong/MiniOneRec: its one template, and a line end.
    "minionerec": PromptForm(words=80, separator=2, batch=4, padded_to=8),
}


@dataclass(frozen=True)
class Spec:
    """What one process measures: the side of a comparison."""

    side: str
    model: str
    precision: Precision
    threads: int
    steps: int
    batch: int
    # A data set in LC-Rec's form and its index; None: drawn items and histories.
    data: str | None = None
    index: str | None = None
    # Tokens of a prompt, without the item that is generated; 0: plain sequences, all targets.
    prompt: int = 0
    # One of FORMS, for prompts that hold the data's histories.
    form: str | None = None
    # The longest of the prompts has `prompt` tokens, the others down to a third of them.
    ragged: bool = False
    packs: bool = True
    recompute: bool = False
    micro_batch_tokens: int | None = None
    trainable: Trainable = "lora+new_rows"


def drawn_histories(rng: np.random.Generator) -> InteractionDataset:
    # The last two items of a user are no training items.
    lengths = 2 + np.clip(rng.geometric(1 / (MEAN_ITEMS - 2), USERS) + 2, 2, LONGEST)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    items = rng.integers(0, ITEMS, offsets[-1]).astype(np.int32)
    return InteractionDataset(items, offsets, NumberedIds(USERS), NumberedIds(ITEMS))


def given_data(path: str, index: str | None) -> tuple[InteractionDataset, IndexFile]:
    """A data set in LC-Rec's form, and the codes of its items."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(DataConfig(format="lcrec", path=path), Path(folder) / "data")
        dataset = load_dataset(Path(folder) / "data")
        if index is None:
            # A folder may have other indices beside the data set's own.
            (interactions,) = Path(path).glob("*.inter.json")
            index = str(interactions).removesuffix(".inter.json") + ".index.json"
        return dataset, read_index(index, dataset.item_ids)


class Drawn:
    """Items whose codes stand behind the model's own tokens, and histories: given ones,
    or drawn.
    """

    def __init__(self, spec: Spec) -> None:
        rng = np.random.default_rng(0)
        if spec.data is None:
            codes, sizes = rng.integers(0, CODES, (ITEMS, LEVELS)), [CODES] * LEVELS
            self.dataset = drawn_histories(rng)
        else:
            self.dataset, index = given_data(spec.data, spec.index)
            codes, sizes = index.codes, index.level_sizes
        rows = read_config(spec.model).vocab_size
        vocabulary = Vocabulary.added_to(rows, rows, sum(sizes), 0)
        self.catalogue = make_catalogue(codes, sizes, vocabulary=vocabulary)
        self.trie = Trie(self.catalogue)

    def prompts(self, spec: Spec) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Batches of (the tokens of each prompt and its item, the items)."""
        rng = np.random.default_rng(1)
        if spec.form is not None:
            yield from self.prompts_of_histories(FORMS[spec.form], spec.batch, rng)
        while True:
            items = rng.integers(0, self.dataset.num_items, spec.batch)
            shortest = spec.prompt // 3 if spec.ragged else spec.prompt
            lengths = rng.integers(shortest, spec.prompt + 1, spec.batch)
            words = self.catalogue.vocabulary.base_size
            codes = self.catalogue.item_tokens(items)
            yield (
                [
                    np.append(rng.integers(0, words, n), row)
                    for n, row in zip(lengths, codes, strict=True)
                ],
                items,
            )

    def prompts_of_histories(
        self, form: PromptForm, batch: int, rng: np.random.Generator
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Batches of one target a prompt, the data's targets in random order."""
        windows, dataset = training_windows(self.dataset, LONGEST, "last"), self.dataset
        words = self.catalogue.vocabulary.base_size
        while True:
            slices = windows.slices(rng.integers(0, len(windows), batch))
            begins = dataset.offsets[slices.user]
            targets = dataset.items[begins + slices.target]
            prompts = []
            for begin, start, target in zip(begins, slices.start, slices.target, strict=True):
                history = self.catalogue.item_tokens(dataset.items[begin + start : begin + target])
                between = rng.integers(0, words, (len(history), form.separator))
                listed = np.concatenate([history, between], axis=1).ravel()
                wording = rng.integers(0, words, form.words)
                prompts.append(np.concatenate([wording, listed[: len(listed) - form.separator]]))
            codes = self.catalogue.item_tokens(targets)
            yield [np.append(*both) for both in zip(prompts, codes, strict=True)], targets

    def batch(self, sequences: list[np.ndarray], items: np.ndarray, step_rows: int) -> Batch:
        """A batch of one target a prompt, in the form of `BatchMaker`."""
        lengths = np.array([len(sequence) - 1 for sequence in sequences])
        tokens = np.zeros((len(sequences), lengths.max()), np.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence) - 1] = sequence[:-1]
        ends = np.arange(len(tokens)) * tokens.shape[1] + lengths
        rows = ItemRows.of(self.catalogue, self.trie, items)
        return Batch(
            tokens=torch.from_numpy(tokens),
            rows=torch.from_numpy((ends[:, None] + np.arange(-LEVELS, 0)).ravel()),
            targets=rows.targets,
            candidate_indptr=rows.indptr,
            candidate_tokens=rows.tokens,
            reward_mask=None,
            grid_index=None,
            users=np.zeros(len(items), np.int64),
            positions=np.zeros(len(items), np.int64),
            step_rows=step_rows,
            num_tokens=int(lengths.sum()),
            groups=None,
        )

    def steps(self, spec: Spec) -> Iterator[list[Batch]]:
        """The micro-batches of each step, of prompts or plain sequences."""
        budget = spec.micro_batch_tokens
        if spec.prompt or spec.form is not None:
            for sequences, items in self.prompts(spec):
                tokens, rows = np.array([len(s) - 1 for s in sequences]), len(items) * LEVELS
                parts = [np.arange(len(items))]
                if budget is not None:
                    parts = within_budget(tokens, budget, packs=True)
                yield [self.batch([sequences[n] for n in p], items[p], rows) for p in parts]
        windows = training_windows(self.dataset, LONGEST, "all")
        maker = BatchMaker(self.dataset, self.catalogue, self.trie, windows)
        order, parallel = StepOrder(windows, spec.batch, 100, seed=0), initialize_parallel(1, "cpu")
        for step in range(order.total_steps):
            plan = micro_batch_plan(order, maker, step, step + 1, 1, parallel, budget)
            yield [maker.make(planned.sample_ids, planned.step_rows) for planned in plan]


def open_backbone(spec: Spec, drawn: Drawn) -> Backbone:
    added = drawn.catalogue.vocabulary.added_tokens
    backbone = build_pretrained(
        BackboneConfig(from_=spec.model),
        read_config(spec.model),
        drawn.catalogue.vocab_size,
        spec.prompt + LEVELS,
        spec.precision,
        seed=0,
    )
    load_pretrained(backbone, spec.model, NewRows(*added))
    if spec.trainable != "full":
        train_partially(backbone, spec.trainable, LoraConfig(), spec.model, added, 0)
    backbone.packs, backbone.recompute = spec.packs, spec.recompute
    return backbone


def training_step(spec: Spec, drawn: Drawn, method: str) -> Callable[[], int]:
    """The product's training path. A step returns the number of its targets."""
    parallel = initialize_parallel(1, "cpu")
    config = TrainConfig(learning_rate=1e-5, trainable=spec.trainable, precision=spec.precision)
    # Rewards come from another model, whose cost benchmarks/rewards.py measures.
    section = get_method(method).objective(ObjectiveConfig(crr_lambda=0.0))
    module = ilrec.CrossLayerObjective.build(
        open_backbone(spec, drawn), section, drawn.catalogue, parallel
    )
    engine, steps = build_engine(module.train(), config, parallel), drawn.steps(spec)

    def step() -> int:
        micro_batches = next(steps)
        for batch in micro_batches:
            engine.set_gradient_accumulation_boundary(batch is micro_batches[-1])
            inputs = batch.model_inputs(parallel.device)
            output = engine(*inputs, rewards=None, loss_scale=1 / batch.step_rows)
            engine.backward(output.loss)
            engine.step()
        return sum(len(batch.users) for batch in micro_batches)

    return step


def timed(steps: dict[str, Callable[[], int]], count: int) -> Samples:
    """CPU seconds by unit of `count` rounds of the steps, after one that warms up."""
    seconds: Samples = {name: [] for name in steps}
    for repeat in range(count + 1):
        for name, step in steps.items():
            begin = time.process_time()
            units = step()
            if repeat:
                seconds[name].append((time.process_time() - begin) / units)
    return seconds


def train_ours(spec: Spec, drawn: Drawn) -> Samples:
    step = training_step(spec, drawn, "sft")
    targets: list[float] = []

    def counted() -> int:
        count = step()
        targets.append(count)
        return count

    return timed({"cpu_s": counted}, spec.steps) | {"targets": targets[1:]}


def train_both_methods(spec: Spec, drawn: Drawn) -> Samples:
    """SFT's and ILRec's steps by turns, and what the loss takes of ILRec's."""
    sft, step = (training_step(spec, drawn, method) for method in ("sft", "ilrec"))
    in_loss = 0.0

    def timed_loss(*arguments: Any, **named: Any) -> Any:
        # The gradients are made in the forward call.
        nonlocal in_loss
        begin = time.process_time()
        output = cross_layer_loss(*arguments, **named)
        in_loss += time.process_time() - begin
        return output

    shares = []

    def ilrec_step() -> int:
        nonlocal in_loss
        in_loss, begin = 0.0, time.process_time()
        with patch.object(ilrec, "cross_layer_loss", timed_loss):
            units = step()
        shares.append(in_loss / (time.process_time() - begin))
        return units

    figures = timed({"sft_cpu_s": sft, "ilrec_cpu_s": ilrec_step}, 2 * spec.steps)
    return figures | {"loss_share": shares[1:]}


def operator(spec: Spec, drawn: Drawn) -> Samples:
    """The loss alone on rows of the model's own shape, and its bare products."""
    catalogue, generator = drawn.catalogue, torch.Generator().manual_seed(0)
    d, (first, last) = read_config(spec.model).config.hidden_size, catalogue.vocabulary.added_tokens
    items = np.random.default_rng(2).integers(0, drawn.dataset.num_items, OPERATOR_ROWS // LEVELS)
    rows = ItemRows.of(catalogue, drawn.trie, items)
    lists = TokenLists(rows.indptr, rows.tokens)
    steps: dict[str, Callable[[], int]] = {}

    def add(name: str, dtype: torch.dtype, streams: int, options: LossOptions) -> None:
        hidden = [
            torch.randn(OPERATOR_ROWS, d, generator=generator).to(dtype).requires_grad_()
            for _ in range(streams)
        ]
        head = 0.02 * torch.randn(catalogue.vocab_size, d, generator=generator)
        head = head.to(dtype).requires_grad_()

        def loss() -> int:
            output = cross_layer_loss(
                hidden[0], hidden[1:], head, rows.targets, lists, None, options, loss_scale=1e-3
            )
            torch.autograd.backward(output.loss)
            return 1

        def products() -> int:
            with torch.no_grad():
                logits = hidden[0] @ head.T
                logits @ head, logits.T @ hidden[0]
            return 1

        steps[f"{name}_cpu_s"] = loss
        if streams == 1:
            steps[f"products_{name}_cpu_s"] = products

    for name, dtype in DTYPES.items():
        plain = LossOptions(vocab_size=catalogue.vocab_size, beta=0.0, mu=0.0, crr_lambda=0.0)
        full = LossOptions(
            vocab_size=catalogue.vocab_size, mu=0.1, crr_lambda=0.0, item_tokens=(first, last)
        )
        add(f"sft_{name}", dtype, 1, plain)
        add(f"ilrec_{name}", dtype, 4, full)
    return timed(steps, spec.steps)


def train_peft(spec: Spec, drawn: Drawn) -> Samples:
    """Hugging Face's Trainer with PEFT: the prompts' target tokens are the labels."""
    # Loaded in this process alone.
    import peft
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=DTYPES[spec.precision])
    model.resize_token_embeddings(drawn.catalogue.vocab_size, mean_resizing=False)
    lora = LoraConfig()
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            target_modules=list(lora.target_modules),
            trainable_token_indices=list(range(*drawn.catalogue.vocabulary.added_tokens)),
            task_type="CAUSAL_LM",
        ),
    )
    prompts, samples = drawn.prompts(spec), []
    for _ in range(spec.steps + 1):
        for row in map(torch.from_numpy, next(prompts)[0]):
            labels = torch.full_like(row, -100)
            labels[-LEVELS:] = row[-LEVELS:]
            samples.append({"input_ids": row, "labels": labels})
    multiple = 1 if spec.form is None else FORMS[spec.form].padded_to

    def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Each row padded to the longest, as a collator of transformers does."""
        longest = max(len(row["input_ids"]) for row in rows)
        longest += -longest % multiple
        batch = {
            name: torch.full((len(rows), longest), fill)
            for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
        }
        for number, row in enumerate(rows):
            for name, values in row.items():
                batch[name][number, : len(values)] = values
            batch["attention_mask"][number, : len(row["input_ids"])] = 1
        return batch

    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append((time.process_time() - self.begin) / spec.batch)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec.batch,
            max_steps=spec.steps + 1,
            learning_rate=1e-5,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(
            adapted, arguments, data_collator=padded, train_dataset=samples, callbacks=[Clock()]
        ).train()
    return {"cpu_s": seconds[1:], "targets": [spec.batch] * (len(seconds) - 1)}


def beams_ours(spec: Spec, drawn: Drawn) -> Samples:
    initialize_parallel(1, "cpu")
    backbone, constraint = open_backbone(spec, drawn).eval(), TrieConstraint(drawn.trie)
    prompts, vocab_size = drawn.prompts(spec), drawn.catalogue.vocab_size

    def step() -> int:
        tokens = torch.from_numpy(np.stack(next(prompts)[0])[:, : spec.prompt].copy())
        read = read_prefixes(backbone, Prefixes(tokens))
        beam_search(backbone, constraint, read, vocab_size=vocab_size, beam=BEAM)
        return len(tokens)

    return timed({"cpu_s": step}, spec.steps)


def beams_generate(spec: Spec, drawn: Drawn) -> Samples:
    # Loaded in this process alone.
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[spec.precision]
    model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype)
    model.eval().resize_token_embeddings(drawn.catalogue.vocab_size, mean_resizing=False)
    prompts = drawn.prompts(spec)
    with tempfile.TemporaryDirectory() as folder:
        write_item_files(Path(folder), drawn.dataset, drawn.catalogue, drawn.trie, Decoding())
        trie = ItemTrie(folder)

    def step() -> int:
        tokens = torch.from_numpy(np.stack(next(prompts)[0])[:, : spec.prompt].copy())
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=BEAM,
            num_return_sequences=BEAM,
            max_new_tokens=LEVELS,
            do_sample=False,
            length_penalty=0.0,
            pad_token_id=0,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(trie, spec.prompt),
        )
        return len(tokens)

    return timed({"cpu_s": step}, spec.steps)


SIDES: dict[str, Callable[[Spec, Drawn], Samples]] = {
    "ours": train_ours,
    "peft": train_peft,
    "methods": train_both_methods,
    "operator": operator,
    "our beams": beams_ours,
    "generate": beams_generate,
}
