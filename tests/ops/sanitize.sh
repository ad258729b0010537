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
  x86_64) sets="generic avx2 avx512 avx512_bf16" steps="$sets avx512_vnni" define=-DCATS_X86 ;;
  *) sets="generic" steps="generic" define= ;;
esac

options_of() {
  case $1 in
    generic) ;;
    avx2) echo "-mavx2 -mfma" ;;
    avx512) echo "$avx512" ;;
    avx512_vnni) echo "$avx512 -mavx512vnni" ;;
    avx512_bf16) echo "$avx512 -mavx512vnni -mavx512bf16" ;;
  esac
}

for sanitizers in address,undefined thread; do
  case $sanitizers in thread) quiet=-Wno-tsan ;; *) quiet= ;; esac
  # the compiler warns that it does not follow fences: what these order is atomic for it (claims.h)
  common="$quiet -std=c++17 -O1 -g -fno-omit-frame-pointer -pthread -fsanitize=$sanitizers -fno-sanitize-recover=all"
  objects=
  for set in $sets; do
    $compiler $common $(options_of "$set") -I "$sources" -c "$sources/cpu/$set.cpp" -o "$build/$set.o"
    objects="$objects $build/$set.o"
  done
  $compiler $common -I "$sources" "$here/sanitize.cpp" $objects -o "$build/sanitize"
  objects=
  for set in $steps; do
    $compiler $common $(options_of "$set") -I "$sources" -c "$sources/step/$set.cpp" -o "$build/step_$set.o"
    objects="$objects $build/step_$set.o"
  done
  $compiler $common $define -I "$sources" "$here/sanitize_step.cpp" "$sources/step/plan.cpp" "$sources/step/team.cpp" \
    $objects -o "$build/sanitize_step"
  echo "with -fsanitize=$sanitizers:"
  "$build/sanitize"
  "$build/sanitize_step"
done
