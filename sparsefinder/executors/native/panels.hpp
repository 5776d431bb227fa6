// Products of a few rows with many vectors, and the largest of many numbers, by the processor's lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

constexpr int64_t PANEL = 32;   // vectors multiplied at a time: their sums stay in registers
constexpr int64_t AT_ONCE = 8;  // rows for which a panel is read once

// Vectors of the compiler's own kind (GCC and Clang have them for any processor): it neither keeps plain arrays in registers nor
// finds their largest number without going through them one by one.
template <class T> struct Lanes {
    typedef T Vector __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
};
template <class T> using Vector = typename Lanes<T>::Vector;
template <class T> constexpr int LANES = 32 / sizeof(T);
template <class T> constexpr int VECTORS = PANEL / LANES<T>;

// -inf where none is a number
template <class T> T largest(const T *x, int64_t count) {
    const auto *from = reinterpret_cast<const Vector<T> *>(x);
    Vector<T> most = Vector<T>{} - std::numeric_limits<T>::infinity();
    int64_t n = 0;
    for (; n + LANES<T> <= count; n += LANES<T>, ++from) most = *from > most ? *from : most;
    T result = most[0];
    for (int lane = 1; lane < LANES<T>; ++lane) result = std::max(result, T(most[lane]));
    for (; n < count; ++n) result = std::max(result, x[n]);
    return result;
}

// vectors laid side by side, PANEL of them coordinate by coordinate; what fills the last panel is zero
template <class T> struct Panels {
    int64_t count, size, panels;
    std::vector<T> laid;
    // vector c is row `row(c)` of `vectors`
    template <class F>
    Panels(const T *vectors, int64_t count, int64_t size, const F &row)
        : count(count), size(size), panels((count + PANEL - 1) / PANEL), laid(panels * size * PANEL, T(0)) {
        for (int64_t c = 0; c < count; ++c)
            for (int64_t r = 0; r < size; ++r) laid[((c / PANEL) * size + r) * PANEL + c % PANEL] = vectors[row(c) * size + r];
    }
    Panels(const T *vectors, int64_t count, int64_t size) : Panels(vectors, count, size, [](int64_t c) { return c; }) {}
    int64_t width() const { return panels * PANEL; }
    // sums[i][c] += x_i·vector_c for every vector and a few rows; sums (rows, width)
    void multiply(const T *x, int64_t rows, T *sums) const {
        for (int64_t panel = 0; panel < panels; ++panel) one(x, rows, panel, sums + panel * PANEL, width());
    }
    // the same for the vectors of one panel, sums of a row `apart` numbers behind those of the row before
    void one(const T *x, int64_t rows, int64_t panel, T *sums, int64_t apart) const {
        for (int64_t i = 0; i < rows; i += 2) {
            const int64_t j = std::min(i + 1, rows - 1);  // an odd one is its own neighbour: the same sum, written twice
            two(x + i * size, x + j * size, panel, sums + i * apart, sums + j * apart);
        }
    }
    // two rows at a time: as many sums as a processor adds to at once
    void two(const T *x, const T *y, int64_t panel, T *x_sums, T *y_sums) const {
        constexpr int N = VECTORS<T>;
        Vector<T> a[N], b[N], *to_a = reinterpret_cast<Vector<T> *>(x_sums), *to_b = reinterpret_cast<Vector<T> *>(y_sums);
        for (int v = 0; v < N; ++v) a[v] = to_a[v], b[v] = to_b[v];
        const auto *from = reinterpret_cast<const Vector<T> *>(laid.data() + panel * size * PANEL);
        for (int64_t r = 0; r < size; ++r, from += N)
            for (int v = 0; v < N; ++v) a[v] += x[r] * from[v], b[v] += y[r] * from[v];
        for (int v = 0; v < N; ++v) to_a[v] = a[v], to_b[v] = b[v];
    }
};
