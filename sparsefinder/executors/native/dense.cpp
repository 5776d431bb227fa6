// Exact dense entmax attention without an N x N matrix: see dense.py.
//
// A key whose x = (alpha - 1) q·k / sqrt(D) lies 1 or more below the largest of its row has probability zero, whatever the others
// are. So a filter (filters.hpp) goes over all keys with a bound that rises with the best score seen so far; the few that pass are
// multiplied exactly and kept; the threshold, the product with v and the backward pass see those alone. Kept for the backward pass
// are two numbers a row, its peak and its threshold: with them the support is found again, and nothing else is computed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "boundary.hpp"
#include "dense_rows.hpp"
#include "filter_avx2.hpp"
#include "filters.hpp"

namespace {

constexpr int64_t BLOCK = 64;   // queries that go over the keys together

// the keys of every block's queries, one query after the other, each in order, and their probabilities
template <class T> using Support = std::vector<std::vector<std::pair<int32_t, T>>>;

// the keys of an example that are no padding, in order, and a filter over them for each head
template <class T, class Filter> struct Head {
    std::vector<int32_t> ids;
    std::unique_ptr<Filter> filter;
    bool finite = true;
    // how many of them stand before token j
    int64_t position_of(int64_t j) const {
        if (!ids.empty() && ids.back() + 1 == int64_t(ids.size())) return std::clamp<int64_t>(j, 0, ids.size());  // no padding between
        return std::lower_bound(ids.begin(), ids.end(), j) - ids.begin();
    }
};

template <class T, class Filter> class Attention : RowsOf<T> {
    using Rows = RowsOf<T>;
    using Rows::alpha, Rows::key, Rows::key_head, Rows::mix, Rows::multiply, Rows::p_, Rows::pull, Rows::query, Rows::raise;
    using Rows::solve, Rows::unit, Rows::value, Rows::weigh;

   public:
    using Rows::Rows;

    void forward(T *out, double *peaks, double *thresholds) {
        prepare();
        const int64_t blocks = (p_.queries + BLOCK - 1) / BLOCK;
        in_parallel(p_.batch * p_.heads * blocks, [&](int64_t n, Scratch &scratch) {
            for_block(n / blocks, n % blocks, nullptr, nullptr, scratch, [&](int64_t head, Row<T> &row) {
                const int64_t at = head * p_.queries + row.i;
                solve(head, row, peaks[at], thresholds[at]);
                mix(head, row, out + at * p_.size);
            });
        });
    }

    // gradients of alpha (B, H) too where asked for
    void backward(const T *gradient, const double *peaks, const double *thresholds, T *dq, T *dk, T *dv, double *dalpha) {
        prepare();
        const int64_t group = p_.heads / p_.key_heads, blocks = (p_.queries + BLOCK - 1) / BLOCK;
        // the gradients of a head's keys and values are sums over queries: one thread has them all, and their order is one
        in_parallel(p_.batch * p_.key_heads, [&](int64_t n, Scratch &scratch) {
            for (int64_t head = n * group; head < (n + 1) * group; ++head)
                for (int64_t block = 0; block < blocks; ++block)
                    for_block(head, block, peaks, thresholds, scratch, [&](int64_t, Row<T> &row) {
                        const int64_t at = head * p_.queries + row.i;
                        weigh(head, row, peaks[at], thresholds[at]);
                        pull(head, row, gradient + at * p_.size, dq + at * p_.size, dk, dv, dalpha, scratch.along, scratch.slopes);
                    });
        });
    }

    // what forward multiplies with v, as lists; `counts` (B, H, N_q): how many pairs each query has, zero where it begins
    void support(Support<T> &pairs, int64_t *counts) {
        prepare();
        const int64_t blocks = (p_.queries + BLOCK - 1) / BLOCK;
        pairs.resize(p_.batch * p_.heads * blocks);
        in_parallel(pairs.size(), [&](int64_t n, Scratch &scratch) {
            for_block(n / blocks, n % blocks, nullptr, nullptr, scratch, [&](int64_t head, Row<T> &row) {
                double peak, threshold;
                solve(head, row, peak, threshold);
                const size_t before = pairs[n].size();
                for (size_t m = 0; m < row.keys.size(); ++m)  // a row with a NaN has no support
                    if (row.weights[m] > 0) pairs[n].emplace_back(row.keys[m], row.weights[m]);
                std::sort(pairs[n].begin() + before, pairs[n].end());
                counts[head * p_.queries + row.i] = pairs[n].size() - before;
            });
        });
    }

   private:
    struct Scratch {
        std::vector<Row<T>> rows = std::vector<Row<T>>(BLOCK);
        std::vector<typename Filter::Queries> queries = std::vector<typename Filter::Queries>(BLOCK / ROWS);
        std::vector<Passed<T>> passed = std::vector<Passed<T>>(ROWS);
        std::vector<T> along, slopes;
    };

    // `work(n, scratch)` for n below `count`, on all threads
    template <class F> void in_parallel(int64_t count, const F &work) const {
        Failure failure;
#pragma omp parallel num_threads(p_.threads)
        {
            std::optional<Scratch> scratch;
            failure.guard([&] { scratch.emplace(); });
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < count; ++n) failure.guard([&] { work(n, *scratch); });
        }
        failure.rethrow();
    }

