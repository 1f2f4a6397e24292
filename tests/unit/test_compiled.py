"""Compiled layers and losses beside the plain ones."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from operations import profiled_operations_of
from privacy.gradient_checks import tuning_task
from torch import nn
from torch._dynamo.utils import counters

from post_dist.artifacts.lora import DOWN, UP, Lora
from post_dist.config.schema import Distill
from post_dist.errors import EnvironmentFault
from post_dist.losses.distillation import LossSettings, distillation_loss
from post_dist.losses.heads import Heads
from post_dist.losses.signals import HiddenSignal
from post_dist.losses.terms import weights_of
from post_dist.models import compiled
from post_dist.models.adapted import adapted
from post_dist.models.compiled import compile_again, compile_layers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole
from post_dist.privacy.gradients import task_gradients

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    # Each fused kernel then shows in a profile.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        yield


def gradients_of(model: LanguageModel, input_ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of a sum over the last hidden states."""
    model.zero_grad()
    (model(input_ids_BT) ** 2).sum().backward()
    return [weight.grad.clone() for weight in model.layers.parameters()]


def test_compiled_layers_compute_the_same_with_few_operations(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "gemma2", layers=12)
    plain = load_whole(folder, "fp32", CPU).requires_grad_()
    fused = load_whole(folder, "fp32", CPU).requires_grad_()
    compile_layers(fused)
    input_ids_BT = torch.randint(4, 600, (3, 16))
    expected = gradients_of(plain, input_ids_BT)
    found = gradients_of(fused, input_ids_BT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    operations = profiled_operations_of(lambda: gradients_of(fused, input_ids_BT))
    assert operations < 0.4 * profiled_operations_of(lambda: gradients_of(plain, input_ids_BT))


@pytest.mark.parametrize("share_prompt", [False, True])
def test_compiled_layers_see_hooks_and_serve_all_shapes(
    tmp_path: Path, share_prompt: bool, without_fusion: None
) -> None:
    folder = tiny.write_model(tmp_path, "llama", layers=2)
    plain = load_whole(folder, "fp32", CPU)
    fused = load_whole(folder, "fp32", CPU)
    compile_layers(fused)
    assert fused.shares_prompt
    versions = []
    for length in range(8, 14):
        input_ids_BT = torch.randint(4, 600, (4, length))
        answer_B = torch.randint(2, length, (4,))
        lora = lora_of(plain, length) if length % 3 else None
        found = []
        for model in (plain, fused):
            prompt_nd = torch.full((5, model.width), 0.1, requires_grad=True)
            with adapted(model, lora):
                logits_BV = model(
                    input_ids_BT, prompt=prompt_nd, answer=answer_B, share_prompt=share_prompt
                )
            logits_BV.square().sum().backward()
            found.append((logits_BV, prompt_nd.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        versions.append(counters["stats"]["unique_graphs"])
    # The first passes without and with a LoRA compile two kinds of layers: the last one has a hook.
    assert versions[0] < versions[1] == versions[-1]


def lora_of(model: LanguageModel, seed: int) -> Lora:
    """Return a LoRA that changes the outputs of a model much."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            outputs, inputs = module.weight.shape
            factors[name + DOWN] = torch.randn(2, inputs, generator=generator)
            factors[name + UP] = torch.randn(outputs, 2, generator=generator)
    return Lora(factors, alpha=2.0)


def test_passes_with_a_cache_run_uncompiled(tmp_path: Path, without_fusion: None) -> None:
    model = load_whole(tiny.write_model(tmp_path, "llama", layers=2), "fp32", CPU)
    compile_layers(model)
    before = counters["stats"]["unique_graphs"]
    prefix = model.prefix_of(torch.full((5, model.width), 0.1))
    with torch.no_grad():
        model(torch.randint(4, 600, (2, 8)), prefix=prefix)
        model.model.generate(torch.arange(4, 9)[None], max_new_tokens=2)
    assert model.differentiates_prefix
    assert counters["stats"]["unique_graphs"] == before


def test_a_copy_of_a_compiled_model_runs_its_own_weights(
    tmp_path: Path, without_fusion: None
) -> None:
    model = load_whole(tiny.write_model(tmp_path, "llama", layers=2), "fp32", CPU)
    compile_layers(model)
    copied = copy.deepcopy(model)
    compile_again(copied)
    input_ids_BT = torch.randint(4, 600, (2, 8))
    with torch.no_grad():
        before = model(input_ids_BT)
        for weight in copied.layers.parameters():
            weight.zero_()
        assert not torch.allclose(copied(input_ids_BT), before)
        assert torch.equal(model(input_ids_BT), before)


def test_examples_of_a_compiled_student_do_not_change_each_other() -> None:
    task = tuning_task("llama", torch.float32)
    compile_layers(task.model)
    compute = task_gradients(task, [task.start_nd.float()])

    def gradients(examples: list[int]) -> torch.Tensor:
        batch = task.reader.collate([task.examples[example] for example in examples])
        return compute(batch, task.targets[examples])[0]

    found = gradients([0, 1, 2])
    assert torch.equal(gradients([2, 0, 1]), found[[2, 0, 1]])
    for layer in task.model.layers:
        del layer.forward
    torch.testing.assert_close(found, gradients([0, 1, 2]), rtol=1e-3, atol=1e-6)


def test_a_compiled_loss_is_the_plain_one_with_few_operations() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 50, bias=False).requires_grad_(False)
    hidden_Nd = torch.randn(40, 6, requires_grad=True)
    signal = HiddenSignal(hidden=torch.randn(40, 6))
    labels_N = torch.arange(40) % 50
    labels_N[3] = -100

    def loss_of(*, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        settings = LossSettings(weights_of(Distill()), 2.0, pieces=3, compiled=compiled)
        loss, _ = distillation_loss(hidden_Nd, signal, labels_N, Heads(head, head), settings)
        (gradient_Nd,) = torch.autograd.grad(loss, hidden_Nd)
        return loss, gradient_Nd

    torch.testing.assert_close(loss_of(compiled=True), loss_of(compiled=False))
    operations = profiled_operations_of(lambda: loss_of(compiled=True))
    assert operations < 0.75 * profiled_operations_of(lambda: loss_of(compiled=False))


def test_compiled_code_of_others_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_whole(tiny.write_model(tmp_path / "model", "llama", layers=1), "fp32", CPU)
    shared = tmp_path / "shared"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    for mode in (0o777, 0o775):
        shared.mkdir(exist_ok=True)
        shared.chmod(mode)
        with pytest.raises(EnvironmentFault, match=r"others may write to .*shared"):
            compile_layers(model)
    shared.chmod(0o755)
    compile_layers(model)
    if os.geteuid() == 0:
        # Whoever made a link may let it lead elsewhere later.
        link = tmp_path / "link"
        link.symlink_to(shared)
        os.chown(link, 65534, 65534, follow_symlinks=False)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(link))
        with pytest.raises(EnvironmentFault, match="others may write"):
            compile_layers(model)


def test_a_missing_compiler_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_whole(tiny.write_model(tmp_path, "llama", layers=1), "fp32", CPU)
    compiled._check_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-compiler",), "force_disable_caches": True}),
        pytest.raises(EnvironmentFault, match=r"engine\.compile: torch cannot compile"),
    ):
        compile_layers(model)
