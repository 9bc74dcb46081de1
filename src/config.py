"""Every setting of the pipeline, a frozen and validated section for each stage; `src.profiles` fills them in."""

from dataclasses import dataclass, replace

from src.labels import parse_label_map

METHODS = ("full", "lora", "qlora")  # of fine-tuning
POOLINGS = ("encoder_mean", "decoder_eos")  # of the classification head
OPTIMIZERS = ("adamw", "adamw_rms_scaled", "muon", "adafactor_t5", "paged_adamw_8bit")  # src.optimizers.build_optimizer
SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant")  # of the learning rate: src.optimizers.learning_rate_factor


class SettingsError(ValueError):
    """A setting that does not exist or has a value that makes no sense."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Stage 1: articles to token ids."""

    path: str = "hub"  # "sample" (bundled), "hub" (Bloomberg), a Hub id, or a local file or folder
    text_column: str | None = None  # None: the known column of the source
    max_documents: int | None = None  # None: all
    cleaning: str = "default"  # a preset of src.cleaning
    min_words: int = 20  # shorter documents are dropped
    near_duplicate_threshold: float = 0.8  # Jaccard similarity of word 5-grams
    validation_fraction: float = 0.02  # of the documents, by group
    tokenizer: str | None = None  # a folder with one to take as it is, such as a checkpoint to go on from; None: train one
    vocab_size: int = 8_000  # pieces and the 100 sentinels together: of more, a small model sees too few examples
    lowercase: bool = True  # one piece for "Profit", "profit" and "PROFIT": a small model has few examples of each
    tokenizer_documents: int = 20_000  # documents that the tokenizer is trained on, evenly spaced
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_documents is None or self.max_documents > 0, "corpus.max_documents must be positive or None")
        require(0 < self.near_duplicate_threshold <= 1, "corpus.near_duplicate_threshold must lie in (0, 1]")
        require(0 < self.validation_fraction < 0.5, "corpus.validation_fraction must lie in (0, 0.5)")
        require(300 <= self.vocab_size <= 65_536, "corpus.vocab_size must lie in 300..65536: token ids are stored as uint16")


