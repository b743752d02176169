"""What does training and serving a language model cost, beside Hugging Face's Trainer and PEFT?

    python benchmarks/llm.py [--quick] [--json FILE] [--model FOLDER] [--precision bf16]

The model has SmolLM2-135M's shape, with random weights unless --model names a folder; the items
have 4 × 256 codes, and the histories are drawn. Every side of a comparison runs in a process of
its own, the sides by turns, and its figures are medians over steps, in CPU seconds (of all
threads), so that other work on the machine counts little. Memory is the kernel's peak of the
whole process. The comparisons:

- targets: `train.targets: all` over plain sequences against PEFT on prompts of one target, which
  is what LC-Rec and MiniOneRec train on;
- like for like: the same prompts and samples on both sides, LoRA of rank 16 and new rows;
- beams: constrained beam search against `generate` with the trie as prefix_allowed_tokens_fn;
- ILRec's step against SFT's;
- the peak memory of full fine-tuning.

Hugging Face's sides need peft and accelerate (pip install --no-deps peft accelerate); without
them they are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    NumberedIds,
    command_line,
    describe_machine,
    in_own_process,
    machine_line,
    peak_mib,
    write_figures,
)

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.process_groups import ParallelState, initialize_parallel
from ilrec_dist.export.constrained_decoding import ItemTrie, prefix_allowed_tokens_fn
from ilrec_dist.export.hf_model import write_item_files
from ilrec_dist.inference.beam_search import beam_search
from ilrec_dist.inference.inputs import Prefixes
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import Vocabulary
from ilrec_dist.launch.device import quiet
from ilrec_dist.model.build import build_pretrained, load_pretrained
from ilrec_dist.model.config import BackboneConfig, LoraConfig, Trainable
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import read_config
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.partial import train_partially
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.objective.registry import get_method
from ilrec_dist.samples.collate import Batch, BatchMaker
from ilrec_dist.samples.windows import StepOrder, training_windows
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import build_engine

LEVELS, CODES, ITEMS = 4, 256, 5000
# A user's items that are trained on: 7 of 4 tokens each are the 28 tokens of a usual history.
USERS, MEAN_ITEMS, LONGEST = 512, 8, 20
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
BEAM = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """What one process measures."""

    side: str
    model: str
    precision: str
    threads: int
    steps: int
    batch: int
    # Tokens of a prompt, without the item that is generated.
    prompt: int = 0
    trainable: Trainable = "lora+new_rows"


@dataclass(frozen=True)
class Drawn:
    """Items with random codes behind the model's own tokens, and random histories of them."""

    catalogue: Catalogue
    trie: Trie
    dataset: InteractionDataset

    @staticmethod
    def make(model: str) -> Drawn:
        rng = np.random.default_rng(0)
        rows = read_config(model).vocab_size
        vocabulary = Vocabulary.added_to(rows, rows, LEVELS * CODES, 0)
        codes = rng.integers(0, CODES, (ITEMS, LEVELS))
        catalogue = make_catalogue(codes, [CODES] * LEVELS, vocabulary=vocabulary)
        # The last two items of a user are no training items.
        lengths = 2 + np.clip(rng.geometric(1 / (MEAN_ITEMS - 2), USERS) + 2, 2, LONGEST)
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
        items = rng.integers(0, ITEMS, offsets[-1]).astype(np.int32)
        dataset = InteractionDataset(items, offsets, NumberedIds(USERS), NumberedIds(ITEMS))
        return Drawn(catalogue, Trie(catalogue), dataset)

    def prompts(self, batch: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens int64 [batch, length + 4] that end with a target item, the items)."""
        rng = np.random.default_rng(1)
        while True:
            items = rng.integers(0, ITEMS, batch)
            words = rng.integers(0, self.catalogue.vocabulary.base_size, (batch, length))
            yield np.concatenate([words, self.catalogue.item_tokens(items)], axis=1), items


@dataclass(frozen=True)
class PromptBatches:
    """Batches of one target a prompt, in the form of `BatchMaker`."""

    drawn: Drawn
    tokens: Iterator[tuple[np.ndarray, np.ndarray]]

    def make(self) -> Batch:
        tokens, items = next(self.tokens)
        count, width = len(tokens), tokens.shape[1] - 1
        indptr, candidates = self.drawn.trie.target_candidates(items)
        last = np.arange(width - LEVELS, width)
        rows = (np.arange(count)[:, None] * width + last).ravel()
        return Batch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            rows=torch.from_numpy(rows),
            targets=torch.from_numpy(tokens[:, -LEVELS:].ravel().copy()),
            candidate_indptr=torch.from_numpy(np.asarray(indptr, np.int64)),
            candidate_tokens=torch.from_numpy(np.asarray(candidates, np.int64)),
            reward_mask=None,
            grid_index=None,
            users=np.zeros(count, np.int64),
            positions=np.zeros(count, np.int64),
            step_rows=count * LEVELS,
            num_tokens=tokens[:, :-1].size,
            groups=None,
        )


def open_backbone(spec: Spec, drawn: Drawn) -> Backbone:
    added = drawn.catalogue.vocabulary.added_tokens
    backbone = build_pretrained(
        BackboneConfig(from_=spec.model),
        read_config(spec.model),
        drawn.catalogue.vocab_size,
        spec.prompt + LEVELS,
        "bf16" if spec.precision == "bf16" else "fp32",
        seed=0,
    )
    load_pretrained(backbone, spec.model, NewRows(*added))
    if spec.trainable != "full":
        train_partially(backbone, spec.trainable, LoraConfig(), spec.model, added, 0)
    return backbone


class OurTraining:
    """Steps of the product's training path: batches, objective, engine."""

    def __init__(self, spec: Spec, drawn: Drawn, method: str, parallel: ParallelState) -> None:
        config = TrainConfig(
            batch_size=spec.batch,
            learning_rate=1e-5,
            trainable=spec.trainable,
            precision="bf16" if spec.precision == "bf16" else "fp32",
        )
        # Rewards come from another model, whose cost benchmarks/rewards.py measures.
        section = ObjectiveConfig(crr_lambda=0.0)
        objective = get_method(method).objective(section)
        backbone = open_backbone(spec, drawn)
        backbone.packs = True
        module = CrossLayerObjective.build(backbone, objective, drawn.catalogue, parallel)
        self.engine, self.parallel = build_engine(module, config, parallel), parallel
        module.train()
        if spec.prompt:
            self.batches = PromptBatches(drawn, drawn.prompts(spec.batch, spec.prompt)).make
        else:
            windows = training_windows(drawn.dataset, LONGEST, "all")
            maker = BatchMaker(drawn.dataset, drawn.catalogue, drawn.trie, windows)
            order = StepOrder(windows, spec.batch, 100, seed=0)
            parts = iter(range(order.total_steps))

            def make() -> Batch:
                ids = order.sample_ids(next(parts))
                return maker.make(ids, maker.num_rows(ids))

            self.batches = make

    def step(self) -> int:
        """One optimizer step; the number of its targets."""
        batch = self.batches()
        output = self.engine(
            *batch.model_inputs(self.parallel.device),
            rewards=None,
            loss_scale=1 / batch.step_rows,
        )
        self.engine.backward(output.loss)
        self.engine.step()
        return len(batch.users)


