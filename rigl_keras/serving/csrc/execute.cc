#include "execute.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rigl_serving {
namespace {

constexpr int64_t kArea = 110'000;  // floats of an area's input
constexpr int32_t kFewestTiles = 8;  // of an area
constexpr int64_t kHugePage = 1 << 21;  // bytes

// What one of several threads does of a number of things.
struct Share {
  int32_t begin, end;

  Share(int32_t all, int thread, int threads)
      : begin(int64_t{all} * thread / threads),
        end(int64_t{all} * (thread + 1) / threads) {}
};

}  // namespace

Instance::Memory Instance::Allocated(int64_t floats) {
  const int64_t bytes = floats * 4;
  const int64_t align = bytes >= kHugePage ? kHugePage : 64;
  const int64_t whole = (std::max<int64_t>(bytes, 64) + align - 1) / align *
                        align;
  Memory memory(static_cast<float*>(std::aligned_alloc(align, whole)));
  if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Planes far apart would each need a page of their own looked up.
  if (align == kHugePage) madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
  return memory;
}

Instance::Instance(const Plan& plan, int threads)
    : plan_(plan), tiles_(*plan.layout.tiles), threads_(threads) {
  int64_t floats = 0;
  std::vector<int64_t> begins;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    begins.push_back(floats);
    // Slots of one size must not begin at the same place of a cache.
    floats += (plan.slots[i] + 15) / 16 * 16 + 16 * (1 + 5 * (i % 7));
  }
  memory_ = Allocated(floats);
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    slots_.push_back(memory_.get() + begins[i]);
    const int64_t end = i + 1 < begins.size() ? begins[i + 1] : floats;
    std::fill(slots_[i], memory_.get() + end, plan.fills[i]);
  }
  bound_.resize(plan.steps.size());
  for (int32_t s = 0; s < steps(); ++s) Bind(s);
}

Field Instance::FieldOf(const Operand& operand) const {
  Field field;
  if (!operand) return field;
  const Geometry& g = operand.geometry;
  field.data = slots_[operand.slot] + g.lead + operand.channel * g.plane;
  field.plane = g.plane;
  field.pitch = g.pitch;
  field.channels = g.channels;
  field.rows = g.rows;
  field.cells = g.cells;
  field.last = g.last;
  return field;
}

Epilogue Instance::EpilogueOf(const Step& step) const {
  Epilogue e;
  e.scale = step.scale;
  e.shift = step.shift;
  e.other = FieldOf(step.other);
  e.combine = step.combine;
  e.act = step.act;
  e.a = step.a;
  e.b = step.b;
  e.to = FieldOf(step.to);
  e.to2 = FieldOf(step.to2);
  e.scale2 = step.scale2;
  e.shift2 = step.shift2;
  e.act2 = step.act2;
  e.a2 = step.a2;
  e.b2 = step.b2;
  const Geometry& to = (step.to ? step.to : step.to2).geometry;
  e.other_is_pixel =
      step.other && step.other.geometry.is_pixel() && !to.is_pixel();
  return e;
}

int32_t Instance::PanelOf(const Step& step) const {
  switch (step.choice.product) {
    case Product::kDense:
      return tiles_.panel;
    case Product::kGenerated:
      return step.weights->generated.blocks[0].channels;
    default:
      return 1;
  }
}

std::vector<Part> Instance::PartsOf(const Step& step,
                                    const Convolution& whole) const {
  std::vector<Part> parts;
  const int32_t tile = step.choice.tile[0];
  const int32_t bands = (whole.out_rows + tile - 1) / tile;
  // Threads that share an image share its rows, so that each finds most of
  // what it reads in its own cache, or else the output's channels.
  if (bands >= threads_ && (bands % threads_ == 0 || bands >= 4 * threads_)) {
    for (int t = 0; t < threads_; ++t) {
      const Share share(bands, t, threads_);
      parts.push_back({share.begin * tile,
                       std::min(share.end * tile, whole.out_rows), 0,
                       whole.channels});
    }
    return parts;
  }
  const int32_t panel = PanelOf(step);
  const int32_t panels = (whole.channels + panel - 1) / panel;
  // As many weights for each; a channel costs something besides.
  std::vector<int64_t> until(panels + 1, 0);
  for (int32_t p = 0; p < panels; ++p) {
    int64_t cost = 4;
    if (step.choice.product == Product::kSparse)
      for (int32_t b = 0; b < whole.blocks; ++b)
        cost += whole.rows[b * whole.channels + p + 1] -
                whole.rows[b * whole.channels + p];
    until[p + 1] = until[p] + cost;
  }
  int32_t begin = 0;
  for (int t = 0; t < threads_; ++t) {
    int32_t end = static_cast<int32_t>(
        std::lower_bound(until.begin(), until.end(),
                         until.back() * (t + 1) / threads_) -
        until.begin());
    if (t + 1 == threads_) end = panels;
    end = std::max(begin, std::min(end, panels));
    parts.push_back({0, whole.out_rows, std::min(begin * panel,
                                                 whole.channels),
                     std::min(end * panel, whole.channels)});
    begin = end;
  }
  return parts;
}

