"""`post-dist plan`: its numbers computed by hand, from configurations alone."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

# `plan` may load DeepSpeed, and its first import prints a line.
import deepspeed  # noqa: F401
import pytest
import tiny
import yaml
from transformers import LlamaConfig

from post_dist.config.assets import asset
from post_dist.errors import InputError
from post_dist.models.size import size_of
from post_dist.planning.corpus import MEMORY_GIB_PER_PROCESS, TOKENS_PER_CORE_SECOND
from post_dist.planning.hardware import Machine, read_hardware
from post_dist.planning.simulation import young_interval

GIB = 2**30
LLAMA_70B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def config_only(folder: Path, sizes: dict[str, int], kv_heads: int) -> Path:
    folder.mkdir()
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return config_only(tmp_path / "70b", LLAMA_70B, 8)


@pytest.fixture
def run(teacher: Path, tmp_path: Path) -> Path:
    """The shipped run file, with a configuration in the hub model's place."""
    fields = yaml.safe_load(asset("examples/70b.yaml").read_text())
    fields["teacher"] = {"path": str(teacher)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def planned(main: Callable, run: Path, *options: str) -> tuple[int, dict]:
    code, out, err = main("plan", run, "--json", *options)
    return code, json.loads(out) if out else {"error": err}


def test_a_70b_teacher_on_64_gpus_by_hand(run: Path, teacher: Path, main: Callable) -> None:
    code, plan = planned(main, run, "--nodes=8")
    assert code == 0, plan["conflicts"]
    assert plan["teacher_parameters"] == 70_553_706_496, "as the published checkpoint has it"
    layer = 8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert plan["student_parameters"] == 2 * 128256 * 8192 + 8192 + 2 * layer
    distill, tune, transfer = plan["stages"]
    tokens = 512 * 2048 / 64
    weights = 8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    forward = 2 * 80 * weights * tokens + 80 * 4 * tokens * 2048 * 8192
    assert distill["flops_per_gpu"]["teacher"] == pytest.approx(
        forward + 2 * 8192 * 128256 * tokens, rel=1e-9
    )
    in_shards = (70_553_706_496 - 128256 * 8192) * 2 * 7 / 8
    assert distill["received_gib_per_gpu"]["gather"] * GIB == pytest.approx(
        2 * in_shards + 2 * layer * 2 * 63 / 64, rel=1e-6
    )
    assert distill["memory_gib"]["frozen_weights"] == pytest.approx(
        70_553_706_496 * 2 / 8 / GIB, rel=1e-6
    )
    assert distill["memory_gib"]["student_optimizer"] == pytest.approx(12 * 2 * layer / 64 / GIB)
    compute = forward + 2 * 8192 * 128256 * tokens
    assert distill["seconds"]["teacher"] == pytest.approx(compute / (989e12 * 0.5))
    assert distill["seconds"]["gather"] == pytest.approx(
        2 * in_shards / (450e9 * 0.75) + 2 * 80 * 1e-5, rel=1e-6
    )
    kept = 6 * 8192 + 2 * 8192 + 2 * 1024 + 4 * 28672
    passed = (
        (2 * 80 + 2 * 2 + 3 * 2) * kept * tokens * 2
        + 8 * 4 * 128256 * tokens
        + (3 * 4 * 2 + 2 * 2) * 2 * layer / 64
    )
    assert distill["seconds"]["memory"] == pytest.approx(passed / (3350e9 * 0.8))
    assert (
        distill["step_seconds"] >= distill["seconds"]["teacher"] > distill["seconds"]["gather"]
    ), "hidden behind the teacher"
    assert distill["shard_group"]["advised"] == "node"
    assert tune["gpus"] == 1
    assert 7.9 < tune["epsilon"][0] <= 8
    assert transfer["received_gib_per_gpu"]["reduce"] * GIB == pytest.approx(
        2 * 63 / 64 * 100 * 8192 * 4
    )
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in plan["stages"]))
    assert (
        0.8
        < plan["long_run"]["goodput_with_a_gpu_1.2_times_as_slow"]
        / plan["long_run"]["goodput"]
        * 1.2
        < 1.2
    )
    assert 0.9 < plan["long_run"]["goodput"] < 1
    for stage in (tune, transfer):
        assert stage["memory_total_gib"] == pytest.approx(sum(stage["memory_gib"].values()))
    memory = distill["memory_gib"]
    of_teacher = (
        memory["gathered_weights"] + memory["weights_on_their_way"] + memory["teacher_activations"]
    )
    assert memory["gradient_bucket"] * GIB == 5e8 * 2, (
        "as large as DeepSpeed makes it where so many are trained"
    )
    assert max(of_teacher - memory["activations"], memory["logits"]) < memory["gradient_bucket"], (
        "the fullest moment is the backward pass"
    )
    assert distill["memory_total_gib"] == pytest.approx(
        sum(memory.values()) - of_teacher - memory["logits"]
    )
    assert (
        planned(main, run, "--nodes=8", "--set=engine.zero_stage=0")[1]["stages"][0]["memory_gib"][
            "gradient_bucket"
        ]
        == 0
    )


