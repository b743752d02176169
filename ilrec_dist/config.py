"""The configuration: one frozen dataclass tree, loaded from YAML with dotted overrides; `ilrec config CONFIG` prints it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypeVar

import yaml
from annotated_types import Ge, Gt, Interval, Len, MinLen
from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from ilrec_dist.errors import UserError


def _number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), BeforeValidator(_number)]
Bool = Annotated[bool, Strict()]
Positive = Annotated[Int, Ge(1)]
NonNegative = Annotated[Int, Ge(0)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Interval(ge=0, lt=1)]
Text = Annotated[str, BeforeValidator(str)]  # YAML makes dates of 2018-10-01
T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass of the tree that refuses unknown keys."""
    cls = dataclass(frozen=True)(cls)
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return cls


@section
class SyntheticConfig:
    """The generated catalogue of `data.format: synthetic` (docs/data-formats.md says how it is drawn)."""

    users: Positive = 6000
    items: Positive = 1000
    categories: Positive = 20
    mean_length: Annotated[Float, Ge(3)] = 10.0  # items per user, at least 5
    seed: NonNegative = 0


@section
class DataConfig:
    format: Literal["synthetic", "lcrec", "csv", "parquet", "recbole", "amazon", "movielens", "sequences", "minionerec"] = "synthetic"
    path: Optional[str] = None  # the interactions: a file, or the folder that holds them (docs/data-formats.md)
    items_path: Optional[str] = None  # csv, parquet, sequences: a table with the columns item, title and, if wanted, text; amazon: the metadata
    user_column: str = "user"
    item_column: str = "item"
    time_column: Optional[str] = "timestamp"  # csv, parquet; null: the rows are in chronological order
    min_user_interactions: Positive = 5  # k-core: to the fixed point (generated data are not filtered)
    min_item_interactions: Positive = 5
    split: Literal["leave_one_out", "chronological"] = "leave_one_out"
    split_ratio: Annotated[list[PositiveFloat], Len(3, 3)] = field(default_factory=lambda: [0.8, 0.1, 0.1])  # chronological: shares of interactions
    split_dates: Optional[Annotated[list[Text], Len(2, 2)]] = None  # chronological: where validation and test begin, instead of split_ratio
    max_bad_rows: NonNegative = 0  # malformed rows tolerated; they are listed in rejects.jsonl
    both_directions: Bool = False  # training reads every user's training items backwards too
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@section
class ItemsConfig:
    """Items → token sequences. With `index` the given codes are read; without, they are built by residual quantisation. Or titles, or a token each."""

    form: Literal["semantic", "titles", "atomic"] = "semantic"  # titles: byte-pair pieces and an end token; atomic: one token per item
    index: Optional[str] = None  # a NAME.index.json
    embedding: Literal["text", "cf", "text+cf"] = "text"  # what residual quantisation sees: TF-IDF + SVD of the texts, SASRec's item vectors, or both
    text_model: Optional[str] = None  # folder of a Hugging Face or sentence-embedding model; null: TF-IDF + SVD
    embedding_dim: Positive = 64  # of the SVD
    levels: Annotated[Int, Interval(ge=1, le=8)] = 3
    codes_per_level: Annotated[Int, Interval(ge=2, le=65536)] = 256
    tokenizer: Optional[str] = None  # titles: a tokenizer.json; null: byte-pair encoding learned from the titles
    title_vocab_size: Annotated[Int, Ge(512)] = 8192  # titles: tokens that are learned, at most; the 256 bytes are among them
    title_tokens: Annotated[Int, Interval(ge=1, le=256)] = 32  # titles: longer ones are cut
    collisions: Literal["keep", "refuse", "resolve"] = "keep"  # items that share a token sequence
    seed: NonNegative = 0

    @property
    def from_cf(self) -> bool:
        """Whether the codes are built from the CF model's item vectors, so that the CF stage comes first."""
        return self.index is None and self.form == "semantic" and "cf" in self.embedding


