"""LoRA on the tensor-parallel linear layers: y = Wx + (α/r)·B(Ax) (METHOD.md §10).

Column-parallel layers keep A whole on every rank, its gradient summed over the ranks,
and B cut like W. Row-parallel layers cut A like W and keep B whole; the r-vector Ax is
summed over the ranks before B. The joint projections (query, key and value; gate and
up) have one adapter for each of their parts, as PEFT has. Where the tokens are cut
(model/sequence_parallel.py), column-parallel layers multiply this rank's tokens with A
and gather Ax, and row-parallel ones scatter its sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from ilrec_dist.common.errors import UserError
from ilrec_dist.model import sharding
from ilrec_dist.model.config import LoraConfig
from ilrec_dist.model.elementwise import remake_of
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.families import Family, checkpoint_names, family_of_config
from ilrec_dist.model.hf.slices import shard_slices, tensor_shapes
from ilrec_dist.model.sequence_parallel import TokenCut

ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
COLUMN_PARALLEL = ("linear_qkv.weight", "linear_fc1.weight")


class Piece(NamedTuple):
    """Features [start, stop) of a layer's output, which are those of one adapter from
    `offset` on; of none where `adapter` is None.
    """

    start: int
    stop: int
    adapter: int | None
    offset: int


class _Project(torch.autograd.Function):
    """x Aᵀ for x = remake(source), which is made again for A's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, remake: Callable[[Tensor], Tensor], source: Tensor
    ) -> Tensor:
        ctx.remake = remake
        ctx.save_for_backward(a, source)
        return F.linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, source = ctx.saved_tensors
        of_x = of_a = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ a
        if ctx.needs_input_grad[1]:
            of_a = grad.flatten(0, -2).t() @ ctx.remake(source).flatten(0, -2)
        return of_x, of_a, None, None


