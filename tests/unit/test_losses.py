"""The losses against their formulas, written out once more in fp64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from operations import operations_of, reads_of
from torch import nn
from torch.nn import functional

from post_dist.config.schema import Distill
from post_dist.losses import distillation as losses
from post_dist.losses.distillation import LossSettings, TermValues, distillation_loss
from post_dist.losses.divergence import softened_kl, unexplained_share
from post_dist.losses.heads import Head, Heads
from post_dist.losses.metric_labels import METRIC_LABELS
from post_dist.losses.pieces import step_pieces
from post_dist.losses.signals import (
    HiddenSignal,
    ProjectedSignal,
    SampledSignal,
    TeacherSignal,
    project_teacher,
    sample_teacher,
    signal_of_tensors,
)
from post_dist.losses.terms import TERMS, hidden_terms_in_use, weights_of
from post_dist.losses.transfer import proxy_logits, published_transfer_loss, share_matching_offsets

WEIGHTS = {"ce": 5.0, "lm": 2.0, "cos": 1.0}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def kl(first: np.ndarray, second: np.ndarray) -> float:
    return float((first * (np.log(first) - np.log(second))).sum(axis=-1).mean())


@pytest.fixture
def logits() -> list[np.ndarray]:
    return list(3 * np.random.default_rng(0).standard_normal((4, 5, 11)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_published_loss_is_the_paper_s(
    logits: list[np.ndarray], alpha: float, temperature: float
) -> None:
    z_s, z_s_p, z_t, z_t_p = logits
    mimic = kl(softmax(z_s_p / temperature), softmax(z_t_p / temperature))
    shift = kl(softmax((z_s_p - z_s) / temperature), softmax((z_t_p - z_t) / temperature))
    expected = temperature**2 * ((1 - alpha) * mimic + alpha * shift)
    tensors = [torch.tensor(z) for z in logits]
    ours = published_transfer_loss(*tensors, alpha=alpha, temperature=temperature)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_kl_is_forward_and_not_symmetric(logits: list[np.ndarray]) -> None:
    teacher, student = (torch.tensor(z) for z in logits[:2])
    forward = float(softened_kl(teacher, student, 1.0))
    backward = float(softened_kl(student, teacher, 1.0))
    assert forward == pytest.approx(kl(softmax(logits[0]), softmax(logits[1])), rel=1e-5)
    assert forward != pytest.approx(backward, rel=1e-2)


def test_proxy_logits(logits: list[np.ndarray]) -> None:
    z_s, z_s_p, z_t, _ = logits
    ours = proxy_logits(torch.tensor(z_s), torch.tensor(z_s_p), torch.tensor(z_t), 2.0)
    np.testing.assert_allclose(ours, z_t + 2 * (z_s_p - z_s), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[1 << 20, 30])
def few_in_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOGITS_IN_CACHE", request.param)


@pytest.mark.usefixtures("few_in_cache")
@pytest.mark.parametrize(("positions", "pieces"), [(7, 1), (7, 9), (1100, 3)])
def test_distillation_terms_and_gradients_do_not_depend_on_pieces(
    positions: int, pieces: int
) -> None:
    torch.manual_seed(0)
    student = torch.randn(positions, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(positions, 8, dtype=torch.float64)
    head_s = nn.Linear(8, 13).double()
    head_t = nn.Linear(8, 13).double()
    labels = torch.randint(13, (positions,))
    labels[::3] = -100
    heads = Heads(head_s, head_t, trained=tuple(head_s.parameters()))
    settings = LossSettings(WEIGHTS, temperature=2.0, pieces=pieces)
    loss, terms = distillation_loss(student, HiddenSignal(hidden=teacher), labels, heads, settings)
    ours = torch.autograd.grad(loss, [student, *heads.trained])

    log_s = (head_s(student) / 2).log_softmax(-1)
    log_t = (head_t(teacher) / 2).log_softmax(-1)
    ce = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    lm = functional.cross_entropy(head_s(student), labels)
    cos = (1 - functional.cosine_similarity(student, teacher)).mean()
    direct = torch.autograd.grad(5 * ce + 2 * lm + cos, [student, *heads.trained])
    assert loss.item() == pytest.approx((5 * ce + 2 * lm + cos).item(), rel=1e-5)
    expected = torch.stack([ce, lm, cos])
    torch.testing.assert_close(terms.stacked().double(), expected, rtol=1e-5, atol=0)
    for one, other in zip(ours, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 5])
def test_the_host_reads_one_value_of_a_batch(pieces: int) -> None:
    """The number of labels. Reading a value of each piece would wait for the GPU each time."""
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=False).requires_grad_(False)
    hidden_Nd = torch.randn(10, 6, requires_grad=True)
    labels_N = torch.arange(10)
    labels_N[3] = -100
    signal = HiddenSignal(hidden=torch.randn(10, 6))
    settings = LossSettings(WEIGHTS, 2.0, pieces)

    def step() -> None:
        loss, _ = distillation_loss(hidden_Nd, signal, labels_N, Heads(head, head), settings)
        loss.backward()

    assert reads_of(step) == 1


def test_a_step_on_a_gpu_starts_a_third_of_the_kernels() -> None:
    """With 32 sequences of 512 tokens, and a vocabulary of 49,152."""
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=False).requires_grad_(False)
    hidden_Nd = torch.randn(100, 6, requires_grad=True)
    signal = HiddenSignal(hidden=torch.randn(100, 6))
    labels_N = torch.arange(100) % 11

    def operations(device_type: str) -> int:
        pieces = step_pieces(32 * 512, 49152, device_type)
        settings = LossSettings(WEIGHTS, 2.0, pieces)
        heads = Heads(head, head)
        counts = operations_of(
            lambda: distillation_loss(hidden_Nd, signal, labels_N, heads, settings)[0].backward()
        )
        return counts.total()

    assert operations("cuda") < 0.33 * operations("cpu")


def plain_loss(
    student_Nd: torch.Tensor,
    teacher: TeacherSignal,
    labels_N: torch.Tensor,
    heads: tuple[Head, Head],
    temperature: float,
) -> torch.Tensor:
    """The loss of the paper in one autograd graph, in the precision of its inputs."""
    head_s, head_t = heads
    log_s = (head_s(student_Nd) / temperature).log_softmax(-1)
    if isinstance(teacher, SampledSignal):
        counts = functional.one_hot(teacher.samples, log_s.shape[-1]).sum(1)
        p = counts.to(log_s.dtype) / teacher.samples.shape[1]
        kl_N = -(p * log_s).sum(-1) - teacher.entropy
    else:
        log_t = (head_t(teacher.hidden) / temperature).log_softmax(-1)
        kl_N = (log_t.exp() * (log_t - log_s)).sum(-1)
    loss = WEIGHTS["ce"] * temperature**2 * kl_N.mean()
    loss = loss + WEIGHTS["lm"] * functional.cross_entropy(head_s(student_Nd), labels_N)
    if not isinstance(teacher, SampledSignal):
        cosines = functional.cosine_similarity(student_Nd, teacher.hidden, dim=-1)
        loss = loss + WEIGHTS["cos"] * (1 - cosines.mean())
    return loss


@pytest.mark.usefixtures("few_in_cache")
@pytest.mark.parametrize(
    ("kind", "trained", "dtype"),
    [
        *itertools.product(["hidden", "sampled"], [False, True], TOLERANCES),
        ("projected", False, torch.float32),  # used for a frozen head in fp32 only
    ],
)
def test_every_signal_has_the_loss_and_gradients_of_the_formula_in_fp64(
    kind: str, trained: bool, dtype: torch.dtype
) -> None:
    tolerance = TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(61, 16, generator=generator).to(dtype)
    hidden = torch.randn(61, 16, generator=generator).to(dtype)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    labels = torch.randint(50, (61,), generator=generator)
    labels[::4] = -100

    head_t = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    head_t.weight.data = weight.clone()
    head_s = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(trained)
    head_s.weight.data = weight.clone()
    if trained:
        head_s.weight.data *= 0.5
    signal: TeacherSignal = HiddenSignal(hidden=hidden)
    if kind == "projected":
        signal = replace(project_teacher(hidden, head_t, 2.0, weight), hidden=hidden)
    if kind == "sampled":
        signal = sample_teacher(hidden, head_t, 50, 2.0, torch.rand(61, generator=generator), 28)

    inputs = [student.clone().requires_grad_(), *(head_s.parameters() if trained else ())]
    heads = Heads(head_s, head_t, trained=tuple(inputs[1:]))
    loss, _ = distillation_loss(inputs[0], signal, labels, heads, LossSettings(WEIGHTS, 2.0, 3))
    ours = torch.autograd.grad(loss, inputs)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weight_s = exact[1] if trained else head_s.weight.double()
    heads_64 = (lambda h: h @ weight_s.T, lambda h: h @ weight.double().T)
    signal_64 = signal.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    expected_loss = plain_loss(exact[0], signal_64, labels, heads_64, 2.0)
    expected = torch.autograd.grad(expected_loss, exact)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    for one, other in zip(ours, expected, strict=True):
        error = float((one.double() - other).norm() / other.norm())
        assert error < tolerance


# Loss, terms and norm of the gradient, recorded before the terms became objects.
RECORDED = {
    "hidden": (32.0456696, [4.82884836, 3.4241302, 1.05316913], 10.4715958),
    "projected": (32.0456696, [4.82884836, 3.4241302, 1.05316913], 10.4715958),
    "sampled": (30.7620411, [4.78275633, 3.4241302, 0.0], 10.406436),
}


@pytest.mark.parametrize("kind", list(RECORDED))
def test_values_are_those_that_were_recorded(kind: str) -> None:
    numbers = torch.arange(7 * 4, dtype=torch.float32).view(7, 4)
    student = (numbers * 0.7).sin().requires_grad_()
    hidden = (numbers * 1.3).cos()
    weight = (torch.arange(9 * 4, dtype=torch.float32).view(9, 4) * 0.9).sin() * 2
    labels = torch.tensor([0, -100, 2, 8, 3, -100, 5])

    def head(states: torch.Tensor) -> torch.Tensor:
        return states @ weight.T

    signal: TeacherSignal = HiddenSignal(hidden=hidden)
    if kind == "projected":
        signal = replace(project_teacher(hidden, head, 1.5, weight), hidden=hidden)
    if kind == "sampled":
        signal = sample_teacher(hidden, head, 9, 1.5, torch.linspace(0, 0.9, 7), 28)
    settings = LossSettings(WEIGHTS, temperature=1.5, pieces=2)
    loss, terms = distillation_loss(student, signal, labels, Heads(head, head), settings)
    (gradient,) = torch.autograd.grad(loss, student)
    expected_loss, expected_terms, expected_norm = RECORDED[kind]
    found = (loss.item(), terms.stacked().tolist(), gradient.norm().item())
    assert found[0] == pytest.approx(expected_loss, rel=1e-6), found
    assert found[1] == pytest.approx(expected_terms, rel=1e-6)
    assert found[2] == pytest.approx(expected_norm, rel=1e-6)


@pytest.mark.parametrize("asked_for", [1, 7])
def test_a_scaled_loss_in_fp16_has_the_gradient_of_fp32(asked_for: int) -> None:
    """The student is near its teacher, where the gradient of a mean over positions is smallest."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4096, 16, generator=generator)
    weight = torch.randn(1000, 16, generator=generator) / 4
    student = teacher + 0.02 * torch.randn(4096, 16, generator=generator)
    labels = torch.randint(1000, (4096,), generator=generator)
    labels[torch.arange(4096) % asked_for > 0] = -100
    for weights in ({"ce": 5.0, "lm": 0.0, "cos": 0.0}, WEIGHTS):
        gradients = []
        for dtype, scale in ((torch.float32, 1.0), (torch.float16, 65536.0)):
            head = nn.Linear(16, 1000, bias=False).requires_grad_(False)
            head.weight.data = weight.half().to(dtype)
            hidden = student.half().to(dtype).requires_grad_(True)
            signal = HiddenSignal(hidden=teacher.half().to(dtype))
            settings = LossSettings(weights, temperature=2.0, pieces=2)
            loss, _ = distillation_loss(hidden, signal, labels, Heads(head, head), settings)
            (gradient,) = torch.autograd.grad(scale * loss, hidden)
            gradients.append(gradient.float() / scale)
        exact, ours = gradients
        error = float((ours - exact).norm() / exact.norm())
        print(f"weights {weights}: relative error {error:.1e}")
        assert error < 0.05


