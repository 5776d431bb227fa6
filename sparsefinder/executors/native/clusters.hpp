// The keys of a head, cluster after cluster, laid as products want them, and what a whole cluster amounts to.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "wide.hpp"

// rows of a tensor (B, H, N, D), where the numbers of a row lie side by side
template <class T> struct Rows {
    T *numbers;
    int64_t batch, head, row;  // how far apart
    T *at(int64_t b, int64_t h) const { return numbers + b * batch + h * head; }
};

// vectors side by side, coordinate by coordinate, LANES_OF of them in a panel
template <class T> struct Laid {
    static constexpr int64_t L = LANES_OF<T>;
    int64_t size = 0;  // of a vector
    Numbers<T> numbers;
    void resize(int64_t panels, int64_t of_size) { size = of_size, numbers.resize(panels * size * L); }
    const T *panel(int64_t n) const { return numbers.data() + n * size * L; }
    int64_t apart() const { return size * L; }
    void put(int64_t n, const T *from) {
        T *to = numbers.data() + n / L * size * L + n % L;
        for (int64_t x = 0; x < size; ++x) to[x * L] = from[x];
    }
    void clear(int64_t n) {
        T *to = numbers.data() + n / L * size * L + n % L;
        for (int64_t x = 0; x < size; ++x) to[x * L] = 0;
    }
};

