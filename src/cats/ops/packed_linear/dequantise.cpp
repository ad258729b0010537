// The operator cats::_dequantise_rows_cpu, which cpu.py calls: the numbers of packed rows, in the order of columns, for products
// with many tokens. Each operation rounds to float32, as torch's: setup.py forbids the compiler to join two of them.
#include "packed_linear/operands.h"
#include "packed_linear/numbers.h"

namespace cats {
namespace {

enum Argument { kRows, kLayout, kDtype = kLayout + 6 };

// The codes of a unit, one in each byte, in the order of columns: see packed_inputs.h.
void codes_of_unit(const RowFormat& format, const uint8_t* unit, uint8_t* out) {
  for (int64_t t = 0; t < 4; ++t)
    for (int64_t w = 0; w < 4; ++w) {
      uint32_t bytes;
      std::memcpy(&bytes, unit + 16 * t + 4 * w, sizeof bytes);
      if (format.bits == 8) {
        std::memcpy(out + 16 * w + 4 * t, &bytes, sizeof bytes);
        continue;
      }
      uint8_t* place = out + w / 2 * 64 + w % 2 * 16 + 4 * t;
      const uint32_t low = bytes & 0x0f0f0f0fu, high = bytes >> 4 & 0x0f0f0f0fu;
      std::memcpy(place, &low, sizeof low);
      std::memcpy(place + 32, &high, sizeof high);
    }
}

template <class T>
void dequantise_row(const RowFormat& format, const uint8_t* row, T* out) {
  const uint8_t* extras = row + format.extras_offset;
  const int64_t span = format.group ? std::min(format.group, format.unit) : format.unit;
  for (int64_t u = 0; u < format.units; ++u) {
    uint8_t codes[2 * kUnitBytes];
    codes_of_unit(format, row + u * kUnitBytes, codes);
    const int64_t first = u * format.unit, end = std::min(format.unit, format.columns - first);
    for (int64_t begin = 0; begin < end; begin += span) {
      const int64_t group = format.group_of(first + begin), count = std::min(span, end - begin);
      const float scale = number_at(row + format.code_bytes, format.scale, group);
      const float zero = static_cast<float>(format.mode == ZeroMode::kZeros ? extras[group] : format.zero);
      const bool has_shift = format.mode == ZeroMode::kShifts;
      const float shift = has_shift ? number_at(extras, format.scale, group) : 0.0f;
      float numbers[2 * kUnitBytes];
      for (int64_t i = 0; i < count; ++i) numbers[i] = (static_cast<float>(codes[begin + i]) - zero) * scale;
      // a sum with 0 would turn -0 into 0
      if (has_shift)
        for (int64_t i = 0; i < count; ++i) numbers[i] += shift;
      for (int64_t i = 0; i < count; ++i) round_to(numbers[i], out[first + begin + i]);
    }
  }
}

AtenTensorHandle compute(const StableIValue* stack) {
  const AtenTensorHandle rows = tensor_of(stack[kRows]);
  const RowFormat format = row_format(stack + kLayout, rows);
  const int64_t count = sizes_of(rows)[0];
  const auto* data = static_cast<const uint8_t*>(
      data_of_size(rows, "rows", torch.aoti_torch_dtype_uint8(), {count, format.pitch}));
  expect(stack[kDtype] <= 2, "the dtype");
  const auto dtype = static_cast<Number>(stack[kDtype]);
  const int64_t sizes[2] = {count, format.columns}, strides[2] = {format.columns, 1};
  const AtenTensorHandle out = empty(2, sizes, strides, dtype_of_number(dtype));
  void* numbers = data_of(out);
  const Threads threads = threads_of_torch();
  constexpr int64_t kRowsAtOnce = 8;
  for_each(threads, workers_for(count * format.columns, threads), ceil_div(count, kRowsAtOnce), [&](int64_t chunk) {
    with_type(dtype, [&](auto number) {
      using T = decltype(number);
      const int64_t last = std::min(count, (chunk + 1) * kRowsAtOnce);
      for (int64_t i = chunk * kRowsAtOnce; i < last; ++i)
        dequantise_row(format, data + i * format.pitch, static_cast<T*>(numbers) + i * format.columns);
    });
  });
  return out;
}

}  // namespace

void dequantise_rows(StableIValue* stack, uint64_t, uint64_t) {
  return_tensor(stack, [&] { return compute(stack); }, [](const StableIValue* all) { release_tensor(all[kRows]); });
}

}  // namespace cats
