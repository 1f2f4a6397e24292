"""Run on ranks: the effect of a prompt on a target in ZeRO-3 shards. Each rank saves it."""

import json
import sys
from pathlib import Path

import torch

from post_dist.runtime.distributed import start

world = start(0)

from objectives import objective_of  # noqa: E402

from post_dist.config.schema import Engine  # noqa: E402
from post_dist.models.sharded import load_sharded  # noqa: E402
from post_dist.runtime.stop import end_process  # noqa: E402
from post_dist.stages.transfer.effect import effect_on_public_text  # noqa: E402

folder, output = map(Path, sys.argv[1:3])
target = load_sharded(folder, Engine(), "fp32", world)
objective = objective_of(folder, target)
prompt = torch.linspace(-1, 1, 5 * target.width).view(5, -1)
effect = effect_on_public_text(target, objective, prompt, world)
(output / f"{world.rank}.json").write_text(json.dumps(effect))
world.leave()
end_process(0)
