#!/bin/sh
# `mkdocs build --strict --quiet` succeeds on a site for which `mkdocs build --strict` fails.
#
# Versions:    mkdocs 1.6.1, Python 3.11, Linux.
# Input:       a site of one page with a link to a page that does not exist.
# Expectation: --strict turns each warning into a failure of the build, and --quiet only prints less.
# Behaviour:   with both, warnings are neither printed nor counted: the exit code is 0.
# Cause:       strict mode counts what reaches a handler of the logger "mkdocs", and --quiet raises the level of
#              that logger to ERROR, so no warning reaches it.
# Remedy:      leave out --quiet if --strict has to hold.
# Output seen:
#     --strict: exit code 1
#     --strict --quiet: exit code 0
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mkdocs==1.6.1
cd "$folder"
mkdir docs
echo "site_name: one page" >mkdocs.yml
echo "[another page](another.md)" >docs/index.md
for options in "--strict" "--strict --quiet"; do
    code=0
    # shellcheck disable=SC2086 - two words
    venv/bin/mkdocs build $options >/dev/null 2>&1 || code=$?
    echo "$options: exit code $code"
done | tee seen
grep -qx -- "--strict: exit code 1" seen && grep -qx -- "--strict --quiet: exit code 0" seen
