// Attention on clusters of keys, those that a query does not take as one entry each: see tailed.py.
//
// Keys and values of a head are sorted by cluster and laid in panels once. A block of queries then goes over all clusters as if over
// so many keys (their means, variances, numbers and mean values), which also gives it a number that the exponentials can be
// compared with; and cluster after cluster, the queries of the block that take it go over its keys together. Of causal attention
// queries go over the clusters one by one, each when these amount to what the keys up to it do.

#include <optional>

#include "boundary.hpp"
#include "tailed.hpp"
#include "tailed_backward.hpp"
#include "tailed_entmax.hpp"

namespace {

template <class T> class Forward {
    static constexpr int64_t L = LANES_OF<T>;
    Block<T> b;
    Numbers<T> out, totals, weights;  // sums of values and of weights, by lanes, of each row; weights of some keys

   public:
    explicit Forward(const Problem &p) : b(p), out(Block<T>::SIZE * b.width), totals(Block<T>::SIZE * L), weights(ROWS_AT_ONCE * APART) {}

    void operator()(Clusters<T> &k, const Head<T> &t, int64_t begin, int64_t end, T *to, int64_t to_row, T *peaks) {
        b.take(t, begin, end);
        if (b.p.tail)
            b.each_rows(k, [&](int64_t row, auto R) { tail<decltype(R)::value>(k, t, row); });
        else
            nothing(k, t);
        for (int64_t c = 0; c < k.count; ++c)
            in_rows<T>(b.some_takers[c], [&](int64_t n, auto R) { exact<decltype(R)::value>(k, c, &b.takers[c * Block<T>::SIZE + n]); });
        for (int64_t i = begin; i < end; ++i)
            if (!t.valid[i]) std::fill(to + i * to_row, to + i * to_row + b.size, T(0));
        for (int64_t r = 0; r < b.count(); ++r) {
            if (b.around.any()) beside(t, r);
            T total = sum_of(load(&totals[r * L]));
            if (!(total < T(1e30))) total = again(k, t, r);
            const T one = total == 0 ? T(0) : 1 / total;
            T *own = to + b.rows[r] * to_row;
#pragma omp simd
            for (int64_t x = 0; x < b.size; ++x) own[x] = out[r * b.width + x] * one;
            // of a row without a key such that whatever is compared with it weighs nothing
            peaks[b.rows[r]] = total == 0 ? std::numeric_limits<T>::infinity() : b.reference[r] + std::log2(total);
        }
    }

   private:
    template <int R> void tail(const Clusters<T> &k, const Head<T> &t, int64_t row) {
        b.template weigh<R>(k, t, row, &totals[row * L]);
        in_vectors<R>(0, b.width / L, [&](int64_t column, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            Wide<T> sums[R][V] = {};
            b.template of_entries<R, V>(b.entries, &k.mean_values[column * L], sums);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) store(&out[(row + r) * b.width + (column + v) * L], sums[r][v]);
        });
    }

    // without a tail a sum begins with the first key
    void nothing(Clusters<T> &k, const Head<T> &t) {
        std::fill_n(out.data(), b.count() * b.width, T(0)), std::fill_n(totals.data(), b.count() * L, T(0));
        for (int64_t r = 0; r < b.count(); ++r) {
            if (b.p.causal) k.upto(b.rows[r]);
            b.only_taken(k, t, r);
        }
    }

