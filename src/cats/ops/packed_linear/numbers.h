// Numbers in memory whose type is known when a call runs.
#pragma once

#include "cpu/rows.h"
#include "packed_linear/formats.h"

namespace cats {
namespace {

// Calls body with a value of the type.
template <class Body>
void with_type(Number number, const Body& body) {
  switch (number) {
    case Number::kFloat16: return body(Float16{});
    case Number::kBFloat16: return body(BFloat16{});
    case Number::kFloat32: return body(float{});
  }
}

inline float number_at(const void* numbers, Number type, int64_t i) {
  float wide;
  with_type(type, [&](auto number) {
    std::memcpy(&number, static_cast<const uint8_t*>(numbers) + i * sizeof number, sizeof number);
    wide = to_float(number);
  });
  return wide;
}

}  // namespace
}  // namespace cats
