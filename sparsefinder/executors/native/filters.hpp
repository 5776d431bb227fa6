// Filters: which keys of a panel can matter to a query, without computing every product exactly.
//
// For a few queries and a panel of keys a filter finds numbers u with q·k <= u for certain, and keeps the keys whose u reaches a
// bound. Their exact products are the caller's matter. A filter that lets too much pass costs time, never a result.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "panels.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SPARSEFINDER_X86 1
#endif

constexpr int64_t ROWS = 8;     // queries that a filter looks at together
constexpr int64_t CHUNK = 480;  // keys that a filter looks at before its bounds are raised: whole panels, and small enough for a cache

// what passed of a chunk for one query: bounds, and positions in the order of the filter's keys
template <class T> struct Passed {
    int64_t count = 0;
    T upper[CHUNK + 16];
    int32_t position[CHUNK + 16];
};

// Products in the arithmetic of the vectors themselves: u is the product and a bound of its rounding.
template <class T> class PlainFilter {
   public:
    static constexpr int64_t KEYS = PANEL;
    static bool works() { return true; }

    // keys `ids` of k (…, size), in that order
    PlainFilter(const T *k, const std::vector<int32_t> &ids, int64_t size)
        : size_(size), keys_(k, ids.size(), size, [&](int64_t c) { return ids[c]; }) {
        for (const int32_t j : ids) longest_ = std::max(longest_, length_of(k + j * size));
    }

    struct Queries {
        std::vector<T> x;
        T slack[ROWS];
    };

    // `count` queries, 1 to ROWS
    void take(const T *const *q, int64_t count, Queries &to) const {
        to.x.resize(ROWS * size_);
        for (int64_t r = 0; r < count; ++r) {
            std::copy(q[r], q[r] + size_, to.x.begin() + r * size_);
            to.slack[r] = T(2 * (size_ + 1) * double(std::numeric_limits<T>::epsilon()) * longest_ * length_of(q[r]));
        }
    }

    // Adds to `passed` of each query the keys of a panel that may reach its `least`.
    void pass(const Queries &q, int64_t count, int64_t panel, const T *least, Passed<T> *passed) const {
        T sums[ROWS * PANEL] = {};
        keys_.one(q.x.data(), count, panel, sums, PANEL);
        for (int64_t r = 0; r < count; ++r) {
            const T *row = sums + r * PANEL, slack = q.slack[r], bound = least[r];
            if (!(largest(row, PANEL) + slack >= bound)) continue;
            Passed<T> &to = passed[r];
            for (int64_t n = 0; n < PANEL; ++n) {  // written always, kept sometimes: no branch to guess
                to.upper[to.count] = row[n] + slack, to.position[to.count] = panel * PANEL + n;
                to.count += row[n] + slack >= bound;
            }
        }
    }

   private:
    double length_of(const T *x) const {
        double sum = 0;
        for (int64_t d = 0; d < size_; ++d) sum += double(x[d]) * double(x[d]);
        return std::sqrt(sum);
    }

    int64_t size_;
    Panels<T> keys_;
    double longest_ = 0;
};

// A vector x = t x̂ + f of whole numbers x̂, its scale t, and their lengths a little too large.
struct Rounded {
    float scale, length, whole, error;  // t, |x|/t, |x̂|, |f|/t
    int32_t sum;                        // Σ x̂
};

// Products of vectors rounded to whole numbers. With q = s q̂ + e and k = t k̂ + f,
//
//     q·k = s t q̂·k̂ + e·k + s q̂·f  <=  s t (q̂·k̂ + |e|/s · |k|/t + |q̂| · |f|/t),
//
// and with the largest |k|/t and |f|/t of all keys the two last terms are one whole number a query, which the sum begins with.
// The instructions multiply signed by unsigned: keys are k̂ + Filter::OFFSET, and the sum begins with -OFFSET Σ q̂ as well. A Filter
// says how vectors are rounded, to numbers below OFFSET of keys and of 7 bits and a sign of queries, and multiplies them.
template <class Filter> class RoundedFilter {
   public:
    struct Queries {
        std::vector<int8_t> x;  // coordinates of a row follow each other, rows are `4 groups` apart
        int32_t start[ROWS];
        float scale[ROWS];
    };

    void take(const float *const *q, int64_t count, Queries &to) const {
        to.x.assign(ROWS * groups_ * 4 + 16, 0);
        for (int64_t r = 0; r < count; ++r) {  // in order: what a row writes too far, the next one overwrites
            const Rounded rounded = Filter::round(q[r], size_, 127, to.x.data() + r * groups_ * 4);
            // the last term is for the roundings of u itself in float32: three, of sums up to 127 · 127 D
            const float bound = rounded.error * longest_ + rounded.whole * error_ + 2 + size_ * (127.f * 127.f / (1 << 21));
            to.start[r] = int32_t(std::ceil(bound)) - Filter::OFFSET * rounded.sum;
            to.scale[r] = rounded.scale;
        }
        for (int64_t r = count; r < ROWS; ++r) to.start[r] = 0, to.scale[r] = 1;
    }

   protected:
    RoundedFilter(const float *k, const std::vector<int32_t> &ids, int64_t size) : size_(size), groups_((size + 3) / 4) {
        constexpr int64_t KEYS = Filter::KEYS;
        const int64_t count = ids.size(), panels = (count + KEYS - 1) / KEYS;
        laid_.assign(panels * groups_ * KEYS * 4, Filter::OFFSET);
        scales_.assign(panels * KEYS, 0.f);
        std::vector<int8_t> whole(groups_ * 4 + 16);
        for (int64_t c = 0; c < count; ++c) {
            const Rounded rounded = Filter::round(k + ids[c] * size, size, Filter::OFFSET - 1, whole.data());
            uint8_t *to = laid_.data() + (c / KEYS) * groups_ * KEYS * 4 + (c % KEYS) * 4;
            for (int64_t x = 0; x < size; ++x) to[x / 4 * KEYS * 4 + x % 4] = uint8_t(whole[x] + Filter::OFFSET);
            scales_[c] = rounded.scale;
            longest_ = std::max(longest_, rounded.length), error_ = std::max(error_, rounded.error);
        }
    }

    int64_t size_, groups_;
    std::vector<uint8_t> laid_;      // panel, four coordinates, key, coordinate
    std::vector<float> scales_;      // t of each key; 0 beyond the last
    float longest_ = 0, error_ = 0;  // the largest |k|/t and |f|/t

    static constexpr float MORE = 1.0001f;  // than sums of squares in float32 can be too small by, for D up to hundreds
    static constexpr float LEAST = std::numeric_limits<float>::min();  // of scales: the vector of zeros has one too
};

