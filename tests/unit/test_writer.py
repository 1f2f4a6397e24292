"""Responses that a model writes, and how well it knows those that are given: as transformers has it."""

import copy

import pytest
import tiny
import torch
from privacy.gradient_checks import apart

from post_dist.data.template import NO_TOKEN, Template
from post_dist.losses.divergence import softened_kl
from post_dist.losses.transfer import proxy_logits, published_transfer_loss
from post_dist.models.generation import response_losses, write_responses
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.privacy.gradients import ExampleGradients
from post_dist.runtime.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, "none", CPU)
TEXTS = [text for text, _ in tiny.sentences(5, 3)]
RESPONSES = [
    "a great film",
    "bad",
    "a dull story it was and more than there is room for in it",
    "moving",
    "the cast is lovely",
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny.write_model(tmp_path_factory.mktemp("writer") / "model", request.param)
    tiny.speak_up(folder)
    tokenizer, model = load_tokenizer(folder), load_whole(folder, "fp32", CPU)
    template = Template("Review: {text} It was", tokenizer, 48, masked=False, max_response_length=6)
    return model, tokenizer, template, template.encode(TEXTS, RESPONSES)


def test_a_response_stands_behind_its_text_with_its_end(made: tuple) -> None:
    _, tokenizer, template, rows = made
    for row, text, response in zip(rows, TEXTS, RESPONSES, strict=True):
        before, behind = row.token_ids[: row.answer + 1], row.token_ids[row.answer + 1 :]
        assert tokenizer.decode(before) == f"Review: {text} It was"
        assert tuple(behind) == row.response
        assert behind[-1] == tokenizer.eos_token_id
        assert f" {response}".startswith(tokenizer.decode(behind[:-1]))
        assert len(behind) <= 6
    assert (template.responses(rows) == NO_TOKEN).sum() == sum(
        6 - len(row.response) for row in rows
    )


def test_losses_are_those_of_transformers_a_mean_over_each_response(made: tuple) -> None:
    model, _, template, rows = made
    ours = response_losses(model, template.collate(rows), template.responses(rows))
    for row, loss in zip(rows, ours, strict=True):
        labels = torch.tensor([[NO_TOKEN] * (row.answer + 1) + list(row.response)])
        assert float(loss) == pytest.approx(
            float(model.model(input_ids=torch.tensor([row.token_ids]), labels=labels).loss),
            rel=1e-5,
        )


@pytest.mark.parametrize("share", [True, False])
def test_each_example_s_gradient_is_its_own(made: tuple, share: bool) -> None:
    _, _, template, rows = made
    model = copy.deepcopy(made[0]).double()
    prompt_nd = (
        0.3 * torch.randn(5, model.width, generator=torch.Generator().manual_seed(0)).double()
    )
    together = ExampleGradients(model, None, [prompt_nd], share_prefix=share)(
        template.collate(rows), template.responses(rows)
    )
    alone = []
    for row in rows:
        leaf = prompt_nd.clone().requires_grad_(True)
        loss = response_losses(
            model, template.collate([row]), template.responses([row]), prompt=leaf
        )
        alone.append(torch.autograd.grad(loss.sum(), leaf)[0])
    assert apart(together, [torch.stack(alone)]) < 1e-5


def test_what_is_written_is_what_transformers_writes(made: tuple) -> None:
    model, tokenizer, template, _ = made
    rows = template.encode(TEXTS)
    prompt_nd = torch.randn(4, model.width, generator=torch.Generator().manual_seed(1))
    written = write_responses(
        model,
        rows,
        template,
        prompt_nd,
        tokenizer.eos_token_id,
        batch_size=2,
        world=ALONE,
        label="",
    )
    for row, tokens in zip(rows, written, strict=True):
        embeddings = torch.cat([prompt_nd, model.embed(torch.tensor(row.token_ids))])[None]
        how = {
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": tokenizer.eos_token_id,
        }
        theirs = model.model.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]), **how
        )[0]
        assert [token for token in tokens.tolist() if token != NO_TOKEN] == [
            t for t in theirs.tolist() if t != tokenizer.eos_token_id
        ]
    assert len({tuple(tokens) for tokens in written.tolist()}) > 1, "the rows are told apart"


def test_an_end_that_is_written_ends_the_response(made: tuple) -> None:
    model, _, template, _ = made
    rows = template.encode(TEXTS)
    free = write_responses(model, rows, template, None, -1, batch_size=5, world=ALONE, label="")
    end = int(free[0, 2])
    ended = write_responses(model, rows, template, None, end, batch_size=5, world=ALONE, label="")
    for tokens, cut in zip(free.tolist(), ended.tolist(), strict=True):
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        assert cut == kept + [NO_TOKEN] * (6 - len(kept))


def test_shares_weigh_rows(made: tuple) -> None:
    source, prompted, target, own = torch.randn(
        4, 3, 11, generator=torch.Generator().manual_seed(2)
    )
    shares = torch.tensor([0.25, 0.25, 0.5])
    published = {"alpha": 0.3, "temperature": 2.0}
    for loss in (
        lambda rows, shares_B=None: softened_kl(source[rows], own[rows], 2.0, shares_B),
        lambda rows, shares_B=None: published_transfer_loss(
            source[rows], prompted[rows], target[rows], own[rows], **published, shares_B=shares_B
        ),
    ):
        one_by_one = torch.stack([loss([row]) for row in range(3)])
        assert float(loss([0, 1, 2], shares)) == pytest.approx(float(shares @ one_by_one), rel=1e-5)
    assert torch.equal(proxy_logits(source, prompted, target, 0.0), target)
