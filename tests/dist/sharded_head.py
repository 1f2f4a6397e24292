"""Run on ranks: the head of a target in ZeRO-3 shards. Each rank saves its logits.

It also tries to load a model that scales its logits behind its head, which must be refused.
"""

import json
import sys
from pathlib import Path

import torch

from post_dist.runtime.distributed import start

world = start(0)

from post_dist.config.schema import Engine  # noqa: E402
from post_dist.errors import InputError  # noqa: E402
from post_dist.models.sharded import load_sharded  # noqa: E402
from post_dist.runtime.stop import end_process  # noqa: E402

folder, scaled, output = map(Path, sys.argv[1:4])
refused = ""
try:
    load_sharded(scaled, Engine(), "fp32", world)
except InputError as error:
    refused = str(error)
model = load_sharded(folder, Engine(), "fp32", world)
hidden = torch.linspace(-1, 1, model.width)[None]
head = model.head_of([7, 3, 7])
# If each use gathered the head, ranks that use it unequally often would wait for ever.
for _ in range(world.rank):
    head(hidden)
logits = head(hidden).tolist()
(output / f"{world.rank}.json").write_text(json.dumps({"refused": refused, "logits": logits}))
world.leave()
end_process(0)
