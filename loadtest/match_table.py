"""The match table with a million networks: look-up, memory and change, against the same table with a thousand.

Run `python -m loadtest.match_table` in the project's folder. Every figure is the median of five; networks and
addresses are random (seeded), half of the addresses match. Nothing is sent anywhere.
"""

import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Address, Network
from authz_server.policy.networks import NEVER, NetworkTable

SMALL, LARGE = 1_000, 1_000_000
ADDRESSES = 100_000
RUNS = 5

MIXES: dict[str, Sequence[tuple[int, int, float]]] = {
    "3 lengths (70 % /32, 20 % /24, 10 % v6 /64)": ((4, 32, 0.7), (4, 24, 0.2), (6, 64, 0.1)),
    "2 lengths (/32, /24)": ((4, 32, 0.8), (4, 24, 0.2)),
    "9 lengths (/24 to /32)": tuple((4, length, 1 / 9) for length in range(24, 33)),
    "24 lengths (v6 /41 to /64)": tuple((6, length, 1 / 24) for length in range(41, 65)),
}
"""Name -> (version, prefix length, share)."""


def random_networks(mix: Sequence[tuple[int, int, float]], count: int, rng: random.Random) -> list[Network]:
    """Distinct networks in the shares of a mix."""
    networks: set[Network] = set()
    for version, length, share in mix:
        wanted = min(round(count * share), 1 << (length - 1))
        before = len(networks)
        while len(networks) - before < wanted:
            shift = MAX_PREFIX_LENGTH[version] - length
            networks.add(Network(version, rng.getrandbits(length) << shift, length))  # type: ignore[arg-type]
    return list(networks)


def random_addresses(networks: list[Network], rng: random.Random) -> list[Address]:
    """Distinct addresses, half of them within one of the networks, in random order."""
    addresses: set[Address] = set()
    while len(addresses) < ADDRESSES:
        network = rng.choice(networks)
        bits = MAX_PREFIX_LENGTH[network.version]
        if len(addresses) % 2:
            addresses.add(Address(network.version, network.first | rng.getrandbits(bits - network.prefix_length)))
        else:
            addresses.add(Address(network.version, rng.getrandbits(bits)))
    shuffled = sorted(addresses)
    rng.shuffle(shuffled)
    return shuffled


def median_seconds(act: Callable[[], None]) -> float:
    """Median time of one call."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def lookup_us(table: NetworkTable, addresses: list[Address]) -> float:
    """Median microseconds to find the longest match of one address."""

    def look_up_all() -> None:
        for address in addresses:
            table.match(address)

    return median_seconds(look_up_all) / len(addresses) * 1e6


def change_ms(table: NetworkTable, rng: random.Random, networks: list[Network]) -> tuple[float, float]:
    """Median and worst milliseconds to add one network and to remove one, over 1,000 changes."""
    current, seconds = table, []
    for network in rng.sample(networks, 500):
        for value in (None, NEVER):
            began = time.perf_counter()
            current = current.with_changes([(network, value)])
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3, max(seconds) * 1e3


def bytes_a_network(networks: list[Network]) -> float:
    """Memory of the table."""
    gc.collect()
    tracemalloc.start()
    table = NetworkTable.build((network, NEVER) for network in networks)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(table)


def main() -> None:
    """Print the table of figures."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    figures = Table(
        "mix", "us at 10^3", "us at 10^6", "ratio", "bytes a network", "change ms, median", "change ms, worst"
    )
    for name, mix in MIXES.items():
        rng = random.Random(7)
        small, large = (random_networks(mix, count, rng) for count in (SMALL, LARGE))
        addresses = random_addresses(small, rng), random_addresses(large, rng)
        memory = bytes_a_network(large)
        tables = [NetworkTable.build((network, NEVER) for network in networks) for networks in (small, large)]
        gc.collect()
        gc.freeze()
        us = [lookup_us(table, some) for table, some in zip(tables, addresses, strict=True)]
        median, worst = change_ms(tables[1], rng, large)
        cells = (us[0], us[1], us[1] / us[0], memory, median, worst)
        figures.add_row(name, *(f"{cell:.2f}" for cell in cells))
        gc.unfreeze()
    console.print(figures)


if __name__ == "__main__":
    main()
