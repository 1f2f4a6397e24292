"""One row of the paper's tables (arXiv 2506.16196): run its stages, and print ours beside the published figures.

python examples/paper/row.py MODEL PRIVATE PUBLIC [--start COMMAND] [OPTIONS of `post-dist pipeline`]
python examples/paper/row.py gpt2_xl sst2 imdb --start "torchrun --nproc-per-node 8 -m post_dist" --set distill.cache=hidden
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
    """What a row changes in the model's run file, as `--set` takes it."""
    changes: dict[str, Any] = {
        "private_task.name": private,
        "public_task.name": public,
        "tune.init_text": task["init_text"],
        "tune.steps": task["epochs"] * task["batches"],
        "privacy.sampling_probability": 1 / task["batches"],
        "privacy.target_delta": task["delta"],
    }
    if "alpha" in row:  # it is not given for all; the run file's default then counts
        changes["transfer.alpha"] = row["alpha"]
    if model in MASKED:
        for role, name in (("private", private), ("public", public)):
            changes[f"{role}_task.template"] = f"{named_tasks()[name]['template']} {{mask}}."
    return [f"--set={place}={json.dumps(value)}" for place, value in changes.items()]


def published_figures(row: dict[str, Any], public: str) -> dict[str, float]:
    """The paper's accuracies in percent, by the names of our rows."""
    pairs = {
        name: row[name] for name in ("student + prompt", "direct transfer", "full prompt tuning")
    }
    pairs["published transfer"] = row["public"][public]
    figures = {"zero-shot": row["zero-shot"]}
    for name, (plain, private) in pairs.items():
        figures |= {name: plain, name + EPSILON: private}
    return figures


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
    if chosen.private not in rows or chosen.public not in rows[chosen.private]["public"]:
        known = (
            f"  {private} {public}" for private, row in rows.items() for public in row["public"]
        )
        sys.exit(
            "\n".join(
                [
                    f"the paper has no row of {chosen.model} for {chosen.private} with {chosen.public}; it has",
                    *known,
                ]
            )
        )
    row = rows[chosen.private]
    changes = settings(
        chosen.model, chosen.private, chosen.public, row, published["tasks"][chosen.private]
    )
    command = [
        *shlex.split(chosen.start),
        "pipeline",
        str(HERE / f"{chosen.model}.yaml"),
        *changes,
        *options,
        "--json",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    figures = published_figures(row, chosen.public)
    print(
        f"{chosen.model}, {chosen.private} with public {chosen.public}: accuracy in percent\n\n{'':40}{'ours':>8}{'paper':>8}"
    )
    for ours in json.loads(done.stdout)["rows"]:
        accuracy, theirs = 100 * ours["accuracy_micro"], figures.get(ours["name"])
        print(
            f"{ours['name']:40}{accuracy:8.2f}"
            + (f"{theirs:8.2f}{accuracy - theirs:+8.2f}" if theirs is not None else "")
        )


if __name__ == "__main__":
    main()