    std::vector<Head<T, Filter>> heads_;  // (B, H_k)

    void prepare() {
        heads_.resize(p_.batch * p_.key_heads);
        Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(p_.threads)
        for (int64_t n = 0; n < p_.batch * p_.key_heads; ++n) failure.guard([&] { prepare(n); });
        failure.rethrow();
    }

    void prepare(int64_t n) {
        Head<T, Filter> &h = heads_[n];
        const uint8_t *valid = p_.key_valid + n / p_.key_heads * p_.keys;
        const T *k = this->k_ + n * p_.keys * p_.size;
        for (int64_t j = 0; j < p_.keys; ++j)
            if (valid[j]) {
                h.ids.push_back(j);
                h.finite &= finite(k + j * p_.size, p_.size);
            }
        if (h.finite) h.filter = std::make_unique<Filter>(k, h.ids, p_.size);
    }

    bool allowed(int64_t head, int64_t i, int64_t j) const {
        if (j < i - p_.back || j > i + p_.ahead) return false;
        return !p_.mask || p_.mask[head / p_.heads * p_.mask_batch + head % p_.heads * p_.mask_head + i * p_.mask_row + j];
    }

    // `each(head, row)` for the queries of a block that are no padding, with all keys that can be in their support. With the peaks
    // and thresholds of a forward pass these are no others.
    template <class F>
    void for_block(int64_t head, int64_t block, const double *peaks, const double *thresholds, Scratch &s, const F &each) const {
        const Head<T, Filter> &h = heads_[key_head(head)];
        const uint8_t *valid = p_.query_valid + head / p_.heads * p_.queries;
        int64_t count = 0;
        bool all_finite = h.finite;
        for (int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, p_.queries); ++i) {
            if (!valid[i]) continue;
            Row<T> &row = s.rows[count++];
            row.i = i, row.keys.clear(), row.products.clear();
            row.peak = row.least = -std::numeric_limits<T>::infinity();
            if (peaks) row.least = T(peaks[head * p_.queries + i] + (thresholds[head * p_.queries + i] - SLACK) / unit(head));
            all_finite &= finite(query(head, i), p_.size);
        }
        if (!count || h.ids.empty()) return;
        const int64_t first_i = s.rows[0].i, last_i = s.rows[count - 1].i;
        const int64_t begin = h.position_of(first_i - p_.back), end = h.position_of(last_i + p_.ahead + 1);
        if (all_finite)
            filtered(head, h, count, begin, end, h.position_of(first_i), !peaks, s);
        else  // as dense attention has it, whoever meets what is no number
            for (int64_t r = 0; r < count; ++r) {
                Row<T> &row = s.rows[r];
                for (int64_t c = begin; c < end; ++c)
                    if (allowed(head, row.i, h.ids[c])) row.keys.push_back(h.ids[c]);
                multiply(head, row, 0);
                for (const double product : row.products) row.peak = std::max(row.peak, product);
            }
        for (int64_t r = 0; r < count; ++r) each(head, s.rows[r]);
    }

    // keys begin to end (of the filter's order), those about `near` first: there the best ones often are. `raising`: the bounds of
    // the queries rise on the way; else they stay as they are.
    void filtered(int64_t head, const Head<T, Filter> &h, int64_t count, int64_t begin, int64_t end, int64_t near, bool raising,
                  Scratch &s) const {
        if (begin >= end) return;
        for (int64_t r = 0; r < count; r += ROWS) {
            const T *q[ROWS];
            for (int64_t n = r; n < std::min(r + ROWS, count); ++n) q[n - r] = query(head, s.rows[n].i);
            h.filter->take(q, std::min(ROWS, count - r), s.queries[r / ROWS]);
        }
        constexpr int64_t EACH = CHUNK / Filter::KEYS, FIRST = std::max<int64_t>(1, 96 / Filter::KEYS);
        const int64_t low = begin / Filter::KEYS, high = (end + Filter::KEYS - 1) / Filter::KEYS;  // panels
        const int64_t own = std::min(std::max(near / Filter::KEYS, low), std::max(high - FIRST, low));
        const auto over = [&](int64_t from, int64_t to) {
            for (; from < to; from += EACH)
                for (int64_t r = 0; r < count; r += ROWS)
                    look(head, h, r, std::min(ROWS, count - r), from, std::min(from + EACH, to), begin, end, raising, s);
        };
        // a few first, from which the bounds rise from nothing
        over(own, std::min(own + FIRST, high)), over(own + FIRST, high), over(low, own);
    }

    // a chunk of panels, for a few queries
    void look(int64_t head, const Head<T, Filter> &h, int64_t first, int64_t count, int64_t panel, int64_t to, int64_t begin,
              int64_t end, bool raising, Scratch &s) const {
        T least[ROWS];
        for (int64_t r = 0; r < count; ++r) least[r] = s.rows[first + r].least, s.passed[r].count = 0;
        for (; panel < to; ++panel) h.filter->pass(s.queries[first / ROWS], count, panel, least, s.passed.data());
        for (int64_t r = 0; r < count; ++r) {
            Passed<T> &passed = s.passed[r];
            if (!passed.count) continue;
            Row<T> &row = s.rows[first + r];
            hide(head, h, row, begin, end, passed);
            if (raising && row.keys.empty()) {  // the best one is near its bound: it rules out most of the first ones
                const T most = largest(passed.upper, passed.count);
                if (most == -std::numeric_limits<T>::infinity()) continue;
                const int64_t best = std::find(passed.upper, passed.upper + passed.count, most) - passed.upper;
                row.peak = dot<double>(query(head, row.i), key(head, h.ids[passed.position[best]]), p_.size);
                row.least = T(row.peak - (1 + SLACK) / unit(head));
            }
            const size_t before = row.keys.size();
            size_t some = before;
            row.keys.resize(before + passed.count);
            for (int64_t n = 0; n < passed.count; ++n) {  // written always, kept sometimes: no branch to guess
                row.keys[some] = h.ids[std::min<int64_t>(passed.position[n], h.ids.size() - 1)];
                some += passed.upper[n] >= row.least && passed.upper[n] != -std::numeric_limits<T>::infinity();
            }
            row.keys.resize(some);
            if (some == before) continue;
            multiply(head, row, before);
            if (raising) raise(head, row, before);
        }
    }

    // What a query may not see has a bound of -inf: it is outside the band or the mask, or fills the last panel up.
    void hide(int64_t head, const Head<T, Filter> &h, const Row<T> &row, int64_t begin, int64_t end, Passed<T> &passed) const {
        const T none = -std::numeric_limits<T>::infinity();
        if (p_.mask) {
            for (int64_t n = 0; n < passed.count; ++n) {
                const int64_t c = passed.position[n];
                if (c < begin || c >= end || !allowed(head, row.i, h.ids[c])) passed.upper[n] = none;
            }
            return;
        }
        // keys are in order, so that a band is a range of them
        const int32_t low = std::max(begin, h.position_of(row.i - p_.back)), high = std::min(end, h.position_of(row.i + p_.ahead + 1));
        for (int64_t n = 0; n < passed.count; ++n)
            passed.upper[n] = (passed.position[n] >= low) & (passed.position[n] < high) ? passed.upper[n] : none;
    }
};

