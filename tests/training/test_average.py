"""The moving average of the weights against its definition."""

from pathlib import Path

import torch
from torch import nn

from ilrec_dist.training.average import WeightAverage


def test_it_is_the_average_of_the_definition_and_leaves_the_weights_alone(tmp_path: Path):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.5)
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * parameter.detach() for name, parameter in module.named_parameters()}
    own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with average.in_place():
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])
            assert not torch.allclose(parameter, own[name])
    assert all(torch.equal(parameter, own[name]) for name, parameter in module.named_parameters())
    average.save(tmp_path / "average.safetensors")
    again = WeightAverage(module, 0.5)
    again.load(tmp_path / "average.safetensors")
    assert all(torch.equal(again.values[name], value) for name, value in average.values.items())
