"""Run on ranks: hidden states of models in ZeRO-3 shards, and the gradient of their input."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from post_dist.runtime.distributed import start

world = start(0)

from post_dist.config.schema import Engine  # noqa: E402
from post_dist.models.sharded import load_sharded  # noqa: E402
from post_dist.runtime.stop import end_process  # noqa: E402

# One rank shards a model only if it offloads.
engine = Engine(offload="cpu") if world.size == 1 else Engine()
for folder in map(Path, sys.argv[1:]):
    model = load_sharded(folder, engine, "fp32", world)
    prompt = torch.linspace(-1, 1, 3 * model.width).view(3, -1).requires_grad_(True)
    tokens = torch.arange(4, 28).view(2, 12)
    hidden = model(tokens, prompt=prompt)
    hidden.sum().backward()
    found = {"hidden": hidden.detach(), "gradient": prompt.grad}
    save_file(found, folder / f"found-{world.size}-{world.rank}")
world.leave()
end_process(0)
