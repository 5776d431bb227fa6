// Causal attention backward: what every key gets of the gradients of its clusters' means, variances and mean values.
//
// A query i pulls on what cluster c amounts to for it, the mean of n_c(i) keys and so on, and so on each of these keys, in equal
// parts but for a variance, whose derivative by a key is how far that lies from the mean. Both are known for query i alone; so the
// sums over queries go from the last one back, and a key takes what they have become when it is reached: the queries that see it.

#pragma once

#include <cstdint>

#include "clusters.hpp"

template <class T> class Shares {
    const int64_t size_, width_;
    Numbers<T> keys_, slopes_, values_;  // of each cluster: a key's gradient, how it grows with the key, and its value's; from the origin

   public:
    Shares(int64_t clusters, int64_t size) : size_(size), width_(whole<T>(size)), keys_(clusters * width_), slopes_(clusters * width_), values_(clusters * width_) {}

    void clear() {
        for (Numbers<T> *each : {&keys_, &slopes_, &values_}) each->fill(T(0));
    }

    // Of query q, for which cluster c amounts to what `k` says: gradients of the mean, q times `by_mean`; of the variance, the squares of q
    // times `by_variance`; of the mean value, the gradient of the output times `by_value`.
    void add(const Clusters<T> &k, int64_t c, const T *q, T by_mean, T by_variance, const T *gradient, T by_value) {
        const T share = 1 / k.number[c], *mean = &k.mean_rows[c * width_], *origin = k.origin_of(c);
        T *key = &keys_[c * width_], *slope = &slopes_[c * width_], *value = &values_[c * width_];
#pragma omp simd
        for (int64_t x = 0; x < size_; ++x) {
            const T bend = 2 * by_variance * share * q[x] * q[x];
            slope[x] += bend, key[x] += by_mean * share * q[x] - bend * (mean[x] - origin[x]);
            value[x] += by_value * share * gradient[x];
        }
    }

    // to a key of cluster c, and its value
    void give(const Clusters<T> &k, int64_t c, const T *key, T *to_key, T *to_value) const {
        const T *origin = k.origin_of(c), *own = &keys_[c * width_], *slope = &slopes_[c * width_], *value = &values_[c * width_];
#pragma omp simd
        for (int64_t x = 0; x < size_; ++x) to_key[x] += own[x] + (key[x] - origin[x]) * slope[x], to_value[x] += value[x];
    }
};
