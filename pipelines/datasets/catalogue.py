"""Every dataset that `gr dataset` knows."""

from pipelines.datasets import amazon, kuairand, kuairec, movielens, yambda
from pipelines.datasets.description import Dataset

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for module in (movielens, amazon, kuairand, kuairec, yambda)
    for dataset in module.DATASETS
}


def find(name: str) -> Dataset:
    """Return a dataset by its name.

    Raises:
        ValueError: if there is none; the message names all.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def listing() -> str:
    """Return a line for each dataset: name, rows that are checked, terms, where it comes from."""
    lines = []
    for dataset in DATASETS.values():
        rows = sum(count.num_rows for count in dataset.counts)
        lines.append(f"{dataset.name:24} {rows:>13,}  {dataset.url}  ({dataset.terms})")
    return "\n".join(lines)
