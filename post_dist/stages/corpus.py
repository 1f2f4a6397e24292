"""Tokenize the corpus before any GPU is needed. All students and runs share the result.

It needs the teacher's tokenizer, and none of its weights.
"""

from pathlib import Path

from post_dist.config.schema import RunConfig
from post_dist.data.corpus import check_long_enough, document_separator
from post_dist.data.corpus_result import CorpusResult
from post_dist.data.make_shards import make_shards
from post_dist.data.private_as_public import check_not_private
from post_dist.data.token_shards import read_index
from post_dist.models.load import load_tokenizer, tokenizer_folder


def corpora_folder(config: RunConfig) -> Path:
    """Return the parent of the folders of tokenized corpora, which all runs share."""
    return config.output / "corpora"


def tokenize_corpus(config: RunConfig) -> CorpusResult:
    """Tokenize the corpus of a run file, or find its sealed shards and check them.

    Raises:
        InputError: a section is missing, a file cannot be read, or the text is too short.
        PrivacyRefused: the corpus is, or holds, the private data.
        ArtifactRefused: a shard is not as it was written.
        EnvironmentFault: the hub cannot be reached, the disk is full, or a process has died.
        Interrupted: this process was asked to stop. Finished shards are kept.
    """
    section, teacher = config.need_sections("corpus", "teacher")
    check_not_private(config.private_task, section, "corpus")
    # Of a hub model, only the tokenizer is downloaded.
    tokenizer = load_tokenizer(tokenizer_folder(teacher))
    folder = make_shards(section, tokenizer, document_separator(tokenizer), corpora_folder(config))
    index = read_index(folder)
    # The shards are kept, because another run may hold out fewer sequences.
    check_long_enough(section, index.tokens)
    sequences = index.tokens // section.sequence_length
    return CorpusResult(folder, index.tokens, index.documents, sequences)
