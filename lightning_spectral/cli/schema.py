"""``lightning-spectral schema``: JSON Schema of recipes and of a run folder's files, for editors and other readers."""

from __future__ import annotations

import json

from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.records.json_schema import RECORDS, of_record
from lightning_spectral.text import CommandError, did_you_mean

_EPILOG = """\
examples:
  lightning-spectral schema recipe > recipe.schema.json
  lightning-spectral schema spectral.jsonl

Editor completion: put this first into a recipe
  # yaml-language-server: $schema=recipe.schema.json"""


def main(argv: list[str]) -> int:
    """Print one schema; 0 done, 2 bad input."""
    parser = VerbParser(
        "schema",
        description="Print the JSON Schema of a recipe, or of a file in a run folder.",
        epilog=_EPILOG,
    )
    known = ("recipe", *RECORDS)
    parser.add_argument("what", metavar="WHAT", help=", ".join(known))
    what = parser.parse_args(argv).what
    if what not in known:
        raise CommandError(f"there is no schema of `{what}`; {did_you_mean(what, known, otherwise='there are')}")
    if what == "recipe":
        from lightning_spectral.training.json_schema import of_recipe

        made = of_recipe()
    else:
        made = of_record(what)
    print(json.dumps(made, indent=2))
    return 0
