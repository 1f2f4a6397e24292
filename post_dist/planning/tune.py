"""The plan of tuning: one GPU, and one prompt or adapter for each privacy plan of the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_dist.config.schema import RunConfig
from post_dist.models.size import LayerSize, ModelSize
from post_dist.planning import cost
from post_dist.planning.estimate import StageEstimate
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.memory import GIB
from post_dist.privacy.micro_batches import LENGTH_STEP
from post_dist.stages.conflicts import tune_conflicts

if TYPE_CHECKING:
    from post_dist.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class _Prompt:
    """One prompt or adapter that is tuned.

    Attributes:
        batch_size: number of examples in a step; in a private run, the expected number.
        steps: number of steps.
        examples: number of training examples that the privacy plan implies; 0 without privacy.
        keeps_lower: whether what the layers below a LoRA give is computed once.
    """

    batch_size: float
    steps: int
    examples: float = 0.0
    keeps_lower: bool = False


def plan_tune(inputs: PlanInputs) -> StageEstimate:
    """Estimate tuning: forward and backward passes of the examples of each step.

    A head reads the hidden states of all examples once. Its own steps need no model.

    Raises:
        InputError: a privacy plan of the run file lacks a number, or no noise multiplier reaches
            its target epsilon.
    """
    config = inputs.config
    section = config.tune
    prompts, epsilons = _prompts(inputs)
    flops = [_step_flops(inputs, prompt) for prompt in prompts]
    step_seconds = [count / inputs.flops_per_second for count in flops]
    reading_seconds = [_reading_seconds(inputs, prompt) for prompt in prompts]
    counting_seconds = [_counting_seconds(inputs, prompt) for prompt in prompts]
    trials = section.search.mean_trials if section.search else None
    # Prompts are tuned one after the other, and a search repeats the steps of each of them.
    seconds = sum(reading_seconds) + sum(counting_seconds)
    for step, prompt in zip(step_seconds, prompts, strict=True):
        seconds += (trials or 1) * step * prompt.steps
    numbers: dict[str, Any] = {
        "flops_per_gpu": {"forward_and_backward": max(flops)},
        "step_seconds": max(step_seconds),
        "steps": max(prompt.steps for prompt in prompts),
        "prompts": len(prompts),
        "trials_of_each": trials,
    }
    if any(reading_seconds):
        numbers["reading_seconds"] = max(reading_seconds)
    if any(counting_seconds):
        numbers["counting_seconds"] = max(counting_seconds)
    if epsilons:
        numbers["epsilon"] = epsilons
    models = inputs.models
    return StageEstimate(
        stage="tune",
        ranks=1,
        hours=seconds / 3600,
        memory_gib=_memory(inputs, models.student),
        numbers=numbers,
        conflicts=tune_conflicts(
            config, models.student.facts, models.teacher.facts, inputs.machine.layout
        ),
    )


def _prompts(inputs: PlanInputs) -> tuple[list[_Prompt], list[float]]:
    """List the prompts that are tuned on the student, and the epsilon of each private one."""
    config = inputs.config
    # The run's own prompt comes first, then one for each of `evaluate.private_rows`.
    prompts = []
    if not config.privacy.enabled:
        prompts.append(_Prompt(config.tune.batch_size, config.tune.steps))
    epsilons = []
    if any(section.enabled for section in config.all_privacy):
        from post_dist.privacy.accounting import account  # takes a second
        from post_dist.privacy.calibration import private_plans

        for plan in private_plans(config):
            examples = plan.expected_batch_size / plan.sampling_probability
            keeps_lower = _keeps_lower(inputs, plan)
            prompts.append(_Prompt(plan.expected_batch_size, plan.steps, examples, keeps_lower))
            epsilons.append(account(plan).epsilon)
    return prompts, epsilons


def _keeps_lower(inputs: PlanInputs, plan: "PrivacyPlan") -> bool:
    """Return whether the run computes the layers below a LoRA once for all steps."""
    from post_dist.privacy.lower_states import are_kept

    section = inputs.config.tune
    if section.adapter != "lora" or section.lora_settings.upper_layers is None:
        return False
    of_example = _run_length(inputs) * inputs.models.student.width * inputs.bytes_each
    return are_kept(plan, of_example)


def _step_flops(inputs: PlanInputs, prompt: _Prompt) -> float:
    """Count the operations of a step.

    No weight of the model is trained, so backward costs one forward of the layers that it passes.
    The products of a LoRA are small and not counted.
    """
    student = inputs.models.student
    if inputs.config.tune.adapter == "head":
        # The scores, and the outer product of error and feature.
        return 4 * prompt.batch_size * _classes(inputs.config) * student.width
    text, response = inputs.text_lengths()
    length = inputs.config.tune.num_virtual_tokens + text + response
    tokens = prompt.batch_size * _run_length(inputs)
    whole = sum(cost.layer_flops(student, layer, tokens, length) for layer in student.layers)
    head = cost.head_flops(student, prompt.batch_size * (response or 1))
    # The gradients of a LoRA need no backward pass below its lowest layer.
    passed = student.upper_layers(inputs.config.tune.lora_settings.upper_layers)
    upper = sum(cost.layer_flops(student, layer, tokens, length) for layer in passed)
    return (upper if prompt.keeps_lower else whole) + upper + 2 * head


def _run_length(inputs: PlanInputs) -> int:
    """Return the number of tokens of an example that pass through the layers."""
    text, response = inputs.text_lengths()
    # The keys and values of a prefix are there already. Tokens attend to them.
    is_prefix = inputs.config.tune.adapter == "prefix"
    return text + response + (0 if is_prefix else inputs.config.tune.num_virtual_tokens)


def _classes(config: RunConfig) -> int:
    """Return the number of classes; 2 if only the data owner's run file names them."""
    return 2 if config.private_task is None else len(config.private_task.labels)