#ifdef SPARSEFINDER_X86
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// Vectors rounded to 8 bits, four products to an instruction and lane (AVX-512 VNNI).
class Int8Filter : public RoundedFilter<Int8Filter> {
   public:
    static constexpr int64_t VECTORS = 3, KEYS = 16 * VECTORS;
    static constexpr int OFFSET = 128;
    static bool works() {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    }
    Int8Filter(const float *k, const std::vector<int32_t> &ids, int64_t size) : RoundedFilter(k, ids, size) {}

    VNNI void pass(const Queries &q, int64_t count, int64_t panel, const float *least, Passed<float> *passed) const {
        __m512i sums[ROWS][VECTORS];
        for (int64_t r = 0; r < ROWS; ++r)
            for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_set1_epi32(q.start[r]);
        const uint8_t *keys = laid_.data() + panel * groups_ * KEYS * 4;
        const int8_t *x = q.x.data();
        for (int64_t g = 0; g < groups_; ++g, keys += KEYS * 4) {
            __m512i key[VECTORS];
            for (int64_t v = 0; v < VECTORS; ++v) key[v] = _mm512_loadu_si512(keys + v * 64);
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; ++r) {
                int32_t four;
                __builtin_memcpy(&four, x + (r * groups_ + g) * 4, 4);
                const __m512i query = _mm512_set1_epi32(four);
#pragma GCC unroll 3
                for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], key[v], query);
            }
        }
        __m512 scale[VECTORS];
        for (int64_t v = 0; v < VECTORS; ++v) scale[v] = _mm512_loadu_ps(scales_.data() + panel * KEYS + v * 16);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; ++r) {
            __m512 u[VECTORS];
#pragma GCC unroll 3
            for (int64_t v = 0; v < VECTORS; ++v) u[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), scale[v]);
            const __m512 bound = _mm512_set1_ps(r < count ? least[r] / q.scale[r] : std::numeric_limits<float>::infinity());
            const __m512 most = _mm512_max_ps(_mm512_max_ps(u[0], u[1]), u[2]);
            if (_mm512_cmp_ps_mask(most, bound, _CMP_GE_OQ) == 0) continue;
            Passed<float> &to = passed[r];
#pragma GCC unroll 3
            for (int64_t v = 0; v < VECTORS; ++v) {
                const __mmask16 passes = _mm512_cmp_ps_mask(u[v], bound, _CMP_GE_OQ);
                const __m512 upper = _mm512_mul_ps(u[v], _mm512_set1_ps(q.scale[r]));
                const __m512i position = _mm512_add_epi32(lanes, _mm512_set1_epi32(panel * KEYS + v * 16));
                // by a register: a store with a mask to memory is slow on some processors
                _mm512_storeu_ps(to.upper + to.count, _mm512_maskz_compress_ps(passes, upper));
                _mm512_storeu_si512(to.position + to.count, _mm512_maskz_compress_epi32(passes, position));
                to.count += __builtin_popcount(passes);
            }
        }
    }

    // x̂, 16 numbers at a time: up to 15 zeros behind the last are written too
    VNNI static Rounded round(const float *x, int64_t size, int top, int8_t *to) {
        __m512 most = _mm512_setzero_ps();
        const auto load = [&](int64_t d) VNNI {
            return _mm512_maskz_loadu_ps(d + 16 <= size ? 0xFFFF : (1u << (size - d)) - 1, x + d);
        };
        for (int64_t d = 0; d < size; d += 16) most = _mm512_max_ps(most, _mm512_abs_ps(load(d)));
        const float scale = std::max(_mm512_reduce_max_ps(most) / float(top), LEAST);
        const __m512 by = _mm512_set1_ps(scale);
        __m512 length = _mm512_setzero_ps(), whole = length, error = length;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t d = 0; d < size; d += 16) {
            const __m512 scaled = _mm512_div_ps(load(d), by);
            const __m512i near = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(top)), _mm512_set1_epi32(-top));
            const __m512 n = _mm512_cvtepi32_ps(near), rest = _mm512_sub_ps(scaled, n);
            length = _mm512_fmadd_ps(scaled, scaled, length), whole = _mm512_fmadd_ps(n, n, whole);
            error = _mm512_fmadd_ps(rest, rest, error), sum = _mm512_add_epi32(sum, near);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + d), _mm512_cvtepi32_epi8(near));
        }
        return {scale, MORE * std::sqrt(_mm512_reduce_add_ps(length)), MORE * std::sqrt(_mm512_reduce_add_ps(whole)),
                MORE * std::sqrt(_mm512_reduce_add_ps(error)) + 1e-3f, _mm512_reduce_add_epi32(sum)};
    }
};
#undef VNNI
#endif
