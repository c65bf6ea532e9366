"""What a run leaves behind, readable without torch.

``schema`` says what is in a record, ``files`` reads and appends records, ``upgrade`` knows those of earlier schemas.
"""

from lightning_spectral.records.files import (
    ReadReport,
    append_records,
    known_keys,
    parse_record,
    read_losses,
    read_run,
    read_spectral,
    read_weights,
    to_json,
    write_run,
)
from lightning_spectral.records.schema import (
    BUCKETS,
    EIGENVALUES_FOLDER,
    LOSSES_FILE,
    POOLED,
    PROGRESS_FILE,
    RUN_FILE,
    RUN_FILES,
    SCHEMA_VERSION,
    SPECTRAL_FILE,
    STATUSES,
    WEIGHTS_FILE,
    LossRecord,
    RunInfo,
    SpectralRecord,
    WeightRecord,
    layer_name,
)

__all__ = [
    "BUCKETS",
    "EIGENVALUES_FOLDER",
    "LOSSES_FILE",
    "POOLED",
    "PROGRESS_FILE",
    "RUN_FILE",
    "RUN_FILES",
    "SCHEMA_VERSION",
    "SPECTRAL_FILE",
    "STATUSES",
    "WEIGHTS_FILE",
    "LossRecord",
    "ReadReport",
    "RunInfo",
    "SpectralRecord",
    "WeightRecord",
    "append_records",
    "known_keys",
    "layer_name",
    "parse_record",
    "read_losses",
    "read_run",
    "read_spectral",
    "read_weights",
    "to_json",
    "write_run",
]
