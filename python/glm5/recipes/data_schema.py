"""The shape of a data recipe: sources, filters, duplicates, tokenizer. An unknown key is an error, as in ``schema.py``.

Paths are relative to the folder in which glm5 runs; ~ is a home.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from glm5.recipes.schema import Strict

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class TokenizerRecipe(Strict):
    """Bytes, BPE learnt from the training documents, or one that is there already."""

    kind: Literal["bytes", "bpe", "folder"] = "bytes"
    vocab_size: PositiveInt | None = None  # of kind "bpe", special tokens included
    sample_bytes: PositiveInt = 1 << 28  # kind "bpe" learns from so many, from the first on
    path: str | None = None  # of kind "folder": where its tokenizer.json is

    @model_validator(mode="after")
    def _each_kind_has_its_keys(self):
        for kind, key in (("bpe", "vocab_size"), ("folder", "path")):
            if (self.kind == kind) != (getattr(self, key) is not None):
                raise ValueError(f'kind "{kind}" needs {key}, and no other kind has one')
        return self


class FilterRecipe(Strict):
    """Which documents stay. A document that is not UTF-8, is empty or has a NUL byte never does."""

    min_bytes: PositiveInt = 32
    max_bytes: PositiveInt = 1 << 24
    quality: float = Field(0.8, ge=0, le=1)  # smallest score, see glm5.data.filters; 0: not asked
    languages: tuple[str, ...] = ()  # natural languages of text, ISO 639-1, by py3langid; none named: all
    programming_languages: tuple[str, ...] = ()  # of code, by suffix; none named: all
    undecodable: Literal["drop", "error"] = "drop"


class DedupRecipe(Strict):
    exact: bool = True  # if not, only held-out copies of training documents go
    near: float = Field(0.8, ge=0, le=1)  # smallest similarity at which the later document goes; 0: not asked


class _Source(Strict):
    domain: SourceName
    licence: str | None = None  # SPDX; not given: what the documents, the package or a LICENSE file say
    id_prefix: str | None = None  # begins every id; not given: the source's name and a slash
    filters: FilterRecipe | None = None  # instead of the recipe's


class _Files(_Source):
    include: tuple[str, ...] = ("*",)  # shell patterns over the path below the root; * also matches slashes
    exclude: tuple[str, ...] = ()
    samples: Literal["files", "repository"] = "files"
    sample_bytes: PositiveInt = 1 << 20  # repository: at most this long


class FolderSource(_Files):
    """Files below a folder; hidden ones are left out. As repositories: each of its folders is one."""

    kind: Literal["folder"] = "folder"
    path: str


class GitSource(_Files):
    """The files of a checkout that git tracks. As a repository: all of them are one."""

    kind: Literal["git"] = "git"
    path: str
    commits: NonNegativeInt = 0  # newest so many, each a sample: issues, the files before, the message, the diff
    issues: str | None = None  # JSONL with number, title, body: for commits that say #number


class PackageSource(_Files):
    """Text files of installed Python distributions. As repositories: each distribution is one."""

    kind: Literal["packages"] = "packages"
    names: tuple[str, ...] = Field(min_length=1)
    include: tuple[str, ...] = ("*.py",)


class StdlibSource(_Source):
    """The standard library of the interpreter that runs, tests left out."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    licence: str | None = "PSF-2.0"
    path: str | None = None  # another interpreter's


class _Rows(_Source):
    path: str  # a file, or a folder of them
    text: str = "text"  # field or column of the text, of ids, of licences
    id: str | None = None  # not given: the file's name and the row's number
    licence_field: str | None = None


class JsonlSource(_Rows):
    kind: Literal["jsonl"] = "jsonl"


class ParquetSource(_Rows):
    kind: Literal["parquet"] = "parquet"


class _Chat(_Source):
    """Conversations: documents with a loss mask, in a domain of their own. Filters see the JSON of their records."""

    version: Literal["glm-5", "glm-5.1", "glm-5.2"] = "glm-5"  # of the chat format
    # Of conversations that do not say how they think, what share has which mode.
    thinking: dict[Literal["interleaved", "preserved", "off"], NonNegativeFloat] = Field({"interleaved": 1.0}, min_length=1)


class ConversationsSource(_Chat):
    """JSONL of conversations, as ``glm5.data.conversations`` describes them."""

    kind: Literal["conversations"] = "conversations"
    path: str  # a file, or a folder of them


class DialoguesSource(_Chat):
    """Conversations that ``glm5.data.dialogues`` makes up."""

    kind: Literal["dialogues"] = "dialogues"
    licence: str | None = "CC0-1.0"
    count: PositiveInt
    seed: NonNegativeInt = 0


class SyntheticSource(_Source):
    """Items of the long-range tasks of ``glm5.data.synthetic``, task after task and length after length in turn."""

    kind: Literal["synthetic"] = "synthetic"
    licence: str | None = "CC0-1.0"
    filters: FilterRecipe | None = FilterRecipe(min_bytes=1, quality=0)
    tasks: tuple[str, ...] = Field(("niah-single", "niah-multikey", "niah-multivalue", "niah-multiquery"), min_length=1)
    lengths: tuple[PositiveInt, ...] = Field((256,), min_length=1)  # of documents, in byte tokens whatever the tokenizer
    count: PositiveInt
    seed: NonNegativeInt = 0
    haystack: SourceName | None = None  # another source, whose text is around the needles; none: words of no meaning
    haystack_bytes: PositiveInt = 1 << 22  # of that source are kept in memory, from the first on
    loss: Literal["all", "answers"] = "all"  # what of an item is learnt; the domain of "answers" has no other sources
    shape: dict[str, PositiveInt] = Field(default_factory=dict)  # fields of glm5.data.synthetic.Shape


SourceRecipe = Annotated[
    FolderSource
    | GitSource
    | PackageSource
    | StdlibSource
    | JsonlSource
    | ParquetSource
    | ConversationsSource
    | DialoguesSource
    | SyntheticSource,
    Field(discriminator="kind"),
]


class BuildRecipe(Strict):
    """A data recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    validation_one_in: NonNegativeInt = 20  # one document in so many, chosen by a hash of its id, is held out; 0: none
    shard_tokens: PositiveInt = 1 << 27
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    filters: FilterRecipe = FilterRecipe()
    dedup: DedupRecipe = DedupRecipe()
    sources: dict[SourceName, SourceRecipe] = Field(min_length=1)  # read in the order in which they are written

    @model_validator(mode="after")
    def _haystacks_are_text(self):
        for name, source in self.sources.items():
            if isinstance(source, SyntheticSource) and source.haystack is not None:
                if isinstance(self.sources.get(source.haystack, source), SyntheticSource):
                    raise ValueError(f"sources.{name}.haystack is {source.haystack!r}, want the name of a source of text")
        return self

    def digest(self) -> str:
        """Identifies the recipe: sha256 of its resolved content."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