// with the fastest filter of this processor
template <class T, class F> void with_filter(const Problem &p, const T *q, const T *k, const T *v, const F &run) {
#ifdef SPARSEFINDER_X86
    if constexpr (std::is_same_v<T, float>) {
        if (p.without < 1 && Int8Filter::works()) return run(Attention<T, Int8Filter>(p, q, k, v));
        if (p.without < 2 && Int7Filter::works()) return run(Attention<T, Int7Filter>(p, q, k, v));
    }
#endif
    run(Attention<T, PlainFilter<T>>(p, q, k, v));
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                              \
    int forward_##NAME(const Problem *p, const T *q, const T *k, const T *v, T *out, double *peaks, double *thresholds) { \
        return status_of([&] {                                                                                          \
            with_filter(*p, q, k, v, [&](auto &&attention) { attention.forward(out, peaks, thresholds); });             \
        });                                                                                                             \
    }                                                                                                                   \
    int backward_##NAME(const Problem *p, const T *q, const T *k, const T *v, const T *gradient, const double *peaks,   \
                        const double *thresholds, T *dq, T *dk, T *dv, double *dalpha) {                                \
        return status_of([&] {                                                                                          \
            with_filter(*p, q, k, v, [&](auto &&attention) {                                                            \
                attention.backward(gradient, peaks, thresholds, dq, dk, dv, dalpha);                                    \
            });                                                                                                         \
        });                                                                                                             \
    }                                                                                                                   \
    int support_##NAME(const Problem *p, const T *q, const T *k, int64_t *counts, Support<T> **pairs) {                  \
        return status_of([&] {                                                                                          \
            auto found = std::make_unique<Support<T>>();                                                                \
            with_filter(*p, q, k, (const T *)nullptr, [&](auto &&attention) { attention.support(*found, counts); });    \
            *pairs = found.release();                                                                                   \
        });                                                                                                             \
    }                                                                                                                   \
    int list_##NAME(const Support<T> *pairs, int64_t *keys, T *probabilities) {                                         \
        for (const auto &block : *pairs)                                                                                \
            for (const auto &[key, probability] : block) *keys++ = key, *probabilities++ = probability;                 \
        return FINE;                                                                                                    \
    }                                                                                                                   \
    int release_##NAME(Support<T> *pairs) {                                                                             \
        delete pairs;                                                                                                   \
        return FINE;                                                                                                    \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
int64_t layout(int64_t n) { return layout_of<Problem>(1, n); }
}
