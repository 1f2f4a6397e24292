"""The whole pipeline on small models, run by the command line with real processes and launchers."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from started import Command

from post_dist import load_prompt
from post_dist.artifacts.manifest import read_manifest
from post_dist.artifacts.prompt import read_prompt
from post_dist.config.assets import asset
from post_dist.config.load import load_run
from post_dist.data.tasks import load_examples
from post_dist.errors import EnvironmentFault
from post_dist.models.load import load_whole, weights_of
from post_dist.stages.distill import stage as distill
from post_dist.stages.evaluate.metrics import classification_metrics

ROWS = [
    "zero-shot",
    "majority class",
    "TF-IDF + logistic regression",
    "student + prompt",
    "direct transfer",
    "published transfer",
    "transferred",
    "proxy-tuning",
    "full prompt tuning",
]
CPU = torch.device("cpu")
PROXY = ("--set=transfer.objective=proxy", "--set=transfer.scores=classes")
SIGNATURE = "????????"
"""Pattern of the hash that ends the name of a run's folder."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, post_dist: Callable) -> Path:
    """A folder in which the pipeline has run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    run = tiny.write_run(folder)
    done = post_dist("pipeline", run, *PROXY, "--json")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert [row["name"] for row in table["rows"]] == ROWS
    for row in table["rows"]:
        assert row["interval_95"][0] <= row["accuracy_micro"] <= row["interval_95"][1]
    assert Path(table["report"]).is_file()
    return folder


def state(folder: Path) -> dict[str, str]:
    """Return the hash of every file by its path."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digests[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def artifact(folder: Path, stage: str) -> Path:
    """Return the one artifact of a stage."""
    (found,) = folder.glob(f"runs/tiny/{stage}-{SIGNATURE}/artifact")
    return found


def test_what_is_finished_is_not_run_again(finished: Path, post_dist: Callable) -> None:
    before = state(finished / "runs")
    done = post_dist("pipeline", finished / "run.yaml", *PROXY)
    assert done.returncode == 0
    assert " starts in " not in done.stderr
    after = state(finished / "runs")
    assert after.keys() == before.keys()
    changed = {path for path, digest in after.items() if before[path] != digest}
    assert changed <= {
        str(finished / "runs/tiny/report.md"),
        str(finished / "runs/tiny/report.html"),
    }


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path)
    code, _, err = main("distill", run)
    assert code == 0, err
    place = artifact(tmp_path, "distill").parent
    shutil.rmtree(place / "artifact")
    before = state(place)
    with (place / "lock").open() as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        code, _, err = main("distill", run)
    assert (code, state(place)) == (3, before)
    assert f"another process works in {place}" in err
    assert main("distill", run)[0] == 0


def test_a_page_is_written_again(finished: Path, main: Callable) -> None:
    page = finished / "runs/tiny/report.html"
    page.unlink()
    code, out, err = main("report", finished / "runs/tiny")
    assert (code, out) == (0, f"{page}\n"), err
    assert "transferred" in page.read_text()


def test_another_table_of_the_same_prompts_asks_no_model_again_and_is_counted(
    finished: Path, main: Callable
) -> None:
    before = state(finished / "runs/tiny/answers")
    command = ("pipeline", finished / "run.yaml", *PROXY, "--json")
    tables = []
    for baselines in ("[]", "[published transfer]", "[]"):
        _, out, _ = main(*command, f"--set=evaluate.baselines={baselines}")
        tables.append(json.loads(out))
    assert state(finished / "runs/tiny/answers") == before
    assert len(before) == 7  # of two models without a prompt, and of five prompts
    readings = [table["test_readings"] for table in tables]
    assert readings[0] > 1
    assert readings[1] == readings[0] + 1
    assert readings[2] == readings[0], "a finished table is no new reading"
    lines = (finished / "private.csv.test_readings.jsonl").read_text().splitlines()
    evaluations = {json.loads(line)["evaluation"] for line in lines}
    assert len(lines) == len(evaluations) >= readings[1]
    by_name = {row["name"]: row for row in tables[1]["rows"]}
    for row in tables[0]["rows"]:
        assert by_name[row["name"]] == row
    on_validation = ("--set=evaluate.baselines=[]", "--set=evaluate.split=validation")
    _, out, _ = main(*command, *on_validation)
    validation = json.loads(out)
    assert "test_readings" not in validation
    assert len(state(finished / "runs/tiny/answers")) == len(before) + 5