@section
class CFConfig:
    """SASRec with full-softmax cross-entropy (METHOD.md §5)."""

    hidden_size: Positive = 64
    num_layers: Positive = 2
    num_heads: Positive = 2
    dropout: Fraction = 0.2
    max_history: Positive = 50  # items
    epochs: Positive = 30
    patience: Positive = 3  # epochs without a better validation NDCG@10
    batch_size: Positive = 128  # users
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    cf_folds: Annotated[Int, Ge(1)] = 2  # 1 = no cross-fitting: rewards leak the target; for the leakage test only
    split_table: Bool = False  # the item table and its optimizer are split over the launch.workers
    rewards: Literal["in_process", "actor"] = "in_process"
    reward_index: Literal["auto", "scan", "flat", "ivf_pq", "hnsw"] = "auto"  # scan: the whole catalogue, exact; auto: scan up to 65,536 items, else ivf_pq
    reward_shards: Positive = 1  # ranges of the catalogue that separate reward actors may hold
    reward_replicas: Positive = 1  # reward actors (of each shard) that share the requests
    reward_retries: NonNegative = 16  # of a request, after an actor's death or silence
    reward_cache: Bool = False  # keep rewards on disk per (user, position)
    seed: NonNegative = 0


CF_SERVING = ("rewards", "reward_index", "reward_shards", "reward_replicas", "reward_retries", "reward_cache")  # of CFConfig: change no model


@section
class BackboneConfig:
    """A decoder built by Megatron-core from these sizes."""

    num_layers: Positive = 4
    hidden_size: Positive = 128
    num_heads: Positive = 4
    num_kv_heads: Optional[Positive] = None  # None: as many as heads
    ffn_hidden_size: Optional[Positive] = None  # None: 4 × hidden_size
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    activation: Literal["gelu", "swiglu"] = "gelu"
    position_embedding: Literal["learned", "rope"] = "learned"
    bias: Bool = True
    qkv_bias: Bool = False  # biases on query, key and value although `bias` is false (Qwen2)
    qk_norm: Bool = False  # RMS norm of each query and key head (Qwen3)
    head_dim: Optional[Positive] = None  # None: hidden_size / num_heads
    norm_epsilon: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: Optional[PositiveFloat] = None  # Llama 3.1's scaling of low frequencies (8; Llama 3.2: 32)
    dropout: Fraction = 0.1  # on embeddings and residuals; attention itself has none
    tie_embeddings: Bool = True
    init_std: PositiveFloat = 0.02
    vocab_multiple: Positive = 8  # the vocabulary is padded to a multiple of this, whatever tp is


@section
class ObjectiveConfig:
    """METHOD.md §§2–6. `cpo_beta: null` takes the penalty's default (additive 1, multiplicative 0.1)."""

    num_intermediate_layers: Optional[Positive] = None  # m; None: min(3, L // 2)
    negatives_from: Literal["intermediate", "final"] = "intermediate"
    negative_threshold: PositiveFloat = 1.0  # φ
    max_negatives: Annotated[Int, Interval(ge=1, le=128)] = 64  # k
    negative_scope: Literal["valid_next", "item_tokens", "all"] = "valid_next"
    penalty: Literal["additive", "multiplicative"] = "additive"
    cpo_beta: Optional[NonNegativeFloat] = None  # β
    softmax_scope: Literal["all", "valid_next"] = "all"
    cpd_mu: NonNegativeFloat = 0.1  # μ
    distill_scope: Literal["item_tokens", "valid_next", "all"] = "item_tokens"
    crr_lambda: NonNegativeFloat = 0.02  # λ
    reward_floor: PositiveFloat = 1e-4  # ε
    backend: Literal["torch", "reference", "triton"] = "torch"
    workspace_mib: Optional[Positive] = None  # None: 64 on CPU, 1024 on GPU

    @property
    def beta(self) -> float:
        if self.cpo_beta is not None:
            return self.cpo_beta
        return 1.0 if self.penalty == "additive" else 0.1

    def as_sft(self) -> ObjectiveConfig:
        """The same cross-entropy with β = μ = λ = 0 (METHOD.md §6)."""
        return dataclasses.replace(self, cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)