    // the keys of cluster c, for some of the queries that take it
    template <int R> void exact(const Clusters<T> &k, int64_t c, const int32_t *who) {
        b.template pack<R>(b.queries, who);
        in_pairs(k.panel[c], b.panels_seen(k, c, who, R), [&](int64_t panel, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            const int64_t key = k.first[c] + (panel - k.panel[c]) * L, count = std::min<int64_t>(V * L, k.first[c + 1] - key);
            Wide<T> sums[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) sums[r][v] = b.start(k, panel + v, who[r]) - b.reference[who[r]];
            b.template multiply_packed<R, V>(k.keys, panel, sums);
            for (int r = 0; r < R; ++r) {
                Wide<T> total = load(&totals[who[r] * L]);
                for (int v = 0; v < V; ++v) {
                    const Wide<T> e = power_of_two(sums[r][v]);
                    total += e;
                    store(&weights[r * APART + v * L], e);
                }
                store(&totals[who[r] * L], total);
            }
            in_pairs(0, b.width / L, [&](int64_t column, auto columns) __attribute__((always_inline)) {
                constexpr int W = decltype(columns)::value;
                Wide<T> sums[R][W];
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < W; ++v) sums[r][v] = load(&out[who[r] * b.width + (column + v) * L]);
                combine<R, W, T>(weights.data(), &k.values[key * b.width + column * L], b.width, count, sums);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < W; ++v) store(&out[who[r] * b.width + (column + v) * L], sums[r][v]);
            });
        });
    }

    void beside(const Head<T> &t, int64_t r) {
        Wide<T> total = load(&totals[r * L]);
        for (size_t n = 0; n < b.beside[r].size(); n += L) {
            const Wide<T> e = power_of_two(load(&b.beside_scores[r][n]) - b.reference[r]);
            total += e;
            for (size_t lane = 0; lane < std::min<size_t>(L, b.beside[r].size() - n); ++lane)
                add(&out[r * b.width], t.v + b.beside[r][n + lane] * t.v_row, T(e[lane]), b.size);
        }
        store(&totals[r * L], total);
    }

    // A row whose exponentials were too large, some key far above all that its entries let expect: number by number, from its peak.
    T again(Clusters<T> &k, const Head<T> &t, int64_t r) {
        if (b.p.causal) k.upto(b.rows[r]);
        if (b.around.any()) b.each_beside(t, r, [](int32_t, T) {});  // counts what is not in an entry
        const auto product = [&](const Numbers<T> &x, const Laid<T> &laid, int64_t n) {
            double sum = 0;
            for (int64_t d = 0; d < b.size; ++d)
                sum += double(x[(d / APART * Block<T>::SIZE + r) * APART + d % APART]) * laid.panel(n / L)[d * L + n % L];
            return sum;
        };
        const auto each = [&](const auto &work) {  // score in log2 and values of every entry and key
            for (int64_t c = 0; c < k.count; ++c) {
                const double seen = b.around.any() ? b.around.seen(c) : 0;
                if (b.p.tail && !b.takes(r, c) && k.number[c] > seen) {
                    const double middle = std::log2((k.number[c] - seen) / 2) + product(b.queries, k.means, c), spread = std::sqrt(product(b.squares, k.variances, c));
                    for (const double each : {middle + spread, middle - spread}) work(each, &k.mean_values[c * b.width]);
                }
                for (int64_t m = 0; b.takes(r, c) && m < k.number[c]; ++m)
                    work(product(b.queries, k.keys, k.panel[c] * L + m), &k.values[(k.first[c] + m) * b.width]);
            }
            for (size_t n = 0; b.around.any() && n < b.beside[r].size(); ++n) work(b.beside_scores[r][n], t.v + b.beside[r][n] * t.v_row);
        };
        double peak = -std::numeric_limits<double>::infinity(), total = 0;
        each([&](double score, const T *) { peak = score > peak ? score : peak; });
        std::vector<double> sums(b.size);
        each([&](double score, const T *values) {
            const double e = std::exp2(score - peak);
            total += e;
            for (int64_t x = 0; x < b.size; ++x) sums[x] += e * values[x];
        });
        std::copy(sums.begin(), sums.end(), &out[r * b.width]);
        b.reference[r] = T(peak);
        return T(total);
    }
};

template <class T> struct Softmax {
    using Forwards = Forward<T>;
    using Backwards = Backward<T>;
};
template <class T> struct Entmax {
    using Forwards = EntmaxForward<T>;
    using Backwards = EntmaxBackward<T>;
};

template <class T>
Head<T> head_of(const Problem &p, int64_t part, const Rows<const T> &q, const Rows<const T> &k, const Rows<const T> &v) {
    const int64_t example = part / p.heads, head = part % p.heads, of_keys = head / p.group;
    return {q.at(example, head), k.at(example, of_keys), v.at(example, of_keys), q.row, k.row, v.row, p.q_ids + part * p.queries * p.slots,
            p.query_valid + example * p.queries, p.levels ? p.levels[head] : 0.0, part};
}

template <class T> void take(Clusters<T> &clusters, const Problem &p, const Head<T> &t) {
    clusters.take(t.k, t.k_row, t.v, t.v_row, p.k_ids + t.part * p.keys, p.key_valid + t.part / p.heads * p.keys, p.keys);
}

