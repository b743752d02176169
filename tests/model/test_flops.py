"""The counted FLOPs are those that torch counts in the model's own passes."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.flops import Trained, Work, forward_flops, training_flops
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.lora import add_lora
from ilrec_dist.model.partial import separate_rows
from ilrec_dist.pipeline.training_cost import mean_candidates
from tests.support.toy_decoder import NUM_ITEMS, toy_catalogue

SIZES = dict(num_layers=3, hidden_size=32, num_heads=4)
CONFIGS = [
    BackboneConfig(**SIZES),
    BackboneConfig(**SIZES, num_kv_heads=2, activation="swiglu", ffn_hidden_size=80, bias=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama"])
def test_flops_are_those_that_torch_counts(config):
    initialize_parallel(1, "cpu")
    try:
        model = Backbone(config, 64, 24)
        tokens, rows = torch.zeros(5, 24, dtype=torch.int64), torch.arange(40)
        # torch counts attention where it is made of products.
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward, torch.no_grad():
                model(tokens, rows).final @ model.head_weight.T
            with FlopCounterMode(display=False) as both:
                (model(tokens, rows).final @ model.head_weight.T).sum().backward()
    finally:
        destroy_parallel(process_group=True)
    # Nor does it see that attention is causal: every token counts with all 24.
    work = Work(tokens=5 * 24, context=24, rows=40)
    assert forward_flops(config, work, [64]) == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert training_flops(config, work, [64]) == pytest.approx(both.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("lora", "new_rows"),
    [
        (LoraConfig(rank=4), 0),
        (LoraConfig(rank=4), 16),
        (LoraConfig(rank=4, target_modules=["q_proj", "up_proj"]), 0),
        (None, 16),
    ],
    ids=["lora", "lora+new_rows", "two modules", "new_rows"],
)
def test_frozen_weights_cost_no_product(lora, new_rows):
    trained = Trained(False, lora, new_rows)
    config = BackboneConfig(
        **SIZES,
        normalization="RMSNorm",
        position_embedding="rope",
        num_kv_heads=2,
        activation="swiglu",
        ffn_hidden_size=80,
        bias=False,
    )
    initialize_parallel(1, "cpu")
    try:
        model = Backbone(config, 64, 24)
        if lora is not None:
            add_lora(model, lora, 0)
        model.gpt.requires_grad_(False)
        if new_rows:
            separate_rows(model, (48, 64))
        tokens, rows = torch.zeros(5, 24, dtype=torch.int64), torch.arange(40)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
            model(tokens, rows).final.sum().backward()
    finally:
        destroy_parallel(process_group=True)
    work = Work(tokens=5 * 24, context=24, rows=40)
    body = training_flops(config, work, [], trained)
    assert body == pytest.approx(both.get_total_flops(), rel=0.01)
    # The head's logits, their gradient with regard to the rows, and that of the new rows.
    head = training_flops(config, work, [64, 8], trained) - body
    assert head == 2 * 40 * 32 * (2 * (64 + 8) + min(64, new_rows) + min(8, new_rows))


def test_mean_candidates_are_weighted_by_how_often_an_item_is_a_target():
    trie = Trie(toy_catalogue())
    popularity = np.arange(NUM_ITEMS)
    items = np.repeat(np.arange(NUM_ITEMS), popularity)
    indptr, _ = trie.target_candidates(items)
    assert mean_candidates(trie, popularity) == pytest.approx(np.diff(indptr).mean())
