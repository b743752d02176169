"""The backbone: a Megatron-core GPT whose intermediate layers can be read, and which decodes beams over a shared prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from ilrec_dist.common.errors import UserError
from ilrec_dist.model import sharding as weights
from ilrec_dist.model.attention import KVCache
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.layers import Precision, layer_spec, padded_vocab_size, transformer_config


@dataclass(frozen=True)
class HiddenRows:
    """n^L and n^l of the rows (METHOD.md §1), all through the one final norm; the same on every tensor-parallel rank."""

    final: Tensor  # [N, d]
    layers: list[Tensor]  # m × [N, d], ordered L-1 … L-m


class Backbone(nn.Module):
    """A decoder built from the sizes in the config, cut over the tensor-parallel group of `initialize_parallel`, which comes first.

    vocab_size is the true one, unpadded; max_positions the length of the learned position table (unused with rope). The weights depend on
    (config, vocab_size, seed) alone: not on tp, the device or the process's random numbers. Built on the CPU; move it with `.to(device)`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        vocab_size: int,
        max_positions: int,
        precision: Precision = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_positions = config, vocab_size, max_positions
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        tp = self.tp_group.size()
        self.padded_vocab_size = padded_vocab_size(config, vocab_size)
        _check_divisible(config, self.padded_vocab_size, tp)
        self.gpt = GPTModel(
            config=transformer_config(config, precision, tp),
            transformer_layer_spec=layer_spec(config),  # type: ignore[arg-type]
            vocab_size=self.padded_vocab_size,
            max_sequence_length=max_positions,
            position_embedding_type="learned_absolute"
            if config.position_embedding == "learned"
            else "rope",
            share_embeddings_and_output_weights=config.tie_embeddings,
            rotary_base=config.rope_theta,  # type: ignore[arg-type]
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
        )
        if precision == "bf16":
            self.gpt.bfloat16()  # the norms and the position table are made in fp32 whatever params_dtype says
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                cut = weights.shard_spec(name, config)
                weights.mark_parallel(parameter, cut)
                full = weights.init_tensor(
                    name, weights.full_shape(parameter.shape, cut, tp), config, seed
                )
                parameter.copy_(full if cut is None else cut.slice(full, self.tp_group.rank(), tp))
        self._angles: Tensor | None = None

    @property
    def vocab_range(self) -> tuple[int, int]:
        """[start, stop) of this rank's rows of the padded vocabulary."""
        size = self.padded_vocab_size // self.tp_group.size()
        return self.tp_group.rank() * size, (self.tp_group.rank() + 1) * size

    @property
    def head_weight(self) -> nn.Parameter:
        """The output head's shard [V_local, d]: the embedding's own weight when tied."""
        return (
            self.gpt.embedding.word_embeddings.weight
            if self.config.tie_embeddings
            else self.gpt.output_layer.weight
        )

    def forward(self, tokens: Tensor, rows: Tensor, num_intermediate: int = 0) -> HiddenRows:
        """Hidden states of the row positions, final and of the num_intermediate layers under the last (METHOD.md §1).

        tokens int64 [B, S], the same on every tensor-parallel rank, padded on the right (attention is causal, so padding is never seen);
        rows int64 [N], flat indices into B · S. Only the rows are gathered and normed. UserError when S exceeds the learned positions.
        """
        if num_intermediate >= self.config.num_layers:
            raise ValueError(
                f"num_intermediate {num_intermediate} must be below the {self.config.num_layers} layers"
            )
        hidden, rotary = self._embed(tokens, 0)
        first = self.config.num_layers - num_intermediate
        taps = []
        for number, layer in enumerate(self.gpt.decoder.layers, start=1):
            hidden = layer(hidden, None, rotary)
            if number >= first:
                taps.append(self._norm(hidden.flatten(0, 1).index_select(0, rows)))
        final, *layers = reversed(taps)
        return HiddenRows(final, layers)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, KVCache]:
        """Run a batch of equally long prefixes, int64 [B, S], no padding → n^L of the last position [B, d] and the cache for `decode`."""
        cache = KVCache(prefix=tokens.shape[1])
        hidden = self._run(tokens, 0, cache)
        return self._norm(hidden[:, -1]), cache

    @torch.no_grad()
    def decode(self, cache: KVCache, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """One more token for each of K beams per user, int64 [B, K] → n^L [B, K, d]. Changes the cache.

        parents int64 [B, K]: which beam of the step before each one continues; None keeps the order (and at the first step, where all
        continue the prefix). K may change between steps when parents is given. Beams share the prefix's keys and values.
        """
        if parents is not None:
            cache.reorder(parents)
        hidden = self._run(tokens, cache.prefix + cache.suffix, cache)
        cache.suffix += 1
        return self._norm(hidden)

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights unsharded, fp32 on the CPU, under the same names for every tp; a collective over the tensor-parallel group."""
        named = self.gpt.named_parameters()
        return {
            name: weights.gather(parameter, weights.shard_spec(name, self.config), self.tp_group)
            for name, parameter in named
        }

    @torch.no_grad()
    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what full_state_dict gave, under any tp. UserError names a tensor that is missing, left over or of the wrong shape."""
        expected = dict(self.gpt.named_parameters())
        for name in sorted(expected.keys() ^ state.keys()):
            raise UserError(
                f"weights: tensor {name!r} is {'missing' if name in expected else 'not part of this backbone'}; is it of another configuration?"
            )
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        for name, parameter in expected.items():
            cut = weights.shard_spec(name, self.config)
            shape = weights.full_shape(parameter.shape, cut, tp)
            if list(state[name].shape) != shape:
                raise UserError(
                    f"weights: tensor {name!r} has shape {list(state[name].shape)}, expected {shape}; is it of another configuration?"
                )
            parameter.copy_(state[name] if cut is None else cut.slice(state[name], rank, tp))

    def _run(self, tokens: Tensor, start: int, cache: KVCache) -> Tensor:
        """tokens [B, S] at positions start … → residual stream after the last layer [B, S, d]; in decoding S counts beams, all at `start`."""
        hidden, rotary = self._embed(tokens, start, same_position=start > 0)
        for layer in self.gpt.decoder.layers:
            hidden = layer(hidden, cache, rotary)
        return hidden

    def _norm(self, hidden: Tensor) -> Tensor:
        return self.gpt.decoder.final_layernorm(hidden)

    def _embed(
        self, tokens: Tensor, start: int, same_position: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, S] → the residual stream's start [B, S, d], and rotary angles [1, S or 1, 1, head_dim] with rope."""
        embedding = self.gpt.embedding
        hidden = embedding.word_embeddings(tokens)
        stop = start + (1 if same_position else tokens.shape[1])
        if self.config.position_embedding == "rope":
            return embedding.embedding_dropout(hidden), self._rotary(start, stop, hidden.device)
        if stop > self.max_positions:
            raise UserError(
                f"a sequence of {stop} tokens exceeds the backbone's {self.max_positions} learned positions; shorten train.max_history"
            )
        return embedding.embedding_dropout(
            hidden + embedding.position_embeddings.weight[start:stop]
        ), None

    def _rotary(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rotary angles of positions start … stop-1, [1, stop-start, 1, head_dim]; the table is made once and grows."""
        if self._angles is None or len(self._angles) < stop or self._angles.device != device:
            angles = self.gpt.rotary_pos_emb.get_freqs_non_repeated(max(stop, self.max_positions))
            self._angles = torch.cat((angles, angles), dim=-1).to(device)
        return self._angles[None, start:stop, None]


def _check_divisible(config: BackboneConfig, vocab: int, tp: int) -> None:
    for what, size in (
        ("attention heads", config.num_heads),
        ("key/value heads", config.num_kv_heads or config.num_heads),
        ("feed-forward width", config.ffn_hidden_size or 4 * config.hidden_size),
        ("padded vocabulary", vocab),
    ):
        if size % tp:
            raise UserError(
                f"launch.tp {tp} does not divide the backbone's {what} {size}; choose a tp that does"
            )
