"""Make the public prompt: on the student, toward the large LLM's zero-shot scores of public text.

It reads no private data, so it has no epsilon. Private tuning that starts from it has less to
learn.

Shapes: N public texts, B texts of a batch, C classes, n prompt tokens, d width, m features of the
head.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.card import write_card
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import PUBLIC_PROMPT, PromptContents, Provenance, write_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.config.stages import WarmStart
from post_dist.conflicts import raise_conflicts
from post_dist.data.order import rank_batches, rows_of_like_length
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.errors import InputError
from post_dist.losses.divergence import softened_kl
from post_dist.losses.transfer import share_matching_offsets
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.classifier import word_scores
from post_dist.models.compiled import compile_layers
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.shard_group import layout_of
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_training import PromptRun, train_prompt
from post_dist.stages.transfer.public_statistics import LEAST_INFORMATION, class_information
from post_dist.stages.warm_start.conflicts import conflicts

log = logging.getLogger(__name__)

_INFERENCE_BATCH = 64
"""Texts of all ranks in one forward pass without gradients."""

_SUMMARY = (
    "A soft prompt for the student that was tuned on public text alone, toward the zero-shot "
    "scores of the large LLM. No private data was read. `head.safetensors` holds an untrained head."
)


@dataclass(frozen=True)
class WarmStartModels:
    """The models of a warm start.

    Attributes:
        teacher: folder of the large LLM.
        student: folder of the model that the prompt is for.
        student_name: its name in the adapter's configuration and on the model card.
        digests: digests of `teacher` and `student`.
    """

    teacher: Path
    student: Path
    student_name: str
    digests: dict[str, str]


def check_warm_start(config: RunConfig, models: WarmStartModels, world: World) -> None:
    """Refuse settings that do not suit the models or the ranks. It reads no weights.

    Raises:
        InputError: there are conflicts; the message lists all of them.
    """
    layout = layout_of(config.engine, world)
    student = read_facts(models.student)
    teacher = read_facts(models.teacher)
    raise_conflicts("warm_start", conflicts(config, student, teacher, layout))


def warm_start(folder: RunFolder, models: WarmStartModels, world: World, resume: str) -> None:
    """Tune the public prompt and write it to `folder.artifact`. `check_warm_start` comes first.

    If teacher or student say the same of all texts, the prompt stays as it was initialized.

    Args:
        folder: the run folder.
        models: student and large LLM.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.

    Raises:
        InputError: the public task cannot be used, or training diverges.
        PrivacyRefused: the public task is marked private.
    """
    config = folder.config
    section = config.warm_start
    if section is None:
        raise InputError("the run file lacks the section warm_start")
    public_task = config.need_task("public_task")
    # Only rank 0 reads the file. The responses of a task that generates text are not needed.
    texts, _ = world.on_main(partial(load_public_texts, public_task, "public_task"))
    task = PromptTask.of_section(public_task, section.init_text)
    # The teacher comes first, alone: the student is loaded when its memory is free again.
    wanted_NC = _wanted_scores(config, section, task, texts, models, world)

    precision = choose_precision(config.engine, world.device)
    model = load_whole(models.student, precision, world.device)
    if config.engine.compile:
        compile_layers(model)
    tokenizer = load_tokenizer(models.student)
    reader = TaskReader(task, tokenizer, masked=model.masked, vocabulary=model.vocabulary_size)
    # A student may have fewer layers than the run file names.
    layers = range(len(model.layers))[-section.head_layers :]
    student = _Student(model, reader, reader.encode(texts), layers, world)
    start_nd = prompt_from_text(model, tokenizer, task.init_text, section.num_virtual_tokens)
    start_nd = start_nd.to(world.device, torch.float32)
    tuned_nd = _train(folder, section, student, start_nd.clone(), wanted_NC, resume)

    # A prompt that says the same of all texts is worse than the words that it started from.
    hidden_Nm = student.hidden(tuned_nd, "public prompt")
    statistics = {
        "teacher_information_nats": class_information(wanted_NC),
        "prompt_information_nats": class_information(student.scores(hidden_Nm)),
    }
    useful = min(statistics.values()) >= LEAST_INFORMATION
    log.info("warm-start: class information of teacher and prompt: %s", statistics)
    if not useful:
        log.warning(
            "warm-start: the scores hardly depend on the text, so the prompt stays as it was "
            "initialized; compare the public text with the task"
        )
        hidden_Nm = student.hidden(start_nd, "initial prompt")
    prompt_nd = tuned_nd if useful else start_nd
    # An owner may tune this head. Its statistics come from public text, so they cost no privacy.
    head = LinearHead.untrained(hidden_Nm, reader.num_classes)
    provenance = Provenance(
        model_name=models.student_name,
        tokenizer=tokenizer_fingerprint(tokenizer),
        parents=models.digests,
        config={
            "warm_start": section.model_dump(mode="json"),
            "public_text": {**statistics, "useful": useful},
        },
    )
    contents = PromptContents(prompt_nd, task, None, head)
    world.on_main(lambda: _write(folder, section, contents, provenance))


@dataclass(frozen=True)
class _Student:
    """The student on the public texts.

    Attributes:
        model: the student.
        reader: the task, bound to its tokenizer.
        examples: the texts.
        layers: the layers that the head reads, the last ones.
        world: the ranks, which all compute.
    """

    model: LanguageModel
    reader: TaskReader
    examples: list[Encoded]
    layers: range
    world: World

    def hidden(self, prompt_nd: torch.Tensor, label: str) -> torch.Tensor:
        """Return the hidden states [N, m] at the answers behind a prompt, which the head reads."""
        return outputs_at_answers(
            self.model,
            self.examples,
            self.reader.template,
            prompt_nd,
            lambda hidden: hidden,
            _inference(self.world, label),
            layers=self.layers,
        )

    @torch.no_grad()
    def scores(self, hidden_Nm: torch.Tensor) -> torch.Tensor:
        """Return the class scores [N, C] of the label words."""
        on_device = hidden_Nm[:, -self.model.width :].to(self.world.device)
        return word_scores(self.model, self.reader.verbalizer)(on_device).cpu()

    def prompted_scores(self, rows: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
        """Return the class scores [B, C] of some texts, with gradients for the prompt."""
        batch = self.reader.collate([self.examples[row] for row in rows]).to(self.world.device)
        logits_BK = self.model(
            batch.input_ids,
            batch.attention_mask,
            prompt_nd,
            batch.answer,
            share_prompt=self.model.shares_prompt,
            tokens=self.reader.verbalizer.tokens,
        )
        return self.reader.verbalizer.scores_of_tokens(logits_BK)


def _inference(world: World, label: str) -> InferenceRun:
    return InferenceRun(-(-_INFERENCE_BATCH // world.size), world, label)


def _wanted_scores(
    config: RunConfig,
    section: WarmStart,
    task: PromptTask,
    texts: list[str],
    models: WarmStartModels,
    world: World,
) -> torch.Tensor:
    """Return the teacher's zero-shot class scores [N, C], shifted to the declared class shares.

    The teacher is not in memory any more afterwards.
    """
    precision = choose_precision(config.engine, world.device)
    teacher = load_sharded(models.teacher, config.engine, precision, world)
    tokenizer = load_tokenizer(models.teacher)
    reader = TaskReader(task, tokenizer, masked=teacher.masked, vocabulary=teacher.vocabulary_size)
    scores_NC = outputs_at_answers(
        teacher,
        reader.encode(texts),
        reader.template,
        None,
        reader.scores,
        _inference(world, "teacher"),
    )
    # A large LLM often prefers one class on all texts. Known shares correct that without labels.
    shares = torch.tensor(section.class_shares or [1.0] * reader.num_classes)
    return scores_NC + share_matching_offsets(scores_NC, shares / shares.sum())


def _train(
    folder: RunFolder,
    section: WarmStart,
    student: _Student,
    prompt_nd: torch.Tensor,
    wanted_NC: torch.Tensor,
    resume: str,
) -> torch.Tensor:
    """Train the prompt until the student's class probabilities are those of the teacher."""
    world = student.world
    optimizer = make_optimizer("adam", [{"params": [prompt_nd], "lr": section.learning_rate}])
    run = PromptRun(
        [prompt_nd], optimizer, section, folder, open_metrics=open_public_metrics, show_loss=True
    )
    lengths = [len(example.token_ids) for example in student.examples]

    def loss_at(step: int) -> torch.Tensor:
        chosen = rows_of_like_length(step, section.batch_size, lengths, folder.config.seed)
        (own,) = rank_batches(chosen, section.batch_size, world.rank, world.size)
        scores_BC = student.prompted_scores(own.rows, prompt_nd)
        wanted_BC = wanted_NC[own.rows].to(world.device)
        return own.weight * softened_kl(wanted_BC, scores_BC, 1.0, None)

    train_prompt(run, loss_at, run.restore_newest(resume, world), world)
    return prompt_nd.detach()


def _write(
    folder: RunFolder, section: WarmStart, contents: PromptContents, provenance: Provenance
) -> None:
    """Write the artifact."""

    def card(artifact: Path) -> None:
        rows: dict[str, Any] = section.model_dump(exclude_defaults=True)
        write_card(
            artifact,
            f"Public prompt for {provenance.model_name}",
            _SUMMARY,
            rows | {"epsilon": "0: no private data was read"},
            library="peft",
            tag="prompt-tuning",
        )

    write_prompt(folder.artifact, contents, provenance, card, kind=PUBLIC_PROMPT)
