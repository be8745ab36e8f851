// Weights in the order in which the kernels read them, and how to choose it.

#include <algorithm>
#include <climits>
#include <optional>

#include "plan.h"

namespace rigl_serving {
namespace {

// Of a tile's inputs, within the first cache beside what else is there.
constexpr int64_t kTileBytes = 24 * 1024;
// Above this part of its weights a kernel is computed densely, where nothing
// was measured: its loads are shared by several channels.
constexpr double kDense = 0.6;
// What a weight costs beside its products, in products; the weights of a
// channel within a block; and each sum that is kept from block to block.
constexpr double kPerEntry = 2.5, kPerRow = 8, kPerSum = 2;
// Rows and cells of the tiles that code is generated for. They must fit.
constexpr int32_t kGeneratedTiles[][2] = {{1, 1}, {1, 2}, {2, 1}, {1, 3},
                                          {3, 1}, {2, 2}, {1, 4}, {4, 1}};
// Weights of an output channel above which code is better, where nothing was
// measured.
constexpr int64_t kWorthCode = 12;
// And tiles of an image above which it is.
constexpr int64_t kWorthRuns = 32, kWorthRunsOfImages = 12;
// Tiles that are worth measuring.
constexpr size_t kMostTiles = 6;

// A kernel as [taps, channels of a group, filters].
struct Kernel {
  int64_t taps = 1, inputs = 1, filters = 1;
  int64_t groups = 1;

  explicit Kernel(const Node& node) {
    const std::vector<int64_t>& shape = node.kernel.shape;
    filters = shape.back();
    inputs = shape[shape.size() - 2];
    for (size_t i = 0; i + 2 < shape.size(); ++i) taps *= shape[i];
    groups = node.groups;
  }
};

// Calls use(tap, input channel, filter, weight) for each weight that is not
// zero. Input channels are those of the whole input.
template <typename Use>
void ForEachWeight(const Node& node, const Use& use) {
  const Kernel kernel(node);
  const Array& array = node.kernel;
  const int64_t filters = kernel.filters / kernel.groups;
  for (size_t i = 0; i < array.values.size(); ++i) {
    const float weight = array.values[i];
    if (weight == 0) continue;
    const int64_t place = array.sparse ? array.places[i] : i;
    const int64_t filter = place % kernel.filters;
    const int64_t input = place / kernel.filters % kernel.inputs;
    const int64_t tap = place / (kernel.filters * kernel.inputs);
    use(tap, filter / filters * kernel.inputs + input, filter, weight);
  }
}

int64_t CeilDivide(int64_t length, int64_t each) {
  return (length + each - 1) / each;
}

// The products and what else it takes to compute an image: `weights` of them,
// for `filters` channels of the output from `channels` of the input.
double Cost(const Choice& choice, const Geometry& out, int64_t weights,
            int64_t channels, int64_t filters) {
  const int32_t* tile = choice.tile;
  const double tiles = double{1} * CeilDivide(out.rows, tile[0]) *
                       CeilDivide(out.cells, tile[1]);
  const int64_t blocks = CeilDivide(channels, std::max(1, choice.block));
  const double kept = blocks > 1 ? kPerSum * tile[0] * tile[1] : 0;
  return double(weights) * (double(out.rows) * out.cells + kPerEntry * tiles) +
         double(filters) * blocks * tiles * (kPerRow + kept);
}

// How many channels of the input a tile reads at a time.
int32_t BlockFor(const Step& step, const int32_t* tile, int64_t channels,
                 const Layout& layout) {
  int64_t rows = 0, cells = 0;
  if (!step.taps.empty()) {
    const int64_t pitch = step.in.geometry.pitch;
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const Step::Tap& tap : step.taps) {
      low = std::min(low, tap.offset);
      high = std::max(high, tap.offset);
    }
    rows = pitch ? (high - low) / pitch : 0;
    cells = std::min<int64_t>(2, step.taps.size() - 1);
  }
  const int64_t stride_rows =
      step.in.geometry.pitch ? step.in_pitch / step.in.geometry.pitch : 1;
  const int64_t stride_cells = std::max<int64_t>(
      1, step.in_step / layout.length());
  const int64_t bytes = ((tile[0] - 1) * stride_rows + rows + 1) *
                        ((tile[1] - 1) * stride_cells + cells + 1) *
                        layout.length() * 4;
  const int64_t block = std::max<int64_t>(8, kTileBytes / bytes / 8 * 8);
  // What is left is not to be a sliver.
  const int64_t blocks = std::max<int64_t>(1, CeilDivide(channels, block));
  return static_cast<int32_t>(CeilDivide(channels, blocks));
}

// Whether each channel is convolved by itself, with a window of 3 rows and
// columns that all read the image, and whose rows are neighbours.
bool IsDepthwise(const Step& step, const Kernel& kernel) {
  if (kernel.inputs != 1 || kernel.filters != kernel.groups ||
      kernel.taps != 9 || step.taps.size() != 9)
    return false;
  for (int32_t i = 0; i < 9; ++i) {
    const Step::Tap &tap = step.taps[i], &above = step.taps[i % 3];
    if (tap.place != i || tap.phase != above.phase ||
        tap.offset != above.offset + i / 3 * step.in.geometry.pitch)
      return false;
  }
  return true;
}

}  // namespace

