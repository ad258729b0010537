// The operator cats::_dequantise_columns_cpu, which cpu.py calls: the numbers of packed columns of `down`, row by row in memory,
// for products with many tokens. As in packed_linear/dequantise.cpp, each operation rounds to float32.
#include "packed_linear/numbers.h"
#include "packed_mlp/column_operands.h"

namespace cats {
namespace {

enum Argument { kColumns, kScales, kExtras, kLayout, kDtype = kLayout + 6 };

// Scales, and zero points or shifts, of the outputs of one group, in float32.
struct Tables {
  const ColumnFormat& format;
  std::vector<float> scales, zeros, shifts;

  explicit Tables(const ColumnFormat& f)
      : format(f), scales(f.outputs), zeros(f.outputs, static_cast<float>(f.zero)), shifts(f.outputs) {}

  void read(const uint8_t* stored_scales, const uint8_t* extras, int64_t group) {
    const int64_t first = group * format.outputs;
    for (int64_t i = 0; i < format.outputs; ++i) scales[i] = number_at(stored_scales, format.scale, first + i);
    if (format.mode == ZeroMode::kZeros)
      for (int64_t i = 0; i < format.outputs; ++i) zeros[i] = extras[first + i];
    if (format.mode == ZeroMode::kShifts)
      for (int64_t i = 0; i < format.outputs; ++i) shifts[i] = number_at(extras, format.scale, first + i);
  }
};

void dequantise_column(const Tables& tables, const uint8_t* column, float* numbers) {
  const int64_t D = tables.format.outputs;
  if (tables.format.bits == 8) {
    for (int64_t i = 0; i < D; ++i) numbers[i] = column[i];
  } else {
    for (int64_t i = 0; i < D / 2; ++i) {
      numbers[2 * i] = column[i] & 15;
      numbers[2 * i + 1] = column[i] >> 4;
    }
  }
  for (int64_t i = 0; i < D; ++i) numbers[i] = (numbers[i] - tables.zeros[i]) * tables.scales[i];
  if (tables.format.mode == ZeroMode::kShifts)
    for (int64_t i = 0; i < D; ++i) numbers[i] += tables.shifts[i];
}

// Columns that a thread takes at once: a part of a row of them fills whole lines of memory.
constexpr int64_t kColumnsAtOnce = 32;

// `numbers` [count, D] as columns of `out`, whose rows are `pitch` numbers apart.
template <class T>
void write_transposed(const float* numbers, int64_t count, int64_t D, int64_t pitch, T* out) {
  for (int64_t i = 0; i < D; ++i)
    for (int64_t k = 0; k < count; ++k) round_to(numbers[k * D + i], out[i * pitch + k]);
}

AtenTensorHandle compute(const StableIValue* stack) {
  const AtenTensorHandle columns = tensor_of(stack[kColumns]), extras = optional_tensor_of(stack[kExtras]);
  const ColumnFormat format = column_format(stack + kLayout, columns);
  const int64_t count = sizes_of(columns)[0], D = format.outputs, groups = format.groups(count);
  const int32_t uint8 = torch.aoti_torch_dtype_uint8(), scale = dtype_of_number(format.scale);
  const auto* codes = static_cast<const uint8_t*>(data_of_size(columns, "columns", uint8, {count, format.pitch}));
  const auto* scales =
      static_cast<const uint8_t*>(data_of_size(tensor_of(stack[kScales]), "scales", scale, {groups, D}));
  expect((format.mode == ZeroMode::kConstant) == !extras, "extras");
  const auto* others = static_cast<const uint8_t*>(
      optional_data_of_size(extras, "extras", format.mode == ZeroMode::kZeros ? uint8 : scale, {groups, D}));
  expect(stack[kDtype] <= 2, "the dtype");
  const auto dtype = static_cast<Number>(stack[kDtype]);
  const int64_t sizes[2] = {D, count}, strides[2] = {count, 1};
  const AtenTensorHandle out = empty(2, sizes, strides, dtype_of_number(dtype));
  void* numbers = data_of(out);
  const Threads threads = threads_of_torch();
  for_each(threads, workers_for(count * D, threads), ceil_div(count, kColumnsAtOnce), [&](int64_t chunk) {
    Tables tables(format);
    std::vector<float> wide(kColumnsAtOnce * D);
    int64_t group = -1;
    const int64_t first = chunk * kColumnsAtOnce, last = std::min(count, first + kColumnsAtOnce);
    for (int64_t i = first; i < last; ++i) {
      if (format.group_of(i) != group) tables.read(scales, others, group = format.group_of(i));
      dequantise_column(tables, codes + i * format.pitch, wide.data() + (i - first) * D);
    }
    with_type(dtype, [&](auto number) {
      write_transposed(wide.data(), last - first, D, count, static_cast<decltype(number)*>(numbers) + first);
    });
  });
  return out;
}

void release(const StableIValue* stack) {
  release_tensor(stack[kColumns]);
  release_tensor(stack[kScales]);
  release_optional_tensor(stack[kExtras]);
}

}  // namespace

void dequantise_columns(StableIValue* stack, uint64_t, uint64_t) {
  return_tensor(stack, [&] { return compute(stack); }, release);
}

}  // namespace cats
