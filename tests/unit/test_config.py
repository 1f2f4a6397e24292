"""The run file: what is accepted, and what each stage sees of it."""

from pathlib import Path

import pytest

import post_dist
from post_dist.artifacts.run_folder import RunFolder, influential_settings, run_folder
from post_dist.config.assets import asset
from post_dist.config.deepspeed import frozen_settings, overlaps, training_settings
from post_dist.config.load import load_run
from post_dist.config.schema import Engine, RunConfig, Stage
from post_dist.config.sources import named_tasks
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import digest_of

MINIMAL = "name: run\nteacher: {path: /model}\n"
TASK = """
private_task:
  name: t
  visibility: private
  path: a.csv
  template: "{{text}} Is it"
  labels: {labels}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run(path, list(overrides))


# published.yaml holds the paper's numbers.
SHIPPED = sorted(
    path for path in asset("examples").rglob("*.yaml") if path.name != "published.yaml"
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_run_files_load(path: Path) -> None:
    assert load_run(path).name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_training_preset_takes_stage_and_offload(stage: int) -> None:
    engine = Engine(zero_stage=stage, offload_optimizer=stage > 0)
    settings = training_settings(
        engine, "bf16", trained=10, micro_batch_size=2, accumulation_steps=3, max_grad_norm=5.0
    )
    assert settings["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in settings["zero_optimization"]) == (stage > 0)
    assert settings["zero_allow_untested_optimizer"]


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_the_frozen_preset_takes_the_offload(offload: str) -> None:
    folder = "/scratch" if offload == "nvme" else None
    settings = frozen_settings(Engine(offload=offload, nvme_folder=folder), "bf16", 100_000)
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3
    assert zero.get("offload_param", {"device": "none"})["device"] == offload
    if offload == "nvme":
        assert zero["offload_param"]["buffer_size"] >= 100_000


@pytest.mark.parametrize(
    ("trained", "together"), [(1_000_000, 1_000_000), (2_000_000_000, 500_000_000)]
)
def test_a_small_student_needs_no_large_buffers(trained: int, together: int) -> None:
    for stage, buffers in ((1, 2), (2, 2), (3, 1)):
        zero = student_zero(Engine(zero_stage=stage), trained)
        assert zero == {
            "stage": stage,
            "overlap_comm": True,
            "reduce_bucket_size": together / buffers,
        }


def student_zero(engine: Engine, trained: int = 1_000_000) -> dict:
    rest = {"micro_batch_size": 1, "accumulation_steps": 1, "max_grad_norm": 1.0}
    settings = training_settings(engine, "bf16", trained=trained, **rest)
    return settings["zero_optimization"]


def test_both_presets_overlap_as_the_plan_assumes() -> None:
    assert overlaps(Engine())
    assert student_zero(Engine())["overlap_comm"]
    assert frozen_settings(Engine(), "bf16", 1)["zero_optimization"]["overlap_comm"]
    in_turns = Engine(deepspeed={"zero_optimization": {"overlap_comm": False}})
    assert not overlaps(in_turns)
    assert not student_zero(in_turns)["overlap_comm"]
    assert student_zero(in_turns)["reduce_bucket_size"] == 1_000_000, "no second buffer"


def test_further_settings_reach_deepspeed_and_the_name_of_a_run(tmp_path: Path) -> None:
    further = (
        "engine.deepspeed.zero_optimization={reduce_bucket_size: 5e6}",
        "engine.deepspeed.communication_data_type=fp32",
    )
    text = MINIMAL + TASK.format(labels="{a: [no], b: [yes]}")
    plain = load(tmp_path, text)
    changed = load(tmp_path, text, *further)
    assert student_zero(changed.engine)["reduce_bucket_size"] == 5e6
    frozen = frozen_settings(changed.engine, "bf16", 1)
    assert frozen["communication_data_type"] == "fp32"
    assert frozen["zero_optimization"]["stage"] == 3

    def name(config: RunConfig, stage: Stage) -> str:
        folder = run_folder(config, stage, {})
        return folder.path.name if folder.name_key is None else str(folder.config)

    assert name(plain, "distill") != name(changed, "distill")
    assert name(plain, "tune") == name(changed, "tune"), "private tuning knows no DeepSpeed"


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("train_batch_size: 4", "set distill.batch_size in place of train_batch_size"),
        ("bf16: {enabled: true}", "set engine.precision in place of bf16"),
        ("zero_optimization: {stage: 2}", "set engine.zero_stage in place of stage"),
        (
            "zero_optimization: {offload_param: {device: cpu}}",
            "set engine.offload in place of offload_param",
        ),
        ("zero_optimization: {overlap_comm: auto}", "overlap_comm holds neither a number"),
        ("steps_per_print: 1", "steps_per_print: unknown key"),
    ],
)
def test_a_further_setting_that_post_dist_makes_is_refused(
    tmp_path: Path, further: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, MINIMAL + f"engine: {{deepspeed: {{{further}}}}}\n")


@pytest.mark.parametrize("name", named_tasks())
def test_named_tasks_load(tmp_path: Path, name: str) -> None:
    run = load(
        tmp_path, MINIMAL + f"private_task: {{name: {name}, visibility: private, revision: abc}}\n"
    )
    assert run.private_task is not None
    assert len(run.private_task.labels) >= 2


def test_a_file_takes_the_place_of_a_named_task_s_hub(tmp_path: Path) -> None:
    run = load(
        tmp_path, MINIMAL + "private_task: {name: sst2, visibility: private, path: rows.csv}\n"
    )
    assert run.private_task is not None
    assert run.private_task.hub is None
    assert run.private_task.path == tmp_path / "rows.csv"
    assert run.private_task.labels["1"][1] == "good"


def test_yaml_reads_numbers_and_words_as_people_write_them(tmp_path: Path) -> None:
    task = TASK.format(labels="{no: [no, No], yes: [yes]}")
    run = load(tmp_path, MINIMAL + task + "tune: {learning_rate: 1e-3}\n")
    assert run.tune.learning_rate == 1e-3
    assert run.private_task is not None
    assert run.private_task.labels["no"] == ("no", "No")


def test_overrides_reach_nested_fields(tmp_path: Path) -> None:
    run = load(
        tmp_path, MINIMAL, "transfer.alpha=0.25", "student.layers=[0, 2]", "tune.init_text=say yes"
    )
    assert run.transfer.alpha == 0.25
    assert run.student is not None
    assert run.student.layers == (0, 2)
    assert run.tune.init_text == "say yes"


def test_a_mapping_is_merged_and_changed_in_one_place(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + "cluster:\n"
        + "  distill: &big {nodes: 4, gpus_per_node: 8}\n"
        + "  transfer: &less {<<: *big, nodes: 2}\n"
        + "  evaluate: *less\n"
    )
    run = load(tmp_path, text, "cluster.transfer.nodes=3")
    asked = {stage: run.cluster.for_stage(stage) for stage in ("distill", "transfer", "evaluate")}
    assert {stage: (each.nodes, each.gpus_per_node) for stage, each in asked.items()} == {
        "distill": (4, 8),
        "transfer": (3, 8),
        "evaluate": (2, 8),
    }
    # A mapping that is merged before it is built itself, and overrides what it merged, has no
    # duplicate key.
    nested = (
        "distill: &a {steps: 1}\ntransfer: {<<: &b {<<: *a, steps: 2}}\ntune: {<<: *b, steps: 3}\n"
    )
    assert load(tmp_path, MINIMAL + nested).transfer.steps == 2
    with pytest.raises(InputError, match="the key 'nodes' appears twice"):
        load(tmp_path, text.replace("nodes: 2}", "nodes: 2, nodes: 5}"))


def test_all_errors_are_named_at_once_with_their_places(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, MINIMAL + "transfer: {alfa: 0.5, steps: -1}\nengine: {precision: fp8}\n")
    message = str(caught.value)
    assert "3 errors" in message
    assert "transfer.alfa: unknown key; did you mean 'alpha'?" in message
    assert "transfer.steps: input should be greater than 0 (found -1)" in message
    assert "engine.precision" in message
    assert "'auto', 'fp32', 'bf16' or 'fp16'" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy=3", "privacy: input should be a section"),
        ("distill.attack_tokens=5", "distill.attack_tokens: input should be a list"),
        ("privacy.target_epsilon=.inf", "privacy.target_epsilon: input should be a finite number"),
        ("privacy.steps=true", "privacy.steps: is a number, not true"),
        ("privacy.target_epsilon=false", "privacy.target_epsilon: is a number, not false"),
        ("warm_start={class_shares: [1.0e-300, 1]}", "warm_start.class_shares.0: input should be"),
        ("inputs.student=3", "inputs.student: input should be a path"),
        ("engine.shard_group=true", "engine.shard_group: is a number, not true"),
        ("engine.zero_stage=true", "engine.zero_stage: is a number, not true"),
        ("student={layers: [0, true]}", "student.layers: is a number, not true"),
        ("evaluate.private_rows=[false]", "evaluate.private_rows: is a number, not false"),
        ("teacher.path=true", "teacher.path: input should be a valid string"),
        ("distill.temperature=1e308", "distill.temperature: input should be less than or equal"),
        ("distill.temperature=1e-30", "distill.temperature: input should be greater than or eq"),
        ("transfer.temperature=1e9", "transfer.temperature: input should be less than or equal"),
        ("corpus={path: a.txt, max_rows: 10000000000000000000}", "corpus.max_rows: is 2^63 or"),
        ("cluster.nodes=10000000000000000000000", "cluster.nodes: is 2^63 or more"),
        ("cluster.max_restarts=10000000000000000000000", "cluster.max_restarts: is 2^63 or more"),
        ("distill.learning_rate=1e300", "distill.learning_rate: is above 1e30"),
        ("distill.alpha_ce=1e300", "distill.alpha_ce: is above 1e30"),
        ("engine.join_timeout_seconds=1e308", "join_timeout_seconds: input should be less than"),
        ("corpus={path: []}", "corpus.path: input should be a path or a list that is not empty"),
        ("inputs.source_prompt=[]", "input should be a path or a list that is not empty"),
    ],
)
def test_errors_of_types_speak_of_yaml(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, MINIMAL, override)
    assert message in str(caught.value)
    assert "tuple" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "override",
    [
        "cluster.sbatch={spread-job: true}",
        "engine.deepspeed.zero_optimization={overlap_comm: true}",
        "tune.class_bias=true",
    ],
)
def test_true_is_taken_where_a_field_names_it(tmp_path: Path, override: str) -> None:
    load(tmp_path, MINIMAL, override)


def test_overrides_are_a_list(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    with pytest.raises(InputError, match="overrides is not a list"):
        post_dist.load_run(tmp_path / "run.yaml", "transfer.alpha=0.5")


def test_provider_stages_do_not_see_the_private_task(tmp_path: Path) -> None:
    task = TASK.format(labels="{a: [no], b: [yes]}")
    run = load(tmp_path, MINIMAL + task)
    assert run.view("tune").private_task is not None
    assert run.view("distill").private_task is None
    assert run.view("transfer").private_task is None


def test_a_stage_s_signature_follows_what_it_reads_and_nothing_else(tmp_path: Path) -> None:
    first = load(tmp_path, MINIMAL)
    other_transfer = load(tmp_path, MINIMAL, "transfer.steps=7")
    other_seed = load(tmp_path, MINIMAL, "seed=1")

    def folder(config: RunConfig, stage: Stage, teacher: str = "0") -> Path:
        return run_folder(config, stage, {"teacher": teacher}).path

    assert folder(first, "distill") == folder(other_transfer, "distill")
    assert folder(first, "transfer") != folder(other_transfer, "transfer")
    assert folder(first, "distill") != folder(other_seed, "distill")
    assert folder(first, "distill") != folder(first, "distill", teacher="1")


def test_the_name_of_a_private_folder_says_nothing_of_the_data(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + TASK.format(labels="{a: [no], b: [yes]}"))
    elsewhere = config.model_copy(update={"output": tmp_path / "elsewhere"})

    def folder(config: RunConfig, data: str) -> RunFolder:
        return run_folder(config, "tune", {"private_task": data})

    with folder(config, "a").held():
        pass
    assert folder(config, "a").path == folder(config, "a").path
    assert folder(config, "a").path != folder(config, "b").path
    # Without the key, nobody can compute the name from a guess of the data.
    assert folder(elsewhere, "a").path.name != folder(config, "a").path.name
    key = config.output / config.name / ".name_key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(b"short")
    with pytest.raises(ArtifactRefused, match="does not hold a key"):
        folder(config, "a")


LOSS_AND_START = ("scores", "temperature", "match_class_shares", "trained_share", "schedule")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{}", ("classes", 1.0, True, 1.0, "cosine")),
        ("{objective: ensemble}", ("classes", 1.0, True, 1.0, "cosine")),
        ("{scores: vocabulary}", ("vocabulary", 1.0, False, 1.0, "cosine")),
        ("{objective: published}", ("vocabulary", 2.0, False, 0.0, "constant")),
        ("{objective: published, scores: classes}", ("classes", 2.0, False, 0.0, "constant")),
        ("{objective: published, schedule: cosine}", ("vocabulary", 2.0, False, 0.0, "cosine")),
    ],
)
def test_the_paper_s_settings_of_a_transfer_come_with_its_objective(
    tmp_path: Path, settings: str, expected: tuple
) -> None:
    section = load(tmp_path, f"{MINIMAL}transfer: {settings}\n").transfer
    assert tuple(getattr(section, name) for name in LOSS_AND_START) == expected


def test_labels_count_in_their_order_and_whatever_their_names(tmp_path: Path) -> None:
    """A label may be called like a field without influence. The order is that of the classes."""
    task = {"name": "t", "visibility": "private", "path": tmp_path / "a.csv", "template": "{text}"}

    def signed(labels: dict[str, list[str]]) -> str:
        config = RunConfig.model_validate({"name": "t", "private_task": task | {"labels": labels}})
        return digest_of(influential_settings(config, "tune"))

    one = signed({"path": ["bad"], "road": ["good"]})
    assert one != signed({"path": ["awful"], "road": ["good"]})
    assert one != signed({"road": ["good"], "path": ["bad"]})
    assert one == signed({"path": ["bad"], "road": ["good"]})
