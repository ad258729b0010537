#!/bin/sh
# Builds the kernels of the CPU backend with sanitizers and runs them: addresses and undefined behaviour, then data races.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
sources="$here/../../src/cats/ops"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
compiler=${CXX:-g++}

avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
case $(uname -m) in
  x86_64) sets="generic avx2 avx512 avx512_bf16" ;;
  *) sets="generic" ;;
esac

for sanitizers in address,undefined thread; do
  common="-std=c++17 -O1 -g -fno-omit-frame-pointer -pthread -fsanitize=$sanitizers -fno-sanitize-recover=all"
  objects=
  for set in $sets; do
    case $set in
      generic) options= ;;
      avx2) options="-mavx2 -mfma" ;;
      avx512) options=$avx512 ;;
      avx512_bf16) options="$avx512 -mavx512bf16" ;;
    esac
    $compiler $common $options -I "$sources" -c "$sources/cpu/$set.cpp" -o "$build/$set.o"
    objects="$objects $build/$set.o"
  done
  $compiler $common -I "$sources" "$here/sanitize.cpp" $objects -o "$build/sanitize"
  echo "with -fsanitize=$sanitizers:"
  "$build/sanitize"
done