void Instance::Bind(int32_t s) {
  const Step& step = plan_.steps[s];
  Bound& bound = bound_[s];
  bound.in = FieldOf(step.in);
  bound.to = FieldOf(step.to);
  bound.after = EpilogueOf(step);
  bound.phases.clear();
  for (const Operand& phase : step.phases)
    bound.phases.push_back(FieldOf(phase));
  const Field& out = step.to ? bound.after.to : bound.after.to2;
  int64_t scratch = 0;
  if (step.kind == StepKind::kConvolution) {
    Convolution& c = bound.convolution;
    const Weights& w = *step.weights;
    c.in = bound.in.data;
    c.in_pitch = step.in_pitch;
    c.in_step = step.in_step;
    c.in_plane = bound.in.plane;
    c.row_pitch = bound.in.pitch;
    c.every_other = step.every_other;
    c.entries = w.entries.data();
    c.rows = w.rows.data();
    c.offsets = w.offsets.data();
    c.dense_blocks = w.dense_blocks.data();
    c.weights = w.dense.data();
    c.inputs = static_cast<int32_t>(w.offsets.size());
    c.blocks = w.blocks;
    c.channels = out.channels;
    c.bias = step.bias;
    c.out_rows = out.rows;
    c.out_cells = out.cells;
    c.out_last = out.last;
    c.tile[0] = step.choice.tile[0];
    c.tile[1] = step.choice.tile[1];
    c.after = bound.after;
    bound.parts = PartsOf(step, c);
    if (step.choice.product == Product::kGenerated) SetArea(step, &bound);
    scratch = int64_t{c.tile[0]} * c.tile[1] * tiles_.length *
              ((c.channels + tiles_.panel - 1) / tiles_.panel * tiles_.panel);
  } else if (step.kind == StepKind::kPool) {
    Pool& p = bound.pool;
    p.in = bound.in.data;
    p.in_plane = bound.in.plane;
    p.in_pitch = step.in_pitch;
    p.in_step = step.in_step;
    p.offsets = step.offsets.data();
    p.count = static_cast<int32_t>(step.offsets.size());
    p.maximum = step.of->maximum;
    p.factors = step.factors.empty() ? nullptr : step.factors.data();
    p.out_rows = out.rows;
    p.out_cells = out.cells;
    p.out_last = out.last;
    p.after = bound.after;
  } else if (step.kind == StepKind::kReshape) {
    scratch = int64_t{step.in.geometry.rows} * step.in.geometry.columns *
              step.in.geometry.channels * tiles_.length;
  } else if (step.kind == StepKind::kRecurrent) {
    const int64_t floats =
        step.recurrence->Floats(plan_.layout.positions);
    bound.states = Allocated(Recurrence::kStates * floats);
    scratch = Recurrence::kScratch * floats;
  }
  if (scratch > scratch_floats_) {
    scratch_.clear();
    for (int t = 0; t < threads_; ++t) scratch_.push_back(Allocated(scratch));
    scratch_floats_ = scratch;
  }
}

