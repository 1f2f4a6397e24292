"""The pages of a finished pipeline: `report.md`, and `report.html` with the plots inside."""

from pathlib import Path

from post_dist.errors import InputError
from post_dist.report.plots import page_plots
from post_dist.report.tables import (
    NOTE,
    markdown_table,
    read_table,
    table_cells,
    table_columns,
    table_title,
)

_TEMPLATE = "page.html.j2"


def finished_evaluation(runs: Path) -> Path:
    """Return the folder of the newest finished evaluation of a run, such as `runs/demo`.

    Raises:
        InputError: no evaluation is finished.
    """
    tables = list(runs.glob("evaluate-*/artifact/table.json"))
    if not tables:
        raise InputError(
            f"{runs} holds no finished evaluation",
            "give the folder runs/NAME that `post-dist pipeline` has written",
        )
    # An evaluation with other settings has a folder of its own, so there may be several.
    newest = max(tables, key=lambda path: path.stat().st_mtime)
    return newest.parent.parent


def write_report(evaluation: Path) -> Path:
    """Write `report.md` and `report.html` beside the stage folders.

    Returns:
        The path of the HTML page.
    """
    table = read_table(evaluation)
    runs = evaluation.parent
    title = f"{runs.name}: {table_title(table)}"
    (runs / "report.md").write_text(f"# {title}\n\n{markdown_table(table)}\n\n{NOTE}\n")

    # Imported here: most commands write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Names of tasks and rows come from run files, so they are escaped.
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    html = templates.get_template(_TEMPLATE).render(
        title=title,
        columns=table_columns(table),
        rows=table_cells(table),
        note=NOTE,
        plots=page_plots(runs, table),
    )
    page = runs / "report.html"
    page.write_text(html)
    return page
