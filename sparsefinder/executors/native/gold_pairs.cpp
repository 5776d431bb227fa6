// The support of entmax as a list of pairs, and the hinge that projections learn from it: see gold_pairs.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "boundary.hpp"
#include "entmax.hpp"
#include "panels.hpp"

namespace {

struct Rows {
    int64_t heads, tokens, size;  // H, n, D
    int64_t causal, threads;
    double alpha;
};

// the keys of every query, head by head, one query after the other
using Support = std::vector<std::vector<int32_t>>;

template <class T> std::unique_ptr<Support> support(const Rows &g, const T *q, const T *k, int64_t *counts) {
    auto pairs = std::make_unique<Support>(g.heads);
    const T scale = T((g.alpha - 1.0) / std::sqrt(double(g.size)));
    const auto one = [&](int64_t head) {
        const Panels<T> keys(k + head * g.tokens * g.size, g.tokens, g.size);
        std::vector<T> scores(AT_ONCE * keys.width()), above(g.tokens);
        std::vector<int32_t> columns(g.tokens), &own = (*pairs)[head];
        for (int64_t from = 0; from < g.tokens; from += AT_ONCE) {
            const int64_t rows = std::min(AT_ONCE, g.tokens - from);
            std::fill(scores.begin(), scores.end(), T(0));
            keys.multiply(q + (head * g.tokens + from) * g.size, rows, scores.data());
            for (int64_t i = 0; i < rows; ++i) {
                const T *x = scores.data() + i * keys.width();
                const int64_t seen = g.causal ? from + i + 1 : g.tokens;
                const T peak = largest(x, seen);
                // a row with a NaN has no support
                const int64_t some = std::max<int64_t>(
                    0, near_peak(x, seen, peak, scale, above.data(), columns.data(), [](int64_t j) { return j; }));
                const T threshold = threshold_of(above.data(), some, g.alpha, [](int64_t) { return T(1); });
                int64_t kept = 0;
                for (int64_t n = 0; n < some; ++n) {
                    columns[kept] = columns[n];
                    kept += power(std::max(above[n] - threshold, T(0)), g.alpha) > 0;
                }
                own.insert(own.end(), columns.begin(), columns.begin() + kept);
                counts[head * g.tokens + from + i] = kept;
            }
        }
    };
    Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(g.threads)
    for (int64_t head = 0; head < g.heads; ++head) failure.guard([&] { one(head); });
    failure.rethrow();
    return pairs;
}

struct Hinge {
    int64_t heads, tokens, size, pairs;  // H, n, R, P
    int64_t by_row, threads;
    double margin;
    const int64_t *rows, *columns, *zeros;  // (P), (P), (H·n): the positives, sorted
    const double *chance;                   // (P) in [0, 1)
};

// the zero of a row that a chance falls on, by the sorted columns of its positives: the first `order` zeros lie before it
int64_t zero_of(double chance, int64_t zeros, const int64_t *columns, int64_t count) {
    const int64_t order = chance * zeros;
    // how many positives lie before it: columns[m] - m zeros lie before positive m
    int64_t before = 0;
    for (int64_t left = count; left > 0;) {
        const int64_t half = (left + 1) / 2, m = before + half - 1;
        before += columns[m] - m <= order ? half : 0;
        left -= half;
    }
    return order + before;
}

// The loss, and its gradients, which are zero when it begins. Each head is one thread's: its sums have one order.
template <class T> double hinge(const Hinge &h, const T *q, const T *k, T *dq, T *dk) {
    std::vector<double> losses(h.heads, 0.0);
    const auto one = [&](int64_t head) {
        const int64_t first = head * h.tokens, size = h.size;
        const int64_t end = std::lower_bound(h.rows, h.rows + h.pairs, first + h.tokens) - h.rows;
        std::vector<int64_t> negatives;
        std::vector<T> gaps;
        int64_t learned = 0, next;
        double loss = 0;
        for (int64_t from = std::lower_bound(h.rows, h.rows + h.pairs, first) - h.rows; from < end; from = next) {
            const int64_t row = h.rows[from];
            for (next = from; next < end && h.rows[next] == row;) ++next;
            if (!h.zeros[row]) continue;
            const int64_t count = next - from;
            const T *x = q + row * size;
            T sum = T(h.margin);
            negatives.resize(count), gaps.resize(count);
            for (int64_t n = 0; n < count; ++n) {
                negatives[n] = first + zero_of(h.chance[from + n], h.zeros[row], h.columns + from, count);
                const T *near = k + (first + h.columns[from + n]) * size, *far = k + negatives[n] * size;
                T gap = 0;
                for (int64_t r = 0; r < size; ++r) gap += (x[r] - near[r]) * (x[r] - near[r]) - (x[r] - far[r]) * (x[r] - far[r]);
                gaps[n] = T(h.margin) + gap, sum += gap;
            }
            learned += count;
            if (h.by_row) loss += std::max(sum, T(0));
            for (int64_t n = 0; n < count; ++n) {
                if (!h.by_row) loss += std::max(gaps[n], T(0));
                if ((h.by_row ? sum : gaps[n]) <= 0) continue;  // a NaN goes on
                const int64_t near = (first + h.columns[from + n]) * size, far = negatives[n] * size;
                for (int64_t r = 0; r < size; ++r) {
                    dq[row * size + r] += 2 * (k[far + r] - k[near + r]);
                    dk[near + r] -= 2 * (x[r] - k[near + r]);
                    dk[far + r] += 2 * (x[r] - k[far + r]);
                }
            }
        }
        const double share = 1.0 / double(h.heads * std::max<int64_t>(1, h.by_row ? h.tokens : learned));
        losses[head] = loss * share;
        for (int64_t n = first * size; n < (first + h.tokens) * size; ++n) dq[n] *= T(share), dk[n] *= T(share);
    };
    Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(h.threads)
    for (int64_t head = 0; head < h.heads; ++head) failure.guard([&] { one(head); });
    failure.rethrow();
    double sum = 0;
    for (const double loss : losses) sum += loss;
    return sum;
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                  \
    int support_##NAME(const Rows *g, const T *q, const T *k, int64_t *counts, Support **pairs) {            \
        return status_of([&] { *pairs = support(*g, q, k, counts).release(); });                             \
    }                                                                                                        \
    int hinge_##NAME(const Hinge *h, const T *q, const T *k, T *dq, T *dk, double *loss) {                   \
        return status_of([&] { *loss = hinge(*h, q, k, dq, dk); });                                          \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
// a support → rows and columns of its pairs
int list(const Support *pairs, const Rows *g, const int64_t *counts, int64_t *rows, int64_t *columns) {
    for (int64_t head = 0; head < g->heads; ++head) {
        columns = std::copy((*pairs)[head].begin(), (*pairs)[head].end(), columns);
        for (int64_t row = head * g->tokens; row < (head + 1) * g->tokens; ++row) rows = std::fill_n(rows, counts[row], row);
    }
    return FINE;
}
int release(Support *pairs) {
    delete pairs;
    return FINE;
}
int64_t layout(int64_t n) { return layout_of<Rows, Hinge>(1, n); }
}
