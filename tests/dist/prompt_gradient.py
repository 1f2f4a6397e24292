"""Run on ranks: the gradient of a prompt through a target in ZeRO-3 shards. Rank 0 saves it."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d

from post_dist.runtime.distributed import start

world = start(0)

from post_dist.config.schema import Engine  # noqa: E402
from post_dist.models.sharded import load_sharded  # noqa: E402
from post_dist.runtime.stop import end_process  # noqa: E402
from post_dist.runtime.zero import shard_share  # noqa: E402

folder, inputs, output = map(Path, sys.argv[1:4])
model = load_sharded(folder, Engine(**json.loads(sys.argv[4])), "fp32", world)
tensors = load_file(inputs)
prompt = tensors["prompt"].clone().requires_grad_(True)
own = slice(world.rank, None, world.size)
batch = [tensors["input_ids"][own], tensors["attention_mask"][own], prompt, tensors["answer"][own]]
results = {"share": torch.tensor(shard_share(model))}
for name, share_prompt in {"apart": False, "shared": model.shares_prompt}.items():
    # The sharded forward is traced in the first round and replayed in the others.
    for _ in range(3):
        prompt.grad = None
        model(*batch, share_prompt=share_prompt).float().log_softmax(-1)[:, 7].mean().backward()
        world.mean(prompt.grad)
    results[name] = prompt.grad.clone()
groups = [group for group in distributed_c10d._world.pg_map if group.size()]
limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
results["limits_seconds"] = torch.tensor([limit.total_seconds() for limit in limits])
if world.is_main:
    save_file(results, output)
world.leave()
end_process(0)
