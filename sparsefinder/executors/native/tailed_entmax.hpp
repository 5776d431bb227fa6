// Entmax on clusters with a tail, forward and backward: of each query what lies above its threshold, and nothing else.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "shares.hpp"
#include "tailed_support.hpp"

template <class T> class EntmaxForward {
    Support<T> support_;
    std::vector<T> sum_;

   public:
    explicit EntmaxForward(const Problem &p) : support_(p), sum_(p.size) {}

    void operator()(Clusters<T> &k, const Head<T> &t, int64_t begin, int64_t end, T *to, int64_t to_row, T *thresholds) {
        const Block<T> &b = support_.b;
        const double alpha = b.p.alpha;
        if (b.p.causal) k.mark();  // a threshold is known after all rows were looked at, and mean values are wanted then
        support_.gather(k, t, begin, end, nullptr);
        for (int64_t i = begin; i < end; ++i)
            if (!t.valid[i]) std::fill(to + i * to_row, to + i * to_row + b.size, T(0));
        for (int64_t r = 0; r < b.count(); ++r) {
            if (b.p.causal) k.upto(b.rows[r]);
            const auto &row = support_.rows[r];
            const T threshold = thresholds[b.rows[r]] = support_.threshold(r);
            T total = threshold != threshold ? threshold : T(0);
            std::fill(sum_.begin(), sum_.end(), T(0));
            const auto take = [&](T weight, const T *values) {
                total += weight;
                add(sum_.data(), values, weight, b.size);
            };
            for (const auto &e : row.entries) {
                const T high = e.middle + e.spread - threshold, low = e.middle - e.spread - threshold;
                if (high > 0) take(e.half * (power(high, alpha) + (low > 0 ? power(low, alpha) : T(0))), &k.mean_values[e.cluster * b.width]);
            }
            for (size_t n = 0; n < row.x.size(); ++n)
                if (const T above = row.x[n] - threshold; above > 0) take(power(above, alpha), t.v + row.tokens[n] * t.v_row);
            const T one = total == 0 ? T(0) : 1 / total;  // near alpha = 1 the power makes much of the last digit of the threshold
            for (int64_t x = 0; x < b.size; ++x) to[b.rows[r] * to_row + x] = sum_[x] * one;
        }
    }
};

