#!/usr/bin/env bash
# litgpt's own `pretrain`, unedited: the environment variable gives it the callbacks of a YAML.
#   bash examples/litgpt_pretrain.sh --config my_recipe.yaml
set -euo pipefail
export LIGHTNING_SPECTRAL="${LIGHTNING_SPECTRAL:-recipes/probe.yaml}"
litgpt pretrain "$@"
