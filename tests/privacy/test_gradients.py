"""Per-example gradients: exact for every family, path, split and precision, and each example's own whatever the others are.

Shapes: B rows, n prompt tokens, d width.
"""

from copy import deepcopy

import pytest
import tiny
import torch
from privacy.checks import CPU
from privacy.gradient_checks import (
    apart,
    change_each_example,
    example_gradients,
    gradients_one_at_a_time,
    material,
)

from post_dist.bench.peers import OpacusLora
from post_dist.config.schema import Tune
from post_dist.errors import InputError
from post_dist.privacy.gradients import ExampleGradients, check_rows_are_alone
from post_dist.privacy.trainer import check_model

CAUSAL = [family for family in tiny.FAMILIES if family != "roberta"]
TIGHT = {"gpt2": 1e-12, "roberta": 1e-12}
"""Llama, Qwen2 and Gemma 2 norm and attend in fp32 inside, whatever the model's type is: their gradients agree to fp32."""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_to_one_example_at_a_time(family: str) -> None:
    difference = apart(example_gradients(family, share=False), gradients_one_at_a_time(family))
    print(family, difference)
    assert difference < TIGHT.get(family, 1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_shared_prefix_gives_the_same(family: str) -> None:
    difference = apart(
        example_gradients(family, share=True), example_gradients(family, share=False)
    )
    print(family, difference)
    assert difference < TIGHT.get(family, 1e-5)


@pytest.mark.parametrize(("family", "share"), [("gpt2", True), ("gpt2", False), ("roberta", False)])
def test_any_split_into_micro_batches_gives_the_same(family: str, share: bool) -> None:
    whole = example_gradients(family, share=share)
    for split in (
        [[0, 1, 2, 3], [4, 5, 6]],
        [[6], [5], [4, 3, 2, 1, 0]],
        [[row] for row in range(7)],
    ):
        order = [row for chunk in split for row in chunk]
        parts = [example_gradients(family, share=share, rows=chunk) for chunk in split]
        together = [
            torch.cat(pieces)[torch.tensor(order).argsort()] for pieces in zip(*parts, strict=True)
        ]
        assert apart(together, whole) < 1e-12


@pytest.mark.parametrize("share", [False, True])
def test_a_bf16_model_gives_fp32_gradients_near_the_exact_ones(share: bool) -> None:
    exact = material("llama")
    rough = example_gradients("llama", share=share, dtype=torch.bfloat16, parameters=torch.float32)
    assert all(part.dtype == torch.float32 for part in rough)
    wanted = example_gradients("llama", share=False)
    cosine = torch.nn.functional.cosine_similarity(
        rough[0].flatten(1).double(), wanted[0].flatten(1), dim=1
    )
    assert exact.model.model.dtype == torch.float64
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    ("family", "share"), [("gpt2", True), ("llama", True), ("llama", False), ("roberta", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_example_leaves_the_others_bit_for_bit(
    family: str, share: bool, dtype: torch.dtype
) -> None:
    change_each_example(family, dtype, CPU, share=share)


def test_a_gradient_that_is_not_finite_stays_in_its_row() -> None:
    made = material("llama", torch.float32)
    table = made.model.model.get_input_embeddings().weight
    batch = made.template.collate(made.rows)
    poisoned = next(
        token
        for token in made.rows[0].token_ids
        if all(token not in row.token_ids for row in made.rows[1:])
    )
    kept = table[poisoned].clone()
    try:
        table.data[poisoned] = float("nan")
        for share in (False, True):
            gradients = ExampleGradients(
                made.model, made.verbalizer, [made.start_nd.float()], share_prefix=share
            )(batch, made.wanted)[0]
            assert not gradients[0].isfinite().all()
            assert gradients[1:].isfinite().all()
    finally:
        table.data[poisoned] = kept


def test_a_model_that_mixes_rows_is_refused() -> None:
    made = material("llama", torch.float32)
    gradients = ExampleGradients(
        made.model, made.verbalizer, [made.start_nd.float()], share_prefix=False
    )
    check_rows_are_alone(gradients, made.model, torch.tensor([0, 1, 0, 1]), 16)
    mixed = made.model.layers[1].mlp.register_forward_hook(
        lambda module, given, out: out - 0.1 * out.mean(dim=0, keepdim=True)
    )
    try:
        with pytest.raises(InputError, match="change each other"):
            check_rows_are_alone(gradients, made.model, torch.tensor([0, 1, 0, 1]), 16)
        with pytest.raises(InputError, match="change each other"):
            check_model(Tune(micro_batch_size_per_gpu=1, num_virtual_tokens=6), made)
    finally:
        mixed.remove()


def test_a_masked_model_needs_room_for_a_token_of_padding() -> None:
    made = material("roberta", torch.float32)
    room = made.model.context_length - made.template.longest
    check_model(Tune(num_virtual_tokens=room - 1), made)
    with pytest.raises(InputError, match="do not fit"):
        check_model(Tune(num_virtual_tokens=room), made)


def test_no_weight_gets_a_gradient() -> None:
    example_gradients("llama", share=True)
    assert all(
        not weight.requires_grad and weight.grad is None
        for weight in material("llama").model.parameters()
    )


def test_peft_under_opacus_hooks_clips_once_a_batch() -> None:
    """The hazard that this package's own path avoids: PEFT embeds one row of prompt tokens and repeats it for the batch.

    Opacus' hooks then see one gradient, the sum over the batch, clip that, and report epsilon as if each example's were clipped.
    """
    from opacus import GradSampleModule
    from peft import PromptTuningConfig, get_peft_model
    from privacy.gradient_checks import model_folder
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"), dtype=torch.float32)
    peft = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    hooked = GradSampleModule(peft)
    hooked.train()
    made = material("gpt2")
    batch = made.template.collate(made.rows)
    logits = hooked(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    last = logits[torch.arange(7), batch.answer + 6]
    torch.nn.functional.cross_entropy(
        made.verbalizer.scores(last), made.wanted, reduction="sum"
    ).backward()
    (prompt,) = [weight for weight in peft.parameters() if weight.requires_grad]
    theirs, ours = prompt.grad_sample.shape, example_gradients("gpt2", share=True)[0].shape
    print(f"PEFT under Opacus' hooks: grad_sample {tuple(theirs)}; here {tuple(ours)}")
    assert theirs == (1, 6, 32)
    assert ours == (7, 6, 32)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_peer_lora_has_each_example_s_own_gradients(dtype: torch.dtype, most: float) -> None:
    made = material("llama", dtype)
    lora = OpacusLora(deepcopy(made.model), made.verbalizer, rank=2)
    for parameter in lora.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    batch = made.template.collate(made.rows)
    together = lora(batch, made.wanted)
    assert len(together) == 2 * 2 * len(made.model.layers)
    for row in range(len(made.rows)):
        alone = lora(
            made.template.collate(made.rows[row : row + 1], batch.input_ids.shape[1]),
            made.wanted[row : row + 1],
        )
        assert apart([part[row : row + 1] for part in together], alone) < most
