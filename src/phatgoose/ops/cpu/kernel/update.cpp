// Routing at one module in one parallel region: scores, choice, A of the chosen, B of the chosen, sum. Knows neither torch nor
// Python, but runs on torch's OpenMP threads. Compiled once per instruction set, which VARIANT names.
//
// Scores are found in two steps. Every gate is scanned in 8 bits (step · codes). As the standardised input has at most the
// norm √d, a scanned score is within `lost`, the 2-norm of what rounding took from that gate, of the true one (Cauchy-Schwarz).
// The experts that can still be among the top k are then scored in float32. So the choice is the one of float32 gates, for a
// quarter of the bytes.

#include <type_traits>

#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "interface.h"
#include "products.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

#ifndef SMALL_TOKENS
#define SMALL_TOKENS 16
#endif

namespace {

constexpr int64_t SMALL = SMALL_TOKENS;  // up to here every token reads its own rows; above, tokens are sorted by expert
constexpr int64_t CHUNK = 1024;          // tokens sorted at once
constexpr int64_t TILE = 128;            // tokens scored at once by a thread, at most
constexpr int64_t BLOCK = 64;            // rows taken at once
constexpr int64_t UNIT = 32;             // pairs of one expert shrunk at once by a thread
constexpr uintptr_t NEAR = 128 * 1024;   // bytes that are sooner read than skipped
constexpr int64_t SUMS = 96 * 1024;        // floats a thread sums into, which should stay in its L2 cache

// Memory for one call, kept by the calling thread for its next one. First measured, then taken.
class Space {
    char* bytes = nullptr;
    size_t size = 0, used = 0;

  public:
    ~Space() { free(bytes); }
    // Whether there is memory for so many floats in so many pieces.
    bool begin(size_t floats, size_t pieces) {
        used = 0;
        const size_t need = floats * sizeof(float) + (pieces + 1) * 64;
        if (need <= size) return true;
        free(bytes);
        bytes = static_cast<char*>(malloc(need));
        size = bytes ? need : 0;
        return bytes;
    }
    template <class T>
    T* take(size_t n) {
        const size_t start = (reinterpret_cast<size_t>(bytes) + used + 63) & ~size_t(63);
        used = start + n * sizeof(T) - reinterpret_cast<size_t>(bytes);
        return reinterpret_cast<T*>(start);
    }
};

// The next number of a counter that threads share.
inline int64_t next(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

struct Moments {
    float mean, inverse, slack, wider;
};

// Mean, 1/√(var + 1e-5), and how far the scan's own rounding can carry a score. A gate's d products are added one after the other
// (every lane is another gate), and a few operations follow: off by at most (d + 16) 2⁻²⁴ ‖step · codes‖ ‖u‖, here of length √d for
// the codes. `lost` longer they may be: `wider` is what to multiply it by, with room for the mean's and the deviation's rounding.
template <class X>
Moments moments(const X* u, int64_t d) {
    const auto sum = [&](auto term, auto rest) {
        vf acc[4] = {};
        int64_t i = 0;
        for (; i + 4 * W <= d; i += 4 * W)
            for (int j = 0; j < 4; j++) acc[j] += term(load(u + i + j * W));
        float s = total((acc[0] + acc[1]) + (acc[2] + acc[3]));
        for (; i < d; i++) s += rest(widen(u[i]));
        return s;
    };
    const float mean = sum([](vf x) { return x; }, [](float x) { return x; }) / float(d);
    const float square = sum([=](vf x) { return (x - mean) * (x - mean); },
                             [=](float x) { return (x - mean) * (x - mean); });
    const float inverse = 1 / sqrtf(square / float(d) + 1e-5f), offset = mean * inverse;
    const float rounding = 6.3e-8f * float(d + 16) * sqrtf(1 + offset * offset);
    return {mean, inverse, rounding * sqrtf(float(d)), 1 + 2 * rounding};
}

// v̄ᵀū/√d in float32, the mean taken off first, as the formula has it.
template <class X>
float exact(const X* u, const float* gate, int64_t d, const Moments& m) {
    vf acc[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W)
        for (int j = 0; j < 2; j++) acc[j] += (load(u + i + j * W) - m.mean) * load(gate + i + j * W);
    float s = total(acc[0] + acc[1]);
    for (; i < d; i++) s += (widen(u[i]) - m.mean) * gate[i];
    return s * m.inverse / sqrtf(float(d));
}

struct Ranked {
    float score;
    int32_t expert;
};

// Has bytes of a mapped file read, without waiting for them. Page by page, as they are touched, the disk would do one thing at a
// time, and read around each what nobody wants. Pieces that are asked for in order and lie near one another are read as one.
class Reading {
    uintptr_t from = 0, to = 0;

  public:
    void add(const void* start, int64_t bytes) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(start), end = begin + uintptr_t(bytes);
        if (begin < from || begin > to + NEAR) {
            ask();
            from = begin, to = end;
        }
        to = max(to, end);  // it may lie in what is asked for already
    }
    void ask() const {
        static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
        const uintptr_t start = from & ~(page - 1);
        if (to) madvise(reinterpret_cast<void*>(start), to - start, MADV_WILLNEED);
    }
};

// Keeps the k best of those offered, best first; of equal scores the lower index, if offered in order.
struct Best {
    Ranked* list;
    int64_t k, held = 0;
    void offer(float score, int64_t expert) {
        if (held == k && !(score > list[k - 1].score)) return;
        int64_t i = held < k ? held++ : k - 1;
        for (; i > 0 && score > list[i - 1].score; i--) list[i] = list[i - 1];
        list[i] = {score, int32_t(expert)};
    }
};

template <class X, class T>
struct Module {
    const Site& s;
    const Call& c;
    const X* u;
    const T *a, *b;
    const int64_t d, d_out, e, k;