@pytest.mark.parametrize(
    ("stage", "model", "row"),
    [
        ("tune", "runs/tiny/distill-????????/artifact", "student + prompt"),
        ("transfer", "teacher", "transferred"),
    ],
)
def test_predictions_are_those_of_the_table(
    finished: Path, main: Callable, tmp_path: Path, stage: str, model: str, row: str
) -> None:
    config = load_run(finished / "run.yaml")
    examples = load_examples(config.private_task, "test", "private_task")
    texts = tmp_path / "texts.csv"
    tiny.write_csv(texts, [(text, 0) for text in examples.texts])
    (folder,) = finished.glob(model)
    prompts = list(finished.glob(f"runs/tiny/{stage}-{SIGNATURE}/artifact"))
    if stage == "transfer":
        # The other one is the baseline `published transfer`.
        settings = [read_prompt(each).manifest.config["transfer"] for each in prompts]
        prompts = [prompts[[each["objective"] for each in settings].index("proxy")]]
    (prompt,) = prompts
    command = ("predict", prompt, texts, f"--model={folder}", "--precision=fp32")
    code, out, err = main(*command)
    assert code == 0, err
    predictions = [json.loads(line) for line in out.splitlines()]
    assert {each["label"] for each in predictions} <= {"0", "1"}
    # The command line rounds scores, and rounded scores of two texts may be equal.
    exact = load_prompt(prompt).predict(examples.texts, str(folder), precision="fp32")
    assert [each["label"] for each in predictions] == [each.label for each in exact]
    scores = np.array([list(each.scores.values()) for each in exact])
    found = classification_metrics(scores, np.array(examples.classes))
    _, out, _ = main("pipeline", finished / "run.yaml", *PROXY, "--json")
    (wanted,) = [each for each in json.loads(out)["rows"] if each["name"] == row]
    for name in ("accuracy_micro", "accuracy_macro", "auc", "n"):
        assert found[name] == wanted[name]


def test_prompts_name_their_model_and_no_path(finished: Path) -> None:
    student = artifact(finished, "distill").parent.name
    for pattern, name in (("tune-????????", student), ("t*", "teacher")):
        for prompt in finished.glob(f"runs/tiny/{pattern}/artifact"):
            if pattern == "t*" and re.fullmatch(r"tune-\w{8}", prompt.parent.name):
                continue
            settings = json.loads((prompt / "adapter_config.json").read_text())
            assert settings["base_model_name_or_path"] == name
            for file in prompt.iterdir():
                assert str(finished).encode() not in file.read_bytes()


def test_a_prompt_is_refused_on_the_other_model(finished: Path, main: Callable) -> None:
    student = artifact(finished, "distill")
    tuned = artifact(finished, "tune")
    transferred = next(finished.glob(f"runs/tiny/transfer-{SIGNATURE}/artifact"))
    texts = finished / "private.csv"
    code, out, err = main("predict", tuned, texts, f"--model={finished / 'teacher'}")
    assert (code, out) == (4, "")
    assert "was tuned on another model" in err
    code, out, err = main("predict", transferred, texts, f"--model={student}")
    assert (code, out) == (4, "")
    assert "was transferred from" in err


