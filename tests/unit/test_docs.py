"""The pages for readers: every command is one, every block is valid, and the guides work."""

import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import typer

from post_dist.cli import app
from post_dist.config.schema import RunConfig
from post_dist.config.yaml_files import read_yaml
from post_dist.privacy import accounting

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "ds_configs/README.md"])
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_PROGRAMS = {"cat", "export", "hf", "python3", "source", "ssh-keygen"}
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
COMMAND_LINE = typer.main.get_command(app)
TOPICS = ("cast", "film", "music", "plot")


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> Iterator[Block]:
    for name, text in BLOCK.findall(page.read_text()):
        if language in (None, name):
            yield Block(name, text)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page, without comments and redirections."""
    for block in blocks(page, "bash"):
        lines = block.text.replace("\\\n", " ").splitlines()
        # In a block with its output, commands stand behind a prompt.
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            without_comment = re.sub(r"(^|\s)#.*", "", line)
            for command in without_comment.split(" | "):
                words = shlex.split(command.partition(" > ")[0])
                if words:
                    yield words


def with_pages(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    without_blocks = BLOCK.sub("", page.read_text())
    indented = re.findall(r"\n\n(    .*)", without_blocks)
    assert indented == [], "write code between ``` lines"


@pytest.mark.parametrize("page", with_pages("bash"), ids=name_of)
def test_every_command_exists_with_its_options(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Check the first word of a command, and what it needs to mean something."""
    program, *rest = words
    if Path(program).name == "post-dist":
        parse(rest)
    elif program.startswith("launch/"):
        assert (ROOT / program).exists()
        parse(rest[1:])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[(.*)\]", rest[-1])
        assert set(",".join(named).split(",")) <= {"", *extras["optional-dependencies"]}
    elif program in ("python", "sbatch"):
        script = next(word for word in rest if word.endswith((".py", ".sbatch")))
        # `post-dist init` writes this script from examples/.
        assert (ROOT / script).exists() or (ROOT / "examples" / Path(script).name).exists()
    else:
        assert program in OTHER_PROGRAMS, words


def parse(arguments: list[str]) -> None:
    """Parse the arguments of `post-dist` as a start would do, and run nothing."""
    stand_ins = {"STAGE": "distill"}
    command: Any = COMMAND_LINE
    rest = [stand_ins.get(word, word) for word in arguments]
    while hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, arguments
        command = command.commands[name]
    command.make_context("post-dist", rest)


