"""What a recipe may say about data: where texts are, and what is to be learned of each."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from linearize.recipes.fields import Positive, Section, Text

BUILTIN_DATA = {f"builtin:{path.stem}": path for path in sorted((Path(__file__).parent / "data").glob("*.txt"))}
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet", ".csv", ".tsv")
OTHER_SUFFIXES = (".json", ".gz", ".zst", ".xz", ".arrow")


class DataSource(Section):
    """One corpus.

    Attributes:
        source: `builtin:train`, `builtin:heldout`, a .txt, .jsonl, .parquet, .csv or .tsv file, or a dataset's Hub id.
        name: the dataset's configuration on the Hub.
        split: the dataset's split on the Hub.
        field: column with text, or with chat messages (`role`/`content`, or ShareGPT's `from`/`value`).
        second: column with a second text that belongs to the first, such as a hypothesis to a premise.
        label: column with the text's class, by name or number; for `model.head: sequence-classification`.
        target: column with the answer to the text, such as its summary; for `model.head: seq2seq-lm`.
    """

    source: Text
    name: Text | None = None
    split: Text = "train"
    field: Text = "text"
    second: Text | None = None
    label: Text | None = None
    target: Text | None = None

    @field_validator("source")
    @classmethod
    def _exists(cls, source: str) -> str:
        if source.startswith("builtin:") and source not in BUILTIN_DATA:
            raise ValueError(f"no data set {source}; there are {' and '.join(BUILTIN_DATA)}")
        if Path(source).suffix in OTHER_SUFFIXES:
            raise ValueError(f"files of this kind are not read: {source}; use one of {', '.join(FILE_SUFFIXES)}")
        if source.endswith(FILE_SUFFIXES):
            if not Path(source).expanduser().is_file():
                raise ValueError(f"no such file: {source}")
            if not Path(source).expanduser().stat().st_size:
                raise ValueError(f"the file is empty: {source}")
        return source


# One source may be written without the list.
Listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
DataSources = Annotated[list[DataSource], Listed, Field(min_length=1)]


class DataSection(Section):
    """What to train on and what to measure on; each is a list after loading, one source or several.

    Attributes:
        answer_length: tokens of an answer (`target`) at most: what training cuts, and evaluation lets the model write.
    """

    train: DataSources
    heldout: DataSources
    answer_length: Positive = 128

    @property
    def has_examples(self) -> bool:
        """Whether each text has something of its own that is learned, a class or an answer."""
        return self.train[0].label is not None or self.train[0].target is not None

    @property
    def sources(self) -> dict[str, DataSource]:
        """By their places in the recipe."""
        return {
            f"{name}.{number}": source
            for name in ("train", "heldout")
            for number, source in enumerate(getattr(self, name))
        }
