"""The teacher of a distillation, and the corpus in its tokens."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.corpus import PackedCorpus, build_corpus
from post_dist.models.compiled import compile_layers
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer
from post_dist.models.model_checks import check_documents_apart
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.zero import shard_share
from post_dist.stages.corpus import corpora_folder
from post_dist.stages.distill.batches import DistillationText, masking_for
from post_dist.stages.distill.conflicts import (
    epoch_conflicts,
    limit_conflicts,
    required_sections,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedTeacher:
    """The teacher of a distillation.

    Attributes:
        folder: its files.
        digest: digest of its files.
        model: the model, perhaps sharded.
        tokenizer: its tokenizer.
        precision: precision of its weights, and of the student's.
    """

    folder: Path
    digest: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision

    def reads(
        self, corpus: PackedCorpus, config: RunConfig, device: torch.device
    ) -> DistillationText:
        """Return the corpus as this model reads it."""
        return DistillationText(corpus, masking_for(self.model, self.tokenizer, config), device)


def load_teacher(
    config: RunConfig, folder: Path, digest: str, world: World
) -> tuple[PackedCorpus, LoadedTeacher]:
    """Read the corpus with the teacher's tokenizer, and load the teacher in shards.

    Args:
        config: the run file.
        folder: the teacher in Hugging Face format.
        digest: digest of its files.
        world: the ranks, which all call this function.

    Raises:
        InputError: the corpus cannot be used, or does not suit `distill.cache_gib`.
    """
    corpus_section, _ = required_sections(config)
    tokenizer = load_tokenizer(folder)
    corpora = corpora_folder(config)
    corpus = build_corpus(corpus_section, tokenizer, corpora, config.seed, world)
    precision = choose_precision(config.engine, world.device)
    if config.distill.cache_gib is not None:
        found = epoch_conflicts(config.distill, corpus.num_training_sequences)
        found += limit_conflicts(config, read_facts(folder), precision)
        raise_conflicts("distill", found)
    model = load_sharded(folder, config.engine, precision, world)
    if config.engine.compile:
        compile_layers(model)
    if corpus_section.separate_documents and not model.masked:
        check_documents_apart(model)
    percent = 100 * shard_share(model)
    log.info("teacher: %d layers, this rank holds %.0f%%", len(model.layers), percent)
    return corpus, LoadedTeacher(folder, digest, model, tokenizer, precision)