class _AddAdapters(torch.autograd.Function):
    """Adds scaling · B h of the adapters to the output, where their features lie.

    Every adapter gets a gradient, also where none of its features is on this
    rank: the backward pass behind it is a collective.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, scaling: float, pieces: list[Piece], *tensors: Tensor
    ) -> Tensor:
        ctx.scaling, ctx.pieces = scaling, pieces
        ctx.save_for_backward(*tensors)
        ctx.mark_dirty(output)
        # One adapter at a time, because a large block that is freed between
        # small ones that are kept is not always of use again.
        for adapter, (h, weight) in enumerate(zip(*_halves(tensors), strict=True)):
            part = F.linear(h, weight).mul_(scaling)
            for piece in pieces:
                if piece.adapter == adapter:
                    output[..., piece.start : piece.stop].add_(_features(part, piece))
            del part
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, b = _halves(ctx.saved_tensors)
        parts = [grad.new_empty((*grad.shape[:-1], len(weight))) for weight in b]
        for piece in ctx.pieces:
            if piece.adapter is not None:
                of_piece = grad[..., piece.start : piece.stop]
                torch.mul(of_piece, ctx.scaling, out=_features(parts[piece.adapter], piece))
        of_hidden = [part @ weight for part, weight in zip(parts, b, strict=True)]
        of_b = [
            part.flatten(0, -2).t() @ h.flatten(0, -2)
            for part, h in zip(parts, hidden, strict=True)
        ]
        return grad, None, None, *of_hidden, *of_b


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _features(part: Tensor, piece: Piece) -> Tensor:
    return part[..., piece.offset : piece.offset + piece.stop - piece.start]


class LoraLinear(nn.Module):
    """The adapters of one tensor-parallel linear layer.

    a[module] is A [r, in] and b[module] is B [out, r] of this rank, for each targeted
    part of the layer; `module` is the part's name in the checkpoint.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, backbone: Backbone, lora: LoraConfig, seed: int
    ) -> None:
        super().__init__()
        config, tp = backbone.config, backbone.tp_group.size()
        self.lora = lora
        self.is_row_parallel = name.endswith(ROW_PARALLEL)
        self.full = sharding.full_shape(weight.shape, sharding.shard_spec(name, config), tp)
        # Each part's name in the checkpoint, such as model.layers.0.self_attn.q_proj.
        self.modules_of_parts = [
            key.removesuffix(".weight")
            for key in checkpoint_names(name, family_of_config(config, backbone.checkpoint_family))
        ]
        self.shapes = tensor_shapes(name, self.full, config)
        self.slices = [shard_slices(name, self.full, config, r, tp) for r in range(tp)]
        self.rank_index, self.group = backbone.tp_group.rank(), backbone.tp_group
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for part, module in self.targeted(lora):
            a, b = _initial(module, self.shapes[part], lora.rank, seed)
            a, b = self.local_a(a), self.local_b(part, b)
            self.a[_key(module)] = nn.Parameter(a.to(weight.dtype, copy=True))
            self.b[_key(module)] = nn.Parameter(b.to(weight.dtype, copy=True))
            spec_a = sharding.ShardSpec(1) if self.is_row_parallel else None
            spec_b = None if self.is_row_parallel else sharding.ShardSpec(0)
            sharding.mark_parallel(self.a[_key(module)], spec_a)
            sharding.mark_parallel(self.b[_key(module)], spec_b)
        self.pieces = self._pieces()

    def _pieces(self) -> list[Piece]:
        """Where the adapters' parts lie in this rank's features of the output."""
        numbers = {part: number for number, (part, _) in enumerate(self.targeted())}
        if self.is_row_parallel:
            return [Piece(0, self.full[0], 0, 0)]
        pieces, first, offsets = [], 0, dict.fromkeys(numbers, 0)
        for piece in self.slices[self.rank_index]:
            size, number = piece.stop - piece.start, numbers.get(piece.tensor)
            offset = 0 if number is None else offsets[piece.tensor]
            pieces.append(Piece(first, first + size, number, offset))
            if number is not None:
                offsets[piece.tensor] += size
            first += size
        return pieces

    def targeted(self, lora: LoraConfig | None = None) -> Iterator[tuple[int, str]]:
        """(index, checkpoint's name) of the parts that have adapters."""
        targets = (lora or self.lora).target_modules
        for part, module in enumerate(self.modules_of_parts):
            if module.rsplit(".", 1)[1] in targets:
                yield part, module

    def parameter_a(self, module: str) -> nn.Parameter:
        """This rank's A of a module, by the module's name in the checkpoint."""
        parameter: nn.Parameter = self.a[_key(module)]
        return parameter

    def parameter_b(self, module: str) -> nn.Parameter:
        """This rank's B of a module."""
        parameter: nn.Parameter = self.b[_key(module)]
        return parameter

    def local_a(self, full: Tensor) -> Tensor:
        """This rank's A, from the full one [r, in]."""
        if not self.is_row_parallel:
            return full
        shard: Tensor = full.chunk(self.group.size(), dim=1)[self.rank_index]
        return shard

    def local_b(self, part: int, full: Tensor) -> Tensor:
        """This rank's B of a part, from the full one [out, r]."""
        if self.is_row_parallel:
            return full
        mine = [s for s in self.slices[self.rank_index] if s.tensor == part]
        return torch.cat([full[:0], *(full[s.start : s.stop] for s in mine)])

    def forward(self, x: Tensor, output: Tensor, cut: TokenCut | None = None) -> Tensor:
        """Add the adapters' output to the layer's own; x and cut as the layer gets
        them.
        """
        remake = None
        if self.lora.dropout > 0 and self.training:
            x = F.dropout(x, self.lora.dropout)
        else:
            remake = remake_of(x)
        modules = [module for _, module in self.targeted()]
        a = torch.cat([self.parameter_a(module) for module in modules])
        b: list[Tensor] = [self.parameter_b(module) for module in modules]
        # What every rank holds whole meets only a part of the tokens on each.
        if cut is not None and self.is_row_parallel:
            b = [cut.shared(whole) for whole in b]
        elif cut is not None:
            a = cut.shared(a)
        if remake is not None:
            projected = _Project.apply(x, a, *remake)  # type: ignore[no-untyped-call]
        else:
            projected = F.linear(x, a)
        hidden = self._over_ranks(projected, cut)
        if self.is_row_parallel and cut is None:
            # Megatron's output may be a view, which autograd lets nobody write to.
            output = output.clone()
        added: Tensor = _AddAdapters.apply(  # type: ignore[no-untyped-call]
            output, self.lora.scaling, self.pieces, *hidden.chunk(len(modules), -1), *b
        )
        return added

    def _over_ranks(self, projected: Tensor, cut: TokenCut | None) -> Tensor:
        """The r-vectors of the output's tokens, from what this rank's A makes."""
        if self.is_row_parallel:
            # Each rank has a summand, of its part of the input.
            if cut is not None:
                return cut.scattered_sum(projected)
            summed: Tensor = reduce_from_tensor_model_parallel_region(projected)
            return summed
        if cut is not None:
            return cut.gathered(projected)
        # Backward sums the gradient of all parts over the ranks at once.
        copied: Tensor = copy_to_tensor_model_parallel_region(projected)
        return copied

    @torch.no_grad()
    def weight_delta(self) -> Tensor:
        """(α/r)·BA as this rank's shard of the layer's weight, in fp32."""
        products = [
            self.parameter_b(module).float() @ self.parameter_a(module).float()
            for _, module in self.targeted()
        ]
        delta = products[0].new_zeros(self.pieces[-1].stop, products[0].shape[1])
        for piece in self.pieces:
            if piece.adapter is not None:
                rows = slice(piece.offset, piece.offset + piece.stop - piece.start)
                delta[piece.start : piece.stop] = products[piece.adapter][rows]
        return delta * self.lora.scaling


