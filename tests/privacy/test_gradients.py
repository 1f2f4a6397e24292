"""Per-example gradients: exact for every family, path, split and dtype, whatever the others are.

Shapes: B examples, n prompt tokens, d width.
"""

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from border.hostile import edit_json
from operations import READS, operations_of
from privacy.checks import CPU
from privacy.gradient_checks import (
    MODELS,
    apart,
    attention_as_on_a_gpu,
    change_each_example,
    example_gradients,
    gradients_of,
    gradients_one_at_a_time,
    tuning_task,
)

from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Layout
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Batch
from post_dist.errors import InputError, Interrupted
from post_dist.models.facts import facts_of
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.batch_sizes import independent_sizes
from post_dist.privacy.gradients import task_gradients
from post_dist.privacy.tuned_prompt import prompt_parameters
from post_dist.runtime.stop import listening
from post_dist.stages.tune.conflicts import conflicts

CAUSAL = [family for family in tiny.FAMILIES if family != "roberta"]
TIGHT = {"gpt2": 1e-12, "roberta": 1e-12}
"""The other families norm and attend in fp32 whatever the model's dtype is: they agree to fp32."""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_to_one_example_at_a_time(family: str) -> None:
    difference = apart(example_gradients(family, share=False), gradients_one_at_a_time(family))
    print(family, difference)
    assert difference < TIGHT.get(family, 1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_shared_prefix_gives_the_same(family: str) -> None:
    shared = example_gradients(family, share=True)
    difference = apart(shared, example_gradients(family, share=False))
    print(family, difference)
    assert difference < TIGHT.get(family, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])  # Gemma 2 has no fused attention
def test_no_operation_is_repeated_for_each_example(family: str) -> None:
    """PyTorch repeats an operation that has no rule for batches: a thousand kernels per step."""
    task = tuning_task(family, torch.float32)

    def operations(examples: list[int]) -> Counter[str]:
        batch = task.reader.collate([task.examples[example] for example in examples])
        targets = task.targets[examples]
        parameters = [task.start_nd.float()]
        return operations_of(lambda: gradients_of(task, parameters, share=True)(batch, targets))

    with attention_as_on_a_gpu(task.model):
        few = operations([3, 1])
        many = operations([0, 1, 2, 3, 4, 5, 6])
    assert many == few
    assert not set(many) & set(READS)


@pytest.mark.parametrize(("family", "share"), [("gpt2", True), ("gpt2", False), ("roberta", False)])
def test_any_split_into_micro_batches_gives_the_same(family: str, share: bool) -> None:
    whole = example_gradients(family, share=share)
    splits = (
        [[0, 1, 2, 3], [4, 5, 6]],
        [[6], [5], [4, 3, 2, 1, 0]],
        [[example] for example in range(7)],
    )
    for split in splits:
        order = torch.tensor([example for chunk in split for example in chunk])
        parts = [example_gradients(family, share=share, examples=chunk) for chunk in split]
        together = []
        for pieces in zip(*parts, strict=True):
            together.append(torch.cat(pieces)[order.argsort()])
        assert apart(together, whole) < 1e-12


@pytest.mark.parametrize("share", [False, True])
def test_a_bf16_model_gives_fp32_gradients_near_the_exact_ones(share: bool) -> None:
    exact = tuning_task("llama")
    rough = example_gradients("llama", share=share, dtype=torch.bfloat16, parameters=torch.float32)
    assert all(gradient.dtype == torch.float32 for gradient in rough)
    expected = example_gradients("llama", share=False)
    rough_flat = rough[0].flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(rough_flat, expected[0].flatten(1), dim=1)
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


def test_a_gradient_that_is_not_finite_stays_with_its_example() -> None:
    task = tuning_task("llama", torch.float32)
    table = task.model.model.get_input_embeddings().weight
    batch = task.reader.collate(task.examples)
    elsewhere = {token for example in task.examples[1:] for token in example.token_ids}
    poisoned = next(token for token in task.examples[0].token_ids if token not in elsewhere)
    kept = table[poisoned].clone()
    try:
        table.data[poisoned] = float("nan")
        for share in (False, True):
            compute = gradients_of(task, [task.start_nd.float()], share=share)
            gradients = compute(batch, task.targets)[0]
            assert not gradients[0].isfinite().all()
            assert gradients[1:].isfinite().all()
    finally:
        table.data[poisoned] = kept


