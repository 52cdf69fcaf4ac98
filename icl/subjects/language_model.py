"""The language model as a subject: its checkpoints from a folder or the Hub, its loss, its tokens.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from icl.config import Settings
from icl.config.language import TokensConfig
from icl.streams import Stream
from icl.subjects.hub import HubCheckpoints
from icl.subjects.language import AttentionOnlyTransformer, next_token_loss
from icl.subjects.language_checkpoints import FolderCheckpoints, LanguageCheckpoints, load_model
from icl.subjects.tokens import RowBatches, TokenRows, token_rows

_ROWS_FOR_CHANCE = 2**12


class LanguageModelSettings(Settings):
    """Which checkpoints, and which tokens."""

    folder: str | None = Field(
        default=None,
        description="a folder with files such as checkpoint_0000100.pth, or that of a run of this library",
    )
    repository: str | None = Field(
        default=None, description="owner/name of a repository on the Hugging Face Hub, in place of folder"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of the repository; null: main")
    tokens: TokensConfig = Field(default=TokensConfig(), description="where the rows of tokens come from")
    batch_size: int = Field(default=100, ge=1, le=2**24, description="B, rows of a batch")
    max_rows: int | None = Field(default=None, ge=1, description="use the first rows only; null: all")
    shuffle: bool = Field(default=True, description="draw the order of the rows anew for every pass")
    seed: int = Field(default=0, ge=0, description="of that order")

    @model_validator(mode="after")
    def _one_place(self) -> "LanguageModelSettings":
        if (self.folder is None) == (self.repository is None):
            raise ValueError("say where the checkpoints are: either folder, or repository (on the Hugging Face Hub)")
        return self


class LanguageModel:
    """The language model along its checkpoints (`icl.subjects.language`); its settings are those of `LanguageModelSettings`.

    In a sweep file: `subject: {value: language}`.
    """

    Settings = LanguageModelSettings
    reads_ahead = True
    loss = staticmethod(next_token_loss)

    def __init__(self, **settings: Any) -> None:
        given = {name: value.model_dump() if isinstance(value, Settings) else value for name, value in settings.items()}
        self.settings = LanguageModelSettings.parse(given)

    def steps(self) -> list[int]:
        """The checkpoints there are."""
        return self._checkpoints.steps()

    def model(self, step: int) -> AttentionOnlyTransformer:
        """The model at a checkpoint."""
        return load_model(self._checkpoints.path(step)).eval()

    def batches(self, step: int) -> Callable[[int], tuple[Tensor]]:
        """Sampling step -> `(tokens (B, T),)`, the same at every checkpoint."""
        stream = Stream(self.settings.seed, "sampling/order") if self.settings.shuffle else None
        return RowBatches(self.rows, self.settings.batch_size, self._chosen, stream)

    @cached_property
    def reference_loss(self) -> float:
        """The entropy of the tokens' frequencies: no useful model's loss exceeds it."""
        tokens = self.rows[self._chosen[:_ROWS_FOR_CHANCE]][:, 1:].flatten()
        chances = torch.bincount(tokens).double() / len(tokens)
        return -float(torch.special.xlogy(chances, chances).sum())

    @cached_property
    def rows(self) -> TokenRows:
        """All rows of tokens, as long as the model takes them."""
        shape = self.model(self.steps()[0]).shape
        return token_rows(self.settings.tokens, shape.n_ctx, shape.d_vocab)

    @property
    def _chosen(self) -> Tensor:
        return torch.arange(min(len(self.rows), self.settings.max_rows or len(self.rows)))

    @cached_property
    def _checkpoints(self) -> LanguageCheckpoints:
        settings = self.settings
        if settings.folder is not None:
            return FolderCheckpoints(settings.folder)
        assert settings.repository is not None
        return HubCheckpoints(settings.repository, settings.revision)