std::vector<Choice> ChoicesFor(const Step& step, const Geometry& out,
                               const Layout& layout) {
  const Tiles& tiles = *layout.tiles;
  const Kernel kernel(*step.of);
  const int64_t channels = kernel.inputs * kernel.groups;
  const int64_t filters = kernel.filters;
  int64_t weights = 0;
  ForEachWeight(*step.of,
                [&](int64_t, int64_t, int64_t, float) { ++weights; });
  const bool one_group = kernel.groups == 1;
  const double density = double{1} * weights /
                         (kernel.taps * channels * filters);
  const bool dense_first = one_group && density > kDense;

  const auto add = [&](Product product, int32_t rows, int32_t cells,
                       std::vector<Choice>* choices) {
    // What is beyond the image would not be computed.
    if (rows > out.rows || cells > out.cells) return;
    Choice choice;
    choice.product = product;
    choice.tile[0] = rows;
    choice.tile[1] = cells;
    if (product != Product::kGenerated)
      choice.block = BlockFor(step, choice.tile, channels, layout);
    choices->push_back(choice);
  };
  const auto looped = [&](Product product) {
    std::vector<Choice> choices;
    const int32_t most =
        product == Product::kDense ? tiles.dense_cells : tiles.registers;
    const bool dense = product == Product::kDense;
    for (int32_t cells : {1, 2, 3, 4, 6, 8, 12, 16}) {
      int64_t parts = INT64_MAX;
      for (int32_t rows = 1; rows <= std::min(tiles.most_rows, most); ++rows) {
        if (cells > tiles.most_cells || rows * cells > most) break;
        // As few tiles as lower ones make keep fewer sums.
        if (CeilDivide(out.rows, rows) == parts) continue;
        if (!dense && !tiles.is_compiled(rows, cells)) continue;
        parts = CeilDivide(out.rows, rows);
        add(product, rows, cells, &choices);
      }
    }
    const auto cost = [&](const Choice& choice) {
      return Cost(choice, out, dense ? kernel.taps * channels * filters
                                     : weights,
                  channels, filters);
    };
    std::stable_sort(choices.begin(), choices.end(),
                     [&](const Choice& a, const Choice& b) {
                       return cost(a) < cost(b);
                     });
    if (choices.size() > kMostTiles) choices.resize(kMostTiles);
    // The best ones with other blocks, too.
    for (size_t i = 0, all = std::min<size_t>(2, choices.size()); i < all;
         ++i) {
      const int64_t block = choices[i].block;
      for (int64_t of : {2 * block, block / 2}) {
        if (block >= channels || of < 4) continue;
        Choice other = choices[i];
        other.block = static_cast<int32_t>(std::min(of, channels));
        choices.push_back(other);
      }
    }
    return choices;
  };

  std::vector<Choice> choices;
  if (step.every_other) {
    add(Product::kDepthwise, 1, 1, &choices);
    return choices;
  }
  if (CanGenerate(tiles)) {
    for (const auto& tile : kGeneratedTiles)
      if (out.rows % tile[0] == 0 && out.cells % tile[1] == 0)
        add(Product::kGenerated, tile[0], tile[1], &choices);
    // Vectors of half a register need two for each weight.
    const int32_t best = layout.length() == 16 ? 1 : 2;
    std::stable_sort(choices.begin(), choices.end(),
                     [&](const Choice& a, const Choice& b) {
                       const auto far = [&](const Choice& c) {
                         return std::abs(c.tile[0] * c.tile[1] - best);
                       };
                       return far(a) < far(b);
                     });
  }
  // It is read from memory each time that it runs.
  const bool generated_first =
      !choices.empty() && weights >= kWorthCode * filters &&
      int64_t{out.rows} * out.cells >=
          (layout.positions ? kWorthRuns : kWorthRunsOfImages) *
              choices[0].tile[0] * choices[0].tile[1];
  std::vector<Choice> loops =
      looped(dense_first ? Product::kDense : Product::kSparse);
  if (one_group) {
    const std::vector<Choice> others =
        looped(dense_first ? Product::kSparse : Product::kDense);
    loops.insert(loops.end(), others.begin(), others.end());
  }
  if (IsDepthwise(step, kernel)) {
    std::vector<Choice> whole;
    add(Product::kDepthwise, 1, 1, &whole);
    loops.insert(loops.begin(), whole.begin(), whole.end());
    loops.insert(loops.end(), choices.begin(), choices.end());
    return loops;
  }
  if (generated_first) {
    choices.insert(choices.end(), loops.begin(), loops.end());
    return choices;
  }
  loops.insert(loops.end(), choices.begin(), choices.end());
  return loops;
}