def _reading_seconds(inputs: PlanInputs, prompt: _Prompt) -> float:
    """Estimate one pass over all examples, for the hidden states of a head or below a LoRA."""
    student = inputs.models.student
    layers = student.layers
    # The pass ends below the LoRA. For a head it runs through all layers.
    if prompt.keeps_lower:
        layers = layers[: -(inputs.config.tune.lora_settings.upper_layers or 0)]
    elif inputs.config.tune.adapter != "head":
        return 0.0
    return _forward_seconds(inputs, layers, prompt.examples)


def _counting_seconds(inputs: PlanInputs, prompt: _Prompt) -> float:
    """Estimate the passes that count right validation examples, for a search or a comparison."""
    task = inputs.config.private_task
    # Only the data owner's run file names the shares of the splits.
    if task is None:
        return 0.0
    read = inputs.config.tune.validation_passes * task.validation_per_training * prompt.examples
    return _forward_seconds(inputs, inputs.models.student.layers, read)


def _forward_seconds(inputs: PlanInputs, layers: Sequence[LayerSize], examples: float) -> float:
    """Estimate a forward pass of some layers over examples of full length."""
    length = _run_length(inputs)
    student = inputs.models.student
    flops = sum(cost.layer_flops(student, layer, examples * length, length) for layer in layers)
    return flops / inputs.flops_per_second


def _memory(inputs: PlanInputs, student: ModelSize) -> dict[str, float]:
    """Compute the memory of the GPU by part, in GiB."""
    # Weights are frozen, so there are no gradients and no optimizer of any size.
    each = inputs.bytes_each
    section = inputs.config.tune
    _, response = inputs.text_lengths()
    length = _run_length(inputs)
    micro = section.micro_batch_size_per_gpu
    kept = len(student.layers) * cost.activation_elements(student, trained=False)
    # Three fp32 tensors exist at once: the logits, their softmax and their gradient.
    logits = 3 * micro * (response or 1) * student.vocabulary * 4
    memory = {
        "student_weights": student.parameters * each / GIB,
        "activations": kept * micro * length * each / GIB,
        "logits": logits / GIB,
    }
    # A pass of shorter examples holds more of them.
    copies = micro * max(1.0, length / LENGTH_STEP)
    # Clipping needs the gradient of each example by itself, in fp32.
    if section.adapter == "lora" and any(each.enabled for each in inputs.config.all_privacy):
        values = student.lora_values(section.lora_settings)
        memory["gradients_of_examples"] = copies * values * 4 / GIB
    if section.adapter == "prefix":
        # Each example keeps its keys and values beside those of its text, and their fp32 gradients.
        of_token = len(student.layers) * (student.attention.key + student.attention.value)
        memory["prefixes"] = copies * section.num_virtual_tokens * of_token * (each + 4) / GIB
    return memory