    Module(const Site& site, const Call& call)
        : s(site), c(call), u(static_cast<const X*>(call.u)), a(static_cast<const T*>(site.a)),
          b(static_cast<const T*>(site.b)), d(site.d_in), d_out(site.d_out), e(site.experts),
          k(site.gates ? min(site.top_k, site.experts) : site.top_k) {}

    bool scans() const { return e > 2 * k + 2; }
    bool valid(int64_t expert) const { return expert >= 0 && expert < e; }

    // A token in float32: itself, or a copy in `room`.
    const float* in_float(const X* x, float* room) const {
        if constexpr (std::is_same_v<X, float>) return x;
        int64_t i = 0;
        for (; i + W <= d; i += W) store(room + i, load(x + i));
        for (; i < d; i++) room[i] = widen(x[i]);
        return room;
    }

    // Asks for an expert's rows, if they may have to be read: once an epoch, as asking takes a microsecond even where they needn't.
    void ask(int64_t expert, Reading& of_a, Reading& of_b) const {
        if (!valid(expert) || !s.ranks[expert]) return;
        const uint32_t now = __atomic_load_n(&s.prefetch->epoch, __ATOMIC_RELAXED);
        if (__atomic_exchange_n(&s.fetched[expert], now, __ATOMIC_RELAXED) == now) return;
        const int64_t in = s.ranks[expert] * d * int64_t(sizeof(T)), out = s.ranks[expert] * d_out * int64_t(sizeof(T));
        of_a.add(a + s.starts[expert] * d, in);
        of_b.add(b + s.starts[expert] * d_out, out);
        if (__atomic_add_fetch(&s.prefetch->bytes, in + out, __ATOMIC_RELAXED) > s.prefetch->limit) {
            __atomic_store_n(&s.prefetch->bytes, 0, __ATOMIC_RELAXED);
            __atomic_fetch_add(&s.prefetch->epoch, 1, __ATOMIC_RELAXED);
        }
    }
    template <class Experts>
    void ask_ahead(int64_t n, Experts expert) const {
        if (!s.prefetch) return;
        Reading of_a, of_b;
        for (int64_t i = 0; i < n; i++) ask(expert(i), of_a, of_b);
        of_a.ask();
        of_b.ask();
    }