void Instance::Run(int32_t s, int thread, int threads, const Unit& unit,
                   Barrier* barrier) {
  const Step& step = plan_.steps[s];
  const Bound& bound = bound_[s];
  const bool positions = plan_.layout.positions;
  float* scratch = scratch_.empty() ? nullptr : scratch_[thread].get();
  switch (step.kind) {
    case StepKind::kPack: {
      const Unit::Value& from = unit.inputs[step.number];
      const Share rows(bound.to.rows, thread, threads);
      tiles_.pack(from.pixels, from.floats, unit.count, positions,
                  step.to.geometry.columns, bound.to.channels, bound.to,
                  rows.begin, rows.end);
      break;
    }
    case StepKind::kUnpack: {
      const Unit::Value& to = unit.outputs[step.number];
      const Share rows(bound.in.rows, thread, threads);
      tiles_.unpack(bound.in, to.pixels, to.floats, unit.count, positions,
                    step.in.geometry.columns, bound.in.channels, rows.begin,
                    rows.end);
      break;
    }
    case StepKind::kConvolution: {
      Part part{0, bound.convolution.out_rows, 0, bound.convolution.channels};
      if (threads > 1) part = bound.parts[thread];
      if (part.row_begin >= part.row_end ||
          part.channel_begin >= part.channel_end)
        break;
      if (step.choice.product == Product::kGenerated)
        RunGenerated(step, bound, part, scratch);
      else if (step.choice.product == Product::kDense)
        tiles_.dense(bound.convolution, part, scratch);
      else if (step.choice.product == Product::kDepthwise)
        tiles_.depthwise(bound.convolution, part, scratch);
      else
        tiles_.sparse(bound.convolution, part, scratch);
      break;
    }
    case StepKind::kElementwise: {
      const Share share(bound.in.channels, thread, threads);
      tiles_.elementwise(bound.in, bound.after, share.begin, share.end);
      break;
    }
    case StepKind::kPool: {
      const Field& out = step.to ? bound.after.to : bound.after.to2;
      const Share share(out.channels, thread, threads);
      tiles_.pool(bound.pool, share.begin, share.end);
      break;
    }
    case StepKind::kGlobalPool: {
      const Share share(bound.in.channels, thread, threads);
      tiles_.global_pool(bound.in, step.of->maximum, positions,
                         step.in.geometry.columns, bound.after, share.begin,
                         share.end);
      break;
    }
    case StepKind::kPhases: {
      const Share share(step.phases[0].geometry.channels, thread, threads);
      Phases(step, bound, share.begin, share.end);
      break;
    }
    case StepKind::kSplat: {
      const Share share(bound.in.channels, thread, threads);
      Splat(bound, share.begin, share.end);
      break;
    }
    case StepKind::kPad: {
      const Share share(bound.in.channels, thread, threads);
      PadPixels(step, bound, share.begin, share.end);
      break;
    }
    case StepKind::kUpsample: {
      const Share share(bound.in.channels, thread, threads);
      Upsample(step, bound, share.begin, share.end);
      break;
    }
    case StepKind::kSoftmax: {
      const Share share(bound.in.rows, thread, threads);
      Softmax(step, bound, share.begin, share.end);
      break;
    }
    case StepKind::kRecurrent:
      step.recurrence->Run(bound.in, step.in.geometry.columns, positions,
                           bound.to, step.to.geometry.is_pixel(),
                           bound.states.get(), scratch, thread, threads,
                           barrier);
      break;
    case StepKind::kReshape:
      if (thread == 0) Reshape(step, bound, scratch);
      break;
  }
}

float* Instance::At(const Field& field, const Generated::Block& block,
                    int32_t row, int32_t cell) const {
  if (!field.data) return nullptr;
  return field.data + block.first_channel * field.plane + row * field.pitch +
         int64_t{cell} * tiles_.length;
}

// An area of the output whose inputs stay in the second cache is computed for
// all blocks of channels, one after another: the code of a block then stays in
// the first one for the whole area.
void Instance::RunGenerated(const Step& step, const Bound& bound,
                            const Part& part, float* scratch) const {
  const Convolution& c = bound.convolution;
  const Generated& generated = step.weights->generated;
  const int32_t* tile = step.choice.tile;
  const int32_t* area = bound.area;
  for (int32_t top = part.row_begin; top < part.row_end; top += area[0]) {
    const int32_t bottom = std::min(top + area[0], part.row_end);
    for (int32_t left = 0; left < c.out_cells; left += area[1]) {
      const int32_t right = std::min(left + area[1], c.out_cells);
      for (const Generated::Block& block : generated.blocks) {
        if (block.first_channel < part.channel_begin ||
            block.first_channel >= part.channel_end)
          continue;
        const SumsFunction sums = generated.function(block);
        const float* weights = generated.weights.data() + block.weights_at;
        for (int32_t i = top; i < bottom; i += tile[0]) {
          for (int32_t j = left; j < right; j += tile[1]) {
            const float* in = c.in + i * c.in_pitch + j * c.in_step;
            if (generated.ends) {
              sums(in, weights, At(c.after.to, block, i, j),
                   At(c.after.other, block, i, j),
                   At(c.after.to2, block, i, j));
              continue;
            }
            sums(in, weights, scratch, nullptr, nullptr);
            tiles_.finish(c.after, scratch, block.first_channel,
                          block.first_channel + block.channels, i, j, tile[0],
                          tile[1],
                          j + tile[1] == c.out_cells ? c.out_last
                                                     : tiles_.length);
          }
        }
      }
    }
  }
}

