// Gradients of a head: all products of forward again, and what they pull on queries, keys, values and clusters.
//
// Of a query nothing is kept but its log2 of the sum of exponentials, with which a weight is one exponential. One thread has a head of
// keys, whose gradients are sums over queries: they have one order, and one result.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "shares.hpp"
#include "tailed.hpp"

template <class T> class Backward {
    static constexpr int64_t L = LANES_OF<T>, SIZE = Block<T>::SIZE;
    static constexpr int64_t SOME = 128;  // queries at a time: their weights of all clusters stay in the second cache

    Block<T> b;
    const int64_t width, across;              // D and C in whole vectors
    Laid<T> laid_values;                      // as keys are laid
    Numbers<T> key_rows;
    Numbers<T> d_keys, d_values, d_means, d_variances, d_mean_values, d_queries, d_squares;  // sums, rows of `width`
    Numbers<T> pulls, along, peaks;           // gradients of the output as queries are kept; their products with it; see above
    Numbers<T> weights, slopes, bends;        // of the clusters, rows of `across`: probabilities, gradients of the scores' means and
                                              // of their variances
    Numbers<T> own_slopes, own_bends;         // of some rows, as entries are kept
    Numbers<T> key_weights, key_slopes;       // of two panels of keys, rows of APART
    Numbers<T> gathered_queries, gathered_pulls;  // of those that take a cluster
    Shares<T> shares;                         // of causal attention

   public:
    explicit Backward(const Problem &p)
        : b(p), width(b.width), across(whole<T>(p.clusters)), d_means(p.clusters * width), d_variances(p.clusters * width), d_mean_values(p.clusters * width), d_queries(SOME * width),
          d_squares(SOME * width), pulls(b.chunks * SIZE * APART), along(SIZE), peaks(SIZE), weights(SOME * across),
          slopes(SOME * across), bends(SOME * across), own_slopes(b.groups * ROWS_AT_ONCE * APART), own_bends(b.groups * ROWS_AT_ONCE * APART), key_weights(SOME * APART), key_slopes(SOME * APART),
          gathered_queries(b.chunks * SOME * APART), gathered_pulls(b.chunks * SOME * APART),
          shares(p.causal ? p.clusters : 0, p.size) {}

    void operator()(Clusters<T> &k, const Head<T> &t, const Gradients<T> &g) {
        lay(k, t), shares.clear();
        if (b.p.causal) k.rewind(), k.mark();
        for (int64_t end = b.p.queries; end > 0; end -= std::min(end, SOME)) {  // from the last query back, as shares want it
            b.take(t, std::max<int64_t>(end - SOME, 0), end);
            pull(g);
            b.p.tail ? tail(k, t, g) : nothing(k, t);
            for (int64_t c = 0; c < k.count; ++c)
                if (b.some_takers[c]) of_keys(k, c, &b.takers[c * SIZE], b.some_takers[c]);
            const T root = T(1 / std::sqrt(double(b.size)));
            if (b.around.any())
                for (int64_t r = 0; r < b.count(); ++r) of_keys_beside(t, g, r, root);
            for (int64_t r = 0; r < b.count(); ++r)
                for (int64_t x = 0; x < b.size; ++x)
                    g.dq[b.rows[r] * g.dq_row + x] = root * (d_queries[r * width + x] + 2 * t.q[b.rows[r] * t.q_row + x] * root * d_squares[r * width + x]);
        }
        hand_out(k, g);
    }

   private:
    void lay(const Clusters<T> &k, const Head<T> &t) {
        const int64_t keys = k.first[k.count];
        laid_values.resize(k.panel[k.count], b.size);
        for (Numbers<T> *each : {&key_rows, &d_keys, &d_values}) each->resize(keys * width);
        for (Numbers<T> *each : {&d_keys, &d_values, &d_means, &d_variances, &d_mean_values, &laid_values.numbers}) each->fill(T(0));
        for (int64_t c = 0; c < k.count; ++c)
            for (int64_t m = 0; m < k.keys_of(c); ++m) {
                const int64_t n = k.first[c] + m;
                laid_values.put(k.panel[c] * L + m, &k.values[n * width]);
                std::copy_n(t.k + k.tokens[n] * t.k_row, b.size, &key_rows[n * width]);
            }
    }

    void tail(Clusters<T> &k, const Head<T> &t, const Gradients<T> &g) {
        if (b.p.causal) {
            for (int64_t row = b.count() - 1; row >= 0; --row) k.upto(b.rows[row]), of_clusters<1>(k, t, row), share(k, t, g, row);
            return;
        }
        in_rows<T>(b.count(), [&](int64_t row, auto R) { of_clusters<decltype(R)::value>(k, t, row); });
        sum_up(weights, across, b.count(), k.count, pulls, SIZE, &d_mean_values[0]);
        sum_up(slopes, across, b.count(), k.count, b.queries, SIZE, &d_means[0]);
        sum_up(bends, across, b.count(), k.count, b.squares, SIZE, &d_variances[0]);
    }

    // what a row of causal attention pulls on clusters, and what the key of its token has got by now
    void share(const Clusters<T> &k, const Head<T> &t, const Gradients<T> &g, int64_t row) {
        const int64_t i = b.rows[row], own = k.cluster_of(i);
        const T *q = t.q + i * t.q_row, *gradient = g.gradient + i * g.gradient_row, by_square = b.scale * b.scale * T(1 / LOG2_E);
        for (int64_t c = 0; c < k.count; ++c)
            if (const int64_t at = row * across + c; k.number[c] > 0 && weights[at] != 0)
                shares.add(k, c, q, slopes[at] * b.scale, bends[at] * by_square, gradient, weights[at]);
        if (own < 0) return;
        const int64_t n = (k.first[own] + int64_t(k.number[own]) - 1) * width;  // the last one that was seen
        shares.give(k, own, &key_rows[n], &d_keys[n], &d_values[n]);
    }

    void nothing(const Clusters<T> &k, const Head<T> &t) {
        std::fill_n(d_queries.data(), b.count() * width, T(0)), std::fill_n(d_squares.data(), b.count() * width, T(0));
        for (int64_t r = 0; r < b.count(); ++r) b.only_taken(k, t, r);
    }

    void pull(const Gradients<T> &t) {
        for (int64_t r = 0; r < b.count(); ++r) {
            const T *from = t.gradient + b.rows[r] * t.gradient_row, *out = t.out + b.rows[r] * t.out_row;
            T product = 0;
            for (int64_t x = 0; x < b.size; ++x) {
                product += from[x] * out[x];
                pulls[(x / APART * SIZE + r) * APART + x % APART] = from[x];
            }
            along[r] = product, peaks[r] = t.peaks[b.rows[r]];
        }
    }

    template <int R> void of_clusters(const Clusters<T> &k, const Head<T> &t, int64_t row) {
        T totals[R * L];
        b.template weigh<R>(k, t, row, totals);
        in_vectors<R>(0, k.panels, [&](int64_t panel, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            Wide<T> sums[R][V] = {};
            b.each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
                multiply<R, V, T>(&pulls[(chunk * SIZE + row) * APART], k.laid_mean_values.panel(panel) + chunk * APART * L, k.laid_mean_values.apart(), some, sums);
            });
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    const int64_t c = (panel + v) * L, at = b.at(r, c);
                    const Wide<T> middle = load(&b.scores[at]) - peaks[row + r], spread = load(&b.spreads[at]);
                    const uint32_t taken = b.lanes(row + r, c);  // whose entries may be infinite
                    const Wide<T> high = without(power_of_two(middle + spread), taken), low = without(power_of_two(middle - spread), taken);
                    const Wide<T> weight = high + low, slope = weight * (sums[r][v] - along[row + r]);
                    const Wide<T> bend = slope * by_variance(high, low, spread / T(LOG2_E));
                    const int64_t to = (row + r) * across + c;
                    store(&weights[to], weight), store(&slopes[to], slope), store(&bends[to], bend);
                    store(&own_slopes[at], slope), store(&own_bends[at], bend);
                }
        });
        in_vectors<R>(0, width / L, [&](int64_t column, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            Wide<T> sums[R][V] = {}, squares[R][V] = {};
            b.template of_entries<R, V>(own_slopes, &k.mean_rows[column * L], sums);
            b.template of_entries<R, V>(own_bends, &k.variance_rows[column * L], squares);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    const int64_t at = (row + r) * width + (column + v) * L;
                    store(&d_queries[at], sums[r][v]), store(&d_squares[at], squares[r][v]);
                }
        });
    }

    // tanh(s) / 2s, the derivative of log cosh(s) by s², from the two halves of an entry
    static Wide<T> by_variance(Wide<T> high, Wide<T> low, Wide<T> s) {
        const Wide<T> square = s * s, total = high + low, least = all_of(std::numeric_limits<T>::min());
        const Wide<T> near_zero = T(0.5) - square * (T(1.0 / 6) - square * (T(1.0 / 15) - square * T(17.0 / 630)));
        return s < T(0.03) ? near_zero : (high - low) / (2 * s * larger<T>(total, least));
    }

    // to[c] += Σ_r of[r][c] · x[r] for rows c; x chunk by chunk, `apart` rows in each
    void sum_up(const Numbers<T> &of, int64_t of_row, int64_t count, int64_t rows, const Numbers<T> &x, int64_t apart, T *to) {
        in_rows<T>(rows, [&](int64_t c, auto number) {
            constexpr int R = decltype(number)::value;
            in_pairs(0, width / L, [&](int64_t column, auto vectors) __attribute__((always_inline)) {
                constexpr int V = decltype(vectors)::value;
                const int64_t at = column * L;
                Wide<T> sums[R][V];
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) sums[r][v] = load(to + (c + r) * width + at + v * L);
                outer<R, V, T>(&of[c], of_row, &x[at / APART * apart * APART + at % APART], APART, count, sums);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) store(to + (c + r) * width + at + v * L, sums[r][v]);
            });
        });
    }

    void of_keys(const Clusters<T> &k, int64_t c, const int32_t *who, int64_t count) {
        for (int64_t chunk = 0; chunk < b.chunks; ++chunk)
            for (int64_t n = 0; n < count; ++n) {
                const int64_t from = (chunk * SIZE + who[n]) * APART, to = (chunk * SOME + n) * APART;
                std::copy_n(&b.queries[from], APART, &gathered_queries[to]), std::copy_n(&pulls[from], APART, &gathered_pulls[to]);
            }
        in_pairs(k.panel[c], b.panels_seen(k, c, who, count), [&](int64_t panel, auto vectors) {
            constexpr int V = decltype(vectors)::value;
            const int64_t key = k.first[c] + (panel - k.panel[c]) * L, keys = std::min<int64_t>(V * L, k.first[c + 1] - key);
            in_rows<T>(count, [&](int64_t n, auto R) { of_panels<decltype(R)::value, V>(k, who + n, n, panel, key, keys); });
            sum_up(key_weights, APART, count, keys, gathered_pulls, SOME, &d_values[key * width]);
            sum_up(key_slopes, APART, count, keys, gathered_queries, SOME, &d_keys[key * width]);
        });
    }

    void of_keys_beside(const Head<T> &t, const Gradients<T> &g, int64_t r, T root) {
        const T *q = t.q + b.rows[r] * t.q_row, *gradient = g.gradient + b.rows[r] * g.gradient_row;
        for (size_t n = 0; n < b.beside[r].size(); n += L) {
            const Wide<T> found = power_of_two(load(&b.beside_scores[r][n]) - peaks[r]);
            for (size_t lane = 0; lane < std::min<size_t>(L, b.beside[r].size() - n); ++lane) {
                const int64_t j = b.beside[r][n + lane];
                const T weight = found[lane], slope = weight * (dot<T>(gradient, t.v + j * t.v_row, b.size) - along[r]);
                add(&d_queries[r * width], t.k + j * t.k_row, slope, b.size);
                add(g.dk + j * g.dk_row, q, slope * root, b.size), add(g.dv + j * g.dv_row, gradient, weight, b.size);
            }
        }
    }

    template <int R, int V> void of_panels(const Clusters<T> &k, const int32_t *who, int64_t n, int64_t panel, int64_t key, int64_t keys) {
        Wide<T> scores[R][V], pulled[R][V] = {};
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) scores[r][v] = b.start(k, panel + v, who[r]) - peaks[who[r]];
        b.each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
            const int64_t at = (chunk * SOME + n) * APART;
            multiply<R, V, T>(&gathered_queries[at], k.keys.panel(panel) + chunk * APART * L, k.keys.apart(), some, scores);
        });
        b.each_chunk([&](int64_t chunk, int64_t some) __attribute__((always_inline)) {
            const int64_t at = (chunk * SOME + n) * APART;
            multiply<R, V, T>(&gathered_pulls[at], laid_values.panel(panel) + chunk * APART * L, laid_values.apart(), some, pulled);
        });
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                const Wide<T> weight = power_of_two(scores[r][v]);
                store(&key_weights[(n + r) * APART + v * L], weight);
                store(&key_slopes[(n + r) * APART + v * L], weight * (pulled[r][v] - along[who[r]]));
            }
        in_pairs(0, width / L, [&](int64_t column, auto columns) __attribute__((always_inline)) {
            constexpr int W = decltype(columns)::value;
            Wide<T> sums[R][W];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < W; ++v) sums[r][v] = load(&d_queries[who[r] * width + (column + v) * L]);
            combine<R, W, T>(&key_slopes[n * APART], &key_rows[key * width + column * L], width, keys, sums);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < W; ++v) store(&d_queries[who[r] * width + (column + v) * L], sums[r][v]);
        });
    }

    // a key's own gradients, and its share of those of its cluster's mean, variance and mean value
    void hand_out(const Clusters<T> &k, const Gradients<T> &t) {
        const T back = T(1 / LOG2_E);  // queries are kept times log2 e
        for (int64_t c = 0; c < k.count; ++c)
            for (int64_t n = k.first[c]; n < k.first[c + 1]; ++n) {
                const T share = T(1) / k.keys_of(c);
                T *dk = t.dk + k.tokens[n] * t.dk_row, *dv = t.dv + k.tokens[n] * t.dv_row;
#pragma omp simd
                for (int64_t x = 0; x < b.size; ++x) {
                    const T apart = key_rows[n * width + x] - k.mean_rows[c * width + x];
                    const T of_cluster = d_means[c * width + x] + 2 * back * apart * d_variances[c * width + x];
                    dk[x] += back * (d_keys[n * width + x] + share * of_cluster);
                    dv[x] += d_values[n * width + x] + share * d_mean_values[c * width + x];
                }
            }
    }
};
