"""What public text tells without labels, where the truth is known because it was made up."""

import math

import pytest
import torch

from post_dist.stages.transfer.public_statistics import alpha_by_agreement, class_information


def answers_that_are_right(
    share: float, truth: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Scores [N, 2] of a model whose errors are its own."""
    wrong = torch.rand(len(truth), generator=generator) > share
    return torch.nn.functional.one_hot(truth ^ wrong, 2).float()


@pytest.mark.parametrize(
    ("zero_shot", "prompted", "plain"),
    [(0.65, 0.8, 0.7), (0.75, 0.9, 0.6), (0.9, 0.8, 0.75), (0.5, 0.9, 0.8)],
)
def test_alpha_is_the_paper_s_where_errors_are_independent(
    zero_shot: float, prompted: float, plain: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (200_000,), generator=generator)
    source, source_prompted, target = (
        answers_that_are_right(share, truth, generator) for share in (plain, prompted, zero_shot)
    )
    expected = min(1.0, (zero_shot - 0.5) / (prompted - 0.5))
    assert alpha_by_agreement(source, source_prompted, target) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("exceptions", [0, 1, 2])
def test_alpha_of_a_student_that_says_the_same_of_nearly_every_text(exceptions: int) -> None:
    plain, prompted = torch.tensor([[1.0, 0.0]]).repeat(640, 1), torch.eye(2).repeat(320, 1)
    plain[1 : 2 * exceptions : 2] = prompted[1]
    assert alpha_by_agreement(plain, prompted, prompted.flip(0)) == 0.5


def test_class_information_is_between_nothing_and_all() -> None:
    sure = 50 * torch.eye(3).repeat(10, 1)
    assert class_information(sure) == pytest.approx(math.log(3))
    assert class_information(torch.zeros(30, 3)) == pytest.approx(0, abs=1e-12)
    assert class_information(sure[:1].expand(30, -1)) == pytest.approx(0, abs=1e-12)
    half = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]).repeat(10, 1)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert class_information(half) == pytest.approx(expected)
