// Routing queries to clusters of keys by estimated scores: see patterns/routed.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "boundary.hpp"
#include "entmax.hpp"
#include "panels.hpp"

namespace {

constexpr int64_t BLOCK = 64;  // rows that a thread takes at a time
constexpr double REACH = 3;    // spreads above its mean that a cluster of the entrance is opened for
constexpr double DOORS = 4;    // times the budget that opened clusters hold

struct Choice {
    int64_t heads, groups, rows, columns;  // scores (groups, rows, columns); a group is a head of an example
    int64_t branching;                     // columns in each cluster of the entrance; 0: every column is looked at
    int64_t budget, threads;               // the rule: 1 budget, 0 margin
    const double *levels;                  // of each head
    double alpha;
};

// what rows chose, those of a block one after the other; how many each chose is kept elsewhere
struct Kept {
    int64_t in_group;  // blocks
    std::vector<std::vector<int32_t>> blocks;
    explicit Kept(const Choice &rule) : in_group((rule.rows + BLOCK - 1) / BLOCK), blocks(rule.groups * in_group) {}
};

// position of the largest of the values, given the largest of each panel; the first of equals, and nothing beyond `count`
template <class T> int64_t largest_of(const T *values, const std::vector<T> &most, int64_t count) {
    const int64_t panel = std::max_element(most.begin(), most.end()) - most.begin();
    const T *from = values + panel * PANEL;
    return std::min<int64_t>(std::find(from, from + PANEL, most[panel]) - values, count - 1);
}

// what a rule is told about one row: scores of whole panels, -inf where there is no key, the keys behind each, the level of
// its head and how many keys that is of a budget; and room to choose
template <class T> struct Row {
    T *values = nullptr;
    const T *numbers = nullptr;
    int64_t panels = 0;
    T level, budget;
    std::vector<T> most, above, many;
    std::vector<uint8_t> flags;
    std::vector<int32_t> candidates;
    Row(int64_t panels, T level, T budget)
        : level(level), budget(budget), most(panels), above(panels * PANEL), many(panels * PANEL), flags(panels * PANEL),
          candidates(panels * PANEL) {}
};

// columns of largest score until they stand for a share of the keys
template <class T> void by_budget(Row<T> &row, T budget, std::vector<int32_t> &kept) {
    const T nothing = -std::numeric_limits<T>::infinity();
    const int64_t width = row.panels * PANEL;
    row.most.resize(row.panels);
    for (int64_t panel = 0; panel < row.panels; ++panel) row.most[panel] = largest(row.values + panel * PANEL, PANEL);
    T before = 0;
    for (int64_t taken = 0; taken < width; ++taken) {
        const int64_t at = largest_of(row.values, row.most, width);
        // a column is kept where that brings the row nearer to its budget than stopping before it; the first one always is
        if (!(row.values[at] > nothing) || (taken && !(before + row.numbers[at] / 2 <= budget))) break;
        kept.push_back(at);
        before += row.numbers[at];
        row.values[at] = nothing;
        row.most[at / PANEL] = largest(row.values + at / PANEL * PANEL, PANEL);
    }
}

// the columns that are at or above `bound`, in `candidates`; returns how many
template <class T> int64_t at_least(Row<T> &row, T bound) {
    const T *scores = row.values;
    const int64_t width = row.panels * PANEL;
    uint8_t *flags = row.flags.data();
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) flags[c] = scores[c] >= bound;
    int32_t *ids = row.candidates.data();
    int64_t some = 0;
    for (int64_t c = 0; c < width; c += 8) {
        uint64_t eight;
        std::memcpy(&eight, flags + c, 8);
        if (!eight) continue;
        for (int64_t n = c; n < c + 8; ++n) ids[some] = n, some += flags[n];
    }
    return some;
}

