"""Refuse public text that is the private data. Only epsilon may tell of them."""

from pathlib import Path

from post_dist.config.sources import Corpus, DataSource, Task
from post_dist.data.corpus_files import corpus_files
from post_dist.errors import InputError, PrivacyRefused
from post_dist.files import fingerprint


def check_not_private(private: Task | None, public: DataSource | None, where: str) -> None:
    """Refuse a public section that names the private data, or a copy of them.

    A slip of a path would train the provider's models on private examples without any privacy. The
    private file is hashed only if a public file has the same size.

    Args:
        private: the section `private_task`, if the run file has one.
        public: the section `corpus` or `public_task`, if the run file has it.
        where: the name of the public section, for messages.

    Raises:
        PrivacyRefused: it names the private data.
        InputError: the files of the corpus cannot be listed.
    """
    if private is None or public is None:
        return
    found = _same_hub_data(private, public)
    if private.path is not None:
        found = next((str(file) for file in _files(public) if _is_copy(private.path, file)), None)
    if found is not None:
        raise PrivacyRefused(
            f"{where} names the private data: {found} is that of private_task",
            f"the provider's stages read {where} without privacy: name public text there",
        )


def _same_hub_data(private: Task, public: DataSource) -> str | None:
    """Return the name of a hub data set of which both sections read a split."""
    if private.hub is None or public.hub is None or private.hub.lower() != public.hub.lower():
        return None
    # A data set without configurations has one of this name.
    default = "default"
    if (private.hub_config or default) != (public.hub_config or default):
        return None
    own = _splits(private.hub_split) | _splits(private.test_hub_split or "")
    others = _splits(public.hub_split)
    return private.hub if own & others or "all" in own | others else None


def _splits(expression: str) -> set[str]:
    """Return the names of the splits in an expression such as `train[:50%]+test`."""
    return {part.partition("[")[0].strip() for part in expression.split("+")} - {""}


def _files(public: DataSource) -> list[Path]:
    if isinstance(public, Corpus):
        return corpus_files(public)
    return [] if public.path is None else [public.path]


def _is_copy(private: Path, file: Path) -> bool:
    """Return whether a file is the private one or has its contents."""
    try:
        if private.samefile(file):
            return True
        same_size = private.stat().st_size == file.stat().st_size
        return same_size and fingerprint(private) == fingerprint(file)
    except (OSError, InputError):
        # Whoever reads a missing file tells of it.
        return False
