// What crosses from C++ to Python: numbers alone. An exception that left a function called by ctypes, or a parallel region, would
// end the process; here it becomes a status, which library.py turns into a Python exception.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

enum Status : int { FINE = 0, NO_MEMORY = 1, FAILED = 2 };  // the same in library.py

// The status of some work that may throw.
template <class F> int status_of(const F &work) noexcept {
    try {
        work();
        return FINE;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

// The first exception of the threads of a parallel region, thrown again behind it.
class Failure {
   public:
    // Work of one thread; none once something has failed.
    template <class F> void guard(const F &work) noexcept {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            work();
        } catch (...) {
            if (!failed_.exchange(true)) first_ = std::current_exception();
        }
    }

    explicit operator bool() const { return failed_.load(std::memory_order_relaxed); }

    // behind the region, where all threads have met
    void rethrow() const {
        if (first_) std::rethrow_exception(first_);
    }

   private:
    std::atomic<bool> failed_{false};
    std::exception_ptr first_;
};

// What `layout` of every library returns: 0 → the version of its functions' arguments, n → the bytes of its n-th structure.
template <class... Structures> int64_t layout_of(int64_t version, int64_t n) {
    const int64_t numbers[] = {version, int64_t(sizeof(Structures))...};
    return n >= 0 && n <= int64_t(sizeof...(Structures)) ? numbers[n] : 0;
}
