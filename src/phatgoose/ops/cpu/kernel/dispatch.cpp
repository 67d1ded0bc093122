// Picks an instruction set at run time. Compiled for the plainest processor; HAS_… say which variants were compiled.
#include "interface.h"

#define DECLARE(name) int run_##name(const Site&, const Call&);
DECLARE(avx512bf16)
DECLARE(avx512)
DECLARE(avx2)
DECLARE(portable)

namespace {

struct Variant {
    const char* name;
    int (*run)(const Site&, const Call&);
};

struct Variants {
    Variant list[4];
    int count = 0;
    void add(const char* name, int (*run)(const Site&, const Call&)) { list[count++] = {name, run}; }
    Variants() {
#if defined(__x86_64__)
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        (void)wide;
#ifdef HAS_AVX512BF16
        if (wide && __builtin_cpu_supports("avx512bf16")) add("avx512bf16", run_avx512bf16);
#endif
#ifdef HAS_AVX512
        if (wide) add("avx512", run_avx512);
#endif
#ifdef HAS_AVX2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("avx2", run_avx2);
#endif
#endif
        add("portable", run_portable);
    }
};

const Variants& variants() {
    static const Variants known;
    return known;
}

}  // namespace

// The i-th instruction set this processor can run, best first; null after the last.
extern "C" const char* phatgoose_variant(int i) {
    return i >= 0 && i < variants().count ? variants().list[i].name : nullptr;
}

// kinds: bit 0 says that u, bit 1 that y is bfloat16. Returns 0; 1: out of memory; 2: no such variant; 3: an expert was given that there isn't.
extern "C" int phatgoose_run(int variant, const Site* site, const void* u, const void* y, void* out, int64_t tokens,
                             int64_t* chosen, float* weights, int64_t kinds) {
    if (!phatgoose_variant(variant)) return 2;
    const Call call{u, y, out, tokens, chosen, weights, kinds & 1, (kinds >> 1) & 1};
    return variants().list[variant].run(*site, call);
}
