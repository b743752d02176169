"""`ilrec plan`: numbers before anything starts,
and a refusal that names the nearest that fits.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ilrec_dist.cli.main import main
from ilrec_dist.config.load import load_config
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.plan import Plan, make_plan
from ilrec_dist.plan.workload import DataSizes
from tests.support.hf_shapes import LLAMA_8B, write_shape


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An 8B model of which only config.json is there."""
    tree = {
        "runs_dir": str(tmp_path / "runs"),
        "data": {"format": "csv", "path": "data.csv"},
        "items": {"levels": 4},
        "backbone": {"from": write_shape(tmp_path / "model", LLAMA_8B)},
        "train": {"batch_size": 256, "precision": "bf16"},
        "launch": {"tp": 8},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def plan(config: Path, *arguments: str) -> int:
    gpus = ["--nodes", "4", "--gpus-per-node", "8", "--gpu-memory", "80GiB"]
    return main(["plan", str(config), *gpus, *arguments])


def test_a_plan_that_fits_is_printed_and_nothing_is_written(config, capsys):
    assert plan(config) == 0
    text = capsys.readouterr().out
    # 4 × 256 new tokens of 4,096 numbers each, in embedding and head.
    assert re.search(r"all +8,038,649,856 ", text)
    assert "tp 8 × dp 4" in text and "129,280 rows, 1,024 of them item tokens" in text
    assert "dp 4: gradients, all-reduce" in text and "tp 8: activations, forward" in text
    assert "size of the data is not known yet" in text
    assert re.search(r"tokens/s, .* a GPU, MFU \d+\.\d %", text)
    assert not (config.parent / "runs").exists()


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(config, capsys):
    small = ["--gpu-memory", "60GiB"]
    assert plan(config, "launch.tp=1", *small) == 2
    error = capsys.readouterr().err
    found = re.search(
        r"it does not fit: a GPU needs ([\d.]+) GiB of 60.0 GiB, most of it .*; append (.*), the "
        r"nearest that fits: ([\d.]+) GiB, and ([\d.]+) s a step in place of ([\d.]+)\n",
        error,
    )
    assert found is not None, error
    assert found[2] == "train.zero_stage=2"
    assert float(found[1]) > 60 > float(found[3])
    # The command with what is appended is that plan, and it fits.
    assert plan(config, "launch.tp=1", *small, *found[2].split()) == 0
    totals = re.findall(r"  all +([\d.]+) GiB", capsys.readouterr().out)
    assert max(totals, key=float) == found[3]


def test_more_nodes_are_appended_as_well(config, capsys):
    assert plan(config, "launch.tp=8", "--nodes", "1", "--gpu-memory", "20GiB") == 2
    found = re.search(r"append (--nodes .*), the nearest", capsys.readouterr().err)
    assert found is not None
    words = found[1].split()
    assert plan(config, "launch.tp=8", "--nodes", "1", "--gpu-memory", "20GiB", *words) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "80"], "--gpu-memory: expected a positive number with its unit"),
        (["--interconnect", "0Gb/s"], "--interconnect: expected a positive number"),
        (["launch.tp=3"], "launch.tp"),
        (["--gpus-per-node", "4"], "tp does not divide --gpus-per-node 4"),
        (["train.batch_size=102"], "train.batch_size"),
        (["train.zero_stage=4"], "key 'train.zero_stage': input should be 1, 2 or 3"),
        (["items.form=atomic", "items.levels=3"], "--items N"),
        (["--host-memory", "512"], "--host-memory: expected a positive number with its unit"),
        (["--host-memory", "512GiB"], "--host-memory: the size of the data, from which"),
        (["--nodes", "0"], "--nodes: expected at least 1"),
        (["--users", "0"], "--users 0: expected at least 1"),
    ],
)
def test_impossible_plans_are_one_line(config, capsys, arguments, message):
    assert plan(config, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["train.recompute", "launch.sequence_parallel"])
def test_activations_are_told_for_both_values_of_a_key(config, capsys, key):
    assert plan(config) == 0
    kept = capsys.readouterr().out
    assert plan(config, f"{key}=true") == 0
    saved = capsys.readouterr().out
    for text, other, value in ((kept, saved, "true"), (saved, kept, "false")):
        memory = other.split("memory of a GPU in training")[1]
        activations = re.search(r"activations +([\d.]+ .iB)", memory)
        total = re.search(r"  all +([\d.]+ .iB)", memory)
        assert activations is not None and total is not None
        assert f"with {key}={value}: activations {activations[1]}, all {total[1]}" in text


def test_sequence_parallelism_is_no_alternative_without_tensor_parallelism(config, capsys):
    plan(config, "launch.tp=1")
    text = capsys.readouterr().out
    assert "with train.recompute=true" in text and "sequence_parallel" not in text


def test_zero_2_and_3_sum_the_gradients_at_every_micro_batch(config):
    gpus = Hardware(4, 8, 80e9, 5e10, 4.5e11, 6e14, 9.9e14, 3.3e12, 2e9)

    def planned(stage: int, steps: int) -> Plan:
        keys = [f"train.zero_stage={stage}", f"train.accumulation_steps={steps}"]
        return make_plan(load_config(config, [*keys, "launch.workers=32"]), gpus, DataSizes())

    def sent(plan: Plan, what: str = "gradients") -> int:
        return sum(one.bytes for one in plan.collectives if one.what == what)

    assert sent(planned(1, 1)) == sent(planned(1, 4)) == sent(planned(2, 1))
    cut, cut_four = planned(3, 1), planned(3, 4)
    assert sent(planned(2, 4)) == 4 * sent(planned(2, 1)) and sent(cut_four) == 4 * sent(cut)
    # ZeRO 3 gathers the layers for every micro-batch, and the other weights for the step.
    layers, others = "layers' weights", "weights outside of layers"
    assert sent(cut_four, layers) == 4 * sent(cut, layers) > 0
    assert sent(cut_four, others) == sent(cut, others) > 0
    # Which saves memory in training; for the validation all weights are there as well.
    zero_2 = planned(2, 1)
    assert sum(cut.training.values()) < sum(zero_2.training.values())
    whole = cut.validation["gathered weights"]
    assert whole == pytest.approx(zero_2.validation["weights"], rel=0.01)
    assert cut.validation["weights"] == pytest.approx(whole / cut.layout.dp)


