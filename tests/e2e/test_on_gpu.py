"""The program that measures everything on a GPU, tried on a CPU with tiny sizes."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORDS = {
    "tune": ["The student of GPT2-XL, fp32", "dp shared prefix", "dp shared prefix: "],
    "distill": ["published loop fp32", "ours, sampled cache bf16", "ours bf16: "],
    "transfer": ["GPT2-XL and its student", "cached, plain torch bf16", "ours fp32: "],
    "private": ["fp32: 2 steps of 8 gradients", "Epsilon"],
    "large": ["## distill", "## transfer", "## tune", "ours: "],
}
"""Words of each part's page: the steps that it times, and one that it profiles."""
# `large` takes a step of all stages. The other parts run what has tests of its own.
SLOW = ("tune", "distill", "transfer", "private")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_gpu

    environment = dict(os.environ)
    yield on_gpu
    # A part is a process of its own, which would leave none of its variables behind.
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize(
    "part", ["large", *(pytest.param(part, marks=pytest.mark.slow) for part in SLOW)]
)
def test_a_part_measures_what_it_names(tmp_path: Path, on_gpu: ModuleType, part: str) -> None:
    on_gpu.measure(part, tmp_path)
    (page,) = tmp_path.glob("*.md")
    assert page.name.startswith(f"gpu-{part}-")
    text = page.read_text()
    for words in WORDS[part]:
        assert words in text
    assert "nan" not in text


def test_a_part_that_fails_keeps_its_page_and_the_others_run(
    tmp_path: Path, on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "parts.py"
    program.write_text(
        "import sys, time, pathlib\n"
        "part, _, output = sys.argv[1:]\n"
        "page = pathlib.Path(output.partition('=')[2], part)\n"
        "page.write_text('a section')\n"
        "part == 'hangs' and time.sleep(60)\n"
        "sys.exit(part == 'fails')\n"
    )
    monkeypatch.setattr(on_gpu, "__file__", str(program))
    parts = ["fails", "works", "hangs", "late"]
    assert on_gpu.run_parts(parts, tmp_path, minutes=1 / 60) == 3
    assert not (tmp_path / "late").exists()
    for part in ("fails", "works", "hangs"):
        assert (tmp_path / part).read_text() == "a section"
