// A block of queries before the clusters of a head: what each cluster weighs as one entry, which ones are taken key by key, by whom.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "clusters.hpp"
#include "surroundings.hpp"
#include "vectors.hpp"
#include "wide.hpp"

constexpr double LOG2_E = 1.4426950408889634;

// one head of queries and its keys
template <class T> struct Head {
    const T *q, *k, *v;
    int64_t q_row, k_row, v_row;
    const int64_t *ids;    // clusters of each query
    const uint8_t *valid;  // queries
    double level;
    int64_t part;          // which example and head
};

// and what is read and written backward, besides
template <class T> struct Gradients {
    const T *out, *gradient, *peaks;
    int64_t out_row, gradient_row;
    T *dq, *dk, *dv;
    int64_t dq_row, dk_row, dv_row;
};

template <class T> class Block {
   public:
    static constexpr int64_t L = LANES_OF<T>;
    static constexpr int64_t SIZE = 1024;  // queries: theirs and what is summed up for them stays in the second cache

    const Problem &p;
    const T scale;  // of products of queries and keys: to scores in log2, or times alpha - 1 as entmax has them
    const int64_t size, width, chunks, groups;  // D, D in whole vectors, D and C in APARTs
    std::vector<int32_t> rows;                  // tokens
    Numbers<T> queries, squares;                // chunk by chunk rows of APART, times the scale
    Numbers<T> reference;                       // of the exponentials of each row
    // of some rows, group by group rows of APART: log2 n/2 + m, s, and n cosh(s) exp(m) beside the reference, 0 if it is taken
    Numbers<T> scores, spreads, entries;
    std::vector<uint64_t> taken;                // bits of each row
    std::vector<int32_t> takers, some_takers;   // of cluster c the first some_takers[c] at c · SIZE
    Surroundings around;
    std::vector<std::vector<int32_t>> beside;   // the keys that a row sees beside its clusters
    std::vector<std::vector<T>> beside_scores;  // and what is made of them: scores, filled up with -inf to whole vectors

    explicit Block(const Problem &p)
        : p(p), scale(T((p.alpha == 1 ? LOG2_E : p.alpha - 1) / std::sqrt(double(p.size)))), size(p.size), width(whole<T>(size)), chunks((size + APART - 1) / APART), groups((p.clusters + APART - 1) / APART),
          queries(chunks * SIZE * APART), squares(chunks * SIZE * APART), reference(SIZE), scores(groups * ROWS_AT_ONCE * APART),
          spreads(groups * ROWS_AT_ONCE * APART), entries(groups * ROWS_AT_ONCE * APART), taken(SIZE * words()), takers(p.clusters * SIZE), some_takers(p.clusters),
          around(p), beside(around.any() ? SIZE : 0), beside_scores(beside.size()), packed_(chunks * ROWS_AT_ONCE * APART) {}

    int64_t count() const { return rows.size(); }

    void take(const Head<T> &t, int64_t begin, int64_t end) {
        const T *q = t.q;
        const int64_t q_row = t.q_row;
        rows.clear();
        around.take(t.part);
        for (int64_t i = begin; i < end; ++i)
            if (t.valid[i]) rows.push_back(i);
        for (int64_t r = 0; r < count(); ++r)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const T *from = q + rows[r] * q_row + chunk * APART;
                if (r + 8 < count()) __builtin_prefetch(q + rows[r + 8] * q_row + chunk * APART), __builtin_prefetch(q + rows[r + 8] * q_row + chunk * APART + 64 / sizeof(T));
                T *to = &queries[(chunk * SIZE + r) * APART], *square = &squares[(chunk * SIZE + r) * APART];
                const int64_t some = std::min(APART, size - chunk * APART);
#pragma omp simd
                for (int64_t x = 0; x < some; ++x) to[x] = from[x] * scale, square[x] = to[x] * to[x];
            }
        std::fill(some_takers.begin(), some_takers.end(), 0);
    }

    // `work(row, R)` for all rows, some at a time; of causal attention one after the other, each with clusters of the keys up to it.
    template <class F> ALWAYS_INLINE void each_rows(Clusters<T> &k, const F &work) const {
        if (!p.causal) return in_rows<T>(count(), work);
        for (int64_t row = 0; row < count(); ++row) k.upto(rows[row]), work(row, std::integral_constant<int, 1>());
    }

    // where the panels of cluster c end in which some of its takers, in the order of their tokens or against it, may see a key
    int64_t panels_seen(const Clusters<T> &k, int64_t c, const int32_t *who, int64_t some) const {
        if (!p.causal) return k.panel[c + 1];
        const auto begin = k.tokens.begin() + k.first[c], end = k.tokens.begin() + k.first[c + 1];
        return k.panel[c] + (std::upper_bound(begin, end, std::max(rows[who[0]], rows[who[some - 1]])) - begin + L - 1) / L;
    }
    // what the score of a row with each key of a panel begins with: 0, or -inf where there is none that it sees
    ALWAYS_INLINE Wide<T> start(const Clusters<T> &k, int64_t panel, int64_t row) const {
        const Wide<T> missing = load(&k.missing[panel * L]);
        if (!p.causal) return missing;
        return load(&k.positions[panel * L]) > T(rows[row]) ? all_of(-std::numeric_limits<T>::infinity()) : missing;
    }

    // Scores and spreads of R rows from `row` on.
    template <int R> ALWAYS_INLINE void score(const Clusters<T> &k, int64_t row) {
        in_vectors<R>(0, k.panels, [&](int64_t panel, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            Wide<T> sums[R][V] = {};
            each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
                multiply<R, V, T>(&squares[(chunk * SIZE + row) * APART], k.variances.panel(panel) + chunk * APART * L, k.means.apart(), some, sums);
            });
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    store(&spreads[at(r, (panel + v) * L)], root(sums[r][v]));
                    sums[r][v] = load(&k.weight[(panel + v) * L]);
                }
            each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
                multiply<R, V, T>(&queries[(chunk * SIZE + row) * APART], k.means.panel(panel) + chunk * APART * L, k.means.apart(), some, sums);
            });
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) store(&scores[at(r, (panel + v) * L)], sums[r][v]);
        });
    }

    // The same, and of softmax the entries, which clusters these rows take, and `totals[r · L ...]`, the sums of the entries.
    template <int R> ALWAYS_INLINE void weigh(const Clusters<T> &k, const Head<T> &t, int64_t row, T *totals) {
        score<R>(k, row);
        for (int r = 0; r < R; ++r) choose(k, t, row, r, totals + r * L);
    }

    // Of softmax without a tail: the clusters that a row takes, and a reference that is not above its largest score: the mean of a
    // cluster, the first of those that it was given, or whatever is the largest beside them.
    void only_taken(const Clusters<T> &k, const Head<T> &t, int64_t row) {
        const int64_t i = rows[row];
        uint64_t *bits = &taken[row_word(row)];
        const bool all = around.hears_all(i);
        all ? by_all(k, bits) : by_ids(k, t.ids + i * p.slots, bits);
        T most = around.any() ? look_around(t, row) : std::numeric_limits<T>::lowest();
        for (int64_t n = 0; n < (all ? k.count : p.slots); ++n) {
            const int64_t c = all ? n : t.ids[i * p.slots + n];
            if (c < 0 || c >= k.count || !k.number[c]) continue;
            T mean = 0;
            each_chunk([&](int64_t chunk, int64_t some) {
                mean += dot<T>(&queries[(chunk * SIZE + row) * APART], &k.mean_rows[c * width + chunk * APART], some);
            });
            most = std::max(most, mean);
            if (!all) break;
        }
        reference[row] = most;
        join(row);
    }

    // What a row takes is known: the row joins the takers of these clusters.
    void join(int64_t row) {
        for (int64_t word = 0; word < words(); ++word)
            for (uint64_t left = taken[row_word(row) + word]; left; left &= left - 1) {
                const int64_t c = word * 64 + __builtin_ctzll(left);
                takers[c * SIZE + some_takers[c]++] = row;
            }
    }
    void by_all(const Clusters<T> &k, uint64_t *bits) const {
        std::fill(bits, bits + words(), 0);
        for (int64_t c = 0; c < k.count; ++c) bits[c / 64] |= uint64_t(k.keys_of(c) > 0) << c % 64;
    }
    // What a row takes is known: `work(key, product)` for the keys that it sees besides.
    template <class F> void each_beside(const Head<T> &t, int64_t row, const F &work) {
        around.look(rows[row], [&](int64_t c) { return takes(row, c); });
        for (const int32_t j : around.keys) {
            T x = 0;
            each_chunk([&](int64_t chunk, int64_t some) {
                x += dot<T>(&queries[(chunk * SIZE + row) * APART], t.k + j * t.k_row + chunk * APART, some);
            });
            work(j, x);
        }
    }
    void by_ids(const Clusters<T> &k, const int64_t *ids, uint64_t *bits) const {
        std::fill(bits, bits + words(), 0);
        for (int64_t slot = 0; slot < p.slots; ++slot)
            if (const int64_t c = ids[slot]; c >= 0 && c < p.clusters && k.keys_of(c)) bits[c / 64] |= uint64_t(1) << c % 64;
    }

    // sums[r][v] += the entries of row r times the rows of `x`, one for each cluster, from `column` on
    template <int R, int V> ALWAYS_INLINE void of_entries(const Numbers<T> &weights, const T *x, Wide<T> (&sums)[R][V]) const {
        for (int64_t group = 0; group < groups; ++group)
            combine<R, V, T>(&weights[group * ROWS_AT_ONCE * APART], x + group * APART * width, width, std::min(APART, p.clusters - group * APART), sums);
    }

    // The queries of R takers, side by side, for `multiply_packed`.
    template <int R> ALWAYS_INLINE void pack(const Numbers<T> &of_rows, const int32_t *who) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < R; ++r)
                for (int64_t x = 0; x < APART; x += L)
                    store(&packed_[(chunk * ROWS_AT_ONCE + r) * APART + x], load(&of_rows[(chunk * SIZE + who[r]) * APART + x]));
    }
    template <int R, int V> ALWAYS_INLINE void multiply_packed(const Laid<T> &laid, int64_t panel, Wide<T> (&sums)[R][V]) const {
        each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
            multiply<R, V, T>(&packed_[chunk * ROWS_AT_ONCE * APART], laid.panel(panel) + chunk * APART * L, laid.apart(), some, sums);
        });
    }

    // where the entry of row r and cluster c is
    static int64_t at(int64_t r, int64_t c) { return (c / APART * ROWS_AT_ONCE + r) * APART + c % APART; }
    uint32_t lanes(int64_t row, int64_t c) const { return lanes(&taken[row * words()], c); }
    static uint32_t lanes(const uint64_t *bits, int64_t c) { return uint32_t(bits[c / 64] >> c % 64) & ((1u << L) - 1); }
    bool takes(int64_t row, int64_t c) const { return taken[row * words() + c / 64] >> c % 64 & 1; }
    int64_t words() const { return (p.clusters + 63) / 64; }
    int64_t row_word(int64_t row) const { return row * words(); }

    template <class F> ALWAYS_INLINE void each_chunk(const F &work) const {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk, std::min(APART, size - chunk * APART));
    }

   private:
    Numbers<T> packed_;  // queries that take a cluster

    void choose(const Clusters<T> &k, const Head<T> &t, int64_t row, int64_t r, T *totals) {
        Wide<T> most = all_of(-std::numeric_limits<T>::infinity());
        for (int64_t c = 0; c < k.panels * L; c += L) most = larger<T>(load(&scores[at(r, c)]) + load(&spreads[at(r, c)]), most);
        T peak = std::max(largest_of(most), std::numeric_limits<T>::lowest());
        Wide<T> total = exponentials(k, r, peak);
        uint64_t *bits = &taken[row_word(row + r)], any = 0;
        if (around.hears_all(rows[row + r]))
            by_all(k, bits);
        else if (p.levels)
            by_level(k, r, t.level, sum_of(total), bits);
        else
            by_ids(k, t.ids + rows[row + r] * p.slots, bits);
        for (int64_t word = 0; word < words(); ++word) any |= bits[word];
        T most_beside = std::numeric_limits<T>::lowest();
        if (around.any()) {
            most_beside = look_around(t, row + r);
            for (const int32_t c : around.clusters) scores[at(r, c)] += std::log2((k.number[c] - around.seen(c)) / k.number[c]);
            any = 1, peak = std::max(peak, most_beside), exponentials(k, r, peak);
        }
        if (any) {
            // An entry may be far larger than all keys of its cluster; the mean of their scores is below the largest of them.
            Wide<T> low = all_of(std::numeric_limits<T>::lowest());
            for (int64_t c = 0; c < k.panels * L; c += L)
                low = larger<T>(load(&scores[at(r, c)]) + without(load(&spreads[at(r, c)]), lanes(bits, c)), low);
            if (const T bound = std::max(largest_of(low), most_beside); peak - bound > T(60)) peak = bound, exponentials(k, r, peak);
            total = Wide<T>{};
            for (int64_t c = 0; c < k.panels * L; c += L) {
                const Wide<T> e = without(load(&entries[at(r, c)]), lanes(bits, c));
                store(&entries[at(r, c)], e);
                total += e;
            }
            join(row + r);
        }
        reference[row + r] = peak;
        store(totals, total);
    }

    // Keys beside the clusters that a row takes, and how many of each are in an entry. The largest of their scores.
    T look_around(const Head<T> &t, int64_t row) {
        T most = std::numeric_limits<T>::lowest();
        beside[row].clear(), beside_scores[row].clear();
        each_beside(t, row, [&](int32_t j, T score) {
            beside[row].push_back(j), beside_scores[row].push_back(score), most = std::max(most, score);
        });
        beside_scores[row].resize(whole<T>(beside[row].size()), -std::numeric_limits<T>::infinity());
        return most;
    }

    Wide<T> exponentials(const Clusters<T> &k, int64_t r, T peak) {
        Wide<T> total{};
        for (int64_t c = 0; c < k.panels * L; c += L) {
            const Wide<T> middle = load(&scores[at(r, c)]) - peak, spread = load(&spreads[at(r, c)]);
            const Wide<T> e = power_of_two(middle + spread) + power_of_two(middle - spread);
            store(&entries[at(r, c)], e);
            total += e;
        }
        return total;
    }

    // a cluster is taken where the weight of one of its keys times the spread of their scores is above the level
    void by_level(const Clusters<T> &k, int64_t r, double level, T total, uint64_t *bits) const {
        const T bound = T(level / k.keys_in_all * LOG2_E) * total;
        std::fill(bits, bits + words(), 0);
        for (int64_t c = 0; c < k.panels * L; c += L)
            bits[c / 64] |= uint64_t(greater(load(&entries[at(r, c)]) * load(&spreads[at(r, c)]), load(&k.number[c]) * bound)) << c % 64;
    }
};