// How many rows and cells of the output read no more of the input than stays
// in the second cache, in whole tiles.
void Instance::SetArea(const Step& step, Bound* bound) const {
  const Convolution& c = bound->convolution;
  const int32_t* tile = step.choice.tile;
  int64_t low = 0, high = 0;
  for (const Step::Tap& tap : step.taps) {
    low = std::min(low, tap.offset);
    high = std::max(high, tap.offset);
  }
  const int64_t pitch = std::max<int64_t>(1, step.in.geometry.pitch);
  const int64_t window = (high - low) / pitch + 1;  // rows
  const int64_t channels = step.in.geometry.channels;
  const auto floats = [&](int64_t rows, int64_t cells) {
    const int64_t width =
        std::min(pitch, (cells - 1) * c.in_step + 3 * tiles_.length);
    return channels * ((rows - 1) * c.in_pitch / pitch + window) * width;
  };
  int32_t* area = bound->area;
  area[0] = tile[0];
  area[1] = (c.out_cells + tile[1] - 1) / tile[1] * tile[1];
  // Narrower, until it fits or the code would be read for too few tiles.
  while (area[1] > tile[1] && area[1] / tile[1] % 2 == 0 &&
         area[1] / tile[1] > 4 && floats(area[0], area[1]) > kArea)
    area[1] /= 2;
  while (area[0] < c.out_rows && floats(area[0] + tile[0], area[1]) <= kArea)
    area[0] += tile[0];
  while (area[0] < c.out_rows &&
         area[0] / tile[0] * (area[1] / tile[1]) < kFewestTiles)
    area[0] += tile[0];
}

// What follows is rare or cheap, and the same for both layouts: a pixel is
// `width` numbers that lie together.

void Instance::Phases(const Step& step, const Bound& bound, int32_t begin,
                      int32_t end) const {
  const Field& in = bound.in;
  const Geometry& to = step.phases[0].geometry;
  const int64_t columns = step.in.geometry.columns;
  if (!plan_.layout.positions) {
    const int64_t length = tiles_.length;
    for (int32_t c = begin; c < end; ++c) {
      for (int32_t i = 0; i < to.rows; ++i) {
        const float* read = in.data + c * in.plane +
                            (step.first_row + i * step.row_stride) * in.pitch +
                            step.first * length;
        float* write = bound.phases[0].data + c * to.plane + i * to.pitch;
        for (int32_t j = 0; j < to.columns; ++j)
          std::memcpy(write + j * length, read + j * step.stride * length,
                      length * sizeof(float));
      }
    }
    return;
  }
  for (size_t p = 0; p < bound.phases.size(); ++p) {
    const int64_t first = step.first + step.phase_numbers[p];
    const int64_t stride = step.stride;
    // Columns q with 0 <= first + q * stride < columns lie in the image.
    const int64_t from =
        std::min(to.pitch, first >= 0 ? 0 : (-first + stride - 1) / stride);
    const int64_t until = std::max(
        from, std::min<int64_t>(
                  to.pitch, first >= columns
                                ? 0
                                : (columns - first + stride - 1) / stride));
    for (int32_t c = begin; c < end; ++c) {
      for (int32_t i = 0; i < in.rows; ++i) {
        const float* read = in.data + c * in.plane + i * in.pitch + first;
        float* write = bound.phases[p].data + c * to.plane + i * to.pitch;
        std::fill(write, write + from, to.fill);
        if (stride == 2) {
          for (int64_t q = from; q < until; ++q) write[q] = read[2 * q];
        } else {
          for (int64_t q = from; q < until; ++q) write[q] = read[stride * q];
        }
        std::fill(write + until, write + to.pitch, to.fill);
      }
    }
  }
}

void Instance::Splat(const Bound& bound, int32_t begin, int32_t end) const {
  for (int32_t c = begin; c < end; ++c) {
    float* cell = bound.to.data + c * bound.to.plane;
    std::fill(cell, cell + tiles_.length, cell[0]);
  }
}

void Instance::PadPixels(const Step& step, const Bound& bound, int32_t begin,
                         int32_t end) const {
  const int64_t width = plan_.layout.positions ? 1 : tiles_.length;
  const Geometry &in = step.in.geometry, &to = step.to.geometry;
  const Padding& padding = step.of->padding;
  for (int32_t c = begin; c < end; ++c) {
    for (int32_t i = 0; i < to.rows; ++i) {
      for (int32_t j = 0; j < to.columns; ++j) {
        const int64_t row = int64_t{i} - padding.top;
        const int64_t column = int64_t{j} - padding.left;
        float* write = bound.to.data + c * to.plane + i * to.pitch + j * width;
        if (row >= 0 && row < in.rows && column >= 0 && column < in.columns)
          std::memcpy(write,
                      bound.in.data + c * in.plane + row * in.pitch +
                          column * width,
                      width * sizeof(float));
        else
          std::fill(write, write + width, step.of->a);
      }
    }
  }
  if (plan_.layout.positions && to.is_pixel()) Splat(bound, begin, end);
}