def wide_task(
    length: int, micro_batch_size: int, family: str = "llama", width: int = 576
) -> tuple[TuningTask, Tune]:
    """A task on a model of the demo's width, with texts of `length` tokens."""
    place = Path(MODELS.name) / f"{family}-{length}"
    folder = tiny.write_model(place, family, layers=2, width=width)
    model = load_whole(folder, "fp32", CPU)
    prompt_task = PromptTask(
        template="Review: {text} It was",
        label_words=(("bad",), ("good",)),
        max_length=length,
        allow_multi_token=False,
        init_text="",
    )
    reader = TaskReader(
        prompt_task, load_tokenizer(folder), masked=False, vocabulary=model.vocabulary_size
    )
    start_nd = torch.randn(10, width) * 0.05
    task = TuningTask(model, reader, [], torch.tensor([]), start_nd)
    return task, Tune(micro_batch_size_per_gpu=micro_batch_size, num_virtual_tokens=10)


@pytest.mark.parametrize(("length", "planned"), [(48, 10), (50, 5), (64, 5)])
def test_chosen_sizes_have_no_place_that_counts(
    length: int, planned: int, two_threads: None
) -> None:
    """At each of these sizes, the kernels of one machine rounded some rows differently."""
    task, section = wide_task(length, planned)
    sizes = independent_sizes(section, task)
    print(sizes)
    parameters = prompt_parameters(task, section)
    compute = task_gradients(task, parameters)
    size = sizes[length]
    one = torch.randint(600, (1, length))
    seen = None
    for _ in range(3):
        for place in range(size):
            input_ids = torch.randint(600, (size, length))
            input_ids[place] = one
            answers = torch.full((size,), length - 1)
            batch = Batch(input_ids, torch.ones_like(input_ids), answers)
            found = compute(batch, torch.zeros(size, dtype=torch.long))[0][place]
            seen = found if seen is None else seen
            assert torch.equal(found, seen), f"place {place} of {size}"


def test_an_example_of_a_mixture_runs_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Where the router sends other examples' tokens could change the shapes of its products."""
    task, section = wide_task(12, 4, family="mixtral", width=32)
    assert set(independent_sizes(section, task).values()) == {1}
    # No larger size is tried, because a trial could pass by chance.
    assert "in larger ones" not in caplog.text


def with_rotary(kind: str, longest: int, **more: object) -> TuningTask:
    """A task on a model with rotary embeddings of a kind that are made for 40 tokens."""
    width = 32
    place = Path(MODELS.name) / f"{kind}-rotary"
    folder = tiny.write_model(place, "llama", layers=2, width=width)
    rotary = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0, **more}
    rotary["original_max_position_embeddings"] = 40
    edit_json("config.json", rope_parameters=rotary, max_position_embeddings=40)(folder)
    task, _ = wide_task(longest, 4, width=width)
    return replace(task, model=load_whole(folder, "fp32", CPU))


def test_a_model_that_remembers_the_longest_text_is_refused() -> None:
    """One long example would change the gradients of all later ones."""
    task = with_rotary("dynamic", 80)
    section = Tune(micro_batch_size_per_gpu=4, num_virtual_tokens=10)
    parameters = prompt_parameters(task, section)

    def gradient(length: int) -> torch.Tensor:
        ids = torch.arange(4, 4 + length)[None]
        batch = Batch(ids, torch.ones_like(ids), torch.tensor([length - 1]))
        return task_gradients(task, parameters)(batch, torch.tensor([0]))[0]

    before = gradient(48)
    gradient(80)
    assert not torch.equal(gradient(48), before), "this model does not remember"
    with pytest.raises(InputError, match="changes with the length of the texts"):
        independent_sizes(section, with_rotary("dynamic", 80))
    # Texts within the length that the model was made for change nothing.
    assert independent_sizes(section, with_rotary("dynamic", 24))


