"""The parameters of a decoder by part, and how tensor parallelism cuts them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.decoder import padded_vocab_size

# DeepSpeed's ZeRO pads each of its flat groups to a multiple of this for each dp rank.
ALIGNMENT = 2


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a part of the model: those
    that every rank holds, and those cut over tp.
    """

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
        """vocab_size is the unpadded one, positions
        the length of a learned position table.
        """
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

    def tensors(self) -> Iterator[tuple[str, int, ParameterCount]]:
        """(part, dimensions, elements) of every
        parameter, in the order of the module's.

        Together they are exactly the parameters of `model.gpt.Backbone`.
        """
        config, hidden = self.config, self.hidden
        yield "embedding", 2, ParameterCount(0, self.vocab * hidden)
        if config.position_embedding == "learned":
            yield "embedding", 2, ParameterCount(self.positions * hidden, 0)
        for _ in range(self.layers):
            yield from self.layer()
        yield from self._norm()
        if not config.tie_embeddings:
            yield "head", 2, ParameterCount(0, self.vocab * hidden)

    def layer(self) -> Iterator[tuple[str, int, ParameterCount]]:
        """Those of one layer."""
        config, hidden = self.config, self.hidden
        yield from self._norm()
        yield "attention", 2, ParameterCount(0, self.query_width * hidden)
        if config.bias:
            yield "biases", 1, ParameterCount(hidden, 0)
        yield "attention", 2, ParameterCount(0, self.qkv_width * hidden)
        if config.bias or config.qkv_bias:
            yield "biases", 1, ParameterCount(0, self.qkv_width)
        for _ in range(2 if config.qk_norm else 0):
            yield "norms", 1, ParameterCount(self.head_dim, 0)
        yield from self._norm()
        yield "feed-forward", 2, ParameterCount(0, self.fc1_width * hidden)
        if config.bias:
            yield "biases", 1, ParameterCount(0, self.fc1_width)
        yield "feed-forward", 2, ParameterCount(0, self.ffn * hidden)
        if config.bias:
            yield "biases", 1, ParameterCount(hidden, 0)

    def _norm(self) -> Iterator[tuple[str, int, ParameterCount]]:
        for _ in range(2 if self.config.normalization == "LayerNorm" else 1):
            yield "norms", 1, ParameterCount(self.hidden, 0)

    def parameters(self) -> dict[str, ParameterCount]:
        """The parameters of each part."""
        parts: dict[str, ParameterCount] = {}
        for part, _, count in self.tensors():
            parts[part] = summed([parts.get(part, ParameterCount(0, 0)), count])
        return parts


def padded_each(sizes: Iterable[int], dp: int) -> int:
    """Elements of parameters that are padded and cut over dp ranks each by itself."""
    return sum(-(-size // dp) * dp for size in sizes)


def summed(counts: Iterable[ParameterCount]) -> ParameterCount:
    counts = list(counts)
    return ParameterCount(sum(count.whole for count in counts), sum(count.cut for count in counts))


@dataclass(frozen=True)
class PlannedGroup:
    """Trainable parameters of a rank as DeepSpeed's ZeRO lays them end to end, padded.

    Matrices are one group and vectors another, because no weight decay applies to
    these; rows of the vocabulary that are parameters of their own are a third.
    """

    # Elements of each parameter.
    sizes: tuple[int, ...]
    dp: int
    # Whether each parameter is padded and cut by itself, as under ZeRO 3.
    cuts_each: bool = False

    @property
    def padded(self) -> int:
        if self.cuts_each:
            return padded_each(self.sizes, self.dp)
        step = ALIGNMENT * self.dp
        return -(-sum(self.sizes) // step) * step

    def touched(self) -> int:
        """The most elements of whole parameters of which a rank's range has a part."""
        size = self.padded // self.dp
        stops = list(itertools.accumulate(self.sizes))
        sizes = []
        for rank in range(self.dp):
            low, high = rank * size, (rank + 1) * size
            inside = (
                count
                for count, stop in zip(self.sizes, stops, strict=True)
                if stop > low and stop - count < high
            )
            sizes.append(sum(inside))
        return max(sizes)
