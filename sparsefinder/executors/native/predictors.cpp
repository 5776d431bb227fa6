// The inner loops of predicting buckets, a few tokens at a time: see predictors.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "boundary.hpp"
#include "causal_routing.hpp"
#include "panels.hpp"
#include "routing.hpp"
#include "vectors.hpp"

namespace {

// ids of the `top` centroids of largest x·c - |c|²/2 in each run
template <class T>
void nearest(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count, int64_t top,
             int64_t threads, const T *x, const T *centres, int64_t *ids) {
    const T nothing = -std::numeric_limits<T>::infinity();
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t run = 0; run < runs; ++run) {
            const T *own = centres + (head * runs + run) * count * size;
            const Panels<T> laid(own, count, size);
            std::vector<T> bias(laid.width(), nothing);
            for (int64_t c = 0; c < count; ++c) bias[c] = dot<T>(own + c * size, own + c * size, size) / -2;
            Failure failure;
#pragma omp parallel num_threads(threads)
            {
                std::vector<T> closeness, most;
                failure.guard([&] { closeness.resize(AT_ONCE * laid.width()), most.resize(laid.panels); });
                for (int64_t example = 0; example < batch; ++example)
#pragma omp for schedule(static)
                    for (int64_t from = 0; from < tokens; from += AT_ONCE) {
                        if (failure) continue;
                        const int64_t first = (example * heads + head) * tokens + from, rows = std::min(AT_ONCE, tokens - from);
                        for (int64_t i = 0; i < rows; ++i) std::copy(bias.begin(), bias.end(), closeness.begin() + i * laid.width());
                        laid.multiply(x + first * size, rows, closeness.data());
                        for (int64_t i = 0; i < rows; ++i) {
                            T *values = closeness.data() + i * laid.width();
                            for (int64_t panel = 0; panel < laid.panels; ++panel) most[panel] = largest(values + panel * PANEL, PANEL);
                            for (int64_t t = 0; t < top; ++t) {
                                const int64_t at = largest_of(values, most, count), panel = at / PANEL;
                                ids[((first + i) * runs + run) * top + t] = run * count + at;
                                values[at] = nothing;
                                most[panel] = largest(values + panel * PANEL, PANEL);
                            }
                        }
                    }
            }
            failure.rethrow();
        }
}

// number, mean and variance of the vectors in each cluster; whoever has another id is in none
template <class T>
void moments(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const T *x, const int64_t *ids,
             T *numbers, T *mean, T *variance) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t *own = ids + part * tokens;
        T *number = numbers + part * count, *m = mean + part * count * size, *s = variance + part * count * size;
        const auto inside = [&](int64_t i) { return own[i] >= 0 && own[i] < count; };
        for (int64_t i = 0; i < tokens; ++i) {
            if (!inside(i)) continue;
            const T *from = x + (part * tokens + i) * size;
            ++number[own[i]];
#pragma omp simd
            for (int64_t r = 0; r < size; ++r) m[own[i] * size + r] += from[r];
        }
        for (int64_t c = 0; c < count; ++c)
            for (int64_t r = 0; r < size; ++r) m[c * size + r] /= std::max(number[c], T(1));
        for (int64_t i = 0; i < tokens; ++i) {
            if (!inside(i)) continue;
            const T *from = x + (part * tokens + i) * size, *of = m + own[i] * size;
#pragma omp simd
            for (int64_t r = 0; r < size; ++r) s[own[i] * size + r] += (from[r] - of[r]) * (from[r] - of[r]);
        }
        for (int64_t c = 0; c < count; ++c)
            for (int64_t r = 0; r < size; ++r) s[c * size + r] /= std::max(number[c], T(1));
    }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                \
    int nearest_##NAME(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count,            \
                       int64_t top, int64_t threads, const T *x, const T *centres, int64_t *ids) {                        \
        return status_of([&] { nearest(batch, heads, tokens, size, runs, count, top, threads, x, centres, ids); });       \
    }                                                                                                                     \
    int moments_##NAME(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const T *x,           \
                       const int64_t *ids, T *numbers, T *mean, T *variance) {                                            \
        return status_of([&] { moments(parts, tokens, size, count, threads, x, ids, numbers, mean, variance); });         \
    }                                                                                                                     \
    int route_##NAME(const Choice *rule, int64_t size, const T *q, const T *numbers, const T *mean, const T *variance,    \
                     const T *doors, const T *door_mean, const T *door_variance, int32_t *counts, Kept **kept) {          \
        const Estimates<T> columns{numbers, mean, variance}, entrance{doors, door_mean, door_variance};                   \
        return status_of([&] { *kept = route(*rule, size, q, columns, entrance, counts).release(); });                    \
    }                                                                                                                     \
    int route_causal_##NAME(const Choice *rule, int64_t size, const T *q, const T *centres, const int64_t *ids,            \
                            int32_t *counts, Kept **kept) {                                                               \
        return status_of([&] { *kept = route_causal(*rule, size, q, centres, ids, counts).release(); });                  \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
// what was kept → ids (groups, rows, most), -1 behind the last one of each row
int spread(const Kept *kept, const Choice *rule, int64_t most, const int32_t *counts, int64_t *ids) {
#pragma omp parallel for schedule(static) num_threads(rule->threads)
    for (size_t block = 0; block < kept->blocks.size(); ++block) {
        const int32_t *from = kept->blocks[block].data();
        const int64_t start = block % kept->in_group * BLOCK, group = block / kept->in_group;
        for (int64_t i = start; i < std::min(start + BLOCK, rule->rows); ++i) {
            const int64_t row = group * rule->rows + i;
            for (int64_t n = 0; n < most; ++n) ids[row * most + n] = n < counts[row] ? from[n] : -1;
            from += counts[row];
        }
    }
    return FINE;
}
int release(Kept *kept) {
    delete kept;
    return FINE;
}
int64_t layout(int64_t n) { return layout_of<Choice>(5, n); }
}