def test_a_model_with_two_sets_of_rotary_frequencies_can_be_tuned() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    task = with_rotary("longrope", 16, **factors)
    # A prompt of this length shares its keys and values where that is possible.
    task = replace(task, start_nd=torch.randn(20, 32) * 0.05)
    section = Tune(micro_batch_size_per_gpu=4, num_virtual_tokens=20)
    assert independent_sizes(section, task)


def test_the_choice_of_sizes_can_be_stopped() -> None:
    task, section = wide_task(48, 10)
    with listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM: no step was taken yet"):
            independent_sizes(section, task)


@pytest.mark.parametrize("private", [True, False])
def test_a_masked_model_needs_room_for_a_token_of_padding(private: bool) -> None:
    facts = facts_of(tuning_task("roberta", torch.float32).model)
    section = {
        "name": "t",
        "visibility": "private",
        "path": "t.csv",
        "template": "{text} It was {mask}.",
        "labels": {0: ["bad"], 1: ["good"]},
        "max_length": 48,
    }
    privacy = {"enabled": private, "declared_examples": 100, "noise_multiplier": 1.0}

    def found(num_virtual_tokens: int) -> list:
        tune = {"num_virtual_tokens": num_virtual_tokens}
        fields = {"name": "a", "private_task": section, "tune": tune, "privacy": privacy}
        return conflicts(RunConfig.model_validate(fields), facts, Layout())

    room = int(facts.context_length) - 48
    assert not found(room - 1)
    too_long = [conflict.message for conflict in found(room)]
    assert len(too_long) == int(private)
    assert all("do not fit" in message for message in too_long)


def test_a_group_size_for_sharding_does_not_concern_tuning() -> None:
    """`engine.shard_group: 4` is for the stages that shard; tuning runs in one process."""
    facts = facts_of(tuning_task("llama", torch.float32).model)
    section = {
        "name": "t",
        "visibility": "private",
        "path": "t.csv",
        "template": "{text} It was",
        "labels": {0: ["bad"], 1: ["good"]},
        "max_length": 48,
    }
    tune = {"num_virtual_tokens": 6}
    fields = {"name": "a", "private_task": section, "tune": tune, "engine": {"shard_group": 4}}
    assert conflicts(RunConfig.model_validate(fields), facts, Layout()) == []
    fields["engine"] = {"precision": "fp16"}
    (found,) = conflicts(RunConfig.model_validate(fields), facts, Layout())
    assert "fp16 does not run on a CPU" in found.message


def test_no_weight_gets_a_gradient() -> None:
    example_gradients("llama", share=True)
    for weight in tuning_task("llama").model.parameters():
        assert not weight.requires_grad
        assert weight.grad is None


def test_peft_under_opacus_hooks_clips_once_a_batch() -> None:
    """The hazard that this package's own path avoids.

    PEFT embeds the prompt tokens once and repeats them for the batch. Opacus' hooks then see one
    gradient, the sum over the batch. They clip that sum, and report epsilon as if each example's
    gradient were clipped.
    """
    from opacus import GradSampleModule
    from peft import PromptTuningConfig, get_peft_model
    from privacy.gradient_checks import model_folder
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"), dtype=torch.float32)
    peft = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    hooked = GradSampleModule(peft)
    hooked.train()
    task = tuning_task("gpt2")
    batch = task.reader.collate(task.examples)
    logits = hooked(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    scores = task.reader.scores(logits[torch.arange(7), batch.answer + 6])
    torch.nn.functional.cross_entropy(scores, task.targets, reduction="sum").backward()
    (prompt,) = [weight for weight in peft.parameters() if weight.requires_grad]
    theirs = tuple(prompt.grad_sample.shape)
    ours = tuple(example_gradients("gpt2", share=True)[0].shape)
    print(f"PEFT under Opacus' hooks: grad_sample {theirs}; here {ours}")
    assert theirs == (1, 6, 32)
    assert ours == (7, 6, 32)
