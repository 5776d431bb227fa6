// The filter of processors without VNNI: see filters.hpp.

#pragma once

#include "filters.hpp"

#ifdef SPARSEFINDER_X86
#define AVX2 __attribute__((target("avx2,fma")))

// Queries rounded to 8 bits and keys to 7, two products to an instruction and lane of 16 bits (AVX2).
//
// The instruction adds the two in 16 bits, where what is too large is cut: keys are below 128, so that a sum is at most
// 2 · 127 · 127 = 32,258, which fits.
class Int7Filter : public RoundedFilter<Int7Filter> {
   public:
    static constexpr int64_t LANES = 8, VECTORS = 4, KEYS = LANES * VECTORS;
    static constexpr int OFFSET = 64;
    static bool works() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
    Int7Filter(const float *k, const std::vector<int32_t> &ids, int64_t size) : RoundedFilter(k, ids, size) {}

    AVX2 void pass(const Queries &q, int64_t count, int64_t panel, const float *least, Passed<float> *passed) const {
        const uint8_t *keys = laid_.data() + panel * groups_ * KEYS * 4;
        for (int64_t r = 0; r < count; r += 2) two(q, r, std::min(r + 1, count - 1), keys, panel, least, passed);
    }

    // x̂ up to `top`
    AVX2 static Rounded round(const float *x, int64_t size, int top, int8_t *to) {
        float most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t d = 0; d < size; ++d) most = std::max(most, std::abs(x[d]));
        const float scale = std::max(most / float(top), LEAST);
        float length = 0, whole = 0, error = 0, sum = 0;
#pragma omp simd reduction(+ : length, whole, error, sum)
        for (int64_t d = 0; d < size; ++d) {
            const float scaled = x[d] / scale, near = std::min(std::max(std::nearbyint(scaled), float(-top)), float(top));
            length += scaled * scaled, whole += near * near, error += (scaled - near) * (scaled - near), sum += near;
            to[d] = int8_t(near);
        }
        return {scale, MORE * std::sqrt(length), MORE * std::sqrt(whole), MORE * std::sqrt(error) + 1e-3f, int32_t(sum)};
    }

   private:
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
};
#undef AVX2
#endif
