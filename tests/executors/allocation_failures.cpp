// Every allocation of a library fails once: its functions must return NO_MEMORY, and leave nothing behind. Compiled by
// test_native_boundary.py with the library's source as SOURCE and calls of its functions as CALLS.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include SOURCE

std::atomic<long> left{-1}, alive{0};  // allocations until one fails; those that are not freed yet

void *operator new(std::size_t size) {
    if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    ++alive;
    return std::malloc(size ? size : 1);
}
void *operator new(std::size_t size, std::align_val_t to) {
    if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    ++alive;
    return std::aligned_alloc(std::size_t(to), (size + std::size_t(to)) / std::size_t(to) * std::size_t(to));
}
void operator delete(void *p) noexcept {
    if (p) --alive, std::free(p);
}
void operator delete(void *p, std::size_t) noexcept { operator delete(p); }
void operator delete(void *p, std::align_val_t) noexcept { operator delete(p); }
void operator delete(void *p, std::size_t, std::align_val_t) noexcept { operator delete(p); }

constexpr int64_t N = 70, D = 5, THREADS = 2;
float x[2 * N * D], y[2 * N * D], z[2 * N * D], a[2 * N * D], b[2 * N * D], c[2 * N * D];
double peaks[2 * N], thresholds[2 * N], slopes[2], alphas[2] = {1.5, 1.3};
int64_t ids[2 * N], counts[2 * N];
int32_t few[2 * N];
uint8_t valid[N], none[N];

template <class F> int until_it_works(const char *name, const F &call) {
    for (long first = 0;; ++first) {
        const long before = alive;
        left = first;
        const int status = call();
        const bool failed = left.exchange(-1) < 0;
        if (status == 0 && !failed) return first > 0 ? 0 : std::printf("%s allocated nothing\n", name);
        if (status != 1) return std::printf("%s: status %d where allocation %ld fails\n", name, status, first);
        if (alive != before) return std::printf("%s: %ld left behind where allocation %ld fails\n", name, alive - before, first);
    }
}

int main() {
    for (int64_t n = 0; n < 2 * N * D; ++n) x[n] = float(n % 13), y[n] = float(n % 7), z[n] = float(n % 3);
    for (int64_t n = 0; n < 2 * N; ++n) ids[n] = n % 4;
    for (auto &v : valid) v = 1;
    return CALLS;
}
