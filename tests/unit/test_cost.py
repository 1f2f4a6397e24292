"""The cost formulas against what torch counts on real steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from post_dist.artifacts.task import PromptTask
from post_dist.config.load import load_run
from post_dist.config.schema import Distill, Student, Transfer
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.lower_block import take_out_lower_block
from post_dist.models.size import size_of
from post_dist.models.student import freeze, stand_in_layers, write_student
from post_dist.planning.cost import (
    TransferBatch,
    distill_flops,
    forward_flops,
    transfer_flops,
)
from post_dist.planning.inputs import models_of
from post_dist.runtime.distributed import World
from post_dist.stages.distill.model import DistillationModel
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair
from post_dist.stages.transfer.step_losses import transfer_losses

CPU = torch.device("cpu")
CAUSAL = [family for family in tiny.FAMILIES if family != "roberta"]


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "mixtral", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(
        tmp_path_factory.mktemp("cost") / request.param, request.param, layers=5, width=64
    )


def test_sizes_are_the_model_s(folder: Path) -> None:
    size, model = size_of(folder), load_whole(folder, "fp32", CPU)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(size.layers) == 5
    assert sorted(size.weights) == sorted(parameter.numel() for parameter in model.parameters())


class Counter(TorchDispatchMode):
    """Adds up torch's own formulas of all operations.

    Its FlopCounterMode follows modules, and fails where a forward pass differentiates.
    """

    total = 0.0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        if func._overloadpacket is torch.ops.aten._grouped_mm:
            # torch has no formula for the products of all experts in one call.
            self.total += 2 * args[0].numel() * args[1].shape[-1]
        return made


def counted(work: Callable[[], object]) -> float:
    with Counter() as counter:
        work()
    return counter.total


def test_a_forward(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    input_ids = torch.randint(4, 300, (3, 40))
    with torch.no_grad():
        assert forward_flops(size_of(folder), 3, 40) == pytest.approx(
            counted(lambda: model(input_ids)), rel=1e-6
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_forward_of_one_expert_after_the_other(tmp_path: Path, family: str) -> None:
    """Torch counts all of these products by its own formulas."""
    model = load_whole(tiny.write_model(tmp_path, family), "fp32", CPU)
    model.model.set_experts_implementation("eager")
    input_ids = torch.randint(4, 300, (3, 40))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids)
    assert counter.get_total_flops() == forward_flops(size_of(tmp_path), 3, 40)


@pytest.mark.parametrize(("frozen", "freeze_head"), [(0, True), (2, True), (0, False)])
def test_a_step_of_distillation(
    folder: Path, tmp_path: Path, frozen: int, freeze_head: bool
) -> None:
    layers = (0, 1, 4)
    (tmp_path / "student").mkdir()
    write_student(tmp_path / "student", folder, layers, load_tokenizer(folder))
    teacher, student = (
        load_whole(folder, "fp32", CPU),
        load_whole(tmp_path / "student", "fp32", CPU),
    )
    if teacher.masked:
        pytest.skip("the head of RoBERTa is more than one product")
    section = Student(
        layers=layers,
        frozen_lower_layers=frozen,
        freeze_embeddings=freeze_head,
        freeze_head=freeze_head,
    )
    freeze(student, section)
    take_out_lower_block(student, frozen)
    model, asked = (
        DistillationModel(student, Distill(), head_is_frozen=freeze_head),
        OnlineTeacher(teacher, frozen),
    )
    input_ids = torch.randint(4, 300, (3, 40))

    def step() -> None:
        signal = asked.signals_of([], input_ids, None)
        model(input_ids, torch.roll(input_ids, -1, 1), None, signal)[0].backward()

    upper = size_of(folder).cut(layers).above(frozen)
    assert upper.parameters == sum(parameter.numel() for parameter in student.parameters())
    ours = distill_flops(size_of(folder), upper, 3, 40, freeze_head=freeze_head)
    assert sum(ours.values()) == pytest.approx(counted(step), rel=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        "freeze_head=false",
        "freeze_embeddings=false",
        "frozen_lower_layers=1",
        "frozen_lower_layers=0",
    ],
)
def test_what_is_trained_is_the_student_s(tmp_path: Path, setting: str) -> None:
    run, folder = tiny.write_run(tmp_path, "qwen2"), tmp_path / "student"
    config, teacher = load_run(run, [f"student.{setting}"], None), size_of(tmp_path / "teacher")
    folder.mkdir()
    write_student(
        folder,
        tmp_path / "teacher",
        stand_in_layers(config.student, 4),
        load_tokenizer(tmp_path / "teacher"),
    )
    student = load_whole(folder, "fp32", CPU)
    freeze(student, config.student)
    assert models_of(config, teacher).trained == sum(
        parameter.numel() for parameter in student.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize("kind", ["vocabulary", "classes", "responses"])
def test_a_step_of_the_transfer(folder: Path, kind: str) -> None:
    model, words = load_whole(folder, "fp32", CPU), load_tokenizer(folder)
    if model.masked and kind == "responses":
        pytest.skip("a masked model writes nothing")
    most = 3 if kind == "responses" else 0
    mask = " {mask}" if model.masked else ""
    task = PromptTask(
        f"{{text}} It was{mask}",
        () if most else (("bad",), ("good",)),
        48,
        False,
        "good",
        max_response_length=most,
    )
    section = Transfer() if kind == "classes" else Transfer(objective="published")
    texts, responses = ["the film is dull and weak"] * 6, ["it is a dull and weak film"] * 6
    models = ModelPair(model, model)
    public = PublicExamples(texts, responses)
    world = World(0, 1, 0, "none", CPU)
    builder = ObjectiveBuilder(models, Tokenizers(words, words), public, world)
    objective = builder.build(task, torch.randn(10, 64), section)
    prompt_nd = torch.randn(10, 64, requires_grad=True)
    length = len(objective.examples[0].token_ids)

    def step() -> None:
        transfer_losses(models, [objective], [prompt_nd], [list(range(6))])[0].backward()

    size = size_of(folder)
    assert size.shares_prompt == model.shares_prompt
    batch = TransferBatch(6, length, prompt=10, responses=most)
    ours = transfer_flops(size, size, batch, by_classes=kind == "classes")
    # RoBERTa's head has a product of its own width before the vocabulary's, forward and backward:
    # of the prompted answers, or of both kinds with the constants.
    own_head = model.masked * 2 * 64 * 64 * 6 * (2 if kind == "classes" else 6)
    assert sum(ours.values()) + own_head == pytest.approx(counted(step), rel=1e-6)
