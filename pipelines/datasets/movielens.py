"""MovieLens: one row a rating. Source: https://grouplens.org/datasets/movielens/ and READMEs."""

from pipelines.datasets.description import Column, Count, Dataset, TextFormat

_TERMS = "research use; not to be redistributed (README of the dataset)"
_CSV = TextFormat(delimiter=",")


def _columns(user: str, item: str) -> tuple[Column, ...]:
    return (
        Column(name="user_id", source=user, required=True),
        Column(name="item_id", source=item, required=True),
        Column(name="timestamp", source="timestamp", required=True),
        Column(name="rating", source="rating", kind="number", required=True),
    )


def _variant(
    name: str, folder: str, file: str, text: TextFormat, num_rows: int, md5: str
) -> Dataset:
    header = text.header or ("userId", "movieId")
    return Dataset(
        name=name,
        files=(file,),
        format=text,
        columns=_columns(header[0], header[1]),
        counts=(Count(num_rows=num_rows),),
        counted_by=f"README of {folder}.zip",
        url=f"https://files.grouplens.org/datasets/movielens/{folder}.zip",
        md5=md5,
        terms=_TERMS,
        sessionize={"actions": ["rating"]},
    )


_NAMES = ("user", "item", "rating", "timestamp")
DATASETS = (
    _variant(
        "movielens-100k",
        "ml-100k",
        "u.data",
        TextFormat(delimiter="\t", header=_NAMES),
        100_000,
        "0e33842e24a9c977be4e0107933c0723",
    ),
    _variant(
        "movielens-1m",
        "ml-1m",
        "ratings.dat",
        TextFormat(delimiter="::", header=_NAMES),
        1_000_209,
        "c4d9eecfca2ab87c1945afe126590906",
    ),
    _variant(
        "movielens-20m",
        "ml-20m",
        "ratings.csv",
        _CSV,
        20_000_263,
        "cd245b17a1ae2cc31bb14903e1204af3",
    ),
    _variant(
        "movielens-25m",
        "ml-25m",
        "ratings.csv",
        _CSV,
        25_000_095,
        "6b51fb2759a8657d3bfcbfc42b592ada",
    ),
    # "latest" is replaced now and then, so there is no checksum to hold it to; the count is that of
    # the release of September 2018.
    _variant("movielens-latest-small", "ml-latest-small", "ratings.csv", _CSV, 100_836, ""),
)
