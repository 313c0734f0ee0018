"""Nearest neighbours of an image among the embeddings of a dataset, by cosine similarity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crate_ray.bounded import MAX_MEMBER_BYTES, read_small
from crate_ray.config.search import SearchConfig
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.format.classes import class_names
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding import preparation_digest, weights_of
from crate_ray.evaluation.embedding_files import EMBEDDING
from crate_ray.evaluation.embedding_table import EmbeddingTable, vectors_of
from crate_ray.evaluation.search_picture import draw, encoded_images, query_title
from crate_ray.models.classifier import encoder_of
from crate_ray.runs.references import load
from crate_ray.serving import FeatureExtractor, load_all
from crate_ray.storage.interface import open_storage

_DETAILS = ("key", "name", "sample", "label")


class Neighbour(NamedTuple):
    """A row of the embedded dataset."""

    similarity: float
    """Cosine with the query; 1 for the query itself."""
    sample: int
    """Its number in the dataset."""
    key: str
    name: str | None
    """Name of the file that was packed, if it is known."""
    label: int | None


class Query(NamedTuple):
    """What is searched for."""

    vector: NDArray[np.float32]
    """(numbers per embedding,)"""
    row: Neighbour | None
    """Its row, if it belongs to the dataset."""
    encoded: bytes | None
    """The image file, if it does not."""


class Found(NamedTuple):
    """Result of a search."""

    query: Query
    neighbours: list[Neighbour]
    """The most similar first."""
    classes: tuple[str, ...] | None
    """Names of the classes, if known."""


def search(config: SearchConfig) -> Found:
    """Find the nearest neighbours of an image, and draw them if `config.picture` is set.

    Raises:
        UserError: there are no complete embeddings, the query is not there or cannot be read, or the model or the
            dataset is another one than that of the embeddings.
    """
    table = EmbeddingTable(open_storage(config.embeddings, config.s3))
    record = table.record
    if record.patches is not None:
        raise UserError(
            f"{config.embeddings} holds all patch tokens; search needs one embedding per image: embed with --feature "
            "mean or cls"
        )
    query = _query(table, config)
    neighbours = nearest(table, query.vector, config.neighbours, query.row.sample if query.row else None)
    shards = _dataset(table, config) if config.picture else None
    classes = record.classes or (class_names(shards.manifest) if shards else None)
    found = Found(query, neighbours, classes)
    if config.picture and shards:
        numbers = [*([query.row.sample] if query.row else []), *(row.sample for row in neighbours)]
        encoded = [*([query.encoded] if query.encoded is not None else []), *encoded_images(shards, numbers)]
        titles = [f"{row.similarity:.3f}\n{label_text(row, classes) or row.name or row.key}" for row in neighbours]
        first = query_title(config.query, query.row and label_text(query.row, classes))
        Path(config.picture).write_bytes(draw(encoded, [first, *titles], shards.manifest))
    return found


def nearest(table: EmbeddingTable, query_D: NDArray[np.float32], count: int, leave_out: int | None) -> list[Neighbour]:
    """The rows whose embeddings have the largest cosine with the query. Holds one row group in memory at a time.

    Args:
        table: the rows.
        query_D: the query's embedding.
        count: number of rows.
        leave_out: a sample that is not to be found.
    """
    query_D = query_D / (np.linalg.norm(query_D) or 1)
    best, places = np.empty((0, 3)), list[tuple[str, int]]()  # similarity, sample, number of its group in places
    for place, rows in table.groups(("sample", EMBEDDING)):
        samples = rows["sample"].to_numpy()
        cosine_N = _cosines(vectors_of(rows), query_D)
        new = np.stack([cosine_N, samples, np.full(len(samples), len(places))], 1)
        if leave_out is not None:
            new = new[samples != leave_out]
        if len(new) > count:
            new = new[np.argpartition(-new[:, 0], count - 1)[:count]]
        places.append(place)
        best = np.concatenate([best, new])
        best = best[np.lexsort((best[:, 1], -best[:, 0]))][:count]
    found = {}
    for number in np.unique(best[:, 2]).astype(int).tolist():
        of_group = best[best[:, 2] == number]
        similarities = dict(zip(of_group[:, 1].astype(int).tolist(), of_group[:, 0].tolist(), strict=True))
        rows = table.group(places[number], _DETAILS)
        for row in rows.filter(pc.is_in(rows["sample"], pa.array(list(similarities)))).to_pylist():
            found[row["sample"]] = _neighbour(row, similarities[row["sample"]])
    return [found[sample] for sample in best[:, 1].astype(int).tolist()]


def label_text(row: Neighbour, classes: tuple[str, ...] | None) -> str:
    """Name or number of a row's class; empty if it has none."""
    if row.label is None:
        return ""
    return classes[row.label] if classes and 0 <= row.label < len(classes) else f"class {row.label}"