// Whoever has no id in [0, count) is in no cluster. What fills a panel is zero and weighs nothing. Room is kept for the next head.
template <class T> struct Clusters {
    static constexpr int64_t L = LANES_OF<T>;
    bool of_softmax;
    int64_t count, size, width, panels;      // C, D, D in whole vectors, C in panels
    int64_t keys_in_all;                     // that are no padding, whether in a cluster or not; of causal attention up to a query
    std::vector<int32_t> first, panel;       // where the keys and the panels of each begin, (C + 1)
    std::vector<int32_t> tokens;             // of the keys, cluster after cluster
    Laid<T> keys;                            // each cluster in panels of its own
    Numbers<T> missing, positions;           // of these, 0 for a key, -inf for what fills a panel; and their tokens
    // What each cluster amounts to: of all its keys, of causal attention of those up to a query.
    Laid<T> means, variances, laid_mean_values;
    Numbers<T> number;                       // of keys in each cluster
    Numbers<T> weight;                       // what a score begins with: of softmax log2 of half that number, else 0; -inf for none
    Numbers<T> mean_rows, variance_rows, mean_values;  // rows of `width`
    Numbers<T> values;                       // of the keys, cluster after cluster, rows of `width`

    // Room for all keys is taken here: by the thread that calls, from the memory that it has. A thread that takes its own keeps it.
    Clusters(int64_t count, int64_t size, int64_t in_all, bool of_softmax)
        : of_softmax(of_softmax), count(count), size(size), width(whole<T>(size)), panels((count + L - 1) / L), first(count + 1), panel(count + 1),
          number(panels * L), weight(panels * L), mean_rows(count * width), variance_rows(count * width), mean_values(count * width),
          origins_(count * width), squares_(count * width) {
        for (Laid<T> *each : {&means, &variances, &laid_mean_values}) each->resize(panels, size);
        const int64_t most = in_all / L + std::min(count, in_all);  // panels of keys
        tokens.reserve(in_all), next_.reserve(count), values.reserve(in_all * width);
        keys.numbers.reserve(most * size * L), missing.reserve(most * L), positions.reserve(most * L);
    }

    int64_t keys_of(int64_t c) const { return first[c + 1] - first[c]; }
    // the cluster of a token; -1 for none
    int64_t cluster_of(int64_t j) const { return valid_[j] && ids_[j] >= 0 && ids_[j] < count ? ids_[j] : -1; }
    // the first of all keys of a cluster
    const T *origin_of(int64_t c) const { return &origins_[c * width]; }

    void take(const T *k, int64_t k_row, const T *v, int64_t v_row, const int64_t *ids, const uint8_t *valid, int64_t in_all) {
        k_ = k, k_row_ = k_row, ids_ = ids, valid_ = valid;
        const auto inside = [&](int64_t j) { return cluster_of(j) >= 0; };
        std::fill(first.begin(), first.end(), 0);
        keys_in_all = std::count(valid, valid + in_all, 1);
        for (int64_t j = 0; j < in_all; ++j)
            if (inside(j)) ++first[ids[j] + 1];
        for (int64_t c = 0; c < count; ++c) panel[c + 1] = panel[c] + (first[c + 1] + L - 1) / L, first[c + 1] += first[c];
        tokens.resize(first[count]), next_.assign(count, 0);
        keys.resize(panel[count], size), missing.resize(panel[count] * L), positions.resize(panel[count] * L), values.resize(first[count] * width);
        missing.fill(T(0)), forget();
        for (int64_t j = 0; j < in_all; ++j) {  // in the order in which they are read fastest
            if (j + AHEAD < in_all)
                for (int64_t x = 0; x < size; x += 64 / sizeof(T))
                    __builtin_prefetch(k + (j + AHEAD) * k_row + x), __builtin_prefetch(v + (j + AHEAD) * v_row + x);
            if (inside(j)) add(ids[j], j, k + j * k_row, v + j * v_row);
        }
        for (int64_t c = 0; c < count; ++c) finish(c);
    }

    // ---- causal attention: clusters amount to what their keys up to a query do ----

    // No key was seen.
    void rewind() {
        forget();
        for (Laid<T> *each : {&means, &variances, &laid_mean_values}) each->numbers.fill(T(0));
        next_.assign(count, 0), kept_.clear();
        at_ = keys_in_all = 0, marked_ = -1;
    }

    // From here on `upto` can go back as far as here, one key after the other; else it begins anew for that.
    void mark() { marked_ = at_, kept_.clear(); }

    // What clusters amount to for query i.
    void upto(int64_t i) {
        if (i + 1 < at_ && (marked_ < 0 || i + 1 < marked_)) rewind();
        while (at_ > i + 1) leave(--at_);
        while (at_ <= i) enter(at_++);
    }

   private:
    static constexpr int64_t AHEAD = 8;  // keys that are asked for before they are read
    const T *k_ = nullptr;
    int64_t k_row_ = 0;
    const int64_t *ids_ = nullptr;
    const uint8_t *valid_ = nullptr;
    // a key of each cluster, and sums of the squares of the others' differences from it; of causal attention from their mean
    Numbers<T> origins_, squares_;
    std::vector<int32_t> next_;          // how many keys of each cluster were seen
    int64_t at_ = 0, marked_ = -1;       // tokens that were seen, and those that were at the mark, -1 without one
    std::vector<T> kept_;                // of each key since, what its cluster amounted to before: three rows

    void forget() {
        for (Numbers<T> *each : {&number, &mean_rows, &variance_rows, &mean_values, &squares_}) each->fill(T(0));
        weight.fill(-std::numeric_limits<T>::infinity());
    }

    void enter(int64_t j) {
        keys_in_all += valid_[j];
        const int64_t c = cluster_of(j);
        if (c < 0) return;
        T *mean = &mean_rows[c * width], *square = &squares_[c * width], *of_values = &mean_values[c * width];
        if (marked_ >= 0)
            for (const T *each : {mean, square, of_values}) kept_.insert(kept_.end(), each, each + width);
        const T *key = k_ + j * k_row_, *value = &values[(first[c] + next_[c]++) * width], one = T(1) / next_[c];
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            const T apart = key[x] - mean[x];
            mean[x] += apart * one, square[x] += apart * (key[x] - mean[x]), of_values[x] += (value[x] - of_values[x]) * one;
        }
        amount(c);
    }

    void leave(int64_t j) {
        keys_in_all -= valid_[j];
        const int64_t c = cluster_of(j);
        if (c < 0) return;
        const T *from = kept_.data() + kept_.size() - 3 * width;
        for (Numbers<T> *each : {&mean_rows, &squares_, &mean_values}) std::copy_n(from, width, &(*each)[c * width]), from += width;
        kept_.resize(kept_.size() - 3 * width), --next_[c];
        amount(c);
    }

    // of a cluster whose sums are known
    void amount(int64_t c) {
        const T n = next_[c], one = T(1) / std::max(n, T(1));
        number[c] = n, weight[c] = !n ? -std::numeric_limits<T>::infinity() : of_softmax ? std::log2(n) - 1 : T(0);
        for (int64_t x = 0; x < size; ++x) variance_rows[c * width + x] = squares_[c * width + x] * one;
        means.put(c, &mean_rows[c * width]), variances.put(c, &variance_rows[c * width]), laid_mean_values.put(c, &mean_values[c * width]);
    }

    void add(int64_t c, int64_t j, const T *key, const T *value) {
        const int64_t m = next_[c]++, lane = panel[c] * L + m;
        T *origin = &origins_[c * width], *sum = &mean_rows[c * width], *square = &squares_[c * width];
        T *row = &values[(first[c] + m) * width], *of_values = &mean_values[c * width];
        tokens[first[c] + m] = j, positions[lane] = T(j);
        keys.put(lane, key);
        if (!m) std::copy(key, key + size, origin);
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            const T apart = key[x] - origin[x];
            sum[x] += apart, square[x] += apart * apart;
            row[x] = value[x], of_values[x] += value[x];
        }
    }

    void finish(int64_t c) {
        const int64_t n = keys_of(c);
        for (int64_t lane = panel[c] * L + n; lane < panel[c + 1] * L; ++lane)
            keys.clear(lane), missing[lane] = -std::numeric_limits<T>::infinity();
        if (n) number[c] = n, weight[c] = of_softmax ? std::log2(T(n)) - 1 : T(0);
        T *origin = &origins_[c * width], *sum = &mean_rows[c * width], *square = &squares_[c * width], *of_values = &mean_values[c * width];
        T *variance = &variance_rows[c * width];
        const T one = T(1) / std::max<int64_t>(n, 1);
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            const T mean = sum[x] * one;
            of_values[x] *= one;
            variance[x] = std::max(square[x] * one - mean * mean, T(0));
            sum[x] = n ? origin[x] + mean : T(0);
        }
        means.put(c, sum), variances.put(c, variance), laid_mean_values.put(c, of_values);
    }
};
