"""Stage 2, the owner's: tune a soft prompt on the student with the private data, on one process.

Shapes: B rows, n prompt tokens, d width, C classes.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.task import PromptTask
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.data.order import rows_of_like_length
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.models.classifier import BIAS_SCALE, class_losses
from post_dist.models.facts import read_facts
from post_dist.models.generation import response_losses
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.tuning_task import TuningTask
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.private_metrics import open_private_metrics
from post_dist.stages.prompt_training import PromptRun, train_prompts
from post_dist.stages.tune.conflicts import conflicts

log = logging.getLogger(__name__)

_PRIVATE = "A soft prompt that was tuned with differential privacy; what that covers is below and in `privacy.json`."
_SEEDED = "A soft prompt that is NOT private: it was tuned with noise from a seed, which can be taken off again."
_OPEN = "A soft prompt. It was tuned WITHOUT differential privacy and may reveal its training data."


def tune(
    folder: RunFolder,
    model_folder: Path,
    parents: dict[str, str],
    model_name: str,
    world: World,
    resume: str,
) -> None:
    """Tune a prompt on a model and leave it in `folder.artifact`.

    Runs on rank 0 alone: private data stay in one process. Without `privacy.enabled` what comes out may show the private data.

    Args:
        folder: the run's folder.
        model_folder: the student, or the target for the baseline of full prompt tuning.
        parents: digest of that model.
        model_name: what the adapter's configuration calls it.
        world: the ranks.
        resume: auto or never.
    """
    world.on_main(
        lambda: _tune_alone(
            folder, model_folder, parents, model_name, replace(world, size=1), resume
        )
    )


def _tune_alone(
    folder: RunFolder,
    model_folder: Path,
    parents: dict[str, str],
    model_name: str,
    world: World,
    resume: str,
) -> None:
    section, task_section = folder.config.tune, folder.config.private_task
    if task_section is None or task_section.template is None:
        raise InputError("tune needs the section `private_task`")
    layout = Layout(device=world.device.type)
    raise_conflicts("tune", conflicts(folder.config, read_facts(model_folder), layout))
    tokenizer = load_tokenizer(model_folder)
    examples = load_examples(task_section, "train", "private_task")
    model = load_whole(
        model_folder, choose_precision(folder.config.engine, world.device), world.device
    )
    most = task_section.response_length
    template = Template(
        task_section.template,
        tokenizer,
        task_section.max_length,
        masked=model.masked,
        max_response_length=most,
    )
    task = PromptTask(
        template=task_section.template,
        label_words=tuple(task_section.labels.values()),
        max_length=task_section.max_length,
        allow_multi_token=task_section.allow_multi_token,
        init_text=section.init_text,
        max_response_length=most,
    )
    rows = template.encode(examples.texts, examples.responses)
    material = TuningTask(
        model=model,
        template=template,
        verbalizer=Verbalizer(
            task.label_words, tokenizer, allow_multi_token=task.allow_multi_token
        ),
        rows=rows,
        wanted=template.responses(rows) if most else torch.tensor(examples.classes),
        start_nd=prompt_from_text(model, tokenizer, section.init_text, section.num_virtual_tokens),
    )
    settings: dict[str, Any] = {
        "tune": section.model_dump(mode="json"),
        "split": _split_rule(folder),
    }
    if folder.config.privacy.enabled:
        from post_dist.privacy.trainer import tune_privately  # Opacus takes seconds to import

        parameters, statement = tune_privately(folder, material, world, resume)
        summary = _PRIVATE if statement["private"] else _SEEDED
        settings["privacy"] = folder.config.privacy.model_dump(mode="json", exclude={"ledger"})
    else:
        log.info(
            "tune: %d prompt tokens on %s, without privacy", section.num_virtual_tokens, model_name
        )
        parameters, statement = _tune_openly(folder, material, world, resume), None
        summary = _OPEN
    if len(parameters) > 1:
        task = replace(task, class_biases=tuple((BIAS_SCALE * parameters[1]).tolist()))

    def card(artifact: Path) -> None:
        claim = dict(statement or {"epsilon": "none: tuned without differential privacy"})
        notes = {"What epsilon does not cover": claim.pop("not_covered")} if statement else {}
        plan = (
            folder.config.privacy.model_dump(exclude={"enabled", "ledger"}, exclude_none=True)
            if statement
            else {}
        )
        rows = {**section.model_dump(exclude_none=True), **plan, **claim}
        write_card(
            artifact,
            f"Soft prompt for {model_name}",
            summary,
            rows,
            library="peft",
            tag="prompt-tuning",
            notes=notes,
        )

    contents = PromptContents(parameters[0], task, statement)
    provenance = Provenance(
        model_name=model_name,
        tokenizer=tokenizer_fingerprint(tokenizer),
        parents=parents,
        config=settings,
    )
    write_prompt(folder.artifact, contents, provenance, card)


def _tune_openly(
    folder: RunFolder, material: TuningTask, world: World, resume: str
) -> list[torch.Tensor]:
    """Ordinary training; the losses stay in a file that only the owner can read."""
    section = folder.config.tune
    parameters = material.parameters(section)
    lengths = [len(row.token_ids) for row in material.rows]

    def losses_at(step: int) -> list[torch.Tensor]:
        chosen = rows_of_like_length(step, section.batch_size, lengths, folder.config.seed)
        batch = material.template.collate([material.rows[index] for index in chosen]).to(
            world.device
        )
        wanted = material.wanted[chosen].to(world.device)
        if wanted.dim() == 2:
            return [response_losses(material.model, batch, wanted, prompt=parameters[0]).mean()]
        bias = parameters[1] if len(parameters) > 1 else None
        how: dict[str, Any] = {
            "prompt": parameters[0],
            "bias": bias,
            "share_prompt": material.model.shares_prompt,
        }
        return [class_losses(material.model, material.verbalizer, batch, wanted, **how).mean()]

    optimizer = material.optimizer(section, parameters, section.learning_rate)
    run = PromptRun(
        parameters,
        optimizer,
        section,
        folder,
        open_metrics=open_private_metrics,
        show_loss=False,
    )
    train_prompts([run], losses_at, run.take_up(resume, world), world)
    return [parameter.detach() for parameter in parameters]


def _split_rule(folder: RunFolder) -> dict[str, object]:
    """How rows fall into splits: the rule, never a count, for how many rows there are is private."""
    task = folder.config.private_task
    fields = {"split_salt", "validation_share", "test_share", "test_hub_split"}
    return {"hash": "sha256", **(task.model_dump(include=fields) if task else {})}