def test_text_that_is_here_is_planned_by_a_sample(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path)
    # Text and its bytes per token change from file to file.
    (tmp_path / "text").mkdir()
    words = " ".join(text for text, _ in tiny.sentences(300, 3))
    for number, line in enumerate((words, "12 34 " * 500, words)):
        lines = f"{line}\n" * (1_500_000 // len(line))
        (tmp_path / "text" / f"{number}.txt").write_text(lines)
    given = ("--set=corpus={path: text, sequence_length: 32, held_out_sequences: 8}",)
    plan = planned(main, run, *given)[1]["corpus"]
    assert plan["sampled_mb"] == pytest.approx(3.1, abs=0.1)
    assert plan["tokens_per_core_second"] != TOKENS_PER_CORE_SECOND
    code, out, err = main("corpus", run, "--json", *given)
    assert code == 0, err
    assert plan["tokens"] == pytest.approx(json.loads(out)["tokens"], rel=0.05)


def test_the_corpus_is_counted_by_its_limit_or_its_files(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    _, plan = planned(main, run, "--set=corpus.max_tokens=2000000000")
    assert plan["corpus"]["core_hours"] == pytest.approx(2e9 / TOKENS_PER_CORE_SECOND / 3600)
    assert plan["corpus"]["disk_gb"] == pytest.approx(8)
    on_ten = "--set=cluster.corpus={cpus_per_task: 10}"
    faster = planned(main, run, on_ten, "--set=corpus.max_tokens=2000000000")[1]["corpus"]
    assert faster["hours"] == pytest.approx(plan["corpus"]["core_hours"] / 10)
    assert faster["memory_gib"] == pytest.approx(11 * MEMORY_GIB_PER_PROCESS)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_bytes(b"12345678" * 50)
    unlimited = ("--set=corpus={path: text}",)
    _, plan = planned(main, run, *unlimited)
    assert plan["corpus"]["tokens"] == 200
    _, said, _ = main("plan", run, *unlimited)
    assert "corpus on CPUs: tokens 200, cores" in said
    _, plan = planned(main, run, "--set=corpus={path: missing.txt}")
    assert plan["corpus"] is None


def test_a_kept_teacher_runs_once_and_is_read_in_every_step(run: Path, main: Callable) -> None:
    asking, reading = (
        planned(
            main,
            run,
            "--nodes=8",
            "--set=distill.steps=1000",
            "--set=corpus.max_tokens=262144000",
            f"--set=distill.cache={cache}",
        )[1]
        for cache in ("none", "hidden")
    )
    before = asking["stages"][0]
    after = reading["stages"][0]
    asked = (262_144_000 / 2048 - 64) / (1000 * 512)
    for place, part in (
        ("flops_per_gpu", "teacher"),
        ("seconds", "gather"),
        ("seconds", "teacher"),
    ):
        assert after[place][part] == pytest.approx(asked * before[place][part])
    a_token = 8192 * 2
    assert after["teacher_signals_gib"] * GIB == pytest.approx((262_144_000 - 64 * 2048) * a_token)
    assert after["seconds"]["signals"] == pytest.approx((1 + asked) * 512 * 2048 * a_token / 2e9)
    assert "signals" not in before["seconds"]
    kept = 6 * 8192 + 2 * 8192 + 2 * 1024 + 4 * 28672
    spared = (1 - asked) * 2 * 80 * kept * (512 * 2048 / 64) * 2
    assert before["seconds"]["memory"] - after["seconds"]["memory"] == pytest.approx(
        spared / (3350e9 * 0.8)
    )
    assert after["step_seconds"] < before["step_seconds"] + after["seconds"]["signals"]


def test_a_larger_micro_batch_of_the_teacher_gathers_less_and_holds_more(
    run: Path, main: Callable
) -> None:
    small, large = (
        planned(main, run, "--nodes=8", f"--set=distill.teacher_micro_batch_size_per_gpu={size}")[
            1
        ]["stages"][0]
        for size in (4, 8)
    )
    # 8 sequences on each GPU: two passes of the student.
    in_shards = (70_553_706_496 - 128256 * 8192) * 2 * 7 / 8
    saved = small["received_gib_per_gpu"]["gather"] - large["received_gib_per_gpu"]["gather"]
    assert saved * GIB == pytest.approx(in_shards)
    assert large["seconds"]["gather"] == pytest.approx(small["seconds"]["gather"] / 2)
    assert large["flops_per_gpu"] == small["flops_per_gpu"]
    before, after = small["memory_gib"], large["memory_gib"]
    assert after["teacher_activations"] == 2 * before["teacher_activations"]
    # Two micro-batches, the copy of one, and the last good one.
    states = 4 * (4 * 2048) * 8192 * 2
    assert after.pop("teacher_hidden_states") * GIB == states
    assert after == before | {"teacher_activations": after["teacher_activations"]}


def test_a_teacher_s_micro_batch_that_is_too_large_is_made_smaller(
    run: Path, main: Callable
) -> None:
    _, plan = planned(
        main,
        run,
        "--nodes=8",
        "--set=distill.batch_size=8192",
        "--set=distill.teacher_micro_batch_size_per_gpu=128",
    )
    assert plan["nearest_that_fits"] == {"distill.teacher_micro_batch_size_per_gpu": "4"}


def test_collectives_that_deepspeed_does_not_overlap_take_their_time(
    run: Path, main: Callable
) -> None:
    _, plan = planned(
        main, run, "--nodes=8", "--set=engine.deepspeed.zero_optimization.overlap_comm=false"
    )
    assert not plan["assumptions"]["collectives_beside_computation"]
    distill = plan["stages"][0]
    assert distill["step_seconds"] == pytest.approx(sum(distill["seconds"].values()))


def test_workers_are_planned_beside_distillation(run: Path, main: Callable) -> None:
    settings = ("--nodes=8", "--set=distill.steps=1000", "--set=corpus.max_tokens=262144000")
    settings += ("--set=distill.cache=hidden", "--set=cluster.gpus_per_node=8")
    _, alone = planned(main, run, *settings)
    code, plan = planned(main, run, *settings, "--set=cluster.signals={workers: 4, nodes: 2}")
    assert code == 0, plan["conflicts"]
    signals, distill, *others = plan["stages"]
    assert (signals["stage"], signals["gpus"], distill["stage"]) == ("signals", 4 * 16, "distill")
    sequences = 262_144_000 // 2048 - 64
    assert signals["steps"] == -(-sequences // (64 * 4)), "micro-batches of four"
    weights = 8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    tokens = 4 * 2048
    forward = 2 * 80 * weights * tokens + 80 * 4 * tokens * 2048 * 8192
    assert signals["flops_per_gpu"]["teacher"] == pytest.approx(forward), "hidden states, no head"
    in_shards = (70_553_706_496 - 128256 * 8192) * 2 * 7 / 8
    assert signals["received_gib_per_gpu"]["gather"] * GIB == pytest.approx(in_shards, rel=1e-6)
    assert signals["teacher_signals_gib"] * GIB == sequences * 2048 * 8192 * 2
    assert signals["teacher_signals_gib"] == distill["teacher_signals_gib"]
    # The teacher no longer runs in the steps, which read its signals.
    assert distill["seconds"]["teacher"] == distill["seconds"]["gather"] == 0
    assert distill["step_seconds"] < alone["stages"][0]["step_seconds"]
    beside = max(signals["hours"], distill["hours"])
    assert plan["hours"] == pytest.approx(beside + sum(stage["hours"] for stage in others))
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in plan["stages"]))
    assert plan["long_run"]["days"] * 24 > distill["hours"]
    # Without overlap, the shards come before the layers compute.
    apart = "--set=engine.deepspeed.zero_optimization.overlap_comm=false"
    workers = "--set=cluster.signals={workers: 4, nodes: 2}"
    later = planned(main, run, *settings, workers, apart)[1]["stages"][0]
    assert later["step_seconds"] == pytest.approx(sum(later["seconds"].values()))
    assert later["step_seconds"] > signals["step_seconds"]
    # A worker of one GPU does not hold a 70B teacher, whatever the nodes of `distill`.
    code, plan = planned(
        main, run, *settings, "--set=cluster.signals={workers: 4, gpus_per_node: 1}"
    )
    assert code == 2
    assert any(line.startswith("signals: ") and "on a GPU of" in line for line in plan["conflicts"])


def test_the_group_that_is_advised_is_the_smallest_that_fits(
    tmp_path: Path, main: Callable, run: Path
) -> None:
    small = config_only(tmp_path / "7b", LLAMA_7B, 32)
    assert size_of(small).parameters == 6_738_415_616
    _, plan = planned(
        main, run, f"--set=teacher.path={small}", "--nodes=1", "--set=engine.shard_group=1"
    )
    assert plan["stages"][0]["shard_group"]["advised"] == "1"
    assert plan["stages"][0]["received_gib_per_gpu"]["gather"] < 1, (
        "only the student's weights come back from the optimizer"
    )
    memory = plan["stages"][0]["memory_gib"]
    assert 0.7 < memory["gradient_bucket"] == memory["student_gradients"], (
        "no larger than what is trained"
    )


def test_what_cannot_fit_is_refused_with_what_would(run: Path, main: Callable) -> None:
    code, plan = planned(main, run, "--nodes=1", "--set=engine.shard_group=1")
    assert code == 2
    assert any("most of it frozen_weights" in conflict for conflict in plan["conflicts"])
    changes = plan["nearest_that_fits"]
    assert changes["engine.shard_group"] == "node"
    again = [
        f"--set={name}={value}" for name, value in changes.items() if not name.startswith("--")
    ]
    code, plan = planned(main, run, "--nodes=1", *again)
    assert code == 0, plan["conflicts"]


def test_conflicts_are_named_before_a_job_is_queued(run: Path, main: Callable) -> None:
    settings = [
        "corpus.sequence_length=16384",
        "distill.batch_size=32",
        "transfer.batch_size=8",
        "tune.num_virtual_tokens=512",
    ]
    settings += ["private_task.max_length=8000", "corpus.max_tokens=100000", "distill.cache=hidden"]
    code, plan = planned(main, run, "--nodes=8", *(f"--set={setting}" for setting in settings))
    assert code == 2
    for words in (
        "sequence_length 16384 exceeds the teacher's context of 8192",
        "corpus.max_tokens makes 6 sequences, and 64 are to be held out",
        "distill.batch_size 32 leaves 32 of 64 GPUs",
        "transfer.batch_size 8 leaves 56 of 64 GPUs",
        "tune: a prompt of 512 tokens and texts of 8000 tokens do not fit into the context of "
        "the model (8192)",
    ):
        assert any(words in conflict for conflict in plan["conflicts"]), (words, plan["conflicts"])


def test_a_sweep_is_drawn(run: Path, main: Callable, tmp_path: Path) -> None:
    code, plan = planned(
        main, run, "--nodes=8", "--sweep=8,64,512", f"--output={tmp_path / 'runs'}"
    )
    assert code == 0
    assert Path(plan["figure"]).read_bytes().startswith(b"\x89PNG")
    rows = {(row["scaling"], row["gpus"]): row for row in plan["sweep"]}
    assert set(rows) == {(kind, gpus) for kind in ("strong", "weak") for gpus in (8, 64, 512)}
    assert rows["weak", 8]["distill_efficiency"] == 1
    assert rows["weak", 512]["distill_efficiency"] > 0.9, (
        "a node's shards are gathered in the node, however many nodes there are"
    )
    assert rows["strong", 512]["distill_efficiency"] < rows["weak", 512]["distill_efficiency"]
    # The run file's cluster has eight nodes of eight GPUs.
    code, out, _ = main("plan", run, "--sweep=8,64")
    assert code == 0
    assert re.match(r"It fits on 64 x h100 and takes [0-9.]+ (hours|days)\. The fullest GPU", out)
    assert re.search(r"^distill +memory [█░]{20} +[0-9.]+ of 80 GiB   time [█░]{20} ", out, re.M)
    assert "a model, not a measurement" in out
    assert "weak scaling, 64 GPUs" in out


def test_hardware_of_one_s_own(run: Path, main: Callable, tmp_path: Path) -> None:
    assert "no GPU is called h900" in planned(main, run, "--gpu=h900")[1]["error"]
    entry = yaml.safe_load(
        (Path(asset("examples")).parent / "post_dist/planning/hardware.yaml").read_text()
    )["h100"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"h900": entry | {"teraflops": {"bf16": 9890}}}))
    slow, fast = (
        planned(main, run, "--nodes=8", *more)[1]["stages"][0]
        for more in ([], ["--gpu=h900", f"--hardware={mine}"])
    )
    assert fast["seconds"]["teacher"] == pytest.approx(slow["seconds"]["teacher"] / 10)
    mine.write_text(yaml.safe_dump({"h900": entry | {"node": entry["node"] | {"gpus": 4}}}))
    # Without GPUs in `cluster`, a node has those of the hardware file.
    more = ("--gpu=h900", f"--hardware={mine}", "--set=cluster.gpus_per_node=0")
    assert planned(main, run, "--nodes=8", *more)[1]["gpus"] == 8 * 4
    mine.write_text(yaml.safe_dump({"h900": entry | {"share": {"compute": 2}}}))
    assert (
        "h900.share.compute" in planned(main, run, "--gpu=h900", f"--hardware={mine}")[1]["error"]
    )
    (tmp_path / "list.yaml").write_text("[h100, h200]")
    for name in ("none.yaml", "list.yaml"):
        with pytest.raises(InputError, match="cannot read the hardware file"):
            read_hardware("h100", tmp_path / name)
    mine.write_text("1: {}")
    with pytest.raises(InputError, match="no GPU is called h900"):
        read_hardware("h900", mine)


