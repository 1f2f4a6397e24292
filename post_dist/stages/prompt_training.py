"""The loop that trains a soft prompt, for tuning and for transfer. It knows a loss, and no data.

Shapes: n prompt tokens, d width.
"""

import math
from collections.abc import Callable

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import PromptTraining
from post_dist.runtime.checkpoint import load_tensors, save_tensors, start_step
from post_dist.runtime.distributed import World
from post_dist.runtime.metrics import Metrics
from post_dist.runtime.progress import progress

Loss = Callable[[torch.Tensor, int], torch.Tensor]
"""From the prompt [n, d] and the step's number to the mean loss over this rank's rows."""


def train_prompt(
    start_nd: torch.Tensor,
    loss_at: Loss,
    section: PromptTraining,
    folder: RunFolder,
    world: World,
    resume: str,
    *,
    metrics_name: str,
    show_loss: bool,
) -> torch.Tensor:
    """Train a prompt with Adam for a fixed number of steps; the last step's prompt is the result.

    The prompt is kept in fp32 on every rank, outside ZeRO's shards; its gradient is averaged over the ranks by hand.

    Args:
        start_nd: where the prompt starts.
        loss_at: the loss; each rank sees its part of the step's rows.
        section: steps, learning rate and schedule.
        folder: for checkpoints and metrics.
        world: the ranks that take part.
        resume: auto or never.
        metrics_name: the file for the losses.
        show_loss: whether the loss may be shown; not when it comes from private data.

    Returns:
        The trained prompt [n, d], fp32.
    """
    prompt_nd = start_nd.detach().to(world.device, torch.float32).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([prompt_nd], lr=section.learning_rate)
    first_step = start_step(folder.checkpoints, resume, world)
    if first_step:
        _restore(prompt_nd, optimizer, load_tensors(folder.checkpoints, first_step))
    metrics = Metrics(folder.path / metrics_name if world.is_main else None)
    with progress(folder.path.name, section.steps, first_step, show=world.is_main) as advance:
        for step in range(first_step, section.steps):
            optimizer.param_groups[0]["lr"] = section.learning_rate * _schedule(section, step)
            optimizer.zero_grad()
            loss = loss_at(prompt_nd, step)
            loss.backward()  # type: ignore[no-untyped-call]
            world.mean(prompt_nd.grad)  # type: ignore[arg-type]
            optimizer.step()
            mean_loss = float(world.mean(loss.detach().clone()))
            metrics.write(step=step, loss=mean_loss)
            advance(f"loss {mean_loss:.4f}" if show_loss else "")
            if (step + 1) % section.checkpoint_every_steps == 0 and step + 1 < section.steps and world.is_main:
                save_tensors(folder.checkpoints, step + 1, _state(prompt_nd, optimizer))
    return prompt_nd.detach()


def _schedule(section: PromptTraining, step: int) -> float:
    """Linear warm-up, then constant or half a cosine; a function of the step alone."""
    rise = round(section.warmup_share * section.steps)
    if step < rise:
        return (step + 1) / rise
    if section.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, section.steps - rise)))


def _state(prompt_nd: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {"prompt": prompt_nd, **optimizer.state[prompt_nd]}


def _restore(prompt_nd: torch.Tensor, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        prompt_nd.copy_(saved.pop("prompt"))
    optimizer.state[prompt_nd] = {name: tensor if name == "step" else tensor.to(prompt_nd) for name, tensor in saved.items()}
