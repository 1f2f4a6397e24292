"""What tokenizing a corpus makes. Loading this file loads no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CorpusResult:
    """A tokenized corpus.

    Attributes:
        path: the folder of its sealed shards.
        tokens: number of tokens.
        documents: number of documents.
        sequences: number of sequences of `corpus.sequence_length` tokens.
    """

    path: Path
    tokens: int
    documents: int
    sequences: int

    def __str__(self) -> str:
        return str(self.path)