def test_links_and_intervals() -> None:
    machine = Machine(4, 8, read_hardware("h100", None))
    assert [machine.link(ranks) for ranks in (2, 8, 16)] == ["node", "node", "network"]
    assert machine.collective_seconds(40e9, 16, 0) == pytest.approx(1)
    assert machine.collective_seconds(40e9, 1, 5) == 0
    # notes of Young's formula: 0.8 s to save on 1,024 GPUs, a failure every 49.5 h
    assert young_interval(0.8, 1024) == pytest.approx(534, abs=1)


def test_offloaded_shards_leave_the_gpu_and_come_over_the_host_s_link(
    run: Path, main: Callable
) -> None:
    one = (
        "--nodes=1",
        "--gpus-per-node=1",
        "--set=distill.batch_size=16",
        "--set=transfer.batch_size=16",
    )
    code, here = planned(main, run, *one)
    assert code == 2
    assert here["nearest_that_fits"] == {"engine.shard_group": "node", "engine.offload": "cpu"}
    code, away = planned(main, run, *one, "--set=engine.offload=cpu")
    assert code == 0, away["conflicts"]
    whole = 70_553_706_496 * 2
    trunk = whole - 128256 * 8192 * 2
    for stage, before, passed in zip(
        away["stages"][::2], here["stages"][::2], (4 * trunk, whole + trunk), strict=True
    ):
        memory = stage["memory_gib"]
        assert memory["frozen_weights"] == 0 < before["memory_gib"]["frozen_weights"]
        assert memory["gathered_weights"] > 1, (
            "what is alive of them is on the GPU, of one rank too"
        )
        assert stage["received_gib_per_gpu"]["fetch"] * GIB == pytest.approx(passed)
        assert stage["seconds"]["fetch"] == pytest.approx(passed / (55e9 * 0.8))
        assert stage["step_seconds"] > stage["seconds"]["fetch"] > before["step_seconds"] / 2
        assert stage["node_memory_gib"] * GIB == pytest.approx(whole)
        assert before["node_memory_gib"] is None


