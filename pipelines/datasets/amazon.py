"""Amazon reviews 2014, ratings only: one row a rating, times by the day.

Source: https://jmcauley.ucsd.edu/data/amazon/links.html, which names the number of ratings.
"""

from pipelines.datasets.description import Column, Count, Dataset, TextFormat

_COLUMNS = (
    Column(name="user_id", source="user", kind="text", required=True),
    Column(name="item_id", source="item", kind="text", required=True),
    Column(name="timestamp", source="timestamp", required=True),
    Column(name="rating", source="rating", kind="number", required=True),
)


def _variant(name: str, category: str, num_rows: int) -> Dataset:
    file = f"ratings_{category}.csv"
    return Dataset(
        name=name,
        files=(file,),
        format=TextFormat(delimiter=",", header=("user", "item", "rating", "timestamp")),
        columns=_COLUMNS,
        counts=(Count(num_rows=num_rows),),
        counted_by="links.html of the dataset",
        url=f"https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/{file}",
        terms="research use; not to be redistributed",
        sessionize={"actions": ["rating"]},
    )


DATASETS = (
    _variant("amazon-books", "Books", 22_507_155),
    _variant("amazon-beauty", "Beauty", 2_023_070),
    _variant("amazon-sports", "Sports_and_Outdoors", 3_268_695),
    _variant("amazon-toys", "Toys_and_Games", 2_252_771),
)
