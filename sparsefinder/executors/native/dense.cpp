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
#include <type_traits>
#include <vector>

#include "entmax.hpp"
#include "filters.hpp"

namespace {

// the same fields, in this order, in dense.py
struct Problem {
    int64_t batch, heads, key_heads, queries, keys, size;  // B, H, H_k, N_q, N_k, D
    int64_t back, ahead;       // query i sees keys i - back to i + ahead; whoever sees all has N_q and N_k here
    int64_t mask_batch, mask_head, mask_row;  // steps of `mask`, 0 where it is the same for all
    int64_t threads, seed, plain;  // plain: no filter but the one that every processor has
    const uint8_t *query_valid, *key_valid;   // (B, N_q), (B, N_k)
    const uint8_t *mask;       // (B or 1, H or 1, N_q or 1, N_k), or none
    const double *alpha;       // (H)
    double scale, dropped;     // of q·k; the share of probabilities that dropout takes
};

constexpr int64_t BLOCK = 64;   // queries that go over the keys together
constexpr double SLACK = 1e-5;  // of x, by which a bound is lower than it need be: what it is made of was rounded
constexpr size_t FEW = 24;      // keys of a row for which a better bound than the peak's costs more than it saves

// A number in [0, 1) for each pair, the same forward and backward.
inline double chance(uint64_t seed, uint64_t row, uint64_t key) {
    uint64_t z = seed + row * 0x9E3779B97F4A7C15ull + key * 0xD1B54A32D192ED03ull + 0x2545F4914F6CDD1Dull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull, z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return double((z ^ (z >> 31)) >> 11) * (1.0 / 9007199254740992.0);
}

template <class S, class T> S dot(const T *a, const T *b, int64_t size) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < size; ++x) sum += S(a[x]) * S(b[x]);
    return sum;
}

template <class T> void add(T *to, const T *from, T weight, int64_t size) {
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) to[x] += weight * from[x];
}

// one query, and the keys that may be in its support
template <class T> struct Row {
    int32_t i = 0;
    double peak;  // the best product q·k so far
    T least;      // and the one from which on a key may be in the support
    std::vector<double> products;  // in double: their differences count, and they may be large
    std::vector<int32_t> keys;
    std::vector<T> weights;  // of the support, once it is known
};

// the keys of an example that are no padding, in order, and a filter over them for each head
template <class T, class Filter> struct Head {
    std::vector<int32_t> ids;
    std::unique_ptr<Filter> filter;
    bool finite = true;
};