def test_a_node_must_hold_what_its_gpus_offload(run: Path, main: Callable) -> None:
    code, plan = planned(
        main,
        run,
        "--nodes=8",
        "--gpus-per-node=32",
        "--set=engine.offload=cpu",
        "--set=engine.shard_group=2",
    )
    assert code == 2
    whole = 70_553_706_496 * 2 / GIB
    assert f"distill: {16 * whole:.1f} GiB are offloaded to a node of 2048 GiB" in plan["conflicts"]
    assert plan["stages"][0]["memory_total_gib"] < 80, "only the host is too small"
    assert not plan["stages"][0]["fits"]
    on_disk = [
        f"--set=engine.{setting}"
        for setting in ("offload=nvme", "nvme_folder=/tmp", "shard_group=2")
    ]
    _, plan = planned(main, run, "--nodes=8", "--gpus-per-node=32", *on_disk)
    assert not any("offloaded to a node" in conflict for conflict in plan["conflicts"])


def test_every_prompt_that_is_tuned_and_transferred_is_counted(run: Path, main: Callable) -> None:
    plain = planned(main, run, "--nodes=8")[1]
    assert plain["not_counted"] == [
        "the evaluation",
        "the models' passes over the public text before the transfer",
    ]
    more = [
        "--set=evaluate.private_rows=[4]",
        '--set=evaluate.baselines=["published transfer", "full prompt tuning"]',
    ]
    plan = planned(main, run, "--nodes=8", *more)[1]
    _, tune, transfer = plan["stages"]
    _, tune_one, one = plain["stages"]
    assert plan["not_counted"][-1] == "full prompt tuning"
    assert (tune["prompts"], transfer["prompts"], transfer["prompts_at_once"]) == (2, 4, 4)
    assert tune["hours"] == pytest.approx(2 * tune_one["hours"])
    assert tune["step_seconds"] == tune_one["step_seconds"]
    assert tune["epsilon"] == pytest.approx([8, 4], abs=0.1)
    for part in ("activations", "logits"):
        times = 4 if part == "activations" else (2 * 3 + 2 * 8) / 3
        assert transfer["memory_gib"][part] == pytest.approx(
            times * one["memory_gib"][part], rel=0.02
        )
    assert transfer["flops_per_gpu"]["backward"] == pytest.approx(
        4 * one["flops_per_gpu"]["backward"], rel=0.01
    )
    for part in ("frozen_weights", "gathered_weights", "student_weights"):
        assert transfer["memory_gib"][part] == one["memory_gib"][part]
    assert transfer["received_gib_per_gpu"]["gather"] == one["received_gib_per_gpu"]["gather"], (
        "one gathering serves all"
    )
    assert transfer["received_gib_per_gpu"]["reduce"] == 4 * one["received_gib_per_gpu"]["reduce"]
    assert transfer["hours"] == pytest.approx(transfer["step_seconds"] * 2000 / 3600)
    assert transfer["samples_per_second"] == pytest.approx(4 * 512 / transfer["step_seconds"])

    in_rounds = planned(main, run, "--nodes=8", *more, "--set=transfer.prompts_at_once=3")[1][
        "stages"
    ][2]
    assert in_rounds["prompts_at_once"] == 3
    assert transfer["hours"] < in_rounds["hours"] < 2 * in_rounds["step_seconds"] * 2000 / 3600, (
        "the second round has one prompt"
    )
    owners = planned(main, run, "--nodes=8", "--set=inputs.source_prompt=[a, b, c]")[1]["stages"][2]
    assert (owners["prompts"], owners["prompts_at_once"]) == (3, 3)
    searched = planned(
        main,
        run,
        "--nodes=8",
        "--set=tune.search.mean_trials=5",
        "--set=tune.search.learning_rate=[0.1, 0.01]",
    )[1]["stages"][1]
    counting = searched["counting_seconds"] / 3600
    assert searched["hours"] == pytest.approx(5 * tune_one["hours"] + counting)
    public = planned(
        main, run, "--nodes=8", "--set=privacy.enabled=false", "--set=evaluate.private_rows=[8]"
    )[1]["stages"][1]
    a_row = tune_one["step_seconds"] / 1024
    assert public["hours"] * 3600 == pytest.approx(a_row * (1315 * 1024 + 1000 * 32)), (
        "a prompt without privacy, and one with it"
    )
    _, out, _ = main("plan", run, "--nodes=8", *more)
    assert (
        "GPU-hours, without the evaluation, the models' passes over the public text before the "
        "transfer, full prompt tuning" in out
    )


