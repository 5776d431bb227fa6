// Entmax on clusters with a tail: which keys and which halves of entries of a query lie above its threshold, and that threshold.
//
// Whatever else a row holds, its threshold is not below that of a part of it: so the entries, which are known first, say which keys
// need not be kept, and most are gone where they were multiplied.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "clusters.hpp"
#include "entmax.hpp"
#include "tailed.hpp"

template <class T> class Support {
    static constexpr int64_t L = LANES_OF<T>, SIZE = Block<T>::SIZE;

   public:
    struct Entry {
        int32_t cluster;
        T middle, spread, half;  // in x = (alpha - 1) score, and half of the keys that it stands for
    };
    struct Row {
        bool undefined;  // some entry is no number
        std::vector<T> x;
        std::vector<int32_t> tokens;
        std::vector<Entry> entries;
    };

    Block<T> b;
    std::vector<Row> rows;

    explicit Support(const Problem &p)
        : b(p), rows(SIZE), alpha_(p.alpha), lowest_(-std::pow(T(2), T(p.alpha - 1))), flat_(b.words()), listed_(p.clusters + 1) {}

    // What of queries `begin` to `end` may lie above their thresholds; above the `thresholds` where these are known.
    void gather(Clusters<T> &k, const Head<T> &t, int64_t begin, int64_t end, const T *thresholds) {
        b.take(t, begin, end);
        b.each_rows(k, [&](int64_t row, auto number) {
            constexpr int R = decltype(number)::value;
            b.template score<R>(k, row);
            for (int r = 0; r < R; ++r) begin_row(k, t, row + r, r, thresholds);
        });
        for (int64_t c = 0; c < k.count; ++c)
            in_rows<T>(b.some_takers[c], [&](int64_t n, auto R) { exact<decltype(R)::value>(k, c, &b.takers[c * SIZE + n]); });
    }

    // The threshold of a row: infinity where it sees nothing, NaN where something is no number.
    T threshold(int64_t row) {
        const Row &own = rows[row];
        if (own.undefined) return std::numeric_limits<T>::quiet_NaN();
        put_halves(own.entries.data(), own.entries.size(), b.reference[row], own.x.size());
        for (const T x : own.x) below_[put_] = x, copies_[put_] = 1, ++put_;
        return put_ ? solve(b.reference[row]) : std::numeric_limits<T>::infinity();
    }

   private:
    const double alpha_;
    const T lowest_;  // of a threshold below the largest x, where that may be of half a key
    std::vector<uint64_t> flat_;  // clusters whose spread is left out of a bound
    std::vector<std::pair<int32_t, T>> besides_;  // keys beside the clusters of a row, and their x
    std::vector<Entry> listed_;  // entries of a row, the first `some_`
    std::vector<T> below_, copies_;  // what a threshold is found of, the first `put_`
    size_t some_ = 0, put_ = 0;

    // both halves of entries that are above the floor, with room for more; written always, kept sometimes: no branch to guess
    void put_halves(const Entry *entries, size_t count, T floor, size_t more = 0) {
        if (below_.size() < 2 * count + more + 1) below_.resize(2 * (2 * count + more + 1)), copies_.resize(below_.size());
        put_ = 0;
        for (size_t n = 0; n < count; ++n) {
            const T low = entries[n].middle - entries[n].spread;
            below_[put_] = entries[n].middle + entries[n].spread, copies_[put_] = entries[n].half, ++put_;
            below_[put_] = low, copies_[put_] = entries[n].half, put_ += low > floor;
        }
    }

    // the threshold of what was put, which is not below `floor`, or what some steps reach of it
    T solve(T floor, int steps = 160) {
        T peak = below_[0];
        bool undefined = false;
        for (size_t n = 0; n < put_; ++n) peak = std::max(peak, below_[n]), undefined |= below_[n] != below_[n];
        if (undefined) return std::numeric_limits<T>::quiet_NaN();
        for (size_t n = 0; n < put_; ++n) below_[n] -= peak;
        const T *copies = copies_.data(), start = std::min(std::max(lowest_, floor - peak), T(0));
        return peak + threshold_of(below_.data(), put_, alpha_, [=](int64_t n) { return copies[n]; }, start, steps);
    }

    void begin_row(const Clusters<T> &k, const Head<T> &t, int64_t row, int64_t r, const T *thresholds) {
        const int64_t i = b.rows[row];
        uint64_t *bits = &b.taken[b.row_word(row)];
        Row &own = rows[row];
        own.x.clear(), own.tokens.clear(), own.entries.clear();
        if (b.around.hears_all(i))
            b.by_all(k, bits);
        else if (b.p.levels)
            by_level(k, r, t.level, bits);
        else
            b.by_ids(k, t.ids + i * b.p.slots, bits);
        b.join(row);
        std::copy(bits, bits + b.words(), flat_.begin());
        besides_.clear();
        if (b.around.any()) {
            b.each_beside(t, row, [&](int32_t j, T x) { besides_.emplace_back(j, x); });
            for (const int32_t c : b.around.clusters) flat_[c / 64] |= uint64_t(1) << c % 64;
        }
        T floor = thresholds ? thresholds[i] : bound(k, r, own.undefined);
        list(k, r, bits, floor, b.around.any());
        if (!thresholds && !own.undefined) floor = raised(floor);
        own.entries.assign(listed_.begin(), listed_.begin() + some_);
        b.reference[row] = floor;
        for (const auto &[j, x] : besides_)
            if (!(x <= floor)) own.x.push_back(x), own.tokens.push_back(j);
    }

    // Below the threshold: the largest key of a cluster is not below their mean, and the higher half of an entry is not either.
    T bound(const Clusters<T> &k, int64_t r, bool &undefined) const {
        const T lowest = std::numeric_limits<T>::lowest();  // an empty cluster is below it, NaN is not
        Wide<T> most = all_of(-std::numeric_limits<T>::infinity()), check{};
        for (int64_t c = 0; c < k.panels * L; c += L) {
            const Wide<T> middle = load(&b.scores[b.at(r, c)]);
            most = larger<T>(middle + without(load(&b.spreads[b.at(r, c)]), Block<T>::lanes(flat_.data(), c)), most);
            check += (middle < lowest ? Wide<T>{} : middle) * T(0);
        }
        undefined = sum_of(check) != 0;
        return largest_of(most) + lowest_ * T(1.001);
    }

    // lists the entries of which a half is above the floor
    void list(const Clusters<T> &k, int64_t r, const uint64_t *bits, T floor, bool around) {
        some_ = 0;
        for (int64_t c = 0; c < k.panels * L; c += L) {
            const int64_t at = b.at(r, c);
            const Wide<T> high = load(&b.scores[at]) + load(&b.spreads[at]);
            for (uint32_t left = greater(high, all_of(floor)) & ~Block<T>::lanes(bits, c); left; left &= left - 1) {
                const int64_t lane = __builtin_ctz(left);
                const T number = k.number[c + lane] - (around ? b.around.seen(c + lane) : 0);
                listed_[some_] = {int32_t(c + lane), b.scores[at + lane], b.spreads[at + lane], number / 2};
                some_ += number > 0;
            }
        }
    }

    // a better floor, by the entries: whatever Newton's steps from the left reach is below their threshold, and that below the row's
    T raised(T floor) {
        if (!some_) return floor;
        put_halves(listed_.data(), some_, floor);
        const T reached = solve(floor, 4);
        // what it is made of was rounded
        floor = std::max(floor, reached - T(1e-5) - 8 * std::numeric_limits<T>::epsilon() * (std::abs(reached) + 2));
        size_t kept = 0;
        for (size_t n = 0; n < some_; ++n) {
            listed_[kept] = listed_[n];
            kept += listed_[kept].middle + listed_[kept].spread > floor;
        }
        some_ = kept;
        return floor;
    }

    // the keys of cluster c, for some of the queries that take it
    template <int R> void exact(const Clusters<T> &k, int64_t c, const int32_t *who) {
        b.template pack<R>(b.queries, who);
        in_pairs(k.panel[c], b.panels_seen(k, c, who, R), [&](int64_t panel, auto vectors) __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            Wide<T> sums[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) sums[r][v] = b.start(k, panel + v, who[r]);
            b.template multiply_packed<R, V>(k.keys, panel, sums);
            for (int r = 0; r < R; ++r) {
                Row &own = rows[who[r]];
                for (int v = 0; v < V; ++v)
                    for (uint32_t left = greater(sums[r][v], all_of(b.reference[who[r]])); left; left &= left - 1) {
                        const int64_t lane = __builtin_ctz(left);
                        own.x.push_back(sums[r][v][lane]);
                        own.tokens.push_back(k.tokens[k.first[c] + (panel + v - k.panel[c]) * L + lane]);
                    }
            }
        });
    }

    // as softmax does, by what entmax makes of all entries: the weight of a key times the spread of the scores
    void by_level(const Clusters<T> &k, int64_t r, double level, uint64_t *bits) {
        std::fill(bits, bits + b.words(), 0);
        std::fill(flat_.begin(), flat_.end(), 0);
        bool undefined;
        const T floor = bound(k, r, undefined);
        list(k, r, bits, floor, false);
        if (!some_ || undefined) return;
        put_halves(listed_.data(), some_, floor);
        const T threshold = solve(floor), share = T(level / k.keys_in_all);
        for (size_t n = 0; n < some_; ++n) {
            const Entry &e = listed_[n];
            const T middle = e.middle - threshold;
            if (!(middle + e.spread > 0)) continue;
            const T of_a_key = (power(middle + e.spread, alpha_) + (middle > e.spread ? power(middle - e.spread, alpha_) : T(0))) / 2;
            if (of_a_key * e.spread / T(alpha_ - 1) > share) bits[e.cluster / 64] |= uint64_t(1) << e.cluster % 64;
        }
    }
};
