"""Benchmarks: which labels of a built data set are asked of the features, over which images."""

import dataclasses

from mammodino_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    label: str  # index column label_<label>; one value an image, or a tomosynthesis volume
    kinds: tuple[str, ...] = ("2d",)  # the records it is asked of; one item an image, one a dbt volume


@dataclasses.dataclass(frozen=True)
class Benchmark:
    title: str
    note: str  # what a reader must know before reading the numbers
    tasks: tuple[Task, ...]


BENCHMARKS = {
    "phantom": Benchmark(
        title="Synthetic breast phantoms",
        note="Simulated breasts: the scores show that the programs work, they say nothing about patients. "
        "Density, cancer and lesion are asked of single 2D images; tomosynthesis volumes (mean over slices) "
        "are a task of their own and never mixed with 2D images.",
        tasks=(
            Task("density", "density"),
            Task("cancer", "cancer"),
            Task("lesion", "lesion"),
            Task("density, DBT volumes", "density", kinds=("dbt",)),
        ),
    ),
}


def find(name: str) -> Benchmark:
    """The benchmark called `name`. Raises UserError, with a suggestion, where there is none."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f'unknown benchmark "{name}".{suggest(name, BENCHMARKS)} Known: {known}')
    return BENCHMARKS[name]
