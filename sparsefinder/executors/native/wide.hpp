// Arithmetic by the widest vectors of the processor, and memory that begins where they like it to.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

// without AVX a vector is returned in another way than with it; here none is ever passed to code that was compiled elsewhere
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__AVX512DQ__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512DQ__
constexpr int WIDTH = 64;            // bytes of a vector
constexpr int64_t ROWS_AT_ONCE = 8;  // rows times two vectors are sums that stay in registers
#else
constexpr int WIDTH = 32;
constexpr int64_t ROWS_AT_ONCE = 4;
#endif

template <class T> struct WideOf {
    typedef T Vector __attribute__((vector_size(WIDTH), aligned(alignof(T)), may_alias));
};
template <class T> using Wide = typename WideOf<T>::Vector;
template <class T> constexpr int64_t LANES_OF = WIDTH / sizeof(T);

template <class T> inline Wide<T> load(const T *from) { return *reinterpret_cast<const Wide<T> *>(from); }
template <class T> inline void store(T *to, Wide<T> x) { *reinterpret_cast<Wide<T> *>(to) = x; }
template <class T> inline Wide<T> all_of(T x) { return Wide<T>{} + x; }
template <class T> constexpr int64_t whole(int64_t count) { return (count + LANES_OF<T> - 1) / LANES_OF<T> * LANES_OF<T>; }

#ifdef __AVX512DQ__
inline float sum_of(Wide<float> x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest_of(Wide<float> x) { return _mm512_reduce_max_ps((__m512)x); }
inline double sum_of(Wide<double> x) { return _mm512_reduce_add_pd((__m512d)x); }
inline double largest_of(Wide<double> x) { return _mm512_reduce_max_pd((__m512d)x); }
#else
// lane by lane; of float32, which is there to be fast, by halves
template <class V> inline auto sum_of(V x) {
    auto total = x[0];
    for (size_t lane = 1; lane < sizeof(V) / sizeof(total); ++lane) total += x[lane];
    return total;
}
template <class V> inline auto largest_of(V x) {
    auto most = x[0];
    for (size_t lane = 1; lane < sizeof(V) / sizeof(most); ++lane) most = x[lane] > most ? x[lane] : most;
    return most;
}
#ifdef __AVX2__
inline float sum_of(Wide<float> x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Wide<float> x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif
#endif

// a bit for each lane in which a > b, and lanes without those whose bit is set
#ifdef __AVX512DQ__
inline uint32_t greater(Wide<float> a, Wide<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
inline uint32_t greater(Wide<double> a, Wide<double> b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
inline Wide<float> without(Wide<float> x, uint32_t bits) { return (Wide<float>)_mm512_maskz_mov_ps(~bits, (__m512)x); }
inline Wide<double> without(Wide<double> x, uint32_t bits) { return (Wide<double>)_mm512_maskz_mov_pd(~bits, (__m512d)x); }
#else
template <class V> inline uint32_t greater(V a, V b) {
    const auto above = a > b;
    uint32_t bits = 0;
    for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) bits |= uint32_t(above[lane] & 1) << lane;
    return bits;
}
template <class V> inline V without(V x, uint32_t bits) {
    for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) x[lane] = bits >> lane & 1 ? 0 : x[lane];
    return x;
}
#ifdef __AVX2__
inline uint32_t greater(Wide<float> a, Wide<float> b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
}
inline Wide<float> without(Wide<float> x, uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i gone = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), lanes), lanes);
    return (Wide<float>)_mm256_andnot_ps(_mm256_castsi256_ps(gone), (__m256)x);
}
#endif
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

// numbers in whole lines of the cache: a vector that lies across two is read twice
template <class T> class Numbers {
    struct alignas(64) Line {
        T numbers[64 / sizeof(T)];
    };
    std::vector<Line> lines_;

   public:
    Numbers() = default;
    explicit Numbers(int64_t count) { resize(count); }
    void reserve(int64_t count) { lines_.reserve(count * sizeof(T) / 64 + 1); }
    void resize(int64_t count) { lines_.resize(count * sizeof(T) / 64 + 1); }  // what is new is zero
    void fill(T x) { std::fill(data(), data() + lines_.size() * (64 / sizeof(T)), x); }
    T *data() { return reinterpret_cast<T *>(lines_.data()); }
    const T *data() const { return reinterpret_cast<const T *>(lines_.data()); }
    T &operator[](int64_t n) { return data()[n]; }
    const T &operator[](int64_t n) const { return data()[n]; }
};

