"""What the ranks of a run may ask of each other."""

from collections.abc import Callable

import pytest
import torch

from post_dist.runtime.distributed import World

COLLECTIVES: dict[str, Callable[[World], object]] = {
    "barrier": World.barrier,
    "mean": lambda world: world.mean(torch.zeros(1)),
    "concatenate": lambda world: world.concatenate(torch.zeros(1)),
    "ranks_of_a_node": World.ranks_of_a_node,
    "any": lambda world: world.any(True),
    "from_main": lambda world: world.from_main(1),
    "merged": lambda world: world.merged({}),
    "gather_objects": lambda world: world.gather_objects(1),
    "together": lambda world: world.together(lambda: 1),
    "on_main": lambda world: world.on_main(lambda: 1),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_work_of_rank_0_alone_holds_no_collective(name: str) -> None:
    """With several ranks, the others would take part in another one. One rank tells it too."""
    world = World(0, 1, 0, "none", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="a collective in work that rank 0 does alone"):
        world.on_main(lambda: COLLECTIVES[name](world))
    # Afterwards, all ranks may meet again.
    COLLECTIVES[name](world)
