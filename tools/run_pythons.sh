#!/usr/bin/env bash
# The default tests on every Python that is named, each in an environment of its own made from the lock.
#
#   tools/run_pythons.sh                          python3.10, 3.11, 3.12 and 3.13, or whichever of them pyenv has
#   tools/run_pythons.sh 3.13.0                   one
#   PYTEST="-n 2 -q tests/optim" tools/run_pythons.sh 3.12
#   KEEP=dir tools/run_pythons.sh                 keep the environments, to be used again
#
# Ends with one line a Python; fails if one of them failed. With PyPI's CUDA build of torch an environment takes 6 GB.
set -uo pipefail
cd "$(dirname "$0")/.."
keep=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$keep"' EXIT
mkdir -p "$keep"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MPLBACKEND=Agg WANDB_MODE=offline HF_HUB_OFFLINE=1

find_python() {
    # pyenv puts a shim on the path for versions that are not switched on: only what answers counts
    "python$1" -c 'import sys; print(sys.executable)' 2>/dev/null && return
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/python 2>/dev/null | sort -V | tail -n 1
}

summary=() failed=0
for version in "${@:-3.10 3.11 3.12 3.13}"; do
    for wanted in $version; do
        python=$(find_python "$wanted")
        [ -n "$python" ] || { summary+=("$wanted: no such interpreter"); failed=1; continue; }
        full=$("$python" -c 'import platform; print(platform.python_version())')
        environment=$keep/$full
        if [ ! -e "$environment/ready" ]; then
            "$python" -m venv "$environment" && "$environment/bin/pip" install -q -c constraints.txt -e '.[test]' \
                && touch "$environment/ready" || { summary+=("$full: set-up failed"); failed=1; continue; }
        fi
        # shellcheck disable=SC2086
        "$environment/bin/python" -m pytest -p no:cacheprovider ${PYTEST:--n 2 -q} 2>&1 | tee "$keep/$full.log"
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
        summary+=("$full: $(tail -n 1 "$keep/$full.log")")
    done
done
printf '\n%s\n' "${summary[@]}"
exit $failed