def measured(step: Callable[[], int], count: int) -> dict[str, Any]:
    """CPU seconds by unit of `count` steps after one that warms up, and the process's peak."""
    step()
    seconds, wall = [], []
    for _ in range(count):
        cpu, started = time.process_time(), time.perf_counter()
        units = step()
        seconds.append((time.process_time() - cpu) / units)
        wall.append((time.perf_counter() - started) / units)
    return {"cpu_s": seconds, "wall_s": wall, "peak_mib": peak_mib()}


def train_ours(spec: Spec, drawn: Drawn) -> dict[str, Any]:
    training = OurTraining(spec, drawn, "sft", initialize_parallel(1, "cpu"))
    return measured(training.step, spec.steps)


def both_methods(spec: Spec, drawn: Drawn) -> dict[str, Any]:
    """SFT's and ILRec's steps by turns, in one process."""
    parallel = initialize_parallel(1, "cpu")
    figures = {
        method: OurTraining(spec, drawn, method, parallel).step for method in ("sft", "ilrec")
    }
    seconds: dict[str, list[float]] = {method: [] for method in figures}
    for turn in range(spec.steps + 1):
        for method, step in figures.items():
            cpu = time.process_time()
            units = step()
            if turn:
                seconds[method].append((time.process_time() - cpu) / units)
    return {"seconds": seconds}


