#!/usr/bin/env bash
# The quick tests with the oldest and with the newest version of every dependency that pyproject.toml allows.
#
#   tools/run_versions.sh                           oldest on Python 3.10, newest on Python 3.13
#   tools/run_versions.sh oldest                    one of them
#   PYTHON=3.11 tools/run_versions.sh newest        on another Python
#   PYTEST="-q tests/optim" tools/run_versions.sh   other tests
#   KEEP=dir tools/run_versions.sh                  keep the environments, to be used again
#
# Needs uv (pip install uv), which finds the versions. Ends with one line an environment, as it belongs into
# CONTRIBUTING's table; fails if one of them failed. With PyPI's CUDA build of torch an environment takes 6 GB.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "tools/run_versions.sh needs uv: pip install uv" >&2; exit 1; }
keep=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$keep"' EXIT
mkdir -p "$keep"
not_here=tests/test_lock.py::test_everything_that_is_installed_for_us_is_in_the_lock # asks an environment of the lock
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MPLBACKEND=Agg WANDB_MODE=offline HF_HUB_OFFLINE=1

summary=() failed=0
for which in "${@:-oldest newest}"; do
    for wanted in $which; do
        case $wanted in
            oldest) python=${PYTHON:-3.10} resolution=lowest-direct ;;
            newest) python=${PYTHON:-3.13} resolution=highest ;;
            *) echo "oldest or newest, not $wanted" >&2; exit 2 ;;
        esac
        environment=$keep/$wanted-$python
        if [ ! -e "$environment/ready" ]; then
            uv pip compile -q --resolution "$resolution" --python-version "$python" --extra test --no-annotate \
                -o "$keep/$wanted.txt" pyproject.toml && uv venv -q --python "$python" "$environment" \
                && VIRTUAL_ENV=$environment uv pip install -q -r "$keep/$wanted.txt" \
                && VIRTUAL_ENV=$environment uv pip install -q --no-deps -e . \
                && touch "$environment/ready" || { summary+=("$wanted: set-up failed"); failed=1; continue; }
        fi
        versions=$("$environment/bin/python" -c '
import platform
from importlib.metadata import version
packages = ("torch", "lightning", "torchmetrics", "litgpt", "numpy", "scipy", "transformers")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in packages))')
        # shellcheck disable=SC2086
        "$environment/bin/python" -m pytest -p no:cacheprovider --deselect $not_here \
            ${PYTEST:--q -m quick} 2>&1 | tee "$keep/$wanted.log"
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
        summary+=("$wanted: $versions: $(tail -n 1 "$keep/$wanted.log")")
    done
done
printf '\n%s\n' "${summary[@]}"
exit $failed
