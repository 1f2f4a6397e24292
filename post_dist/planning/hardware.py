"""The hardware of a plan: GPUs, links and hosts, from a YAML file that users may extend."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from post_dist.config.cluster import ClusterStage
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
    """Rate into one GPU in GB/s, while the GPU sends at the same rate."""
    latency_us: Annotated[float, Field(ge=0)] = 0.0
    """Fixed time of each collective in microseconds, without the transfer of its bytes."""
    gpus: PositiveInt = 1
    """Number of GPUs that the link connects; for `node`, the GPUs of one node."""


class Host(Section):
    """The machine that holds a node's GPUs."""

    memory_gib: PositiveFloat
    """Memory of the host, in GiB."""
    gb_per_second: PositiveFloat
    """Rate from host memory to one GPU, in GB/s."""


class Reached(Section):
    """The fraction of each peak rate that a program reaches."""

    compute: ReachedShare
    """Fraction of `teraflops`."""
    memory: ReachedShare
    """Fraction of `memory_gb_per_second`."""
    node: ReachedShare
    """Fraction of the rate of the link `node`."""
    network: ReachedShare
    """Fraction of the rate of the link `network`."""
    host: ReachedShare
    """Fraction of the rate from host memory to a GPU."""


class Hardware(Section):
    """One kind of GPU with its links and its host."""

    memory_gib: PositiveFloat
    """Memory of one GPU, in GiB."""
    teraflops: dict[Precision, PositiveFloat]
    """Peak rate of matrix products at each precision, in 10^12 operations per second."""
    memory_gb_per_second: PositiveFloat
    """Peak rate of one GPU's memory, in GB/s."""
    node: Link
    """The link between the GPUs of one node."""
    network: Link
    """The link between nodes."""
    host: Host
    """The machine that holds the GPUs."""
    share: Reached
    """The fraction of each peak rate that a program reaches."""
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
        """Return the rate into one GPU that a collective reaches."""
        found: Link = getattr(self, link)
        share: float = getattr(self.share, link)
        return found.gb_per_second * 1e9 * share

    def host_bytes_per_second(self) -> float:
        """Return the rate of copies from host memory to one GPU."""
        return self.host.gb_per_second * 1e9 * self.share.host

    def memory_bytes_per_second(self) -> float:
        """Return the rate of passes over a GPU's memory."""
        return self.memory_gb_per_second * 1e9 * self.share.memory

    def latency_seconds(self, link: LinkName) -> float:
        """Return the fixed time of a collective, without the transfer of its bytes."""
        found: Link = getattr(self, link)
        return found.latency_us * 1e-6


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: number of GPUs of each node.
        hardware: kind of the GPUs.
        nodes_of_stage: number of nodes of the stages that have others.
    """

    nodes: int
    gpus_per_node: int
    hardware: Hardware
    nodes_of_stage: Mapping[ClusterStage, int] = field(default_factory=dict)

    def of_stage(self, stage: ClusterStage) -> "Machine":
        """Return the nodes of a stage's job."""
        nodes = self.nodes_of_stage.get(stage, self.nodes)
        return replace(self, nodes=nodes, nodes_of_stage={})

    @property
    def ranks(self) -> int:
        """Number of ranks: one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def layout(self) -> Layout:
        """The layout of the ranks, for the conflict rules of the stages."""
        return Layout(self.ranks, self.gpus_per_node, device="cuda")

    def link(self, ranks: int) -> LinkName:
        """Return the slowest link that connects a number of neighboring ranks."""
        # Neighboring ranks fill a node before the next one. Groups whose size does not divide that
        # of a node lie across nodes.
        is_inside = self.nodes == 1 or self.gpus_per_node % ranks == 0
        return "node" if is_inside else "network"

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
    """Read the entry of a GPU from the user's hardware file, or from the shipped one.

    Args:
        name: name of the GPU.
        file: the user's file; its entries replace shipped ones of the same name.

    Raises:
        InputError: there is no entry of this name, or the file has another form than the shipped
            one.
    """
    # The user's entries replace shipped ones of the same name.
    shipped = Path(__file__).parent / "hardware.yaml"
    entries = read_yaml(shipped.read_text(), str(shipped))
    if file is not None:
        try:
            # A TypeError says that the file holds no mapping.
            entries = {**entries, **read_yaml(file.read_text(), str(file))}
        except (OSError, UnicodeDecodeError, TypeError, InputError):
            raise InputError(
                f"cannot read the hardware file {file}",
                "post_dist/planning/hardware.yaml shows its form",
            ) from None
    if name not in entries:
        raise InputError(
            f"no GPU is called {name}",
            f"known GPUs: {', '.join(map(str, entries))}; --hardware FILE adds others",
        )
    try:
        return Hardware.model_validate(entries[name])
    except ValidationError as error:
        # The file is short, so naming one wrong field is enough.
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise InputError(f"{file or name}: {place}: {first['msg']}") from None