def train_peft(spec: Spec, drawn: Drawn) -> dict[str, Any]:
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
    steps = spec.steps + 1
    samples = []
    prompts = drawn.prompts(spec.batch, spec.prompt)
    for _ in range(steps):
        for row in torch.from_numpy(next(prompts)[0]):
            labels = torch.full_like(row, -100)
            labels[-LEVELS:] = row[-LEVELS:]
            samples.append({"input_ids": row, "labels": labels})
    seconds: list[float] = []
    wall: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.cpu, self.started = time.process_time(), time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append((time.process_time() - self.cpu) / spec.batch)
            wall.append((time.perf_counter() - self.started) / spec.batch)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec.batch,
            max_steps=steps,
            learning_rate=1e-5,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(adapted, arguments, train_dataset=samples, callbacks=[Clock()]).train()
    return {"cpu_s": seconds[1:], "wall_s": wall[1:], "peak_mib": peak_mib()}


def beams_ours(spec: Spec, drawn: Drawn) -> dict[str, Any]:
    initialize_parallel(1, "cpu")
    backbone = open_backbone(spec, drawn).eval()
    constraint, prompts = TrieConstraint(drawn.trie), drawn.prompts(spec.batch, spec.prompt)

    def step() -> int:
        tokens = torch.from_numpy(next(prompts)[0][:, : spec.prompt].copy())
        vocab_size = drawn.catalogue.vocab_size
        beam_search(backbone, constraint, Prefixes(tokens), vocab_size=vocab_size, beam=BEAM)
        return len(tokens)

    return measured(step, spec.steps)


def beams_generate(spec: Spec, drawn: Drawn) -> dict[str, Any]:
    # Loaded in this process alone.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=DTYPES[spec.precision]).eval()
    model.resize_token_embeddings(drawn.catalogue.vocab_size, mean_resizing=False)
    prompts = drawn.prompts(spec.batch, spec.prompt)
    with tempfile.TemporaryDirectory() as folder:
        write_item_files(Path(folder), drawn.dataset, drawn.catalogue, drawn.trie)
        trie = ItemTrie(folder)

    def step() -> int:
        tokens = torch.from_numpy(next(prompts)[0][:, : spec.prompt].copy())
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

    return measured(step, spec.steps)


SIDES = {
    "ours": train_ours,
    "peft": train_peft,
    "methods": both_methods,
    "our beams": beams_ours,
    "generate": beams_generate,
}


def run_side(spec: Spec, **changes: Any) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = json.dumps(vars(spec) | changes)
    return in_own_process(__file__, "--side", words, threads=spec.threads)