// what is `level` below the threshold of entmax over columns that each stand for as many equal keys as its number says:
// candidates for that, their number in `some`. NaN where there is no key.
template <class T> T lowest(const Choice &rule, Row<T> &row, int64_t &some) {
    const T scale = rule.alpha - 1.0, peak = largest(row.values, row.panels * PANEL);
    some = 0;
    if (std::isinf(peak)) return std::numeric_limits<T>::quiet_NaN();
    // the threshold lies in [-1, 0] below the peak: few can be above it or kept, so that they are looked at alone
    const T reach = (T(1) + std::max(row.level, T(0))) / scale;
    some = at_least(row, peak - reach - 8 * std::numeric_limits<T>::epsilon() * (std::abs(peak) + reach));
    T *above = row.above.data(), *many = row.many.data();
    int64_t near = 0;
    for (int64_t n = 0; n < some; ++n) {
        const int32_t id = row.candidates[n];
        const T below = (row.values[id] - peak) * scale;
        above[near] = below, many[near] = row.numbers[id];
        near += below > T(-1);
    }
    const T threshold = threshold_of(above, near, rule.alpha, [&](int64_t n) { return many[n]; });
    return peak + (threshold - row.level) / scale;
}

// columns above the threshold less the level
template <class T> void by_margin(const Choice &rule, Row<T> &row, std::vector<int32_t> &kept) {
    int64_t some;
    const T bound = lowest(rule, row, some);
    for (int64_t n = 0; n < some; ++n) {
        const int32_t id = row.candidates[n];
        if (row.values[id] >= bound && row.values[id] > -std::numeric_limits<T>::infinity()) kept.push_back(id);
    }
}

template <class T> void choose(const Choice &rule, Row<T> &row, std::vector<int32_t> &kept) {
    rule.budget ? by_budget(row, row.budget, kept) : by_margin(rule, row, kept);
}

// number, mean and variance (count, size) of the keys in some clusters, laid for products
template <class T> struct Clusters {
    Panels<T> means, variances;
    std::vector<T> numbers, missing;  // zeros and -inf beyond the last cluster
    Clusters(const T *of_numbers, const T *mean, const T *variance, int64_t count, int64_t size)
        : means(mean, count, size), variances(variance, count, size), numbers(of_numbers, of_numbers + count) {
        numbers.resize(means.width(), T(0));
        missing.resize(means.width(), -std::numeric_limits<T>::infinity());
        for (int64_t c = 0; c < count; ++c)
            if (numbers[c] > 0) missing[c] = 0;
    }
    // √(q²·variance) + missing + q·mean of a few rows of queries
    void score(const T *q, const T *squares, int64_t rows, T *scores) const {
        spread(squares, rows, scores);
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t c = 0; c < means.width(); ++c) scores[i * means.width() + c] += missing[c];
        means.multiply(q, rows, scores);
    }
    void spread(const T *squares, int64_t rows, T *spreads) const {
        std::fill_n(spreads, rows * means.width(), T(0));
        variances.multiply(squares, rows, spreads);
#pragma omp simd
        for (int64_t n = 0; n < rows * means.width(); ++n) spreads[n] = std::sqrt(spreads[n]);
    }
    // the score of the clusters in one panel, for two rows
    void two(const T *const q[2], const T *const squares[2], int64_t panel, T *const scores[2]) const {
        for (int side = 0; side < 2; ++side) std::fill_n(scores[side], PANEL, T(0));
        variances.two(squares[0], squares[1], panel, scores[0], scores[1]);
        for (int side = 0; side < 2; ++side)
#pragma omp simd
            for (int64_t c = 0; c < PANEL; ++c) scores[side][c] = std::sqrt(scores[side][c]) + missing[panel * PANEL + c];
        means.two(q[0], q[1], panel, scores[0], scores[1]);
    }
};

// some rows of one group: their queries, and where their choices go
template <class T> struct Rows {
    const T *q;
    int64_t count, size;
    int32_t *counts;
    std::vector<int32_t> &ids;
};

// what a thread works on
template <class T> struct Scratch {
    std::vector<T> squares, scores, spreads, numbers;
    std::vector<uint8_t> open;              // rows × clusters of the entrance
    std::vector<int32_t> opened;            // of one row
    std::vector<std::vector<int32_t>> who;  // of each panel of children the rows that look at it, and
    std::vector<int64_t> first;             // where the scores of a row begin, in panels
    std::vector<int64_t> next;              // of a row's panels the one to be scored next
    std::vector<int32_t> panels;            // which panel each of these is
    Row<T> row;
    Scratch(const Clusters<T> &clusters, int64_t size, T level, T budget)
        : squares(BLOCK * size), row(clusters.means.panels, level, budget) {}
};

