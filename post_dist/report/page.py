"""The pages of a finished pipeline: `report.md`, and `report.html` with its charts inside."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from post_dist.admission.refusal import refusing
from post_dist.artifacts.card import markdown_text
from post_dist.artifacts.evaluation_table import TABLE_FILE
from post_dist.config.yaml_files import write_yaml
from post_dist.errors import InputError, PostDistError, command_line
from post_dist.files import write_file
from post_dist.losses.metric_labels import METRIC_LABELS
from post_dist.report.lineage import PREFIX_TUNING, ReportedArtifact, lineage, settings_of
from post_dist.report.tables import (
    NOTE,
    markdown_table,
    read_table,
    table_cells,
    table_columns,
    table_title,
)
from post_dist.runtime.metric_log import read_metric_log
from post_dist.runtime.private_process import owner_only

_TEMPLATE = "page.html.j2"
_ALONE = ("PROMPT_TUNING", PREFIX_TUNING)
"""What PEFT runs without anything in front of it, by PEFT's names."""
_MOST_METRICS_BYTES = 256 << 20
"""Largest log of metrics that is drawn; a million steps have about 150 MB."""


def finished_evaluation(runs: Path) -> Path:
    """Return the folder of the newest finished evaluation of a run, such as `runs/demo`.

    Raises:
        InputError: no evaluation is finished.
    """
    tables = list(runs.glob(f"evaluate-*/artifact/{TABLE_FILE}"))
    if not tables:
        raise InputError(
            f"{runs} holds no finished evaluation",
            "give the folder runs/NAME that `post-dist pipeline` has written",
        )
    # An evaluation with other settings has a folder of its own, so there may be several.
    newest = max(tables, key=lambda path: path.stat().st_mtime)
    return newest.parent.parent


def write_report(evaluation: Path) -> Path:
    """Write `report.md` and `report.html` beside the stage folders, for their owner alone.

    Returns:
        The path of the HTML page.

    Raises:
        ArtifactRefused: the evaluation, or a file that the page shows, is not what the stages
            write. Another party may have sent it.
        InputError: the folder cannot be written to.
        EnvironmentFault: the disk is full.
    """
    runs = evaluation.parent
    page = runs / "report.html"
    # The scores come from private data, and no epsilon covers them.
    with owner_only():
        with refusing(evaluation):
            table = read_table(evaluation)
            made = lineage(evaluation)
            html = _html(evaluation, table, made)
            markdown = _markdown(runs.name, table, made)
        # New files take the place of old ones, which others may be able to read.
        write_file(runs / "report.md", lambda path: path.write_text(markdown))
        write_file(page, lambda path: path.write_text(html))
    return page


def _markdown(name: str, table: Mapping[str, Any], made: Sequence[ReportedArtifact]) -> str:
    from post_dist.report.verdict import verdict_of

    verdict = verdict_of(table, made)
    paragraphs = [
        f"# {markdown_text(f'{name}: {table_title(table)}')}",
        markdown_text(" ".join([f"{verdict.headline}.", *verdict.sentences, verdict.privacy])),
        markdown_table(table),
        NOTE,
    ]
    return "\n\n".join(paragraphs) + "\n"


def _html(evaluation: Path, table: Mapping[str, Any], made: Sequence[ReportedArtifact]) -> str:
    # Imported here: most commands write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from post_dist.report.charts import interval_chart, privacy_chart
    from post_dist.report.verdict import references, row_notes, verdict_of

    verdict = verdict_of(table, made)
    compared = references(table, settings_of(evaluation))
    zero_shot = next((each for each in compared if "LLM" in each.name), None)
    # Names of tasks and rows come from run files, so they are escaped.
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(_TEMPLATE).render(
        run=evaluation.parent.name,
        title=f"{evaluation.parent.name}: {table_title(table)}",
        version=version("post_dist"),
        verdict=verdict,
        columns=table_columns(table),
        rows=table_cells(table),
        note=NOTE,
        made=made,
        accuracies=interval_chart(table, row_notes(table), compared, verdict.row),
        privacy=privacy_chart(table, zero_shot),
        budget=_budget(made),
        curves=_curves(evaluation.parent, made),
        use=_use(verdict.row, made),
        settings=_settings(made),
    )


def _printable(value: Any) -> Any:
    """Replace what a text from a file could do to a page or a terminal, except line breaks."""
    if type(value) is not str:
        return value
    kept = [each if each.isprintable() or each == "\n" else " " for each in value]
    return "".join(kept)


def _curves(runs: Path, made: Sequence[ReportedArtifact]) -> list[Any]:
    """Draw the losses of the provider's stages that the table rests on."""
    from post_dist.report.charts import loss_chart

    curves = []
    for each in made:
        # The owner's metric logs have another name and stay out: the other party may see the page.
        if each.folder is None or each.folder.parent.parent != runs:
            continue
        path = each.folder.parent / "metrics.jsonl"
        if path.is_file() and path.stat().st_size <= _MOST_METRICS_BYTES:
            curves.append(loss_chart(each.title, read_metric_log(path), METRIC_LABELS))
    return [curve for curve in curves if curve is not None]


def _budget(made: Sequence[ReportedArtifact]) -> dict[str, Any] | None:
    """Return what the private data set has spent, or None if its ledger is not here.

    The dictionary is that of `post-dist budget`, or `problem` if the ledger is refused.
    """
    for each in made:
        if not each.by_owner or each.folder is None or not each.privacy:
            continue
        path = _ledger(settings_of(each.folder.parent))
        if path is None or not path.is_file():
            continue
        from post_dist.privacy.budget import budget_of  # takes a second

        try:
            return budget_of(path, None)
        except PostDistError as error:
            return {"problem": str(error).splitlines()[0]}
    return None


def _ledger(settings: Mapping[str, Any]) -> Path | None:
    """Return the path of the ledger that a tuning run has used."""
    from pydantic import ValidationError

    from post_dist.config.schema import RunConfig
    from post_dist.privacy.ledger import ledger_path

    try:
        return ledger_path(RunConfig.model_validate(settings))
    except (ValidationError, PostDistError):
        # An old version may have written other fields.
        return None


def _use(row: str, made: Sequence[ReportedArtifact]) -> dict[str, Any] | None:
    """Return how to use the prompt of a row: its folder, in the forms that the page needs."""
    for each in made:
        if each.role != row or each.folder is None or not each.intact:
            continue
        return {
            "command": command_line(
                "post-dist", "predict", each.folder, "--model", "DIR", "texts.csv"
            ),
            "literal": repr(str(each.folder)),
            "masked": each.adapter.get("task_type") != "CAUSAL_LM",
            # PEFT runs all of a prompt that has nothing behind it, and all of a prefix.
            "alone": each.adapter.get("peft_type") in _ALONE and not each.has_head,
            "size": each.vectors,
            "unit": _unit(each),
            "model": "the student" if each.by_owner else "the large LLM",
        }
    return None


def _unit(made: ReportedArtifact) -> str:
    """Return what the size of a prompt counts."""
    is_prefix = made.adapter.get("peft_type") == PREFIX_TUNING
    return "virtual tokens in every layer" if is_prefix else "prompt vectors"


def _settings(made: Sequence[ReportedArtifact]) -> list[dict[str, str]]:
    """Return the settings of each artifact as YAML. Manifests hold nothing of private data."""
    settings = []
    for each in made:
        if each.config:
            settings.append({"title": each.title, "text": write_yaml(dict(each.config))})
    return settings
