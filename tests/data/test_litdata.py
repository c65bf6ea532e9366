"""Folders that litdata wrote (0.2.76 was run): read as they are, without litdata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.data import TokenFiles
from lightning_spectral.data.batches import TokenBlocks
from lightning_spectral.data.litdata_folder import open_chunks

DOCUMENTS = [list(range(100 * k, 100 * k + 37 + k)) for k in range(40)]


def write_folder(folder: Path, documents: list[list[int]], dtype: type = np.int32, per_chunk: int = 7) -> Path:
    """What ``litdata.optimize`` writes."""
    folder.mkdir(parents=True)
    chunks = []
    for number, first in enumerate(range(0, len(documents), per_chunk)):
        items = [np.asarray(ids, dtype=dtype).tobytes() for ids in documents[first : first + per_chunk]]
        start = 4 * (len(items) + 2)
        offsets = np.cumsum([start, *map(len, items)])
        header = np.asarray([len(items), *offsets], dtype=np.uint32).tobytes()
        file = folder / f"chunk-0-{number}.bin"
        file.write_bytes(header + b"".join(items))
        tokens = sum(map(len, documents[first : first + per_chunk]))
        chunks.append({"filename": file.name, "chunk_bytes": len(header), "chunk_size": len(items), "dim": tokens})
    config = {"compression": None, "encryption": None, "data_format": ["no_header_tensor:16"]}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return folder


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_token_comes_once_in_order(tmp_path, dtype):
    data = TokenFiles(str(write_folder(tmp_path / "tokens", DOCUMENTS, dtype)), vocab_size=5_000, cache_dir=tmp_path)
    train, held_out = data.cache.train, data.cache.validation
    assert np.concatenate([train[:], held_out[:]]).tolist() == flat(DOCUMENTS)
    assert data.token_counts.sum() == len(train)
    blocks = TokenBlocks(train, 64)
    assert blocks[3].tolist() == flat(DOCUMENTS)[192:257]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_train_and_val_folders_are_the_split(tmp_path, name):
    write_folder(tmp_path / "tokens" / "train", DOCUMENTS[:30])
    write_folder(tmp_path / "tokens" / name, DOCUMENTS[30:])
    cache = TokenFiles(str(tmp_path / "tokens"), vocab_size=5_000, cache_dir=tmp_path).cache
    assert cache.train[:].tolist() == flat(DOCUMENTS[:30])
    assert cache.validation[:].tolist() == flat(DOCUMENTS[30:])


def test_what_is_wrong_names_the_file(tmp_path):
    folder = write_folder(tmp_path / "tokens", DOCUMENTS)
    chunk = folder / "chunk-0-2.bin"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"chunk-0-2.bin` has .* bytes, which is not 378 tokens. Was the download cut"):
        open_chunks(folder)
    chunk.unlink()
    with pytest.raises(ValueError, match=r"chunk-0-2.bin` cannot be read"):
        open_chunks(folder)
    chunk.write_bytes(whole)
    index = json.loads((folder / "index.json").read_text())
    for changed, words in (
        ({"compression": "zstd"}, "have compression"),
        ({"data_format": ["jpeg"]}, "of the kind `jpeg`, not tokens"),
        ({"data_format": []}, "is not litdata's"),
    ):
        (folder / "index.json").write_text(json.dumps({**index, "config": {**index["config"], **changed}}))
        with pytest.raises(ValueError, match=words):
            open_chunks(folder)


def _document(number: int):
    import torch

    yield torch.tensor(DOCUMENTS[number], dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # litdata's own
def test_what_litdata_itself_writes_is_read_as_litdata_reads_it(tmp_path):
    litdata = pytest.importorskip("litdata", reason="writes the folder that is read here without it")
    out, script = tmp_path / "tokens", tmp_path / "write.py"
    script.write_text(
        "from litdata import TokensLoader, optimize\n"
        "from tests.data.test_litdata import _document\n"
        "if __name__ == '__main__':\n"
        f"    optimize(fn=_document, inputs=list(range(40)), output_dir={str(out)!r}, num_workers=1, chunk_size=400,"
        " item_loader=TokensLoader())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    mine = [chunk.tolist() for chunk in open_chunks(out)]
    assert flat(mine) == flat(DOCUMENTS)
    block = 16
    theirs = litdata.StreamingDataset(str(out), item_loader=litdata.TokensLoader(block_size=block))
    expected = [ids[first : first + block] for ids in mine for first in range(0, len(ids) - block + 1, block)]
    assert [theirs[k].tolist() for k in range(len(theirs))] == expected


@pytest.mark.parametrize("name", ["../../secret.bin", "/etc/hostname", "..", "", None, 3])
def test_an_index_leads_nowhere_else(tmp_path, name):
    folder = write_folder(tmp_path / "a" / "tokens", DOCUMENTS)
    (tmp_path / "secret.bin").write_bytes((folder / "chunk-0-0.bin").read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][0]["filename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not litdata's: it has a chunk"):
        open_chunks(folder)
