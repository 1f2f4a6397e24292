"""Statistics of public text without labels, checked on made-up data whose truth is known."""

import math

import pytest
import torch

from post_dist.stages.transfer.public_statistics import alpha_by_agreement, class_information


def scores_of_accuracy(
    accuracy: float, truth_N: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return scores [N, 2] of a model whose errors are independent of those of other models."""
    wrong = torch.rand(len(truth_N), generator=generator) > accuracy
    return torch.nn.functional.one_hot(truth_N ^ wrong, 2).float()


@pytest.mark.parametrize(
    ("zero_shot", "prompted", "plain"),
    [(0.65, 0.8, 0.7), (0.75, 0.9, 0.6), (0.9, 0.8, 0.75), (0.5, 0.9, 0.8)],
)
def test_alpha_is_the_paper_s_where_errors_are_independent(
    zero_shot: float, prompted: float, plain: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    truth_N = torch.randint(2, (200_000,), generator=generator)
    source = scores_of_accuracy(plain, truth_N, generator)
    source_prompted = scores_of_accuracy(prompted, truth_N, generator)
    target = scores_of_accuracy(zero_shot, truth_N, generator)
    expected = min(1.0, (zero_shot - 0.5) / (prompted - 0.5))
    assert alpha_by_agreement(source, source_prompted, target) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("exceptions", [0, 1, 2])
def test_alpha_of_a_student_that_predicts_one_class_for_nearly_every_text(exceptions: int) -> None:
    plain = torch.tensor([[1.0, 0.0]]).repeat(640, 1)
    prompted = torch.eye(2).repeat(320, 1)
    plain[1 : 2 * exceptions : 2] = prompted[1]
    assert alpha_by_agreement(plain, prompted, prompted.flip(0)) == 0.5


def test_class_information_lies_between_zero_and_the_log_of_the_classes() -> None:
    sure = 50 * torch.eye(3).repeat(10, 1)
    assert class_information(sure) == pytest.approx(math.log(3))
    assert class_information(torch.zeros(30, 3)) == pytest.approx(0, abs=1e-12)
    one_class = sure[:1].expand(30, -1)
    assert class_information(one_class) == pytest.approx(0, abs=1e-12)
    three_quarters_sure = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]).repeat(10, 1)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert class_information(three_quarters_sure) == pytest.approx(expected)
