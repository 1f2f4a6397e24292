"""Labels of training text: masked tokens for masked models, the next token for causal ones."""

import torch

from post_dist.data.masking import NO_LABEL, Masking, next_token_labels

MASK = 3


def test_a_fixed_fraction_is_masked_by_bert_s_rule() -> None:
    masking = Masking(MASK, vocabulary=1000, fraction=0.15, seed=0)
    tokens = torch.arange(10, 110).repeat(400, 1)
    masked, labels = masking(tokens, list(range(400)))
    chosen = labels != NO_LABEL
    assert (chosen.sum(dim=1) == 15).all()
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(masked[~chosen], tokens[~chosen])
    became_mask = float((masked[chosen] == MASK).float().mean())
    stayed = float((masked[chosen] == tokens[chosen]).float().mean())
    assert abs(became_mask - 0.8) < 0.02
    assert abs(stayed - 0.1) < 0.02


def test_the_mask_of_a_sequence_depends_on_seed_and_place_alone() -> None:
    tokens = torch.arange(10, 60).repeat(3, 1)
    masking = Masking(MASK, vocabulary=1000, fraction=0.15, seed=7)
    masked, labels = masking(tokens, [4, 5, -1])
    again, labels_again = masking(tokens[1:2], [5])
    assert torch.equal(masked[1:2], again)
    assert torch.equal(labels[1:2], labels_again)
    assert not torch.equal(labels[0], labels[1])
    other_seed = Masking(MASK, vocabulary=1000, fraction=0.15, seed=8)
    assert not torch.equal(other_seed(tokens[1:2], [5])[1], labels_again)


def test_a_short_sequence_has_one_masked_token() -> None:
    masking = Masking(MASK, vocabulary=1000, fraction=0.15, seed=0)
    _, labels = masking(torch.tensor([[8, 9]]), [0])
    assert int((labels != NO_LABEL).sum()) == 1


def test_the_last_position_has_no_next_token() -> None:
    labels = next_token_labels(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert labels.tolist() == [[6, 7, NO_LABEL], [9, 10, NO_LABEL]]