def test_the_transferred_prompt_gives_peft_the_same_logits(finished: Path) -> None:
    from peft import PeftModel

    for folder in finished.glob("runs/tiny/transfer-*/artifact"):
        prompt = read_prompt(folder)
        model = load_whole(finished / "teacher", "fp32", CPU)
        input_ids = torch.randint(4, 500, (3, 10))
        with torch.no_grad():
            ours = model(input_ids, None, prompt.embeddings, torch.full((3,), 9))
            with_prompt = PeftModel.from_pretrained(model.model, str(folder))
            theirs = with_prompt(input_ids=input_ids).logits[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lineage_leads_from_the_prompt_back_to_the_teacher(finished: Path) -> None:
    student = read_manifest(artifact(finished, "distill"), "student")
    source = read_prompt(artifact(finished, "tune")).manifest
    assert source.parents == {"model": student.digest}
    for folder in finished.glob("runs/tiny/transfer-*/artifact"):
        assert read_prompt(folder).manifest.parents == {
            "source prompt": source.digest,
            "model": student.digest,
            "target": weights_of(finished / "teacher"),
        }
    wanted = {"unexplained_share", "last_position_kl_nats", "teacher_lm"}
    assert set(student.config["held_out"]) >= wanted
    teacher = load_whole(finished / "teacher", "fp32", CPU).model
    own = load_whole(artifact(finished, "distill"), "fp32", CPU).model
    # Only the layers were trained.
    frozen = [weight for name, weight in own.named_parameters() if ".layers." not in name]
    assert student.config["given_away"] == {
        "student_parameters": own.num_parameters(),
        "unchanged_parameters": sum(weight.numel() for weight in frozen),
        "teacher_parameters": teacher.num_parameters(),
    }


def test_two_parties_meet_through_artifacts_alone(tmp_path: Path, post_dist: Callable) -> None:
    """The provider's run file has no private task, the owner's no teacher."""
    fields = yaml.safe_load(tiny.write_run(tmp_path / "provider").read_text())
    del fields["private_task"]
    (tmp_path / "provider/run.yaml").write_text(yaml.safe_dump(fields))
    assert post_dist("distill", tmp_path / "provider/run.yaml").returncode == 0

    fields = yaml.safe_load(tiny.write_run(tmp_path / "owner").read_text())
    for section in ("teacher", "student", "corpus", "public_task"):
        del fields[section]
    shutil.rmtree(tmp_path / "owner/teacher")
    shutil.copytree(artifact(tmp_path / "provider", "distill"), tmp_path / "owner/student")
    (tmp_path / "owner/run.yaml").write_text(
        yaml.safe_dump(fields | {"inputs": {"student": "student"}})
    )
    assert post_dist("tune", tmp_path / "owner/run.yaml").returncode == 0
    # A baseline on the target needs the target.
    done = post_dist("evaluate", tmp_path / "owner/run.yaml", "--json")
    assert done.returncode == 2
    assert "the run file lacks the section teacher" in done.stderr
    done = post_dist(
        "evaluate", tmp_path / "owner/run.yaml", "--set", "evaluate.baselines=[]", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    baselines = ["majority class", "TF-IDF + logistic regression"]
    assert [row["name"] for row in rows] == ["student", *baselines, "student + prompt"]

    (tmp_path / "provider/private.csv").unlink()
    prompt = artifact(tmp_path / "owner", "tune")
    provider_run = tmp_path / "provider/run.yaml"
    done = post_dist("transfer", provider_run, f"--set=inputs.source_prompt={prompt}", "--json")
    assert done.returncode == 0, done.stderr
    made = read_prompt(Path(json.loads(done.stdout)["artifact"]))
    assert made.embeddings.shape == (5, 32)
    for path in prompt.rglob("*"):
        assert not path.is_file() or b"private.csv" not in path.read_bytes()


# With noise from the operating system no two runs are equal.
PRIVATE = [
    "--set=privacy.enabled=true",
    "--set=privacy.declared_examples=160",
    "--set=privacy.noise_multiplier=1",
    "--set=privacy.noise_source=seeded",
]


@pytest.mark.parametrize(
    ("stage", "by", "more"),
    [
        ("distill", "SIGKILL", []),
        ("transfer", "SIGUSR2", []),
        ("tune", "SIGTERM", PRIVATE),
        pytest.param("tune", "SIGKILL", [], marks=pytest.mark.slow),
        pytest.param("transfer", "SIGKILL", [], marks=pytest.mark.slow),
        pytest.param("distill", "SIGTERM", [], marks=pytest.mark.slow),
    ],
)
def test_a_stopped_stage_resumes_and_ends_as_if_it_had_not_been_stopped(
    tmp_path: Path, finished: Path, post_dist: Callable, stage: str, by: str, more: list[str]
) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("runs"))
    options = [f"--set={stage}.steps=150", *more]
    if stage in ("tune", "transfer"):
        options.append(f"--set=inputs.student={artifact(finished, 'distill')}")
    if stage == "transfer":
        options.append(f"--set=inputs.source_prompt={artifact(finished, 'tune')}")
    straight = post_dist(
        stage, folder / "run.yaml", *options, "--output", tmp_path / "straight", "--json"
    )
    assert straight.returncode == 0, straight.stderr

    process = Command(stage, folder / "run.yaml", *options)
    while process.poll() is None and not list(folder.glob("runs/tiny/*/checkpoints/step-*")):
        time.sleep(0.02)
    process.send_signal(getattr(signal, by))
    _, err = process.communicate(timeout=60)
    if by != "SIGKILL":
        assert process.returncode == 6, err
        assert f"stopped by {by}" in err
        assert "Traceback" not in err
    assert not list(folder.glob("runs/tiny/*/artifact")), "the stage ended before it was killed"
    again = post_dist(stage, folder / "run.yaml", *options, "--json")
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stderr
    expected = Path(json.loads(straight.stdout)["artifact"])
    made = Path(json.loads(again.stdout)["artifact"])
    weights = "model.safetensors" if stage == "distill" else "adapter_model.safetensors"
    assert (made / weights).read_bytes() == (expected / weights).read_bytes()


def interrupt(command: list[object], when: Callable[[], bool]) -> tuple[int, str]:
    """Start a run and press Ctrl-C when a condition holds; return exit code and standard error."""
    process = Command(*command)
    while process.poll() is None and not when():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_an_interrupted_run_resumes_or_starts_anew_as_asked(finished: Path, tmp_path: Path) -> None:
    options = ("--set=distill.steps=3000", f"--output={tmp_path}")
    command = ["distill", finished / "run.yaml", *options]

    def steps() -> list[int]:
        return [
            int(path.name.removeprefix("step-"))
            for path in tmp_path.glob("tiny/*/checkpoints/step-*")
        ]

    code, err = interrupt(command, lambda: max(steps(), default=0) >= 8)
    assert code == 6, err
    assert "stopped by SIGINT" in err
    assert "the same command resumes from there" in err
    assert "Traceback" not in err
    reached = max(steps())
    _, err = interrupt(command, lambda: max(steps()) > reached)
    assert f"resuming from step {reached} of" in err
    anew = [*command, "--resume", "never"]
    _, err = interrupt(anew, lambda: 0 < max(steps(), default=0) < reached)
    assert "resuming from step" not in err


def test_a_fault_after_the_last_step_costs_no_step(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_disk(*_: object) -> None:
        raise EnvironmentFault("the disk is broken")

    run = tiny.write_run(tmp_path)
    command = ("distill", run, "--set=distill.steps=5")
    assert main(*command, f"--output={tmp_path / 'straight'}")[0] == 0
    told: list[str] = []
    monkeypatch.setattr(distill, "phase", told.append)
    with monkeypatch.context() as broken:
        broken.setattr(distill, "_check_reads_back", break_disk)
        code, _, err = main(*command)
    assert (code, list(tmp_path.glob("runs/tiny/*/artifact"))) == (3, []), err
    code, _, err = main(*command)
    assert code == 0, err
    assert "resuming from step 5" in err
    assert told[-3:] == ["writing the student", "hashing the student", "reading the student back"]
    expected = next(tmp_path.glob("straight/tiny/*/artifact/model.safetensors"))
    made = next(tmp_path.glob("runs/tiny/*/artifact/model.safetensors"))
    assert made.read_bytes() == expected.read_bytes()
    assert not list(tmp_path.glob("*/tiny/*/checkpoints"))


def test_launchers_give_equal_artifacts_and_one_process_s_losses(
    tmp_path: Path, finished: Path
) -> None:
    common = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": "29650",
    }
    work = ["pipeline", str(finished / "run.yaml"), *PROXY]
    plain = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    starts = {
        "torchrun": [([str(asset("launch/torchrun.sh")), "2"], {})],
        "deepspeed": [([str(asset("launch/deepspeed.sh")), "2"], {})],
        "plain": [
            ([sys.executable, "-m", "post_dist"], plain | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ],
    }
    made = {}
    for launcher, processes in starts.items():
        output = tmp_path / launcher
        running = []
        for program, extra in processes:
            command = [*program, *work, f"--output={output / 'runs'}"]
            process = subprocess.Popen(
                command,
                env=os.environ | common | extra,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            running.append(process)
        for process in running:
            _, err = process.communicate(timeout=500)
            assert process.returncode == 0, err[-3000:]
        made[launcher] = {}
        for path in output.glob("runs/tiny/*-????????/artifact/*model.safetensors"):
            # The names of private folders are keyed, so they differ between two outputs.
            name = re.sub("(tune.*)-[0-9a-f]{8}", r"\1", path.parent.parent.name)
            made[launcher][name] = path.read_bytes()
    assert made["torchrun"] == made["deepspeed"] == made["plain"]
    assert len(made["plain"]) == 5  # the student, two tuned and two transferred prompts

    def losses(base: Path) -> list[float]:
        found = []
        for file in base.glob("runs/tiny/transfer-*/metrics.jsonl"):
            found += [json.loads(line)["loss"] for line in file.read_text().splitlines()]
        return sorted(found)

    assert losses(tmp_path / "plain") == pytest.approx(losses(finished), rel=1e-3)


def test_a_masked_model_learns_the_task_and_passes_it_on(
    tmp_path: Path, post_dist: Callable
) -> None:
    """No package brings a masked model with its head, so a small RoBERTa is trained here."""
    run = tiny.write_run(tmp_path, "roberta")
    tiny.train_masked(tmp_path / "teacher")
    settings = [
        "distill.steps=60",
        "distill.learning_rate=3e-3",
        "tune.steps=80",
        "transfer.steps=60",
        "transfer.learning_rate=1e-2",
    ]
    settings += [
        "transfer.scores=classes",
        "transfer.objective=proxy",
        "transfer.trained_share=1",
        "private_task.test_share=0.4",
    ]
    done = post_dist("pipeline", run, *(f"--set={setting}" for setting in settings), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    accuracy = {row["name"]: row["accuracy_micro"] for row in rows}
    assert accuracy["full prompt tuning"] > 0.9
    assert accuracy["transferred"] > accuracy["zero-shot"] + 0.03 or accuracy["zero-shot"] > 0.95


def test_init_writes_files_that_load(tmp_path: Path, post_dist: Callable) -> None:
    assert post_dist("init", tmp_path / "new").returncode == 0
    assert (tmp_path / "new/demo.yaml").is_file()
    assert post_dist("init", tmp_path / "new").returncode == 2
