// Plain C++ for every processor: vectors of 16 bytes, which GCC and Clang turn into SSE2, NEON and so on; scalars elsewhere.
#pragma once

#include "cpu/rows.h"

namespace cats {
namespace {

struct Generic {
  static constexpr int kAccumulators = 8;

#if defined(__GNUC__)
  typedef float Vector __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr int64_t kWidth = 4;

  static Vector broadcast(float value) { return Vector{value, value, value, value}; }
  static float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static Vector widen(const BFloat16* p) {
    Half half;
    std::memcpy(&half, p, sizeof half);
    return reinterpret_cast<Vector>(__builtin_convertvector(half, Bits) << 16);
  }
  static Vector widen(const Float16* p) { return Vector{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

  typedef uint8_t Bytes __attribute__((vector_size(4)));
  typedef int32_t Codes __attribute__((vector_size(16)));
  static Codes load_codes(const uint8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Codes);
  }
  static Vector whole(Codes codes) { return __builtin_convertvector(codes, Vector); }
  static void deinterleave(Vector a, Vector b, Vector& even, Vector& odd) {
    even = Vector{a[0], a[2], b[0], b[2]};
    odd = Vector{a[1], a[3], b[1], b[3]};
  }
#else
  using Vector = float;
  static constexpr int64_t kWidth = 1;

  static Vector broadcast(float value) { return value; }
  static float sum(Vector v) { return v; }
  static Vector widen(const BFloat16* p) { return to_float(*p); }
  static Vector widen(const Float16* p) { return to_float(*p); }

  using Codes = int32_t;
  static Codes load_codes(const uint8_t* p) { return *p; }
  static Vector whole(Codes codes) { return static_cast<float>(codes); }
  static void deinterleave(Vector a, Vector b, Vector& even, Vector& odd) {
    even = a;
    odd = b;
  }
#endif

  static Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector subtract_product(Vector c, Vector a, Vector b) { return c - a * b; }
  static Vector widen(const float* p) { return load(p); }
  static Vector low(Codes codes) { return whole(codes & 15); }
  static Vector high(Codes codes) { return whole(codes >> 4); }
};

}  // namespace
}  // namespace cats