@section
class TrainConfig:
    methods: Annotated[list[Literal["sft", "ilrec"]], MinLen(1)] = field(default_factory=lambda: ["sft", "ilrec"])
    seeds: Annotated[list[NonNegative], MinLen(1)] = field(default_factory=lambda: [0])
    targets: Literal["all", "last"] = "all"
    max_history: Positive = 20  # items of context
    epochs: Positive = 10
    batch_size: Positive = 256  # sequences per optimizer step, over all ranks and accumulation steps
    accumulation_steps: Positive = 1
    learning_rate: PositiveFloat = 2e-3
    min_learning_rate_ratio: Annotated[Float, Interval(ge=0, le=1)] = 0.0  # where the cosine ends
    warmup_steps: NonNegative = 300
    weight_decay: NonNegativeFloat = 0.05
    adam_beta2: Annotated[Float, Interval(gt=0, lt=1)] = 0.98
    clip_norm: NonNegativeFloat = 1.0  # 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_steps: Positive = 200  # steps between checkpoints
    keep_checkpoints: Annotated[Int, Ge(2)] = 2
    validate_epochs: Positive = 1  # epochs between validations
    validation_users: NonNegative = 2000  # a fixed seeded sample; 0: all users
    patience: NonNegative = 0  # validations without a better NDCG@10 before stopping; 0: never stop early


@section
class EvaluationConfig:
    beam: Annotated[Int, Ge(10)] = 20  # Hit@10 needs ten
    exclude_seen: Bool = True
    batch_size: Positive = 64  # users
    examples: NonNegative = 5  # users shown in the report


@section
class LaunchConfig:
    """Where and how the workers run."""

    engine: Literal["ray", "torchrun"] = "ray"
    workers: Positive = 1  # processes over all machines, one per GPU: tp × dp
    tp: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Optional[Positive] = None  # CPU threads per worker; None: the cores shared evenly
    max_failures: NonNegative = 3  # worker-group restarts before the run gives up
    ray_address: Optional[str] = None  # None: a local Ray is started for the run

    @property
    def dp(self) -> int:
        return self.workers // self.tp