template <class T> void square(const Rows<T> &rows, std::vector<T> &squares) {
    std::transform(rows.q, rows.q + rows.count * rows.size, rows.q, squares.begin(), std::multiplies<T>());
}

// every cluster is looked at
template <class T> void flat(const Choice &rule, const Clusters<T> &clusters, const Rows<T> &rows, Scratch<T> &scratch) {
    const int64_t width = clusters.means.width();
    Row<T> &row = scratch.row;
    scratch.scores.resize(AT_ONCE * width);
    square(rows, scratch.squares);
    row.numbers = clusters.numbers.data(), row.panels = clusters.means.panels;
    for (int64_t from = 0; from < rows.count; from += AT_ONCE) {
        const int64_t some = std::min(AT_ONCE, rows.count - from);
        clusters.score(rows.q + from * rows.size, scratch.squares.data() + from * rows.size, some, scratch.scores.data());
        for (int64_t i = 0; i < some; ++i) {
            row.values = scratch.scores.data() + i * width;  // gone when the row has chosen
            const size_t before = rows.ids.size();
            choose(rule, row, rows.ids);
            rows.counts[from + i] = rows.ids.size() - before;
        }
    }
}

// which clusters of the entrance each row opens: those that may reach what is kept
template <class T> void open(const Choice &rule, const Clusters<T> &entrance, const Rows<T> &rows, Scratch<T> &scratch) {
    const int64_t width = entrance.means.width();
    Row<T> &row = scratch.row;
    scratch.scores.resize(std::max<size_t>(scratch.scores.size(), AT_ONCE * width)), scratch.spreads.resize(AT_ONCE * width);
    scratch.open.assign(rows.count * width, 0);
    row.numbers = entrance.numbers.data(), row.panels = entrance.means.panels;
    for (int64_t from = 0; from < rows.count; from += AT_ONCE) {
        const int64_t some = std::min(AT_ONCE, rows.count - from);
        const T *q = rows.q + from * rows.size, *squares = scratch.squares.data() + from * rows.size;
        entrance.score(q, squares, some, scratch.scores.data());
        entrance.spread(squares, some, scratch.spreads.data());
        for (int64_t i = 0; i < some; ++i) {
            T *scores = scratch.scores.data() + i * width, *spreads = scratch.spreads.data() + i * width;
            uint8_t *is_open = scratch.open.data() + (from + i) * width;
            row.values = scores;
            int64_t unused;
            const T bound = rule.budget ? T(0) : lowest(rule, row, unused);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) scores[c] += T(REACH - 1) * spreads[c];
            if (rule.budget) {
                scratch.opened.clear();
                by_budget(row, T(DOORS) * row.budget, scratch.opened);
                for (const int32_t c : scratch.opened) is_open[c] = 1;
            } else
                for (int64_t c = 0; c < width; ++c) is_open[c] = scores[c] >= bound && entrance.numbers[c] > 0;
        }
    }
}

