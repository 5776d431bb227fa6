// The hinge that projections learn from pairs of positive probability: see gold_pairs.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "boundary.hpp"

namespace {

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
    int hinge_##NAME(const Hinge *h, const T *q, const T *k, T *dq, T *dk, double *loss) {                   \
        return status_of([&] { *loss = hinge(*h, q, k, dq, dk); });                                          \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
int64_t layout(int64_t n) { return layout_of<Hinge>(1, n); }
}