template <class T> class EntmaxBackward {
    Support<T> support_;
    const int64_t width_;
    Numbers<T> d_means_, d_variances_, d_mean_values_;   // sums, rows of `width`
    Shares<T> shares_;                                   // of causal attention, instead of these
    std::vector<T> along_, slopes_;                      // of the keys of a row

   public:
    explicit EntmaxBackward(const Problem &p)
        : support_(p), width_(whole<T>(p.size)), d_means_(p.clusters * width_), d_variances_(p.clusters * width_),
          d_mean_values_(p.clusters * width_), shares_(p.causal ? p.clusters : 0, p.size) {}

    void operator()(Clusters<T> &k, const Head<T> &t, const Gradients<T> &g) {
        const int64_t size = support_.b.size, some = Block<T>::SIZE;
        const bool causal = support_.b.p.causal;
        for (Numbers<T> *each : {&d_means_, &d_variances_, &d_mean_values_}) each->fill(T(0));
        shares_.clear();
        if (causal) k.rewind(), k.mark();
        for (int64_t end = support_.b.p.queries; end > 0; end -= std::min(end, some)) {  // from the last query back, as shares want it
            support_.gather(k, t, std::max<int64_t>(end - some, 0), end, g.peaks);
            for (int64_t r = support_.b.count() - 1; r >= 0; --r) {
                const int64_t i = support_.b.rows[r];
                if (causal) k.upto(i);
                of_row(k, support_.rows[r], i, t, g);
                if (const int64_t own = causal ? k.cluster_of(i) : -1; own >= 0)
                    shares_.give(k, own, t.k + i * t.k_row, g.dk + i * g.dk_row, g.dv + i * g.dv_row);
            }
        }
        if (causal) return;
        for (int64_t c = 0; c < k.count; ++c)  // a key's share of the gradients of its cluster's mean, variance and mean value
            for (int64_t n = k.first[c]; n < k.first[c + 1]; ++n) {
                const T share = T(1) / k.keys_of(c), *key = t.k + k.tokens[n] * t.k_row;
                T *dk = g.dk + k.tokens[n] * g.dk_row, *dv = g.dv + k.tokens[n] * g.dv_row;
                for (int64_t x = 0; x < size; ++x) {
                    const int64_t at = c * width_ + x;
                    dk[x] += share * (d_means_[at] + 2 * (key[x] - k.mean_rows[at]) * d_variances_[at]);
                    dv[x] += share * d_mean_values_[at];
                }
            }
    }

   private:
    // dz = s (g - (s·g) / Σs): p = n e^(1 / (alpha - 1)) of a half of n keys, s = n e^((2 - alpha) / (alpha - 1)), g along its value
    void of_row(const Clusters<T> &k, const typename Support<T>::Row &row, int64_t i, const Head<T> &t, const Gradients<T> &g) {
        const double alpha = support_.b.p.alpha;
        const int64_t size = support_.b.size;
        const T threshold = g.peaks[i], root = T(1 / std::sqrt(double(size))), least = T(1e-4 * (alpha - 1));
        const T *q = t.q + i * t.q_row, *gradient = g.gradient + i * g.gradient_row;
        T *dq = g.dq + i * g.dq_row;
        const size_t entries = row.entries.size(), count = entries + row.x.size();
        const auto above = [](T x, T p) { return x > 0 ? p : T(0); };
        T total = 0, sum = 0, weighted = 0;
        along_.resize(count), slopes_.resize(count);
        for (size_t n = 0; n < entries; ++n) {
            const auto &e = row.entries[n];
            const T high = e.middle + e.spread - threshold, low = e.middle - e.spread - threshold;
            along_[n] = dot<T>(gradient, &k.mean_values[e.cluster * width_], size);
            slopes_[n] = e.half * (above(high, one_less(high, alpha)) + above(low, one_less(low, alpha)));
            total += e.half * (above(high, power(high, alpha)) + above(low, power(low, alpha)));
        }
        for (size_t n = entries; n < count; ++n) {
            const T x = row.x[n - entries] - threshold;
            along_[n] = dot<T>(gradient, t.v + row.tokens[n - entries] * t.v_row, size);
            slopes_[n] = above(x, one_less(x, alpha)), total += above(x, power(x, alpha));
        }
        for (size_t n = 0; n < count; ++n) sum += slopes_[n], weighted += slopes_[n] * along_[n];
        weighted /= std::max(sum, T(1e-30));
        const T one = total == 0 ? T(0) : 1 / total;
        for (size_t n = 0; n < entries; ++n) {
            const auto &e = row.entries[n];
            const T high = e.middle + e.spread - threshold, low = e.middle - e.spread - threshold, apart = along_[n] - weighted;
            const int64_t at = e.cluster * width_;
            const T weight = one * e.half * (above(high, power(high, alpha)) + above(low, power(low, alpha))), middle = slopes_[n] * apart * root;
            // by the variance of the scores: (s of the higher half - s of the lower) / 2 spreads
            const T bend = e.spread <= least ? T(0) : e.half * (above(high, one_less(high, alpha)) - above(low, one_less(low, alpha))) * apart * T(alpha - 1) / (2 * e.spread) * root * root;
            for (int64_t x = 0; x < size; ++x) dq[x] += middle * k.mean_rows[at + x] + 2 * bend * q[x] * k.variance_rows[at + x];
            if (support_.b.p.causal) {
                shares_.add(k, e.cluster, q, middle, bend, gradient, weight);
                continue;
            }
            add(&d_mean_values_[at], gradient, weight, size), add(&d_means_[at], q, middle, size);
            for (int64_t x = 0; x < size; ++x) d_variances_[at + x] += bend * q[x] * q[x];
        }
        for (size_t n = entries; n < count; ++n) {
            const int64_t j = row.tokens[n - entries];
            const T x = row.x[n - entries] - threshold, slope = slopes_[n] * (along_[n] - weighted) * root;
            add(g.dv + j * g.dv_row, gradient, one * above(x, power(x, alpha)), size);
            add(g.dk + j * g.dk_row, q, slope, size), add(dq, t.k + j * t.k_row, slope, size);
        }
    }
};
