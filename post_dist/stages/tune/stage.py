"""Stage 2, run by the data owner: tune a soft prompt on the student with the private data.

Shapes: n prompt tokens, d width.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import Adapter
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Task
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.data.task_reader import TaskReader
from post_dist.data.tasks import load_examples
from post_dist.files import write_file
from post_dist.models.compiled import compile_layers
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prompt_init import neutral_prompt, prompt_from_text
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.private_process import forgetting_private_data, refuse_connections
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.tune.artifact import write_tuned_prompt
from post_dist.stages.tune.conflicts import conflicts, start_conflicts
from post_dist.stages.tune.effect import report_one_class
from post_dist.stages.tune.tuned_model import TunedModel
from post_dist.stages.tune.without_privacy import tune_without_privacy

log = logging.getLogger(__name__)


def check_tuning(config: RunConfig, private_task: Task, model: TunedModel, world: World) -> None:
    """Refuse a run file that does not suit the model or the data. It reads no weights.

    Args:
        config: the run file.
        private_task: the task and its examples.
        model: the student, or the target for the baseline of full prompt tuning.
        world: the ranks. Rank 0 alone reads the data.

    Raises:
        ArtifactRefused: the public prompt does not belong to the model.
        InputError: there are conflicts; the message lists all of them. Or the data cannot be read.
        PrivacyRefused: the accountants disagree, or another run holds the ledger of the data.
    """
    check_settings(config, model, world)

    def read_data() -> None:
        load_examples(private_task, "train", "private_task")
        if config.privacy.enabled:
            # A search is charged from its first row in the ledger on.
            if config.tune.counts_right:
                load_examples(private_task, "validation", "private_task")
            # Opacus takes seconds to import.
            from post_dist.privacy.private_run import check_private_tuning

            check_private_tuning(config)

    with forgetting_private_data():
        world.on_main(read_data)


def check_settings(config: RunConfig, model: TunedModel, world: World) -> None:
    """Refuse a run file that does not suit the model. It reads no weights and no data.

    Raises:
        ArtifactRefused: the public prompt does not belong to the model.
        InputError: there are conflicts; the message lists all of them.
    """
    facts = read_facts(model.folder)
    layout = Layout(device=world.device.type)
    if model.public_prompt is not None:
        check_belongs(model.public_prompt, facts, load_tokenizer(model.folder))
    found = conflicts(config, facts, layout)
    found += start_conflicts(config, model.public_prompt, facts)
    raise_conflicts("tune", found)


def tune(
    folder: RunFolder, private_task: Task, model: TunedModel, world: World, resume: str
) -> None:
    """Tune a prompt on a model and write it to `folder.artifact`. `check_tuning` comes first.

    Private data stay in one process, so only rank 0 tunes. Without `privacy.enabled` the prompt may
    reveal the private data.

    Args:
        folder: the run folder.
        private_task: the task and its examples.
        model: the model.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.

    Raises:
        InputError: the model and the data do not fit together.
        PrivacyRefused: the accountants disagree, or the budget of the data does not allow the run.
    """
    # A world of one rank: collective calls in the training loop must not wait for other ranks.
    alone = replace(world, size=1)

    def tune_alone() -> None:
        task = load_task(private_task, folder.config, model, alone)
        refuse_connections()
        if model.public_prompt is None:
            task = replace(task, adapter=_persisted_head(folder, task.adapter))
        parameters, statement = _train(folder, task, model.name, alone, resume)
        kind = tuned_kind(folder.config.tune)
        contents = kind.contents(task, parameters, statement)
        write_tuned_prompt(folder, task, contents, model)
        report_one_class(task, contents, alone)

    world.on_main(tune_alone)


def bound_task(
    private_task: Task, config: RunConfig, tuned: TunedModel, world: World
) -> TuningTask:
    """Load the model and bind the task to it, without any examples.

    Args:
        private_task: the task. Its data is not read.
        config: the run file.
        tuned: the model.
        world: this process, alone.

    Raises:
        InputError: the template or a label word does not suit the model.
    """
    section = config.tune
    tokenizer = load_tokenizer(tuned.folder)
    precision = choose_precision(config.engine, world.device)
    model = load_whole(tuned.folder, precision, world.device)
    # The steps of a head read hidden states, and run no layer.
    if config.engine.compile and section.adapter != "head":
        compile_layers(model)
    # The reader binds the task to the model's tokenizer.
    prompt_task = PromptTask.of_section(private_task, section.init_text)
    reader = TaskReader(
        prompt_task, tokenizer, masked=model.masked, vocabulary=model.vocabulary_size
    )
    # The prompt starts from the public one, or from the embeddings of a text.
    if tuned.public_prompt is not None:
        start_nd = tuned.public_prompt.embeddings.to(world.device)
    elif section.adapter == "head" and section.init_text is None:
        # The words of a task in front of a text hide more from a head than they tell it.
        start_nd = neutral_prompt(model, tokenizer, section.num_virtual_tokens)
    else:
        start_nd = prompt_from_text(
            model, tokenizer, prompt_task.init_text, section.num_virtual_tokens
        )
    task = TuningTask(model, reader, [], torch.zeros(0), start_nd)
    adapter = tuned_kind(section).start(task, config, tuned.public_prompt)
    return replace(task, adapter=adapter)


def load_task(private_task: Task, config: RunConfig, tuned: TunedModel, world: World) -> TuningTask:
    """Load the training examples and the model.

    Args:
        private_task: the task and its examples.
        config: the run file.
        tuned: the model.
        world: this process, alone.

    Raises:
        InputError: the model and the data do not fit together.
    """
    loaded = load_examples(private_task, "train", "private_task")
    task = bound_task(private_task, config, tuned, world)
    examples = task.reader.encode(loaded.texts, loaded.responses)
    if task.reader.generates:
        targets = task.reader.responses(examples)
    else:
        targets = torch.tensor(loaded.classes)
    return replace(task, examples=examples, targets=targets, users=loaded.users)


def _persisted_head(folder: RunFolder, adapter: Adapter | None) -> Adapter | None:
    """Return the head that the first start of a run has made, and keep it for later ones.

    Mean and scale of a head may come from texts that the model writes, and another machine may
    write others.
    """
    if not isinstance(adapter, LinearHead):
        return adapter
    # A resumed run must go on with the features that its weights were trained on.
    path = folder.path / "initial_head.safetensors"
    if not path.exists():
        tensors = dict(adapter.tensors)
        write_file(path, lambda partial: save_file(tensors, partial))
    return LinearHead.of_tensors(load_file(path))


def _train(
    folder: RunFolder, task: TuningTask, model_name: str, world: World, resume: str
) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
    """Tune the prompt, privately if the run file enables privacy.

    Returns:
        The tuned parameters, and the privacy statement; None for a run without privacy.
    """
    if folder.config.privacy.enabled:
        from post_dist.privacy.private_run import tune_privately

        return tune_privately(folder, task, world, resume)
    log.info("tune: on %s, without privacy", model_name)
    return tune_without_privacy(folder, task, world, resume), None
