"""One column of a Parquet or Arrow file, a few hundred rows at a time; the other columns are not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_spectral.text import one_line

_ROWS = 256  # at a time: rows may be long


def table_column(file: Path, reader: str, column: str) -> Iterator[dict[str, object]]:
    """Rows that hold the wanted column, or, where it is missing, one row with the names of those that are there.

    Args:
        file: A Parquet file, or an Arrow stream or file.
        reader: ``parquet`` or ``arrow``.
        column: Its name.

    Raises:
        ValueError: If the file cannot be read; it is named.
    """
    import pyarrow as pa

    try:
        names, batches = (_parquet if reader == "parquet" else _arrow)(file, column)
        if column not in names:
            yield dict.fromkeys(names)
            return
        for batch in batches:
            yield from ({column: value} for value in batch.column(column).to_pylist())
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read `{file}` as {reader}: {one_line(error).rstrip('.')}. Is it whole?") from error


def _parquet(file: Path, column: str) -> tuple[list[str], Iterator[Any]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, buffer_size=1 << 20)
    return table.schema_arrow.names, table.iter_batches(_ROWS, columns=[column])


def _arrow(file: Path, column: str) -> tuple[list[str], Iterator[Any]]:
    import pyarrow as pa

    source = pa.memory_map(str(file))
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema.names, iter(stream)
    except pa.ArrowInvalid:  # the other of the two formats
        source.seek(0)
        table = pa.ipc.open_file(source)
        return table.schema.names, (table.get_batch(number) for number in range(table.num_record_batches))
