"""``probe.yaml``, to which the environment variable points: the ``callbacks:`` part of a recipe.

::

    callbacks:
      - class_path: TailTokenProbe
        init_args: {every_n_steps: 50, counts: counts.npy}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_spectral.callbacks import VARIABLE
from lightning_spectral.probe.settings import known_arguments
from lightning_spectral.text import did_you_mean, import_class, one_line, read_yaml

_OURS = ("SpectralRankCallback", "TailTokenProbe", "SpectralAlarm", "WeightSpectrumCallback", "UpdateAudience")


def load_callbacks(path: str | Path) -> list[Callback]:
    """The callbacks of a ``probe.yaml``.

    Raises:
        MisconfigurationException: If the file is missing, no YAML, or names what does not exist; one sentence.
    """
    where = f"{VARIABLE}={path}"
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"{where}: cannot read that file ({one_line(error)}); give the path of a YAML file with `callbacks:`, or "
            "unset the variable."
        ) from error
    except yaml.YAMLError as error:
        raise MisconfigurationException(f"{where}: not YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or set(content) != {"callbacks"} or not isinstance(content["callbacks"], list):
        keys = f"the keys {list(content)}" if isinstance(content, dict) else type(content).__name__
        raise MisconfigurationException(
            f"{where}: must hold one key `callbacks` with a list of `class_path` and `init_args`, got {keys}."
        )
    return [_build(spec, f"{where}: callbacks[{place}]") for place, spec in enumerate(content["callbacks"])]


def _build(spec: Any, where: str) -> Callback:
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if (
        not isinstance(spec, dict)
        or not isinstance(spec.get("class_path"), str)
        or not isinstance(spec.get("init_args") or {}, dict)
        or set(spec) - {"class_path", "init_args"}
    ):
        raise MisconfigurationException(
            f"{where}: must be a class name or have `class_path` and `init_args`, got {spec!r}."
        )
    path, init_args = spec["class_path"], spec.get("init_args") or {}
    name = path.rpartition(".")[2]
    try:
        kind = import_class(path, bare_names_in="lightning_spectral")
    except ImportError as error:
        raise MisconfigurationException(
            f"{where}: no class `{path}` ({error}); give a full class path or one of {', '.join(_OURS)}."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise MisconfigurationException(f"{where}: `{path}` is no Lightning callback.")
    known = known_arguments(kind)
    for unknown in sorted(map(str, set(init_args) - set(known))):
        hint = did_you_mean(unknown, known, otherwise="it knows")
        raise MisconfigurationException(f"{where}: {name} does not know `{unknown}`; {hint}")
    try:
        return kind(**init_args)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"{where}: {name}: {one_line(error)}") from error
