// Exponentials of many numbers at a time: that of the C library keeps a loop from being done by lanes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// exp x for x <= 0, to a rounding or two: x = n log 2 + r, and a polynomial of r in [-log 2 / 2, log 2 / 2] (the Taylor series, the
// last coefficients fitted). Below the smallest normal number it is 0.
inline float exponential(float x) {
    const float n = std::nearbyint(std::max(x, -87.0f) * 1.44269504f);
    const float r = (std::max(x, -87.0f) - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f, p = p * r + 8.3334519e-3f, p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f, p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}
inline double exponential(double x) { return std::exp(x); }

// e[n] = exp(x[n] - peak), and their sum; NaN where peak or some x is no number
template <class T> T exponentials(const T *x, int64_t count, T peak, T *e) {
    T total = 0, undefined = 0;
#pragma omp simd reduction(+ : total, undefined)
    for (int64_t n = 0; n < count; ++n) {
        const T below = x[n] - peak;
        e[n] = exponential(below);
        total += e[n], undefined += below == below ? T(0) : T(1);
    }
    return undefined > 0 ? peak - peak + std::nan("") : total;
}