// 2^x to a rounding or two: infinity where it is too large, 0 below the smallest normal number (or less), NaN stays
inline Wide<float> power_of_two(Wide<float> x) {
#ifdef __AVX512DQ__
    const Wide<float> r = (Wide<float>)_mm512_reduce_ps((__m512)x, 0);  // less the nearest whole number
#else
    typedef int32_t Bits __attribute__((vector_size(WIDTH)));
    const Wide<float> shifted = x + 12582912.0f;  // 1.5 · 2^23: what is left of the fraction is rounded off
    const Wide<float> r = x - (shifted - 12582912.0f);
#endif
    Wide<float> p = all_of(1.5403530e-4f);
    p = p * r + 1.3398874e-3f, p = p * r + 9.6181290e-3f, p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022651e-1f, p = p * r + 6.9314718e-1f, p = p * r + 1.0f;
#ifdef __AVX512DQ__
    return (Wide<float>)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
    const Wide<float> raised = (Wide<float>)((Bits)p + ((Bits)shifted << 23));
    const Wide<float> bounded = x > 127.0f ? all_of(std::numeric_limits<float>::infinity()) : raised;
    return x < -126.0f ? Wide<float>{} : bounded + (x - x);
#endif
}
inline Wide<double> power_of_two(Wide<double> x) {
    Wide<double> result;
    for (int lane = 0; lane < LANES_OF<double>; ++lane) result[lane] = std::exp2(x[lane]);
    return result;
}

constexpr int64_t APART = 32;  // numbers from one of a few rows to the next: known here, so that all addresses are one register

template <class T> inline Wide<T> larger(Wide<T> x, Wide<T> than) { return x > than ? x : than; }
#ifdef __AVX512DQ__
inline Wide<float> root(Wide<float> x) { return (Wide<float>)_mm512_sqrt_ps((__m512)x); }
inline Wide<double> root(Wide<double> x) { return (Wide<double>)_mm512_sqrt_pd((__m512d)x); }
#else
template <class V> inline V root(V x) {
    for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
}
#ifdef __AVX2__
inline Wide<float> root(Wide<float> x) { return (Wide<float>)_mm256_sqrt_ps((__m256)x); }
#endif
#endif

// sums[r][v] += Σ_t w[r][t] · x[t][v], v a vector: the numbers w[r][t] lie at `w + r · row + t · term`, the vectors x[t][v] at
// `x + t · next + v · beside`. Inlined where the steps are known, so that each use is a loop of its own.
template <int R, int V, class T>
ALWAYS_INLINE void add_products(const T *w, int64_t row, int64_t term, const T *x, int64_t next, int64_t beside, int64_t count,
                                Wide<T> (&sums)[R][V]) {
    for (int64_t t = 0; t < count; ++t) {
        Wide<T> k[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) k[v] = load(x + t * next + v * beside);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] += w[r * row + t * term] * k[v];
    }
}

// sums[r][v] += x_r · the vectors of panel v, lane by lane, in `size` coordinates, APART at most; panels are `behind` apart
template <int R, int V, class T>
ALWAYS_INLINE void multiply(const T *x, const T *panels, int64_t behind, int64_t size, Wide<T> (&sums)[R][V]) {
    add_products<R, V, T>(x, APART, 1, panels, LANES_OF<T>, behind, size, sums);
}

// sums[r][v] += Σ_j weights[r][j] · x_j[v], x a matrix of `width` columns
template <int R, int V, class T>
ALWAYS_INLINE void combine(const T *weights, const T *x, int64_t width, int64_t count, Wide<T> (&sums)[R][V]) {
    add_products<R, V, T>(weights, APART, 1, x, width, LANES_OF<T>, count, sums);
}

// sums[r][v] += Σ_i weights_i[r] · x_i[v], rows of weights `apart` and those of x `width` numbers apart
template <int R, int V, class T>
ALWAYS_INLINE void outer(const T *weights, int64_t apart, const T *x, int64_t width, int64_t count, Wide<T> (&sums)[R][V]) {
    add_products<R, V, T>(weights, 1, apart, x, width, LANES_OF<T>, count, sums);
}

// `work(first, R)` for rows 0 to count, ROWS_AT_ONCE at a time and the last ones by powers of two: R is known while this is compiled.
// Of float64, which is there to check by, fewer forms are compiled.
template <class T, class F> ALWAYS_INLINE void in_rows(int64_t count, const F &work) {
    int64_t first = 0;
    for (; first + ROWS_AT_ONCE <= count; first += ROWS_AT_ONCE) work(first, std::integral_constant<int, ROWS_AT_ONCE>());
    if constexpr (sizeof(T) == 4) {
        if constexpr (ROWS_AT_ONCE > 4)
            if (first + 4 <= count) work(first, std::integral_constant<int, 4>()), first += 4;
        if (first + 2 <= count) work(first, std::integral_constant<int, 2>()), first += 2;
    }
    for (; first < count; ++first) work(first, std::integral_constant<int, 1>());
}

// `work(first, V)` for vectors 0 to count, two at a time and then the last one
template <class F> ALWAYS_INLINE void in_pairs(int64_t first, int64_t end, const F &work) {
    for (; first + 1 < end; first += 2) work(first, std::integral_constant<int, 2>());
    if (first < end) work(first, std::integral_constant<int, 1>());
}

// The same of one row, whose products wait for each other: eight at a time while there are so many, and four.
template <int R, class F> ALWAYS_INLINE void in_vectors(int64_t first, int64_t end, const F &work) {
    if constexpr (R == 1) {
        for (; first + 8 <= end; first += 8) work(first, std::integral_constant<int, 8>());
        for (; first + 4 <= end; first += 4) work(first, std::integral_constant<int, 4>());
    }
    in_pairs(first, end, work);
}
