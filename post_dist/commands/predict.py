"""The commands `predict` and `export`: labels of texts, and a prompt for other software."""

import codecs
import csv
import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_dist import api
from post_dist.commands.options import AsJson, TrustedKeys
from post_dist.commands.printing import print_json
from post_dist.config.precision import PrecisionChoice
from post_dist.errors import InputError, printable
from post_dist.runtime.logs import configure_logging
from post_dist.runtime.stop import listen

if TYPE_CHECKING:
    from post_dist.serving.predictions import ClassPrediction, Predictions, Response


class Format(StrEnum):
    """Format of the printed predictions."""

    jsonl = "jsonl"
    csv = "csv"


class Form(StrEnum):
    """What an exported prompt is for."""

    vllm = "vllm"
    peft = "peft"
    hub = "hub"


PromptFolder = Annotated[
    Path, typer.Argument(metavar="PROMPT", help="The prompt: an artifact of tune or transfer.")
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="DIR", help="Folder or hub name of the prompt's model.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="COMMIT", help="Commit of a hub model.")
]


def predict(  # noqa: PLR0913 - typer reads the options from parameters
    prompt: PromptFolder,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="TEXTS",
            help="A CSV, TSV, JSONL or Parquet file, a .txt file with one text a line, "
            "or - for standard input, one text a line.",
        ),
    ],
    model: ModelOption,
    revision: Revision = None,
    key: TrustedKeys = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the texts in a table; default: text.")
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="One line for each text, as JSON or as CSV.")
    ] = Format.jsonl,
    precision: Annotated[PrecisionChoice, typer.Option(help="Precision of the weights.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 32,
    json_: AsJson = False,
) -> None:
    """Predict the class of each text, or its response, with a prompt and its model."""
    if json_ and format_ is Format.csv:
        raise InputError(
            "--format csv does not go with --json", "--json prints all predictions as one object"
        )
    listen()
    # A prompt that is refused costs no time: its checks need no model.
    loaded = api.load_prompt(prompt, keys=key or ())
    from post_dist.serving.texts import read_texts

    configure_logging(rank=0)
    # Read the texts first, so that a wrong column shows before a model is loaded.
    found = loaded.predict(
        read_texts(texts, column),
        model,
        revision=revision,
        precision=precision,
        batch_size=batch_size,
    )
    # Lines are printed at the end, because texts of like length are computed together.
    if json_:
        print_json({"predictions": list(map(_printed, found))})
    elif format_ is Format.csv:
        _print_csv(found, loaded.task.class_names)
    else:
        for prediction in found:
            print(_json_line(_printed(prediction)))


def export(
    prompt: PromptFolder,
    to: Annotated[
        Form,
        typer.Option(
            help="vllm: requests to a vLLM server. peft: an adapter that names its model. "
            "hub: a folder to upload, with a model card."
        ),
    ],
    model: ModelOption,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to create.")],
    revision: Revision = None,
    key: TrustedKeys = None,
    json_: AsJson = False,
) -> None:
    """Write a prompt in the form that vLLM, PEFT or the Hugging Face hub takes (docs/use.md)."""
    api.load_prompt(prompt, keys=key or ()).export(to.value, model, output, revision=revision)
    if json_:
        files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
        print_json({"format": to, "path": output, "files": files})
    else:
        print(f"wrote {output}")


def _printed(prediction: "ClassPrediction | Response") -> dict[str, Any]:
    """Return the values of a prediction. Scores have the four digits that a reader can use."""
    fields = asdict(prediction)
    if "scores" in fields:
        fields["scores"] = {name: float(f"{p:.4g}") for name, p in fields["scores"].items()}
    return fields


def _json_line(fields: dict[str, Any]) -> str:
    """Return a JSON object whose characters all print, and that a reader of JSON takes as it was.

    A terminal acts on some characters that JSON does not escape, and a model may generate any. Not
    every terminal has all characters.
    """
    has_all = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    line = json.dumps(fields, ensure_ascii=not has_all)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line)


def _print_csv(predictions: "Predictions", class_names: tuple[str, ...]) -> None:
    """Print a header, and a line for each prediction.

    CSV has no escapes, so a file gets the texts as they are, and a terminal what it can show.
    """
    shown = printable if sys.stdout.isatty() else str
    table = csv.writer(sys.stdout, lineterminator="\n")
    if not class_names:
        table.writerow(["response"])
    else:
        names = [shown(f"score {name}") for name in class_names]
        table.writerow(["label", "index", *names])
    for prediction in predictions:
        table.writerow([shown(str(cell)) for cell in _cells(prediction)])


def _cells(prediction: "ClassPrediction | Response") -> list[object]:
    """Return the values of a prediction, with each score in a column of its own."""
    fields = _printed(prediction)
    scores = fields.pop("scores", {})
    return [*fields.values(), *scores.values()]