def test_a_task_that_generates_text_counts_its_responses(run: Path, main: Callable) -> None:
    writes = [
        "--set=private_task.labels={}",
        "--set=private_task.response_column=summary",
        "--set=private_task.max_response_length=32",
        "--set=public_task.response_column=summary",
    ]
    writes += [
        "--set=transfer.scores=vocabulary",
        "--set=transfer.match_class_shares=false",
        "--set=transfer.batch_size=64",
    ]
    code, plan = planned(main, run, "--nodes=8", *writes)
    assert code == 0, plan.get("error", plan.get("conflicts"))
    _, tune, transfer = plan["stages"]
    text = 128
    assert transfer["memory_gib"]["logits"] * GIB == pytest.approx(8 * 32 * 128256 * 4), (
        "one row a GPU, at each token of its response"
    )
    of_token = (80 + 1) * (4 * 8192 + 2 * 8192 + 2 * 1024 + 3 * 28672) * 2
    assert transfer["memory_gib"]["activations"] * GIB == pytest.approx(
        (100 + text + 32) * of_token
    ), "each row has its own prompt"
    assert tune["memory_gib"]["logits"] * GIB == pytest.approx(3 * 8 * 32 * 128256 * 4)
    code, plan = planned(
        main, run, "--nodes=8", *writes, "--set=private_task.max_response_length=8100"
    )
    assert code == 2
    assert (
        "transfer: a prompt of 100 tokens and texts of 8228 tokens do not fit into the context of "
        "the target (8192) (tune the prompt with a lower tune.num_virtual_tokens or private_task."
        "max_length)" in plan["conflicts"]
    )


def test_what_else_of_the_student_is_trained_is_counted(run: Path, main: Callable) -> None:
    _, before = planned(main, run, "--nodes=8")
    code, after = planned(
        main,
        run,
        "--nodes=8",
        "--set=student.freeze_head=false",
        "--set=student.freeze_embeddings=false",
    )
    assert code == 0, after["conflicts"]
    before = before["stages"][0]
    after = after["stages"][0]
    table = 8192 * 128256
    tokens = 512 * 2048 / 64
    more = 2 * table + 8192
    for part, size in (
        ("student_gradients", 2 * more),
        ("student_optimizer", 12 * more / 64),
        ("logits", 2 * 2 * table),
    ):
        assert (after["memory_gib"][part] - before["memory_gib"][part]) * GIB == pytest.approx(size)
    assert after["memory_gib"]["teacher_head"] * GIB == 2 * table
    assert (after["checkpoint_gib"] - before["checkpoint_gib"]) * GIB == pytest.approx(12 * more)
    reduced = after["received_gib_per_gpu"]["reduce"] - before["received_gib_per_gpu"]["reduce"]
    assert reduced * GIB == pytest.approx(2 * 63 / 64 * 2 * more)
    assert (
        after["flops_per_gpu"]["student_backward"] - before["flops_per_gpu"]["student_backward"]
        == 2 * table * tokens
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.shard_group=24"], "64 ranks do not divide into groups of 24"),
        (["engine.shard_group=128"], "64 ranks do not divide into groups of 128"),
        (
            ["engine.zero_stage=3", "student.freeze_head=false"],
            "a trained head does not go with engine.zero_stage: 3",
        ),
        (
            ["engine.deepspeed.zero_optimization={prefetch_bucket_size: 5}"],
            "DeepSpeed has no setting prefetch_bucket_size",
        ),
        (
            ["engine.deepspeed.zero_optimization={legacy_stage1: true}"],
            "engine.deepspeed.zero_optimization: DeepSpeed has removed legacy_stage1",
        ),
        (
            ["engine.deepspeed.zero_optimization={reduce_bucket_size: -1}"],
            "engine.deepspeed.zero_optimization.reduce_bucket_size: DeepSpeed says: Input should "
            "be greater than 0",
        ),
    ],
)
def test_what_the_run_refuses_is_a_conflict(
    run: Path, main: Callable, settings: list[str], words: str
) -> None:
    code, plan = planned(main, run, "--nodes=8", *(f"--set={setting}" for setting in settings))
    assert code == 2
    assert any(words in conflict for conflict in plan["conflicts"]), plan["conflicts"]


def test_nodes_of_one_gpu_do_not_offload_by_the_node(run: Path, main: Callable) -> None:
    nodes = (
        "--nodes=2",
        "--gpus-per-node=1",
        "--set=distill.batch_size=16",
        "--set=transfer.batch_size=16",
    )
    code, plan = planned(main, run, *nodes, "--set=engine.offload=cpu")
    assert code == 2
    assert any("shard_group is one rank" in conflict for conflict in plan["conflicts"])
    assert planned(main, run, *nodes)[1]["nearest_that_fits"] == {
        "engine.shard_group": "all",
        "engine.offload": "cpu",
    }


