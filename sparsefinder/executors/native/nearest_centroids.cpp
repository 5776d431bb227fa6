// The nearest centroid of every vector, of all or of the children of the nearest one a level above: see nearest_centroids.py.
//
// A few vectors at a time are multiplied with a group of centroids, in panels of its own; at the entrance there is one group, below
// it one for each parent, and vectors are sorted by their parent so that some of them go over its children together.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "boundary.hpp"
#include "clusters.hpp"

namespace {

// the same fields, in this order, in nearest_centroids.py
struct Problem {
    int64_t batch, heads, tokens, size;        // B, H, N, D
    int64_t entrance, count, threads;          // centroids at the entrance, 0: all are looked at; and of those that are wanted
};

// centroids of a head, in groups of equally many side by side
template <class T> class Groups {
    static constexpr int64_t L = LANES_OF<T>;
    Laid<T> laid_;
    Numbers<T> bias_;  // added to a product; -inf for what fills a panel
    int64_t panels_ = 0;

   public:
    void take(const T *centres, const T *bias, int64_t count, int64_t in_group, int64_t size) {
        panels_ = (in_group + L - 1) / L;
        laid_.resize(count / in_group * panels_, size), bias_.resize(count / in_group * panels_ * L);
        bias_.fill(-std::numeric_limits<T>::infinity());
        for (int64_t c = 0; c < count; ++c) {
            const int64_t lane = c / in_group * panels_ * L + c % in_group;
            laid_.put(lane, centres + c * size), bias_[lane] = bias[c];
        }
    }

    // which one of a group has the largest sum of product and bias, for R vectors that lie as `multiply` wants them; the first of
    // equals, and of sums that are no numbers
    template <int R> ALWAYS_INLINE void largest(const T *vectors, int64_t group, int32_t *found) const {
        Wide<T> most[R], where[R];
        for (int r = 0; r < R; ++r) most[r] = all_of(-std::numeric_limits<T>::infinity()), where[r] = Wide<T>{};
        const int64_t begin = group * panels_;
        in_pairs(begin, begin + panels_, [&](int64_t panel, auto number) __attribute__((always_inline)) {
            constexpr int V = decltype(number)::value;
            Wide<T> sums[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) sums[r][v] = load(&bias_[(panel + v) * L]);
            for (int64_t from = 0; from < laid_.size; from += APART)
                multiply<R, V, T>(vectors + from * ROWS_AT_ONCE, laid_.panel(panel) + from * L, laid_.apart(), std::min(APART, laid_.size - from), sums);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    where[r] = sums[r][v] > most[r] ? all_of(T(panel + v - begin)) : where[r];
                    most[r] = larger<T>(sums[r][v], most[r]);
                }
        });
        for (int r = 0; r < R; ++r) {
            const T peak = largest_of(most[r]);
            int64_t first = panels_ * L;
            for (int64_t lane = 0; lane < L; ++lane)
                if (most[r][lane] == peak) first = std::min(first, int64_t(where[r][lane]) * L + lane);
            found[r] = first;
        }
    }
};

template <class T> class Search {
    static constexpr int64_t SOME = 2048;  // vectors that are sorted at a time: they stay in the second cache
    const Problem &p_;
    Groups<T> doors_, centres_;
    Numbers<T> vectors_;                     // of a few, APART numbers of each in a row
    std::vector<int32_t> parents_, order_, starts_;

   public:
    static constexpr int64_t AT_A_TIME = SOME;

    explicit Search(const Problem &p)
        : p_(p), vectors_((p.size + APART - 1) / APART * ROWS_AT_ONCE * APART), parents_(SOME), order_(SOME), starts_(p.entrance + 1) {}

    void take(const T *doors, const T *door_bias, const T *centres, const T *bias) {
        if (p_.entrance) doors_.take(doors, door_bias, p_.entrance, p_.entrance, p_.size);
        centres_.take(centres, bias, p_.count, p_.entrance ? p_.count / p_.entrance : p_.count, p_.size);
    }

    void operator()(const T *x, int64_t row, int64_t begin, int64_t end, int64_t *ids) {
        const auto in_order = [&](int64_t n) { return begin + n; };
        const int64_t count = end - begin;
        if (!p_.entrance) return each(centres_, 0, x, row, count, in_order, [&](int64_t n, int32_t found) { ids[begin + n] = found; });
        each(doors_, 0, x, row, count, in_order, [&](int64_t n, int32_t found) { parents_[n] = found; });
        std::fill(starts_.begin(), starts_.end(), 0);
        for (int64_t n = 0; n < count; ++n) ++starts_[parents_[n] + 1];
        for (int64_t c = 0; c < p_.entrance; ++c) starts_[c + 1] += starts_[c];
        for (int64_t n = count; n-- > 0;) order_[--starts_[parents_[n] + 1]] = n;  // each start ends up one place further
        const int64_t children = p_.count / p_.entrance;
        for (int64_t c = 0; c < p_.entrance; ++c) {
            const int64_t from = starts_[c + 1], to = c + 1 < p_.entrance ? starts_[c + 2] : count;
            each(centres_, c, x, row, to - from, [&](int64_t n) { return begin + order_[from + n]; },
                 [&](int64_t n, int32_t found) { ids[begin + order_[from + n]] = c * children + found; });
        }
    }

   private:
    // `take(n, which of a group)` for vectors 0 to count, vector n in row `token(n)` of x
    template <class Token, class Take>
    void each(const Groups<T> &groups, int64_t group, const T *x, int64_t row, int64_t count, const Token &token, const Take &take) {
        in_rows<T>(count, [&](int64_t first, auto number) {
            constexpr int R = decltype(number)::value;
            for (int r = 0; r < R; ++r) {
                const T *from = x + token(first + r) * row;
                for (int64_t d = 0; d < p_.size; d += APART)
                    std::copy_n(from + d, std::min(APART, p_.size - d), &vectors_[d * ROWS_AT_ONCE + r * APART]);
            }
            int32_t found[R];
            groups.template largest<R>(vectors_.data(), group, found);
            for (int r = 0; r < R; ++r) take(first + r, found[r]);
        });
    }
};

template <class T>
void nearest(const Problem &p, Rows<const T> x, const T *doors, const T *door_bias, const T *centres, const T *bias, int64_t *ids) {
    const int64_t some = Search<T>::AT_A_TIME, blocks = (p.tokens + some - 1) / some;
    Failure failure;
#pragma omp parallel num_threads(p.threads)
    {
        std::optional<Search<T>> search;
        int64_t laid = -1;  // the head whose centroids lie in panels
        failure.guard([&] { search.emplace(p); });
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < p.heads * p.batch * blocks; ++n)
            failure.guard([&] {
                const int64_t head = n / blocks / p.batch, example = n / blocks % p.batch, begin = n % blocks * some;
                if (laid != head)
                    search->take(doors + head * p.entrance * p.size, door_bias + head * p.entrance, centres + head * p.count * p.size, bias + head * p.count);
                laid = head;
                (*search)(x.at(example, head), x.row, begin, std::min(begin + some, p.tokens), ids + (example * p.heads + head) * p.tokens);
            });
    }
    failure.rethrow();
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                                          \
    int nearest_##NAME(const Problem *p, const Rows<const T> *x, const T *doors, const T *door_bias, const T *centres, const T *bias, \
                       int64_t *ids) {                                                                                              \
        return status_of([&] { nearest<T>(*p, *x, doors, door_bias, centres, bias, ids); });                                        \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
int64_t layout(int64_t n) { return layout_of<Problem, Rows<float>>(1, n); }
}
