"""Run one row of the paper's tables (arXiv 2506.16196), and print ours beside the paper's numbers.

python examples/paper/row.py MODEL PRIVATE PUBLIC [--start COMMAND] [OPTIONS]

OPTIONS are those of `post-dist pipeline`. On one machine with eight GPUs:

python examples/paper/row.py gpt2_xl sst2 imdb --start "torchrun --nproc-per-node 8 -m post_dist"
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from post_dist.config.sources import named_tasks

HERE = Path(__file__).resolve().parent
MASKED = {"roberta_base"}
EPSILON = ", epsilon 8"


def settings(
    model: str, private: str, public: str, row: dict[str, Any], task: dict[str, Any]
) -> list[str]:
    """Return what a row changes in the model's run file, as `--set` takes it.

    Args:
        model: the run file's name.
        private: the private data set.
        public: the public data set.
        row: the paper's row.
        task: the paper's settings for the private data set.
    """
    changes: dict[str, Any] = {
        "private_task.name": private,
        "public_task.name": public,
        "tune.init_text": task["init_text"],
        "tune.steps": task["epochs"] * task["batches"],
        "privacy.sampling_probability": 1 / task["batches"],
        "privacy.target_delta": task["delta"],
    }
    # The paper does not give alpha for all rows; the run file's default then counts.
    if "alpha" in row:
        changes["transfer.alpha"] = row["alpha"]
    if model in MASKED:
        for section, name in (("private_task", private), ("public_task", public)):
            changes[f"{section}.template"] = f"{named_tasks()[name]['template']} {{mask}}."
    return [f"--set={place}={json.dumps(value)}" for place, value in changes.items()]


def published_numbers(row: dict[str, Any], public: str) -> dict[str, float]:
    """Return the paper's accuracies in percent, by the names of our rows."""
    numbers = {"zero-shot": row["zero-shot"]}
    pairs = {"published transfer": row["public"][public]}
    for name in ("student + prompt", "direct transfer", "full prompt tuning"):
        pairs[name] = row[name]
    for name, (without_privacy, with_privacy) in pairs.items():
        numbers[name] = without_privacy
        numbers[name + EPSILON] = with_privacy
    return numbers


def comparison_line(name: str, ours: float, paper: float | None) -> str:
    """Return one line of the comparison; the paper lacks some of our rows."""
    line = f"{name:40}{ours:8.2f}"
    if paper is not None:
        line += f"{paper:8.2f}{ours - paper:+8.2f}"
    return line


def check_row(rows: dict[str, Any], model: str, private: str, public: str) -> None:
    """End with a list of the paper's rows where it lacks the chosen one.

    Args:
        rows: the paper's rows of the model.
        model: the chosen model.
        private: the chosen private data set.
        public: the chosen public data set.
    """
    if private in rows and public in rows[private]["public"]:
        return
    lines = [f"the paper has no row of {model} for {private} with {public}; it has"]
    for known_private, row in rows.items():
        for known_public in row["public"]:
            lines.append(f"  {known_private} {known_public}")
    sys.exit("\n".join(lines))


def main() -> None:
    """Run the pipeline and print the comparison."""
    published = yaml.safe_load((HERE / "published.yaml").read_text())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=published["rows"])
    parser.add_argument("private")
    parser.add_argument("public")
    parser.add_argument(
        "--start", default=f"{sys.executable} -m post_dist", help="how post-dist is started"
    )
    chosen, options = parser.parse_known_args()
    rows = published["rows"][chosen.model]
    check_row(rows, chosen.model, chosen.private, chosen.public)
    row = rows[chosen.private]
    task = published["tasks"][chosen.private]

    run_file = str(HERE / f"{chosen.model}.yaml")
    changes = settings(chosen.model, chosen.private, chosen.public, row, task)
    start = shlex.split(chosen.start)
    command = [*start, "pipeline", run_file, *changes, *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)

    numbers = published_numbers(row, chosen.public)
    experiment = f"{chosen.model}, {chosen.private} with public {chosen.public}"
    print(f"{experiment}: accuracy in percent\n\n{'':40}{'ours':>8}{'paper':>8}")
    for ours in json.loads(done.stdout)["rows"]:
        name = ours["name"]
        print(comparison_line(name, 100 * ours["accuracy_micro"], numbers.get(name)))


if __name__ == "__main__":
    main()