namespace {

// What code does after the sums of a block, where it can: only the last cell
// of a row may be ragged, and then it cannot.
std::optional<Ending> EndingOf(const Step& step, const Choice& choice,
                               const Layout& layout, int64_t first,
                               int64_t channels) {
  const auto plain = [](int32_t act) {
    return act < 0 || act == static_cast<int32_t>(Activation::kRelu);
  };
  const Geometry& out = (step.to ? step.to : step.to2).geometry;
  if (step.scale || step.shift || !plain(step.act) || !plain(step.act2) ||
      step.combine != '+' || out.last != layout.length() ||
      (step.other && step.other.geometry.is_pixel() != out.is_pixel()))
    return std::nullopt;
  const auto cells_of = [&](const Operand& operand) {
    std::vector<int64_t> cells;
    for (int32_t i = 0; i < choice.tile[0]; ++i)
      for (int32_t j = 0; j < choice.tile[1]; ++j)
        cells.push_back(i * operand.geometry.pitch + j * layout.length());
    return cells;
  };
  Ending ending;
  ending.adds = bool(step.other);
  ending.relu = step.act >= 0;
  ending.stores = bool(step.to);
  ending.second = bool(step.to2);
  ending.relu2 = step.act2 >= 0;
  // Whole lines only.
  ending.past = layout.length() == 16 && !ending.adds &&
                out.plane * out.channels > kCachedFloats;
  ending.other_plane = step.other.geometry.plane;
  ending.plane = step.to.geometry.plane;
  ending.plane2 = step.to2.geometry.plane;
  ending.other_cells = cells_of(step.other);
  ending.cells = cells_of(step.to);
  ending.cells2 = cells_of(step.to2);
  for (int64_t c = first; c < first + channels; ++c) {
    ending.scale.push_back(step.scale2 ? step.scale2[c] : 1.0f);
    ending.shift.push_back(step.shift2 ? step.shift2[c] : 0.0f);
  }
  return ending;
}

}  // namespace

