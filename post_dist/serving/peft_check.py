"""Check that PEFT reads an adapter as it was written.

PEFT has rules of its own for some families. For mixtures of experts it moves a LoRA of some linear
layers to the experts, and for prompts it asks the configuration of a model for numbers that some
families do not have.
"""

from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.errors import InputError, first_line
from post_dist.models.language_model import LanguageModel


def check_peft_reads(folder: Path, prompt: SoftPromptArtifact, model: LanguageModel) -> None:
    """Let PEFT put an adapter into a model without weights.

    Args:
        folder: the adapter's folder.
        prompt: the prompt that was written there.
        model: the model on the meta device. PEFT changes it.

    Raises:
        InputError: PEFT cannot read the adapter, or puts it elsewhere.
    """
    from peft import PeftModel  # takes 5 s to import
    from peft.tuners.lora import LoraLayer

    family = type(model.model).__name__
    try:
        with torch.device("meta"):
            read: Any = PeftModel.from_pretrained(
                model.model, str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise _unreadable(family, first_line(error)) from error
    if not isinstance(prompt.adapter, Lora):
        return
    found = set()
    for name, module in read.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found.add(name)
    elsewhere = sorted(found ^ set(prompt.adapter.layers))
    if elsewhere:
        raise _unreadable(family, f"it takes other layers for the LoRA's, such as {elsewhere[0]}")


def _unreadable(family: str, why: str) -> InputError:
    return InputError(
        f"PEFT does not read this prompt on a {family}: {why}",
        "use `post-dist predict`, which runs it as it was tuned",
    )
