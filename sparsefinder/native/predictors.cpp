// The inner loops of predicting buckets, one token at a time: see predictors.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "entmax.hpp"

namespace {

constexpr int64_t PANEL = 32;  // vectors multiplied at a time: their sums stay in registers
constexpr int64_t BLOCK = 64;  // rows that a thread takes at a time

struct Choice {
    int64_t groups, rows, columns;  // scores (groups, rows, columns)
    int64_t budget, threads;        // the rule: 1 budget, 0 margin
    double level, alpha;
};

// what rows chose, those of a block one after the other; how many each chose is told apart
struct Kept {
    int64_t in_group;  // blocks
    std::vector<std::vector<int32_t>> blocks;
    explicit Kept(const Choice &rule) : in_group((rule.rows + BLOCK - 1) / BLOCK), blocks(rule.groups * in_group) {}
};

// vectors laid side by side, PANEL of them coordinate by coordinate; what fills the last panel is zero
template <class T> struct Panels {
    int64_t count, size, panels;
    std::vector<T> laid;
    Panels(const T *vectors, int64_t count, int64_t size)
        : count(count), size(size), panels((count + PANEL - 1) / PANEL), laid(panels * size * PANEL, T(0)) {
        for (int64_t c = 0; c < count; ++c)
            for (int64_t r = 0; r < size; ++r) laid[((c / PANEL) * size + r) * PANEL + c % PANEL] = vectors[c * size + r];
    }
    // sum[c] += x·vector, or x²·vector, for the vectors of one panel
    void multiply(const T *x, int64_t panel, T *sum) const { add<false>(x, panel, sum); }
    void multiply_squared(const T *x, int64_t panel, T *sum) const { add<true>(x, panel, sum); }

   private:
    // vectors of the compiler's own kind (GCC and Clang have them for any processor): it does not keep plain arrays in registers
    template <bool SQUARED> void add(const T *x, int64_t panel, T *sum) const {
        typedef T Vector __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
        constexpr int LANES = 32 / sizeof(T), VECTORS = PANEL / LANES;
        Vector own[VECTORS], *to = reinterpret_cast<Vector *>(sum);
        for (int v = 0; v < VECTORS; ++v) own[v] = to[v];
        const Vector *from = reinterpret_cast<const Vector *>(laid.data() + panel * size * PANEL);
        for (int64_t r = 0; r < size; ++r, from += VECTORS)
            for (int v = 0; v < VECTORS; ++v) own[v] += (SQUARED ? x[r] * x[r] : x[r]) * from[v];
        for (int v = 0; v < VECTORS; ++v) to[v] = own[v];
    }
};

// of the numbers of a panel; -inf where none is a number
template <class T> T largest(const T *x) {
    T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < PANEL; ++c) most = std::max(most, x[c]);
    return most;
}

// place of the largest of the values, given the largest of each panel; the first of equals, and nothing beyond `count`
template <class T> int64_t place(const std::vector<T> &values, const std::vector<T> &most, int64_t count) {
    const int64_t panel = std::max_element(most.begin(), most.end()) - most.begin();
    const auto from = values.begin() + panel * PANEL;
    return std::min<int64_t>(std::find(from, from + PANEL, most[panel]) - values.begin(), count - 1);
}

