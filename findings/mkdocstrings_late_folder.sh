#!/bin/sh
# mkdocstrings never looks into a folder of `paths` that a hook creates before any page is read.
#
# Versions:    mkdocstrings 1.0.8, mkdocstrings-python 2.0.11, mkdocs 1.6.1, Python 3.11, Linux.
# Input:       a site of one page with an identifier, `paths: [made]`, and a hook that writes the module into the
#              folder `made` in `on_pre_build`. The site is built twice.
# Expectation: the module is collected when the page is read, long after the hook, so both builds succeed; or
#              the first one says that the folder of `paths` does not exist.
# Behaviour:   the first build fails, as if `paths` were empty: no message says that the folder was left out. The
#              second one succeeds, because the folder of the first is still there. So a build that works in a
#              used checkout fails in a fresh one.
# Cause:       `paths` are patterns, which are expanded when the configuration is read; one that matches nothing
#              is left out.
# Remedy:      create the folder in the hook `on_startup`, which runs before.
# Output seen:
#     build 1: exit code 1
#     build 2: exit code 0
# Date:        28 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    mkdocs==1.6.1 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
cd "$folder"
mkdir docs
echo "::: latecomer" >docs/index.md
cat >mkdocs.yml <<'END'
site_name: one page
hooks: [hook.py]
plugins:
  - mkdocstrings:
      handlers:
        python:
          paths: [made]
END
cat >hook.py <<'END'
from pathlib import Path


def on_pre_build(**_):
    Path("made").mkdir(exist_ok=True)
    Path("made/latecomer.py").write_text('"""A module."""\n')
END
for build in 1 2; do
    code=0
    venv/bin/mkdocs build >"log$build" 2>&1 || code=$?
    echo "build $build: exit code $code"
done | tee seen
grep -qx "build 1: exit code 1" seen && grep -qx "build 2: exit code 0" seen
! grep -q "made" log1