@pytest.mark.usefixtures("few_in_cache")
def test_a_product_stands_for_the_whole_distribution() -> None:
    student = torch.randn(700, 8, requires_grad=True)
    teacher = torch.randn(700, 8)
    labels = torch.randint(13, (700,))
    head = nn.Linear(8, 13, bias=False).requires_grad_(False)
    heads = Heads(head, head)
    settings = LossSettings(WEIGHTS, temperature=2.0)

    def loss_of(signal: TeacherSignal) -> tuple[torch.Tensor, TermValues]:
        return distillation_loss(student, signal, labels, heads, settings)

    known = project_teacher(teacher, head, 2.0, head.weight)
    plain, plain_terms = loss_of(HiddenSignal(hidden=teacher))
    ours, terms = loss_of(replace(known, hidden=teacher))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert terms["ce"].item() == pytest.approx(plain_terms["ce"].item(), rel=1e-4)
    (expected,) = torch.autograd.grad(plain, student)
    (gradient,) = torch.autograd.grad(ours, student)
    largest = float(expected.abs().max())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.usefixtures("few_in_cache")
def test_samples_are_right_on_average() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 8, requires_grad=True)
    teacher = 2 * torch.randn(4, 8)
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    p = (head(teacher) / 2).softmax(-1)
    draws = [sample_teacher(teacher, head, 50, 2.0, torch.rand(4), 28) for _ in range(3000)]
    counts = torch.stack([functional.one_hot(draw.samples, 50).sum(1) for draw in draws]).double()
    assert (counts - 28 * p).abs().max() < 1, "systematic draws are never a whole one off"
    torch.testing.assert_close(counts.mean(0) / 28, p.double(), rtol=0, atol=0.002)

    labels = torch.full((4,), -100)
    settings = LossSettings({"ce": 1.0, "lm": 0.0, "cos": 0.0}, temperature=2.0)

    def loss_of(signal: TeacherSignal) -> torch.Tensor:
        return distillation_loss(student, signal, labels, Heads(head, head), settings)[0]

    plain = loss_of(HiddenSignal(hidden=teacher))
    mean = torch.stack([loss_of(draw) for draw in draws[:1000]]).mean()
    assert mean.item() == pytest.approx(plain.item(), rel=0.02)
    (expected,) = torch.autograd.grad(plain, student)
    (gradient,) = torch.autograd.grad(mean, student)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_a_signal_is_cut_and_rebuilt_with_all_that_it_holds() -> None:
    hidden = torch.arange(12.0).view(6, 2)
    entropy = torch.arange(6.0)
    signals: list[TeacherSignal] = [
        HiddenSignal(hidden=hidden),
        HiddenSignal(hidden=hidden, below=2 * hidden),
        ProjectedSignal(product=3 * hidden, entropy=entropy),
        ProjectedSignal(product=3 * hidden, entropy=entropy, hidden=hidden, below=2 * hidden),
        SampledSignal(samples=torch.arange(18).view(6, 3), entropy=entropy),
    ]
    for signal in signals:
        rebuilt = signal_of_tensors(signal.tensors())
        assert type(rebuilt) is type(signal)
        assert rebuilt.tensors().keys() == signal.tensors().keys()
        part = signal[2:5]
        assert type(part) is type(signal)
        for name, tensor in signal.tensors().items():
            assert torch.equal(rebuilt.tensors()[name], tensor)
            assert torch.equal(part.tensors()[name], tensor[2:5])


