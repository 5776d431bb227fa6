// One query of dense attention and the keys that can be in its support: products, threshold, probabilities and gradients.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "entmax.hpp"
#include "vectors.hpp"

// the same fields, in this order, in dense.py
struct Problem {
    int64_t batch, heads, key_heads, queries, keys, size;  // B, H, H_k, N_q, N_k, D
    int64_t back, ahead;       // query i sees keys i - back to i + ahead; whoever sees all has N_q and N_k here
    int64_t mask_batch, mask_head, mask_row;  // steps of `mask`, 0 where it is the same for all
    int64_t threads, seed, without;  // without: so many of the fastest filters are not used
    const uint8_t *query_valid, *key_valid;   // (B, N_q), (B, N_k)
    const uint8_t *mask;       // (B or 1, H or 1, N_q or 1, N_k), or none
    const double *alpha;       // (H)
    double scale, dropped;     // of q·k; the share of probabilities that dropout takes
};

constexpr double SLACK = 1e-5;  // of x, by which a bound is lower than it need be: what it is made of was rounded
constexpr size_t FEW = 24;      // keys of a row for which a better bound than the peak's costs more than it saves

// A number in [0, 1) for each pair, the same forward and backward.
inline double chance(uint64_t seed, uint64_t row, uint64_t key) {
    uint64_t z = seed + row * 0x9E3779B97F4A7C15ull + key * 0xD1B54A32D192ED03ull + 0x2545F4914F6CDD1Dull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull, z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return double((z ^ (z >> 31)) >> 11) * (1.0 / 9007199254740992.0);
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

// What is done with the rows of a problem once their keys are listed.
template <class T> class RowsOf {
   public:
    RowsOf(const Problem &p, const T *q, const T *k, const T *v) : p_(p), q_(q), k_(k), v_(v) {}

   protected:
    const Problem &p_;
    const T *q_, *k_, *v_;

    int64_t key_head(int64_t head) const {
        return head / p_.heads * p_.key_heads + head % p_.heads / (p_.heads / p_.key_heads);
    }
    const T *query(int64_t head, int64_t i) const { return q_ + (head * p_.queries + i) * p_.size; }
    const T *key(int64_t head, int64_t j) const { return k_ + (key_head(head) * p_.keys + j) * p_.size; }
    const T *value(int64_t head, int64_t j) const { return v_ + (key_head(head) * p_.keys + j) * p_.size; }
    double alpha(int64_t head) const { return p_.alpha[head % p_.heads]; }
    double unit(int64_t head) const { return (alpha(head) - 1) * p_.scale; }  // of x, for a product of 1

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

    // the values of the support, by their probabilities
    void mix(int64_t head, const Row<T> &row, T *to) const {
        const size_t count = row.keys.size();
        const auto weight = [&](size_t n) { return kept(head, row.i, row.keys[n], row.weights[n]); };
        size_t n = 0;
        for (; n + 2 <= count; n += 2) {  // two at a time: what was written is waited for half as often
            const T *a = value(head, row.keys[n]), *b = value(head, row.keys[n + 1]);
            const T of_a = weight(n), of_b = weight(n + 1);
#pragma omp simd
            for (int64_t x = 0; x < p_.size; ++x) to[x] += of_a * a[x] + of_b * b[x];
        }
        if (n < count) add(to, value(head, row.keys[n]), weight(n), p_.size);
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
