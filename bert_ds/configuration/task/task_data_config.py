"""The data section of a task: which files in which format, and which of their columns mean what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_ds.configuration.reading.config_problems import Problem, one_of
from bert_ds.configuration.reading.config_section import PositiveInt, Section

Name = Annotated[str, Field(min_length=1, max_length=200)]
Column = Name | Annotated[int, Field(ge=-64, le=1000)]
"""A column by its name, or by its place, counted from 0, or from the end as -1, -2 and so on."""
Format = Literal[
    "tsv", "csv", "jsonl", "lines", "xml", "conll", "conllu", "squad", "paragraphs", "sentences", "titles", "text"
]
SIDES = ("train", "validation", "test", "corpus")
"""Settings that list files."""
MINED_FORMATS = ("paragraphs", "sentences", "titles")
"""Raw text, of which the rows are pairs."""


class DataFile(Section):
    """One file of a data set, in the form in which it is published."""

    path: Annotated[str, Field(min_length=1)]
    """Below the data folder of the command line, or else beside the task file."""
    format: Format
    """tsv has no quoting, csv is quoted, lines is one text a line, xml a list of elements, squad SQuAD's JSON.
    paragraphs, sentences and titles are raw text as build_shards.py takes it: each row is a paragraph or a sentence and
    the next one, or the title of an extract (<doc title="...">) and its text, in the columns text and text_pair.
    text is for masked_words: a file or folder of text as build_shards.py takes it, or a folder of shards."""
    encoding: Literal["utf-8", "latin-1", "gb18030", "utf-16", "utf-16-le", "utf-16-be"] = "utf-8"
    """latin-1 takes any byte; gb18030 is GBK and GB2312 too; utf-16 begins with a byte order mark."""
    has_header: bool = True
    """tsv and csv: the first row names the columns."""
    pattern: Name | None = None
    """lines: a regular expression whose named groups are the columns; null is one column, "text"."""
    record: Name | None = None
    """xml: name of the element that is a row; its columns are "@attribute" and the names of its children."""
    strips_last_character: bool = False
    """conll: the last character of a word is a mark of its place in a segmentation and no text."""
    values: dict[Name, Name] = {}
    """Columns that are the same for all rows of the file."""


class TaskDataConfig(Section):
    """Files of a task, and the columns that its kind needs."""

    train: tuple[DataFile, ...] = ()
    """Rows to train on; none for a task that needs no training."""
    validation: tuple[DataFile, ...] = ()
    """Rows to choose the best step by; give these or validation_fraction."""
    test: tuple[DataFile, ...] = ()
    """Rows to predict at the end; they need no labels."""
    corpus: tuple[DataFile, ...] = ()
    """retrieval: passages that are searched, in the column of the field passage; passage_id is what relevant of a
    query names. Without relevant the passage of a query is its text_pair, which is searched too."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the training rows that is held out. They are chosen by a hash of their text among the rows that are part
    of no other row, so the same rows are held out whatever the seed."""
    drop_overlap: bool = True
    """Leave out rows that are part of a row of the other side: of training rows and of validation rows. results.json
    counts them."""
    official: tuple[Literal["validation", "test"], ...] = ()
    """Sides that are published sets: no row of them is left out, so that the score is comparable. What is part of a
    training row is scored apart from the others as well."""
    fields: dict[Name, Column | tuple[Column, ...]] = {}
    """What the task needs -> the column that holds it; of several columns, the first that a row has (of negatives,
    all)."""
    labels: tuple[Name, ...] = ()
    """All labels in the order of their ids; without them those of the training rows, sorted."""
    rename_labels: dict[Name, Name] = {}
    """Spelling in the files -> label."""
    label_separator: Annotated[str, Field(min_length=1, max_length=8)] = ","
    """multi_label: between the labels of a row that come as one text."""
    tag_scheme: Literal["bio", "iob1", "bioes", "none"] = "none"
    """How tags mark entities; none: every tag stands for itself, as parts of speech do."""
    max_train_rows: PositiveInt | None = None
    """Train on this many rows, chosen by a hash of their text; null trains on all."""
    max_validation_rows: PositiveInt | None = None
    """Evaluate on this many rows, chosen like the training rows."""

    def gives(self, role: str) -> bool:
        """Whether rows have it, of a column or of their file."""
        return role in self.fields or any(role in file.values for file in (*self.train, *self.validation))


def file_problems(data: TaskDataConfig) -> list[Problem]:
    """Return settings of data files that belong to another format."""
    owners = {
        "has_header": ("tsv", "csv"),
        "pattern": ("lines",),
        "record": ("xml",),
        "strips_last_character": ("conll",),
    }
    problems = []
    for side in SIDES:
        for index, file in enumerate(getattr(data, side)):
            for name, formats in owners.items():
                if getattr(file, name) != DataFile.model_fields[name].default and file.format not in formats:
                    text = f'is for {one_of(formats)}, the format is "{file.format}"'
                    problems.append(Problem(f"data.{side}.{index}.{name}", text))
            if file.format == "xml" and file.record is None:
                problems.append(Problem(f"data.{side}.{index}.record", "is missing, wanted the element that is a row"))
    return problems


def retrieval_problems(data: TaskDataConfig) -> list[Problem]:
    """Return what a retrieval says of its passages that does not go together."""
    problems, by_id = [], data.gives("relevant")
    if by_id == data.gives("text_pair"):
        text = "give exactly one of it, the ids of passages of data.corpus, and text_pair, the passage itself"
        problems.append(Problem("data.fields.relevant", text))
    if by_id and not data.corpus:
        text = "is empty, wanted the passages that data.fields.relevant names"
        problems.append(Problem("data.corpus", text))
    for role in ("passage", "passage_id") if by_id else ("passage",):
        if data.corpus and role not in data.fields:
            problems.append(Problem(f"data.fields.{role}", "is missing, wanted its column in data.corpus"))
    return problems
