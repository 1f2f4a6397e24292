"""Run on ranks: measure each rank's peak memory while a model is loaded into shards."""

import json
import sys
import threading
import time
from pathlib import Path

import torch

from post_dist.runtime.distributed import start

world = start(0)

from post_dist.config.schema import Engine  # noqa: E402
from post_dist.models.sharded import load_sharded  # noqa: E402
from post_dist.runtime.stop import end_process  # noqa: E402
from post_dist.runtime.zero import shard_share  # noqa: E402


def anonymous_mib() -> float:
    """Return the memory of this process that no file backs.

    The system can drop pages of the weight files at any time.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


folder, output = map(Path, sys.argv[1:])
baseline = anonymous_mib()
peak = 0.0
done = threading.Event()


def watch() -> None:
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_mib())
        time.sleep(0.002)


watcher = threading.Thread(target=watch)
watcher.start()
model = load_sharded(folder, Engine(), "fp32", world)
done.set()
watcher.join()
parameters = sum(parameter.ds_numel for parameter in model.parameters())
layer = sum(parameter.ds_numel for parameter in model.layers[0].parameters())
with torch.no_grad():
    logits = model(torch.arange(4, 12)[None], answer=torch.tensor([7]))
facts = {
    "peak_mib": peak - baseline,
    "model_mib": parameters / 2**18,
    "layer_mib": layer / 2**18,
    "share": shard_share(model),
}
(output / f"{world.rank}.json").write_text(json.dumps(facts | {"logits": logits[0, :5].tolist()}))
world.leave()
end_process(0)
