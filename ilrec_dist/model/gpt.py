"""The decoder: a Megatron-core GPT whose intermediate layers can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from ilrec_dist.common.errors import UserError
from ilrec_dist.model import sharding
from ilrec_dist.model.attention import AttentionContext, KVCache, PackedSequences
from ilrec_dist.model.branches import BranchedSequences
from ilrec_dist.model.config import BackboneConfig, tensor_parallel_problem
from ilrec_dist.model.decoder import padded_vocab_size
from ilrec_dist.model.elementwise import Rotary, normed
from ilrec_dist.model.layers import Precision, layer_spec, transformer_config
from ilrec_dist.model.lookup import looked_up
from ilrec_dist.model.packing import pack
from ilrec_dist.model.sequence_parallel import TokenCut
from ilrec_dist.model.trained_rows import EMBEDDING, HEAD, TrainedRows

# Positions of the first table of rotary angles, or max_positions where that is less.
ROTARY_TABLE_POSITIONS = 4096


@dataclass(frozen=True)
class HiddenRows:
    """n^L and n^l of the rows (METHOD.md §1), equal on every tensor-parallel rank."""

    final: Tensor  # [N, d]
    layers: list[Tensor]  # m × [N, d], ordered L-1 … L-m


class Backbone(nn.Module):
    """A decoder of the configured sizes, cut over this process's tp group.

    `initialize_parallel` comes first. vocab_size is the true one, unpadded;
    max_positions is the length of the learned position table, unused with rope. The
    weights depend on (config, vocab_size, seed) alone, not on tp, the device or the
    process's random numbers; with initialize=False they are undefined until weights are
    loaded. The model is built on the CPU: move it with `.to(device)`. UserError when tp
    does not divide a size.
    """

    def __init__(
        self,
        config: BackboneConfig,
        vocab_size: int,
        max_positions: int,
        precision: Precision = "fp32",
        seed: int = 0,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_positions = config, vocab_size, max_positions
        self.seed = seed
        # What hf.checkpoint read the weights from: the model type, and each parameter's dtype.
        self.checkpoint_family: str | None = None
        self.checkpoint_dtypes: dict[str, torch.dtype] = {}
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        tp = self.tp_group.size()
        self.padded_vocab_size = padded_vocab_size(config, vocab_size)
        _check_divisible(config, self.padded_vocab_size, tp)
        learned = config.position_embedding == "learned"
        self.gpt = GPTModel(
            config=transformer_config(config, precision, tp),
            transformer_layer_spec=layer_spec(config),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=max_positions,
            position_embedding_type="learned_absolute" if learned else "rope",
            share_embeddings_and_output_weights=config.tie_embeddings,
            rotary_base=config.rope_theta,
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
        )
        if precision == "bf16":
            # Megatron makes the norms and the position table in fp32 whatever params_dtype says.
            self.gpt.bfloat16()
        for name, parameter in self.gpt.named_parameters():
            sharding.mark_parallel(parameter, sharding.shard_spec(name, config))
        if initialize:
            self._initialize()
        # Adapters that model/lora.py attaches, and rows of the vocabulary that are parameters of
        # their own; these parameters are not part of `gpt`.
        self.lora: nn.Module | None = None
        self.trained_rows: TrainedRows | None = None
        # What model/partial.py says of a training that leaves most weights as they are.
        self.base_sha256: str | None = None
        self.added_rows = (0, 0)
        # Whether batches with padding are packed before the first layer.
        self.packs = False
        # Whether training keeps only the layers' inputs, and computes the rest again in backward.
        self.recompute = False
        # Whether training cuts what lies between the tensor-parallel products along the tokens.
        self.sequence_parallel = False
        self._angles: Tensor | None = None

    @torch.no_grad()
    def _initialize(self) -> None:
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        for name, parameter in self.gpt.named_parameters():
            spec = sharding.shard_spec(name, self.config)
            shape = sharding.full_shape(parameter.shape, spec, tp)
            full = sharding.init_tensor(name, shape, self.config, self.seed)
            parameter.copy_(full if spec is None else spec.slice(full, rank, tp))

    @property
    def vocab_range(self) -> tuple[int, int]:
        """[start, stop) of this rank's rows of the padded vocabulary."""
        size = self.padded_vocab_size // self.tp_group.size()
        return self.tp_group.rank() * size, (self.tp_group.rank() + 1) * size

    @property
    def vocabulary_tables(self) -> dict[str, nn.Parameter]:
        """This rank's rows of the embedding and,
        where it is not tied to it, of the head.
        """
        tables = {EMBEDDING: self.gpt.embedding.word_embeddings.weight}
        if not self.config.tie_embeddings:
            tables[HEAD] = self.gpt.output_layer.weight
        return tables

    @property
    def head_weight(self) -> Tensor:
        """The output head's shard [V_local, d]; the embedding's weight when tied."""
        tables = self.vocabulary_tables
        weight = tables.get(HEAD, tables[EMBEDDING])
        return weight if self.trained_rows is None else self.trained_rows.head(weight)

    @property
    def trainable_head_rows(self) -> tuple[int, int] | None:
        """The range of tokens whose head rows alone are trained; None stands for all.

        Where no row is, `head_weight` needs no gradient.
        """
        if self.trained_rows is None or self.base_sha256 is None:
            return None
        return self.trained_rows.start, self.trained_rows.stop

    @property
    def trained_head_rows(self) -> nn.Parameter | None:
        """This rank's rows of `trainable_head_rows`, which get the gradient."""
        if self.trained_rows is None or self.base_sha256 is None:
            return None
        return self.trained_rows.head_rows

    def write_trained_rows(self) -> None:
        """Bring the rows that are parameters of their own into the tables."""
        if self.trained_rows is not None:
            self.trained_rows.write_to(self.vocabulary_tables)

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        num_intermediate: int = 0,
        packed: PackedSequences | None = None,
        branches: BranchedSequences | None = None,
    ) -> HiddenRows:
        """Hidden states of the rows: final, and of num_intermediate layers under it.

        METHOD.md §1. tokens is int64 [B, S], the same on every tensor-parallel rank,
        padded on the right (attention is causal, so padding is never seen); with
        `packed` [1, T], samples back to back; with `branches` [B, S], trunks with the
        branches that continue them. rows is int64 [N], flat indices into B ·
        S. Only the rows are gathered and normed. UserError when a sequence exceeds the
        learned positions.
        """
        if num_intermediate >= self.config.num_layers:
            raise ValueError(
                f"num_intermediate {num_intermediate} must be below the {self.config.num_layers} "
                "layers"
            )
        if packed is not None and tokens.shape != (1, packed.num_tokens):
            raise ValueError(
                f"packed samples of {packed.num_tokens} tokens need tokens [1, "
                f"{packed.num_tokens}], not {list(tokens.shape)}"
            )
        if packed is None and branches is None and self.packs and self.training:
            tokens, rows, packed = pack(tokens, rows) or (tokens, rows, None)
        context: AttentionContext = packed or branches
        cut = self._token_cut(tokens)
        if packed is not None:
            hidden, rotary = self.embed(tokens, 0, packed.max_length, packed.positions, cut)
        elif branches is not None:
            hidden, rotary = self.embed(tokens, 0, branches.num_positions, branches.positions, cut)
        else:
            hidden, rotary = self.embed(tokens, 0, tokens.shape[1], None, cut)
        first = self.config.num_layers - num_intermediate
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        taps = []
        for number, layer in enumerate(self.gpt.decoder.layers, start=1):
            hidden = layer(hidden, context, rotary, cut, recompute)
            if number >= first:
                if cut is None:
                    tapped = hidden.flatten(0, 1).index_select(0, rows)
                else:
                    tapped = cut.rows(hidden, rows)
                taps.append(self._norm(tapped))
        final, *layers = reversed(taps)
        return HiddenRows(final, layers)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Run prefixes, int64 [B, S], of `lengths` tokens each, padded on the right.

        lengths int64 [B], all positive; None: all prefixes have S tokens. Returns n^L
        of each prefix's last token, [B, d], and the cache for `decode`.
        """
        cache = KVCache(prefix=tokens.shape[1], num_layers=self.config.num_layers, lengths=lengths)
        if lengths is not None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            cache.padding = positions >= lengths[:, None]
        hidden, rotary = self.embed(tokens, 0, tokens.shape[1])
        return self._norm(self._run(hidden, cache, rotary)[:, 0]), cache

    @torch.no_grad()
    def decode(self, cache: KVCache, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Run one more token of each of K beams per user, int64 [B, K] → n^L [B, K, d].

        parents int64 [B, K]: the beam of the step before that each beam continues. None
        keeps the order, and is right at the first step, where all continue the prefix.
        K may change between steps when parents is given. Changes the cache; a user's
        beams share the prefix's keys and values.
        """
        if parents is not None:
            cache.reorder(parents)
        position = cache.prefix + cache.suffix
        positions = None if cache.lengths is None else cache.lengths[:, None] + cache.suffix
        hidden, rotary = self.embed(tokens, position, position + 1, positions)
        hidden = self._run(hidden, cache, rotary)
        cache.suffix += 1
        return self._norm(hidden)

    def _token_cut(self, tokens: Tensor) -> TokenCut | None:
        """How a batch [B, S] is cut between the products, or None."""
        if not (self.sequence_parallel and self.training and self.tp_group.size() > 1):
            return None
        batch, length = tokens.shape
        return TokenCut(batch, length, self.tp_group)

    def _run(self, hidden: Tensor, context: AttentionContext, rotary: Rotary | None) -> Tensor:
        """The residual stream after the last layer, [B, S, d]; of a prefill the
        prefixes' last tokens, [B, 1, d].
        """
        for layer in self.gpt.decoder.layers:
            hidden = layer(hidden, context, rotary)
        return hidden

    def _norm(self, hidden: Tensor) -> Tensor:
        return normed(self.gpt.decoder.final_layernorm, hidden)[0]

    def embed(
        self,
        tokens: Tensor,
        start: int,
        stop: int,
        positions: Tensor | None = None,
        cut: TokenCut | None = None,
    ) -> tuple[Tensor, Rotary | None]:
        """Embed tokens [B, S] at positions start … stop-1, or at one position.

        positions [S] or [B, S], below stop, replace the range. Returns the start of the
        residual stream, [B, S, d] or this rank's tokens of a cut, and, with rope, what
        all layers rotate by.
        """
        index = slice(start, stop) if positions is None else positions
        embedding = self.gpt.embedding
        hidden = self._look_up(tokens, cut)
        if self.config.position_embedding == "rope":
            angles = self._rotary(stop, hidden.device)[index]
            # By token, or by user and token.
            angles = (angles[None] if angles.dim() == 2 else angles)[:, :, None]
            rotary = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
            return embedding.embedding_dropout(hidden), rotary
        if stop > self.max_positions:
            raise UserError(
                f"a sequence of {stop} tokens exceeds the backbone's {self.max_positions} "
                "learned positions; shorten train.max_history"
            )
        table = embedding.position_embeddings.weight
        if cut is None:
            at_positions = table[index] if positions is None else looked_up(table, positions)
            hidden = hidden + at_positions
        else:
            range_ = torch.arange(start, stop, device=tokens.device)
            index = (range_ if positions is None else positions).expand_as(tokens)
            hidden = hidden + looked_up(cut.shared(table), cut.owned(index))
        return embedding.embedding_dropout(hidden), None

    def _look_up(self, tokens: Tensor, cut: TokenCut | None) -> Tensor:
        """The rows of the vocabulary's table, which is cut over the ranks."""
        words = self.gpt.embedding.word_embeddings
        summed: Callable[[Tensor], Tensor] | None = None
        if cut is not None:
            summed = cut.scattered_sum
        elif self.tp_group.size() > 1:
            summed = partial(reduce_from_tensor_model_parallel_region, group=self.tp_group)
        if self.trained_rows is not None:
            return self.trained_rows.embed(words.weight, tokens, summed)
        if summed is None:
            return looked_up(words.weight, tokens)
        is_other = (tokens < words.vocab_start_index) | (tokens >= words.vocab_end_index)
        local = (tokens - words.vocab_start_index).masked_fill(is_other, 0)
        return summed(looked_up(words.weight, local).masked_fill_(is_other[..., None], 0))

    def _rotary(self, stop: int, device: torch.device) -> Tensor:
        """Rotary angles of the positions below `stop` and more, [positions, head_dim].

        The table is made once and grows when a longer sequence comes.
        """
        if self._angles is None or len(self._angles) < stop or self._angles.device != device:
            size = max(stop, min(self.max_positions, ROTARY_TABLE_POSITIONS))
            angles = self.gpt.rotary_pos_emb.get_freqs_non_repeated(size)
            self._angles = torch.cat((angles, angles), dim=-1).to(device)
        return self._angles


def _check_divisible(config: BackboneConfig, vocab: int, tp: int) -> None:
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    if heads % groups:
        raise UserError(
            f"backbone.num_kv_heads {groups} does not divide num_heads {heads}; choose one "
            "that does"
        )
    problem = tensor_parallel_problem(config, tp)
    if problem is not None:
        raise UserError(f"launch.tp: {problem}")
    if vocab % tp:
        raise UserError(
            f"launch.tp: tp {tp} does not divide the padded vocabulary of {vocab} rows; choose a "
            "backbone.vocab_multiple that tp divides"
        )
