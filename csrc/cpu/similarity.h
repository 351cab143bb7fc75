// Similarities of many unit rows with many, a tile at a time: nothing N x N is stored, and what a
// tile is used for happens while it is near the core.
#pragma once

#include <atomic>
#include <vector>

#include "rows.h"

namespace restore_ext::cpu {

// Rows first, first + step, ... of a matrix of unit rows.
struct Slice {
  const UnitRows& rows;
  int64_t first, step, count;

  int64_t row(int64_t i) const { return first + i * step; }
};

// A slice as the columns of a product: in panels as wide as a register tile.
class Columns {
 public:
  explicit Columns(const Slice& slice)
      : slice_(slice),
        panel_(kernels().panel),
        memory_(new float[round_up(slice.count, panel_) * slice.rows.C]) {
    each(ceil_div(slice.count, panel_), panel_ * slice.rows.C, [&](int64_t n) {
      const int64_t C = slice.rows.C, first = n * panel_;
      kernels().pack_panel(slice.rows[slice.row(first)], slice.step * C,
                           std::min<int64_t>(panel_, slice.count - first), C,
                           memory_.get() + first * C);
    });
  }
  const Slice& slice() const { return slice_; }
  const float* panel(int64_t first) const { return memory_.get() + first * slice_.rows.C; }

 private:
  Slice slice_;
  int64_t panel_;
  std::unique_ptr<float[]> memory_;
};

// Part of a product: value(i, j) is row i of the one slice times column j of the other.
struct Tile {
  Range rows, columns;
  const float* values;
  int64_t stride;

  const float* row(int64_t i) const { return values + (i - rows.first) * stride - columns.first; }
};

// Calls visit(tile) for the tiles of a x b, those of one row in ascending order on one thread.
// With `upper`, a and b are one slice, and tiles below the diagonal are left out.
template <typename Visit>
void similarities(const Slice& a, const Columns& b, bool upper, const Visit& visit) {
  constexpr int64_t kBlock = 48, kWide = 256, kDeep = 256;  // a tile, and how much of C at a time
  const int64_t C = a.rows.C, columns = b.slice().count, panel = kernels().panel;
  each(ceil_div(a.count, kBlock), kBlock * columns * C, [&](int64_t block) {
    const Range rows{block * kBlock, std::min((block + 1) * kBlock, a.count)};
    const int64_t whole = (rows.past - rows.first) / kRows * kRows;
    alignas(64) float values[kBlock * kWide];
    std::vector<float> rest(kRows * C);  // the last rows, where they are fewer than a tile's
    for (int64_t i = rows.first + whole; i < rows.past; ++i) {
      std::copy_n(a.rows[a.row(i)], C, &rest[(i - rows.first - whole) * C]);
    }
    for (int64_t first = upper ? rows.first / panel * panel : 0; first < columns; first += kWide) {
      const Range wide{first, std::min(first + kWide, columns)};
      for (int64_t c = 0; c < C; c += kDeep) {
        const int64_t deep = std::min(kDeep, C - c);
        for (int64_t j = wide.first; j < wide.past; j += panel) {
          const float* column = b.panel(j) + c * panel;
          for (int64_t i = 0; i < rows.past - rows.first; i += kRows) {
            const bool stored = i < whole;
            const float* row = stored ? a.rows[a.row(rows.first + i)] : rest.data();
            kernels().multiply(row + c, stored ? a.step * C : C, column, deep,
                               values + i * kWide + (j - first), kWide, c > 0);
          }
        }
      }
      visit(Tile{rows, wide, values, kWide});
    }
  });
}

inline void raise(float& most, float candidate) {  // any order gives the same maximum
  std::atomic_ref<float> shared(most);
  float seen = shared.load(std::memory_order_relaxed);
  while (candidate > seen && !shared.compare_exchange_weak(seen, candidate)) continue;
}

// The column that is most similar to each row of `a`, the first of equals. A row that cannot be
// compared, or has nothing to be compared with, is given column 0 and a similarity of -inf.
struct Nearest {
  std::vector<float> similarity;
  std::vector<int64_t> column;

  Nearest(const Slice& a, const Slice& b) : similarity(a.count, kNever), column(a.count, 0) {
    std::vector<float> penalty(b.count);
    for (int64_t j = 0; j < b.count; ++j) penalty[j] = b.rows.comparable[b.row(j)] ? 0.f : kNever;
    similarities(a, Columns(b), /*upper=*/false, [&](const Tile& tile) {
      const int64_t first = tile.columns.first, count = tile.columns.past - first;
      for (int64_t i = tile.rows.first; i < tile.rows.past; ++i) {
        if (!a.rows.comparable[a.row(i)]) continue;
        const float *x = tile.row(i) + first, *less = &penalty[first];
        const float most = kernels().largest(x, less, count);
        if (!(most > similarity[i])) continue;
        similarity[i] = most;
        column[i] = first;
        while (x[column[i] - first] + less[column[i] - first] != most) ++column[i];
      }
    });
  }
};

// For every row, the largest similarity to another row of a higher key, or with `all` of any; -inf
// where there is none. Each pair is multiplied once.
inline std::vector<float> nearest(const UnitRows& rows, std::vector<float> key, bool all) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.comparable[i]) key[i] = kNaN;
  }
  std::vector<float> most(rows.n, kNever);
  const Slice whole{rows, 0, 1, rows.n};
  similarities(whole, Columns(whole), /*upper=*/true, [&](const Tile& tile) {
    const int64_t first = tile.columns.first, past = tile.columns.past;
    std::vector<float> of_column(past - first, kNever);
    for (int64_t i = tile.rows.first; i < tile.rows.past; ++i) {
      const int64_t j = std::max(i + 1, first);
      if (!rows.comparable[i] || j >= past) continue;
      const float low = all ? kNever : std::nextafter(key[i], -kNever);
      const float high = all ? -kNever : std::nextafter(key[i], kNever);
      raise(most[i], kernels().largest_of_pairs(tile.row(i) + j, &key[j], past - j, low, high,
                                                &of_column[j - first]));
    }
    for (int64_t j = first; j < past; ++j) raise(most[j], of_column[j - first]);
  });
  return most;
}

}  // namespace restore_ext::cpu
