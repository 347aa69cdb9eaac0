#!/usr/bin/env bash
# Pack what a machine without a network lacks into .carry/packages.tar.xz; bench/gpu.sh unpacks it.
#   bash bench/carry.sh       here, once; then on the machine, with .carry beside the tree:
#   bash bench/gpu.sh
# For x86-64 Linux with Python 3.12, torch 2.11+cu130 and the packages that come with transformers.
# SCATTERMOE_GIT is where scattermoe is cloned from, LIMIT_MIB what tree and archive may have together.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
commit=47b5e15 # scattermoe 0.3.0; it is on no package index

stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
install() { # FOLDER PACKAGE... : wheels for the other machine's Python, without what they require
  local folder="$1" platforms=()
  shift
  for tag in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$tag")
  done
  "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$folder" \
    --ignore-requires-python \
    --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" "$@"
}

# What the tests and the trainer need, in our versions; then the race's peers, found by BENCH_PEERS.
install "$stage/site" -c constraints.txt transformers trl datasets dill multiprocess liger-kernel torchao \
  psutil tiktoken
# Its low-bit optimizers and casts are Python; the libraries beside are 20 MB that nothing here calls.
find "$stage/site/torchao" -name '*.so' -delete
# sonic-moe asks for torch <= 2.9.1; its pieces import and compile with 2.11.
install "$stage/peers" sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 \
  nvidia-cutlass-dsl-libs-base==4.4.2 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
git clone -q "${SCATTERMOE_GIT:-https://github.com/shawntan/scattermoe}" "$stage/scattermoe"
git -C "$stage/scattermoe" checkout -q "$commit"
"$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$stage/peers" \
  "$stage/scattermoe"

mkdir -p .carry
exclude="$(git rev-parse --git-path info/exclude)"
mkdir -p "$(dirname "$exclude")"
grep -qsxF /.carry/ "$exclude" || echo /.carry/ >>"$exclude"
# One library is 144 MB; x86 filter and a dictionary of its size make it fit.
tar -C "$stage" -cf - site peers | xz --x86 --lzma2=preset=3,dict=192MiB >.carry/packages.tar.xz

bytes="$(git ls-files -coz --exclude-standard | du -cb --files0-from=- | tail -n 1 | cut -f 1)"
bytes=$((bytes + $(stat -c %s .carry/packages.tar.xz)))
echo "tree and archive: $((bytes >> 20)) MiB of ${LIMIT_MIB:=64}"
if ((bytes > LIMIT_MIB << 20)); then
  echo "bench/carry.sh: too large to carry" >&2
  exit 1
fi
