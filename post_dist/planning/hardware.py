"""What a plan reckons with: GPUs, their links and their hosts, from a data file that anyone may extend."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from post_dist.config.precision import Precision
from post_dist.config.sections import PositiveFloat, PositiveInt, Section
from post_dist.config.yaml_files import read_yaml
from post_dist.errors import InputError

Fraction = Annotated[float, Field(gt=0, le=1)]


class Link(Section):
    """Between GPUs: bytes one takes in while it sends as many, and what each collective takes beside."""

    gb_per_second: PositiveFloat
    latency_us: Annotated[float, Field(ge=0)] = 0.0
    gpus: PositiveInt = 1
    """How many one node has."""


class Host(Section):
    """The machine that a node's GPUs are in."""

    memory_gib: PositiveFloat
    gb_per_second: PositiveFloat
    """To one GPU."""


class Reached(Section):
    """The share of each peak figure that a program reaches."""

    compute: Fraction
    memory: Fraction
    node: Fraction
    network: Fraction
    host: Fraction


class Hardware(Section):
    """One kind of GPU with what is around it."""

    memory_gib: PositiveFloat
    teraflops: dict[Precision, PositiveFloat]
    memory_gb_per_second: PositiveFloat
    node: Link
    network: Link
    host: Host
    share: Reached
    overlap: bool
    """Whether collectives run beside computation."""

    def flops_per_second(self, precision: Precision) -> float:
        """What matrix products reach.

        Raises:
            InputError: nothing is known of this precision.
        """
        if precision not in self.teraflops:
            raise InputError(
                f"the hardware file says nothing of {precision}",
                f"it knows {', '.join(self.teraflops)}",
            )
        return self.teraflops[precision] * 1e12 * self.share.compute

    def bytes_per_second(self, link: Literal["node", "network"]) -> float:
        """What a collective reaches, into one GPU."""
        found: Link = getattr(self, link)
        share: float = getattr(self.share, link)
        return found.gb_per_second * 1e9 * share

    def host_bytes_per_second(self) -> float:
        """What copies from the host's memory to one GPU reach."""
        return self.host.gb_per_second * 1e9 * self.share.host

    def memory_bytes_per_second(self) -> float:
        """What passes over a GPU's memory reach."""
        return self.memory_gb_per_second * 1e9 * self.share.memory

    def latency_seconds(self, link: Literal["node", "network"]) -> float:
        """What each collective takes beside its bytes."""
        found: Link = getattr(self, link)
        return found.latency_us * 1e-6


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    hardware: Hardware

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node

    def link(self, ranks: int) -> Literal["node", "network"]:
        """What the slowest of so many neighbours are connected by."""
        return "node" if ranks <= self.gpus_per_node else "network"

    def wire_seconds(self, received_bytes: float, ranks: int, calls: float) -> float:
        """Of collectives among so many neighbours."""
        if ranks == 1:
            return 0.0
        link = self.link(ranks)
        return received_bytes / self.hardware.bytes_per_second(
            link
        ) + calls * self.hardware.latency_seconds(link)


def read_hardware(name: str, file: Path | None) -> Hardware:
    """An entry of the user's file, or of ours.

    Raises:
        InputError: there is none of this name, or the file is not of this form.
    """
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
            f"known: {', '.join(entries)}; --hardware FILE brings others",
        )
    try:
        return Hardware.model_validate(entries[name])
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file or name}: {'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}"
        ) from None
