"""The parameters of a decoder by part, and how tensor parallelism cuts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.layers import padded_vocab_size

# DeepSpeed's ZeRO pads each of its flat groups to a multiple of this for each dp rank.
ALIGNMENT = 2


@dataclass(frozen=True)
class Count:
    """Parameters of a part of the model: those that every rank holds, and those cut over tp."""

    whole: int
    cut: int

    @property
    def total(self) -> int:
        return self.whole + self.cut

    def per_rank(self, tp: int) -> int:
        return self.whole + self.cut // tp


@dataclass(frozen=True)
class DecoderSizes:
    """A decoder's sizes with every default filled in."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int  # padded
    positions: int
    config: BackboneConfig

    @classmethod
    def of(cls, config: BackboneConfig, vocab_size: int, positions: int) -> DecoderSizes:
        """vocab_size is the unpadded one, positions the length of a learned position table."""
        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_heads,
            ffn=config.ffn_hidden_size or 4 * config.hidden_size,
            gated=config.activation == "swiglu",
            vocab=padded_vocab_size(config, vocab_size),
            positions=positions,
            config=config,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the joint projection of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def fc1_width(self) -> int:
        return self.ffn * (2 if self.gated else 1)

    def parameters(self) -> dict[str, Count]:
        """The parameters of each part; together exactly those of `model.gpt.Backbone`."""
        config, hidden = self.config, self.hidden
        is_learned = config.position_embedding == "learned"
        biases = self._layer_biases()
        head_norms = 2 * self.head_dim if config.qk_norm else 0
        attention = (self.qkv_width + self.query_width) * hidden
        feed_forward = (self.fc1_width + self.ffn) * hidden
        parts = {
            "embedding": Count(self.positions * hidden if is_learned else 0, self.vocab * hidden),
            "attention": _times(Count(0, attention), self.layers),
            "feed-forward": _times(Count(0, feed_forward), self.layers),
            "biases": _times(biases, self.layers),
            "norms": Count((2 * self.layers + 1) * self._norm + self.layers * head_norms, 0),
            "head": Count(0, 0 if config.tie_embeddings else self.vocab * hidden),
        }
        return {name: count for name, count in parts.items() if count.total}

    def vectors(self) -> Count:
        """The parameters of one dimension, to which no weight decay applies."""
        parts = self.parameters()
        return summed({name: parts[name] for name in ("biases", "norms") if name in parts})

    def flat_parameters(self, tp: int, dp: int) -> int:
        """A rank's parameters as DeepSpeed lays them out: matrices and vectors, each padded."""
        vectors = self.vectors().per_rank(tp)
        matrices = summed(self.parameters()).per_rank(tp) - vectors
        step = ALIGNMENT * dp
        return sum(-(-count // step) * step for count in (matrices, vectors))

    @property
    def _norm(self) -> int:
        return self.hidden * (2 if self.config.normalization == "LayerNorm" else 1)

    def _layer_biases(self) -> Count:
        """Of one layer: those of the projections that end in the residual stream are not cut."""
        config = self.config
        qkv = self.qkv_width if config.bias or config.qkv_bias else 0
        fc1 = self.fc1_width if config.bias else 0
        return Count(2 * self.hidden if config.bias else 0, qkv + fc1)


def _times(count: Count, factor: int) -> Count:
    return Count(count.whole * factor, count.cut * factor)


def summed(parts: Mapping[str, Count]) -> Count:
    return Count(
        sum(count.whole for count in parts.values()), sum(count.cut for count in parts.values())
    )