// only children of clusters that a row opens are looked at, panel by panel
template <class T>
void descend(const Choice &rule, const Clusters<T> &entrance, const Clusters<T> &clusters, const Rows<T> &rows,
             Scratch<T> &scratch) {
    const T nothing = -std::numeric_limits<T>::infinity();
    const int64_t doors = rule.columns / rule.branching, width = entrance.means.width();
    auto &[squares, scores, spreads, numbers, is_open, opened, who, first, next, panels, row] = scratch;
    square(rows, squares);
    open(rule, entrance, rows, scratch);
    who.resize(clusters.means.panels);
    for (auto &rows_of : who) rows_of.clear();
    first.assign(rows.count + 1, 0), panels.clear();
    for (int64_t i = 0; i < rows.count; ++i) {
        for (int64_t c = 0; c < doors; ++c)
            if (is_open[i * width + c])
                for (int64_t p = c * rule.branching / PANEL; p * PANEL < (c + 1) * rule.branching; ++p)
                    if (who[p].empty() || who[p].back() != i) who[p].push_back(i), panels.push_back(p);
        first[i + 1] = panels.size();
    }
    scores.resize(std::max<size_t>(scores.size(), (panels.size() + 1) * PANEL));  // one more, for a row without a partner
    next.assign(first.begin(), first.end());
    for (int64_t p = 0; p < clusters.means.panels; ++p)
        for (size_t n = 0; n < who[p].size(); n += 2) {
            const int64_t a = who[p][n], b = n + 1 < who[p].size() ? who[p][n + 1] : a;
            T *to[2] = {scores.data() + next[a]++ * PANEL, scores.data() + panels.size() * PANEL};
            if (b != a) to[1] = scores.data() + next[b]++ * PANEL;
            const T *const q[2] = {rows.q + a * rows.size, rows.q + b * rows.size};
            const T *const squared[2] = {squares.data() + a * rows.size, squares.data() + b * rows.size};
            clusters.two(q, squared, p, to);
        }
    for (int64_t i = 0; i < rows.count; ++i) {
        row.panels = first[i + 1] - first[i], row.values = scores.data() + first[i] * PANEL;
        numbers.resize(std::max<size_t>(numbers.size(), row.panels * PANEL));
        for (int64_t n = 0; n < row.panels; ++n) {
            const int64_t p = panels[first[i] + n];
            std::copy_n(clusters.numbers.begin() + p * PANEL, PANEL, numbers.begin() + n * PANEL);
            if (rule.branching % PANEL)  // children of a cluster that is not open
                for (int64_t c = 0; c < PANEL; ++c) {
                    const int64_t door = (p * PANEL + c) / rule.branching;
                    if (door >= doors || !is_open[i * width + door]) row.values[n * PANEL + c] = nothing;
                }
        }
        row.numbers = numbers.data();
        const size_t before = rows.ids.size();
        if (row.panels) choose(rule, row, rows.ids);
        rows.counts[i] = rows.ids.size() - before;
        for (size_t n = before; n < rows.ids.size(); ++n)
            rows.ids[n] = panels[first[i] + rows.ids[n] / PANEL] * PANEL + rows.ids[n] % PANEL;
    }
}

// number, mean and variance of the keys in clusters (groups, columns, size)
template <class T> struct Estimates {
    const T *numbers, *mean, *variance;
    Clusters<T> of(int64_t group, int64_t count, int64_t size) const {
        return {numbers + group * count, mean + group * count * size, variance + group * count * size, count, size};
    }
};

// from queries (groups, rows, size); `entrance` is read where there is a branching
template <class T>
std::unique_ptr<Kept> route(const Choice &rule, int64_t size, const T *q, const Estimates<T> &columns, const Estimates<T> &entrance,
                            int32_t *counts) {
    auto kept = std::make_unique<Kept>(rule);
    for (int64_t group = 0; group < rule.groups; ++group) {
        const Clusters<T> clusters = columns.of(group, rule.columns, size);
        std::optional<Clusters<T>> doors;
        if (rule.branching) doors.emplace(entrance.of(group, rule.columns / rule.branching, size));
        const T level = rule.levels[group % rule.heads];
        const T budget = level * std::accumulate(clusters.numbers.begin(), clusters.numbers.end(), T(0));
        const auto one = [&](int64_t block, Scratch<T> &scratch) {
            const int64_t from = group * rule.rows + block * BLOCK, count = std::min(BLOCK, rule.rows - block * BLOCK);
            const Rows<T> rows{q + from * size, count, size, counts + from, kept->blocks[group * kept->in_group + block]};
            doors ? descend(rule, *doors, clusters, rows, scratch) : flat(rule, clusters, rows, scratch);
        };
        Failure failure;
#pragma omp parallel num_threads(rule.threads)
        {
            std::optional<Scratch<T>> scratch;
            failure.guard([&] { scratch.emplace(clusters, size, level, budget); });
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < kept->in_group; ++block) failure.guard([&] { one(block, *scratch); });
        }
        failure.rethrow();
    }
    return kept;
}

}  // namespace
