"""LoRA on tensor-parallel layers: as PEFT, the same for every tp, merged, saved and
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model import lora
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights, save_weights
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.peft import load_adapter, read_lora_config
from ilrec_dist.model.lora import LoraConfig, add_lora
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.pretrained import (
    make_pretrained,
    make_tokens,
    needs_peft,
    relative_error,
    transformers_logits,
)
from tests.support.whole_adapters import merge_lora, save_adapter

pytestmark = pytest.mark.slow

STEPS, RATE = 20, 1e-2
ALL = LoraConfig(rank=4, alpha=8.0)
SOME = LoraConfig(rank=3, alpha=6.0, target_modules=["q_proj", "v_proj", "up_proj", "o_proj"])
# With tp 4 some ranks have no rows of it.
QUERY = LoraConfig(rank=2, alpha=2.0, target_modules=["q_proj"])
WEIGHT = torch.linspace(-1, 1, 32)


def loss_of(hidden: torch.Tensor) -> torch.Tensor:
    """A function of the final hidden states [..., 32] whose gradient reaches every
    layer.
    """
    return ((hidden * WEIGHT).sum(-1) - 1).square().mean()


def make_optimizer(parameters) -> torch.optim.Optimizer:
    # A large eps: where a gradient is nearly 0, Adam would otherwise blow the rounding up.
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=RATE, eps=1e-3)


def load_backbone(folder: str) -> Backbone:
    pretrained = read_config(folder)
    model = Backbone(pretrained.config, pretrained.vocab_size, 64, initialize=False)
    load_weights(model, folder)
    return model


def logits_of(model: Backbone) -> torch.Tensor:
    """This rank's logits of the batch."""
    tokens = make_tokens()
    with torch.no_grad():
        hidden = model.eval()(tokens, torch.arange(tokens.numel())).final
        return (hidden @ model.head_weight.t()).view(*tokens.shape, -1)


def train(mesh: Mesh, base: str, start: str | None, config: LoraConfig, out: str) -> dict:
    """Some steps of the adapters from a PEFT folder or a seed; saves them and the
    merged model.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = load_backbone(base)
        if start is None:
            add_lora(model, config, seed=3)
        else:
            load_adapter(model, start)
        before = {name: p.detach().clone() for name, p in model.gpt.named_parameters()}
        optimizer = make_optimizer(model.parameters())
        tokens = make_tokens()
        losses = []
        for _ in range(STEPS):
            loss = loss_of(model(tokens, torch.arange(tokens.numel())).final)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert all(torch.equal(before[name], p) for name, p in model.gpt.named_parameters())
        save_adapter(model, f"{out}/adapter", base)
        adapted = logits_of(model)
        merge_lora(model)
        merged = logits_of(model)
        save_weights(model, f"{out}/merged")
        return {"losses": losses, "adapted": adapted, "merged": merged}
    finally:
        destroy_parallel()


@pytest.mark.parametrize("config", [ALL, SOME, QUERY], ids=["all", "some", "query"])
def test_tp_changes_nothing_and_merging_keeps_the_logits(
    config: LoraConfig, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_pretrained("qwen2", base)
    logits, adapters = {}, {}
    # With tp 4 two ranks share a key/value head. Which modules there are is nothing to tp 2.
    for tp in (1, 2, 4) if config is ALL else (1, 4):
        out = tmp_path / str(tp)
        ranks = run_distributed(train, tp, tp, str(base), None, config, str(out))
        assert ranks[0]["losses"][-1] < 0.8 * ranks[0]["losses"][0]
        logits[tp] = torch.cat([rank["adapted"] for rank in ranks], -1)[..., :53]
        merged = torch.cat([rank["merged"] for rank in ranks], -1)[..., :53]
        assert relative_error(merged, logits[tp]) <= 1e-5
        assert relative_error(transformers_logits(out / "merged", make_tokens()), merged) <= 1e-5
        adapters[tp] = load_file(out / "adapter" / "adapter_model.safetensors")
        assert adapters[tp].keys() == adapters[1].keys()
        for name, tensor in adapters[tp].items():
            assert relative_error(tensor, adapters[1][name]) <= 1e-4, (tp, name)
        assert relative_error(logits[tp], logits[1]) <= 1e-4
    modules = {name.split(".")[-3] for name in adapters[1]}
    assert modules == set(config.target_modules)


def gradients_and_kept_bytes(mesh: Mesh, base: str, makes_again: bool) -> tuple[dict, int]:
    """The adapters' gradients, and what autograd keeps between the passes."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = load_backbone(base)
        add_lora(model, ALL, seed=3)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        kept: dict[int, torch.Tensor] = {}

        def keep(one: torch.Tensor) -> torch.Tensor:
            kept[one.untyped_storage().data_ptr()] = one
            return one

        with pytest.MonkeyPatch.context() as patch:
            if not makes_again:
                patch.setattr(lora, "remake_of", lambda _: None)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
                tokens = make_tokens()
                loss = loss_of(model(tokens, torch.arange(tokens.numel())).final)
        loss.backward()
        size = sum(one.untyped_storage().nbytes() for one in kept.values())
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size
    finally:
        destroy_parallel()


