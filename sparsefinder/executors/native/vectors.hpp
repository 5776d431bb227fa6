// A product of two vectors, a sum of two, and a request for one that is read soon.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// in the arithmetic of S
template <class S, class T> S dot(const T *a, const T *b, int64_t size) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < size; ++x) sum += S(a[x]) * S(b[x]);
    return sum;
}

// Whether all numbers of a vector are finite, and stay so when they are 1024 times as large.
template <class T> bool finite(const T *x, int64_t size) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; ++d) sum += x[d] * T(1024) * T(0);  // zeros, or NaN
    return sum == 0;
}

template <class T> void add(T *to, const T *from, T weight, int64_t size) {
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) to[x] += weight * from[x];
}

// Asks for a vector that is wanted soon, the one AHEAD of `n` among `ids`: they lie anywhere, and no processor guesses where.
constexpr int64_t AHEAD = 8;
template <class T> void prefetch(const T *vectors, const std::vector<int32_t> &ids, size_t n, int64_t size) {
    if (n + AHEAD < ids.size())
        for (int64_t x = 0; x < size; x += 64 / sizeof(T)) __builtin_prefetch(vectors + ids[n + AHEAD] * size + x);
}