class Lora(nn.Module):
    """The adapters of a backbone, attached by `add_lora` as `backbone.lora`."""

    def __init__(self, backbone: Backbone, lora: LoraConfig, seed: int) -> None:
        super().__init__()
        self.config = lora
        self.layers = nn.ModuleDict()
        for name, weight in list(backbone.gpt.named_parameters()):
            if not name.endswith(ROW_PARALLEL + COLUMN_PARALLEL):
                continue
            layer = LoraLinear(name, weight, backbone, lora, seed)
            if layer.a:
                self.layers[_key(name)] = layer
        self._hooks: list[RemovableHandle] = []
        self.attach(backbone)

    def attach(self, backbone: Backbone) -> None:
        """Let the layers add the adapters' output to theirs."""
        for name, layer in self.layers.items():
            linear = backbone.gpt.get_submodule(name.replace("/", ".").removesuffix(".weight"))
            self._hooks.append(linear.register_forward_hook(_adding(layer)))

    def detach(self) -> None:
        """Let the layers be what they are without adapters."""
        while self._hooks:
            self._hooks.pop().remove()

    def linears(self) -> Iterator[LoraLinear]:
        """The adapters of each layer, in the order of the backbone."""
        for layer in self.layers.values():
            assert isinstance(layer, LoraLinear)
            yield layer


def add_lora(backbone: Backbone, lora: LoraConfig, seed: int = 0) -> Lora:
    """Freeze the backbone's weights and attach adapters, whose first output is zero.

    The adapters' initial values depend on (lora, seed) alone, not on tp. UserError when
    a target module does not exist, a size is not positive, or dropout meets tensor
    parallelism.
    """
    family = family_of_config(backbone.config, backbone.checkpoint_family)
    _check(family, lora, backbone.tp_group.size())
    if getattr(backbone, "lora", None) is not None:
        raise ValueError("the backbone already has adapters")
    for parameter in backbone.gpt.parameters():
        parameter.requires_grad_(False)
    backbone.lora = Lora(backbone, lora, seed)
    return backbone.lora


def _adding(layer: nn.Module):  # type: ignore[no-untyped-def]
    """A forward hook that adds the adapters' output to the linear layer's."""

    def hook(
        _: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        x, *cut = inputs
        return layer(x, output[0], *cut), output[1]

    return hook


def _initial(module: str, shape: list[int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Full A [r, in], uniform as PEFT draws it, and B [out, r], zeros; fp32."""
    generator = sharding.seeded_generator(f"{module}.lora_A", seed)
    bound = 1 / math.sqrt(shape[1])
    a = torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(shape[0], rank)


def _check(family: Family, lora: LoraConfig, tp: int) -> None:
    known = {
        part.rsplit(".", 1)[1]
        for module, parts in family.tensors.items()
        if f"{module}.weight".endswith(ROW_PARALLEL + COLUMN_PARALLEL)
        for part in parts
    }
    for module in lora.target_modules:
        if module not in known:
            raise UserError(
                f"lora target module {module!r} is not a linear layer of {family.model_type}; "
                f"expected some of {', '.join(sorted(known))}"
            )
    if not lora.target_modules or lora.rank < 1 or lora.alpha <= 0 or not 0 <= lora.dropout < 1:
        raise UserError(
            f"lora needs target modules, rank ≥ 1, alpha > 0 and 0 ≤ dropout < 1, not {lora}"
        )
    if lora.dropout > 0 and tp > 1:
        raise UserError(
            f"lora dropout {lora.dropout} needs launch.tp 1, not {tp}: the input of row-parallel "
            "layers is cut over the ranks; set it to 0"
        )


def _key(name: str) -> str:
    """A parameter's or module's name without dots, which torch's containers refuse."""
    return name.replace(".", "/")