@section
class Config:
    name: Annotated[str, MinLen(1)] = "run"
    runs_dir: str = "runs"  # the run's folder is runs_dir/name
    data: DataConfig = field(default_factory=DataConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    cf: CFConfig = field(default_factory=CFConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


class ConfigError(UserError):
    """A key, a type or a value that the tree does not take; names the key, what was expected and the nearest key."""


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), check everything.

    Raises ConfigError with one line that names the file and the key.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; the ones that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: malformed YAML{where}: {getattr(error, 'problem', error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return config_from_dict(tree, " ".join([str(path), *overrides]))


def config_from_dict(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain dict against the tree; `source` is named in errors."""
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error, tree)}") from None
    _check_together(config, source)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The tree, or one section of it, as plain dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that load_config reads back to an equal tree."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping; YAML itself lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.sub=value, such as train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
        node = child
    node[leaf] = value


def _one_line(error: ValidationError, tree: dict[str, Any]) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if isinstance(part, int) or str(part) in _all_names() or _in_tree(tree, first["loc"])]
    key = ".".join(parts) or "top level"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        nearest = difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest key is {nearest[0]!r} (docs/configuration.md lists all)"
    expected = first["msg"][0].lower() + first["msg"][1:]
    return f"key {key!r}: {expected}, found {first['input']!r}"


def _in_tree(tree: Any, loc: tuple[Any, ...]) -> bool:
    for part in loc:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += _all_keys(hints[item.name], f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return keys


def _all_names() -> set[str]:
    return {part for key in _all_keys() for part in key.split(".")}


def _check_together(config: Config, source: str) -> None:
    """What no single key shows: values that are impossible only together."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{source}: key {key!r}: {why}")

    backbone, objective, launch, train = config.backbone, config.objective, config.launch, config.train
    if Path(config.name).name != config.name:
        refuse("name", f"expected the name of a folder, found {config.name!r}; runs_dir says where it lies")
    if config.data.format != "synthetic" and config.data.path is None:
        refuse("data.path", f"data.format {config.data.format!r} needs the path of the data")
    if abs(sum(config.data.split_ratio) - 1) > 1e-6:
        refuse("data.split_ratio", f"the shares {config.data.split_ratio} add up to {sum(config.data.split_ratio):g}, expected 1")
    if backbone.hidden_size % backbone.num_heads:
        refuse("backbone.num_heads", f"{backbone.num_heads} heads do not divide backbone.hidden_size {backbone.hidden_size}")
    kv_heads = backbone.num_kv_heads or backbone.num_heads
    if backbone.num_heads % kv_heads:
        refuse("backbone.num_kv_heads", f"{kv_heads} key/value heads do not divide backbone.num_heads {backbone.num_heads}")
    if launch.workers % launch.tp:
        refuse("launch.workers", f"a world size of {launch.workers} is not a multiple of launch.tp {launch.tp}; choose workers = tp × data-parallel copies")
    if kv_heads % launch.tp:
        refuse("launch.tp", f"tp {launch.tp} does not divide the {kv_heads} attention (key/value) heads of the backbone; choose a tp that does")
    if backbone.vocab_multiple % launch.tp:
        refuse("launch.tp", f"tp {launch.tp} does not divide the vocabulary, padded to a multiple of backbone.vocab_multiple {backbone.vocab_multiple}")
    ffn = backbone.ffn_hidden_size or 4 * backbone.hidden_size
    if ffn % launch.tp:
        refuse("launch.tp", f"tp {launch.tp} does not divide the feed-forward width {ffn}")
    if objective.num_intermediate_layers is not None and objective.num_intermediate_layers >= backbone.num_layers:
        refuse("objective.num_intermediate_layers", f"{objective.num_intermediate_layers} must be below backbone.num_layers {backbone.num_layers}")
    if backbone.num_layers < 2 and "ilrec" in train.methods:
        refuse("backbone.num_layers", "ilrec needs at least 2 layers, one of them intermediate")
    if train.batch_size % (launch.dp * train.accumulation_steps):
        refuse("train.batch_size", f"{train.batch_size} must be a multiple of launch.dp × train.accumulation_steps = {launch.dp * train.accumulation_steps}")
    if config.cf.hidden_size % config.cf.num_heads:
        refuse("cf.num_heads", f"{config.cf.num_heads} heads do not divide cf.hidden_size {config.cf.hidden_size}")
    if config.cf.rewards == "actor" and launch.engine != "ray":
        refuse("cf.rewards", "the reward actor needs launch.engine ray; with torchrun choose in_process")
    if len(set(train.seeds)) != len(train.seeds):
        refuse("train.seeds", f"expected distinct seeds, found {train.seeds}")
    if len(set(train.methods)) != len(train.methods):
        refuse("train.methods", f"expected distinct methods, found {train.methods}")
    codes = config.items.codes_per_level
    if config.items.form == "semantic" and config.items.index is None and codes & (codes - 1):
        refuse("items.codes_per_level", f"expected a power of two, found {codes}; try {1 << (codes.bit_length() - 1)}")
    if config.items.form != "semantic" and config.items.index is not None:
        refuse("items.index", f"an index file gives code tuples, which items.form {config.items.form} has none of; leave one of the two out")
    if config.items.form == "titles":
        if config.items.collisions == "resolve":
            refuse("items.collisions", "items of one title cannot be told apart by other tokens (items.form titles); expected keep or refuse")
        if train.targets != "last":
            refuse("train.targets", "items.form titles takes one target a sequence; expected last")
