// The same as routing.hpp in causal attention: centroids stand for their keys, and a query counts those up to itself.

#pragma once

#include "routing.hpp"

namespace {

// from queries (groups, rows, size), centroids (heads, columns, size) scaled as scores are, and the cluster of each key
// (groups, rows); whoever has another id is in none
template <class T>
std::unique_ptr<Kept> route_causal(const Choice &rule, int64_t size, const T *q, const T *centres, const int64_t *ids,
                                   int32_t *counts) {
    const T nothing = -std::numeric_limits<T>::infinity();
    auto kept = std::make_unique<Kept>(rule);
    for (int64_t group = 0; group < rule.groups; ++group) {
        const Panels<T> laid(centres + group % rule.heads * rule.columns * size, rule.columns, size);
        const int64_t *own = ids + group * rule.rows, width = laid.width();
        const T level = rule.levels[group % rule.heads];
        Failure failure;
#pragma omp parallel num_threads(rule.threads)
        {
            std::vector<T> scores, numbers;
            std::optional<Row<T>> row;
            failure.guard([&] { row.emplace(laid.panels, level, T(0)), scores.resize(AT_ONCE * width), numbers.resize(width); });
            const auto one = [&](int64_t block) {
                T keys = 0;
                std::fill(numbers.begin(), numbers.end(), T(0));
                const auto meet = [&](int64_t i) {
                    if (own[i] >= 0 && own[i] < rule.columns) ++numbers[own[i]], ++keys;
                };
                const int64_t first = block * BLOCK, end = std::min(first + BLOCK, rule.rows);
                for (int64_t i = 0; i < first; ++i) meet(i);
                std::vector<int32_t> &chosen = kept->blocks[group * kept->in_group + block];
                for (int64_t from = first; from < end; from += AT_ONCE) {
                    const int64_t some = std::min(AT_ONCE, end - from);
                    std::fill(scores.begin(), scores.end(), T(0));
                    laid.multiply(q + (group * rule.rows + from) * size, some, scores.data());
                    for (int64_t i = from; i < from + some; ++i) {
                        meet(i);
                        T *values = scores.data() + (i - from) * width;
#pragma omp simd
                        for (int64_t c = 0; c < width; ++c) values[c] = numbers[c] > 0 ? values[c] : nothing;
                        row->values = values, row->numbers = numbers.data(), row->panels = laid.panels;
                        row->budget = level * keys;
                        const size_t before = chosen.size();
                        choose(rule, *row, chosen);
                        counts[group * rule.rows + i] = chosen.size() - before;
                    }
                }
            };
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < kept->in_group; ++block) failure.guard([&] { one(block); });
        }
        failure.rethrow();
    }
    return kept;
}

}  // namespace
