"""The hardware of a plan: GPUs, links and hosts, from a YAML file that users may extend."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from post_dist.config.precision import Precision
from post_dist.config.sections import PositiveFloat, PositiveInt, Section
from post_dist.config.yaml_files import read_yaml
from post_dist.conflicts import Layout
from post_dist.errors import InputError

ReachedShare = Annotated[float, Field(gt=0, le=1)]
LinkName = Literal["node", "network"]


class Link(Section):
    """A link between GPUs."""

    gb_per_second: PositiveFloat
    """Into one GPU, while it sends as much."""
    latency_us: Annotated[float, Field(ge=0)] = 0.0
    """Time that each collective takes beside its bytes."""
    gpus: PositiveInt = 1
    """Number of GPUs that the link connects: those of one node."""


class Host(Section):
    """The machine that holds a node's GPUs."""

    memory_gib: PositiveFloat
    gb_per_second: PositiveFloat
    """From host memory to one GPU."""


class Reached(Section):
    """The share of each peak rate that a program reaches."""

    compute: ReachedShare
    memory: ReachedShare
    node: ReachedShare
    network: ReachedShare
    host: ReachedShare


class Hardware(Section):
    """One kind of GPU with its links and its host."""

    memory_gib: PositiveFloat
    teraflops: dict[Precision, PositiveFloat]
    memory_gb_per_second: PositiveFloat
    node: Link
    network: Link
    host: Host
    share: Reached
    overlap: bool
    """Whether collectives run at the same time as computation."""

    def flops_per_second(self, precision: Precision) -> float:
        """Return the operations per second that matrix products reach.

        Raises:
            InputError: the hardware file does not give this precision.
        """
        if precision not in self.teraflops:
            raise InputError(
                f"the hardware file has no teraflops for {precision}",
                f"it has {', '.join(self.teraflops)}",
            )
        return self.teraflops[precision] * 1e12 * self.share.compute

    def bytes_per_second(self, link: LinkName) -> float:
        """Return the rate that a collective reaches, into one GPU."""
        found: Link = getattr(self, link)
        share: float = getattr(self.share, link)
        return found.gb_per_second * 1e9 * share

    def host_bytes_per_second(self) -> float:
        """Return the rate that copies from host memory to one GPU reach."""
        return self.host.gb_per_second * 1e9 * self.share.host

    def memory_bytes_per_second(self) -> float:
        """Return the rate that passes over a GPU's memory reach."""
        return self.memory_gb_per_second * 1e9 * self.share.memory

    def latency_seconds(self, link: LinkName) -> float:
        """Return the time that each collective takes beside its bytes."""
        found: Link = getattr(self, link)
        return found.latency_us * 1e-6


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: number of GPUs of each node.
        hardware: kind of the GPUs.
    """

    nodes: int
    gpus_per_node: int
    hardware: Hardware

    @property
    def ranks(self) -> int:
        """Number of ranks: one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def layout(self) -> Layout:
        """The ranks as the rules of the stages see them."""
        return Layout(self.ranks, self.gpus_per_node, device="cuda")

    def link(self, ranks: int) -> LinkName:
        """Return the slowest link that connects a number of neighboring ranks."""
        # Shard groups are made of neighboring ranks, which fill a node before the next one.
        return "node" if ranks <= self.gpus_per_node else "network"

    def collective_seconds(self, received_bytes: float, ranks: int, calls: float) -> float:
        """Compute the time of collectives.

        Args:
            received_bytes: bytes that one rank receives in all of them.
            ranks: number of neighboring ranks that take part; one rank needs no collective.
            calls: number of collectives.
        """
        if ranks == 1:
            return 0.0
        # The slowest link of the group limits the whole ring.
        link = self.link(ranks)
        transport = received_bytes / self.hardware.bytes_per_second(link)
        return transport + calls * self.hardware.latency_seconds(link)


def read_hardware(name: str, file: Path | None) -> Hardware:
    """Read the entry of a GPU from the user's hardware file, or from the one that is shipped.

    Args:
        name: name of the GPU.
        file: the user's file; its entries replace shipped ones of the same name.

    Raises:
        InputError: there is no entry of this name, or the file does not have the form of ours.
    """
    # The user's entries come on top of the shipped ones.
    shipped = Path(__file__).parent / "hardware.yaml"
    entries = read_yaml(shipped.read_text(), str(shipped))
    if file is not None:
        try:
            entries |= read_yaml(file.read_text(), str(file))
        except (OSError, UnicodeDecodeError, TypeError, InputError):
            raise InputError(
                f"cannot read the hardware file {file}",
                "post_dist/planning/hardware.yaml shows its form",
            ) from None
    if name not in entries:
        raise InputError(
            f"no GPU is called {name}",
            f"known GPUs: {', '.join(entries)}; --hardware FILE adds others",
        )
    try:
        return Hardware.model_validate(entries[name])
    except ValidationError as error:
        # One wrong field is enough to name: the file is short.
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise InputError(f"{file or name}: {place}: {first['msg']}") from None
