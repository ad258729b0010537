// How a plan is cut into pieces, and how a token runs.
#include "step/plan.h"

namespace cats {
namespace {

// A thread that is stopped holds one piece, which others compute again: pieces are small, but take longer than a claim.
constexpr int64_t kMinPiece = 8 * 1024, kMaxPiece = 64 * 1024, kPiecesPerThread = 8;

int64_t bytes_of_row(const StepMatrix& matrix, int64_t element) {
  return matrix.bits ? matrix.pitch : matrix.columns * element;
}

// Rows of a piece, where all matrices of the part have `total` bytes.
Cut cut_rows(int64_t rows, int64_t row_bytes, int64_t total, int64_t threads, int64_t most) {
  const int64_t bytes = std::clamp(total / (threads * kPiecesPerThread), kMinPiece, kMaxPiece);
  Cut cut{rows, std::clamp<int64_t>(bytes / row_bytes, 1, most)};
  // few enough for the list of pieces
  cut.size = std::max(cut.size, rows / (Claims::kMaxPieces / 4) + 1);
  return cut;
}

RowFormat format_of(const StepMatrix& m) {
  if (!m.bits) return RowFormat();
  return RowFormat(m.bits, m.columns, m.group, static_cast<Number>(m.scale), static_cast<ZeroMode>(m.mode), m.zero, m.pitch);
}

LayerCuts cuts_of(const StepLayer& layer, const StepModel& model) {
  const int64_t element = size_of(static_cast<Number>(model.number)), threads = model.threads;
  LayerCuts cuts;
  const StepMatrix* matrices[6] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up};
  int64_t row_bytes[6], bytes[6];
  for (int i = 0; i < 6; ++i) {
    cuts.formats[i] = format_of(*matrices[i]);
    row_bytes[i] = bytes_of_row(*matrices[i], element);
    bytes[i] = row_bytes[i] * matrices[i]->rows;
  }
  const int64_t projections = bytes[0] + bytes[1] + bytes[2];
  cuts.q = cut_rows(layer.q.rows, row_bytes[0], projections, threads, kMaxRows);
  cuts.k = cut_rows(layer.k.rows, row_bytes[1], projections, threads, kMaxRows);
  cuts.v = cut_rows(layer.v.rows, row_bytes[2], projections, threads, kMaxRows);
  cuts.o = cut_rows(layer.o.rows, row_bytes[3], bytes[3], threads, kMaxRows);
  cuts.neurons = cut_rows(layer.gate.rows, row_bytes[4] + row_bytes[5], bytes[4] + bytes[5], threads, kMaxNeurons);
  // more neurons than fit in the list of pieces would be refused when the model is described
  cuts.neurons.size = std::min(cuts.neurons.size, kMaxNeurons);

  const StepColumns& down = layer.down;
  cuts.columns = ColumnFormat{down.bits, model.hidden, down.group, static_cast<Number>(down.scale),
                              static_cast<ZeroMode>(down.mode), down.zero, down.pitch};
  // each piece has sums of its own, which every thread adds up
  const int64_t units = (layer.gate.rows + kNeuronUnit - 1) / kNeuronUnit;
  const int64_t down_bytes = layer.gate.rows * down.pitch;
  const int64_t pieces = std::clamp<int64_t>(down_bytes / (2 * kMinPiece), 1, std::min<int64_t>(threads * 4, 64));
  cuts.down = Cut{layer.gate.rows, std::max<int64_t>(1, (units + pieces - 1) / pieces) * kNeuronUnit};
  return cuts;
}

}  // namespace

Plan::Plan(const StepModel& description)
    : model(description), layers(description.layers, description.layers + description.count), membership_(this) {
  int64_t pieces_of_down = 1;
  for (const StepLayer& layer : layers) {
    cuts.push_back(cuts_of(layer, model));
    pieces_of_down = std::max(pieces_of_down, cuts.back().down.pieces());
  }
  const int64_t row_bytes = bytes_of_row(model.head, size_of(number()));
  embedding_format = format_of(model.embedding);
  head_format = format_of(model.head);
  head = cut_rows(model.head.rows, row_bytes, model.head.rows * row_bytes, model.threads, kMaxRows);
  const int64_t D = model.hidden, size = model.head_size;
  residual.resize(D);
  projected.resize((model.heads + 2 * model.key_heads) * size);
  attended.resize(kMaxRuns * model.heads * (size + 2));
  branch.resize(D);
  middle.resize(D);
  products.resize(model.neurons);
  sums.resize(pieces_of_down * D);
  // before the first token, none runs
  claims.begin(parts());
}

void Plan::run(int64_t first, int64_t last, int64_t helpers, Work work) {
  work_ = work;
  last_.store(last, std::memory_order_relaxed);
  const uint64_t each = parts() + 1;
  claims.begin((claims.part() / each + 1) * each + first);
  membership_.start(helpers);
  work(*this);
  membership_.stop();
}

}  // namespace cats
