"""The conflicts of a warm start: settings that do not suit public task, models or ranks."""

from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.runtime.engine_conflicts import engine_conflicts
from post_dist.stages.context_length import context_conflicts


def conflicts(
    config: RunConfig, student: ModelFacts, teacher: ModelFacts, layout: Layout
) -> list[Conflict]:
    """Find what keeps a public prompt from being made.

    Args:
        config: the run file, with the section `warm_start`.
        student: facts of the model that the prompt is for.
        teacher: facts of the large LLM, whose zero-shot scores the prompt learns.
        layout: the ranks of the stage.

    Returns:
        All conflicts.
    """
    task = config.public_task
    section = config.warm_start
    if task is None or section is None:
        return [Conflict("a warm start needs the sections public_task and warm_start", "add them")]
    found = engine_conflicts(config.engine, layout)
    if task.template is None or len(task.labels) < 2:
        found.append(
            Conflict(
                "a warm start asks for the classes of the public text, and public_task has no "
                "template or no labels",
                "give public_task the template and the labels of the private task",
            )
        )
    if section.class_shares and len(section.class_shares) != len(task.labels):
        found.append(
            Conflict(
                f"warm_start.class_shares has {len(section.class_shares)} shares for "
                f"{len(task.labels)} classes",
                "give one share for each label",
            )
        )
    if student.masked != teacher.masked:
        found.append(
            Conflict(
                "student and teacher are not both causal or both masked models",
                "choose a student of the teacher's kind",
            )
        )
    prompt = section.num_virtual_tokens
    found += context_conflicts(
        "the student",
        student.context_length,
        prompt,
        task.max_length,
        "lower warm_start.num_virtual_tokens or public_task.max_length",
    )
    # The teacher reads the texts without a prompt.
    hint = "lower public_task.max_length"
    found += context_conflicts("the teacher", teacher.context_length, 0, task.max_length, hint)
    return found
