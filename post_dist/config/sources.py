"""The run file's sections for data: files, hub data sets, and tasks."""

from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from post_dist.config.label_names import MOST_LABEL_CHARACTERS, label_fault
from post_dist.config.sections import (
    FilePath,
    FilePaths,
    Fraction,
    Length,
    PositiveInt,
    Section,
    steers_terminal,
)
from post_dist.config.yaml_files import read_yaml

_NAMED_TASKS = Path(__file__).parent / "named_tasks.yaml"
_SOURCE_FIELDS = (
    "hub",
    "hub_config",
    "revision",
    "hub_split",
    "test_hub_split",
    "text",
    "label_column",
)
"""Fields of a named task that describe its hub data set. A local file replaces all of them."""


class DataSource(Section):
    """A local CSV, TSV, JSONL, Parquet or text file, or a data set on the Hugging Face hub."""

    # Where the examples are.
    path: FilePath | None = None
    """A local file. Give this field or `hub`."""
    hub: str | None = None
    """Name of a data set on the hub."""
    hub_config: str | None = None
    """Configuration of the hub data set, if it has several."""
    revision: str | None = None
    """Commit of a hub data set; required with `hub`."""
    hub_split: str = "train"
    """Split of the hub data set to read."""
    # What is read from each example.
    text: str = "{text}"
    """Template that makes an example's text from its columns, such as '{title} {content}'."""
    max_rows: PositiveInt | None = None
    """Maximum number of examples. Default: all."""

    @property
    def is_private(self) -> bool:
        """Whether the examples are private, so that no message may quote from the file."""
        return False

    @property
    def text_columns(self) -> list[str]:
        """Names of the columns in `text`, in order."""
        return placeholders(self.text)

    @property
    def text_pieces(self) -> list[str]:
        """The parts of `text` before each of its columns, and after the last one."""
        pieces = [""]
        # The two braces that stand for one come without a name.
        for literal, name, _, _ in Formatter().parse(self.text):
            pieces[-1] += literal
            if name is not None:
                pieces.append("")
        return pieces

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
        if any(spec or conversion for _, _, spec, conversion in Formatter().parse(text)):
            raise ValueError("has a name with ':' or '!'; rename the column")
        return text


class Corpus(DataSource):
    """The provider's public text for distillation."""

    # pyrefly: ignore[bad-override]
    path: FilePath | FilePaths | None = None
    """A file, a folder, a pattern such as `data/*.jsonl.gz`, or a list of them: TXT (a document per
    line), JSONL, CSV, TSV or Parquet. All but Parquet may be compressed (.gz, .zst). Give this
    field or `hub`."""
    workers: PositiveInt | None = None
    """Number of processes that tokenize. Default: one per core. The tokens do not depend on it."""
    deduplicate: bool = False
    """Keep only the first of documents with equal text. `max_rows` and `max_tokens` count documents
    before that."""
    sequence_length: Length = 512
    """Tokens of one sequence. Documents are packed into sequences of this length."""
    max_tokens: PositiveInt | None = None
    """Maximum number of tokens to use. Default: all."""
    held_out_sequences: PositiveInt = 64
    """Number of sequences kept out of training, for the student's metrics."""
    separate_documents: bool = True
    """Keep packed documents apart: in a causal model, a token attends only to its own document."""