template <class T, class Kind>
void forward(const Problem &p, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, T *peaks) {
    const int64_t parts = p.batch * p.heads, at_once = std::min(parts, p.threads), some = Block<T>::SIZE;
    const int64_t blocks = (p.queries + some - 1) / some;
    std::vector<Clusters<T>> clusters;
    for (int64_t n = 0; n < at_once; ++n) clusters.emplace_back(p.clusters, p.size, p.keys, p.alpha == 1);
    Failure failure;
#pragma omp parallel num_threads(p.threads)
    {
        std::optional<typename Kind::Forwards> block;
        failure.guard([&] { block.emplace(p); });
        for (int64_t part = 0; part < parts; part += at_once) {
            const int64_t here = std::min(at_once, parts - part);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < here; ++n) failure.guard([&] { take(clusters[n], p, head_of(p, part + n, q, k, v)); });
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < here * blocks; ++n)
                failure.guard([&] {
                    const int64_t own = part + n / blocks, begin = n % blocks * some;
                    (*block)(clusters[n / blocks], head_of(p, own, q, k, v), begin, std::min(begin + some, p.queries),
                             out.at(own / p.heads, own % p.heads), out.row, peaks + own * p.queries);
                });
        }
    }
    failure.rethrow();
}

// of causal attention: a thread goes through a head from the first query to the last, since clusters grow on the way
template <class T, class Kind>
void forward_causal(const Problem &p, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, T *peaks) {
    const int64_t parts = p.batch * p.heads, at_once = std::min(parts, p.threads), some = Block<T>::SIZE;
    std::vector<Clusters<T>> clusters;
    for (int64_t n = 0; n < at_once; ++n) clusters.emplace_back(p.clusters, p.size, p.keys, p.alpha == 1);
    Failure failure;
#pragma omp parallel for num_threads(at_once)
    for (int64_t n = 0; n < at_once; ++n)
        failure.guard([&] {
            typename Kind::Forwards block(p);
            for (int64_t part = n; part < parts; part += at_once) {
                const Head<T> t = head_of(p, part, q, k, v);
                take(clusters[n], p, t), clusters[n].rewind();
                for (int64_t begin = 0; begin < p.queries; begin += some)
                    block(clusters[n], t, begin, std::min(begin + some, p.queries), out.at(part / p.heads, part % p.heads), out.row, peaks + part * p.queries);
            }
        });
    failure.rethrow();
}

template <class T, class Kind>
void forward_any(const Problem &p, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, T *peaks) {
    (p.causal ? forward_causal<T, Kind> : forward<T, Kind>)(p, q, k, v, out, peaks);
}

template <class T, class Kind>
void backward(const Problem &p, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> out, Rows<const T> gradient,
              Rows<T> dq, Rows<T> dk, Rows<T> dv, const T *peaks) {
    const int64_t key_heads = p.heads / p.group;
    Failure failure;
#pragma omp parallel num_threads(p.threads)
    {
        std::optional<typename Kind::Backwards> work;
        std::optional<Clusters<T>> clusters;
        failure.guard([&] { work.emplace(p), clusters.emplace(p.clusters, p.size, p.keys, p.alpha == 1); });
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < p.batch * key_heads; ++n)
            failure.guard([&] {
                const int64_t example = n / key_heads, of_keys = n % key_heads;
                for (int64_t head = of_keys * p.group; head < (of_keys + 1) * p.group; ++head) {
                    const int64_t own = example * p.heads + head;
                    const Head<T> t = head_of(p, own, q, k, v);
                    take(*clusters, p, t);
                    (*work)(*clusters, t, {out.at(example, head), gradient.at(example, head), peaks + own * p.queries, out.row, gradient.row,
                                           dq.at(example, head), dk.at(example, of_keys), dv.at(example, of_keys), dq.row, dk.row, dv.row});
                }
            });
    }
    failure.rethrow();
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                         \
    int forward_##NAME(const Problem *p, const Rows<const T> *q, const Rows<const T> *k, const Rows<const T> *v, const Rows<T> *out, \
                       T *peaks) {                                                                                                  \
        return status_of([&] {                                                                                                      \
            (p->alpha == 1 ? forward_any<T, Softmax<T>> : forward_any<T, Entmax<T>>)(*p, *q, *k, *v, *out, peaks);                   \
        });                                                                                                                         \
    }                                                                                                                               \
    int backward_##NAME(const Problem *p, const Rows<const T> *q, const Rows<const T> *k, const Rows<const T> *v,                    \
                        const Rows<const T> *out, const Rows<const T> *gradient, const Rows<T> *dq, const Rows<T> *dk,               \
                        const Rows<T> *dv, const T *peaks) {                                                                        \
        return status_of([&] {                                                                                                      \
            (p->alpha == 1 ? backward<T, Softmax<T>> : backward<T, Entmax<T>>)(*p, *q, *k, *v, *out, *gradient, *dq, *dk, *dv, peaks); \
        });                                                                                                                         \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
int64_t layout(int64_t n) { return layout_of<Problem, Rows<float>>(3, n); }
}
