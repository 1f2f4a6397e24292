"""Stage 3, the provider's: carry a soft prompt from the student to the large LLM, with public text alone.

Nothing here can reach private data: the stage is handed no private section, and reads no label column.
Shapes: N public rows, B rows of a step, K scores (vocabulary or classes), n prompt tokens, d width.
"""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import SoftPromptArtefact, read_prompt, write_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.data.order import rows_of_like_length, shares
from post_dist.data.public_text import load_public_texts
from post_dist.data.template import Template, Verbalizer
from post_dist.errors import ArtefactRefused, InputError
from post_dist.losses import proxy_logits, published_transfer_loss, share_matching_offsets, softened_kl
from post_dist.models.answers import answers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.sharded import load_sharded
from post_dist.models.soft_prompt import check_room, prompt_from_text
from post_dist.runtime.distributed import World, choose_precision
from post_dist.stages.prompt_training import train_prompt

log = logging.getLogger(__name__)


def transfer(folder: RunFolder, teacher_folder: Path, student_folder: Path, prompt_folder: Path, world: World, resume: str) -> None:
    """Train a prompt for the target and leave it in `folder.artifact`.

    Args:
        folder: the run's folder; its config has no private section.
        teacher_folder: the target.
        student_folder: the model that the source prompt was tuned on.
        prompt_folder: the source prompt, from the owner; checked before it is used.
        world: the ranks.
        resume: auto or never.

    Raises:
        ArtefactRefused: the prompt fails its checks, or does not belong to these models.
        PrivacyRefused: the public task is marked private.
    """
    config, section = folder.config, folder.config.transfer
    if config.public_task is None:
        raise InputError("transfer needs the section `public_task`")
    texts = load_public_texts(config.public_task, "public_task")
    source_prompt = read_prompt(prompt_folder)
    tokenizer = load_tokenizer(teacher_folder)
    precision = choose_precision(config.engine, world.device)
    student = load_whole(student_folder, precision, world.device)
    target = load_sharded(teacher_folder, config.engine, precision, world)
    check_belongs(source_prompt, student, target, teacher_folder, student_folder)

    task = source_prompt.task
    num_virtual_tokens = len(source_prompt.embeddings)
    template = Template(config.public_task.template or task.template, tokenizer, task.max_length, masked=target.masked)
    verbalizer = Verbalizer(task.label_words, tokenizer, allow_multi_token=task.allow_multi_token)
    check_room(target, num_virtual_tokens, task.max_length)
    rows = template.encode(texts)
    lengths = [len(row.token_ids) for row in rows]
    scores = verbalizer.scores if section.scores == "classes" else torch.Tensor.detach

    def biased_scores(logits_BV: torch.Tensor) -> torch.Tensor:
        return scores(verbalizer.lift(logits_BV, task.class_biases))

    source_nd = source_prompt.embeddings.to(world.device)
    log.info("transfer: %d public texts, objective %s on the %s", len(rows), section.objective, section.scores)

    # Three of the four forwards of the loss do not depend on the prompt that is trained: once is enough.
    common = {"batch_size": section.batch_size, "world": world}
    source_NK = answers(student, rows, template, None, scores, label="student", **common)  # type: ignore[arg-type]
    source_prompted_NK = answers(student, rows, template, source_nd, biased_scores, label="student + prompt", **common)  # type: ignore[arg-type]
    target_NK = answers(target, rows, template, None, scores, label="target", **common)  # type: ignore[arg-type]

    offsets = torch.zeros(1)
    if section.match_class_shares:
        offsets = share_matching_offsets(proxy_logits(source_NK, source_prompted_NK, target_NK, section.proxy_lambda), source_prompted_NK)
        log.info("transfer: class offsets %s match the prompted student's shares", [round(float(offset), 3) for offset in offsets])
    offsets = offsets.to(world.device)

    text_nd = prompt_from_text(target, tokenizer, task.init_text, num_virtual_tokens)
    start_nd = torch.lerp(text_nd, source_nd, section.trained_share)
    prompt_nd = start_nd.to(world.device, torch.float32).clone()
    optimizer = torch.optim.Adam([prompt_nd], lr=section.learning_rate)

    def loss_at(step: int) -> torch.Tensor:
        (share,) = shares(rows_of_like_length(step, section.batch_size, lengths, config.seed), section.batch_size, world.rank, world.size)
        chosen = share.rows
        device = world.device
        batch = template.collate([rows[index] for index in chosen]).to(device)
        logits = target(batch.input_ids, batch.attention_mask, prompt_nd, batch.answer)
        prompted_BK = verbalizer.scores(logits) if section.scores == "classes" else logits
        source_BK, source_prompted_BK, target_BK = (values[chosen].to(device) for values in (source_NK, source_prompted_NK, target_NK))
        if section.objective == "published":
            weights = {"alpha": section.alpha, "temperature": section.temperature}
            return share.weight * published_transfer_loss(source_BK, source_prompted_BK, target_BK, prompted_BK, **weights)
        wanted_BK = proxy_logits(source_BK, source_prompted_BK, target_BK, section.proxy_lambda) + offsets
        return share.weight * softened_kl(wanted_BK, prompted_BK, section.temperature)

    train_prompt([prompt_nd], loss_at, optimizer, section, folder, world, resume, metrics_name="metrics.jsonl", show_loss=True)
    # What the biases of the source prompt do is in the loss, and so in the new prompt.
    own_task = replace(task, class_biases=())

    name = config.teacher.path if config.teacher and not Path(config.teacher.path).is_absolute() else teacher_folder.name

    def card(artifact: Path) -> None:
        summary = "A soft prompt that was transferred from a student with public text alone (POST)."
        epsilon = "none: the source prompt is not private" if source_prompt.epsilon is None else source_prompt.epsilon
        settings = section.model_dump() | {"epsilon": epsilon}
        write_card(artifact, f"Soft prompt for {name}", summary, settings, library="peft", tag="prompt-tuning")

    made = (prompt_nd, own_task, name, source_prompt.privacy)
    lineage = {"source prompt": source_prompt.manifest.digest, **source_prompt.manifest.parents}
    settings = {"transfer": section.model_dump(mode="json"), "task": asdict(own_task)}
    fingerprint = tokenizer_fingerprint(tokenizer)
    world.on_main(lambda: write_prompt(folder.artifact, *made, card=card, parents=lineage, config=settings, tokenizer=fingerprint))


def check_belongs(
    prompt: SoftPromptArtefact, student: LanguageModel, target: LanguageModel, teacher_folder: Path, student_folder: Path
) -> None:
    """Check that a prompt, its student and the target fit together.

    Raises:
        ArtefactRefused: widths or tokenizers differ.
    """
    width = prompt.embeddings.shape[1]
    for name, model in (("student", student), ("target", target)):
        if model.width != width:
            raise ArtefactRefused(f"the prompt has vectors of width {width}, the {name} of width {model.width}")
    if student.masked != target.masked:
        raise ArtefactRefused("student and target are not both causal or both masked models")
    for folder in (student_folder, teacher_folder):
        if tokenizer_fingerprint(load_tokenizer(folder)) != prompt.manifest.tokenizer:
            raise ArtefactRefused(f"the tokenizer of {folder} is not the one that the prompt was tuned with")