def test_what_adapters_make_again_changes_no_bit_and_is_not_kept(tmp_path: Path) -> None:
    make_pretrained("llama", tmp_path)
    (gradients, size), *_ = run_distributed(gradients_and_kept_bytes, 1, 1, str(tmp_path), True)
    (plain, more), *_ = run_distributed(gradients_and_kept_bytes, 1, 1, str(tmp_path), False)
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert size < 0.9 * more


@needs_peft
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_equals_peft(family: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    make_pretrained(family, base)
    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=list(ALL.target_modules), task_type="CAUSAL_LM"
        ),
    )
    model.save_pretrained(tmp_path / "start")
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(STEPS):
        output = model(make_tokens(), output_hidden_states=True)
        loss = loss_of(output.hidden_states[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(tmp_path / "end")

    (ours,) = run_distributed(
        train, 1, 1, str(base), str(tmp_path / "start"), ALL, str(tmp_path / "ours")
    )
    assert ours["losses"] == pytest.approx(losses, rel=1e-5)
    expected = load_file(tmp_path / "end" / "adapter_model.safetensors")
    adapter = load_file(tmp_path / "ours" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(adapter[name], tensor) <= 1e-5, name
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours" / "adapter").eval()
    with torch.no_grad():
        logits = again(make_tokens()).logits
    assert relative_error(ours["adapted"][..., :53], logits) <= 1e-5


def refusals(mesh: Mesh, base: str, folders: list[str]) -> list[str]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        messages = []

        def refused(call) -> None:
            with pytest.raises(UserError) as caught:
                call()
            messages.append(str(caught.value))

        for config in (LoraConfig(dropout=0.1), LoraConfig(target_modules=["query"])):
            refused(lambda config=config: add_lora(load_backbone(base), config))
        refused(lambda: add_lora(load_backbone(base), LoraConfig(rank=0)))
        for folder in folders:
            refused(lambda folder=folder: load_adapter(load_backbone(base), folder))
        return messages
    finally:
        destroy_parallel()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_pretrained("llama", base)
    run_distributed(train, 1, 1, str(base), None, SOME, str(tmp_path / "good"))
    good = tmp_path / "good" / "adapter"
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    variants = {
        "dora": (config | {"use_dora": True}, tensors),
        "no-rank": ({k: v for k, v in config.items() if k != "r"}, tensors),
        "other-base": (config, tensors | {key: torch.zeros(64, 3)}),
        "missing": (config, {k: v for k, v in tensors.items() if k != key}),
        "more-layers": (config, tensors | {key.replace("layers.0", "layers.7"): tensors[key]}),
    }
    for name, (tree, state) in variants.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(tree))
        save_file(
            {k: v.clone() for k, v in state.items()}, tmp_path / name / "adapter_model.safetensors"
        )
    expected = [
        ["dropout", "launch.tp 1"], ["'query'", "q_proj"], ["rank"], ["use_dora"], ["'r'"],
        [key, "[64, 3]", "[32, 3]"], [key, "missing"], ["layers.7", "another"],
    ]  # fmt: skip
    folders = [str(tmp_path / name) for name in variants]
    for messages in run_distributed(refusals, 2, 2, str(base), folders):
        for message, words in zip(messages, expected, strict=True):
            assert all(word in message for word in words) and "\n" not in message, message
    assert read_lora_config(good) == LoraConfig(SOME.rank, SOME.alpha, sorted(SOME.target_modules))


def dropout_outputs(mesh: Mesh, base: str) -> list[float]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = load_backbone(base)
        adapters = add_lora(model, LoraConfig(rank=4, dropout=0.5))
        with torch.no_grad():
            for layer in adapters.linears():
                for _, module in layer.targeted():
                    layer.parameter_b(module).fill_(0.05)
        tokens = make_tokens()
        rows = torch.arange(tokens.numel())

        def run(seed: int) -> float:
            torch.manual_seed(seed)
            with torch.no_grad():
                return float(model(tokens, rows).final.square().sum())

        training = [run(1), run(1), run(2)]
        model.eval()
        return [*training, run(1), run(2)]
    finally:
        destroy_parallel()


def test_dropout_is_drawn_in_training_only(tmp_path: Path) -> None:
    make_pretrained("llama", tmp_path / "base")
    ((first, again, other, plain, same),) = run_distributed(
        dropout_outputs, 1, 1, str(tmp_path / "base")
    )
    assert first == again != other and plain == same and plain not in (first, other)
