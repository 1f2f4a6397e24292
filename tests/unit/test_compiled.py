"""Compiled layers and losses beside the plain ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from operations import profiled_operations_of
from torch import nn

from post_dist.config.schema import Distill
from post_dist.errors import EnvironmentFault
from post_dist.losses.distillation import LossSettings, distillation_loss
from post_dist.losses.heads import Heads
from post_dist.losses.signals import HiddenSignal
from post_dist.losses.terms import weights_of
from post_dist.models import compiled
from post_dist.models.compiled import compile_layers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole

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
    with pytest.raises(RuntimeError, match="do not see the hooks"):
        fused(input_ids_BT, answer=torch.tensor([3, 4, 5]))


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


def test_a_missing_compiler_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_whole(tiny.write_model(tmp_path, "llama", layers=1), "fp32", CPU)
    compiled._check_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-compiler",), "force_disable_caches": True}),
        pytest.raises(EnvironmentFault, match=r"distill\.compile: torch cannot compile"),
    ):
        compile_layers(model)
