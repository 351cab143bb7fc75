// The part of kernels_body.h, which includes it, that goes along single rows of numbers.

double square(const float* row, int64_t C) {
  double sum[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) sum[i] += double{row[c + i]} * row[c + i];
  }
  for (; c < C; ++c) sum[0] += double{row[c]} * row[c];
  double all = 0;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  return all;
}

void scale(float* row, int64_t C, double factor) {
  for (int64_t c = 0; c < C; ++c) row[c] = static_cast<float>(row[c] * factor);
}

float largest(const float* x, const float* penalty, int64_t count) {
  Floats most = broadcast(kNever);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Floats sum = load(x + j) + load(penalty + j);
    most = sum > most ? sum : most;
  }
  float all = largest(most);
  for (; j < count; ++j) all = std::max(all, x[j] + penalty[j]);
  return all;
}

float largest_of_pairs(const float* x, const float* key, int64_t count, float low, float high,
                       float* of_column) {
  const Floats never = broadcast(kNever);
  Floats most = never;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Floats value = load(x + j), rank = load(key + j), old = load(of_column + j);
    const Floats for_row = rank >= low ? value : never;
    const Floats for_column = rank <= high ? value : never;
    most = for_row > most ? for_row : most;
    store(of_column + j, for_column > old ? for_column : old);
  }
  float all = largest(most);
  for (; j < count; ++j) {
    if (key[j] >= low) all = std::max(all, x[j]);
    if (key[j] <= high) of_column[j] = std::max(of_column[j], x[j]);
  }
  return all;
}

void add_by_distance(const float* decay, uint32_t last, int32_t query, const int32_t* key,
                     int64_t count, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    // Unsigned: the distance of two int32 may pass 2^31.
    const auto high = static_cast<uint32_t>(std::max(query, key[j]));
    const auto low = static_cast<uint32_t>(std::min(query, key[j]));
    to[j] += decay[std::min(high - low, last)];
  }
}

void add_log(const float* rho, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    store(to + j, load(to + j) + log_of(2.f - load(rho + j)));
  for (; j < count; ++j) to[j] += log_of(broadcast(2.f - rho[j]))[0];
}

void dot_rows(const float* x, const float* row, int64_t stride, int64_t rows, int64_t D,
              float* out) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) dots<1, 8>(x, D, row + i * stride, stride, out + i, 0);
  for (; i < rows; ++i) dots<1, 1>(x, D, row + i * stride, stride, out + i, 0);
}