template <class T, class Filter> class Attention {
   public:
    Attention(const Problem &p, const T *q, const T *k, const T *v) : p_(p), q_(q), k_(k), v_(v) {}

    void forward(T *out, double *peaks, double *thresholds) {
        prepare();
        const int64_t blocks = (p_.queries + BLOCK - 1) / BLOCK, all = p_.batch * p_.heads * blocks;
#pragma omp parallel num_threads(p_.threads)
        {
            Scratch scratch;
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < all; ++n)
                for_block(n / blocks, n % blocks, nullptr, nullptr, scratch, [&](int64_t head, Row<T> &row) {
                    const int64_t at = head * p_.queries + row.i;
                    solve(head, row, peaks[at], thresholds[at]);
                    T *to = out + at * p_.size;
                    for (size_t m = 0; m < row.keys.size(); ++m)
                        add(to, value(head, row.keys[m]), kept(head, row.i, row.keys[m], row.weights[m]), p_.size);
                });
        }
    }

    // gradients of alpha (B, H) too where asked for
    void backward(const T *gradient, const double *peaks, const double *thresholds, T *dq, T *dk, T *dv, double *dalpha) {
        prepare();
        const int64_t group = p_.heads / p_.key_heads, blocks = (p_.queries + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(p_.threads)
        {
            Scratch scratch;
            std::vector<T> along, slopes;
            // the gradients of a head's keys and values are sums over queries: one thread has them all, and their order is one
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < p_.batch * p_.key_heads; ++n)
                for (int64_t head = n * group; head < (n + 1) * group; ++head)
                    for (int64_t block = 0; block < blocks; ++block)
                        for_block(head, block, peaks, thresholds, scratch, [&](int64_t, Row<T> &row) {
                            const int64_t at = head * p_.queries + row.i;
                            weigh(head, row, peaks[at], thresholds[at]);
                            pull(head, row, gradient + at * p_.size, dq + at * p_.size, dk, dv, dalpha, along, slopes);
                        });
        }
    }

   private:
    struct Scratch {
        std::vector<Row<T>> rows = std::vector<Row<T>>(BLOCK);
        std::vector<typename Filter::Queries> queries = std::vector<typename Filter::Queries>(BLOCK / ROWS);
        std::vector<Passed<T>> passed = std::vector<Passed<T>>(ROWS);
    };

    const Problem &p_;
    const T *q_, *k_, *v_;
    std::vector<Head<T, Filter>> heads_;  // (B, H_k)

    int64_t key_head(int64_t head) const {
        return head / p_.heads * p_.key_heads + head % p_.heads / (p_.heads / p_.key_heads);
    }
    const T *query(int64_t head, int64_t i) const { return q_ + (head * p_.queries + i) * p_.size; }
    const T *key(int64_t head, int64_t j) const { return k_ + (key_head(head) * p_.keys + j) * p_.size; }
    const T *value(int64_t head, int64_t j) const { return v_ + (key_head(head) * p_.keys + j) * p_.size; }
    double alpha(int64_t head) const { return p_.alpha[head % p_.heads]; }
    double unit(int64_t head) const { return (alpha(head) - 1) * p_.scale; }  // of x, for a product of 1

    void prepare() {
        heads_.resize(p_.batch * p_.key_heads);
#pragma omp parallel for schedule(dynamic) num_threads(p_.threads)
        for (int64_t n = 0; n < p_.batch * p_.key_heads; ++n) {
            Head<T, Filter> &h = heads_[n];
            const uint8_t *valid = p_.key_valid + n / p_.key_heads * p_.keys;
            const T *k = k_ + n * p_.keys * p_.size;
            for (int64_t j = 0; j < p_.keys; ++j)
                if (valid[j]) {
                    h.ids.push_back(j);
                    for (int64_t x = 0; x < p_.size; ++x) h.finite &= std::isfinite(k[j * p_.size + x] * T(1024));
                }
            if (h.finite) h.filter.reset(new Filter(k, h.ids, p_.size));
        }
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
        bool finite = h.finite;
        for (int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, p_.queries); ++i) {
            if (!valid[i]) continue;
            Row<T> &row = s.rows[count++];
            row.i = i, row.keys.clear(), row.products.clear();
            row.peak = row.least = -std::numeric_limits<T>::infinity();
            if (peaks) row.least = T(peaks[head * p_.queries + i] + (thresholds[head * p_.queries + i] - SLACK) / unit(head));
            for (int64_t x = 0; x < p_.size; ++x) finite &= std::isfinite(query(head, i)[x] * T(1024));
        }
        if (!count || h.ids.empty()) return;
        const int64_t first_i = s.rows[0].i, last_i = s.rows[count - 1].i;
        const auto place = [&](int64_t j) { return std::lower_bound(h.ids.begin(), h.ids.end(), j) - h.ids.begin(); };
        const int64_t begin = place(first_i - p_.back), end = place(last_i + p_.ahead + 1);
        if (finite)
            filtered(head, h, count, begin, end, place(first_i), !peaks, s);
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
            int64_t some = 0;  // that this query may see; the last panel is filled up with none
            for (int64_t n = 0; n < passed.count; ++n) {
                const int64_t c = passed.place[n];
                passed.upper[some] = passed.upper[n], passed.place[some] = c;
                some += c >= begin && c < end && allowed(head, row.i, h.ids[c]);
            }
            if (!some) continue;
            if (raising && row.keys.empty()) {  // the best one is near its bound: it rules out most of the first ones
                const int64_t best = std::max_element(passed.upper, passed.upper + some) - passed.upper;
                row.peak = dot<double>(query(head, row.i), key(head, h.ids[passed.place[best]]), p_.size);
                row.least = T(row.peak - (1 + SLACK) / unit(head));
            }
            const size_t before = row.keys.size();
            for (int64_t n = 0; n < some; ++n)
                if (passed.upper[n] >= row.least) row.keys.push_back(h.ids[passed.place[n]]);
            multiply(head, row, before);
            if (raising) raise(head, row, before);
        }
    }

    // exact products with row.keys, from `from` on
    void multiply(int64_t head, Row<T> &row, size_t from) const {
        const size_t count = row.keys.size();
        row.products.resize(count);
        const T *q = query(head, row.i), *k = key(head, 0);
        size_t n = from;
        for (; n + 4 <= count; n += 4) {  // four at a time: additions do not wait for each other
            const T *a = k + row.keys[n] * p_.size, *b = k + row.keys[n + 1] * p_.size;
            const T *c = k + row.keys[n + 2] * p_.size, *d = k + row.keys[n + 3] * p_.size;
            double s = 0, t = 0, u = 0, w = 0;
#pragma omp simd reduction(+ : s, t, u, w)
            for (int64_t x = 0; x < p_.size; ++x) {
                const double y = q[x];
                s += y * a[x], t += y * b[x], u += y * c[x], w += y * d[x];
            }
            row.products[n] = s, row.products[n + 1] = t, row.products[n + 2] = u, row.products[n + 3] = w;
        }
        for (; n < count; ++n) row.products[n] = dot<double>(q, k + row.keys[n] * p_.size, p_.size);
    }

    // The threshold of the keys so far is a lower bound of that of all keys, and so is whatever Newton's steps from the left reach.
    void raise(int64_t head, Row<T> &row, size_t before) const {
        for (size_t n = before; n < row.products.size(); ++n) row.peak = std::max(row.peak, row.products[n]);
        const double by = unit(head), a = alpha(head);
        T threshold = std::max(T((row.least - row.peak) * by), T(-1));
        for (int step = 0; step < 2 && row.keys.size() >= FEW; ++step) {
            T sum = 0, slope = 0;
            if (a == 1.5) {
#pragma omp simd reduction(+ : sum, slope)
                for (size_t n = 0; n < row.products.size(); ++n) {
                    const T e = std::max(T((row.products[n] - row.peak) * by) - threshold, T(0));
                    sum += e * e, slope += e;
                }
            } else {
                for (const double product : row.products)
                    if (const T e = T((product - row.peak) * by) - threshold; e > 0) sum += power(e, a), slope += one_less(e, a);
            }
            const T root = a == 1.5 ? std::sqrt(sum) : a == 2.0 ? T(1) : std::pow(sum, T(2.0 - a));
            threshold += std::max((sum - root) / std::max(slope, T(1e-30)), T(0));
        }
        row.least = T(row.peak + (threshold - SLACK) / by);
        size_t kept = 0;
        for (size_t n = 0; n < row.keys.size(); ++n) {
            row.keys[kept] = row.keys[n], row.products[kept] = row.products[n];
            kept += row.products[n] >= row.least;
        }
        row.keys.resize(kept), row.products.resize(kept);
    }

    // the threshold of a row, in x below its peak, and the weights of its support
    void solve(int64_t head, Row<T> &row, double &peak, double &threshold) const {
        peak = row.peak, threshold = -1;
        to_excess(head, row, peak);
        if (row.keys.empty()) return;
        if (std::any_of(row.weights.begin(), row.weights.end(), [](T x) { return std::isnan(x); })) {
            peak = threshold = std::numeric_limits<double>::quiet_NaN();
            std::fill(row.weights.begin(), row.weights.end(), T(peak));
            return;
        }
        threshold = threshold_of(row.weights.data(), row.weights.size(), alpha(head), [](int64_t) { return T(1); });
        to_probabilities(head, row, T(threshold));
    }

    // the weights of a row whose peak and threshold are known
    void weigh(int64_t head, Row<T> &row, double peak, double threshold) const {
        to_excess(head, row, peak);
        to_probabilities(head, row, T(threshold));
    }

    // x below the peak, as weights
    void to_excess(int64_t head, Row<T> &row, double peak) const {
        row.weights.resize(row.keys.size());
        for (size_t n = 0; n < row.keys.size(); ++n) row.weights[n] = T((row.products[n] - peak) * unit(head));
    }

    // from x to probabilities, the support alone
    void to_probabilities(int64_t head, Row<T> &row, T threshold) const {
        size_t kept = 0;
        T total = 0;
        for (size_t n = 0; n < row.keys.size(); ++n) {
            const T e = row.weights[n] - threshold;
            if (e <= 0) continue;
            row.keys[kept] = row.keys[n], total += row.weights[kept] = power(e, alpha(head)), ++kept;
        }
        row.keys.resize(kept), row.weights.resize(kept);
        if (alpha(head) != 1.5 && alpha(head) != 2.0)  // near 1 the power makes much of the last digit of the threshold
            for (T &w : row.weights) w /= total;
    }

    // a probability after dropout
    T kept(int64_t head, int64_t i, int64_t j, T weight) const {
        if (p_.dropped == 0) return weight;
        return chance(p_.seed, head * p_.queries + i, j) < p_.dropped ? T(0) : weight / T(1 - p_.dropped);
    }

    // dz = s (g - (s·g) / Σs) with s = p^(2 - alpha), g the gradients of the probabilities; and along alpha
    void pull(int64_t head, const Row<T> &row, const T *gradient, T *dq, T *dk, T *dv, double *dalpha, std::vector<T> &along,
              std::vector<T> &slopes) const {
        const int64_t count = row.keys.size(), own = key_head(head) * p_.keys;
        const double a = alpha(head);
        along.resize(count), slopes.resize(count);
        T weighted = 0, sum = 0;
        for (int64_t n = 0; n < count; ++n) {
            const T p = row.weights[n];
            const T through = kept(head, row.i, row.keys[n], T(1));
            along[n] = through == T(0) ? T(0) : through * dot<T>(gradient, value(head, row.keys[n]), p_.size);
            slopes[n] = a == 1.5 ? std::sqrt(p) : a == 2.0 ? T(1) : std::pow(p, T(2.0 - a));
            weighted += slopes[n] * along[n], sum += slopes[n];
            add(dv + (own + row.keys[n]) * p_.size, gradient, through * p, p_.size);
        }
        weighted /= std::max(sum, T(1e-30));
        for (int64_t n = 0; n < count; ++n) {
            const T dz = slopes[n] * (along[n] - weighted) * T(p_.scale);
            add(dk + (own + row.keys[n]) * p_.size, query(head, row.i), dz, p_.size);
            add(dq, key(head, row.keys[n]), dz, p_.size);
        }
        if (!dalpha) return;
        double straight = 0, entropies = 0, entropy = 0;  // Correia, Niculae and Martins 2019, Proposition 1
        for (int64_t n = 0; n < count; ++n) {
            const double p = row.weights[n], h = -p * std::log(p);
            straight += p * along[n], entropies += h * along[n], entropy += h;
        }
        dalpha[head] += (straight - weighted) / ((a - 1) * (a - 1)) + (entropies - weighted * entropy) / (a - 1);
    }
};

// with the fastest filter of this processor
template <class T, class F> void with_filter(const Problem &p, const T *q, const T *k, const T *v, const F &run) {
#ifdef SPARSEFINDER_VNNI
    if constexpr (std::is_same_v<T, float>)
        if (!p.plain && Int8Filter::works()) return run(Attention<T, Int8Filter>(p, q, k, v));
#endif
    run(Attention<T, PlainFilter<T>>(p, q, k, v));
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                    \
    void forward_##NAME(const Problem *p, const T *q, const T *k, const T *v, T *out, double *peaks, double *thresholds) {             \
        with_filter(*p, q, k, v, [&](auto &&attention) { attention.forward(out, peaks, thresholds); });                      \
    }                                                                                                                         \
    void backward_##NAME(const Problem *p, const T *q, const T *k, const T *v, const T *gradient, const double *peaks,             \
                         const double *thresholds, T *dq, T *dk, T *dv, double *dalpha) {                                          \
        with_filter(*p, q, k, v, [&](auto &&attention) {                                                                      \
            attention.backward(gradient, peaks, thresholds, dq, dk, dv, dalpha);                                              \
        });                                                                                                                   \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
}
