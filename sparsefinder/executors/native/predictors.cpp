// The inner loops of predicting buckets, a few tokens at a time: see predictors.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "boundary.hpp"
#include "entmax.hpp"
#include "panels.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t BLOCK = 64;  // rows that a thread takes at a time

struct Choice {
    int64_t heads, groups, rows, columns;  // scores (groups, rows, columns); a group is a head of an example
    int64_t budget, threads;               // the rule: 1 budget, 0 margin
    const double *levels;                  // of each head
    double alpha;
};

// what rows chose, those of a block one after the other; how many each chose is kept elsewhere
struct Kept {
    int64_t in_group;  // blocks
    std::vector<std::vector<int32_t>> blocks;
    explicit Kept(const Choice &rule) : in_group((rule.rows + BLOCK - 1) / BLOCK), blocks(rule.groups * in_group) {}
};

// position of the largest of the values, given the largest of each panel; the first of equals, and nothing beyond `count`
template <class T> int64_t largest_of(const T *values, const std::vector<T> &most, int64_t count) {
    const int64_t panel = std::max_element(most.begin(), most.end()) - most.begin();
    const T *from = values + panel * PANEL;
    return std::min<int64_t>(std::find(from, from + PANEL, most[panel]) - values, count - 1);
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

// id of the nearest of the `branching` children of each parent
template <class T>
void nearest_child(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t count, int64_t branching, int64_t threads,
                   const T *x, const T *centres, const int64_t *parents, int64_t *ids) {
    for (int64_t head = 0; head < heads; ++head) {
        const T *own = centres + head * count * size;
        const Panels<T> laid(own, count, size);
        std::vector<T> bias(laid.width());
        for (int64_t c = 0; c < count; ++c) bias[c] = dot<T>(own + c * size, own + c * size, size) / -2;
        for (int64_t example = 0; example < batch; ++example)
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t row = (example * heads + head) * tokens + i;
                const int64_t first = parents[row] * branching, end = first + branching;
                T closeness[PANEL], most = -std::numeric_limits<T>::infinity();
                ids[row] = first;
                for (int64_t panel = first / PANEL; panel * PANEL < end; ++panel) {
                    const int64_t from = std::max(first - panel * PANEL, int64_t(0)), to = std::min(end - panel * PANEL, PANEL);
                    std::copy_n(bias.begin() + panel * PANEL, PANEL, closeness);
                    laid.single(x + row * size, panel, closeness);
                    for (int64_t c = from; c < to; ++c)
                        if (closeness[c] > most) most = closeness[c], ids[row] = panel * PANEL + c;
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

// the scores of one row, of whole panels, -inf where there is no key, the level of its head, how many keys that is of a
// budget, and room to choose
template <class T> struct Scores {
    T *values = nullptr, level, budget;
    std::vector<T> most, above, many;
    std::vector<uint8_t> flags;
    std::vector<int32_t> candidates;
    Scores(int64_t panels, T level, T budget)
        : level(level), budget(budget), most(panels), above(panels * PANEL), many(panels * PANEL), flags(panels * PANEL),
          candidates(panels * PANEL) {}
};

// columns of largest score until they stand for a share of the keys
template <class T> void by_budget(const Choice &rule, const T *numbers, Scores<T> &row, std::vector<int32_t> &kept) {
    const T nothing = -std::numeric_limits<T>::infinity();
    for (size_t panel = 0; panel < row.most.size(); ++panel) row.most[panel] = largest(row.values + panel * PANEL, PANEL);
    T before = 0;
    for (int64_t taken = 0; taken < rule.columns; ++taken) {
        const int64_t at = largest_of(row.values, row.most, rule.columns);
        // a column is kept where that brings the row nearer to its budget than stopping before it; the first one always is
        if (!(row.values[at] > nothing) || (taken && !(before + numbers[at] / 2 <= row.budget))) break;
        kept.push_back(at);
        before += numbers[at];
        row.values[at] = nothing;
        row.most[at / PANEL] = largest(row.values + at / PANEL * PANEL, PANEL);
    }
}

// columns above the threshold of entmax less the level; a column stands for as many equal keys as its number says
template <class T> void by_margin(const Choice &rule, const T *numbers, Scores<T> &row, std::vector<int32_t> &kept) {
    const T *scores = row.values, scale = rule.alpha - 1.0;
    const int64_t width = row.most.size() * PANEL;
    const T peak = largest(scores, width);
    if (std::isinf(peak)) return;
    // what can be kept, or be above the threshold, which lies in [-1, 0] below the peak: few, so that they are looked at alone
    const T bound = peak - (T(1) + std::max(row.level, T(0))) / scale * (1 + 8 * std::numeric_limits<T>::epsilon());
    uint8_t *flags = row.flags.data();
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) flags[c] = scores[c] >= bound;
    int32_t *ids = row.candidates.data();
    int64_t some = 0;
    for (int64_t c = 0; c < width; c += 8) {
        uint64_t eight;
        std::memcpy(&eight, flags + c, 8);
        if (!eight) continue;
        for (int64_t n = c; eight; ++n, eight >>= 8) ids[some] = n, some += eight & 1;
    }
    T *above = row.above.data(), *many = row.many.data();
    int64_t near = 0;
    for (int64_t n = 0; n < some; ++n) {
        const T below = (scores[ids[n]] - peak) * scale;
        above[near] = below, many[near] = numbers[ids[n]];
        near += below > T(-1);
    }
    const T threshold = threshold_of(above, near, rule.alpha, [&](int64_t n) { return many[n]; });
    for (int64_t n = 0; n < some; ++n)
        if (scores[ids[n]] > -std::numeric_limits<T>::infinity() && (scores[ids[n]] - peak) * scale >= threshold - row.level)
            kept.push_back(ids[n]);
}

// what a thread works on: scores and squares of a few rows, and the row that chooses
template <class T> struct Scratch {
    std::vector<T> scores, squares;
    Scores<T> row;
    Scratch(int64_t width, int64_t size, int64_t panels, T level, T budget)
        : scores(AT_ONCE * width), squares(AT_ONCE * size), row(panels, level, budget) {}
};

// from queries (groups, rows, size) and the number, mean and variance (groups, columns, size) of the keys in each column
template <class T>
std::unique_ptr<Kept> route(const Choice &rule, int64_t size, const T *q, const T *numbers, const T *mean, const T *variance,
                            int32_t *counts) {
    auto kept = std::make_unique<Kept>(rule);
    for (int64_t group = 0; group < rule.groups; ++group) {
        const Panels<T> means(mean + group * rule.columns * size, rule.columns, size);
        const Panels<T> variances(variance + group * rule.columns * size, rule.columns, size);
        const T *own = numbers + group * rule.columns;
        const int64_t width = means.width();
        std::vector<T> missing(width, -std::numeric_limits<T>::infinity());
        for (int64_t c = 0; c < rule.columns; ++c)
            if (own[c] > 0) missing[c] = 0;
        const T level = rule.levels[group % rule.heads], budget = level * std::accumulate(own, own + rule.columns, T(0));
        const auto one = [&](int64_t block, Scratch<T> &scratch) {
            auto &[scores, squares, row] = scratch;
            auto &ids = kept->blocks[group * kept->in_group + block];
            const int64_t end = std::min((block + 1) * BLOCK, rule.rows);
            for (int64_t from = block * BLOCK; from < end; from += AT_ONCE) {
                const int64_t rows = std::min(AT_ONCE, end - from), first = group * rule.rows + from;
                const T *x = q + first * size;
                // scores q·mean + √(q²·variance)
                std::fill(scores.begin(), scores.end(), T(0));
                std::transform(x, x + rows * size, x, squares.begin(), std::multiplies<T>());
                variances.multiply(squares.data(), rows, scores.data());
                for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
                    for (int64_t c = 0; c < width; ++c) scores[i * width + c] = std::sqrt(scores[i * width + c]) + missing[c];
                means.multiply(x, rows, scores.data());
                for (int64_t i = 0; i < rows; ++i) {
                    row.values = scores.data() + i * width;  // gone when the row has chosen
                    const size_t before = ids.size();
                    (rule.budget ? by_budget<T> : by_margin<T>)(rule, own, row, ids);
                    counts[first + i] = ids.size() - before;
                }
            }
        };
        Failure failure;
#pragma omp parallel num_threads(rule.threads)
        {
            std::optional<Scratch<T>> scratch;
            failure.guard([&] { scratch.emplace(width, size, means.panels, level, budget); });
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < kept->in_group; ++block) failure.guard([&] { one(block, *scratch); });
        }
        failure.rethrow();
    }
    return kept;
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                \
    int nearest_##NAME(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count,            \
                       int64_t top, int64_t threads, const T *x, const T *centres, int64_t *ids) {                        \
        return status_of([&] { nearest(batch, heads, tokens, size, runs, count, top, threads, x, centres, ids); });       \
    }                                                                                                                     \
    int nearest_child_##NAME(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t count, int64_t branching, \
                             int64_t threads, const T *x, const T *centres, const int64_t *parents, int64_t *ids) {       \
        return status_of(                                                                                                 \
            [&] { nearest_child(batch, heads, tokens, size, count, branching, threads, x, centres, parents, ids); });     \
    }                                                                                                                     \
    int moments_##NAME(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const T *x,           \
                       const int64_t *ids, T *numbers, T *mean, T *variance) {                                            \
        return status_of([&] { moments(parts, tokens, size, count, threads, x, ids, numbers, mean, variance); });         \
    }                                                                                                                     \
    int route_##NAME(const Choice *rule, int64_t size, const T *q, const T *numbers, const T *mean, const T *variance,    \
                     int32_t *counts, Kept **kept) {                                                                      \
        return status_of([&] { *kept = route(*rule, size, q, numbers, mean, variance, counts).release(); });              \
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
int64_t layout(int64_t n) { return layout_of<Choice>(3, n); }
}