void Choose(Step* step, const Choice& choice, const Layout& layout) {
  const Node& node = *step->of;
  const Kernel kernel(node);
  const int64_t channels = kernel.inputs * kernel.groups;
  const int64_t filters = kernel.filters;
  const int64_t plane = step->in.geometry.plane;
  const int64_t block =
      choice.block > 0 ? std::min<int64_t>(choice.block, channels) : channels;
  const int64_t blocks = CeilDivide(channels, block);
  auto weights = std::make_shared<Weights>();
  weights->blocks = static_cast<int32_t>(blocks);

  // Positions of the window that read anything, by their place in it.
  std::vector<const Step::Tap*> taps(kernel.taps, nullptr);
  int64_t live = 0;
  for (const Step::Tap& tap : step->taps) taps[tap.place] = &tap;
  for (const Step::Tap* tap : taps) live += tap != nullptr;
  const auto offset = [&](const Step::Tap& tap, int64_t channel) {
    const int64_t at =
        (tap.phase * channels + channel) * plane + tap.offset;
    if (at > INT32_MAX || at < INT32_MIN)
      throw Error("node '" + node.name + "' reads too far");
    return static_cast<int32_t>(at);
  };

  if (choice.product == Product::kGenerated) {
    const int32_t cells = choice.tile[0] * choice.tile[1];
    const int64_t most = MostChannels(cells);
    const int64_t parts = CeilDivide(filters, most);
    const int64_t each = CeilDivide(filters, parts);
    std::vector<GeneratedBlock> made(CeilDivide(filters, each));
    for (size_t b = 0; b < made.size(); ++b) {
      made[b].channels =
          static_cast<int32_t>(std::min(each, filters - int64_t(b) * each));
      for (int32_t c = 0; c < made[b].channels; ++c)
        made[b].bias.push_back(step->bias ? step->bias[b * each + c] : 0.0f);
    }
    // By channels: positions of the window read lines that are neighbours, or
    // the same.
    struct Weight {
      int32_t filter;
      float value;
    };
    std::vector<int64_t> begins(channels * kernel.taps + 1, 0);
    ForEachWeight(node, [&](int64_t tap, int64_t channel, int64_t, float) {
      ++begins[channel * kernel.taps + tap + 1];
    });
    for (size_t i = 1; i < begins.size(); ++i) begins[i] += begins[i - 1];
    std::vector<Weight> all(begins.back());
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    ForEachWeight(node, [&](int64_t tap, int64_t channel, int64_t filter,
                            float weight) {
      all[next[channel * kernel.taps + tap]++] = {
          static_cast<int32_t>(filter), weight};
    });
    for (int64_t place = 0; place < channels * kernel.taps; ++place) {
      const Step::Tap* tap = taps[place % kernel.taps];
      if (!tap || begins[place] == begins[place + 1]) continue;
      const int32_t at = offset(*tap, place / kernel.taps);
      for (int64_t i = begins[place]; i < begins[place + 1]; ++i) {
        GeneratedBlock& to = made[all[i].filter / each];
        if (to.reads.empty() || to.reads.back().offset != at)
          to.reads.push_back(
              {at, static_cast<int32_t>(to.products.size()), 0});
        ++to.reads.back().count;
        to.products.push_back(
            {static_cast<int32_t>(all[i].filter % each), all[i].value});
      }
    }
    std::vector<int64_t> places;
    for (int32_t i = 0; i < choice.tile[0]; ++i)
      for (int32_t j = 0; j < choice.tile[1]; ++j)
        places.push_back(i * step->in_pitch + j * step->in_step);
    std::vector<uint8_t> code;
    Generated& generated = weights->generated;
    for (size_t b = 0; b < made.size(); ++b) {
      code.resize((code.size() + 63) / 64 * 64, 0xcc);
      generated.blocks.push_back(
          {static_cast<int32_t>(b * each), made[b].channels,
           static_cast<int64_t>(code.size()),
           static_cast<int64_t>(generated.weights.size())});
      const std::optional<Ending> ending = EndingOf(
          *step, choice, layout, b * each, made[b].channels);
      generated.ends = ending.has_value();
      Generate(made[b], places, layout.length(), ending ? &*ending : nullptr,
               &code, &generated.weights);
    }
    generated.code = Code::Of(code);
    if (!generated.code)
      throw Error("the system allows no more pages of generated code. Set "
                  "RIGL_KERAS_GENERATED=off");
  } else if (choice.product == Product::kDepthwise) {
    for (int32_t i = 0; i < 3; ++i)
      weights->offsets.push_back(offset(step->taps[i], 0));
    weights->dense.assign(filters * 9, 0.0f);
    ForEachWeight(node, [&](int64_t tap, int64_t, int64_t filter,
                            float weight) {
      weights->dense[filter * 9 + tap] = weight;
    });
  } else if (choice.product == Product::kDense) {
    const int64_t panel = layout.tiles->panel;
    const int64_t inputs = live * channels;
    const int64_t panels = CeilDivide(filters, panel);
    std::vector<int64_t> number(kernel.taps * channels, -1);
    for (int64_t b = 0; b < blocks; ++b) {
      weights->dense_blocks.push_back(weights->offsets.size());
      for (int64_t t = 0; t < kernel.taps; ++t) {
        if (!taps[t]) continue;
        for (int64_t c = b * block; c < std::min((b + 1) * block, channels);
             ++c) {
          number[t * channels + c] = weights->offsets.size();
          weights->offsets.push_back(offset(*taps[t], c));
        }
      }
    }
    weights->dense_blocks.push_back(weights->offsets.size());
    weights->dense.assign(panels * inputs * panel, 0.0f);
    ForEachWeight(node, [&](int64_t tap, int64_t channel, int64_t filter,
                            float weight) {
      const int64_t at = number[tap * channels + channel];
      if (at >= 0)
        weights->dense[(filter / panel * inputs + at) * panel +
                       filter % panel] = weight;
    });
  } else {
    // How many entries each row has, then where it begins.
    std::vector<int32_t>& rows = weights->rows;
    rows.assign(blocks * filters + 1, 0);
    ForEachWeight(node, [&](int64_t tap, int64_t channel, int64_t filter,
                            float) {
      if (taps[tap]) ++rows[channel / block * filters + filter + 1];
    });
    for (size_t i = 1; i < rows.size(); ++i) rows[i] += rows[i - 1];
    weights->entries.resize(rows.back());
    std::vector<int32_t> next(rows.begin(), rows.end() - 1);
    ForEachWeight(node, [&](int64_t tap, int64_t channel, int64_t filter,
                            float weight) {
      if (!taps[tap]) return;
      weights->entries[next[channel / block * filters + filter]++] = {
          offset(*taps[tap], channel), weight};
    });
  }
  step->choice = choice;
  if (choice.product != Product::kGenerated)
    step->choice.block = static_cast<int32_t>(block);
  step->weights = std::move(weights);
}

}  // namespace rigl_serving