@dataclass(frozen=True, kw_only=True)
class LabelledSettings:
    """Stage 2: labelled sentences to splits without leakage."""

    path: str = "hub"  # "sample", "hub" (Yahoo), a Hub id, or a local file or folder
    text_column: str | None = None
    label_column: str | None = None
    label_map: str | None = None  # "0=bearish,1=bullish,2=neutral"
    validation_path: str | None = None  # a published validation split: becomes the test split
    max_documents: int | None = None
    cleaning: str = "default"
    near_duplicate_ngram: int = 2  # words: one that is changed takes five 5-grams of the few that a sentence has
    near_duplicate_threshold: float = 0.6  # Jaccard similarity of these n-grams
    boilerplate_count: int = 20  # a text seen this often with one label is boilerplate
    split_fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)  # train, validation, test
    overlap_ngram: int = 13  # words shared with the pre-training corpus that count as overlap
    seed: int = 0

    def __post_init__(self) -> None:
        if self.label_map is not None:
            parse_label_map(self.label_map)
        require(len(self.split_fractions) == 3, "labelled.split_fractions must be three numbers: train, validation, test")
        require(abs(sum(self.split_fractions) - 1) < 1e-9, "labelled.split_fractions must add up to 1")
        require(min(self.split_fractions) > 0, "labelled.split_fractions must be positive")
        require(self.max_documents is None or self.max_documents > 0, "labelled.max_documents must be positive or null")
        require(0 < self.near_duplicate_threshold <= 1, "labelled.near_duplicate_threshold must lie in (0, 1]")
        for name in ("boilerplate_count", "overlap_ngram", "near_duplicate_ngram"):
            require(getattr(self, name) > 0, f"labelled.{name} must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The widths of the T5 (arXiv 1910.10683, section 2.1); the vocabulary comes from the tokenizer."""

    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 8
    num_layers: int = 6
    num_decoder_layers: int = 6
    feed_forward_proj: str = "relu"  # "relu" (v1.0) or "gated-gelu" (v1.1)
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.d_model, self.d_kv, self.d_ff, self.num_heads, self.num_layers, self.num_decoder_layers)
        require(min(sizes) > 0, "model widths, heads and layers must be positive")
        require(self.feed_forward_proj in ("relu", "gated-gelu"), "model.feed_forward_proj must be relu or gated-gelu")
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        require(buckets >= 4 and buckets % 2 == 0, "model.relative_attention_num_buckets must be even and at least 4")
        require(farthest > buckets // 2, "model.relative_attention_max_distance must be more than half the number of buckets")
        require(0 <= self.dropout_rate < 1, "model.dropout_rate must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What one run of the training loop needs; stages 3 to 5 extend it."""

    optimizer: str = "adamw_rms_scaled"  # one of OPTIMIZERS
    learning_rate: float = 2e-2
    other_rate: float = 1.0  # of embeddings, norms and position biases, as a share of learning_rate
    schedule: str = "cosine"  # one of SCHEDULES
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    rows_per_step: int = 16  # packed rows in one optimizer step, over all processes
    rows_per_micro_batch: int = 16  # packed rows held in memory at once
    max_steps: int | None = None  # the first budget reached ends the run; at least one is set
    max_epochs: float | None = None
    max_minutes: float | None = None
    evaluate_every: int = 200  # steps
    checkpoint_every: int = 200  # steps
    early_stop_evaluations: int | None = None  # stop after this many evaluations without a new best
    precision: str = "auto"  # "auto", "fp32", "bf16", "fp16"
    compile: bool = False  # compile the blocks: half a minute at the start, then steps are a tenth faster
    cuda_graphs: bool = False  # on one GPU, record a pass once and replay it: it keeps the memory that it takes
    tracker: str | None = None  # "tensorboard", "trackio", ...: also log to it, if it is installed
    seed: int = 0

    def __post_init__(self) -> None:
        budgets = [budget for budget in (self.max_steps, self.max_epochs, self.max_minutes) if budget is not None]
        require(budgets and min(budgets) > 0, "set max_steps, max_epochs or max_minutes, each positive or null")
        for name in ("rows_per_step", "rows_per_micro_batch", "evaluate_every", "checkpoint_every"):
            require(getattr(self, name) > 0, f"{name} must be positive: a number larger than the run's steps stands for never")
        for name in ("optimizer", "full_optimizer"):
            known = getattr(self, name, "adamw") in OPTIMIZERS
            require(known, f"{name} {getattr(self, name, None)!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
        require(self.schedule in SCHEDULES, f"schedule {self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        require(self.rows_per_step % self.rows_per_micro_batch == 0, "rows_per_step must be a multiple of rows_per_micro_batch")
        require(self.precision in ("auto", "fp32", "bf16", "fp16"), "precision must be auto, fp32, bf16 or fp16")
        require(self.learning_rate > 0, "learning_rate must be positive")
        require(self.max_gradient_norm > 0, "max_gradient_norm must be positive: a large number, such as 1e9, clips nothing")
        require(self.early_stop_evaluations is None or self.early_stop_evaluations > 0, "early_stop_evaluations must be positive or null")
        require(self.warmup_steps >= 0 and self.weight_decay >= 0, "warmup_steps and weight_decay must not be negative")
        require(self.other_rate >= 0, "other_rate must not be negative")


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings(TrainingSettings):
    """Stage 3: span corruption (arXiv 1910.10683, section 3.1.4), packed."""

    optimizer: str = "muon"
    learning_rate: float = 3e-2
    other_rate: float = 0.3
    weight_decay: float = 0.02  # with steps of the learning rate's size, projections then settle near the size they start with
    initialisation: str = "informed"  # by src.initialisation; "t5": all at random, as the paper does; or a checkpoint to go on from
    inputs_length: int = 512  # encoder tokens of a packed row
    targets_length: int = 116  # decoder tokens: 114 go with one full window, and rows of several texts need two more
    packing: str = "best_fit"  # "concatenate": windows of the stream of all documents, to compare with
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    labelled_share: float = 0.0  # of the input tokens: sentences that a word list labels, as far as there are (src.distant_supervision)
    validation_rows: int = 256  # packed rows that one evaluation reads

    def __post_init__(self) -> None:
        super().__post_init__()
        is_known = self.initialisation in ("informed", "t5") or "/" in self.initialisation
        require(is_known, "pretraining.initialisation must be informed, t5, or the folder of a checkpoint, with a slash, such as ./mini")
        require(self.packing in ("best_fit", "concatenate"), "pretraining.packing must be best_fit or concatenate")
        require(0 <= self.labelled_share < 1, "pretraining.labelled_share must lie in [0, 1)")
        require(not self.labelled_share or self.packing == "best_fit", "pretraining.labelled_share needs pretraining.packing=best_fit")
        require(0 < self.noise_density < 1, "pretraining.noise_density must lie in (0, 1)")
        for name in ("inputs_length", "targets_length", "validation_rows"):
            require(getattr(self, name) > 0, f"pretraining.{name} must be positive")
        require(self.mean_noise_span_length >= 1, "pretraining.mean_noise_span_length must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FinetuningSettings(TrainingSettings):
    """Stages 4 and 5: one loop, full weights or adapters (LoRA 2106.09685, QLoRA 2305.14314)."""

    method: str = "qlora"  # one of METHODS
    optimizer: str = "adamw"  # adapters start at zero: a step relative to their size would not move them
    full_optimizer: str = "adamw_rms_scaled"  # of method full, and of the control from random initialisation
    full_learning_rate: float = 1e-2
    dropout_rate: float = 0.1
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = True
    use_dora: bool = False
    pooling: str = "encoder_mean"  # one of POOLINGS
    inputs_length: int = 512  # encoder tokens of a packed row
    targets_length: int = 114

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.method in METHODS, "method must be full, lora or qlora")
        require(self.full_learning_rate > 0, "full_learning_rate must be positive")
        require(self.inputs_length >= 16, "inputs_length must be at least 16: the prefix of text to text and some words")
        for name in ("targets_length", "lora_rank"):
            require(getattr(self, name) > 0, f"{name} must be positive")
        require(0 <= self.dropout_rate < 1, "dropout_rate must lie in [0, 1)")
        require(self.pooling in POOLINGS, "pooling must be encoder_mean or decoder_eos")

    def with_method(self, method: str) -> "FinetuningSettings":
        """The same run by another method, with the optimizer and rate that suit it."""
        if method != "full":
            return replace(self, method=method)
        return replace(self, method=method, optimizer=self.full_optimizer, learning_rate=self.full_learning_rate)

    def for_random_start(self) -> "FinetuningSettings":
        """The same run of all weights from random ones, at one rate: a lower one for embeddings saves only what pre-training taught."""
        return replace(self.with_method("full"), other_rate=1.0)

    def with_learning_rate(self, learning_rate: float) -> "FinetuningSettings":
        """The same run at another rate, whichever method it is by."""
        return replace(self, learning_rate=learning_rate, full_learning_rate=learning_rate)