@pytest.mark.parametrize("page", with_pages("yaml"), ids=name_of)
def test_yaml_blocks_are_parts_of_a_run_file(page: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    whole = read_yaml(WHOLE_RUN, "the whole run")
    for block in blocks(page, "yaml"):
        text = re.sub(r"ssh-ed25519 [^\"]*", PUBLIC_KEY, block.text)
        part = read_yaml(text, name_of(page)) or {}
        part.get("teacher", {}).pop("path", None)
        RunConfig.model_validate(merged(whole, part), context={"folder": tmp_path})


WHOLE_RUN = """
name: whole
teacher: {path: ./teacher}
student: {num_layers: 2}
corpus: {path: corpus.txt}
private_task:
  name: private
  visibility: private
  path: private.csv
  template: "{text}"
  labels: {a: [a], b: [b]}
public_task: {name: public, visibility: public, path: public.csv}
warm_start: {num_virtual_tokens: 10}
tune: {num_virtual_tokens: 10}
"""


def merged(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The whole, with the values of the part where it has any."""
    result = dict(whole)
    for key, value in part.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping) and key != "labels"
        result[key] = merged(inner, value) if both else value
    return result


def test_the_errors_of_the_faq_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "post_dist").rglob("*.py"))
    # Adjacent strings of a message are one text, and quotes inside code are of either kind.
    source = re.sub(r"\"\s*\n\s*f?\"", "", source).replace("`", "'")
    source = source.replace("{FILE_NAME}", "post_dist.json")
    titles = re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(titles) >= 20
    for title in titles:
        for part in re.split(r"'?…'?", title):
            assert part.strip(" ()'") in source, title


SMALLER = {
    "provider.yaml": ("distill.steps=2", "transfer.steps=2"),
    "run.yaml": ("privacy.steps=2", "private_task.max_length=32"),
}
"""Settings that make the runs of the guides short, by the name of the run file."""


class World(NamedTuple):
    """A folder in which the commands of a guide are run."""

    folder: Path
    main: Callable[..., tuple[int, str, str]]
    names: dict[str, str]

    def run(self, words: list[str]) -> str:
        """Run a command of a guide, with the stand-ins of its names; return its standard error."""
        arguments = [self.names.get(word, word) for word in words[1:]]
        for settings in [SMALLER.get(Path(word).name, ()) for word in words]:
            arguments += [f"--set={setting}" for setting in settings]
        code, out, err = self.main(*arguments)
        assert code == 0, (words, out, err)
        assert "{'" not in out, "a dictionary of Python is no answer"
        return err


def write_world(folder: Path) -> None:
    """Write the models and tables that the guides name."""
    tiny.write_model(folder / "model", "llama")
    shutil.copytree(folder / "model", folder / "large-model")
    texts = [text for text, _ in tiny.sentences(240, 1)]
    rows = [f"{text},{TOPICS[row % 4]}" for row, text in enumerate(texts)]
    (folder / "tickets.csv").write_text("\n".join(["body,topic", *rows]) + "\n")
    (folder / "new.csv").write_text("body\na film\n")
    tiny.write_csv(folder / "public.csv", tiny.sentences(60, 2))
    (folder / "corpus.txt").write_text("\n".join(text for text, _ in tiny.sentences(400, 3)))


@pytest.fixture
def world(tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> World:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a film\n")))
    # The ledger of the same table in another world would be found by its anchor.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(accounting, "FINE", 1e-3)
    return World(tmp_path, main, {})


def post_dist_commands(page: str) -> list[list[str]]:
    return [words for words in commands(ROOT / page) if words[0] == "post-dist"]


def test_the_tutorial_and_the_page_on_prompts_work(world: World) -> None:
    said = {words[1]: world.run(words) for words in post_dist_commands("docs/tutorial.md")}
    # What `tune` says comes next is a command that works.
    hint = said["tune"].splitlines()[-1]
    artifact = Path("work/runs/tickets/latest/tune").resolve() / "artifact"
    place = artifact.relative_to(Path.cwd().resolve())
    assert hint == f"post-dist predict {place} NEW.csv --model model --column body"
    assert said["evaluate"].count(" bf16 instructions") == 1
    shutil.copyfile("new.csv", "NEW.csv")
    world.run(shlex.split(hint))
    # A prompt of the tutorial's run stands in for those of the page. vLLM and PEFT run no head.
    world.run(["post-dist", "tune", "work/run.yaml", "--set=tune.adapter=prompt"])
    prompt = "work/runs/tickets/latest/tune/artifact"
    world.names.update({"PROMPT": prompt, "MODEL": "model"})
    shutil.copyfile("new.csv", "texts.csv")
    Path("texts.txt").write_text("a film\n")
    page = ROOT / "docs/use.md"
    for words in commands(page):
        if words[:2] in (["post-dist", "predict"], ["post-dist", "export"]):
            world.run(words)
    for block in blocks(page, "python"):
        code = block.text.replace("PROMPT", prompt).replace("MODEL", "model")
        exec(code, {})


def test_the_two_parties_work(world: World) -> None:
    """The folders that are sent are copied as the guide says, when a command first needs them."""
    page = ROOT / "docs/two-parties.md"
    first, second = (block.text for block in blocks(page, "yaml"))
    run = world.folder / "provider.yaml"
    run.write_text(first)
    for key in ("provider_key", "owner_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-f", key, "-N", ""], check=True)
    sent = {
        "received/student": "runs/offer/latest/distill/artifact",
        "received/prompt": "owner/runs/tickets/latest/tune/artifact",
    }
    for words in commands(page):
        for place, artifact in sent.items():
            if place in words and not Path(place).exists():
                shutil.copytree(artifact, place)
                run.write_text(first + second * (place == "received/prompt"))
        if words[0] == "post-dist":
            world.run(words)


@pytest.mark.slow
def test_the_python_of_the_readme_works(world: World, capsys: pytest.CaptureFixture) -> None:
    tiny.write_run(world.folder)
    (block,) = blocks(ROOT / "README.md", "python")
    small = ['"privacy.declared_examples=160"', '"privacy.steps=2"', '"evaluate.baselines=[]"']
    exec(block.text.replace('["', f'[{", ".join(small)}, "', 1), {})
    assert "transferred" in capsys.readouterr().out
