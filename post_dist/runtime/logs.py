"""Logging: rank 0 writes to standard error, and every rank to a file in its run folder."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from post_dist.errors import PostDistError
from post_dist.files import make_folder, writing

_NOISY = ("datasets", "DeepSpeed", "deepspeed", "huggingface_hub", "filelock", "torch")


def silence_deepspeed() -> None:
    """Drop DeepSpeed's warnings, which it prints on standard output as soon as it is imported.

    transformers imports it. A filter holds, while a level would be set again by that import.
    """
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def configure_logging(rank: int) -> None:
    """Send this package's log to standard error on rank 0, and silence the libraries."""
    logger = logging.getLogger("post_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # A second command in one process would otherwise print every line twice.
    if rank == 0 and not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed 0.19.8 calls collectives that torch 2.13 has renamed. Users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.")


@contextmanager
def log_file(folder: Path, rank: int) -> Iterator[None]:
    """Also write this rank's log to `logs/rank<N>.log` of a run folder while the body runs."""
    logger = logging.getLogger("post_dist")
    place = folder / "logs" / f"rank{rank}.log"
    # Every rank creates the folder, because its NFS client may remember that there is none.
    make_folder(place.parent)
    with writing(place):
        handler = logging.FileHandler(place)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
    )
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        # Standard error gets the message where the command ends. Only a `PostDistError` may be
        # quoted: the message of any other exception may hold private data.
        name = type(error).__name__
        message = str(error) if isinstance(error, PostDistError) else f"internal error: {name}"
        record = logging.LogRecord(logger.name, logging.ERROR, "", 0, message, None, None)
        handler.handle(record)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
