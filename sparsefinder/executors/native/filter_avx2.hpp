// The filter of processors without VNNI: see filters.hpp.

#pragma once

#include "filters.hpp"

#ifdef SPARSEFINDER_X86
#define AVX2 __attribute__((target("avx2,fma")))

// Products of queries rounded to 8 bits and keys rounded to 7, two to an instruction and lane of 16 bits (AVX2).
//
// The bound is that of Int8Filter, with k̂ up to 63. The instruction multiplies unsigned by signed and adds two products in 16 bits,
// where what is too large is cut: keys are k̂ + 64, so that a sum is at most 2 · 127 · 127 = 32,258, which fits.
class Int7Filter {
   public:
    static constexpr int64_t LANES = 8, VECTORS = 4, KEYS = LANES * VECTORS;
    static bool works() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

    Int7Filter(const float *k, const std::vector<int32_t> &ids, int64_t size) : size_(size), groups_((size + 3) / 4) {
        const int64_t count = ids.size(), panels = (count + KEYS - 1) / KEYS;
        laid_.assign(panels * groups_ * KEYS * 4, OFFSET);
        scales_.assign(panels * KEYS, 0.f);
        std::vector<int8_t> whole(size);
        for (int64_t c = 0; c < count; ++c) {
            const Rounded rounded = round(k + ids[c] * size, OFFSET - 1, whole.data());
            uint8_t *to = laid_.data() + (c / KEYS) * groups_ * KEYS * 4 + (c % KEYS) * 4;
            for (int64_t x = 0; x < size; ++x) to[x / 4 * KEYS * 4 + x % 4] = uint8_t(whole[x] + OFFSET);
            scales_[c] = rounded.scale;
            longest_ = std::max(longest_, rounded.length), error_ = std::max(error_, rounded.error);
        }
    }

    struct Queries {
        std::vector<int8_t> x;  // coordinates of a row follow each other, rows are `4 groups` apart
        int32_t start[ROWS];
        float scale[ROWS];
    };

    void take(const float *const *q, int64_t count, Queries &to) const {
        to.x.assign(ROWS * groups_ * 4, 0);
        for (int64_t r = 0; r < count; ++r) {
            const Rounded rounded = round(q[r], 127, to.x.data() + r * groups_ * 4);
            // the last term is for the roundings of u itself in float32: three, of sums up to 127 · 127 D
            const float bound = rounded.error * longest_ + rounded.whole * error_ + 2 + size_ * (127.f * 127.f / (1 << 21));
            to.start[r] = int32_t(std::ceil(bound)) - OFFSET * rounded.sum;
            to.scale[r] = rounded.scale;
        }
    }

    AVX2 void pass(const Queries &q, int64_t count, int64_t panel, const float *least, Passed<float> *passed) const {
        const uint8_t *keys = laid_.data() + panel * groups_ * KEYS * 4;
        for (int64_t r = 0; r < count; r += 2) two(q, r, std::min(r + 1, count - 1), keys, panel, least, passed);
    }

   private:
    static constexpr int OFFSET = 64;

    // queries r and s; an odd one is its own neighbour
    AVX2 void two(const Queries &q, int64_t r, int64_t s, const uint8_t *keys, int64_t panel, const float *least,
                  Passed<float> *passed) const {
        __m256i a[VECTORS], b[VECTORS];
        for (int64_t v = 0; v < VECTORS; ++v) a[v] = _mm256_set1_epi32(q.start[r]), b[v] = _mm256_set1_epi32(q.start[s]);
        const __m256i ones = _mm256_set1_epi16(1);
        const int8_t *x = q.x.data() + r * groups_ * 4, *y = q.x.data() + s * groups_ * 4;
        for (int64_t g = 0; g < groups_; ++g, keys += KEYS * 4) {
            int32_t four, other;
            __builtin_memcpy(&four, x + 4 * g, 4);
            __builtin_memcpy(&other, y + 4 * g, 4);
            const __m256i first = _mm256_set1_epi32(four), second = _mm256_set1_epi32(other);
#pragma GCC unroll 4
            for (int64_t v = 0; v < VECTORS; ++v) {
                const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(keys + v * 32));
                a[v] = _mm256_add_epi32(a[v], _mm256_madd_epi16(_mm256_maddubs_epi16(key, first), ones));
                b[v] = _mm256_add_epi32(b[v], _mm256_madd_epi16(_mm256_maddubs_epi16(key, second), ones));
            }
        }
        keep(a, q.scale[r], panel, least[r], passed[r]);
        if (s > r) keep(b, q.scale[s], panel, least[s], passed[s]);
    }

    AVX2 void keep(const __m256i *sums, float scale, int64_t panel, float least, Passed<float> &to) const {
        __m256 u[VECTORS];
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; ++v)
            u[v] = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[v]), _mm256_loadu_ps(scales_.data() + panel * KEYS + v * LANES));
        const __m256 bound = _mm256_set1_ps(least / scale);
        const __m256 most = _mm256_max_ps(_mm256_max_ps(u[0], u[1]), _mm256_max_ps(u[2], u[3]));
        if (_mm256_movemask_ps(_mm256_cmp_ps(most, bound, _CMP_GE_OQ)) == 0) return;
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; ++v) {
            float upper[LANES];
            const __m256 all = _mm256_mul_ps(u[v], _mm256_set1_ps(scale));
            int passes = _mm256_movemask_ps(_mm256_cmp_ps(u[v], bound, _CMP_GE_OQ));
            if (passes == 255) {  // at first all of them do
                const __m256i first = _mm256_set1_epi32(int32_t(panel * KEYS + v * LANES));
                _mm256_storeu_ps(to.upper + to.count, all);
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(to.position + to.count),
                                    _mm256_add_epi32(first, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
                to.count += LANES;
                continue;
            }
            _mm256_storeu_ps(upper, all);
            for (; passes; passes &= passes - 1) {
                const int lane = __builtin_ctz(passes);
                to.upper[to.count] = upper[lane], to.position[to.count] = int32_t(panel * KEYS + v * LANES + lane);
                ++to.count;
            }
        }
    }

    struct Rounded {
        float scale, length, whole, error;  // t, |k|/t, |k̂|, |f|/t, the last three a little too large
        int32_t sum;                        // Σ k̂
    };

    // whole numbers up to `top`
    AVX2 Rounded round(const float *x, int top, int8_t *to) const {
        float most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t d = 0; d < size_; ++d) most = std::max(most, std::abs(x[d]));
        const float scale = std::max(most / float(top), std::numeric_limits<float>::min());  // that of zeros is no zero
        float length = 0, whole = 0, error = 0, sum = 0;
#pragma omp simd reduction(+ : length, whole, error, sum)
        for (int64_t d = 0; d < size_; ++d) {
            const float scaled = x[d] / scale, near = std::min(std::max(std::nearbyint(scaled), float(-top)), float(top));
            length += scaled * scaled, whole += near * near, error += (scaled - near) * (scaled - near), sum += near;
            to[d] = int8_t(near);
        }
        constexpr float MORE = 1.0001f;  // than these sums in float32 can be too small by, for D up to hundreds
        return {scale, MORE * std::sqrt(length), MORE * std::sqrt(whole), MORE * std::sqrt(error) + 1e-3f, int32_t(sum)};
    }

    int64_t size_, groups_;
    std::vector<uint8_t> laid_;      // panel, four coordinates, key, coordinate
    std::vector<float> scales_;      // t of each key; 0 beyond the last
    float longest_ = 0, error_ = 0;  // the largest |k|/t and |f|/t
};
#undef AVX2
#endif
