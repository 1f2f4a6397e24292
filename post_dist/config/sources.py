"""The run file's sections that name data: files or hub data sets, and the tasks made of them."""

from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def beside_run_file(path: Path, info: ValidationInfo) -> Path:
    """Read a relative path from the folder of the run file, wherever the command was started."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / path.expanduser()).resolve()
    except RuntimeError as error:  # no such user, or a loop of links
        raise ValueError(f"{path}: {error}") from None


FilePath = Annotated[Path, AfterValidator(beside_run_file)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataSource(Section):
    """A local CSV, JSONL, Parquet or text file, or a data set on the hub."""

    path: FilePath | None = None
    hub: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    """The commit of a hub data set; required with `hub`."""
    hub_split: str = "train"
    text: str = "{text}"
    """How a row's columns make the text, such as '{title} {content}'."""
    max_rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a file) or `hub` (a data set's name)")
        if self.hub and not self.revision:
            raise ValueError("`hub` needs `revision` (a commit), so that the data stay the same")
        return self

    @field_validator("text")
    @classmethod
    def _names_a_column(cls, text: str) -> str:
        if not placeholders(text):
            raise ValueError("names no column; write one in braces, such as '{text}'")
        return text


class Corpus(DataSource):
    """The provider's public text for distillation."""

    sequence_length: Annotated[int, Field(ge=8)] = 512
    max_tokens: PositiveInt | None = None
    held_out_sequences: PositiveInt = 64
    """Sequences kept out of training, for the figures that the student is judged by."""
    separate_documents: bool = True
    """A causal model sees nothing of the documents that stand before a token's own in its sequence."""


class Task(DataSource):
    """A classification task; `name` fills in what it does not say from the named tasks."""

    name: str
    visibility: Literal["private", "public"]
    template: str | None = None
    """What the model reads: holds {text}, and {mask} for a masked model. A public task without one takes the prompt's."""
    label_column: str = "label"
    labels: dict[str, tuple[str, ...]] = {}
    """For each value of the label column, the words that stand for it."""
    allow_multi_token: bool = False
    """Let a label word that is several tokens be judged by its first."""
    response_column: str | None = None
    """The column that holds what is to be written. The task then generates text, and has no classes."""
    max_response_length: PositiveInt = 32
    """Tokens of one response, its end among them; a longer one loses its end."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of one templated text; a longer text loses its beginning, never the template."""
    test_hub_split: str | None = None
    """The hub split that is the sealed test; without it the test rows are drawn by hash."""
    validation_share: Fraction = 0.1
    test_share: Fraction = 0.1
    split_salt: str = "post_dist"

    @property
    def response_length(self) -> int:
        """Most tokens of a response; 0 for a task with classes."""
        return self.max_response_length if self.response_column is not None else 0

    @model_validator(mode="before")
    @classmethod
    def _named_task(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = dict(named_tasks().get(str(fields.get("name")), {}))
        if fields.get("path") is not None:
            for key in (
                "hub",
                "hub_config",
                "revision",
                "hub_split",
                "test_hub_split",
                "text",
                "label_column",
            ):
                known.pop(key, None)
        merged = known | fields
        if isinstance(merged.get("labels"), dict):
            merged["labels"] = {str(label): words for label, words in merged["labels"].items()}
        return merged

    @field_validator("template")
    @classmethod
    def _template_places(cls, template: str | None) -> str | None:
        if template is None:
            return None
        found = placeholders(template)
        if found.count("text") != 1 or set(found) - {"text", "mask"} or found.count("mask") > 1:
            raise ValueError("must hold {text} once, and besides it at most one {mask}")
        return template

    @model_validator(mode="after")
    def _label_words_and_shares(self) -> "Task":
        for label, words in self.labels.items():
            if not words or not all(word.strip() for word in words):
                raise ValueError(f"labels.{label} has an empty list or word")
        if self.response_column is not None and "{mask}" in (self.template or ""):
            raise ValueError("response_column is for causal models; {mask} is for masked ones")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share leave nothing to train on")
        return self


def placeholders(template: str) -> list[str]:
    """The names in braces of a template, in order.

    Raises:
        ValueError: the braces do not pair up.
    """
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"has braces that do not pair up ({error}); write {{{{ for a brace"
        ) from None


@cache
def named_tasks() -> dict[str, dict[str, Any]]:
    """The tasks that the paper names, with their sources, templates and label words."""
    return yaml.safe_load((Path(__file__).parent / "named_tasks.yaml").read_text())