def compare(
    spec: Spec, rounds: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """Both sides by turns; medians of all steps."""
    figures: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, changes in (("ours", ours), ("theirs", theirs)):
            found = run_side(spec, **changes)
            side = figures.setdefault(name, {"cpu_s": [], "wall_s": [], "peak_mib": []})
            side["cpu_s"] += found["cpu_s"]
            side["wall_s"] += found["wall_s"]
            side["peak_mib"].append(found["peak_mib"])
    row = {
        f"{name}_{key}": statistics.median(values)
        for name, side in figures.items()
        for key, values in side.items()
    }
    row["times"] = row["theirs_cpu_s"] / row["ours_cpu_s"]
    row["memory_share"] = row["ours_peak_mib"] / row["theirs_peak_mib"]
    return row


def show(name: str, unit: str, row: dict[str, Any]) -> None:
    print(
        f"{name:<52}{row['ours_cpu_s']:>9.3f}{row['theirs_cpu_s']:>9.3f} CPU s a {unit:<7}"
        f"{row['times']:>7.2f} ×{row['ours_peak_mib'] / 1024:>8.2f}"
        f"{row['theirs_peak_mib'] / 1024:>7.2f} GiB{row['memory_share']:>6.2f} ×",
        flush=True,
    )


def write_random_model(folder: Path, layers: int) -> Path:
    # Loaded where no --model is given.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = SMOLLM2 | {"num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


def all_comparisons(spec: Spec, quick: bool) -> list[dict[str, Any]]:
    rounds, rows = (1 if quick else 3), []

    def add(name: str, unit: str, row: dict[str, Any]) -> None:
        rows.append({"name": name} | row)
        show(name, unit, row)

    one_target = {"side": "peft", "batch": 8}
    if all(importlib.util.find_spec(package) for package in ("peft", "accelerate")):
        for prompt in (54,) if quick else (54, 104):
            add(
                f"targets: all against PEFT's prompts of {prompt} tokens",
                "target",
                compare(spec, rounds, {}, one_target | {"prompt": prompt - LEVELS}),
            )
            same = {"batch": 8, "prompt": prompt - LEVELS}
            add(
                f"like for like, prompts of {prompt} tokens",
                "sample",
                compare(spec, rounds, same, same | {"side": "peft"}),
            )
    else:
        print("peft or accelerate is not installed: Hugging Face's trainings are left out")
    for prompt in (100,) if quick else (100, 300):
        found = compare(
            spec,
            1 if quick else 2,
            {"side": "our beams", "prompt": prompt, "batch": 8, "trainable": "full"},
            {"side": "generate", "prompt": prompt, "batch": 1},
        )
        add(f"{BEAM} beams after prompts of {prompt} tokens", "user", found)
    seconds = run_side(spec, side="methods", steps=2 * spec.steps)["seconds"]
    medians = {method: statistics.median(taken) for method, taken in seconds.items()}
    ratio = medians["ilrec"] / medians["sft"]
    rows.append({"name": "ILRec's step over SFT's", "times": ratio} | medians)
    print(f"ILRec's step is {ratio:.3f} × SFT's, {spec.trainable}")
    full = run_side(spec, trainable="full")
    rows.append({"name": "full fine-tuning", "peak_mib": full["peak_mib"]})
    print(
        f"full fine-tuning: peak {full['peak_mib'] / 1024:.2f} GiB, "
        f"{statistics.median(full['cpu_s']):.3f} CPU s a target"
    )
    return rows


def main() -> None:
    parser = command_line(__doc__, "a third of the layers, few steps: some minutes on two cores")
    parser.add_argument("--model", type=Path, help="the folder of a Llama (default: random)")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        quiet()
        spec = Spec(**json.loads(arguments.side))
        torch.set_num_threads(spec.threads)
        print(json.dumps(SIDES[spec.side](spec, Drawn.make(spec.model))), flush=True)
        # Interpreter shutdown with live gloo groups can hang.
        os._exit(0)
    machine = describe_machine(precision=arguments.precision, threads=arguments.threads)
    print(machine_line(machine), flush=True)
    with tempfile.TemporaryDirectory(prefix="llm-") as folder:
        layers = SMOLLM2["num_hidden_layers"] // (3 if arguments.quick else 1)
        model = arguments.model or write_random_model(Path(folder), layers)
        steps, batch = (2, 16) if arguments.quick else (4, 32)
        spec = Spec("ours", str(model), arguments.precision, arguments.threads, steps, batch)
        print(f"{'':<52}{'ours':>9}{'theirs':>9}", flush=True)
        rows = all_comparisons(spec, arguments.quick)
    write_figures(arguments.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