def test_every_term_has_a_weight_in_the_run_file_and_a_label() -> None:
    assert {term.weight_field for term in TERMS} <= set(Distill.model_fields)
    section = Distill(alpha_ce=3.0, alpha_lm=0.5, alpha_cos=0.25)
    assert weights_of(section) == {"ce": 3.0, "lm": 0.5, "cos": 0.25}
    assert list(METRIC_LABELS) == ["loss", *(term.metric for term in TERMS)]
    assert [term.metric for term in hidden_terms_in_use(section)] == ["cos"]
    assert hidden_terms_in_use(section.model_copy(update={"alpha_cos": 0.0})) == []


@pytest.mark.parametrize("classes", [2, 5])
def test_matched_shares_are_the_reference_s(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = 3 * torch.randn(300, classes, generator=generator) + torch.arange(classes)
    reference = torch.randn(300, classes, generator=generator)
    expected = reference.double().softmax(1).mean(0)
    moved = (scores + share_matching_offsets(scores, expected)).double().softmax(1).mean(0)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scores.double().softmax(1).mean(0), moved, atol=0.05)


def test_unexplained_share() -> None:
    teacher = torch.randn(50, 6) + 3
    assert unexplained_share(teacher, teacher) == 0
    assert unexplained_share(teacher.mean(dim=0).expand(50, 6), teacher) == pytest.approx(1)
