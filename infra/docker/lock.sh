#!/bin/sh
# `make locks`: writes the lock files of the container images, with the tested versions and the hash of each file.
set -eu
cd "$(dirname "$0")/../.."
export CUSTOM_COMPILE_COMMAND="make locks"
tested=$(mktemp)
trap 'rm -f "$tested"' EXIT
python -m pip list --format=freeze --exclude-editable --exclude cutfleet | sed 's/+cpu$//' > "$tested"

lock() {  # lock FILE EXTRA ...
  file="infra/docker/$1"; shift
  pip-compile --quiet $(printf -- '--extra %s ' "$@") --output-file "$file" --constraint "$tested" --strip-extras \
    --generate-hashes --allow-unsafe --build-deps-for wheel --annotation-style line \
    --no-emit-options --no-emit-index-url --no-emit-find-links --no-emit-trusted-host pyproject.toml
  sed -i "s|, -c $tested||; s|-c $tested, ||; s|    # via -c $tested$||" "$file"
}

lock producer.txt flower api
lock worker-cuda.txt worker
