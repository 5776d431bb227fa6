// Attention over the union of buckets, a window and global tokens, one query at a time: see bucketed.py.
//
// A query lists its keys (each once, by a stamp), multiplies with those alone, solves entmax on what can be above the threshold,
// and adds up the values of its support. Nothing is kept but that row. Forward, all threads share the queries of one head and find
// its keys in the cache. Backward, a head of keys belongs to one thread: the gradients of its keys and values are sums over the
// queries of all heads that share it, which then have one order, and one result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "boundary.hpp"
#include "entmax.hpp"
#include "exponential.hpp"
#include "panels.hpp"
#include "vectors.hpp"

namespace {

// a graph in compressed form; the same fields, in this order, in bucketed.py
struct Graph {
    int64_t batch, heads, group;          // B, H, heads of queries that share one of keys
    int64_t queries, tokens, size;        // N_q, N_k, D
    int64_t q_slots, k_slots, buckets;    // P, P', bucket ids in all
    int64_t back, ahead;                  // the window reaches from i - back to i + ahead; ahead < -back: none
    int64_t causal, threads;
    const int64_t *q_ids, *k_ids;         // (B, H, N_q, P), (B, H, N_k, P'), -1 for none
    const uint8_t *query_valid, *valid;   // (B, N_q), (B, N_k)
    const uint8_t *is_global;             // (B, N_k), where queries and keys are the same tokens
    double alpha;
};

// an id, or one more than all of them for whatever names no bucket
int64_t bucket(const Graph &g, int64_t id) { return id >= 0 && id < g.buckets ? id : g.buckets; }

// who is in each bucket of one head, and the order in which queries are handled: those of a bucket find its keys in the cache
struct Head {
    std::vector<int32_t> first, members, order, globals;
};

// where the members of each bucket begin, those of none behind the last, by the first `used` of the slots
std::vector<int32_t> offsets(const Graph &g, int64_t tokens, const int64_t *ids, int64_t slots, int64_t used,
                             const uint8_t *valid) {
    std::vector<int32_t> first(g.buckets + 2, 0);
    for (int64_t i = 0; i < tokens; ++i)
        for (int64_t p = 0; p < used && valid[i]; ++p) ++first[bucket(g, ids[i * slots + p]) + 1];
    for (int64_t b = 0; b <= g.buckets; ++b) first[b + 1] += first[b];
    return first;
}

Head prepare(const Graph &g, int64_t example, int64_t head) {
    const uint8_t *valid = g.valid + example * g.tokens, *is_global = g.is_global + example * g.tokens;
    const uint8_t *query_valid = g.query_valid + example * g.queries;
    const int64_t *q_ids = g.q_ids + head * g.queries * g.q_slots, *k_ids = g.k_ids + head * g.tokens * g.k_slots;
    Head h;
    h.first = offsets(g, g.tokens, k_ids, g.k_slots, g.k_slots, valid);
    h.members.resize(h.first.back());
    auto at = h.first;
    for (int64_t j = 0; j < g.tokens; ++j) {
        if (valid[j] && is_global[j]) h.globals.push_back(j);
        for (int64_t p = 0; p < g.k_slots && valid[j]; ++p) h.members[at[bucket(g, k_ids[j * g.k_slots + p])]++] = j;
    }
    // by the first slot, which is filled before the others
    const int64_t used = std::min<int64_t>(g.q_slots, 1);
    auto next_of = offsets(g, g.queries, q_ids, g.q_slots, used, query_valid);
    h.order.resize(std::count(query_valid, query_valid + g.queries, 1));
    int32_t next = 0;
    for (int64_t i = 0; i < g.queries; ++i)
        if (query_valid[i]) h.order[used ? next_of[bucket(g, q_ids[i * g.q_slots])]++ : next++] = i;
    return h;
}

template <class T> struct Row {
    std::vector<int32_t> stamp, keys, support;
    std::vector<T> scores, excess, weights;
    explicit Row(int64_t tokens) : stamp(tokens, -1) {}
};

// every key of query i, once, into row.keys
template <class T> void list_keys(const Graph &g, const Head &h, int64_t example, int64_t head, int32_t i, Row<T> &row) {
    const uint8_t *valid = g.valid + example * g.tokens;
    const int32_t tokens = g.tokens, last = g.causal ? i : tokens - 1;
    row.keys.clear();
    const auto take = [&](int32_t j) {
        if (j <= last && row.stamp[j] != i) {
            row.stamp[j] = i;
            row.keys.push_back(j);
        }
    };
    if (i < tokens && g.is_global[example * g.tokens + i]) {
        for (int32_t j = 0; j <= last; ++j)
            if (valid[j]) take(j);
        return;
    }
    const int64_t *ids = g.q_ids + (head * g.queries + i) * g.q_slots;
    for (int64_t p = 0; p < g.q_slots; ++p)
        if (const int64_t id = bucket(g, ids[p]); id < g.buckets)
            for (int32_t m = h.first[id]; m < h.first[id + 1]; ++m) take(h.members[m]);
    for (int64_t j = std::max<int64_t>(i - g.back, 0); j <= std::min<int64_t>(i + g.ahead, last); ++j)
        if (valid[j]) take(j);
    for (const int32_t j : h.globals) take(j);
}

template <class T> void multiply(const T *q, const T *k, int64_t size, T scale, Row<T> &row) {
    const int64_t count = row.keys.size();
    row.scores.resize(count);
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {  // four at a time: additions do not wait for each other
        for (int64_t m = n; m < n + 4; ++m) prefetch(k, row.keys, m, size);
        const T *a = k + row.keys[n] * size, *b = k + row.keys[n + 1] * size;
        const T *c = k + row.keys[n + 2] * size, *d = k + row.keys[n + 3] * size;
        T s = 0, t = 0, u = 0, w = 0;
#pragma omp simd reduction(+ : s, t, u, w)
        for (int64_t x = 0; x < size; ++x) s += q[x] * a[x], t += q[x] * b[x], u += q[x] * c[x], w += q[x] * d[x];
        row.scores[n] = s * scale, row.scores[n + 1] = t * scale, row.scores[n + 2] = u * scale, row.scores[n + 3] = w * scale;
    }
    for (; n < count; ++n) row.scores[n] = dot<T>(q, k + row.keys[n] * size, size) * scale;
}

// probabilities of row.scores: keys of positive weight into row.support, their weights into row.weights
template <class T> void normalize(double alpha, Row<T> &row) {
    const int64_t count = row.keys.size();
    row.support.resize(count), row.excess.resize(count), row.weights.resize(count);
    if (!count) return;
    const T peak = largest(row.scores.data(), count);
    if (alpha == 1.0) {
        const T total = exponentials(row.scores.data(), count, peak, row.weights.data());
        for (T &w : row.weights) w /= total;
        row.support = row.keys;
        return;
    }
    const int64_t some = near_peak(row.scores.data(), count, peak, T(alpha - 1.0), row.excess.data(), row.support.data(),
                                   [&](int64_t n) { return row.keys[n]; });
    if (some < 0) {  // as dense attention has it: whoever meets a NaN is NaN
        row.support = row.keys;
        row.weights.assign(count, std::numeric_limits<T>::quiet_NaN());
        return;
    }
    const T *x = row.excess.data(), threshold = threshold_of(x, some, alpha, [](int64_t) { return T(1); });
    int64_t kept = 0;
    for (int64_t n = 0; n < some; ++n) {
        const T e = std::max(x[n] - threshold, T(0));
        row.support[kept] = row.support[n], row.weights[kept] = power(e, alpha);
        kept += e > 0;
    }
    row.support.resize(kept), row.weights.resize(kept);
    if (alpha != 1.5 && alpha != 2.0) {  // near 1 the power is large and makes much of the last digit of the threshold
        T total = 0;
        for (const T w : row.weights) total += w;
        for (T &w : row.weights) w /= total;
    }
}

// `each(head, its buckets, query, row)` for every query, head after head: all threads share the keys and values of one
template <class T, class F> void for_queries(const Graph &g, const F &each) {
    const int64_t some = std::max<int64_t>(1, std::min<int64_t>(64, g.queries / (4 * g.threads)));
    Head h;
    Failure failure;
#pragma omp parallel num_threads(g.threads)
    {
        std::optional<Row<T>> row;
        failure.guard([&] { row.emplace(g.tokens); });
        for (int64_t head = 0; head < g.batch * g.heads; ++head) {
#pragma omp single
            failure.guard([&] { h = prepare(g, head / g.heads, head); });
            if (row) std::fill(row->stamp.begin(), row->stamp.end(), -1);
#pragma omp for schedule(dynamic, some)
            for (size_t n = 0; n < h.order.size(); ++n) failure.guard([&] { each(head, h, h.order[n], *row); });
        }
    }
    failure.rethrow();
}

template <class T> void forward(const Graph &g, const T *q, const T *k, const T *v, T *out) {
    const T scale = T(1.0 / std::sqrt(double(g.size)));
    for_queries<T>(g, [&](int64_t head, const Head &h, int32_t i, Row<T> &row) {
        const int64_t at = head / g.group * g.tokens * g.size, query = (head * g.queries + i) * g.size;
        list_keys(g, h, head / g.heads, head, i, row);
        multiply(q + query, k + at, g.size, scale, row);
        normalize(g.alpha, row);
        for (size_t n = 0; n < row.support.size(); ++n) {
            prefetch(v + at, row.support, n, g.size);
            add(out + query, v + at + row.support[n] * g.size, row.weights[n], g.size);
        }
    });
}

template <class T>
void backward(const Graph &g, const T *q, const T *k, const T *v, const T *gradient, T *dq, T *dk, T *dv) {
    const T scale = T(1.0 / std::sqrt(double(g.size)));
    const auto one = [&](int64_t head) {
        const int64_t example = head / g.heads, at = head / g.group * g.tokens * g.size;
        const Head h = prepare(g, example, head);
        Row<T> row(g.tokens);
        for (const int32_t i : h.order) {
            const int64_t query = (head * g.queries + i) * g.size;
            list_keys(g, h, example, head, i, row);
            multiply(q + query, k + at, g.size, scale, row);
            normalize(g.alpha, row);
            // dz = s (g - (s·g) / Σs) with s = p^(2 - alpha), g the gradients of the probabilities
            row.keys.swap(row.support);
            multiply(gradient + query, v + at, g.size, T(1), row);
            T weighted = 0, sum = 0;
            const int64_t count = row.keys.size();
            const auto s = [&](int64_t n) {
                const T p = row.weights[n];
                return g.alpha == 1.0 ? p : g.alpha == 1.5 ? std::sqrt(p) : g.alpha == 2.0 ? T(1) : std::pow(p, T(2.0 - g.alpha));
            };
            for (int64_t n = 0; n < count; ++n) weighted += s(n) * row.scores[n], sum += s(n);
            weighted /= std::max(sum, T(1e-30));
            for (int64_t n = 0; n < count; ++n) {
                const int64_t j = at + row.keys[n] * g.size;
                const T dz = s(n) * (row.scores[n] - weighted) * scale;
                add(dv + j, gradient + query, row.weights[n], g.size);
                add(dk + j, q + query, dz, g.size);
                add(dq + query, k + j, dz, g.size);
            }
        }
    };
    Failure failure;
#pragma omp parallel for schedule(dynamic) num_threads(g.threads)
    for (int64_t of_keys = 0; of_keys < g.batch * g.heads / g.group; ++of_keys)
        for (int64_t n = 0; n < g.group; ++n) failure.guard([&] { one(of_keys * g.group + n); });
    failure.rethrow();
}

void count_pairs(const Graph &g, int64_t *pairs) {
    for_queries<float>(g, [&](int64_t head, const Head &h, int32_t i, Row<float> &row) {
        list_keys(g, h, head / g.heads, head, i, row);
#pragma omp atomic
        pairs[head] += row.keys.size();
    });
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                             \
    int forward_##NAME(const Graph *g, const T *q, const T *k, const T *v, T *out) {                                    \
        return status_of([&] { forward(*g, q, k, v, out); });                                                           \
    }                                                                                                                   \
    int backward_##NAME(const Graph *g, const T *q, const T *k, const T *v, const T *gradient, T *dq, T *dk, T *dv) {   \
        return status_of([&] { backward(*g, q, k, v, gradient, dq, dk, dv); });                                         \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
int count(const Graph *g, int64_t *pairs) {
    return status_of([&] { count_pairs(*g, pairs); });
}
int64_t layout(int64_t n) { return layout_of<Graph>(2, n); }
}
