"""The losses against their formulas, written out once more in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from post_dist.losses import distillation as losses
from post_dist.losses.distillation import TeacherSignal, condensed, distillation_loss, sampled
from post_dist.losses.divergence import softened_kl, unexplained_share
from post_dist.losses.transfer import proxy_logits, published_transfer_loss, share_matching_offsets


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
    mimic = temperature**2 * kl(softmax(z_s_p / temperature), softmax(z_t_p / temperature))
    shift = temperature**2 * kl(
        softmax((z_s_p - z_s) / temperature), softmax((z_t_p - z_t) / temperature)
    )
    ours = published_transfer_loss(
        *(torch.tensor(z) for z in logits), alpha=alpha, temperature=temperature
    )
    assert float(ours) == pytest.approx((1 - alpha) * mimic + alpha * shift, rel=1e-5)


def test_kl_is_forward_and_not_symmetric(logits: list[np.ndarray]) -> None:
    teacher, student = (torch.tensor(z) for z in logits[:2])
    assert float(softened_kl(teacher, student, 1.0)) == pytest.approx(
        kl(softmax(logits[0]), softmax(logits[1])), rel=1e-5
    )
    assert float(softened_kl(teacher, student, 1.0)) != pytest.approx(
        float(softened_kl(student, teacher, 1.0)), rel=1e-2
    )


def test_proxy_logits(logits: list[np.ndarray]) -> None:
    z_s, z_s_p, z_t, _ = logits
    ours = proxy_logits(*(torch.tensor(z) for z in (z_s, z_s_p, z_t)), 2.0)
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
    head_s, head_t = torch.nn.Linear(8, 13).double(), torch.nn.Linear(8, 13).double()
    labels = torch.randint(13, (positions,))
    labels[::3] = -100
    trained = tuple(head_s.parameters())
    how = {
        "weights": (5.0, 2.0, 1.0),
        "temperature": 2.0,
        "pieces": pieces,
        "head_parameters": trained,
    }
    loss, terms = distillation_loss(
        student, TeacherSignal(hidden=teacher), labels, head_s, head_t, **how
    )
    ours = torch.autograd.grad(loss, [student, *trained])

    log_s, log_t = (
        (head(h) / 2).log_softmax(-1) for head, h in ((head_s, student), (head_t, teacher))
    )
    ce = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    lm = functional.cross_entropy(head_s(student), labels)
    cos = (1 - functional.cosine_similarity(student, teacher)).mean()
    direct = torch.autograd.grad(5 * ce + 2 * lm + cos, [student, *head_s.parameters()])
    assert loss.item() == pytest.approx((5 * ce + 2 * lm + cos).item(), rel=1e-5)
    assert [terms.ce.item(), terms.lm.item(), terms.cos.item()] == pytest.approx(
        [ce.item(), lm.item(), cos.item()], rel=1e-5
    )
    for one, other in zip(ours, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asked_for", [1, 7])
def test_a_scaled_loss_in_fp16_has_the_gradient_of_fp32(asked_for: int) -> None:
    """Of a student that is near its teacher, which is where the gradient of a mean over many positions is smallest."""
    generator = torch.Generator().manual_seed(0)
    teacher, weight = (
        torch.randn(4096, 16, generator=generator),
        torch.randn(1000, 16, generator=generator) / 4,
    )
    student = teacher + 0.02 * torch.randn(4096, 16, generator=generator)
    labels = torch.randint(1000, (4096,), generator=generator)
    labels[torch.arange(4096) % asked_for > 0] = -100
    for weights in ((5.0, 0.0, 0.0), (5.0, 2.0, 1.0)):
        gradients = []
        for dtype, scale in ((torch.float32, 1.0), (torch.float16, 65536.0)):
            head = nn.Linear(16, 1000, bias=False).requires_grad_(False)
            head.weight.data = weight.half().to(dtype)
            hidden = student.half().to(dtype).requires_grad_(True)
            how = {"weights": weights, "temperature": 2.0, "pieces": 2}
            loss, _ = distillation_loss(
                hidden, TeacherSignal(hidden=teacher.half().to(dtype)), labels, head, head, **how
            )
            (gradient,) = torch.autograd.grad(scale * loss, hidden)
            gradients.append(gradient.float() / scale)
        exact, ours = gradients
        error = float((ours - exact).norm() / exact.norm())
        print(f"weights {weights}: relative error {error:.1e}")
        assert error < 0.05


@pytest.mark.usefixtures("few_in_cache")
def test_a_product_stands_for_the_whole_distribution() -> None:
    student, teacher, labels = (
        torch.randn(700, 8, requires_grad=True),
        torch.randn(700, 8),
        torch.randint(13, (700,)),
    )
    head = nn.Linear(8, 13, bias=False).requires_grad_(False)
    known = condensed(teacher, head, 2.0, head.weight)
    (plain, plain_terms), (ours, terms) = (
        distillation_loss(
            student, signal, labels, head, head, weights=(5.0, 2.0, 1.0), temperature=2.0
        )
        for signal in (TeacherSignal(hidden=teacher), replace(known, hidden=teacher))
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert terms.ce.item() == pytest.approx(plain_terms.ce.item(), rel=1e-4)
    (expected,), (gradient,) = (torch.autograd.grad(loss, student) for loss in (plain, ours))
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.usefixtures("few_in_cache")
def test_samples_are_right_on_average() -> None:
    student, teacher = torch.randn(4, 8, requires_grad=True), 2 * torch.randn(4, 8)
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    p = (head(teacher) / 2).softmax(-1)
    draws = [sampled(teacher, head, 50, 2.0, torch.rand(4), 28) for _ in range(3000)]
    counts = torch.stack([functional.one_hot(draw.samples, 50).sum(1) for draw in draws]).double()
    assert (counts - 28 * p).abs().max() < 1, "systematic draws are never a whole one off"
    torch.testing.assert_close(counts.mean(0) / 28, p.double(), rtol=0, atol=0.002)
    labels = torch.full((4,), -100)
    plain, _ = distillation_loss(
        student,
        TeacherSignal(hidden=teacher),
        labels,
        head,
        head,
        weights=(1.0, 0.0, 0.0),
        temperature=2.0,
    )
    of_draws = [
        distillation_loss(
            student, draw, labels, head, head, weights=(1.0, 0.0, 0.0), temperature=2.0
        )[0]
        for draw in draws[:1000]
    ]
    mean = torch.stack(of_draws).mean()
    assert mean.item() == pytest.approx(plain.item(), rel=0.02)
    (expected,), (gradient,) = (torch.autograd.grad(loss, student) for loss in (plain, mean))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("classes", [2, 5])
def test_matched_shares_are_the_reference_s(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = 3 * torch.randn(300, classes, generator=generator) + torch.arange(classes)
    reference = torch.randn(300, classes, generator=generator)
    moved = (scores + share_matching_offsets(scores, reference)).double().softmax(1).mean(0)
    torch.testing.assert_close(moved, reference.double().softmax(1).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scores.double().softmax(1).mean(0), moved, atol=0.05)


def test_unexplained_share() -> None:
    teacher = torch.randn(50, 6) + 3
    assert unexplained_share(teacher, teacher) == 0
    assert unexplained_share(teacher.mean(dim=0).expand(50, 6), teacher) == pytest.approx(1)
