// The threshold of entmax by Newton's method on the p-norm, from the left: sparsefinder/numerics/entmax_newton.py says why.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// e^p with p = 1 / (alpha - 1), and e^(p - 1)
template <class T> T power(T e, double alpha) {
    return alpha == 1.5 ? e * e : alpha == 2.0 ? e : std::pow(e, T(1.0 / (alpha - 1.0)));
}
template <class T> T one_less(T e, double alpha) {
    return alpha == 1.5 ? e : alpha == 2.0 ? T(1) : std::pow(e, T((2.0 - alpha) / (alpha - 1.0)));
}

// What can be above the threshold: x = (alpha - 1)(score - peak) of the scores for which it is above -1, and whose they are. Returns
// how many, -1 where a score is no number. Written always, kept sometimes: no branch to guess.
template <class T, class F>
int64_t near_peak(const T *scores, int64_t count, T peak, T scale, T *x, int32_t *ids, const F &id) {
    int64_t some = 0;
    bool undefined = false;
    for (int64_t n = 0; n < count; ++n) {
        const T below = (scores[n] - peak) * scale;
        undefined |= std::isnan(below);
        ids[some] = id(n), x[some] = below;
        some += below > T(-1);
    }
    return undefined ? -1 : some;
}

// of such x, where entry n stands for many(n) equal ones. It lies in [-1, 0], so whoever is at or below -1
// need not be given: it is in no support, whatever the others are. Where the largest may stand for less than one, it lies in
// [start, 0], start = -least^(1 - alpha). After a few steps it is not reached yet, from below.
template <class T, class F>
T threshold_of(const T *x, int64_t count, double alpha, const F &many, T start = -1, int steps = 160) {
    T threshold = start;
    for (int step = 0; step < steps; ++step) {
        T sum = 0, slope = 0;
        if (alpha == 1.5) {
#pragma omp simd reduction(+ : sum, slope)
            for (int64_t n = 0; n < count; ++n) {
                const T e = std::max(x[n] - threshold, T(0));
                sum += many(n) * e * e, slope += many(n) * e;
            }
        } else {
            for (int64_t n = 0; n < count; ++n) {
                const T e = x[n] - threshold;
                if (e > 0) sum += many(n) * power(e, alpha), slope += many(n) * one_less(e, alpha);
            }
        }
        const T root = alpha == 1.5 ? std::sqrt(sum) : alpha == 2.0 ? T(1) : std::pow(sum, T(2.0 - alpha));
        const T move = (sum - root) / std::max(slope, T(1e-30));
        threshold += move;
        // the sum of thousands of terms near 1 is rounded so much that a step may go beyond the root: then the next comes back
        if (!(std::abs(move) > 2 * std::numeric_limits<T>::epsilon())) break;
    }
    return threshold;
}
