"""Which sample goes into which shard, decided before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shards.keys import unique_keys
from shards.manifest import UNFINISHED
from shards.options import BuildOptions
from shards.source import Listing, Sample
from shards.target import Target
from shards.target_beton import BetonTarget
from shards.target_tar import TarTarget

WORK = UNFINISHED
"""Folder in the output folder with what an unfinished build needs."""
TARGETS: dict[str, Target] = {"tar": TarTarget(), "beton": BetonTarget()}
_BYTES_PER_PIECE = 512 << 20


@dataclass(frozen=True)
class Task:
    """One shard to be written; all a worker needs, and nothing else decides its bytes."""

    path: Path
    """Where the shard goes: into the output folder, or into `.build` where it is a piece of one file."""
    work: Path
    root: Path
    samples: list[Sample]
    keys: list[str]
    options: BuildOptions

    @property
    def target(self) -> Target:
        return TARGETS[self.options.target]

    @property
    def part(self) -> Path:
        """The file that says that the shard is finished."""
        return self.work / f"{self.path.name}.part"

    def fingerprint(self) -> str:
        """Changes when a sample of the shard is another one, or its file was touched."""
        digest = xxhash.xxh3_128(self.options.validate.encode())
        for sample, key in zip(self.samples, self.keys, strict=True):
            line = f"{sample.path}\0{key}\0{sample.label}\0{sample.size}\0{sample.stamp}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def one_file(options: BuildOptions) -> bool:
    """Whether the set is one file, whose pieces the plan's tasks are."""
    unbound = options.samples_per_shard is None and options.bytes_per_shard is None
    return unbound and TARGETS[options.target].joined


def make_plan(options: BuildOptions, listing: Listing) -> list[Task]:
    """The shards of a set in their order."""
    order = range(len(listing.samples))
    samples, keys = listing.samples, unique_keys(sample.key for sample in listing.samples)
    if options.seed is not None:
        # Sorting by a keyed hash is the same shuffle on every machine and in every version of numpy.
        seed = options.seed
        paths = [sample.path.encode("utf-8", "surrogateescape") for sample in samples]
        shuffled = sorted(order, key=lambda i: (xxhash.xxh3_64_intdigest(paths[i], seed), paths[i]))
        samples, keys = [samples[i] for i in shuffled], [keys[i] for i in shuffled]
    suffix = TARGETS[options.target].suffix
    out = options.out.absolute()
    folder = out / WORK if one_file(options) else out
    return [
        Task(
            folder / f"{options.name}-{number:06d}{suffix}",
            out / WORK,
            listing.root,
            samples[group.start : group.stop],
            keys[group.start : group.stop],
            options,
        )
        for number, group in enumerate(_groups(options, samples))
    ]


def _groups(options: BuildOptions, samples: list[Sample]) -> Iterator[range]:
    if one_file(options):
        most_samples, most_bytes = None, _BYTES_PER_PIECE
    else:
        deciding = options.deciding()
        most_samples, most_bytes = deciding["samples_per_shard"], deciding["bytes_per_shard"]
    begin, group_bytes = 0, 0
    for number, sample in enumerate(samples):
        full = (
            number - begin >= most_samples
            if most_samples is not None
            else number > begin and group_bytes + sample.size > most_bytes
        )
        if full:
            yield range(begin, number)
            begin, group_bytes = number, 0
        group_bytes += sample.size
    if begin < len(samples):
        yield range(begin, len(samples))


def source_hash(tasks: list[Task]) -> str:
    """xxh3-128 over the planned samples' names, labels and sizes, in order."""
    digest = xxhash.xxh3_128()
    for task in tasks:
        for sample in task.samples:
            line = f"{sample.path}\0{sample.label}\0{sample.size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
