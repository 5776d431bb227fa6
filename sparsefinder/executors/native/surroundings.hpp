// What is asked of a layout with a tail, and what a query sees besides the clusters that it takes: keys near it, and global ones.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

// the same fields, in this order, in tailed.py
struct Problem {
    int64_t batch, heads, group, queries, keys, size;  // B, H, heads that share one of keys, N_q, N_k, D
    int64_t slots, clusters, threads;                  // P, C
    int64_t reach;                              // keys on each side of a query that it sees one by one, itself too; -1: none
    int64_t tail;                               // whether a cluster that a query does not take is an entry; else it is left out
    int64_t causal;                             // whether a query sees the keys up to it alone: of one text, as many queries as keys
    const int64_t *q_ids, *k_ids;               // (B, H, N_q, P), (B, H, N_k); -1 for none
    const uint8_t *query_valid, *key_valid;     // (B, N_q), (B, N_k)
    const uint8_t *is_global;                   // (B, N): see all and are seen by all; null: nobody
    const double *levels;                       // (H): a query takes clusters by their entries instead of q_ids; null: it does not
    double alpha;                               // of the normalizer
};

class Surroundings {
    const Problem &p_;
    const int64_t *ids_ = nullptr;
    const uint8_t *valid_ = nullptr, *is_global_ = nullptr;
    std::vector<int32_t> globals_, seen_;

   public:
    std::vector<int32_t> keys;      // of the query that was looked at: those that it sees beside its clusters
    std::vector<int32_t> clusters;  // in which some of them are

    explicit Surroundings(const Problem &p) : p_(p), seen_(p.clusters) {}

    bool any() const { return p_.reach >= 0 || p_.is_global; }

    // a head of an example
    void take(int64_t part) {
        const int64_t example = part / p_.heads;
        ids_ = p_.k_ids + part * p_.keys, valid_ = p_.key_valid + example * p_.keys;
        is_global_ = p_.is_global ? p_.is_global + example * p_.keys : nullptr;
        globals_.clear();
        for (int64_t j = 0; is_global_ && j < p_.keys; ++j)
            if (is_global_[j] && valid_[j]) globals_.push_back(j);
    }

    bool hears_all(int64_t i) const { return is_global_ && is_global_[i]; }

    // the keys that query i sees beside those of the clusters for which `takes`
    template <class F> void look(int64_t i, const F &takes) {
        for (const int32_t c : clusters) seen_[c] = 0;
        keys.clear(), clusters.clear();
        const int64_t last = p_.causal ? i + 1 : p_.keys;
        if (hears_all(i)) {  // it takes every cluster
            for (int64_t j = 0; j < last; ++j) see(j, takes);
            return;
        }
        const int64_t first = p_.reach < 0 ? 0 : std::max<int64_t>(i - p_.reach, 0), end = p_.reach < 0 ? 0 : std::min(i + p_.reach + 1, last);
        for (int64_t j = first; j < end; ++j) see(j, takes);
        for (const int32_t j : globals_)
            if ((j < first || j >= end) && j < last) see(j, takes);
    }

    // how many of these keys are in a cluster
    int32_t seen(int64_t c) const { return seen_[c]; }

   private:
    template <class F> void see(int64_t j, const F &takes) {
        const int64_t c = ids_[j];
        const bool inside = c >= 0 && c < p_.clusters;
        if (!valid_[j] || (inside && takes(c))) return;
        keys.push_back(j);
        if (inside && !seen_[c]++) clusters.push_back(c);
    }
};
