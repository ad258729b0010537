// Products of rows with the input of a part, whatever the matrix is stored as.
//
// `Set`, a template parameter, is an instruction set here: `Base` (lanes of packed codes, see packed_linear/packed_inputs.h),
// `Dense<T>` (lanes of weights of a type, see cpu/rows.h), and whether it has integer products (`kHasIntegers`, and then `Bytes`,
// see step/integer_rows.h).
#pragma once

#include "packed_linear/packed_rows.h"
#include "step/integer_rows.h"
#include "step/plan.h"

namespace cats {
namespace {

// A number of a packed row, as the format defines it.
inline float packed_number(const RowFormat& format, const uint8_t* row, int64_t column) {
  const int64_t group = format.group_of(column);
  const uint8_t* extras = row + format.extras_offset;
  const int64_t zero = format.mode == ZeroMode::kZeros ? extras[group] : format.zero;
  const float difference = static_cast<float>(code_at(format, row, column) - zero);
  const float number = difference * number_at(row + format.code_bytes, format.scale, group);
  return format.mode == ZeroMode::kShifts ? number + number_at(extras, format.scale, group) : number;
}

// The numbers of one row.
inline void read_row(const StepMatrix& matrix, const RowFormat& format, Number number, int64_t row, float* out) {
  const auto* data = static_cast<const uint8_t*>(matrix.data) + row * matrix.pitch;
  for (int64_t i = 0; i < matrix.columns; ++i) out[i] = matrix.bits ? packed_number(format, data, i) : number_at(data, number, i);
}

// x [D] in each form that the matrices of a part read. A thread keeps the memory.
template <class Set>
class MatrixInputs {
 public:
  // Forgets the last part's input. `x` must have whole vectors of memory.
  void begin(const float* x, int64_t columns) {
    x_ = x;
    columns_ = columns;
    has_narrow_ = false;
    count_ = 0;
  }

  // Makes what the rows of this matrix read; returns its number.
  int64_t prepare(const StepMatrix& matrix, const RowFormat& format, Number number) {
    if (!matrix.bits) {
      using Input = typename Set::template Dense<BFloat16>::Input;
      if (number == Number::kBFloat16 && std::is_same_v<Input, BFloat16> && !has_narrow_) {
        BFloat16* narrow = at_least(narrow_, columns_);
        for (int64_t i = 0; i < columns_; ++i) round_to(x_[i], narrow[i]);
        has_narrow_ = true;
      }
      return 0;
    }
    for (int64_t i = 0; i < count_; ++i)
      if (shares_input(formats_[i], format)) return i;
    formats_[count_] = format;
    if constexpr (Set::kHasIntegers) {
      if (takes_integers(format)) {
        integers_[count_].read(format, x_);
        return count_++;
      }
    }
    packed_[count_] = packed_inputs<typename Set::Base>(format, x_, Number::kFloat32, 1, memory_[count_]);
    return count_++;
  }

  // out[i] = the product of row(i) and x, plus its bias, for i < count; row(i) is the number of a row.
  template <class Row>
  void multiply(const StepMatrix& matrix, const RowFormat& format, Number number, int64_t input, const Row& row, int64_t count,
                float* out) const {
    if (count == 0) return;
    if (matrix.bits) {
      const auto* data = static_cast<const uint8_t*>(matrix.data);
      const auto address = [&](int64_t i) { return data + row(i) * matrix.pitch; };
      bool is_done = false;
      if constexpr (Set::kHasIntegers) {
        is_done = takes_integers(format);
        if (is_done) integers_[input].multiply(format, address, count, out);
      }
      if (!is_done) dot_packed_rows<typename Set::Base>(format, address, count, packed_[input], out);
    } else {
      with_type(number, [&](auto type) {
        using T = decltype(type);
        multiply_dense<T>(static_cast<const T*>(matrix.data), row, count, out);
      });
    }
    if (!matrix.bias) return;
    with_type(number, [&](auto type) {
      const auto* bias = static_cast<const decltype(type)*>(matrix.bias);
      for (int64_t i = 0; i < count; ++i) out[i] += to_float(bias[row(i)]);
    });
  }

 private:
  template <class T, class Row>
  void multiply_dense(const T* data, const Row& row, int64_t count, float* out) const {
    using Lanes = typename Set::template Dense<T>;
    const auto address = [&](int64_t i) { return data + row(i) * columns_; };
    auto* results = reinterpret_cast<float(*)[1]>(out);
    const typename Lanes::Input* x;
    if constexpr (std::is_same_v<typename Lanes::Input, float>)
      x = x_;
    else
      x = narrow_.data();
    if (are_short<T>(columns_))
      dot_rows<Lanes, 1, 1>(address, count, x, columns_, results);
    else
      dot_rows<Lanes, rows_at_once<Lanes, 1>(), 1>(address, count, x, columns_, results);
  }

  static bool shares_input(const RowFormat& a, const RowFormat& b) {
    if (Set::kHasIntegers && takes_integers(a) && takes_integers(b)) return a.bits == b.bits;
    return a.bits == b.bits && a.group == b.group;
  }

  const float* x_ = nullptr;
  int64_t columns_ = 0, count_ = 0;
  bool has_narrow_ = false;
  std::vector<BFloat16> narrow_;
  RowFormat formats_[3];
  std::vector<float> memory_[3];
  PackedInputs packed_[3];
  IfIntegers<Set, IntegerRows> integers_[3];
};

}  // namespace
}  // namespace cats