class Task(DataSource):
    """A task with labeled examples. A name from named_tasks.yaml fills in the missing fields."""

    name: str
    """Name of the task, in tables and reports; or a named task such as `sst2`."""
    visibility: Literal["private", "public"]
    """`private` for `private_task`; `public` for `public_task`. The provider's stages refuse a
    private task."""
    # What the model reads and answers.
    template: str | None = None
    """The input of the model: it holds {text}, and {mask} for a masked model. A public task without
    a template uses the prompt's."""
    label_column: str = "label"
    """Column with the labels."""
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Label words for each value of the label column. Both become part of the prompt's task."""
    allow_multi_token: bool = False
    """Score a label word of several tokens by its first token. Otherwise it is refused."""
    response_column: str | None = None
    """Column with the text to generate. The task then has no classes."""
    user_column: str | None = None
    """Column that names the person of each example. Private tuning then protects all examples of a
    person together, and all of them are in one split."""
    max_response_length: PositiveInt = 32
    """Maximum number of tokens of a response, including the end-of-text token. A longer response is
    cut at its end."""
    # How long a text may be.
    max_length: Length = 128
    """Maximum number of tokens of a text in its template. A longer text is cut at its beginning;
    the template is kept whole."""
    # How the examples are split.
    test_hub_split: str | None = None
    """Hub split to use as the test split. Without it, a hash of the text chooses test examples."""
    validation_share: Fraction = 0.1
    """Fraction of the texts in the validation split, chosen by a hash of the text."""
    test_share: Fraction = 0.1
    """Fraction of the texts in the test split. Not used with `test_hub_split`."""
    split_salt: str = "post_dist"
    """Salt of the hash. Another salt gives other splits."""

    @property
    def is_private(self) -> bool:
        """Whether the examples are private, so that no message may quote from the file."""
        return self.visibility == "private"

    @property
    def response_length(self) -> int:
        """Maximum number of tokens of a response; 0 for a task with classes."""
        return self.max_response_length if self.response_column is not None else 0

    @property
    def hashed_test_share(self) -> float:
        """Fraction of the texts that a hash puts into the test split."""
        return 0.0 if self.test_hub_split is not None else self.test_share

    @property
    def validation_per_training(self) -> float:
        """About how many validation examples there are for each training example."""
        return self.validation_share / (1 - self.validation_share - self.hashed_test_share)

    @model_validator(mode="before")
    @classmethod
    def _named_task(cls, fields: Any) -> Any:
        # pydantic reports a section of another type itself.
        if not isinstance(fields, dict):
            return fields
        known = dict(named_tasks().get(str(fields.get("name")), {}))
        if fields.get("path") is not None:
            for key in _SOURCE_FIELDS:
                known.pop(key, None)
        merged = known | fields
        labels = merged.get("labels")
        if isinstance(labels, dict):
            # YAML reads the label 0 as a number.
            merged["labels"] = {str(label): words for label, words in labels.items()}
        return merged

    @field_validator("template")
    @classmethod
    def _template_places(cls, template: str | None) -> str | None:
        if template is None:
            return None
        if not has_places(template):
            raise ValueError("must hold {text} once, and besides it at most one {mask}")
        if steers_terminal(template, lines=True):
            raise ValueError("holds control characters, which the prompt's receiver would refuse")
        return template

    @model_validator(mode="after")
    def _label_words_and_shares(self) -> "Task":
        for label, words in self.labels.items():
            if not words or not all(word.strip() for word in words):
                raise ValueError(f"labels.{label} has an empty list or word")
            fault = label_fault(label)
            if fault is not None:
                raise ValueError(
                    f"labels has the label {label[:20]!a}, which {fault}; a label is at most "
                    f"{MOST_LABEL_CHARACTERS} printable characters: it becomes part of the prompt"
                )
            if any(map(steers_terminal, words)):
                raise ValueError(f"labels.{label} has a word with control characters")
        if self.response_column is not None and "{mask}" in (self.template or ""):
            raise ValueError("response_column is for causal models; {mask} is for masked ones")
        if self.user_column is not None and not self.is_private:
            raise ValueError("user_column is for private_task; public texts need no protection")
        if self.label_column in self.labels and self.response_column is None:
            # Labels are handed on with the prompt, and this one would be that of a private example.
            raise ValueError(
                f"label_column '{self.label_column}' is also one of the labels: is the first line "
                "of the file an example? Write a line with the names of the columns above it. Is "
                "it repeated below? Delete that row. Or rename the column"
            )
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share leave nothing to train on")
        return self


def placeholders(template: str) -> list[str]:
    """Return the names in braces of a template, in order.

    Raises:
        ValueError: the braces do not pair up.
    """
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"has braces that do not pair up ({error}); write {{{{ for a brace"
        ) from None


def has_places(template: str) -> bool:
    """Return whether a template holds {text} once, {mask} at most once, and no other braces.

    With a second {text}, it would be unclear which one to cut when the text is too long. A place
    with a format, such as {text:>9}, would not be filled in.

    Raises:
        ValueError: the braces do not pair up.
    """
    names = placeholders(template)
    if names.count("text") != 1 or names.count("mask") > 1 or set(names) - {"text", "mask"}:
        return False
    return all(template.count(f"{{{name}}}") == names.count(name) for name in ("text", "mask"))


@cache
def named_tasks() -> dict[str, dict[str, Any]]:
    """Return the paper's tasks by name, with their sources, templates and label words."""
    tasks: dict[str, dict[str, Any]] = read_yaml(_NAMED_TASKS.read_text(), str(_NAMED_TASKS))
    return tasks