// ids of the `top` centroids of largest x·c - |c|²/2 in each run
template <class T>
void nearest(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count, int64_t top,
             int64_t threads, const T *x, const T *centres, int64_t *ids) {
    const T nothing = -std::numeric_limits<T>::infinity();
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t run = 0; run < runs; ++run) {
            const T *own = centres + (head * runs + run) * count * size;
            const Panels<T> laid(own, count, size);
            std::vector<T> bias(laid.panels * PANEL, nothing);
            for (int64_t c = 0; c < count; ++c) {
                T square = 0;
                for (int64_t r = 0; r < size; ++r) square += own[c * size + r] * own[c * size + r];
                bias[c] = square / -2;
            }
#pragma omp parallel num_threads(threads)
            {
                std::vector<T> closeness, most(laid.panels);
                for (int64_t example = 0; example < batch; ++example)
#pragma omp for schedule(static)
                    for (int64_t i = 0; i < tokens; ++i) {
                        const int64_t token = (example * heads + head) * tokens + i;
                        closeness = bias;
                        for (int64_t panel = 0; panel < laid.panels; ++panel) {
                            laid.multiply(x + token * size, panel, closeness.data() + panel * PANEL);
                            most[panel] = largest(closeness.data() + panel * PANEL);
                        }
                        for (int64_t t = 0; t < top; ++t) {
                            const int64_t at = place(closeness, most, count), panel = at / PANEL;
                            ids[(token * runs + run) * top + t] = run * count + at;
                            closeness[at] = nothing;
                            most[panel] = largest(closeness.data() + panel * PANEL);
                        }
                    }
            }
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

// the scores of one row, of whole panels, -inf where there is no key, how many keys it may take, and room to choose
template <class T> struct Scores {
    T budget;
    std::vector<T> values, most, above, many;
    Scores(int64_t panels, T budget) : budget(budget), values(panels * PANEL), most(panels) {}
};

// columns of largest score until they stand for a share of the keys
template <class T> void by_budget(const Choice &rule, const T *numbers, Scores<T> &row, std::vector<int32_t> &kept) {
    const T nothing = -std::numeric_limits<T>::infinity();
    for (size_t panel = 0; panel < row.most.size(); ++panel) row.most[panel] = largest(row.values.data() + panel * PANEL);
    T before = 0;
    for (int64_t found = 0; found < rule.columns; ++found) {
        const int64_t at = place(row.values, row.most, rule.columns);
        // a column is kept where that brings the row nearer to its budget than stopping before it; the first one always is
        if (!(row.values[at] > nothing) || (found && !(before + numbers[at] / 2 <= row.budget))) break;
        kept.push_back(at);
        before += numbers[at];
        row.values[at] = nothing;
        row.most[at / PANEL] = largest(row.values.data() + at / PANEL * PANEL);
    }
}

// columns above the threshold of entmax less the level; a column stands for as many equal keys as its number says
template <class T> void by_margin(const Choice &rule, const T *numbers, Scores<T> &row, std::vector<int32_t> &kept) {
    const T *scores = row.values.data();
    const T scale = rule.alpha - 1.0;
    T peak = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < rule.columns; ++c)
        if (numbers[c] > 0) peak = std::max(peak, scores[c]);
    if (std::isinf(peak)) return;
    // what can be above the threshold: how far it is below the peak, and for how many keys it stands
    row.above.resize(rule.columns), row.many.resize(rule.columns);
    T *above = row.above.data(), *many = row.many.data();
    int64_t some = 0;
    for (int64_t c = 0; c < rule.columns; ++c) {
        const T below = (scores[c] - peak) * scale;
        above[some] = below, many[some] = numbers[c];
        some += numbers[c] > 0 && below > T(-1);
    }
    const T threshold = threshold_of(above, some, rule.alpha, [&](int64_t n) { return many[n]; });
    for (int64_t c = 0; c < rule.columns; ++c)
        if (numbers[c] > 0 && (scores[c] - peak) * scale >= threshold - T(rule.level)) kept.push_back(c);
}

// from queries (groups, rows, size) and the number, mean and variance (groups, columns, size) of the keys in each column; the
// scores q·mean + √(q²·variance) of a row are gone when it has chosen
template <class T>
Kept *route(const Choice &rule, int64_t size, const T *q, const T *numbers, const T *mean, const T *variance, int32_t *counts) {
    auto kept = new Kept(rule);
    for (int64_t group = 0; group < rule.groups; ++group) {
        const Panels<T> means(mean + group * rule.columns * size, rule.columns, size);
        const Panels<T> variances(variance + group * rule.columns * size, rule.columns, size);
        const T *own = numbers + group * rule.columns;
        std::vector<T> missing(means.panels * PANEL, -std::numeric_limits<T>::infinity());
        for (int64_t c = 0; c < rule.columns; ++c)
            if (own[c] > 0) missing[c] = 0;
#pragma omp parallel num_threads(rule.threads)
        {
            Scores<T> scores(means.panels, T(rule.level) * std::accumulate(own, own + rule.columns, T(0)));
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < kept->in_group; ++block) {
                auto &ids = kept->blocks[group * kept->in_group + block];
                for (int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, rule.rows); ++i) {
                    const int64_t row = group * rule.rows + i;
                    for (int64_t panel = 0; panel < means.panels; ++panel) {
                        T *to = scores.values.data() + panel * PANEL;
                        std::fill_n(to, PANEL, T(0));
                        variances.multiply_squared(q + row * size, panel, to);
#pragma omp simd
                        for (int64_t c = 0; c < PANEL; ++c) to[c] = std::sqrt(to[c]) + missing[panel * PANEL + c];
                        means.multiply(q + row * size, panel, to);
                    }
                    const size_t before = ids.size();
                    (rule.budget ? by_budget<T> : by_margin<T>)(rule, own, scores, ids);
                    counts[row] = ids.size() - before;
                }
            }
        }
    }
    return kept;
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                \
    void nearest_##NAME(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count,           \
                        int64_t top, int64_t threads, const T *x, const T *centres, int64_t *ids) {                       \
        nearest(batch, heads, tokens, size, runs, count, top, threads, x, centres, ids);                                  \
    }                                                                                                                     \
    void moments_##NAME(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const T *x,          \
                        const int64_t *ids, T *numbers, T *mean, T *variance) {                                           \
        moments(parts, tokens, size, count, threads, x, ids, numbers, mean, variance);                                    \
    }                                                                                                                     \
    Kept *route_##NAME(const Choice *rule, int64_t size, const T *q, const T *numbers, const T *mean, const T *variance,  \
                       int32_t *counts) {                                                                                 \
        return route(*rule, size, q, numbers, mean, variance, counts);                                                    \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
// what was kept → ids (groups, rows, most), -1 behind the last one of each row; `kept` is gone then
void spread(Kept *kept, const Choice *rule, int64_t most, const int32_t *counts, int64_t *ids) {
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
    delete kept;
}
}
