"""From a data recipe to a data folder, in three passes whose memory does not grow with the corpus.

Read: every source in turn, filtered, its text set aside on the disk with its digests and signatures. Compare: what is a
duplicate of what. Write: what is left, as tokens, into shards. A build that is killed leaves a hidden scratch folder, which
the next one clears; it begins anew and gives the same bytes, if the sources are the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from glm5.data import sources
from glm5.data.bpe import train_bpe
from glm5.data.dedup import Deduplicator
from glm5.data.filters import Filter
from glm5.data.shards import MANIFEST, VALIDATION, DataError, DataFolder, DataWriter, FilterCounts, is_held_out, open_data
from glm5.data.sources import Document
from glm5.data.synthetic import encode_parts
from glm5.data.text import load_tokenizer
from glm5.data.tokenizer import ByteTokenizer, Tokenizer
from glm5.recipes.data_schema import (
    BuildRecipe,
    ConversationsSource,
    DialoguesSource,
    SourceRecipe,
    SyntheticSource,
    TokenizerRecipe,
)

# What is set aside before it is hashed together: a few blocks of signatures.
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 256

Progress = Callable[[str, int, int | None], None]  # (what is done, bytes done, bytes in all if they are known)


def default_folder(recipe: BuildRecipe, runs: Path) -> Path:
    """Where a build of `recipe` belongs below a folder of runs."""
    return Path(runs) / "data" / f"{recipe.name}-{recipe.digest()[:12]}"


def _tokenizer(recipe: TokenizerRecipe, staged: "_Staged", progress: Progress) -> Tokenizer:
    """The tokenizer that a data recipe names, or learnt from what is staged."""
    if recipe.kind == "bytes":
        return ByteTokenizer()
    if recipe.kind == "bpe":
        return train_bpe(staged.sample(recipe.sample_bytes, progress), recipe.vocab_size)
    tokenizer = load_tokenizer(Path(recipe.path).expanduser())
    if not isinstance(tokenizer, Tokenizer):
        raise DataError(f"{recipe.path}: not a tokenizer with GLM-5's special tokens, which documents begin and end with")
    return tokenizer


def build_data(recipe: BuildRecipe, out: Path | str, progress: Progress = lambda *_: None) -> DataFolder:
    """Builds `recipe` into folder `out`, or opens what an earlier build of the same recipe left there.

    Raises:
        DataError: `out` holds something else or is being built by another process; two documents have one id; no document of
            a source is left, or none is held out though the recipe asks for it.
        ValueError: a source is missing, broken or empty.
        OSError: the disk is full or cannot be written.
    """
    out = Path(out)
    if (out / MANIFEST).is_file():
        data = open_data(out)
        if data.manifest.recipe != recipe.digest():
            raise DataError(f"{out} was built from another recipe; choose another folder or remove it")
        return data
    filters = {name: Filter(source.filters or recipe.filters) for name, source in recipe.sources.items()}
    options = dict(recipe=recipe.digest(), one_in=recipe.validation_one_in, shard_tokens=recipe.shard_tokens)
    with DataWriter(out, **options) as writer:
        staged = _Staged(writer.scratch / "staged", recipe)
        try:
            for name, source in recipe.sources.items():
                rules = source.filters or recipe.filters
                for document in _documents(recipe, name, rules.max_bytes):
                    rule = "too_long" if document.text is None else filters[name].dropped_by(document.text, document.path)
                    if rule == "undecodable" and rules.undecodable == "error":
                        raise DataError(
                            f'source {name}: {document.path} is not UTF-8 (filters.undecodable = "drop" leaves it out)'
                        )
                    staged.add(name, document, rule)
                    progress("reading", staged.bytes, None)
            staged.compare(progress)
            tokenizer = writer.tokenizer = _tokenizer(recipe.tokenizer, staged, progress)
            write = {name: _encoder(name, source, tokenizer) for name, source in recipe.sources.items()}
            for source, document_id, domain, licence, text in staged.kept(progress):
                num_bytes = len(text)
                for tokens, mask in write[source](document_id, text):
                    writer.add(domain, tokens, mask=mask, num_bytes=num_bytes, licence=licence)
                    num_bytes = 0  # a conversation may become several documents
        finally:
            staged.close()
        _want_something(recipe, staged.counts, writer)
        return writer.finish(staged.filter_counts())


def _encoder(name: str, source: SourceRecipe, tokenizer: Tokenizer) -> Callable[[str, bytes], list[tuple]]:
    """(document id, text) -> [(tokens, mask or None), ...] for the documents of a source."""
    if isinstance(source, SyntheticSource):
        return lambda _, text: [_synthetic(source, text, tokenizer)]
    if not isinstance(source, ConversationsSource | DialoguesSource):
        return lambda _, text: [(tokenizer.encode_document(text), None)]
    from glm5.data.chat import ChatTemplate
    from glm5.data.conversations import chat_documents, mode_of, parse_record

    template = ChatTemplate(source.version, tokenizer)

    def encode(document_id: str, text: bytes):
        try:
            documents = chat_documents(parse_record(text), template, mode_of(document_id, source.thinking))
        except ValueError as error:
            raise DataError(f"source {name}: {document_id}: {error}") from None
        return [(document.ids, document.mask) for document in documents]

    return encode


def _documents(recipe: BuildRecipe, name: str, max_bytes: int) -> Iterator[Document]:
    """What source `name` has; of a synthetic one with a haystack, the text of that is read first."""
    source = recipe.sources[name]
    if not isinstance(source, SyntheticSource):
        return sources.read(name, source, max_bytes)
    return sources.synthetic(name, source, _haystack(recipe, source) if source.haystack else None)


def _haystack(recipe: BuildRecipe, source: SyntheticSource) -> str:
    """Training text of the source that is the haystack, those of its documents that are UTF-8 and pass its filters."""
    other = recipe.sources[source.haystack]
    rules = other.filters or recipe.filters
    wanted, found, size = Filter(rules), [], 0
    for document in sources.read(source.haystack, other, rules.max_bytes):
        held_out = is_held_out(document.group or document.id, recipe.validation_one_in)
        if document.text and not held_out and not wanted.dropped_by(document.text, document.path):
            found.append(document.text.decode())
            size += len(document.text)
            if size >= source.haystack_bytes:
                break
    if not found:
        raise DataError(f"source {source.haystack} has no text for a haystack")
    return "\n".join(found)[: source.haystack_bytes]


def _synthetic(source: SyntheticSource, text: bytes, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray | None]:
    ids, mask = encode_parts(json.loads(text), tokenizer)
    return ids, mask if source.loss == "answers" else None


def _plain(source: SourceRecipe, text: bytes) -> bytes:
    """The text that a document shows a tokenizer."""
    return "".join(part for part, _ in json.loads(text)).encode() if isinstance(source, SyntheticSource) else text


class _Staged:
    """Documents on their way: text and records in files, counts in memory."""

    def __init__(self, folder: Path, recipe: BuildRecipe):
        folder.mkdir()
        self._recipe = recipe
        self._text, self._records = open(folder / "text", "w+b", 1 << 20), open(folder / "records", "w+b", 1 << 20)
        self._duplicates = Deduplicator(folder, recipe.dedup.exact, recipe.dedup.near)
        self._waiting: list[tuple[Document, bool]] = []
        self._waiting_bytes = 0
        self.counts = {name: Counter() for name in recipe.sources}  # by rule; "kept" too
        self.bytes = 0

    def add(self, source: str, document: Document, rule: str | None) -> None:
        """A document, and the rule that drops it already, if one does."""
        self.counts[source][rule or "kept"] += 1
        if rule:
            return
        held_out = is_held_out(document.group or document.id, self._recipe.validation_one_in)
        self.bytes += len(document.text)
        self._text.write(document.text)
        record = [document.id, len(document.text), source, document.licence, held_out]
        self._records.write(json.dumps(record).encode() + b"\n")
        self._waiting.append((document, held_out))
        self._waiting_bytes += len(document.text)
        if self._waiting_bytes >= _BATCH_BYTES or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            ids = b"".join(hashlib.sha256(document.id.encode()).digest()[:16] for document, _ in self._waiting)
            texts = [document.text for document, _ in self._waiting]
            digests = b"".join(hashlib.sha256(text).digest()[:16] for text in texts)
            as_rows = [np.frombuffer(raw, "<u8").reshape(-1, 2) for raw in (ids, digests)]
            self._duplicates.add(*as_rows, np.array([held_out for _, held_out in self._waiting]), texts)
            self._waiting, self._waiting_bytes = [], 0

    def compare(self, progress: Progress) -> None:
        """Ends the adding. Raises DataError for two documents with one id."""
        self._flush()
        self._text.flush()
        self._records.flush()
        progress("comparing", 0, None)
        self._duplicates.compare()
        if (same := self._duplicates.duplicate_ids()) is not None:
            found = [record for number, record in enumerate(self._each_record()) if number in same]
            raise DataError(
                f"two documents have the id {found[0][0]!r}: one of source {found[0][2]}, one of {found[1][2]}; "
                "give the sources an id_prefix of their own, or the rows an id field"
            )

    def _each_record(self) -> Iterator[list]:
        self._records.seek(0)
        return map(json.loads, self._records)

    def _each(self) -> Iterator[tuple[str | None, str, str, str, bool, bytes]]:
        """(rule that drops it or None, id, source, licence, held out, text) of all documents in the order of adding."""
        self._text.seek(0)
        drops = self._duplicates.drops()
        drop = next(drops, None)
        for number, (document_id, size, source, licence, held_out) in enumerate(self._each_record()):
            rule = None
            if drop is not None and drop[0] == number:
                rule, drop = drop[1], next(drops, None)
            yield rule, document_id, source, licence, held_out, self._text.read(size)

    def sample(self, num_bytes: int, progress: Progress) -> Iterator[bytes]:
        """Training documents from the first on, until they have so many bytes."""
        done = 0
        for rule, _, source, _, held_out, text in self._each():
            if done >= num_bytes:
                break
            if not rule and not held_out:
                yield _plain(self._recipe.sources[source], text)
                done += len(text)
                progress("learning BPE", done, min(num_bytes, self.bytes))

    def kept(self, progress: Progress) -> Iterator[tuple[str, str, str, str, bytes]]:
        """(source, id, domain, licence, text) of what is not a duplicate; the others are counted."""
        done = 0
        for rule, document_id, source, licence, held_out, text in self._each():
            if rule:
                self.counts[source]["kept"] -= 1
                self.counts[source][rule] += 1
            else:
                domain = self._recipe.sources[source].domain + VALIDATION * held_out
                yield source, document_id, domain, licence, text
            done += len(text)
            progress("writing", done, self.bytes)

    def filter_counts(self) -> dict[str, FilterCounts]:
        return {
            name: FilterCounts(kept=counts["kept"], dropped={k: n for k, n in sorted(counts.items()) if k != "kept" and n})
            for name, counts in self.counts.items()
        }

    def close(self) -> None:
        self._text.close()
        self._records.close()
        self._duplicates.close()


def _want_something(recipe: BuildRecipe, counts: dict[str, Counter], writer: DataWriter) -> None:
    for name, counted in counts.items():
        if not counted["kept"]:
            dropped = ", ".join(f"{n} {rule}" for rule, n in sorted(counted.items()) if n)
            raise DataError(f"source {name}: no document is left: {dropped}")
    if recipe.validation_one_in and not any(domain.endswith(VALIDATION) for domain in writer.domains):
        raise DataError(
            f"none of {sum(c['kept'] for c in counts.values())} documents is held out: "
            f"lower validation_one_in = {recipe.validation_one_in}, or set it to 0 to hold out none"
        )
    if all(domain.endswith(VALIDATION) for domain in writer.domains):
        raise DataError(f"every document is held out: raise validation_one_in = {recipe.validation_one_in}")