def test_a_tied_head_is_trained_with_the_embeddings(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    tied = config_only(tmp_path / "tied", LLAMA_7B | {"tie_word_embeddings": True}, 32)
    _, plan = planned(
        main, run, "--nodes=8", f"--set=teacher.path={tied}", "--set=student.freeze_head=false"
    )
    assert any(
        "set student.freeze_embeddings and student.freeze_head alike" in conflict
        for conflict in plan["conflicts"]
    )


def test_a_sweep_takes_whole_nodes(run: Path, main: Callable) -> None:
    code, found = planned(main, run, "--nodes=8", "--sweep=12,24")
    assert code == 2
    assert "--sweep: 12 GPUs are not whole nodes of 8" in found["error"]


def test_all_sections_that_a_plan_lacks_are_named_at_once(run: Path, main: Callable) -> None:
    fields = yaml.safe_load(run.read_text())
    for name in ("student", "corpus", "distill"):
        fields.pop(name, None)
    fields["inputs"] = {"student": "student", "source_prompt": "prompt"}
    run.write_text(yaml.safe_dump(fields))
    code, found = planned(main, run)
    assert code == 2
    assert found["error"] == "the run file lacks the sections student, corpus"
    assert found["hint"].startswith("`plan` needs them: distill is planned too")


def measurement(ranks: object = 1, scalings: Sequence[str] = ("strong",), **change: object) -> str:
    """The file of `bench scale --write`, with some fields of each row changed."""
    rates = {
        "step_seconds": 1.0,
        "tokens_per_second": 1.0,
        "samples_per_second": 1.0,
        "straggler": None,
    }
    rows = []
    for stage in ("distill", "transfer"):
        rows += [{"stage": stage, "scaling": scaling} | rates | change for scaling in scalings]
    return json.dumps({"ranks": ranks, "rows": rows})


@pytest.mark.parametrize(
    "text",
    [
        measurement(tokens_per_second=0),
        measurement(samples_per_second=float("nan")),
        measurement(step_seconds="fast"),
        measurement(step_seconds=None),
        measurement(step_seconds=5e-324, tokens_per_second=1e308),
        measurement(straggler="rank 0 on \x1b[2Ja\nb"),
        measurement(scaling="both"),
        measurement(stage="tune"),
        measurement(0),
        measurement(2),
        measurement(True),
        measurement("1"),
        '{"ranks": 1, "rows": [' + "[" * 100_000,
        '{"ranks": 1, "ranks": 2}',
        "{}",
        "",
    ],
)
def test_a_file_that_is_no_measurement_of_steps_is_refused_by_name(
    tmp_path: Path, main: Callable, text: str
) -> None:
    (tmp_path / "good.json").write_text(measurement())
    (tmp_path / "bad.json").write_text(text)
    code, out, err = main("report", tmp_path / "good.json", tmp_path / "bad.json")
    assert (code, out) == (2, "")
    assert "bad.json is not a measurement of steps" in err
    assert "\x1b" not in err


def test_two_measurements_on_equally_many_gpus_are_refused(tmp_path: Path, main: Callable) -> None:
    for name, ranks in (("a", 1), ("b", 2), ("c", 2)):
        scalings = ("strong",) if ranks == 1 else ("strong", "weak")
        (tmp_path / name).write_text(measurement(ranks, scalings))
    assert main("report", tmp_path / "a", tmp_path / "b")[0] == 0
    code, _, err = main("report", *(tmp_path / name for name in "abc"))
    assert code == 2
    assert "c is a second measurement on 2 GPUs" in err


def test_a_plot_that_cannot_be_written_is_no_traceback(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = main("plan", run, "--nodes=8", "--sweep=8,64", f"--output={tmp_path / 'file'}")
    assert code == 2
    assert "weak scaling, 64 GPUs" in out, "the numbers come first"
    assert f"cannot write {tmp_path / 'file' / 'llama3-70b'}: Not a directory" in err

    measured = tmp_path / "1.json"
    measured.write_text(measurement())
    (tmp_path / "scaling.png").mkdir()
    code, out, err = main("report", measured)
    assert (code, out.count("scaling, 1 GPUs")) == (2, 2)
    assert f"cannot write {tmp_path / 'scaling.png'}: Is a directory" in err


def test_a_lora_in_the_upper_layers_has_a_short_backward_pass(run: Path, main: Callable) -> None:
    tokens = "--set=tune.num_virtual_tokens=10"
    flops = {}
    for name, lora in {"all": "{}", "one": "{upper_layers: 1}"}.items():
        sets = (tokens, "--set=tune.adapter=lora", f"--set=tune.lora={lora}")
        code, plan = planned(main, run, "--nodes=8", *sets)
        assert code == 0, plan["conflicts"]
        flops[name] = plan["stages"][1]["flops_per_gpu"]["forward_and_backward"]
    code, plan = planned(main, run, "--nodes=8", tokens)
    assert flops["all"] == plan["stages"][1]["flops_per_gpu"]["forward_and_backward"]
    assert 0.5 * flops["all"] < flops["one"] < 0.8 * flops["all"]


def test_the_layers_below_a_lora_run_once_in_a_long_private_run(run: Path, main: Callable) -> None:
    settings = ["num_virtual_tokens=10", "adapter=lora", "lora={upper_layers: 1}"]
    private = ["enabled=true", "target_epsilon=8", "declared_examples=1000"]
    sets = [f"--set=tune.{each}" for each in settings]
    sets += [f"--set=privacy.{each}" for each in [*private, "expected_batch_size=10"]]
    stages = {}
    for steps in (199, 200):
        code, plan = planned(main, run, "--nodes=8", *sets, f"--set=privacy.steps={steps}")
        assert code == 0, plan["conflicts"]
        stages[steps] = plan["stages"][1]
    # The student has two layers. A step needs the upper one alone, forward and backward.
    once = stages[199]["step_seconds"] - stages[200]["step_seconds"]
    assert 0.2 < once / stages[199]["step_seconds"] < 0.34
    # The lower one runs over 1,000 examples before the first step, and not over 10 in each.
    assert "reading_seconds" not in stages[199]
    assert stages[200]["reading_seconds"] == pytest.approx(100 * once)
    hours = (200 * stages[200]["step_seconds"] + stages[200]["reading_seconds"]) / 3600
    assert stages[200]["hours"] == pytest.approx(hours)


def test_a_prefix_passes_no_tokens_through_the_layers(run: Path, main: Callable) -> None:
    tokens = "--set=tune.num_virtual_tokens=10"
    found = {}
    for adapter in ("lora", "prefix"):
        sets = (tokens, f"--set=tune.adapter={adapter}")
        code, plan = planned(main, run, "--nodes=8", *sets)
        assert code == 0, plan["conflicts"]
        found[adapter] = plan["stages"][1]
    flops = {name: each["flops_per_gpu"]["forward_and_backward"] for name, each in found.items()}
    assert 0.7 * flops["lora"] < flops["prefix"] < flops["lora"]
    memory = {name: each["memory_gib"] for name, each in found.items()}
    assert memory["prefix"]["activations"] < memory["lora"]["activations"]
    # Each example has its own keys and values, in every layer.
    assert memory["prefix"]["prefixes"] > 0
    assert "prefixes" not in memory["lora"]


def test_loras_of_a_transfer_are_trained_one_after_the_other(run: Path, main: Callable) -> None:
    owners = '--set=inputs.source_prompt=["a", "b", "c"]'
    found = {}
    for name, sets in {
        "prompts": (),
        "loras": ("--set=transfer.adapter=lora",),
        "upper loras": ("--set=transfer.adapter=lora", "--set=transfer.lora.upper_layers=1"),
    }.items():
        _, plan = planned(main, run, "--nodes=8", owners, *sets)
        (found[name],) = (each for each in plan["stages"] if each["stage"] == "transfer")
    assert found["prompts"]["prompts_at_once"] == 3
    assert found["loras"]["prompts_at_once"] == found["upper loras"]["prompts_at_once"] == 1
    # The weights are gathered for each of them.
    each_step = found["prompts"]["received_gib_per_gpu"]["gather"]
    assert found["loras"]["received_gib_per_gpu"]["gather"] == each_step
    assert found["loras"]["hours"] > found["prompts"]["hours"]
    backward = {name: stage["flops_per_gpu"]["backward"] for name, stage in found.items()}
    assert backward["loras"] == pytest.approx(backward["prompts"] / 3)
    assert backward["upper loras"] < 0.5 * backward["loras"]


def test_heads_of_a_transfer_cost_passes_over_the_public_text(run: Path, main: Callable) -> None:
    owners = '--set=inputs.source_prompt=["a", "b", "c"]'
    sets = ("--set=transfer.adapter=head", "--set=transfer.batch_size=64")
    found = {}
    for name, more in {
        "one": ("--set=public_task.max_rows=25600",),
        "three": ("--set=public_task.max_rows=25600", owners),
        "twice the texts": ("--set=public_task.max_rows=51200",),
        "no limit": (),
    }.items():
        _, plan = planned(main, run, "--nodes=8", *sets, *more)
        (found[name],) = (each for each in plan["stages"] if each["stage"] == "transfer")
        passes = "the models' passes over the public text before the transfer"
        assert (passes in plan["not_counted"]) == (name == "no limit")
    one = found["one"]
    # Four texts of each of 64 ranks at once. 25,600 texts are 100 batches, read without and with
    # the prompt; 512 of them are read once more.
    assert one["steps"] == 202
    assert "backward" not in one["flops_per_gpu"]
    assert "reduce" not in one["received_gib_per_gpu"]
    # All heads stand behind one prompt.
    assert found["three"]["hours"] == one["hours"]
    assert (one["prompts"], found["three"]["prompts"]) == (1, 3)
    of_512_texts = 2 * one["step_seconds"] / 3600
    twice = 2 * (one["hours"] - of_512_texts)
    assert found["twice the texts"]["hours"] - of_512_texts == pytest.approx(twice)
    assert one["hours"] > 202 * one["step_seconds"] / 3600, "the student reads them too"
    assert found["no limit"]["hours"] == 0

    # A baseline is trained beside them.
    baseline = '--set=evaluate.baselines=["published transfer"]'
    limit = "--set=public_task.max_rows=25600"
    _, plan = planned(main, run, "--nodes=8", *sets, limit, baseline)
    (both,) = (each for each in plan["stages"] if each["stage"] == "transfer")
    assert both["flops_per_gpu"]["backward"] > 0
    assert both["prompts"] == 2
    steps = both["steps"] * both["step_seconds"] / 3600
    assert both["hours"] == pytest.approx(one["hours"] + steps)
    # The baselines of several epsilons are trained beside each other, as without heads.
    rows = ("--set=evaluate.private_rows=[8, 4, 2]", limit, baseline)
    _, plan = planned(main, run, "--nodes=8", *sets, *rows)
    (several,) = (each for each in plan["stages"] if each["stage"] == "transfer")
    assert several["prompts_at_once"] == 4
    assert several["memory_gib"]["activations"] == 4 * both["memory_gib"]["activations"]
    assert several["memory_gib"]["activations"] > one["memory_gib"]["activations"]


def test_a_warm_start_and_a_head_are_counted(run: Path, main: Callable) -> None:
    texts = {"template": "{text} It was", "labels": {"0": ["bad"], "1": ["good"]}}
    fields = yaml.safe_load(run.read_text())
    fields["public_task"] |= texts
    fields["warm_start"] = {"steps": 50, "batch_size": 128}
    fields["tune"] = {"adapter": "head"}
    run.write_text(yaml.safe_dump(fields))
    code, plan = planned(main, run, "--nodes=8")
    assert code == 0, plan["conflicts"]
    assert [stage["stage"] for stage in plan["stages"]] == [
        "distill",
        "warm_start",
        "tune",
        "transfer",
    ]
    _, warm_start, tune, _ = plan["stages"]

    # Two texts of each of 64 ranks, forward and backward.
    public = fields["public_task"].get("max_length", 128)
    layer = 8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    tokens = 2 * (10 + public)
    forward = 2 * 2 * layer * tokens + 2 * 4 * tokens * (10 + public) * 8192
    head = 2 * 2 * 8192 * 128256
    assert warm_start["flops_per_gpu"]["forward_and_backward"] == pytest.approx(
        2 * (forward + head)
    )
    assert warm_start["hours"] == pytest.approx(50 * warm_start["step_seconds"] / 3600)
    # The teacher leaves the memory before the student comes.
    memory = warm_start["memory_gib"]
    assert warm_start["memory_total_gib"] < sum(memory.values())

    # A head reads each example once, without a backward pass.
    private = fields["private_task"].get("max_length", 128)
    tokens = fields["privacy"]["declared_examples"] * (10 + private)
    forward = 2 * 2 * layer * tokens + 2 * 4 * tokens * (10 + private) * 8192
    rate = plan["assumptions"]["teraflops_reached"] * 1e12
    assert tune["reading_seconds"] == pytest.approx(forward / rate)
    steps = tune["steps"] * tune["step_seconds"]
    assert tune["hours"] == pytest.approx((tune["reading_seconds"] + steps) / 3600)


@pytest.mark.parametrize(
    ("adapter", "counts", "passes"),
    [
        ("head", "comparison_noise_multiplier=20", 1),
        ("prompt", "comparison_noise_multiplier=20", 2),
        ("prompt", "search={mean_trials: 3, learning_rate: [0.1]}", 3),
    ],
)
def test_counting_right_examples_costs_forward_passes(
    run: Path, main: Callable, adapter: str, counts: str, passes: int
) -> None:
    private = ["enabled=true", "target_epsilon=8", "declared_examples=900", "steps=10"]
    sets = [f"--set=privacy.{each}" for each in [*private, "expected_batch_size=10"]]
    sets += [f"--set=tune.adapter={adapter}", "--set=tune.num_virtual_tokens=10"]
    sets += ["--set=private_task.validation_share=0.2", "--set=warm_start={batch_size: 64}"]
    tune = {}
    for setting in ("", counts):
        added = [f"--set=tune.{setting}"] if setting else []
        code, plan = planned(main, run, "--nodes=8", *sets, *added)
        assert code == 0, plan["conflicts"]
        (tune[setting],) = [stage for stage in plan["stages"] if stage["stage"] == "tune"]
    # The task has a test split of its own, so a quarter as many examples are in the validation
    # split. A head reads the others in one pass.
    code, plan = planned(main, run, "--nodes=8", *sets, "--set=tune.adapter=head")
    (head,) = [stage for stage in plan["stages"] if stage["stage"] == "tune"]
    counting = tune[counts]["counting_seconds"]
    assert counting == pytest.approx(passes / 4 * head["reading_seconds"])
    assert "counting_seconds" not in tune[""]
    trials = tune[counts]["trials_of_each"] or 1
    added_steps = (trials - 1) * tune[""]["steps"] * tune[""]["step_seconds"]
    more = 3600 * (tune[counts]["hours"] - tune[""]["hours"])
    assert more == pytest.approx(counting + added_steps)


def test_each_stage_is_planned_on_the_nodes_of_its_job(run: Path, main: Callable) -> None:
    own = ("--set=cluster.distill={nodes: 8}", "--set=cluster.transfer={nodes: 1}")
    own += ("--set=engine.shard_group=all", "--set=transfer.batch_size=64")
    _, plan = planned(main, run, *own)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert (stages["distill"]["gpus"], stages["transfer"]["gpus"]) == (64, 8)
    for nodes, stage in ((8, "distill"), (1, "transfer")):
        _, alike = planned(main, run, *own, f"--nodes={nodes}")
        (same,) = [each for each in alike["stages"] if each["stage"] == stage]
        assert stages[stage] == same
    # The large model needs 141 GB, and the evaluation has four GPUs on its one node.
    few = ("--set=cluster.evaluate={nodes: 1}", "--gpus-per-node=1")
    _, plan = planned(main, run, *own, *few)
    assert any(line.startswith("evaluate: ") for line in plan["conflicts"]), plan["conflicts"]


def test_a_group_that_lies_across_nodes_gathers_over_the_network() -> None:
    described = read_hardware("h100", None)
    for nodes, ranks, link in (
        (3, 8, "node"),
        (3, 4, "node"),
        (3, 6, "network"),
        (3, 24, "network"),
        (1, 6, "node"),
    ):
        assert Machine(nodes, 8, described).link(ranks) == link, (nodes, ranks)


def test_a_private_lora_keeps_a_gradient_of_each_example(run: Path, main: Callable) -> None:
    targets = "[q_proj, k_proj, v_proj, o_proj]"
    sets = ["tune.adapter=lora", f"tune.lora={{r: 16, target_modules: {targets}}}"]
    sets += ["tune.num_virtual_tokens=10", "private_task.max_length=118"]
    sets += ["tune.micro_batch_size_per_gpu=8"]
    private = ["enabled=true", "target_epsilon=8", "declared_examples=900", "steps=10"]
    sets += [f"privacy.{each}" for each in [*private, "expected_batch_size=10"]]
    code, plan = planned(main, run, "--nodes=8", *[f"--set={each}" for each in sets])
    assert code == 0, plan["conflicts"]
    (tune,) = [stage for stage in plan["stages"] if stage["stage"] == "tune"]
    # The student has two layers. Queries and outputs are 8192 wide, keys and values 1024.
    values = 2 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024))
    # Of examples with 16 tokens, 8 times as many as of the longest ones are in a pass.
    gradients = 64 * values * 4 / 2**30
    assert tune["memory_gib"]["gradients_of_examples"] == pytest.approx(gradients)