def _neighbour(row: dict[str, Any], similarity: float) -> Neighbour:
    return Neighbour(similarity, row["sample"], row["key"], row.get("name"), row.get("label"))


def _cosines(x_ND: NDArray[np.float32], unit_D: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of rows with a vector of length 1: 0 for rows of zeros, and −1 for rows that are not finite."""
    lengths_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))
    cosines_N = x_ND @ unit_D / np.where(lengths_N > 0, lengths_N, 1)
    return np.where(np.isfinite(cosines_N), cosines_N, np.float32(-1))


def _query(table: EmbeddingTable, config: SearchConfig) -> Query:
    encoded = _read_image(config)
    if encoded is not None:
        return Query(_embed(encoded, table, config), None, encoded)
    found = _find_row(table, config.query)
    if found is None:
        raise UserError(
            f"{config.query} is neither an image file nor a key, a name or a sample number in {config.embeddings}"
        )
    place, row = found
    rows = table.group(place, ("sample", EMBEDDING))
    vector = vectors_of(rows.filter(pc.equal(rows["sample"], row.sample)))[0]
    return Query(vector, row, None)


def _read_image(config: SearchConfig) -> bytes | None:
    """The image that the query names; None if there is no such file."""
    if "://" in config.query:
        parent, _, name = config.query.rpartition("/")
        return open_storage(parent, config.s3).read_small(name, MAX_MEMBER_BYTES)
    path = Path(config.query).expanduser()
    if not path.is_file():
        return None
    try:
        return read_small(path, MAX_MEMBER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _find_row(table: EmbeddingTable, text: str) -> tuple[tuple[str, int], Neighbour] | None:
    """The first row with this key, else with this name, else with this sample number; and its row group."""
    found: dict[str, tuple[tuple[str, int], Neighbour]] = {}
    for place, rows in table.groups(_DETAILS):
        wanted: dict[str, object] = {"key": text, "name": text}
        if text.isascii() and text.isdigit() and len(text) < 19:
            wanted["sample"] = int(text)
        for column, value in wanted.items():
            if column not in found and column in rows.column_names:
                at = pc.index(rows[column], value).as_py()
                if at >= 0:
                    found[column] = place, _neighbour(rows.slice(at, 1).to_pylist()[0], 1.0)
        if "key" in found:
            break
    return next((found[column] for column in ("key", "name", "sample") if column in found), None)


def _embed(encoded: bytes, table: EmbeddingTable, config: SearchConfig) -> NDArray[np.float32]:
    """The embedding of an image by the model of the table."""
    record, reference = table.record, config.model or table.record.reference
    if reference is None:
        raise UserError(f"{config.embeddings} does not say which model it is from; give --model")
    try:
        model, description = load(reference, config.tracking, config.s3)
    except UserError as error:
        hint = "" if config.model else f"; {config.embeddings} is from this model: give --model if it has moved"
        raise UserError(f"{error}{hint}") from None
    weights = hashlib.sha256(weights_of(model)).hexdigest()
    if weights != record.model or preparation_digest(description) != (
        record.preparation or preparation_digest(description)
    ):
        raise UserError(
            f"{reference} is another model now than the one that {config.embeddings} is from ({weights[:12]}, not "
            f"{record.model[:12]}); give the same with --model, or embed the dataset again"
        )
    try:
        image = load_all([encoded], description)
    except DecodeError as error:
        raise UserError(f"{config.query} cannot be used: {error}") from None
    return FeatureExtractor(encoder_of(model), description, record.feature)(image)[0].numpy()


def _dataset(table: EmbeddingTable, config: SearchConfig) -> ShardSet:
    """The dataset whose images are drawn."""
    record, address = table.record, config.data or table.record.data
    if address is None:
        raise UserError(f"{config.embeddings} does not say where its dataset is; give --data, or --picture null")
    try:
        shards = load_dataset(open_storage(address, config.s3))
    except UserError as error:
        hint = "" if config.data else "; give --data if it has moved, or --picture null"
        raise UserError(f"{error}{hint}") from None
    if (digest := shards.manifest.digest()) != record.dataset:
        raise UserError(
            f"{address} is another dataset than the one that was embedded ({digest[:12]}, not {record.dataset[:12]}); "
            "give the same with --data, or --picture null"
        )
    return shards