def test_a_damaged_tokenizer_is_one_line(config, capsys):
    path = config.parent / "model" / "tokenizer.json"
    path.write_text('{"model": ')
    assert plan(config) == 2
    error = capsys.readouterr().err
    assert f"{path}: not a tokenizer.json (backbone.from)" in error and error.count("\n") == 1


def test_adapters_leave_the_state_of_frozen_weights_out(config, capsys):
    assert plan(config, "train.trainable=lora+new_rows", "train.lora.rank=16") == 0
    text = capsys.readouterr().out
    # 16 × (in + out) of the seven maps of 32 layers, and 2 × 1,024 rows of 4,096 numbers.
    adapters = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    rows = 2 * 1024 * 4096
    assert re.search(rf"adapters +{adapters:,} ", text)
    assert re.search(rf"added rows +{rows:,} ", text)
    assert re.search(rf"all +{8_038_649_856 + adapters + rows:,} ", text)
    assert re.search(rf"trained +{adapters + rows:,} ", text)
    assert "tp 8: adapters, backward, all-reduce" in text
    assert "adapters and added rows as best and final" in text


def test_a_budget_of_tokens_is_what_the_activations_are_of(config, capsys):
    """A data-parallel rank has 32 sequences of 83 tokens, of which 16 fit in 1,400."""
    assert plan(config, "train.micro_batch_tokens=1400", "launch.tp=4") == 0
    assert "a micro-batch: 1,400 tokens, packed" in capsys.readouterr().out
    gpus = Hardware(4, 8, 80e9, 5e10, 4.5e11, 6e14, 9.9e14, 3.3e12, 2e9)
    found = []
    for budget in (1400, 5000):
        keys = [f"train.micro_batch_tokens={budget}", "launch.tp=4", "launch.workers=32"]
        found.append(make_plan(load_config(config, keys), gpus, DataSizes()))
    few, many = found
    assert (few.batch.tokens, few.layout.accumulation_steps) == (1400, 2)
    assert (many.batch.tokens, many.layout.accumulation_steps) == (32 * 83, 1)
    activations = [one.training["activations"] for one in found]
    assert activations[1] == pytest.approx(activations[0] * 32 * 83 / 1400)
    assert few.tokens_per_step == many.tokens_per_step == 256 * 83


def test_sizes_of_the_data_give_the_memory_of_the_host(config, capsys):
    sizes = ["--items", "1000000", "--users", "5000000", "--interactions", "60000000"]
    assert plan(config, *sizes) == 0
    text = capsys.readouterr().out
    # 4 bytes an interaction and 8 a user.
    assert re.search(r"mapped histories +267\.0 MiB", text)
    assert "copy of a file of best or final, each worker" in text
    total = re.search(r"host, libraries left out.*?  all +([\d.]+) GiB", text, re.DOTALL)
    assert total is not None
    # What is there is compared with it.
    assert plan(config, *sizes, "--host-memory", f"{float(total[1]) + 0.1}GiB") == 0
    capsys.readouterr()
    assert plan(config, *sizes, "--host-memory", f"{float(total[1]) - 0.1}GiB") == 2
    error = capsys.readouterr().err
    assert f"a node's host needs {total[1]} GiB of " in error and error.count("\n") == 1
    assert "most of it copy of a checkpoint's part, each worker" in error


def test_a_flat_index_is_counted_where_it_lies(config, capsys):
    flat, items = "cf.reward_index=flat", ["--items", "10000000"]
    assert plan(config, flat) == 0
    assert "without their flat index (cf.reward_index): give --items" in capsys.readouterr().out
    assert plan(config, flat, *items) == 0
    text = capsys.readouterr().out
    # Of two folds, 4 bytes of each of 64 numbers; in training and in validation.
    assert len(re.findall(r"rewards: flat index +4\.8 GiB\n", text)) == 2
    assert "without their flat index" not in text
    assert plan(config, flat, "--items", "200000000") == 2
    error = capsys.readouterr().err
    assert "most of it rewards: flat index (95.4 GiB)" in error
    assert error.endswith("or larger GPUs, or set cf.rewards=actor\n")
    assert plan(config, flat, "--items", "200000000", "cf.rewards=actor") == 0
    assert "flat index" not in capsys.readouterr().out


def test_sizes_that_the_prepared_data_do_not_have_are_refused(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    data = {"synthetic": {"users": 40, "items": 30}}
    launch = {"tp": 1, "workers": 1}
    path.write_text(yaml.safe_dump({"runs_dir": str(tmp_path), "data": data, "launch": launch}))
    assert main(["prepare", str(path)]) == 0
    assert plan(path, "--users", "40") == 0
    capsys.readouterr()
    assert plan(path, "--users", "41") == 2
    error = capsys.readouterr().err
    assert "--users 41: has no effect" in error and "have 40" in error and error.count("\n") == 1
