#!/usr/bin/env bash
# Write constraints.txt: one version of every package that `.[test]` needs, for each supported Python and system.
#
#   tools/lock.sh                     after a change of the dependencies; versions that still fit stay
#   tools/lock.sh --upgrade           all of them anew; then run .ci/run and commit if it passes
#   tools/lock.sh -P numpy            one of them anew
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "tools/lock.sh needs uv: pip install uv" >&2; exit 1; }
exec uv pip compile -q --universal --python-version 3.10 --extra test --no-annotate \
    --custom-compile-command "tools/lock.sh; see CONTRIBUTING.md" -o constraints.txt pyproject.toml "$@"