    int64_t lanes_of_all() const { return (e + LANES - 1) / LANES * LANES; }

    // The k best experts of a token and the softmax of their scores, from scanned products Σ code · u [E, padded to 16].
    void choose(const X* x, const float* scanned, float* upper, Ranked* list, int64_t* chosen, float* weights) const {
        const Moments m = moments(x, d);
        Best best{list, k};
        if (scans()) {
            const float least = bounds(m, scanned, upper, list) - 2 * m.slack;
            int64_t waiting = -1;  // the gate asked for from memory while the one before it is scored
            for (int64_t i = 0; i < e; i += W)
                for (unsigned bits = at_least(load(upper + i), least); bits; bits &= bits - 1) {
                    const int64_t expert = i + __builtin_ctz(bits);
                    if (expert >= e) break;
                    for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(s.gates + expert * d + j, 0, 2);
                    if (waiting >= 0) best.offer(exact(x, s.gates + waiting * d, d, m), waiting);
                    waiting = expert;
                }
            if (waiting >= 0) best.offer(exact(x, s.gates + waiting * d, d, m), waiting);
        } else {
            for (int64_t i = 0; i < e; i++) best.offer(exact(x, s.gates + i * d, d, m), i);
        }
        float sum = 0;
        for (int64_t j = 0; j < k; j++) sum += expf(list[j].score - list[0].score);
        for (int64_t j = 0; j < k; j++) {
            chosen[j] = list[j].expert;
            weights[j] = expf(list[j].score - list[0].score) / sum;
        }
    }

    // Upper bounds of every score, and a number that k scores reach for sure: the k-th largest of lower bounds, or, where that is
    // quicker, of the largest lower bound in each lane.
    float bounds(const Moments& m, const float* scanned, float* upper, Ranked* list) const {
        const float unit = m.inverse / sqrtf(float(d));
        vf most = vf{} - INFINITY;
        Best best{list, k};
        for (int64_t i = 0; i < lanes_of_all(); i += W) {
            const vf score = (load(scanned + i) - m.mean * load(s.sum + i)) * load(s.step + i) * unit, lost = load(s.lost + i) * m.wider;
            store(upper + i, score + lost);
            const vf lower = score - lost;
            if (k <= W / 2) most = larger(most, lower);
            else
                for (int j = 0; j < W; j++) best.offer(lower[j], i + j);
        }
        for (int j = 0; j < W && k <= W / 2; j++) best.offer(most[j], j);
        return list[k - 1].score;
    }

    // out = y + sums at columns [from, to) of token n.
    void add(int64_t n, const float* sums, int64_t from, int64_t to) const {
        if (c.y_kind) add_to<bf16>(n, sums, from, to);
        else add_to<float>(n, sums, from, to);
    }
    template <class Y>
    void add_to(int64_t n, const float* sums, int64_t from, int64_t to) const {
        const Y* y = static_cast<const Y*>(c.y) + n * d_out;
        Y* out = static_cast<Y*>(c.out) + n * d_out;
        int64_t i = from;
        for (; i + W <= to; i += W) store(out + i, load(y + i) + load(sums + i - from));
        for (; i < to; i++) store(out + i, widen(y[i]) + sums[i - from]);
    }

#include "few.inc"
#include "many.inc"
};

template <class X, class T>
int run(const Site& site, const Call& call) {
    thread_local Space space;
    const Module<X, T> module(site, call);
    for (int64_t i = 0; i < call.tokens * site.top_k && !site.gates; i++)
        if (call.chosen[i] >= site.experts) return 3;
    if (call.tokens <= SMALL) return !module.few(space);
    for (int64_t n = 0; n < call.tokens; n += CHUNK)
        if (!module.many(space, n, min(CHUNK, call.tokens - n))) return 1;
    return 0;
}

}  // namespace

int JOIN(run_, VARIANT)(const Site& site, const Call& call) {
    if (call.u_kind) return site.kind ? run<bf16, bf16>(site, call) : run<bf16, float>(site, call);
    return site.kind ? run<float, bf16>(site, call) : run<float, float>(site, call);
}
