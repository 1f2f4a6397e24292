"""Generated responses, and the losses of given ones, compared with transformers."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import tiny
import torch
from privacy.gradient_checks import apart
from transformers import PreTrainedTokenizerBase

from post_dist.data.template import NO_TOKEN, Encoded, Template
from post_dist.losses.divergence import softened_kl
from post_dist.losses.transfer import proxy_logits, published_transfer_loss
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.generation import generate_responses, response_losses
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.privacy.gradients import ExampleGradients
from post_dist.runtime.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, "none", CPU)
MAX_RESPONSE = 6
TEXTS = [text for text, _ in tiny.sentences(5, 3)]
RESPONSES = [
    "a great film",
    "bad",
    "a dull story it was and more than there is room for in it",
    "moving",
    "the cast is lovely",
]


class Setting(NamedTuple):
    """A model, its tokenizer and template, and examples with responses."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    examples: list[Encoded]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tiny.write_model(tmp_path_factory.mktemp("responses") / "model", request.param)
    tiny.speak_up(folder)
    tokenizer = load_tokenizer(folder)
    template = Template(
        "Review: {text} It was",
        tokenizer,
        48,
        masked=False,
        vocabulary=600,
        max_response_length=MAX_RESPONSE,
    )
    model = load_whole(folder, "fp32", CPU)
    return Setting(model, tokenizer, template, template.encode(TEXTS, RESPONSES))


def test_a_response_follows_its_text_and_ends_with_the_end_token(setting: Setting) -> None:
    tokenizer = setting.tokenizer
    for example, text, response in zip(setting.examples, TEXTS, RESPONSES, strict=True):
        before = example.token_ids[: example.answer + 1]
        after = example.token_ids[example.answer + 1 :]
        assert tokenizer.decode(before) == f"Review: {text} It was"
        assert tuple(after) == example.response
        assert after[-1] == tokenizer.eos_token_id
        assert f" {response}".startswith(tokenizer.decode(after[:-1]))
        assert len(after) <= MAX_RESPONSE
    padding = sum(MAX_RESPONSE - len(example.response) for example in setting.examples)
    assert (setting.template.responses(setting.examples) == NO_TOKEN).sum() == padding


def test_a_response_loss_is_the_mean_that_transformers_computes(setting: Setting) -> None:
    template = setting.template
    batch = template.collate(setting.examples)
    ours = response_losses(setting.model, batch, template.responses(setting.examples))
    for example, loss in zip(setting.examples, ours, strict=True):
        ignored = [NO_TOKEN] * (example.answer + 1)
        labels = torch.tensor([ignored + list(example.response)])
        input_ids = torch.tensor([example.token_ids])
        expected = setting.model.model(input_ids=input_ids, labels=labels).loss
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_each_example_s_gradient_does_not_depend_on_the_others(
    setting: Setting, share: bool
) -> None:
    template = setting.template
    model = copy.deepcopy(setting.model).double()
    generator = torch.Generator().manual_seed(0)
    prompt_nd = 0.3 * torch.randn(5, model.width, generator=generator).double()
    gradients = ExampleGradients(model, None, [prompt_nd], share_prefix=share)
    batch = template.collate(setting.examples)
    together = gradients(batch, template.responses(setting.examples))
    alone = []
    for example in setting.examples:
        leaf = prompt_nd.clone().requires_grad_(True)
        own_batch = template.collate([example])
        loss = response_losses(model, own_batch, template.responses([example]), prompt=leaf)
        alone.append(torch.autograd.grad(loss.sum(), leaf)[0])
    assert apart(together, [torch.stack(alone)]) < 1e-5


def generate(
    setting: Setting, prompt_nd: torch.Tensor | None, end_token: int, batch_size: int
) -> torch.Tensor:
    examples = setting.template.encode(TEXTS)
    run = InferenceRun(batch_size, ALONE, label="")
    return generate_responses(setting.model, examples, setting.template, prompt_nd, end_token, run)


def test_generated_responses_are_those_of_transformers(setting: Setting) -> None:
    model = setting.model
    end_token = setting.tokenizer.eos_token_id
    prompt_nd = torch.randn(4, model.width, generator=torch.Generator().manual_seed(1))
    generated = generate(setting, prompt_nd, end_token, batch_size=2)
    for example, tokens in zip(setting.template.encode(TEXTS), generated, strict=True):
        text_embeddings = model.embed(torch.tensor(example.token_ids))
        embeddings = torch.cat([prompt_nd, text_embeddings])[None]
        theirs = model.model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2]),
            max_new_tokens=MAX_RESPONSE,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end_token,
        )[0]
        ours = [token for token in tokens.tolist() if token != NO_TOKEN]
        assert ours == [token for token in theirs.tolist() if token != end_token]
    different = {tuple(tokens) for tokens in generated.tolist()}
    assert len(different) > 1, "the examples are told apart"


def test_the_end_token_ends_a_response(setting: Setting) -> None:
    no_end = -1
    free = generate(setting, None, no_end, batch_size=5)
    end_token = int(free[0, 2])
    ended = generate(setting, None, end_token, batch_size=5)
    for tokens, cut in zip(free.tolist(), ended.tolist(), strict=True):
        kept = tokens
        if end_token in tokens:
            kept = tokens[: tokens.index(end_token)]
        assert cut == kept + [NO_TOKEN] * (MAX_RESPONSE - len(kept))


Loss = Callable[[list[int], torch.Tensor | None], torch.Tensor]


def test_weights_weigh_positions() -> None:
    generator = torch.Generator().manual_seed(2)
    source, prompted, target, own = torch.randn(4, 3, 11, generator=generator)
    weights = torch.tensor([0.25, 0.25, 0.5])

    def divergence(chosen: list[int], weights_B: torch.Tensor | None) -> torch.Tensor:
        return softened_kl(source[chosen], own[chosen], 2.0, weights_B)

    def transfer_loss(chosen: list[int], weights_B: torch.Tensor | None) -> torch.Tensor:
        return published_transfer_loss(
            source[chosen],
            prompted[chosen],
            target[chosen],
            own[chosen],
            alpha=0.3,
            temperature=2.0,
            shares_B=weights_B,
        )

    losses: list[Loss] = [divergence, transfer_loss]
    for loss in losses:
        one_by_one = torch.stack([loss([position], None) for position in range(3)])
        expected = float(weights @ one_by_one)
        assert float(loss([0, 1, 2], weights)) == pytest.approx(expected, rel=1e-5)


def test_a_proxy_of_strength_zero_is_the_target() -> None:
    source, prompted, target = torch.randn(3, 3, 11, generator=torch.Generator().manual_seed(2))
    assert torch.equal(proxy_logits(source, prompted, target, 0.0), target)