def test_an_attack_costs_what_a_distillation_of_all_layers_costs(run: Path, main: Callable) -> None:
    layers = ("--set=student.layers=[0,1,2,79]", "--set=student.num_layers=null")
    common = ("--nodes=8", *layers, "--set=distill.steps=100", "--set=distill.cache=none")
    frozen = (*common, "--set=student.frozen_lower_layers=3")
    _, plan = planned(main, run, *common)
    unfrozen = plan["stages"][0]
    _, plan = planned(main, run, *frozen)
    alone = plan["stages"][0]
    # 100 steps of 512 sequences of 2,048 tokens, and twice as many.
    tokens = f"--set=distill.attack_tokens=[{100 * 512 * 2048}, {200 * 512 * 2048}]"
    _, plan = planned(main, run, *frozen, tokens)
    attacked = plan["stages"][0]

    assert "attack_hours" not in alone
    assert attacked["attack_hours"] == pytest.approx(3 * unfrozen["hours"])
    assert attacked["hours"] == pytest.approx(alone["hours"] + 3 * unfrozen["hours"])
    # All layers are trained, which takes more memory than the student itself did.
    assert alone["memory_total_gib"] < unfrozen["memory_total_gib"]
    assert attacked["memory_total_gib"] == pytest.approx(unfrozen["memory_total_gib"])