void Instance::Upsample(const Step& step, const Bound& bound, int32_t begin,
                        int32_t end) const {
  const int64_t width = plan_.layout.positions ? 1 : tiles_.length;
  const Geometry &in = step.in.geometry, &to = step.to.geometry;
  const int32_t* factors = step.of->factors;
  // Where a row or column of the output lies between two of the input.
  struct Between {
    int32_t low, high;
    float part;
    Between(int32_t i, int32_t factor, int32_t length) {
      const float at = (i + 0.5f) / factor - 0.5f;
      const float floor = std::floor(at);
      low = std::max(static_cast<int32_t>(floor), 0);
      high = std::min(static_cast<int32_t>(std::ceil(at)), length - 1);
      part = at - floor;
    }
  };
  for (int32_t c = begin; c < end; ++c) {
    const float* plane = bound.in.data + c * in.plane;
    const auto at = [&](int32_t i, int32_t j) {
      return plane + i * in.pitch + j * width;
    };
    for (int32_t i = 0; i < to.rows; ++i) {
      for (int32_t j = 0; j < to.columns; ++j) {
        float* write = bound.to.data + c * to.plane + i * to.pitch + j * width;
        if (!step.of->bilinear) {
          std::memcpy(write, at(i / factors[0], j / factors[1]),
                      width * sizeof(float));
          continue;
        }
        const Between row(i, factors[0], in.rows);
        const Between column(j, factors[1], in.columns);
        const float *a = at(row.low, column.low), *b = at(row.low, column.high),
                    *d = at(row.high, column.low),
                    *e = at(row.high, column.high);
        for (int64_t k = 0; k < width; ++k) {
          const float above = a[k] + (b[k] - a[k]) * column.part;
          const float below = d[k] + (e[k] - d[k]) * column.part;
          write[k] = above + (below - above) * row.part;
        }
      }
    }
  }
  if (plan_.layout.positions && to.is_pixel()) Splat(bound, begin, end);
}

void Instance::Softmax(const Step& step, const Bound& bound, int32_t begin,
                       int32_t end) const {
  constexpr int kMost = 64;
  const Field &in = bound.in, &to = bound.to;
  // All numbers of a pixel's cell are the same.
  const bool same = plan_.layout.positions && step.in.geometry.is_pixel();
  const int length = same ? 1 : tiles_.length;
  float largest[kMost], sums[kMost];
  for (int32_t i = begin; i < end; ++i) {
    for (int32_t j = 0; j < in.cells; ++j) {
      const int last = j + 1 == in.cells && !same ? in.last : length;
      const float* read = in.data + i * in.pitch + j * length;
      float* write = to.data + i * to.pitch + j * length;
      for (int l = 0; l < length; ++l) largest[l] = read[l], sums[l] = 0;
      for (int32_t c = 1; c < in.channels; ++c)
        for (int l = 0; l < length; ++l)
          // A NaN stays one.
          if (!(read[c * in.plane + l] <= largest[l]))
            largest[l] = read[c * in.plane + l];
      for (int32_t c = 0; c < in.channels; ++c) {
        for (int l = 0; l < length; ++l) {
          const float e = std::exp(read[c * in.plane + l] - largest[l]);
          write[c * to.plane + l] = e;
          sums[l] += e;
        }
      }
      for (int32_t c = 0; c < in.channels; ++c) {
        for (int l = 0; l < length; ++l)
          write[c * to.plane + l] =
              l < last ? write[c * to.plane + l] / sums[l] : 0;
      }
    }
  }
  if (same && begin < end) Splat(bound, 0, to.channels);
}

void Instance::Reshape(const Step& step, const Bound& bound,
                       float* scratch) const {
  const Geometry &in = step.in.geometry, &to = step.to.geometry;
  const int64_t floats = int64_t{in.rows} * in.columns * in.channels;
  const bool positions = plan_.layout.positions;
  const int32_t count = positions ? 1 : tiles_.length;
  tiles_.unpack(bound.in, scratch, floats, count, positions, in.columns,
                in.channels, 0, in.rows);
  tiles_.pack(scratch, floats, count, positions, to.columns, to.channels,
              bound.to, 0, to.rows);
}

}  // namespace rigl_serving
