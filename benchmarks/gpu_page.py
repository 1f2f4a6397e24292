"""A page of results that keeps what it has: it is written anew after each section."""

import os
import sys
from pathlib import Path

import torch
from processor import slug

from post_dist.bench.timing import device_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The GPU. Without one, the programs try themselves on the CPU with tiny sizes."""
if DEVICE.type == "cpu":
    # DeepSpeed reads it when it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


class Page:
    """A Markdown page, named by its part and the device.

    Args:
        folder: folder of the page.
        part: part of `on_gpu.py`.
        title: first line of the page.
    """

    def __init__(self, folder: Path, part: str, title: str) -> None:
        name = device_name(DEVICE)
        self.path = folder / f"gpu-{part}-{slug(name)}.md"
        self._sections: list[str] = []
        self.add(
            f"# {title}\n\n"
            f"    python benchmarks/on_gpu.py {part}\n\n"
            f"- Machine: {name}, torch {torch.__version__}, Python {sys.version.split()[0]}.\n"
            "- Models have random weights. The values change neither times nor memory.\n"
        )

    def add(self, section: str) -> None:
        """Print a section of the page, and write the page with it."""
        print(f"{section}\n", flush=True)
        self._sections.append(section)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self._sections))
