#!/usr/bin/env bash
# Pack what a machine without a network lacks into .carry/packages.tar.xz; bench/gpu.sh unpacks it.
#   bash bench/carry.sh       here, once; then on the machine, with .carry beside the tree:
#   bash bench/gpu.sh
# For x86-64 Linux with Python 3.12, torch 2.11+cu130 and the packages that come with transformers.
# SCATTERMOE_GIT is where scattermoe is cloned from, LIMIT_MIB what tree and archive may have together.
# Installing takes seconds, compressing about a minute; an archive that is there is replaced by a whole
# one within the limit or not at all.
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
# torchao's low-bit optimizers and casts are Python; the libraries beside are 20 MB that nothing here
# calls. multiprocess and torchao bring tests; what is linked statically has been linked.
find "$stage/site/torchao" -name '*.so' -delete
rm -rf "$stage/site/test"
# sonic-moe asks for torch <= 2.9.1; its pieces import and compile with 2.11.
install "$stage/peers" sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 \
  nvidia-cutlass-dsl-libs-base==4.4.2 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
git clone -q "${SCATTERMOE_GIT:-https://github.com/shawntan/scattermoe}" "$stage/scattermoe"
git -C "$stage/scattermoe" checkout -q "$commit"
"$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$stage/peers" \
  "$stage/scattermoe"

find "$stage" \( -name '*.a' -o -name 'libtvm_ffi_testing.so' \) -delete
mkdir -p .carry
exclude="$(git rev-parse --git-path info/exclude)"
mkdir -p "$(dirname "$exclude")"
grep -qsxF /.carry/ "$exclude" || echo /.carry/ >>"$exclude"
# xz is what Python 3.12 reads by itself (zstd came with 3.14). The libraries of 144 and 37 MB share
# code of LLVM: a dictionary beyond both saves more than a higher preset, and one thread more than two,
# whose blocks know nothing of each other. Measured on two cores of an EPYC for 271 MB, scattermoe left
# out, seconds of one core and MiB: preset 1 with 192 MiB 44 s, 56.2; in two blocks 50 s, 63.5. With
# others at work on both cores, wall clock, for 274 MB: preset 1 with 192 MiB 126 s, 56.5; 1 with 32 MiB
# 92 s, 64.4; 2 with 32 MiB 194 s, 62.8; preset 0 of 4 MiB, two threads, 25 s, 77.1.
archive=.carry/packages.tar.xz
trap 'rm -rf "$stage" "$archive.partial"' EXIT
tar -C "$stage" -cf - site peers | xz -T1 --x86 --lzma2=preset=1,dict=192MiB >"$archive.partial"

bytes="$(git ls-files -coz --exclude-standard | du -cb --files0-from=- | tail -n 1 | cut -f 1)"
bytes=$((bytes + $(stat -c %s "$archive.partial")))
echo "tree and archive: $((bytes >> 20)) MiB of ${LIMIT_MIB:=64}"
if ((bytes > LIMIT_MIB << 20)); then
  echo "bench/carry.sh: too large to carry; $archive is as it was" >&2
  exit 1
fi
mv -f "$archive.partial" "$archive"
