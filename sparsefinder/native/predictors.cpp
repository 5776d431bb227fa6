// The inner loops of predicting buckets, one token at a time: see predictors.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t PANEL = 32;  // centroids multiplied at a time: their sums stay in registers
constexpr int64_t STRIP = 16;  // columns whose largest one is remembered

struct Choice {
    int64_t groups, rows, columns;  // scores (groups, rows, columns)
    int64_t numbers_row;            // numbers (groups, rows, columns) if 1, (groups, 1, columns) if 0
    int64_t budget, threads;        // the rule: 1 budget, 0 margin
    double level, alpha;
};

// ids of the `top` centroids of largest x·c - |c|²/2 in each run
template <class T>
void nearest(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count, int64_t top,
             int64_t threads, const T *x, const T *centres, int64_t *ids) {
    const int64_t panels = (count + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(threads)
    for (int64_t example = 0; example < batch; ++example)
        for (int64_t head = 0; head < heads; ++head) {
            // coordinate by coordinate, PANEL centroids side by side
            std::vector<T> laid(runs * panels * PANEL * size, 0), bias(runs * panels * PANEL, -std::numeric_limits<T>::infinity());
            for (int64_t run = 0; run < runs; ++run)
                for (int64_t c = 0; c < count; ++c) {
                    const T *centre = centres + ((head * runs + run) * count + c) * size;
                    const int64_t panel = run * panels + c / PANEL;
                    T square = 0;
                    for (int64_t r = 0; r < size; ++r) {
                        laid[(panel * size + r) * PANEL + c % PANEL] = centre[r];
                        square += centre[r] * centre[r];
                    }
                    bias[panel * PANEL + c % PANEL] = square / -2;
                }
            std::vector<T> closeness(panels * PANEL);
            for (int64_t i = 0; i < tokens; ++i) {
                const T *token = x + ((example * heads + head) * tokens + i) * size;
                int64_t *to = ids + ((example * heads + head) * tokens + i) * runs * top;
                for (int64_t run = 0; run < runs; ++run) {
                    for (int64_t panel = 0; panel < panels; ++panel) {
                        const T *from = laid.data() + (run * panels + panel) * size * PANEL;
                        T sum[PANEL];
                        std::copy_n(bias.data() + (run * panels + panel) * PANEL, PANEL, sum);
                        for (int64_t r = 0; r < size; ++r)
#pragma omp simd
                            for (int64_t c = 0; c < PANEL; ++c) sum[c] += token[r] * from[r * PANEL + c];
                        std::copy_n(sum, PANEL, closeness.data() + panel * PANEL);
                    }
                    for (int64_t t = 0; t < top; ++t) {
                        T best = closeness[0];
#pragma omp simd reduction(max : best)
                        for (int64_t c = 0; c < panels * PANEL; ++c) best = std::max(best, closeness[c]);
                        const int64_t at = std::find(closeness.begin(), closeness.begin() + count - 1, best) - closeness.begin();
                        to[run * top + t] = run * count + at;
                        closeness[at] = -std::numeric_limits<T>::infinity();
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

// columns of largest score until they stand for a share of the keys
template <class T> int32_t by_budget(const Choice &rule, const T *scores, const T *numbers, std::vector<T> &left, int32_t *kept) {
    const int64_t strips = (rule.columns + STRIP - 1) / STRIP;
    const T nothing = -std::numeric_limits<T>::infinity();
    left.assign(strips * STRIP + strips, nothing);
    T *largest = left.data() + strips * STRIP, total = 0;
    for (int64_t c = 0; c < rule.columns; ++c) left[c] = numbers[c] > 0 && !std::isnan(scores[c]) ? scores[c] : nothing, total += numbers[c];
    const auto look = [&](int64_t strip) {
        T most = nothing;
#pragma omp simd reduction(max : most)
        for (int64_t c = 0; c < STRIP; ++c) most = std::max(most, left[strip * STRIP + c]);
        largest[strip] = most;
    };
    for (int64_t strip = 0; strip < strips; ++strip) look(strip);
    T before = 0;
    int32_t found = 0;
    while (found < rule.columns) {
        const int64_t strip = std::max_element(largest, largest + strips) - largest;
        if (largest[strip] == nothing) break;
        const int64_t at = std::find(left.data() + strip * STRIP, left.data() + (strip + 1) * STRIP, largest[strip]) - left.data();
        // a column is kept where that brings the row nearer to its budget than stopping before it; the first one always is
        if (found && !(before + numbers[at] / 2 <= T(rule.level) * total)) break;
        kept[found++] = at;
        before += numbers[at];
        left[at] = nothing;
        look(strip);
    }
    return found;
}

// columns above the threshold of entmax less the level; a column stands for as many equal keys as its number says
template <class T> int32_t by_margin(const Choice &rule, const T *scores, const T *numbers, std::vector<T> &x, int32_t *kept) {
    const T scale = rule.alpha - 1.0;
    T peak = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < rule.columns; ++c)
        if (numbers[c] > 0) peak = std::max(peak, scores[c]);
    if (std::isinf(peak)) return 0;
    // what may be above the threshold, which is at most 1 below the peak: excess over it, and for how many keys
    x.resize(2 * rule.columns);
    T *above = x.data(), *many = x.data() + rule.columns, threshold = -1;
    int64_t some = 0;
    for (int64_t c = 0; c < rule.columns; ++c) {
        const T below = (scores[c] - peak) * scale;
        above[some] = below, many[some] = numbers[c];
        some += numbers[c] > 0 && below > T(-1);
    }
    for (int step = 0; step < 160; ++step) {  // Newton's method on the p-norm, from the left: sparsefinder.entmax_kernels
        T sum = 0, slope = 0;
        if (rule.alpha == 1.5) {
#pragma omp simd reduction(+ : sum, slope)
            for (int64_t n = 0; n < some; ++n) {
                const T e = std::max(above[n] - threshold, T(0));
                sum += many[n] * e * e, slope += many[n] * e;
            }
        } else {
            for (int64_t n = 0; n < some; ++n) {
                const T e = above[n] - threshold;
                if (!(e > 0)) continue;
                const T less = rule.alpha == 2.0 ? T(1) : std::pow(e, T((2.0 - rule.alpha) / (rule.alpha - 1.0)));
                sum += many[n] * less * e, slope += many[n] * less;
            }
        }
        const T root = rule.alpha == 1.5 ? std::sqrt(sum) : std::pow(sum, T(2.0 - rule.alpha));
        const T move = (sum - root) / std::max(slope, T(1e-30));
        threshold += move;
        if (!(move > 2 * std::numeric_limits<T>::epsilon())) break;
    }
    int32_t found = 0;
    for (int64_t c = 0; c < rule.columns; ++c) {
        kept[found] = c;
        found += numbers[c] > 0 && (scores[c] - peak) * scale >= threshold - T(rule.level);
    }
    return found;
}

template <class T> void choose(const Choice &rule, const T *scores, const T *numbers, int32_t *kept, int32_t *counts) {
#pragma omp parallel num_threads(rule.threads)
    {
        std::vector<T> scratch;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rule.groups * rule.rows; ++row) {
            const T *own = numbers + (rule.numbers_row ? row : row / rule.rows) * rule.columns, *of = scores + row * rule.columns;
            int32_t *to = kept + row * rule.columns;
            counts[row] = rule.budget ? by_budget(rule, of, own, scratch, to) : by_margin(rule, of, own, scratch, to);
        }
    }
}

}  // namespace

extern "C" {
void nearest_float32(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count, int64_t top,
                     int64_t threads, const float *x, const float *centres, int64_t *ids) {
    nearest(batch, heads, tokens, size, runs, count, top, threads, x, centres, ids);
}
void nearest_float64(int64_t batch, int64_t heads, int64_t tokens, int64_t size, int64_t runs, int64_t count, int64_t top,
                     int64_t threads, const double *x, const double *centres, int64_t *ids) {
    nearest(batch, heads, tokens, size, runs, count, top, threads, x, centres, ids);
}
void moments_float32(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const float *x,
                     const int64_t *ids, float *numbers, float *mean, float *variance) {
    moments(parts, tokens, size, count, threads, x, ids, numbers, mean, variance);
}
void moments_float64(int64_t parts, int64_t tokens, int64_t size, int64_t count, int64_t threads, const double *x,
                     const int64_t *ids, double *numbers, double *mean, double *variance) {
    moments(parts, tokens, size, count, threads, x, ids, numbers, mean, variance);
}
void choose_float32(const Choice *rule, const float *scores, const float *numbers, int32_t *kept, int32_t *counts) {
    choose(*rule, scores, numbers, kept, counts);
}
void choose_float64(const Choice *rule, const double *scores, const double *numbers, int32_t *kept, int32_t *counts) {
    choose(*rule, scores, numbers, kept, counts);
}
// rows (rows, columns) with their counts → (rows, most), -1 behind the last one
void spread(int64_t rows, int64_t columns, int64_t most, int64_t threads, const int32_t *kept, const int32_t *counts, int64_t *ids) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < most; ++n) ids[row * most + n] = n < counts[row] ? kept[row * columns + n] : -1;
}
}
